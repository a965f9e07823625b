"""Properties of the loss as a function: gradient, finite values, precision, continuity, optimum."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .report import Curve, Finding
from .subject import NoGradientError, Subject, example, passed, skipped

STEPS = (1e-6, 1e-5, 1e-4, 1e-3)


def _gradient_error(s: Subject, prediction: Tensor, target: Tensor) -> tuple[float, float, float] | None:
    """The largest error of a gradient entry relative to the largest entry, with that entry and the difference quotient.

    An entry is right when it lies between the one-sided difference quotients: at a kink any slope between is a
    subgradient. The step that agrees best counts, since a loss that computes in float32 needs a longer one; a wrong
    gradient agrees at none.
    """
    value, grad = s.value_and_gradient(prediction, target)
    if not (math.isfinite(value) and grad.isfinite().all()):
        return None  # said under "finite"
    flat = grad.reshape(-1)
    best: tuple[float, float, float] | None = None
    for step in STEPS:
        worst = (0.0, 0.0, 0.0)
        quotients = []
        for i in range(flat.numel()):
            h = step * max(1.0, abs(float(prediction.reshape(-1)[i])))
            ends = []
            for sign in (1, -1):
                moved = prediction.clone()
                moved.view(-1)[i] += sign * h
                ends.append(s.value(moved, target))
            quotients.append(((value - ends[1]) / h, (ends[0] - value) / h, h))
        finite = [abs(q) for q3 in quotients for q in q3[:2] if math.isfinite(q)]
        scale = max([float(flat.abs().max()), *finite, 1e-30])
        for g, (before, after, h) in zip(flat.tolist(), quotients, strict=True):
            if not (math.isfinite(before) and math.isfinite(after)):
                continue
            low, high = min(before, after), max(before, after)
            noise = 64 * 2.3e-16 * abs(value) / h
            error = max(low - g, g - high, 0.0) - noise
            if error > worst[0] * scale:
                worst = (error / scale, g, (before + after) / 2)
        if best is None or worst[0] < best[0]:
            best = worst
        if best[0] < 1e-5:
            break
    return best


def gradient(s: Subject) -> Finding:
    name = "gradient"
    seen: list[str] = []
    worst = (0.0, 0.0, 0.0)
    for where, prediction, target in s.points():
        found = _gradient_error(s, prediction, target)
        if found is None:
            continue
        seen.append(where)
        worst = max(worst, found)
        if found[0] > 1e-3:

            def wrong(p: Tensor, t: Tensor) -> bool:
                return (_gradient_error(s, p, t) or (0.0,))[0] > 1e-3

            shown = s.shrink(prediction, target, wrong)
            smallest = _gradient_error(s, *shown) or found
            return Finding(
                name,
                "failure",
                f"At a {where} point the gradient says {smallest[1]:.6g} where the difference quotient says "
                f"{smallest[2]:.6g}.",
                {"relative_error": found[0], "gradient": smallest[1], "difference_quotient": smallest[2]},
                example(*shown),
                "Training follows a direction that is not this loss's slope: look for a detach(), .data, no_grad() or "
                "a hand-written backward.",
            )
    if not seen:
        return skipped(name, "No point with a finite value and gradient, see 'finite'.")
    return passed(
        name,
        f"Agrees with finite differences in float64 at {', '.join(seen)} points (largest error {worst[0]:.1e}).",
        relative_error=worst[0],
    )


def second_derivative(s: Subject) -> Finding:
    name = "second derivative"
    prediction, target = s.sample(3)
    leaf = prediction.clone().requires_grad_()
    out = s.result(leaf, target).sum()
    if not out.requires_grad:
        raise NoGradientError
    try:
        (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
    except RuntimeError as e:
        return skipped(name, f"Not offered: {_line(e)}")
    g = s.generator(11)
    along = torch.randn(leaf.shape, generator=g).double()
    second = torch.zeros_like(leaf)
    if grad.requires_grad:
        try:
            (found,) = torch.autograd.grad(grad, leaf, along, allow_unused=True)
        except RuntimeError as e:
            return skipped(name, f"Not offered: {_line(e)}")
        second = torch.zeros_like(leaf) if found is None else found
    best = math.inf
    for h in (1e-5, 1e-4, 1e-3):
        up, down = (s.gradient(prediction + sign * h * along, target) for sign in (1, -1))
        want = (up - down) / (2 * h)
        # A loss that computes in float32 inside cannot be differenced finely; below this nothing can be told.
        noise = 1e-9 * float(up.abs().max()) / h
        scale = max(float(want.abs().max()), float(second.abs().max()), float(up.abs().max()) * 1e-2, 1e-30)
        best = min(best, max(0.0, float((second - want).abs().max()) - noise) / scale)
    if best > 1e-2:
        return Finding(
            name,
            "failure",
            f"The second derivative is off by {best:.2g} of its size.",
            {"relative_error": best},
            example(prediction, target),
            "Hessians and gradient penalties are silently wrong: write backward in differentiable operations of the "
            "saved inputs, or mark it once_differentiable.",
        )
    return passed(name, f"Agrees with differences of the gradient (error {best:.1e}).", relative_error=best)


def _line(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return (text[0] if text else type(e).__name__)[:160]


def _hard_points(s: Subject) -> list[tuple[str, Tensor, Tensor, bool]]:
    """(what it is, prediction, target, whether a loss may be infinite there)."""
    prediction, target = s.sample()
    sign = torch.where(prediction > 0, 1.0, -1.0).double()
    points = [
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
    if target.is_floating_point() and s.task.name == "regression":
        points.append(("a target of 0", prediction, torch.zeros_like(target), False))
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


def finite(s: Subject) -> Finding:
    name = "finite"
    tried: list[str] = []
    excused: Finding | None = None
    for what, prediction, target, may in _hard_points(s):
        p32 = prediction.float()

        def broken(p: Tensor, t: Tensor) -> bool:
            value, grad = s.value_and_gradient(p, t)
            return not (math.isfinite(value) and bool(grad.isfinite().all()))

        tried.append(what)
        if not broken(p32, target):
            continue
        exponential = what in ("huge predictions", "sure and wrong") and _exponential(s)
        p, t = s.shrink(p32, target, broken)
        value, grad = s.value_and_gradient(p, t)
        finding = Finding(
            name,
            "warning" if may or exponential else "failure",
            f"With {what} the value is {value:.4g} and the gradient has {int((~grad.isfinite()).sum())} entries that "
            "are not finite (float32)." + (" The loss itself grows exponentially." if exponential else ""),
            {"value": value, "nonfinite_gradients": int((~grad.isfinite()).sum())},
            example(p, t),
            "One such sample turns every parameter into nan: use the stable form (log_softmax, logsumexp, logaddexp, "
            "log1p), or add a small number inside sqrt, log and divisions.",
        )
        if finding.status == "failure":
            return finding
        excused = excused or finding
    return excused or passed(name, f"Value and gradient are finite with {', '.join(tried)}.")


def half_precision(s: Subject) -> Finding:
    name = "half precision"
    trouble: list[tuple[str, torch.dtype, float, float, Tensor, Tensor]] = []
    tried: list[str] = []
    refused: list[str] = []
    for dtype in (torch.float16, torch.bfloat16):
        moderate = [("random", *s.sample())]
        prediction, target = s.sample()
        if s.task.name == "regression":
            moderate += [
                ("residuals of 300", target + 300, target),
                ("residuals of 1/1000", (target + 1e-3), target),
            ]
        elif s.task.huge > 60:
            moderate.append(("logits of 60", 30 * prediction.clamp(-2, 2), target))
        for what, p, t in moderate:
            p, t = p.to(dtype), (t.to(dtype) if t.is_floating_point() else t)
            try:
                value, grad = s.value_and_gradient(p, t)
            except NoGradientError:
                raise
            except Exception as e:
                refused.append(f"{_dtype(dtype)}: {_line(e)}")
                break
            want, _ = s.value_and_gradient(p.double(), t.double() if t.is_floating_point() else t)
            tried.append(f"{what} in {_dtype(dtype)}")
            fits = math.isfinite(want) and abs(want) < torch.finfo(dtype).max
            if fits and not (math.isfinite(value) and bool(grad.isfinite().all())):
                trouble.append((what, dtype, value, want, p, t))
    if trouble:
        what, dtype, value, want, p, t = trouble[0]
        plain = what == "random"
        return Finding(
            name,
            "failure" if plain else "warning",
            f"In {_dtype(dtype)} with {what} the value is {value:.4g} (in float64 {want:.6g}) or the gradient is not "
            "finite.",
            {"value": value, "float64": want},
            example(p[:1], t[:1]),
            "Mixed-precision training meets this: convert to float32 inside the loss, or keep what is between small.",
        )
    if not tried:
        return skipped(name, f"Not offered on this device. {refused[0]}")
    return passed(name, f"Finite: {', '.join(tried)}.{' Not offered: ' + refused[0] if refused else ''}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def precision(s: Subject) -> Finding:
    name = "precision"
    prediction, target = s.sample(512 if s.samples < 512 else s.samples)
    if prediction.numel() < 2048 * 3 and prediction[0].numel() < 64:
        prediction, target = s.sample(2048)
    if s.task.name == "regression":  # a relative error at a target near 0 measures the target's rounding
        target = torch.where(target < 0, -1.0, 1.0) * target.abs().clamp(min=0.1)
    parts: list[str] = []
    numbers: dict[str, float] = {}
    worst = "pass"
    for dtype, warn, fail in (
        (torch.float32, 200.0, 1e4),
        (torch.float16, 32.0, 300.0),
        (torch.bfloat16, 16.0, 100.0),
    ):
        p, t = prediction.to(dtype), (target.to(dtype) if target.is_floating_point() else target)
        exact = (p.double(), t.double() if t.is_floating_point() else t)
        try:
            value, grad = s.value_and_gradient(p, t)
        except NoGradientError:
            raise
        except Exception:
            continue
        want, want_grad = s.value_and_gradient(*exact)
        if not math.isfinite(want) or abs(want) > torch.finfo(dtype).max / 4:
            continue
        eps = torch.finfo(dtype).eps
        value_error = abs(value - want) / (eps * max(abs(want), 1e-30))
        # Entries below the dtype's smallest step cannot be better than that. And not the largest error, but the 99th
        # percentile: an entry beside a kink may fall on its other side.
        off = ((grad.double() - want_grad).abs() - torch.finfo(dtype).smallest_normal * eps).clamp(min=0)
        grad_error = float(torch.quantile(off.reshape(-1)[:1_000_000], 0.99)) / (
            eps * max(float(want_grad.abs().max()), 1e-30)
        )
        text = f"{_dtype(dtype)} {value_error:.2g} (value) and {grad_error:.2g} (gradient)"
        if s.reference is not None:
            reference = s.raw(p, t, fn=s.reference)
            beside = abs(float(reference.double().sum()) - want) / (eps * max(abs(want), 1e-30))
            text += f", reference {beside:.2g}"
            numbers[f"{_dtype(dtype)}_reference"] = beside
        parts.append(text)
        numbers[f"{_dtype(dtype)}_value"], numbers[f"{_dtype(dtype)}_gradient"] = value_error, grad_error
        error = max(value_error, grad_error)
        if not error <= fail:
            worst = "failure"
        elif error > warn and worst == "pass":
            worst = "warning"
    evidence = f"Error against float64 in units of the dtype's precision: {'; '.join(parts)}."
    if not parts:
        return skipped(name, "No dtype could be compared with float64.")
    why = "Digits are lost: sum in float32, subtract the maximum before exp, avoid differences of large numbers."
    return Finding(name, worst, evidence, numbers, None, why if worst != "pass" else "")


def useful_gradient(s: Subject) -> Finding:
    name, zero, total = "useful gradient", 0, 0
    why = (
        "Nothing can be learnt where the gradient is zero: counts, argmax, round, sign and comparisons are metrics; "
        "train on a smooth surrogate (cross entropy for accuracy) and keep the metric for evaluation."
    )
    for salt in range(8):
        prediction, target = s.sample(salt=salt)
        try:
            grad = s.gradient(prediction, target)
        except NoGradientError:
            return Finding(
                name,
                "failure",
                "The result has no gradient with respect to the prediction.",
                {"zero_share": 1.0},
                example(prediction[:1], target[:1]),
                why,
            )
        flat = grad.reshape(len(grad), -1).abs().amax(1)
        zero, total = zero + int((flat == 0).sum()), total + len(flat)
    share = zero / total
    evidence = f"Samples without any gradient: {100 * share:.0f} % of {total} at random predictions."
    if share > 0.9:
        return Finding(name, "failure", evidence, {"zero_share": share}, example(prediction[:1], target[:1]), why)
    return passed(name, evidence, zero_share=share)


def _bisect(f: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Follow the larger change into ever smaller intervals: (place, change that is left)."""
    a, b = f(low), f(high)
    for _ in range(40):
        if high - low < 1e-11:
            break
        middle = (low + high) / 2
        m = f(middle)
        if abs(m - a) >= abs(b - m):
            high, b = middle, m
        else:
            low, a = middle, m
    return (low + high) / 2, abs(b - a)


