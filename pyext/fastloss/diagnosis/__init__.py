"""Is a loss sound? :func:`check` answers for any callable ``(prediction, target) -> tensor``, property by property."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from .._progress import progress_bar
from . import calculus, contract, plain_call
from .calculus import _line
from .report import Curve, Finding, Report, failed, skipped
from .subject import NoGradientError, NotOfferedError, Subject, shapes
from .tasks import KINDS, Task, make_task

NOTES = ("vmap", "empty batch")  # warn for most losses in use, torch's among them

__all__ = ["KINDS", "NOTES", "Curve", "Finding", "Report", "Task", "check", "make_task"]


def check(
    loss_fn: Callable[..., Any],
    kind: str | Task | None = None,
    *,
    classes: int | None = None,
    samples: int = 6,
    shape: tuple[int, ...] | None = None,
    ignore_index: int | None = None,
    reference: Callable[..., Any] | None = None,
    shift_invariant: bool | None = None,
    couples_samples: bool = False,
    require: Collection[str] = (),
    compile: bool | str = True,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Examine a loss: gradient, finiteness, precision, usefulness, optimum, reductions, weights, autograd, compilers.

    Options named ``reduction``, ``ignore_index``, ``label_smoothing``, ``pos_weight``, ``weight``, ``class_weight`` and
    ``sample_weight`` (a function's parameters, a module's attributes) are found and examined. A fault comes with the
    smallest input found that shows it. A loss that takes more than a millisecond a call is examined with fewer points,
    which the report says.

    Args:
        loss_fn: ``(prediction, target) -> tensor``, a function or a module.
        kind: what it is fed with, one of :data:`KINDS` or a :class:`Task` of your own; by default guessed.
        classes: number of classes C, by default 5 or what the loss takes; samples: N; shape: what follows (N,) or
            (N, C), default (3,) for regression.
        ignore_index: target to be ignored, if the loss has one but no option of that name.
        reference: another implementation, which the loss is held against: values, gradients, dtypes, reductions; its
            rounding errors are printed beside.
        shift_invariant: True if softmax is meant, so that a shift of all logits must change nothing.
        couples_samples: True if the samples of a batch are meant to be compared with each other (contrastive losses,
            Dice over the batch): batch size, order and leaks are left out.
        require: of :data:`NOTES`, properties that are to warn: without, what most losses in use show is a note.
        compile: also try torch.compile: True traces forward and backward into a graph (a second or two), 'inductor'
            generates code for it, too (several seconds, needs a C++ compiler).
        seed: of the random inputs.
        progress: a bar of tqdm on stderr, where that is installed, that names the property being examined; by default
            on a terminal, after a second.

    Returns:
        A :class:`Report`. If the loss cannot be called with such inputs, it has one failure, named ``call``.

    Raises:
        ValueError: no such kind, nothing like that to require, or numbers out of range.
        TypeError: ``loss_fn`` cannot be called.
    """
    began = time.perf_counter()
    if samples < 2 or (classes is not None and classes < 2):
        raise ValueError(f"samples and classes must be at least 2, got {samples} and {classes}")
    if compile not in (True, False, "inductor"):
        raise ValueError(f"compile must be True, False or 'inductor', got {compile!r}")
    if set(require) - {*NOTES}:
        raise ValueError(f"require names of {', '.join(NOTES)}, got {', '.join(sorted(set(require) - {*NOTES}))}")
    loss_fn = plain_call.callable_loss(loss_fn)
    title = plain_call.name_of(loss_fn)
    if kind is None:
        task, note = plain_call.guess(loss_fn, classes, shape)
    elif isinstance(kind, Task) or classes is not None:
        task, note = kind if isinstance(kind, Task) else make_task(kind, classes or 5, shape), ""
    else:
        task, note = plain_call.settle(loss_fn, kind, shape)
    subject = Subject(
        loss_fn,
        task,
        samples=samples,
        seed=seed,
        ignore_index=ignore_index,
        reference=None if reference is None else plain_call.callable_loss(reference),
        shift_invariant=shift_invariant,
        couples_samples=couples_samples,
    )
    prediction, target = subject.sample()
    inputs = f"{KINDS.get(task.name, 'inputs of your own')}; {shapes(prediction, target)}"
    report = Report(title, task.name, inputs, seed, 0.0, [])
    report.notes = [note] if note else []
    properties = {"repeatable": contract.repeatable, **calculus.PROPERTIES, **contract.PROPERTIES}
    if compile:
        properties["torch.compile"] = contract.compiles("inductor" if compile == "inductor" else "aot_eager")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the inputs are tiny: a second thread would mostly wait for the first
    try:
        with warnings.catch_warnings(), progress_bar("", len(properties), progress) as bar:
            warnings.simplefilter("ignore")
            _run(subject, report, properties, bar)
    finally:
        torch.set_num_threads(threads)
    for f in report.findings:
        if f.name in NOTES and f.name not in require and f.status == "warning":
            f.status = "note"
    _join(report.findings)
    report.curves = subject.curves
    report.seconds = time.perf_counter() - began
    return report


