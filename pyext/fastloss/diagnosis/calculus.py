"""Properties of the loss as a function: gradient, finite values, precision, continuity, optimum.

A property takes the loss and returns a finding; what it says of one input is a test of its own, ``(prediction, target)
-> Finding``, which :meth:`Subject.judged` repeats on ever smaller inputs when it finds a fault.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .report import Curve, Finding, failed, noted, passed, skipped, warned
from .subject import NoGradientError, Subject

STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-8)
OptionsFor = Callable[[Tensor, Tensor], dict[str, Any]]  # for this prediction and target


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return (text[0] if text else type(e).__name__)[:160]


def _error(relative: float) -> str:
    return f"{relative:.1e}" if relative > 1e-9 else "below 1e-9"


def _mixed(out: Tensor) -> Tensor:
    """One number that tells the elements of reduction 'none' apart."""
    return out.sum() if out.dim() == 0 else (out * torch.linspace(0.5, 1.5, out.numel()).to(out).view_as(out)).sum()


def _gradient_error(
    s: Subject, prediction: Tensor, target: Tensor, options: dict[str, Any]
) -> tuple[float, float, float] | None:
    """The largest error of a slope relative to the largest slope, with that slope and the difference quotient.

    Slopes are taken along every entry, or with a slow loss along a few directions. One is right when it lies between
    the one-sided difference quotients: at a kink any slope between is a subgradient. The step that agrees best counts,
    since a loss that computes in float32 needs a longer one; a wrong gradient agrees at none.
    """
    value, grad = s.value_and_gradient(prediction, target, total=_mixed, **options)
    if not (math.isfinite(value) and grad.isfinite().all()):
        return None  # said under "finite"
    entries = prediction.numel()
    tries = min(entries, s.some(40))
    if tries == entries:
        directions = torch.eye(entries, dtype=torch.float64)
    else:
        directions = torch.randn(tries, entries, generator=s.generator(12)).double()
    along = (directions @ grad.double().reshape(-1)).tolist()
    best: tuple[float, float, float] | None = None
    # What is inside may be of ordinary size where the value itself vanishes, as in 1 - overlap.
    rounding = 64 * 2.3e-16 * max(abs(value), s.level)
    if s.rounds_to is not None:  # of what is inside, too
        rounding = 4 * torch.finfo(torch.float32).eps * max(abs(value), float(prediction.abs().max()))
    for step in STEPS:
        worst = (0.0, 0.0, 0.0)
        quotients = []
        for d in directions.view(tries, *prediction.shape):
            h = step * max(1.0, float((d * prediction).abs().max()))
            up, down = (s.value(prediction + x * d, target, total=_mixed, **options) for x in (h, -h))
            quotients.append(((value - down) / h, (up - value) / h, h))
        finite = [abs(q) for q3 in quotients for q in q3[:2] if math.isfinite(q)]
        scale = max([*map(abs, along), *finite, 1e-30])
        for g, (before, after, h) in zip(along, quotients, strict=True):
            if not (math.isfinite(before) and math.isfinite(after)):
                continue
            low, high = min(before, after), max(before, after)
            if tries < entries and high - low > 1e-2 * scale:
                continue  # where kinks meet, a subgradient need not lie between the slopes along a slanted line
            error = max(low - g, g - high, 0.0) - rounding / h
            if error > worst[0] * scale:
                worst = (error / scale, g, (before + after) / 2)
        if best is None or worst[0] < best[0]:
            best = worst
        if best[0] < 1e-5:
            break
    return best


def _gradient_at(s: Subject, where: str, options: OptionsFor, prediction: Tensor, target: Tensor) -> Finding:
    found = _gradient_error(s, prediction, target, options(prediction, target))
    if found is None:
        return skipped("Not finite.")
    error, slope, quotient = found
    at_zero = where == "At zero points"  # one point, at which operations with a kink may contradict each other
    if error <= 1e-3 or (at_zero and abs(slope) > 1e6):  # too steep to tell
        return passed("", relative_error=min(error, 1e-3))
    return (warned if at_zero else failed)(
        f"{where} the gradient says {slope:.6g} where the difference quotient says {quotient:.6g}.",
        "Slopes of clamp(), abs() and relu() at 0 need not add up; a last layer that starts at zero stands exactly "
        "there: use softplus(), logsigmoid() or logaddexp()."
        if at_zero
        else "Training follows a direction that is not this loss's slope: look for a detach(), .data, no_grad() or a "
        "hand-written backward.",
        relative_error=error,
        gradient=slope,
        difference_quotient=quotient,
    )


def gradient(s: Subject) -> Finding:
    seen: list[str] = []
    worst = 0.0

    def plain(p: Tensor, t: Tensor) -> dict[str, Any]:
        return {}

    points: list[tuple[str, Tensor, Tensor, OptionsFor]]
    points = [(f"At {where} points", p, t, plain) for where, p, t in s.points()]
    points += [(f"With {what}", *s.sample(), options) for what, options in _variants(s)]
    if s.ignore_index is not None and not points[0][2].is_floating_point():
        some = points[0][2].clone()
        some.view(-1)[::2] = s.ignore_index
        points.append(("With ignored targets", points[0][1], some, plain))
    excused: Finding | None = None
    for where, prediction, target, options in points:
        found = s.judged(functools.partial(_gradient_at, s, where, options), prediction, target)
        if found.status == "failure":
            return found
        excused = found if found.bad else excused
        if found.status == "pass":
            seen.append(where.removeprefix("At ").removesuffix(" points").removeprefix("With "))
            worst = max(worst, found.numbers["relative_error"])
    if excused:
        return excused
    if not seen:
        return skipped("No point with a finite value and gradient, see 'finite'.")
    return passed(
        f"Agrees with finite differences in float64: {', '.join(seen)} (largest error {_error(worst)}).",
        relative_error=worst,
    )


def _variants(s: Subject) -> Iterator[tuple[str, OptionsFor]]:
    """Options that a hand-written backward may have forgotten, as far as the loss takes them."""

    def fixed(**options: Any) -> OptionsFor:
        return lambda p, t: options

    def ramped(option: str, shape: Callable[[Tensor, Tensor], tuple[int, ...]]) -> OptionsFor:
        return lambda p, t: {option: ramp(*shape(p, t))}

    candidates = [(f"reduction={r!r}", fixed(reduction=r)) for r in ("none", "sum") if "reduction" in s.options]
    if "label_smoothing" in s.options:
        candidates.append(("label_smoothing=0.1", fixed(label_smoothing=0.1)))
    if "pos_weight" in s.options:
        candidates.append(("pos_weight", ramped("pos_weight", lambda p, t: (p.shape[-1],))))
    for option, what, shape in s.weight_forms():
        candidates.append((f"{option} per {what}", ramped(option, shape)))
    prediction, target = s.sample()
    done: set[str] = set()
    for what, options in candidates:
        option = what.partition(" ")[0]
        try:
            s.value(prediction, target, **options(prediction, target))
        except Exception:
            continue  # not the form that this option has here
        if option not in done:
            done.add(option)
            yield what, options


def ramp(*shape: int) -> Tensor:
    """Different weights around 1, a function of the shape."""
    return torch.linspace(0.5, 1.5, math.prod(shape), dtype=torch.float64).view(*shape)


def second_derivative(s: Subject) -> Finding:
    def test(
        prediction: Tensor, target: Tensor, status: Callable[..., Finding] = failed, where: str = "The"
    ) -> Finding:
        leaf = prediction.clone().requires_grad_()
        out = s.result(leaf, target).sum()
        if not out.requires_grad:
            raise NoGradientError
        along = torch.randn(leaf.shape, generator=s.generator(11)).double()
        second = torch.zeros_like(leaf)
        try:
            (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
            if grad.requires_grad:
                (found,) = torch.autograd.grad(grad, leaf, along, allow_unused=True)
                second = second if found is None else found
        except RuntimeError as e:
            return skipped(f"Not offered: {_line(e)}")
        best, changes = math.inf, []
        for h in (1e-5, 1e-4, 1e-3):
            up, down = (s.gradient(prediction + sign * h * along, target) for sign in (1, -1))
            # Where the second derivative jumps, any between its two sides is right.
            sides = torch.stack([(up - grad.detach()) / h, (grad.detach() - down) / h])
            off = torch.maximum(second - sides.amax(0), sides.amin(0) - second).clamp(min=0)
            changes.append(float((up - down).abs().max()))
            # A loss that computes in float32 inside cannot be differenced finely; below this nothing can be told.
            noise = 1e-9 * float(up.abs().max()) / h
            scale = max(float(sides.abs().max()), float(second.abs().max()), float(up.abs().max()) * 1e-2, 1e-30)
            best = min(best, max(0.0, float(off.max()) - noise) / scale)
        if not grad.isfinite().all() or changes[0] > 0.05 * changes[2] + 1e-9 * float(grad.abs().max()):  # it jumps
            return skipped("At a kink.")
        if best > 1e-2:
            return status(
                f"{where} second derivative is off by {best:.2g} of its size.",
                "Hessians and gradient penalties are silently wrong: write backward in differentiable operations of "
                "the saved inputs, or mark it once_differentiable.",
                relative_error=best,
            )
        return passed(f"Agrees with differences of the gradient (error {_error(best)}).", relative_error=best)

    prediction, target = s.sample(3)
    found = s.judged(test, prediction, target)
    if found.bad or s.task.decided is not None or s.task.perfect is None:
        return found
    # At this one point operations with a kink may contradict each other, as sign(0) does abs(0).
    at_best = functools.partial(test, status=warned, where="At prediction = target the")
    best = s.judged(at_best, s.task.perfect(target), target)
    return best if best.bad else found


def _hard_points(s: Subject) -> list[tuple[str, Tensor, Tensor, bool]]:
    """(what it is, prediction, target, whether a loss may be infinite there)."""
    prediction, target = s.sample()
    sign = torch.where(prediction > 0, 1.0, -1.0).double()
    points = [
        ("random predictions", prediction, target, False),
        ("huge predictions", s.task.huge * sign, target, False),
        ("predictions all equal", torch.zeros_like(prediction), target, False),
    ]
    if s.task.perfect is not None:
        best = s.task.perfect(target)
        if s.task.decided is None:
            points.append(("predictions equal to the target", best, target, False))
        elif not s.task.link:
            far = best / best.abs().max() * s.task.huge
            points += [("sure and right", far, target, False), ("sure and wrong", -far, target, False)]
        elif s.task.classes:  # in float32
            points += [
                ("the target's probability exactly 1", 10 * best, target, False),
                ("the target's probability exactly 0", -50 * best, target, False),
            ]
    if s.task.name == "binary_probabilities" and s.task.perfect is not None:  # in float32
        points.append(("predictions of exactly 0 and 1, and right", 10 * s.task.perfect(target), target, False))
    if s.task.decided is not None and s.task.perfect is not None:
        # Where a class does not occur, a ratio of what is found of it to what there is of it is 0/0.
        absent = torch.zeros_like(target) if s.task.name != "sign" else -torch.ones_like(target)
        best = s.task.perfect(absent)
        far = 10 * best if s.task.link else best / best.abs().max() * s.task.huge
        what = "one class only" if s.task.classes else "no positive target"
        points += [(what, prediction, absent, False), (f"{what}, sure and right", far, absent, False)]
    if s.task.name in ("regression", "counts"):
        points.append(("a target of 0", prediction, torch.zeros_like(target), False))
    if s.task.name == "regression":
        zero = torch.zeros_like(target)
        points += [
            ("prediction and target of 0", zero, zero, False),
            ("all targets equal", prediction, zero + 1, False),
        ]
    if s.task.name == "counts":
        points.append(("a target of 0 and hardly any rate", prediction - 200, torch.zeros_like(target), True))
    if target.is_floating_point() and s.task.name in ("probabilities", "kl"):
        hard = (target == target.amax(1, keepdim=True)).to(target.dtype)
        points.append(("targets of exactly 0 and 1", prediction, hard, False))
    if s.task.classes and not target.is_floating_point() and s.shifts:
        masked = prediction.clone()
        masked[:, -1] = -math.inf
        points.append(("a class masked with -inf", masked, target.clamp(max=prediction.shape[1] - 2), True))
    return points


def _exponential(s: Subject) -> bool:
    """The value itself grows like an exponential of the prediction."""
    prediction, target = s.sample()
    values = [abs(s.value(scale * prediction.sign(), target)) for scale in (60.0, 120.0, 240.0)]
    return (
        all(map(math.isfinite, values)) and min(values) > 10 and 1.8 < math.log(values[2]) / math.log(values[1]) < 2.2
    )


# What the point is, in part: what to do.
STABLE = {
    "masked": "use log_softmax over what is left, and give a masked class no share of the target (label smoothing).",
    "equal to the target": "the slope of sqrt() and norm() at 0 is infinite: add a small number inside.",
    "target of 0": "divide by max(|target|, a small number).",
    "exactly": "log(0) is infinite and 0 * log(0) is nan: use xlogy() or logits, or clamp inside log().",
    "": "use the stable form (log_softmax, logsumexp, softplus, logaddexp, log1p), or keep what is inside log(), "
    "sqrt(), powers and divisions away from 0.",
}


STEEP = ("predictions all equal", "predictions equal to the target", "a target of 0", "prediction and target of 0")


# The operation that was seen to make it, in forward or (Backward) in the slope: what to do.
CAUSES = {
    r"^(sqrt|.*norm).*Backward": "the slope of sqrt() and norm() at 0 is infinite: add a small number inside.",
    r"^pow.*Backward": "the slope of a power below 1 at 0 is infinite: clamp what is raised, or add a small number.",
    r"^log.*Backward": "the slope of log() at 0 is infinite: clamp inside log(), or use logits.",
    r"^a(cos|sin).*Backward": "the slope of acos() and asin() at 1 is infinite: clamp inside.",
    r"^(xlogy|entr)": "xlogy's slope at 0 is infinite: clamp what the logarithm is taken of.",
    r"^log": "log(0) is infinite and 0 * log(0) is nan: use xlogy() or logits, or clamp inside log().",
    r"^(div|reciprocal)": "a division by 0: clamp the divisor from below, or add a small number above and below.",
    r"^rsqrt": "one through the root of 0: add a small number inside.",
    r"^(exp|cosh|sinh|expm1)": "an exponential overflows: use the stable form (log_softmax, logsumexp, softplus, "
    "logaddexp, log1p).",
    r"^(pow|square|mul)": "a product or power overflows: scale down before, or clamp.",
}


class _FirstNotFinite(TorchDispatchMode):
    """The first operation whose result is not finite though all that it is given is."""

    name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.name and isinstance(out, Tensor) and out.is_floating_point() and not bool(out.isfinite().all()):
            given = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
            if given and all(bool(x.isfinite().all()) for x in given):
                self.name = str(func).split(".")[1].strip("_")
        return out


def _operation_not_finite(s: Subject, prediction: Tensor, target: Tensor) -> str:
    """The operation, as in 'log' or 'sqrtBackward', that makes what is not finite; '' if it cannot be told."""
    leaf = prediction.detach().clone().requires_grad_()
    with _FirstNotFinite() as forward:
        out = s.result(leaf, target).sum()
    if forward.name or out.grad_fn is None:
        return forward.name
    found: list[str] = []

    def watch(node: Any) -> Callable[[Any, Any], None]:
        def hook(given: Any, received: Any) -> None:
            def sound(grads: Any) -> bool:
                return all(g is None or bool(g.isfinite().all()) for g in grads)

            if not sound(given) and sound(received):
                found.append(node.name().rstrip("0123456789"))

        return hook

    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            node.register_hook(watch(node))
            todo += [n for n, _ in node.next_functions if n is not None]
    torch.autograd.grad(out, leaf, allow_unused=True)
    return found[0][0].lower() + found[0][1:] if found else ""


def _remedy(s: Subject, what: str, prediction: Tensor, target: Tensor) -> str:
    """What to do about a value or slope that is not finite: of the operation that was seen, or else of the place."""
    try:
        origin = _operation_not_finite(s, prediction, target)
    except Exception:  # said elsewhere
        origin = ""
    cause = next((v for k, v in CAUSES.items() if re.search(k, origin)), None) if "masked" not in what else None
    text = cause or next(v for k, v in STABLE.items() if k in what)
    ours = sound_form(s, what, origin)
    return f"{text} fastloss.{ours} is sound there." if ours else text


def sound_form(s: Subject, what: str, origin: str) -> str:
    """The loss of fastloss that is sound where this one is not, if it is told by what was seen."""
    name = re.sub(r"\W|_", "", getattr(s.fn, "__name__", type(s.fn).__name__)).lower()
    if ("only" in what or "no positive" in what) and origin.startswith("div"):
        return "dice_loss"
    if s.task.name in ("classification", "segmentation") and origin.startswith(("log", "exp", "div")):
        return "focal_loss" if "focal" in name else "cross_entropy"
    if s.task.name in ("binary", "masks") and origin.startswith(("log", "exp")):
        return "binary_cross_entropy_with_logits"
    if s.task.name == "regression":
        if origin.startswith("cosh"):
            return "log_cosh_loss"
        if "cos" in name:
            return "cosine_distance_loss"
        if "equal to the target" in what and re.match("(sqrt|pow|.*norm).*Backward", origin):
            return "rmse_loss"
        if "of 0" in what and origin.startswith("div"):
            return "relative_l1_loss(..., eps=...)"
    return ""


def finite(s: Subject) -> Finding:
    tried: list[str] = []
    excused: Finding | None = None
    for what, prediction, target, may in _hard_points(s):
        exponential = what in ("huge predictions", "sure and wrong") and functools.partial(_exponential, s)

        def test(p: Tensor, t: Tensor, what: str = what, may: bool = may, grows: Any = exponential) -> Finding:
            value, grad = s.value_and_gradient(p, t)
            if math.isfinite(value) and bool(grad.isfinite().all()):
                steepest = float(grad.abs().max()) if grad.numel() else 0.0
                if what not in STEEP or not steepest > 1e4 * s.steepness * max(
                    1.0, len(s.sample()[0]) / max(len(p), 1)
                ):
                    return passed("")
                return noted(
                    f"With {what} the gradient is {steepest:.4g}, where {s.steepness:.4g} is the largest at ordinary "
                    "inputs.",
                    "One such sample outweighs all others and throws the parameters far away: divide by a number that "
                    "is not small against the data (1e-3, not 1e-8), or add such a number inside sqrt().",
                    gradient=steepest,
                )
            if what == "huge predictions" and not p.any():
                return passed("")
            count, excuse = int((~grad.isfinite()).sum()), bool(grows and grows())
            gradient_is = f"not finite in {count} of {grad.numel()} entries" if count else "finite"
            if what.endswith("exactly 0") and math.isinf(value):
                return passed("")  # -log(0)
            zero_times_inf = s.task.link is not None and math.isnan(value)  # another class has the probability 0
            return (failed if zero_times_inf or not (may or excuse) else warned)(
                f"With {what} the value is {value:.4g}, the gradient {gradient_is} (float32)."
                + (" The loss itself grows exponentially." if excuse else ""),
                "One such sample turns every parameter into nan: " + _remedy(s, what, p, t),
                value=value,
                nonfinite_gradients=count,
            )

        tried.append(what)
        found = s.judged(test, prediction.float(), target)
        if found.status == "failure":
            return found
        if found.bad and not (excused and excused.bad):
            excused = found
        elif found.status == "note":
            excused = excused or s.shown(found, prediction, target)
    return excused or passed(f"Value and gradient are finite with {', '.join(tried)}.")


def _raises_in(s: Subject, dtype: torch.dtype, prediction: Tensor, target: Tensor) -> Finding:
    target = target.to(dtype) if target.is_floating_point() else target
    try:
        s.gradient(prediction.to(dtype), target)
    except NoGradientError:
        return skipped("")
    except Exception as e:
        return failed(
            f"In {_dtype(dtype)} it raises {type(e).__name__}: {_line(e)}",
            "Mixed-precision training meets this: make constants fit the prediction's dtype (torch.finfo, -math.inf), "
            "convert weights to it.",
        )
    return passed("")


# An operation that does not come in this dtype: a gap, not a mistake.
UNSUPPORTED = re.compile(
    r"not implemented for|not supported|[Uu]nsupported|only supports?\b|does not support|must be one of"
)


def half_precision(s: Subject) -> Finding:
    tried: list[str] = []
    refused: list[str] = []
    excused: Finding | None = None
    for dtype in (torch.float16, torch.bfloat16):
        prediction, target = s.sample()
        moderate = [("random", prediction, target)]
        if s.task.perfect is not None and s.task.decided is None:
            moderate.append(("predictions equal to the target", s.task.perfect(target), target))
        if s.task.name == "regression":
            moderate.append(("predictions of 0", torch.zeros_like(prediction), target))
            moderate += [("residuals of 300", target + 300, target), ("residuals of 1/1000", target + 1e-3, target)]
        elif s.task.name == "binary_probabilities" and s.task.perfect is not None:
            moderate.append(("probabilities of exactly 0 and 1, and right", 10 * s.task.perfect(target), target))
        elif s.task.name == "class_probabilities" and s.task.perfect is not None:
            moderate.append(("the target's probability exactly 0", -50 * s.task.perfect(target), target))
        elif s.task.huge > 60:
            moderate.append(("logits of 60", 30 * prediction.clamp(-2, 2), target))
        for what, p, t in moderate:

            def test(p: Tensor, t: Tensor, what: str = what, dtype: torch.dtype = dtype) -> Finding:
                value, grad = s.value_and_gradient(p, t)
                want, _ = s.value_and_gradient(p.double(), t.double() if t.is_floating_point() else t)
                fits = math.isfinite(want) and abs(want) < torch.finfo(dtype).max
                if not fits or (math.isfinite(value) and bool(grad.isfinite().all())):
                    return passed("")
                return (failed if what in ("random", "predictions equal to the target") else warned)(
                    f"In {_dtype(dtype)} with {what} the value is {value:.4g} (in float64 {want:.6g}), the gradient "
                    f"{'finite' if grad.isfinite().all() else 'not finite'}.",
                    "Mixed-precision training meets this: convert to float32 inside the loss, or keep what is between "
                    "small.",
                    value=value,
                    float64=want,
                )

            try:
                found = s.judged(test, p.to(dtype), t.to(dtype) if t.is_floating_point() else t)
            except NoGradientError:
                raise
            except Exception as e:
                if s.float32_only or UNSUPPORTED.search(str(e)):  # said elsewhere; on other devices it may be
                    refused.append(f"{_dtype(dtype)}: {_line(e)}")
                    break
                return s.judged(functools.partial(_raises_in, s, dtype), p, t)
            if found.status == "failure":
                return found
            excused = excused or (found if found.bad else None)
            tried.append(f"{what} in {_dtype(dtype)}")
    if excused:
        return excused
    if not tried:
        return skipped(f"Not offered on this device. {refused[0]}")
    return passed(f"Finite: {', '.join(tried)}.{' Not offered: ' + refused[0] if refused else ''}")


def precision(s: Subject) -> Finding:
    why = "Digits are lost: sum in float32, subtract the maximum before exp, avoid differences of large numbers."

    def inputs(samples: int) -> tuple[Tensor, Tensor]:
        prediction, target = s.sample(samples)
        if s.task.name == "regression":  # a relative error at a target near 0 measures the target's rounding
            target = torch.where(target < 0, -1.0, 1.0) * target.abs().clamp(min=0.1)
        return prediction, target

    prediction, target = inputs(s.many(max(512, s.samples)))
    if prediction.numel() < 2048 * 3 and prediction[0].numel() < 64:
        prediction, target = inputs(s.many(2048))
    errors = _errors(s, prediction, target)
    if not errors:
        return skipped("No dtype could be compared with float64.")
    numbers: dict[str, Any] = {"samples": len(prediction)}
    parts = []
    for e in errors:
        dtype = _dtype(e.dtype)
        text = f"{dtype} {e.value_error:.2g} (value) and {e.slope_error:.2g} (gradient)"
        numbers.update({f"{dtype}_value": e.value_error, f"{dtype}_gradient": e.slope_error})
        if e.reference_error is not None:
            text += f", reference {e.reference_error:.2g}"
            numbers[f"{dtype}_reference"] = e.reference_error
        parts.append(text)
    evidence = (
        f"Error against float64 where 1 is a rounding of the dtype, {len(prediction)} samples: {'; '.join(parts)}."
    )
    if s.rounds_to is not None:
        found = (failed if s.rounds_to is torch.float16 else warned)(
            f"The value of float64 predictions has no more digits than {_dtype(s.rounds_to)}.", why
        )
        one = s.sample(1)
        found.example = {"value": s.value(*one)}
        return s.shown(found, *one)
    worst = max(errors, key=lambda e: e.verdict)
    if not worst.verdict:
        return passed(evidence, **numbers)
    status = failed if worst.verdict == 2 else warned
    finite = all(math.isfinite(x) for e in errors for x in (e.value_error, e.slope_error))
    if not finite:
        why = "log(0), 0/0 or an overflow that float64 does not have: convert to float32 inside the loss."
    elif worst.verdict == 2 and not any(e.verdict for e in _errors(s, *inputs(s.samples))):
        status, evidence = warned, f"{evidence} {s.samples} samples are fine."

    def at_worst(p: Tensor, t: Tensor) -> Finding:
        e = _rounding(s, worst.dtype, p, t)
        if e is None or e.verdict < worst.verdict:
            return passed("")
        found = status(
            f"Shown by {len(p)} in {_dtype(e.dtype)}: {e.value_error:.2g} (value), {e.slope_error:.2g} (gradient).", why
        )
        found.example = {"value": e.value, "in float64": e.exact, "slope": e.slope, "slope in float64": e.exact_slope}
        return found

    # The sample with the largest error first: if it shows the fault alone, it is the smallest input. Where samples are
    # added one by one, rounding depends on their order.
    for order in (worst.samples, torch.arange(len(prediction))):
        p, t = (x[order].to(worst.dtype) if x.is_floating_point() else x[order] for x in (prediction, target))
        shown = s.judged(at_worst, p, t)
        if shown.bad:
            break
    return replace(
        status(f"{evidence} {shown.evidence}".strip(), why, **numbers), example=shown.example, dtype=shown.dtype
    )


PRECISION = {torch.float32: (200.0, 1e4), torch.float16: (32.0, 300.0), torch.bfloat16: (16.0, 100.0)}  # warn, fail


class Rounding(NamedTuple):
    """Of value and gradient in a dtype, errors against float64 in units of the dtype's precision."""

    dtype: torch.dtype
    value: float
    exact: float
    value_error: float
    slope: float  # the gradient's entry that counts
    exact_slope: float
    slope_error: float
    reference_error: float | None
    samples: Tensor  # indices, the largest error of the gradient first

    @property
    def verdict(self) -> int:
        """0, 1 for a warning, 2 for a failure."""
        warn, fail = PRECISION[self.dtype]
        return max(2 if not e <= fail else 1 if e > warn else 0 for e in (self.value_error, self.slope_error))


