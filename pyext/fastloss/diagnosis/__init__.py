"""Is a loss sound? :func:`check` answers for any callable ``(prediction, target) -> tensor``, property by property."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import calculus, contract
from .calculus import _line
from .report import Curve, Finding, Report
from .subject import NoGradientError, Subject
from .tasks import KINDS, Task, make_task

__all__ = ["KINDS", "Curve", "Finding", "Report", "Task", "check", "make_task"]


def _guess(fn: Callable[..., Any], classes: int, shape: tuple[int, ...] | None) -> str:
    """The first kind that the loss takes; class indices come first, since few losses take them by mistake."""
    errors = []
    for kind in ("classification", "regression", "binary_probabilities"):
        task = make_task(kind, classes, shape)
        prediction, target = task.make(7, torch.Generator().manual_seed(0))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                fn(task.link(prediction) if task.link else prediction, target)
        except Exception as e:
            errors.append(f"{kind}: {_line(e)}")
            continue
        return kind
    raise ValueError(f"the loss takes none of the usual inputs, pass kind= or a Task ({'; '.join(errors)})")


def check(
    loss_fn: Callable[..., Any],
    kind: str | Task | None = None,
    *,
    classes: int = 5,
    samples: int = 6,
    shape: tuple[int, ...] | None = None,
    ignore_index: int | None = None,
    reference: Callable[..., Any] | None = None,
    shift_invariant: bool | None = None,
    compile: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Examine a loss: gradient, finiteness, precision, usefulness, optimum, reductions, weights, autograd, compilers.

    Options named ``reduction``, ``weight``, ``sample_weight`` and ``ignore_index`` (a function's parameters, a module's
    attributes) are found and examined.

    Args:
        loss_fn: ``(prediction, target) -> tensor``, a function or a module.
        kind: what it is fed with, one of :data:`KINDS` or a :class:`Task` of your own; by default class indices if the
            loss takes them, else regression.
        classes: number of classes C; samples: N; shape: what follows (N,) or (N, C), default (3,) for regression.
        ignore_index: target to be ignored, if the loss has one but no option of that name.
        reference: another implementation whose rounding errors are printed beside.
        shift_invariant: True if softmax is meant, so that a shift of all logits must change nothing.
        compile: also try torch.compile (a second or two).
        seed: of the random inputs.
        progress: name the property being examined on stderr; by default on a terminal, after a second.

    Returns:
        A :class:`Report`.

    Raises:
        ValueError: no such kind, or none that fits.
        Exception: what the loss itself raises for the plainest input of that kind.
    """
    began = time.perf_counter()
    guessed = kind is None
    task = kind if isinstance(kind, Task) else make_task(kind or _guess(loss_fn, classes, shape), classes, shape)
    subject = Subject(
        loss_fn,
        task,
        samples=samples,
        seed=seed,
        ignore_index=ignore_index,
        reference=reference,
        shift_invariant=shift_invariant,
    )
    prediction, target = subject.sample()
    subject.result(prediction, target)  # what it raises here is the caller's to see
    properties = {**calculus.PROPERTIES, **contract.PROPERTIES}
    if compile:
        properties["torch.compile"] = contract.compiles
    findings = []
    show = sys.stderr.isatty() if progress is None else progress
    for i, (name, examine) in enumerate(properties.items()):
        if show and time.perf_counter() - began > 1:
            print(f"\r[{i + 1}/{len(properties)}] {name:<24}", end="", file=sys.stderr, flush=True)
        # The inputs are tiny: a second thread would mostly wait for the first.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            findings.append(_examine(subject, name, examine))
        finally:
            torch.set_num_threads(threads)
    if show:
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
    inputs = KINDS.get(task.name, "inputs of your own") + (" (guessed: pass kind= for another)" if guessed else "")
    shapes = f"prediction {list(prediction.shape)}, target {list(target.shape)}"
    title = getattr(loss_fn, "__qualname__", None) or type(loss_fn).__name__
    return Report(title, task.name, f"{inputs}; {shapes}", seed, time.perf_counter() - began, findings, subject.curves)


def _examine(subject: Subject, name: str, examine: Callable[[Subject], Finding]) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return examine(subject)
    except NoGradientError:
        return Finding(name, "skipped", "The result has no gradient.")
    except Exception as e:
        return Finding(
            name,
            "failure",
            f"The loss raises {type(e).__name__}: {_line(e)}",
            {},
            None,
            "It should take every input of this kind; if the input is not meant for it, choose another kind.",
        )
