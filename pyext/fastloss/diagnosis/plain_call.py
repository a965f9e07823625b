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
OF_CLASSES = ("classification", "log_probabilities", "class_probabilities")  # class indices
GUESSES: tuple[str, ...] = (*OF_CLASSES, "regression", "binary", "counts", "probabilities", "sign", "kl")
GUESSES += ("positive", "binary_probabilities", "distance", "distance_different", "distance_same")
SHAPED = ("segmentation", "masks", "images", "boxes")  # tried where nothing else is taken
OF_THREE = ("triplets", "pairs", "rankings", "gaussian")  # for a loss of three arguments
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


def guess(fn: Loss, classes: int | None, shape: tuple[int, ...] | None) -> tuple[Task, str]:
    """The first kind that the loss takes and that it is least for where the prediction is right, and a note on that.

    Class indices come first, since few losses take them by mistake.
    """
    counts = [classes] if classes is not None else list(dict.fromkeys([5, *sizes_in(fn), 3, 2, 10, 4]))
    taken: list[Task] = []

    def chosen(task: Task, count: int, badly: bool = False) -> tuple[Task, str]:
        how = f", classes={count}" if count != (classes or 5) else ""
        shaped = f" with {shapes(*task.make(6, torch.Generator()))}" if badly or how or task.name in SHAPED else ""
        text = ", though it fits badly" if badly else " from what the loss takes"
        return task, f"The kind is a guess{text}: {task.name}{how}{shaped}. Pass kind= for another."

    for kind in _named(_required(fn)):
        task = make_task(kind, 5, shape)
        if _takes(fn, task) or (kind == "gaussian" and _levels(fn, task)):
            return chosen(task, classes or 5)
    for count in counts:
        by_class = [(task, _levels(fn, task)) for task in (make_task(kind, count, shape) for kind in OF_CLASSES)]
        fitting = [task for task, levels in by_class if _fits(levels)]
        if fitting and _names_do_not_matter(fn, fitting[0]):
            return chosen(make_task("embeddings", count, shape), classes or 5)
        task, levels = by_class[0]
        # A loss of class indices is none of real numbers, however wrong it is.
        if fitting or (levels is not None and all(map(math.isfinite, levels))):
            return chosen(fitting[0] if fitting else task, count)
        taken += [task for task, levels in by_class if levels is not None]
        for kind in GUESSES[len(OF_CLASSES) :] if count == counts[0] else ("probabilities", "kl"):
            task = make_task(kind, count, shape)
            if _takes(fn, task):
                return chosen(task, count)
            taken += [task] if count == counts[0] and _levels(fn, task) is not None else []
        if count == counts[0] and _nearly(fn, make_task("regression", count, shape)):
            return chosen(make_task("regression", count, shape), count)
    for kind in SHAPED if shape is None else ():
        for count in counts if kind == "segmentation" else counts[:1]:
            task = make_task(kind, count)
            if _takes(fn, task):
                return chosen(task, count)
    for kind in GUESSES:
        task = make_task(kind, counts[0], shape)
        if task.call is None and _takes(lambda p, t: fn(t, p), task):
            return task, f"As (target, prediction) it would fit {kind}: the prediction comes first, as in torch."
    if taken:
        return chosen(taken[0], classes or 5, badly=True)
    return make_task("regression", counts[0], shape), (
        f"No kind was given, and the loss takes none of the usual inputs. {_likeliest(fn)}"
    )


def _named(required: list[str]) -> list[str]:
    """The kinds of three arguments that the names of a loss's arguments tell."""
    if len(required) != 3:
        return []
    first, second, third = (name.lower() for name in required)
    if first.startswith("anchor") or third.startswith("neg"):
        return ["triplets"]
    if third.startswith(("var", "sigma", "std")):
        return ["gaussian"]
    return ["pairs", "rankings"] if (first[-1], second[-1]) in (("1", "2"), ("a", "b"), ("l", "r")) else []