def _errors(s: Subject, prediction: Tensor, target: Tensor) -> list[Rounding]:
    found = (_rounding(s, dtype, prediction, target) for dtype in PRECISION)
    return [e for e in found if e is not None]


def _rounding(s: Subject, dtype: torch.dtype, prediction: Tensor, target: Tensor) -> Rounding | None:
    """None where the dtype is not taken or the value does not fit it."""
    p, t = prediction.to(dtype), (target.to(dtype) if target.is_floating_point() else target)
    try:
        value, grad = s.value_and_gradient(p, t)
    except NoGradientError:
        raise
    except Exception:
        return None
    exact, exact_grad = s.value_and_gradient(p.double(), t.double() if t.is_floating_point() else t)
    if not math.isfinite(exact) or abs(exact) > torch.finfo(dtype).max / 4:
        return None
    eps = torch.finfo(dtype).eps
    # Entries below the dtype's smallest step cannot be better than that. And not the largest error, but the 99th
    # percentile: an entry beside a kink may fall on its other side.
    off = ((grad.double() - exact_grad).abs() - torch.finfo(dtype).smallest_normal * eps).clamp(min=0)
    ranked = off.reshape(-1).argsort(descending=True)  # nan first
    counts = 0 if off.isnan().any() else off.numel() // 100
    entry = int(ranked[counts])
    of_sample = off.reshape(len(off), -1).amax(1)
    of_sample = torch.where(of_sample > off.reshape(-1)[entry], 0.0, of_sample)
    beside = None
    if s.reference is not None:
        reference = s.raw(p, t, fn=s.reference)
        beside = abs(float(reference.double().sum()) - exact) / (eps * max(abs(exact), 1e-30))
    return Rounding(
        dtype,
        value,
        exact,
        abs(value - exact) / (eps * max(abs(exact), 1e-30)),
        float(grad.reshape(-1)[entry]),
        float(exact_grad.reshape(-1)[entry]),
        float(off.reshape(-1)[entry]) / (eps * max(float(exact_grad.abs().max()), 1e-30)),
        beside,
        of_sample.argsort(descending=True),
    )


