"""Before any property: can the loss be called, with inputs of which kind, and is what it returns a loss?"""

from __future__ import annotations

import functools
import inspect
import math
import os
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .calculus import _dtype, _line
from .report import Finding, failed, passed
from .subject import NoGradientError, Subject, shapes
from .tasks import KINDS, Task, make_task

Loss = Callable[..., Any]
OWN = os.path.dirname(os.path.dirname(__file__))
GUESSES: tuple[str, ...] = ("classification", "class_probabilities", "regression", "binary", "probabilities", "sign")
GUESSES += ("kl", "binary_probabilities")
FLOAT32_ONLY = (
    "It takes float32 only, and everything else is examined in float64: make constants with "
    "prediction.new_tensor(...) or .to(prediction.dtype), and leave .float() out."
)


def callable_loss(loss_fn: Any) -> Loss:
    """The loss itself; of a class, an instance."""
    if isinstance(loss_fn, type):
        try:
            loss_fn = loss_fn()
        except Exception as e:
            raise TypeError(
                f"{loss_fn.__name__} is a class and cannot be constructed without arguments ({_line(e)}); pass an "
                f"instance: fastloss.check({loss_fn.__name__}(...))"
            ) from e
    if not callable(loss_fn):
        hint = ": pass the function itself, loss, not the result of a call, loss(...)"
        raise TypeError(f"a loss is a function or a module, not a {type(loss_fn).__name__}{hint}")
    return loss_fn  # type: ignore[no-any-return]


def name_of(loss_fn: Loss) -> str:
    if isinstance(loss_fn, functools.partial):
        options = ", ".join(f"{k}={v!r}" for k, v in loss_fn.keywords.items() if not isinstance(v, torch.Tensor))
        return f"{name_of(loss_fn.func)}({options or '...'})"
    return getattr(loss_fn, "__qualname__", None) or type(loss_fn).__name__


def guess(fn: Loss, classes: int, shape: tuple[int, ...] | None) -> tuple[Task, str]:
    """The first kind that the loss takes and that it is least for where the prediction is right, and a note on that.

    Class indices come first, since few losses take them by mistake.
    """
    taken: list[Task] = []
    for kind in GUESSES:
        task = make_task(kind, classes, shape)
        levels = _levels(fn, task)
        if levels is None:
            continue
        # A loss of class indices is none of real numbers, however wrong it is.
        if _fits(levels) or (kind == "classification" and all(map(math.isfinite, levels))):
            return task, f"The kind is a guess from what the loss takes: {kind}. Pass kind= for another."
        taken.append(task)
    for kind in GUESSES:
        task = make_task(kind, classes, shape)
        if _fits(_levels(lambda p, t: fn(t, p), task)):
            return task, f"As (target, prediction) it would fit {kind}: the prediction comes first, as in torch."
    if taken:
        return taken[0], f"The kind is a guess: {taken[0].name}, though it fits badly. Pass kind= for another."
    return make_task("regression", classes, shape), "No kind was given, and the loss takes none of the usual inputs."


def _levels(fn: Loss, task: Task) -> list[float] | None:
    """The loss at right, exaggerated and wrong predictions; None if it does not take such inputs."""
    assert task.perfect is not None
    generator = torch.Generator().manual_seed(0)
    prediction, target = task.make(7, generator)
    right = task.perfect(target)
    beside = right + 0.5 * torch.randn(right.shape, generator=generator).double()
    points = [right, 3 * right, prediction, *([] if task.decided else [beside])]
    for dtype in (torch.float64, torch.float32):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # Broadcasting is what a wrong kind would go through with, and what torch warns of.
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", "Using a target size")
                return [_level(fn, task, p.to(dtype), target) for p in points]
        except Exception:
            continue
    return None


def _fits(levels: list[float] | None) -> bool:
    if levels is None or not all(map(math.isfinite, levels)):
        return False
    least, exaggerated, wrong, *beside = levels
    if beside:
        return least < min(levels[1:])
    margin = 0.1 * abs(wrong)  # of a decision: surer is no worse, and nearly nothing is left
    return least < wrong and exaggerated > least - margin and (least < 0 or least < margin)


def _level(fn: Loss, task: Task, prediction: torch.Tensor, target: torch.Tensor) -> float:
    target = target.to(prediction.dtype) if target.is_floating_point() else target.clone()
    out = fn(task.link(prediction) if task.link else prediction.clone(), target)
    return float(torch.as_tensor(out[0] if isinstance(out, (tuple, list)) else out).double().sum())