def _nearly(fn: Loss, task: Task) -> bool:
    """Least somewhere beside what is right, as with a penalty."""
    levels = _levels(fn, task)
    return levels is not None and all(map(math.isfinite, levels)) and levels[0] < min(levels[1:4])


def _likeliest(fn: Loss) -> str:
    """Two calls to try, for a loss that no kind was found for."""
    required, name = _required(fn), name_of(fn)
    if len(required) > 2:
        first = [*_named(required), "pairs"][0]
        return (
            f"Try fastloss.check({name}, {first!r}), or a Task with call=lambda loss, p, t: loss(...) that gives it "
            "what it takes."
        )
    sizes = sizes_in(fn)
    first = f'"classification", classes={sizes[0] if sizes else 3}'
    return f'Try fastloss.check({name}, {first}), or fastloss.check({name}, "regression", shape=(...)).'


def sizes_in(fn: Any) -> list[int]:
    """Lengths of the vectors that a loss holds: parameters, buffers, attributes, closures, defaults, globals."""
    held: list[Any] = []
    if isinstance(fn, torch.nn.Module):
        for module in fn.modules():
            held += [*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()]
            held += [v for k, v in vars(module).items() if isinstance(v, int) and "class" in k]
    while isinstance(fn, functools.partial):
        held += [*fn.args, *fn.keywords.values()]
        fn = fn.func
    if inspect.isfunction(fn):
        held += [cell.cell_contents for cell in fn.__closure__ or () if _filled(cell)]
        held += [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values(), *fn.__code__.co_consts]
        held += [fn.__globals__[name] for name in fn.__code__.co_names if name in fn.__globals__]
    sizes = []
    for x in held:
        if isinstance(x, torch.Tensor):
            sizes.append(x.numel() if x.dim() and x.numel() in x.shape else 0)
        elif isinstance(x, (list, tuple)):
            sizes.append(len(x) if all(isinstance(v, (int, float)) for v in x) else 0)
        elif isinstance(x, int) and not isinstance(x, bool):
            sizes.append(x)
    return list(dict.fromkeys(n for n in sizes if 2 <= n <= 300))[:6]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises where it is not assigned yet
    except ValueError:
        return False
    return True