def useful_gradient(s: Subject) -> Finding:
    why = (
        "Nothing can be learnt where the gradient is zero: counts, argmax, round, sign and comparisons are metrics; "
        "train on a smooth surrogate (cross entropy for accuracy) and keep the metric for evaluation."
    )

    pairs = [s.sample(salt=salt) for salt in range(s.some(8, 2))]
    everything = torch.cat([p for p, _ in pairs]), torch.cat([t for _, t in pairs])

    def zero_share(prediction: Tensor, target: Tensor) -> float:
        try:
            grad = s.gradient(prediction, target)
        except NoGradientError:
            return math.inf
        return float((grad.reshape(len(grad), -1).abs().amax(1) == 0).double().mean())

    share = zero_share(*everything)
    evidence = f"Samples without any gradient: {100 * min(share, 1):.0f} % of {len(everything[0])} random ones."
    if share > 1:
        evidence = "The result has no gradient with respect to the prediction."
        why = (
            "Something cuts it off from the prediction: .item(), float(), numpy, detach(), a new torch.tensor(...), or "
            "argmax and comparisons, which have no slope (accuracy is a metric: train on cross entropy)."
        )

    def test(prediction: Tensor, target: Tensor) -> Finding:
        if zero_share(prediction, target) > 0.9:
            return failed(evidence, why, zero_share=min(share, 1.0))
        return passed(evidence, zero_share=share)

    found = s.judged(test, *everything)
    if found.bad:
        return found
    if s.task.classes and not everything[1].is_floating_point() and everything[1].shape == everything[0][:, 0].shape:
        for c in range(everything[0].shape[1]):

            def unlearnt(prediction: Tensor, target: Tensor, c: int = c) -> Finding:
                rows = s.gradient(prediction, target).movedim(1, -1)[target == c]
                if not len(rows) or rows.any():
                    return passed("")
                return warned(
                    f"No sample of class {c} has a gradient.",
                    "That class is not learnt: look for target > 0, range(1, C) or a mask; fine if it is a background "
                    "that is to be ignored.",
                    target=c,
                )

            if c != s.ignore_index and int((everything[1] == c).sum()) >= 4:
                missing = s.judged(unlearnt, *everything)
                if missing.bad:
                    return missing
    if s.task.decided is not None and s.task.perfect is not None:
        linear = s.judged(functools.partial(_is_a_probability, s), *s.sample())
        if linear.bad:
            return linear

        def wrong(prediction: Tensor, target: Tensor) -> Finding:
            if s.gradient(prediction, target).any():
                return passed("")
            return warned(
                "The gradient is exactly zero where the prediction is sure and wrong.",
                "The worst mistakes are not corrected: take clamp() out (log_softmax, logsigmoid need none), or make "
                "its limits far smaller.",
            )

        _, target = s.sample()
        flat = s.judged(wrong, -0.5 * s.task.perfect(target), target)
        if flat.bad:
            return flat
    return found