def examine(s: Subject) -> Finding | None:
    """What is wrong with the plainest call, or None."""
    prediction, target = s.sample()
    given = f"{shapes(prediction, target)} ({_dtype(target.dtype)})"

    def called(p: torch.Tensor, t: torch.Tensor) -> Any:
        return s.raw(p.clone().requires_grad_().clone(), t.clone())

    try:
        out = called(prediction, target)
    except Exception as e:
        float32_only = isinstance(e, RuntimeError) and _takes_float32(s)
        why = FLOAT32_ONLY if float32_only else _hint(s, e)

        def raises(p: torch.Tensor, t: torch.Tensor) -> Finding:
            try:
                called(p, t)
            except Exception as e:
                what = "float64 predictions" if float32_only else f"{shapes(p, t)} ({_dtype(t.dtype)}){_place(e)}"
                return _fault(f"Raises {type(e).__name__} for {what}: {_line(e)}", why)
            return passed("")

        found = s.judged(raises, prediction, target)
        return replace(found, name="result dtype and device") if float32_only else found
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    if first is None:
        return _fault("Returns None.", "Is 'return' missing at the end of the function?")
    if not isinstance(first, torch.Tensor):
        try:
            float(first)
        except Exception:
            return _fault(f"Returns a {type(out).__name__}: {str(out)[:80]}", "A loss returns one tensor.")
    try:
        s.value_and_gradient(prediction, target)
    except NoGradientError:
        pass
    except Exception as e:
        fault = _fault(f"Backward raises {type(e).__name__} for {given}: {_line(e)}", _hint(s, e))
        return s.shown(fault, prediction, target)
    return None


def _takes_float32(s: Subject) -> bool:
    prediction, target = s.sample()
    try:
        s.value_and_gradient(prediction.float(), target)
    except Exception:
        return False
    return True


def _place(e: Exception) -> str:
    """Where in the user's code."""
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(OWN)]
    return f" at {os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""


def _fault(evidence: str, why: str) -> Finding:
    found = failed(evidence, why)
    found.name = "call"
    return found


def _hint(s: Subject, e: Exception) -> str:
    """What the exception of a first call usually means."""
    prediction, target = s.sample()
    text = str(e)
    if isinstance(e, (NameError, NotImplementedError, SyntaxError, AssertionError)):
        return "Nothing can be examined before this is mended."
    if "numpy" in text or any("numpy" in f.filename for f in traceback.extract_tb(e.__traceback__)):
        return "numpy knows no gradient: write the loss with torch operations."
    required = _required(s.fn)
    if isinstance(e, TypeError) and len(required) > 2:
        given = ", ".join(f"{name}=..." for name in required[2:])
        return (
            "It takes more than prediction and target: fix the others with "
            f"functools.partial({name_of(s.fn)}, {given}), or give them defaults."
        )
    if isinstance(e, TypeError) and len(required) < 2 and "positional argument" in text:
        return "A loss is called with two arguments, the prediction and the target."
    try:
        s.fn(target.clone(), s.task.link(prediction) if s.task.link else prediction.clone())
        return (
            "Called with (target, prediction) it works: the prediction comes first, as in torch; "
            "lambda p, t: loss(t, p) turns a loss round that is meant like that."
        )
    except Exception:
        pass
    others = [
        f"{kind} ({KINDS[kind]})"
        for kind in KINDS
        if kind not in (s.task.name, "sign", "distance", "counts", "kl") and _levels(s.fn, make_task(kind))
    ]
    if others:
        return f"Not inputs of this kind, perhaps. It takes: {'; '.join(others)}. Choose with kind=."
    if "dtype" in text or "expected scalar type" in text or "Float" in text:
        return (
            "Tensors of different dtypes meet: the prediction is tried in float64, float32, float16 and bfloat16, so "
            "make constants with prediction.new_tensor(...) or .to(prediction.dtype), and class indices int64."
        )
    return "Compare the shapes: kind=, shape= and classes= choose what the loss is fed with (fastloss.diagnosis.KINDS)."


def _required(fn: Loss) -> list[str]:
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters.values()
    except (TypeError, ValueError):  # built-in functions have none
        return ["prediction", "target"]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