def _run(subject: Subject, report: Report, properties: dict[str, Callable[[Subject], Finding]], bar: Any) -> None:
    """Examine the properties that can be, and note what explains several findings at once."""
    subject.tick = lambda: bar.update(0)  # with every call of the loss, as a property may take long
    fault = plain_call.examine(subject)
    if fault is not None:
        report.findings = [fault]
        subject.float32_only = fault.name in properties
        if not subject.float32_only:
            return
        del properties[fault.name]
    subject.measure()
    subject.drop_unused()
    if not math.isfinite(subject.value(*subject.sample())):
        report.notes.append("The value is not finite for an ordinary input: nothing else can be told.")
        properties = {k: v for k, v in properties.items() if k in ("finite", "optimum", "inputs untouched")}
    if subject.effort < 1:
        report.notes.append(f"A call takes {1e3 * subject.cost:.3g} ms: examined with fewer points and steps.")
    for name, examine in properties.items():
        bar.set_description(name, refresh=False)
        report.findings.append(replace(_examine(subject, examine), name=name))
        bar.update()
    if subject.differentiable and subject.rounds_to is not None:
        report.notes.append("Values are rounded inside (see precision): other findings may be consequences of that.")
    if "repeatable" in report.named("failure"):
        report.notes.append("Not repeatable: the other findings may be mere consequences of that.")


# What has the same cause as another finding, if both are bad and the words occur in both.
JOINED = (
    ("finite", "half precision", "equal to the target"),
    ("finite", "half precision", "exactly"),
    ("result dtype and device", "useful gradient", ""),
    ("no leak between samples", "batch size", ""),
    ("no leak between samples", "sample order", ""),
)


def _join(findings: list[Finding]) -> None:
    """One cause, one finding: the others point at it."""
    bad = {f.name: f for f in findings if f.bad}
    for first, second, words in JOINED:
        if first in bad and second in bad and all(words in bad[name].evidence for name in (first, second)):
            without = "no gradient" in bad[second].evidence and "not a tensor" in bad[first].evidence
            coupled = first.startswith("no leak") and "compared with each other" in bad[second].why
            if words or without or coupled:
                bad[second].same_as = first
    raised: dict[str, str] = {}
    for f in bad.values():
        what = re.search(r"\w*(Error|Exception): .*", f.evidence)
        if what and not f.same_as:
            f.same_as = raised.get(what[0], "")
            raised.setdefault(what[0], f.name)


def _examine(subject: Subject, examine: Callable[[Subject], Finding]) -> Finding:
    try:
        return examine(subject)
    except NoGradientError as e:
        return _raises(subject, e) if subject.differentiable else skipped("The result has no gradient.")
    except NotOfferedError as e:
        return skipped(f"Not offered: the constructor refuses {_line(e)}")
    except Exception as e:
        if not plain_call.raised_by_loss(e):
            return skipped(f"Not examined: the tool cannot do it with such tensors ({type(e).__name__}: {_line(e)}).")
        return _raises(subject, e)


def _raises(subject: Subject, e: Exception) -> Finding:
    """A fault that is an exception, with the smallest input that raises the same."""

    def fault(raised: Exception) -> Finding:
        return failed(
            f"Raises {type(raised).__name__}: {_line(raised)}",
            "It should take every input of this kind; if the input is not meant for it, choose another kind.",
        )

    def test(prediction: torch.Tensor, target: torch.Tensor) -> Finding:
        try:
            subject.gradient(prediction, target)
        except Exception as again:
            return fault(again) if type(again) is type(e) else skipped("")
        return skipped("")

    found = subject.judged(test, *subject.last) if subject.last is not None else skipped("")
    return found if found.bad else fault(e)