def continuity(s: Subject) -> Finding:
    """Values along lines; what is left of a step when the interval shrinks to nothing is a jump."""
    name = "continuous"
    kinks: list[float] = []
    grid = torch.linspace(-2, 2, 201).tolist()
    for salt in range(3):
        prediction, target = s.sample(salt=salt)
        direction = torch.randn(prediction.shape, generator=s.generator(100 + salt)).double()

        def value(t: float, p: Tensor = prediction, y: Tensor = target, d: Tensor = direction) -> float:
            return s.value(p + t * d, y)

        def slope(t: float, p: Tensor = prediction, y: Tensor = target, d: Tensor = direction) -> float:
            try:
                return float((s.gradient(p + t * d, y) * d).sum())
            except NoGradientError:
                return math.nan

        values, slopes = [value(t) for t in grid], [slope(t) for t in grid]
        if salt == 0:
            s.curves.append(Curve("Along a random line", "step along the line", grid, values, slopes))
        spread = max(values) - min(values)
        if not math.isfinite(spread):
            continue
        steps = sorted(range(200), key=lambda i: -abs(values[i + 1] - values[i]))[:4]
        # A kink hides in the interval with the sharpest change of slope, a jump in the one with the largest step.
        curved = sorted(range(1, 200), key=lambda i: -abs(values[i + 1] - 2 * values[i] + values[i - 1]))[:4]
        for i in dict.fromkeys([*steps, *curved]):
            for low, high in {(grid[i], grid[i + 1]), (grid[max(i - 1, 0)], grid[i])}:
                place, left = _bisect(value, low, high)
                if left > 1e-4 * spread and left > 1e-6 * max(map(abs, values)):
                    return Finding(
                        name,
                        "failure",
                        f"The value jumps by {left:.4g} within {4e-11:.0e} of one step (line {salt}, at "
                        f"{place:.4g} of the direction's length).",
                        {"jump": left, "at": place, "line": salt},
                        example(prediction + place * direction, target),
                        "A gradient does not see a jump, so descent can walk over it: look for comparisons, rounding, "
                        "argmax, or a mask that depends on the prediction.",
                    )
        bends = sorted(range(200), key=lambda i: -abs(slopes[i + 1] - slopes[i]))[:2]
        top = max((abs(v) for v in slopes if math.isfinite(v)), default=0.0)
        for i in bends:
            if math.isfinite(slopes[i]) and math.isfinite(slopes[i + 1]):
                place, left = _bisect(slope, grid[i], grid[i + 1])
                if left > 1e-3 * top:
                    kinks.append(place)
    text = f"{len(kinks)} kinks located (fine, as in L1 at zero)" if kinks else "no kinks"
    return passed(name, f"No jump along 3 random lines, {text}.", kinks=kinks)