def _is_a_probability(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    """Whether the loss is minus the probability of what is right, where its logarithm is usual."""
    if s.task.classes and not target.is_floating_point():
        given = prediction.softmax(1).movedim(1, -1)
        labels = target.reshape(given.shape[:-1]) if target.numel() * given.shape[-1] == given.numel() else None
        if labels is None or bool(((labels < 0) | (labels >= given.shape[-1])).any()):
            return passed("")
        right = given.gather(-1, labels[..., None])
    elif s.task.name in ("binary", "binary_probabilities", "masks"):
        right = torch.where(target > 0.5, prediction.sigmoid(), (-prediction).sigmoid())
    else:
        return passed("")
    shares = right.reshape(len(right), -1).mean(1)
    if len(shares) < 2 or float(shares.max() - shares.min()) < 1e-3:
        return passed("")
    values = torch.tensor([s.value(prediction[i : i + 1], target[i : i + 1]) for i in range(len(shares))]).double()
    scale = float(values.norm() / shares.norm())
    if scale == 0 or not float((values + scale * shares).abs().max()) <= 1e-6 * scale:
        return passed("")
    assert s.task.perfect is not None
    wrong, undecided = (s.gradient(x * s.task.perfect(target), target).abs().max() for x in (-1.0, 0.0))
    return failed(
        f"The value is minus the probability of what is right; where the prediction is sure and wrong, the gradient is "
        f"{float(wrong):.2g}, where it is undecided {float(undecided):.2g}.",
        "The worst mistakes are not corrected. A logarithm is missing: nll_loss takes log-probabilities (log_softmax, "
        "not softmax), cross_entropy takes logits.",
        gradient=float(wrong),
    )


def _bisect(f: Callable[[float], float], low: float, high: float, enough: float) -> tuple[float, float]:
    """Follow the larger change into ever smaller intervals: (place, change that is left), until less than enough."""
    a, b = f(low), f(high)
    while high - low > 1e-11 and abs(b - a) > enough:
        middle = (low + high) / 2
        m = f(middle)
        if abs(m - a) >= abs(b - m):
            high, b = middle, m
        else:
            low, a = middle, m
    return (low + high) / 2, abs(b - a)


def _jump_at(s: Subject, enough: float, prediction: Tensor, target: Tensor) -> Finding:
    """Whether the value jumps when one entry moves by a billionth."""
    step, jump = 1e-9 * max(1.0, float(prediction.abs().max())), 0.0
    for i in range(prediction.numel()):
        ends = [prediction.clone(), prediction.clone()]
        for p, sign in zip(ends, (1, -1), strict=True):
            p.view(-1)[i] += sign * step
        a, b = (s.value(p, target) for p in ends)
        if abs(a - b) > jump:
            jump, shown, before, after = abs(a - b), i, b, a
    if jump <= max(enough, 1e-6 * abs(after) if jump else 0.0):
        return passed("")
    return failed(
        f"The value jumps from {before:.6g} to {after:.6g} when prediction number {shown} moves by {2 * step:.0e}.",
        "A gradient does not see a jump, so descent can walk over it: look for comparisons, rounding, argmax, or a "
        "mask that depends on the prediction.",
        jump=jump,
        entry=shown,
    )


def _jumps(
    value: Callable[[float], float], grid: list[float], values: list[float], suspects: int
) -> tuple[float, list[tuple[float, float]]]:
    """What counts as one, and (size, place) of each found in the most suspicious intervals."""
    enough = max(1e-4 * (max(values) - min(values)), 1e-6 * max(map(abs, values)))
    steps = sorted(range(len(grid) - 1), key=lambda i: -abs(values[i + 1] - values[i]))[:suspects]
    # A small jump hides in the interval with the sharpest change of slope, a large one in that with the largest step.
    bends = sorted(range(1, len(grid) - 1), key=lambda i: -abs(values[i + 1] - 2 * values[i] + values[i - 1]))
    bends = [] if suspects == 1 else [j for i in bends[:suspects] for j in (i - 1, i)]
    found = (_bisect(value, grid[i], grid[i + 1], enough) for i in sorted({*steps, *bends}))
    return enough, [(left, place) for place, left in found if left > enough]


def continuity(s: Subject) -> Finding:
    """Values along lines; what is left of a step when the interval shrinks to nothing is a jump."""
    kinks: list[float] = []
    lines, cells, suspects = s.some(3), s.some(200, 10), s.some(4)
    grid = torch.linspace(-2, 2, cells + 1).tolist()
    if s.effort > 0.1:
        _curve_of_one_entry(s)
    for salt in range(lines):
        prediction, target = s.sample(salt=salt)
        direction = torch.randn(prediction.shape, generator=s.generator(100 + salt)).double()

        def value(t: float, p: Tensor = prediction, y: Tensor = target, d: Tensor = direction) -> float:
            return s.value(p + t * d, y)

        def both(t: float, p: Tensor = prediction, y: Tensor = target, d: Tensor = direction) -> tuple[float, float]:
            try:
                value, grad = s.value_and_gradient(p + t * d, y)
                return value, float((grad * d).sum())
            except NoGradientError:
                return s.value(p + t * d, y), math.nan

        values, slopes = (list(x) for x in zip(*(both(t) for t in grid), strict=True))
        curve = Curve("Along a random line through the predictions", "step along the line", grid, values, slopes)
        if salt == 0:
            s.curves.append(curve)
        spread = max(values) - min(values)
        if not math.isfinite(spread):
            continue
        enough, jumps = _jumps(value, grid, values, suspects)
        curve.marks = [(place, "jump") for _, place in jumps]
        if jumps:
            left, place = max(jumps)
            return _jump(s, prediction + place * direction, target, enough, left)
        bends = sorted(range(cells), key=lambda i: -abs(slopes[i + 1] - slopes[i]))[: suspects // 2]
        top = max((abs(v) for v in slopes if math.isfinite(v)), default=0.0)
        for i in bends:
            if math.isfinite(slopes[i]) and math.isfinite(slopes[i + 1]):
                place, left = _bisect(lambda t: both(t)[1], grid[i], grid[i + 1], 1e-3 * top)
                if left > 1e-3 * top:
                    kinks.append(place)
                    curve.marks.append((place, "kink"))
    text = f"{len(kinks)} kinks located (fine, as in L1 at zero)" if kinks else "no kinks"
    return passed(f"No jump along {lines} random line{'s' * (lines > 1)}, {text}.", kinks=kinks)


def _curve_of_one_entry(s: Subject) -> None:
    """For the page: one sample's loss while one entry of its prediction moves, the right class's if there is one."""
    prediction, target = s.sample()
    p, t = prediction[:1].clone(), target[:1]
    if s.task.classes:
        entry = (
            int(t.reshape(-1)[0]) * (p[0].numel() // p.shape[1]) if not t.is_floating_point() else int(t[0].argmax())
        )
    else:
        entry = 0
    aim = float(t.reshape(-1)[0]) if s.task.name == "regression" else None
    x = ((aim or 0.0) + torch.linspace(-6, 6, 121)).tolist()

    def both(v: float) -> tuple[float, float]:
        p.view(-1)[entry] = v
        value, grad = s.value_and_gradient(p, t)
        return value, float(grad.reshape(-1)[entry])

    try:
        values, slopes = (list(y) for y in zip(*map(both, x), strict=True))
    except Exception:  # no gradient, or no batch of one: said elsewhere
        return
    xlabel = "logit of the right class" if s.task.classes else "logit" if s.task.decided else "prediction"
    curve = Curve("One sample while one entry of its prediction moves", xlabel, x, values, slopes, "gradient")
    if all(map(math.isfinite, values)):
        curve.marks = [(place, "jump") for _, place in _jumps(lambda v: both(v)[0], x, values, 4)[1]]
    curve.marks += [(aim, "target")] if aim is not None else []
    s.curves.append(curve)


def _jump(s: Subject, prediction: Tensor, target: Tensor, enough: float, left: float) -> Finding:
    """The jump at this place, at the smallest input that has it."""
    small = s.judged(functools.partial(_jump_at, s, enough), prediction, target)
    if small.bad:
        return small

    def here(p: Tensor, t: Tensor) -> Finding:  # only along the line, where many entries move at once
        return failed(
            f"The value jumps by {left:.4g} within 1e-11 of one step along a random line, here.",
            "A gradient does not see a jump, so descent can walk over it: look for comparisons, rounding, argmax, or "
            "a mask that depends on the prediction.",
            jump=left,
        )

    return s.shown(here(prediction, target), prediction, target)


DESCENT_STEPS = 250  # on any machine: a shorter one would accuse losses that are only slow


def _descend(s: Subject, prediction: Tensor, target: Tensor) -> Tensor:
    leaf = prediction.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DESCENT_STEPS, eta_min=1e-4)
    for _ in range(DESCENT_STEPS):
        _, grad = s.value_and_gradient(leaf, target)
        if not grad.isfinite().all():
            break
        leaf.grad = grad
        optimizer.step()
        schedule.step()
    return leaf.detach()


def optimum(s: Subject) -> Finding:
    if s.task.perfect is None:
        return skipped("The task does not say what a perfect prediction is.")
    prediction, target = s.sample()
    found = s.judged(functools.partial(_least_at_target, s), prediction, target)
    if found.bad:
        return found
    if s.cost > 0.02:
        return passed(f"{found.evidence} Descent is left out, the loss is too slow.", **found.numbers)
    descent = _decided_after_descent if s.task.decided is not None else _approached
    return s.judged(functools.partial(descent, s), prediction, target)


LEAST = (
    "Training makes the loss smaller, whatever it means: it must be least where the prediction is right. Check the "
    "sign, the order of arguments, log-probabilities against logits, and that differences cannot become negative."
)


def _levels(s: Subject, prediction: Tensor, target: Tensor) -> tuple[Tensor, float, float, float]:
    """The perfect prediction, the value at the given one, at the perfect one, and what is no difference."""
    assert s.task.perfect is not None
    best = s.task.perfect(target)
    start, least = s.value(prediction, target), s.value(best, target)
    if s.task.decided is not None:
        # Label smoothing makes a prediction that is right and not too sure the best.
        less_sure = min((s.value(x * best, target), x) for x in (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4))
        if less_sure[1] and less_sure[0] < least:
            least, best = less_sure[0], less_sure[1] * best
    return best, start, least, 1e-6 * max(abs(least), abs(start - least)) + 1e-12


def _least_at_target(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    best, start, least, slack = _levels(s, prediction, target)
    numbers = {"random": start, "perfect": least}
    if not (math.isfinite(start) and math.isfinite(least)):
        return failed(
            f"The value is {least:.4g} at the perfect prediction ({start:.4g} at a random one).", LEAST, **numbers
        )
    if start <= least + slack:
        return failed(f"A random prediction costs {start:.6g}, a perfect one {least:.6g}.", LEAST, **numbers)
    if s.task.decided is not None:
        for what, way in (("for 50 times those", best), ("with a constant added to all", torch.ones_like(best))):
            for sign in (1, -1)[: 1 + (way is not best)]:
                far, farther = (s.value(best + sign * x * way, target) for x in (49, 490))
                if least - farther > 5 * (least - far) > 0.05 * abs(start - least):
                    return failed(
                        f"Not bounded below: {least:.4g} for sure and right predictions, {far:.4g} {what}.",
                        LEAST,
                        **numbers,
                    )
    return passed(f"A random prediction costs {start:.4g}, a perfect one {least:.4g}.", **numbers)


def _decided_after_descent(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    assert s.task.decided is not None
    best, start, least, _ = _levels(s, prediction, target)
    end_point = _descend(s, prediction, target)
    end = s.value(end_point, target)
    right = s.task.decided(end_point, target)
    counted = torch.ones_like(right) if s.ignore_index is None else target != s.ignore_index
    share = float(right[counted].double().mean())
    numbers = {"random": start, "perfect": least, "after_descent": end, "right": share}
    if share < 1:
        found = (failed if share < 0.9 else warned)(
            f"Descent from here ends with {100 * share:.0f} % right decisions (value {start:.4g} to {end:.4g}).",
            LEAST,
            **numbers,
        )
        found.example = {"after descent": end_point.tolist()}
        return found
    surest = s.value(50 * best, target)
    undecided, floor = s.value(torch.zeros_like(prediction), target), min(end, least, surest)
    smoothed = surest > least + 0.05 * abs(undecided - least)  # being surer costs: it is meant to end there
    if floor > 0.5 * undecided > 0 and not smoothed:
        costs = (
            f"A prediction that is sure and right still costs {floor:.4g}, {100 * floor / undecided:.0f} % of an "
            f"undecided one ({undecided:.4g})"
        )
        if _softmax_of_probabilities(s, prediction, target):
            return failed(
                f"{costs}, and a constant added to all probabilities changes nothing.",
                "Softmax is taken of what are probabilities already: leave it out (nll_loss of their logarithm), or "
                "pass logits.",
                **numbers,
            )
        return warned(
            f"{costs}.",
            "Is softmax or sigmoid applied twice? The loss may take logits already, or a clamp cut them off. (Fine for "
            "strong label smoothing.)",
            **numbers,
        )
    return passed(f"Descent from {start:.4g} ends at {end:.4g} with every decision right.", **numbers)


def _softmax_of_probabilities(s: Subject, prediction: Tensor, target: Tensor) -> bool:
    given = s.linked(prediction)
    if s.task.name == "class_probabilities":
        moved = given + 0.1
    elif s.task.name == "log_probabilities":
        moved = (given.exp() + 0.1).log()
    else:
        return False
    with torch.no_grad():
        outs = [s.call(x, target) for x in (given, moved)]
    before, after = (float((x[0] if isinstance(x, (tuple, list)) else x).double().sum()) for x in outs)
    return abs(before - after) <= 1e-9 * abs(before)


def _approached(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    best, start, least, slack = _levels(s, prediction, target)
    end_point = _descend(s, prediction, target)
    end = s.value(end_point, target)
    numbers = {"random": start, "perfect": least, "after_descent": end}
    range_ = abs(start - least)
    excess = (least - end) / (abs(start - end) + 1e-30)

    def with_point(found: Finding, what: str, point: Tensor) -> Finding:
        found.example = {what: point.tolist()}
        return found

    if excess > 0.25 or not math.isfinite(end):
        return with_point(
            failed(
                f"The value at prediction = target is {least:.6g}, yet descent reaches {end:.6g}.", LEAST, **numbers
            ),
            "after descent",
            end_point,
        )
    near = [
        best + h * torch.randn(best.shape, generator=s.generator(20 + i)).double()
        for i, h in enumerate((1e-3, 1e-2, 0.1, 1.0, 10.0))
        for _ in (0, 1)
    ]
    lowest = min(near, key=lambda p: s.value(p, target))
    below = least - s.value(lowest, target)
    if below > slack and below > 0.05 * range_:
        text = f"The value at prediction = target is {least:.6g}, beside it {least - below:.6g}."
        return with_point(failed(text, LEAST, **numbers), "beside", lowest)
    if excess > 0.05 or below > slack:
        return warned(
            f"The value at prediction = target is {least:.6g}, but {min(end, least - below):.6g} can be reached.",
            "The least loss lies beside the target, which is what smoothing and priors do; otherwise it is a bug.",
            **numbers,
        )
    if end - least > 0.02 * range_:
        return with_point(
            warned(
                f"Descent stops at {end:.4g}, above {least:.4g} at prediction = target.",
                "Flat regions or local minima hold training back: look at the slope far from the target.",
                **numbers,
            ),
            "after descent",
            end_point,
        )
    reached = f"Least at prediction = target ({least:.4g}); descent from {start:.4g} reaches {end:.4g}"
    apart = float((end_point - best).abs().max())
    if s.task.name == "regression" and apart > 0.5 * float((prediction - best).abs().max()):
        blind = [
            what
            for what, p in (("scale", 2 * prediction), ("offset", prediction + 0.7))
            if abs(s.value(p, target) - start) <= 1e-6 * abs(start)
        ]
        if not blind:
            return with_point(
                failed(
                    f"Descent reaches the least value {end:.4g} {apart:.4g} away from the target.",
                    "Wrong predictions cost nothing: every entry has to count, on both sides of the target, before "
                    "differences are summed.",
                    **numbers,
                ),
                "after descent",
                end_point,
            )
        reached += f" (does not see the {' and '.join(blind)} of predictions)"
    return passed(reached + ".", **numbers)


def shift_invariance(s: Subject) -> Finding:
    if not s.task.classes or s.task.link is not None:
        return skipped("Predictions are not logits of classes.")
    prediction, target = s.sample()
    if not s.shifts:
        for dim in (d for d in range(prediction.dim()) if d != 1 and prediction.shape[d] > 1):
            found = s.judged(functools.partial(_wrong_softmax, s, dim), prediction, target)
            if found.bad:
                return found
        evidence = "A constant added to all logits of a row changes the value"
        if not s.shift_invariant:
            return skipped(evidence + ": no softmax (fine if none is meant).")

        def constant(p: Tensor, t: Tensor) -> Finding:
            before, after = s.value(p, t), s.value(p + 0.5, t)
            if abs(before - after) <= 1e-6 * max(abs(before), 1e-3):
                return passed("")
            return failed(
                f"{evidence} from {before:.6g} to {after:.6g} (+0.5), though softmax is meant.",
                "Softmax ignores a common shift: normalise over the class dimension (dim=1), every class included.",
            )

        return s.judged(constant, prediction, target)

    def shifted(p32: Tensor, t: Tensor) -> Finding:
        before = s.value(p32, t)
        rows = torch.where(torch.arange(len(p32)) % 2 == 0, 2000.0, -2000.0).view(-1, *[1] * (p32.dim() - 1))
        for what, shift in (("by -2000", -rows.abs()), ("by 2000", rows.abs()), ("by 2000 and -2000 in turn", rows)):
            # A power of two beyond the logits costs some of their digits; the same rounding is given to both.
            rounded = (p32 + shift) - shift
            after, want = s.value(rounded + shift, t), s.value(rounded, t)
            if not abs(after - want) <= 1e-3 * max(abs(want), abs(before), 1e-6):
                return failed(
                    f"Logits shifted {what} give {after:.6g} instead of {want:.6g} (float32).",
                    "exp over- or underflows: subtract the row's maximum first, as log_softmax and logsumexp do.",
                    value=after,
                    expected=want,
                )
        return passed("Logits shifted by ±2000 give the same value (float32).")

    return s.judged(shifted, prediction.float(), target)


def _wrong_softmax(s: Subject, dim: int, prediction: Tensor, target: Tensor) -> Finding:
    """Numbers that are constant along this dimension, added to the logits, change nothing: softmax is over it."""
    shape = [1 if d == dim else n for d, n in enumerate(prediction.shape)]
    added = torch.randn(shape, generator=s.generator(13)).double()
    before, after = s.value(prediction, target), s.value(prediction + added, target)
    other = s.value(prediction + torch.randn(prediction.shape, generator=s.generator(14)).double(), target)
    size = abs(before)
    if prediction.shape[dim] < 2 or abs(before - after) > 1e-9 * size or abs(before - other) < 1e-3 * size:
        return passed("")
    return failed(
        f"Logits may be shifted along dim {dim} without changing the value, but not along the classes (dim 1).",
        "Softmax is taken over the wrong dimension: classes compete within a sample, pass dim=1.",
        dim=dim,
    )


PROPERTIES = {
    "gradient": gradient,
    "finite": finite,
    "half precision": half_precision,
    "precision": precision,
    "useful gradient": useful_gradient,
    "continuous": continuity,
    "optimum": optimum,
    "shift invariance": shift_invariance,
    "second derivative": second_derivative,
}