def _names_do_not_matter(fn: Loss, task: Task) -> bool:
    """Labels only say which samples belong together: what is fed are embeddings, not logits."""
    prediction, target = task.make(8, torch.Generator().manual_seed(1))
    count = prediction.shape[1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before, after = (_level(fn, task, prediction, t) for t in (target, (target + 1) % count))
    except Exception:
        return False
    return before == after != 0


def settle(fn: Loss, kind: str, shape: tuple[int, ...] | None) -> tuple[Task, str]:
    """The task of this kind with as many classes as the loss takes: five, or what its weights say."""
    task = make_task(kind, 5, shape)
    if (task.classes or kind == "embeddings") and _levels(fn, task) is None:
        for count in dict.fromkeys([*sizes_in(fn), 3, 2, 10, 4]):
            other = make_task(kind, count, shape)
            if _levels(fn, other) is not None:
                return other, f"It takes {count} classes, not 5: classes={count} is a guess."
    return task, ""


def _levels(fn: Loss, task: Task) -> list[float] | None:
    """The loss at right, exaggerated and wrong predictions; None if it does not take such inputs."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = task.make(7, generator)
    right = task.perfect(target) if task.perfect is not None else prediction
    points = [right, 3 * right, prediction]
    if task.decided is None:
        noise = torch.randn(right.shape, generator=generator).double()
        points.append(right + 0.5 * noise)
        for x in (0.1, 0.01, 0.01):
            noise = torch.randn(right.shape, generator=generator).double()
            points += [right + x * noise, right - x * noise]
    for dtype in (torch.float64, torch.float32):
        try:
            with warnings.catch_warnings():
                # Broadcasting is what a wrong kind would go through with, and what torch warns of.
                warnings.simplefilter("ignore")
                warnings.filterwarnings("error", "Using a target size")
                return [_level(fn, task, p.to(dtype), target) for p in points]
        except Exception:
            continue
    return None


EXACT = ("regression", "counts", "positive", "images", "boxes", "kl", "probabilities")


def _takes(fn: Loss, task: Task) -> bool:
    """It takes such inputs and is least where the prediction is right."""
    if task.name == "counts" and _shift_does_not_matter(fn, task):
        return False  # softmax: shares, not rates
    return _fits(_levels(fn, task), task.name in EXACT)


def _shift_does_not_matter(fn: Loss, task: Task) -> bool:
    prediction, target = task.make(7, torch.Generator().manual_seed(0))
    try:
        before, after = (_level(fn, task, p, target) for p in (prediction, prediction + 0.5))
    except Exception:
        return False
    return abs(before - after) <= 1e-9 * abs(before)


def _fits(levels: list[float] | None, exact: bool = True) -> bool:
    if levels is None or not all(map(math.isfinite, levels)):
        return False
    least, exaggerated, wrong, *beside = levels
    if beside:
        slack = 1e-6 * abs(wrong)
        # Where numbers are to be met exactly, everything else costs more; distances need only be small, or large.
        nearest = min(exaggerated, beside[0]) - least
        return least <= min(beside) + slack and least < wrong - slack and nearest > (slack if exact else -slack)
    margin = 0.1 * abs(wrong)  # of a decision: surer is no worse, and nearly nothing is left
    return least < wrong and exaggerated > least - margin and (least < 0 or least < margin)


def _level(fn: Loss, task: Task, prediction: torch.Tensor, target: torch.Tensor) -> float:
    target = target.to(prediction.dtype) if target.is_floating_point() else target.clone()
    prediction = prediction.detach().requires_grad_()  # a loss may differentiate inside
    given = task.link(prediction) if task.link else prediction.clone()
    out = task.call(fn, given, target) if task.call else fn(given, target)
    return float(torch.as_tensor(out[0] if isinstance(out, (tuple, list)) else out).detach().double().sum())


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
        s.value(prediction, target)
    except NoGradientError:
        pass
    except Exception as e:
        if _only_without_graph(s):
            s.needs_graph = True
            return None
        fault = _fault(f"Backward raises {type(e).__name__} for {given}: {_line(e)}", _hint(s, e))
        return s.shown(fault, prediction, target)
    return None


def _only_without_graph(s: Subject) -> bool:
    """It raises under no_grad alone: it takes a gradient inside."""
    try:
        s.value_and_gradient(*s.sample())
    except Exception:
        return False
    return True


def _takes_float32(s: Subject) -> bool:
    prediction, target = s.sample()
    try:
        s.value_and_gradient(prediction.float(), target)
    except Exception:
        return False
    return True


def raised_by_loss(e: Exception) -> bool:
    """Whether an exception came out of the loss or its backward, not out of what the tool did with the tensors."""
    frames = traceback.extract_tb(e.__traceback__)
    if any(f.filename.endswith(os.path.join("diagnosis", "subject.py")) and f.name == "configured" for f in frames):
        return False
    calls = (os.path.join("diagnosis", "subject.py"), os.path.join("torch", "autograd", "__init__.py"))
    return any(f.filename.endswith(calls) and f.name in ("call", "slope", "grad") for f in frames)


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
        fixed = f"functools.partial({name_of(s.fn)}, {given})"
        if isinstance(s.fn, torch.nn.Module):  # what is called has no such parameter before it is constructed
            fixed = f"lambda p, t: loss(p, t, {given})"
        kinds = "', '".join(OF_THREE)
        return (
            f"It takes more than prediction and target: fix the others with {fixed}, or give them defaults; for three "
            f"arguments there are the kinds '{kinds}', for any Task(call=...)."
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
        for kind in GUESSES
        if kind not in (s.task.name, "sign", "distance", "counts", "kl") and _takes(s.fn, make_task(kind))
    ]
    for count in sizes_in(s.fn) if s.task.classes else ():
        if _levels(s.fn, make_task("classification", count)):
            return f"It holds a vector of {count} numbers: say classes={count}."
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