def _descend(s: Subject, prediction: Tensor, target: Tensor, steps: int = 250) -> Tensor:
    leaf = prediction.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-4)
    for _ in range(steps):
        _, grad = s.value_and_gradient(leaf, target)
        if not grad.isfinite().all():
            break
        leaf.grad = grad
        optimizer.step()
        schedule.step()
    return leaf.detach()


def optimum(s: Subject) -> Finding:
    name = "optimum"
    perfect = s.task.perfect
    if perfect is None:
        return skipped(name, "The task does not say what a perfect prediction is.")
    prediction, target = s.sample()
    best = perfect(target)
    start, least = s.value(prediction, target), s.value(best, target)
    why = (
        "Training makes the loss smaller, whatever it means: it must be least where the prediction is right. Check the "
        "sign, the order of arguments, log-probabilities against logits, and that differences cannot become negative."
    )
    end_point = _descend(s, prediction, target)
    end = s.value(end_point, target)
    if not (math.isfinite(start) and math.isfinite(least)):
        return Finding(
            name,
            "failure",
            f"The value is {least:.4g} at the perfect prediction ({start:.4g} at a random one).",
            {"perfect": least, "random": start},
            example(best[:1], target[:1]),
            why,
        )
    numbers = {"random": start, "perfect": least, "after_descent": end}
    range_ = abs(start - least)
    slack = 1e-6 * max(abs(least), range_) + 1e-12

    def failure(text: str, p: Tensor) -> Finding:
        shown = s.shrink(p, target, lambda q, t: s.value(q, t) < s.value(perfect(t), t) - 1e-6)
        return Finding(name, "failure", text, numbers, example(*shown), why)

    if start <= least + slack:
        return failure(f"A random prediction costs {start:.6g}, a perfect one {least:.6g}.", prediction)
    if s.task.decided is not None:
        right = s.task.decided(end_point, target)
        counted = torch.ones_like(right) if s.ignore_index is None else target != s.ignore_index
        share = float(right[counted].double().mean())
        far = s.value(50 * best, target)
        if far < least - 10 * (abs(start) + 1):
            return failure(
                f"Not bounded below: {least:.4g} for sure and right predictions, {far:.4g} for 50 times those.",
                50 * best,
            )
        if share < 1:
            return Finding(
                name,
                "failure" if share < 0.9 else "warning",
                f"Descent from a random start ends with {100 * share:.0f} % right decisions (value {start:.4g} to "
                f"{end:.4g}).",
                {**numbers, "right": share},
                example(end_point[:1], target[:1]),
                why,
            )
        return passed(name, f"Descent from {start:.4g} ends at {end:.4g} with every decision right.", **numbers)
    excess = (least - end) / (abs(start - end) + 1e-30)
    if excess > 0.25 or not math.isfinite(end):
        return failure(f"The value at prediction = target is {least:.6g}, yet descent reaches {end:.6g}.", end_point)
    near = [
        best + h * torch.randn(best.shape, generator=s.generator(20 + i)).double()
        for i, h in enumerate((1e-3, 1e-2, 0.1, 1.0, 10.0))
        for _ in (0, 1)
    ]
    lowest = min(near, key=lambda p: s.value(p, target))
    below = least - s.value(lowest, target)
    if below > slack and below > 0.05 * range_:
        return failure(f"The value at prediction = target is {least:.6g}, beside it {least - below:.6g}.", lowest)
    if excess > 0.05 or below > slack:
        return Finding(
            name,
            "warning",
            f"The value at prediction = target is {least:.6g}, but {min(end, least - below):.6g} can be reached.",
            numbers,
            example(lowest[:1], target[:1]),
            "The least loss lies beside the target, which is what smoothing and priors do; otherwise it is a bug.",
        )
    if end - least > 0.02 * range_:
        return Finding(
            name,
            "warning",
            f"Descent from a random start stops at {end:.4g}, above {least:.4g} at prediction = target.",
            numbers,
            example(end_point[:1], target[:1]),
            "Flat regions or local minima hold training back: look at the slope far from the target.",
        )
    return passed(
        name, f"Least at prediction = target ({least:.4g}); descent from {start:.4g} reaches {end:.4g}.", **numbers
    )


def shift_invariance(s: Subject) -> Finding:
    name = "shift invariance"
    if not s.task.classes:
        return skipped(name, "Predictions are not classes.")
    prediction, target = s.sample()
    if not s.shifts:
        evidence = "A constant added to all logits of a row changes the value"
        if s.shift_invariant:
            return Finding(
                name,
                "failure",
                evidence + ", though softmax is meant.",
                {},
                example(prediction[:1], target[:1]),
                "Softmax ignores a common shift: normalise over the class dimension (dim=1), every class included.",
            )
        return skipped(name, evidence + ": no softmax (fine if none is meant).")
    p32 = prediction.float()
    before = s.value(p32, target)
    for shift in (-2000.0, 2000.0):
        # A power of two beyond the logits costs some of their digits; the same rounding is given to both.
        rounded = (p32 + shift) - shift
        after, want = s.value(rounded + shift, target), s.value(rounded, target)
        if not abs(after - want) <= 1e-3 * max(abs(want), abs(before), 1e-6):
            return Finding(
                name,
                "failure",
                f"Logits shifted by {shift:g} give {after:.6g} instead of {want:.6g} (float32).",
                {"value": after, "expected": want},
                example((rounded + shift)[:1], target[:1]),
                "exp over- or underflows: subtract the row's maximum first, as log_softmax and logsumexp do.",
            )
    return passed(name, "Logits shifted by ±2000 give the same value (float32).")


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
