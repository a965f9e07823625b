"""Properties of the loss as a function in a program: reductions, samples, weights, tensors, autograd, compilers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .calculus import _dtype, _line
from .report import Finding
from .subject import NoGradientError, Subject, example, passed, skipped


def _close(a: float, b: float, tolerance: float = 1e-5) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-8) or (math.isnan(a) and math.isnan(b))


def _is_root(none: Tensor, total: float) -> bool:
    return none.numel() > 1 and not _close(float(none.sum()), total) and _close(float(none.norm()), total)


def reductions(s: Subject) -> Finding:
    name = "reductions"
    if "reduction" not in s.options:
        return skipped(name, "The loss has no option 'reduction'.")
    prediction, target = s.sample()
    if s.ignore_index is not None and not target.is_floating_point():
        target = target.clone()
        target.view(-1)[0] = s.ignore_index
    with torch.no_grad():
        none = s.result(prediction, target, reduction="none")
    total, mean = (s.value(prediction, target, reduction=r) for r in ("sum", "mean"))
    parts = float(none.double().sum())
    numbers = {"sum_of_none": parts, "sum": total, "mean": mean}
    why = "A learning rate tuned with one reduction is wrong with another: divide by the number of samples that count."
    if _is_root(none.double(), total):  # a norm, as RMSE's: its squares are what adds up
        if any(_close(total, mean * math.sqrt(d)) for d in (none.numel(), len(prediction))):
            return passed(
                name, "A norm: the squares of 'none' add up to that of 'sum', 'mean' divides them.", **numbers
            )
        return Finding(
            name,
            "failure",
            f"'sum' is the norm of 'none' ({total:.6g}), but 'mean' is {mean:.6g}.",
            numbers,
            example(prediction[:1], target[:1]),
            why,
        )
    if not _close(parts, total):
        return Finding(
            name,
            "failure",
            f"The elements of 'none' add up to {parts:.8g}, 'sum' says {total:.8g}.",
            numbers,
            example(prediction[:1], target[:1]),
            why,
        )
    if none.dim() == 0:
        return Finding(
            name,
            "warning",
            "'none' returns a scalar.",
            numbers,
            None,
            "Per-sample losses are what 'none' is for (weighting, hard-example mining).",
        )
    counted = target != s.ignore_index if s.ignore_index is not None else torch.ones_like(target, dtype=torch.bool)
    divisors = {float(none.numel()), float(len(prediction)), float(prediction.numel())}
    weight = s.options.get("weight")
    if isinstance(weight, Tensor) and s.task.classes and not target.is_floating_point():
        divisors.add(float(weight.double()[target.clamp(min=0)][counted].sum()))
    elif isinstance(weight, Tensor):
        divisors.add(float(weight.double().broadcast_to(none.shape).sum()))
    if not counted.all():
        divisors = {d for d in divisors if d not in (none.numel(), len(prediction))} | {float(counted.sum())}
    if not any(_close(total, mean * d) for d in divisors):
        return Finding(
            name,
            "failure",
            f"'mean' is 'sum' divided by {total / mean if mean else math.nan:.6g}; "
            f"{' or '.join(f'{d:g}' for d in sorted(divisors))} would make sense.",
            numbers,
            example(prediction[:1], target[:1]),
            why,
        )
    return passed(
        name, f"'none' adds up to 'sum'; 'mean' is that divided by {total / mean if mean else 1:g}.", **numbers
    )


def batch_size(s: Subject) -> Finding:
    name = "batch size"
    prediction, target = s.sample()
    single, double = (
        s.value(*pair) for pair in ((prediction, target), (torch.cat([prediction] * 2), torch.cat([target] * 2)))
    )
    ratio = double / single if single else 1.0
    if any(_close(ratio, r) for r in (1.0, 2.0)):
        how = "a mean" if _close(ratio, 1.0) else "a sum"
        return passed(name, f"Behaves as {how} over samples: the batch twice over costs {ratio:g} times.", ratio=ratio)
    return Finding(
        name,
        "warning" if _close(ratio, math.sqrt(2)) else "failure",
        f"The same batch twice over costs {ratio:.6g} times as much, neither 1 (a mean) nor 2 (a sum).",
        {"ratio": ratio},
        example(prediction, target),
        "The loss, and so the learning rate that suits, depends on the batch size: divide by the number of samples.",
    )


def sample_order(s: Subject) -> Finding:
    name = "sample order"
    prediction, target = s.sample()
    order = torch.randperm(len(prediction), generator=s.generator(3))
    with torch.no_grad():
        before, after = s.result(prediction, target).double(), s.result(prediction[order], target[order]).double()
    if before.dim() and len(before) == len(order):
        before = before[order]
    difference = float((before - after).abs().max())
    if not difference <= 1e-6 * max(float(before.abs().max()), 1e-6):
        return Finding(
            name,
            "failure",
            f"The same samples in another order change the value by {difference:.4g}.",
            {"difference": difference, "order": order.tolist()},
            example(prediction, target),
            "Samples of a batch have no order: look for indices by position, cumulative sums, or rolled targets.",
        )
    return passed(name, "Permuted samples give the same value.")


def leaks(s: Subject) -> Finding:
    name = "no leak between samples"
    prediction, target = s.sample()
    why = (
        "A sample's loss then depends on its neighbours in the batch; look for a statistic over dim 0, a softmax over "
        "the wrong dim, or broadcasting (N) with (N, 1). Fine if it is meant (contrastive and batch-wise Dice losses)."
    )
    leaf = prediction.clone().requires_grad_()
    each = s.result(leaf, target, **s.reduced("none"))
    if not each.requires_grad:
        raise NoGradientError
    if each.dim() and len(each) == len(prediction):
        (grad,) = torch.autograd.grad(each[0].sum(), leaf)
        leaked = float(grad[1:].abs().max())
        if leaked > 1e-9 * max(float(grad.abs().max()), 1e-30):
            return Finding(
                name,
                "failure",
                f"Sample 0's loss has a gradient of {leaked:.4g} with respect to another sample.",
                {"gradient": leaked},
                example(prediction, target),
                why,
            )
    # The gradients of the other samples may change by a common factor only (as under a root of the mean).
    before = s.gradient(prediction, target)[1:].reshape(-1)
    moved, other = prediction.clone(), target.clone()
    moved[0] += torch.randn(moved[0].shape, generator=s.generator(4)).double()
    different = [i for i in range(len(target)) if not torch.equal(target[i], target[0])]
    other[0] = target[different[0] if different else 0]
    for what, p, t in (("prediction", moved, target), ("target", prediction, other)):
        after = s.gradient(p, t)[1:].reshape(-1)
        norms = float(before.norm() * after.norm())
        apart = float((before / before.norm() - after / after.norm()).norm()) if norms > 0 else 0.0
        if apart > 1e-5:
            return Finding(
                name,
                "warning",
                f"Another {what} for sample 0 turns the gradient of the other samples by {apart:.3g} rad.",
                {"angle": apart},
                example(prediction, target),
                why,
            )
    return passed(name, "A sample's prediction and target do not touch the other samples' loss and gradient.")


def _weight_forms(s: Subject, prediction: Tensor, target: Tensor) -> Iterator[tuple[str, str, Callable[..., Tensor]]]:
    """(option, what it weights, weight tensor -> factor of each sample's or element's loss), each that may fit."""
    n = len(prediction)
    if "weight" in s.options:
        if s.task.classes:
            classes = prediction.shape[1]
            if not target.is_floating_point():
                yield "weight", "class", lambda g: torch.rand(classes, generator=g).double() + 0.5
        else:
            yield "weight", "element", lambda g: torch.rand(prediction.shape, generator=g).double() + 0.5
        yield "weight", "sample", lambda g: torch.rand(n, generator=g).double() + 0.5
    if "sample_weight" in s.options:
        yield "sample_weight", "sample", lambda g: torch.rand(n, generator=g).double() + 0.5


def weights(s: Subject) -> Finding:
    name = "weights"
    checked: list[str] = []
    tried: set[str] = set()
    prediction, target = s.sample(4 if not s.task.classes else 6)
    bare: dict[str, Any] = {k: None for k in ("weight", "sample_weight") if k in s.options}
    why = "Weights are how rare classes and unreliable samples are balanced; multiply each loss before reducing."

    def failure(text: str, **numbers: Any) -> Finding:
        return Finding(name, "failure", text, numbers, example(prediction, target), why)

    for option, what, make in _weight_forms(s, prediction, target):
        if any(c.startswith(option + " ") for c in checked):
            continue
        g = s.generator(6)
        w, v = make(g), make(g)

        def call(weight: Tensor | None, option: str = option, **more: Any) -> float:
            return s.value(prediction, target, **{**bare, option: weight, **more})

        tried.add(option)
        try:
            plain, unit, weighted = call(None), call(torch.ones_like(w)), call(w)
        except Exception:
            continue  # not the form of this loss's weight
        if not _close(plain, unit):
            return failure(f"{option} of all ones changes the value from {plain:.8g} to {unit:.8g}.", value=unit)
        if _close(unit, weighted, 1e-9):
            return failure(f"{option} is ignored: random weights give the same value {unit:.8g}.", value=unit)
        linear = s.reduced("sum")
        if linear:
            whole, *two = (call(x, **linear) for x in (2 * w + 3 * v, w, v))
            with torch.no_grad():
                root = _is_root(
                    s.result(prediction, target, **{**bare, "reduction": "none"}).double(), call(None, **linear)
                )
            parts = math.hypot(math.sqrt(2) * two[0], math.sqrt(3) * two[1]) if root else 2 * two[0] + 3 * two[1]
            if not _close(whole, parts):
                return failure(f"{option} does not act linearly: {whole:.8g} instead of {parts:.8g}.", value=whole)
        ratio = call(3 * w) / weighted
        if not any(_close(ratio, r) for r in (1.0, 3.0, math.sqrt(3))):
            return failure(f"Three times the {option} costs {ratio:.6g} times (1 or 3 would make sense).", ratio=ratio)
        problem = _weighted_mean(s, prediction, target, bare, option, what, w, call)
        if problem:
            # Without 'sum', smoothing over weighted classes cannot be told from a mistake.
            return replace(failure(problem), status="failure" if linear else "warning")
        zeroed = w.clone()
        zeroed[0] = 0
        off = (target == 0) if what == "class" else torch.arange(len(target)) == 0
        grads = (s.gradient(prediction, target, **{**bare, option: x}) for x in (zeroed, torch.ones_like(w)))
        left, unit_size = (float((g.movedim(1, -1)[off] if what == "class" else g[off]).abs().max()) for g in grads)
        # With label smoothing the other classes' weights leave a small part.
        if left > 1e-12 and not (what == "class" and left < 0.5 * unit_size):
            return failure(f"Where {option} is 0 the gradient is {left:.4g}.")
        checked.append(f"{option} per {what}")
    if checked:
        return passed(name, f"Act linearly, ones change nothing, zeros give no gradient: {', '.join(checked)}.")
    if tried:
        return skipped(name, f"Of another form than per class, sample or element: {', '.join(sorted(tried))}.")
    return skipped(name, "The loss has no option 'weight' or 'sample_weight'.")


def _weighted_mean(
    s: Subject,
    prediction: Tensor,
    target: Tensor,
    bare: dict[str, Any],
    option: str,
    what: str,
    w: Tensor,
    call: Callable[..., float],
) -> str:
    """What is wrong with the mean of weighted losses, or ''; it is built here from the losses of single samples."""
    if target.dim() != 1 and what == "class":
        return ""
    if what == "element" and not s.reduced("none"):
        return ""
    mean, found = s.reduced("mean"), call(w, **s.reduced("mean"))
    factor = w[target] if what == "class" else w.reshape(-1)
    if what == "element":
        each = s.result(prediction, target, **bare, reduction="none").detach().reshape(-1)
    else:
        singles = [s.value(prediction[i : i + 1], target[i : i + 1], **bare, **mean) for i in range(len(target))]
        each = torch.tensor(singles, dtype=torch.float64)
    plain = call(None, **mean)
    if each.numel() != factor.numel() or not _close(plain, float(each.mean())):
        return ""  # a sum, or not separable over samples
    total = float((factor * each).sum())
    if s.reduced("sum"):
        total = call(w, reduction="sum")
        if what == "sample" and not _close(total, call(None, reduction="sum") / plain * float((factor * each).mean())):
            return f"Sum with random {option}: {total:.8g} is not the sum of weight times loss."
    divisors = [float(each.numel()), float(factor.sum()), float(prediction.numel())]
    if what == "sample" and not s.task.classes:
        divisors.append(divisors[1] * prediction[0].numel())
    allowed = {total / d for d in divisors}
    if any(_close(found, a) for a in allowed):
        return ""
    return (
        f"Mean with random {option}: {found:.8g}, where sum(w * loss) / sum(w) or / N would be "
        f"{' or '.join(f'{a:.8g}' for a in sorted(allowed))}."
    )


def ignored_targets(s: Subject) -> Finding:
    name = "ignored targets"
    if s.ignore_index is None or not s.task.classes:
        return skipped(name, "The loss has no option 'ignore_index'.")
    prediction, target = s.sample()
    if target.is_floating_point():
        return skipped(name, "Targets are probabilities.")
    classes = prediction.shape[1]
    if 0 <= s.ignore_index < classes:
        target = torch.where(target == s.ignore_index, (s.ignore_index + 1) % classes, target)
    some = target.clone()
    some[::2] = s.ignore_index
    kept = torch.arange(len(target)) % 2 == 1
    why = "Padding then trains the model, or changes the weight of what is not padding."
    grad = s.gradient(prediction, some)
    numbers = {"gradient": float(grad[~kept].abs().max())}
    if numbers["gradient"] != 0:
        return Finding(
            name,
            "failure",
            f"Ignored targets carry a gradient of {numbers['gradient']:.4g}.",
            numbers,
            example(prediction[:1], some[:1]),
            why,
        )
    found, want = s.value(prediction, some), s.value(prediction[kept], target[kept])
    if not _close(found, want):
        return Finding(
            name,
            "failure",
            f"With ignored samples the value is {found:.8g}, without those samples {want:.8g}.",
            {"value": found, "expected": want},
            example(prediction, some),
            why + " Divide by the number of targets that count.",
        )
    if not float(s.gradient(prediction, target).reshape(len(target), -1).abs().amax(1).min()) > 0:
        return Finding(
            name,
            "warning",
            "A sample that is not ignored has no gradient.",
            {},
            example(prediction, target),
            "A class may be ignored by mistake (compare target == ignore_index, not <= or !=).",
        )
    value, grad = s.value_and_gradient(prediction, torch.full_like(target, s.ignore_index))
    if not (math.isfinite(value) and bool(grad.isfinite().all())):
        return Finding(
            name,
            "warning",
            f"A batch in which everything is ignored has value {value:.4g}, gradient "
            f"{'finite' if grad.isfinite().all() else 'not finite'}.",
            {"value": value},
            {"prediction": "any", "target": f"all {s.ignore_index}"},
            "0/0, as in torch: one such batch makes every parameter nan if the gradient is nan; skip it or divide by "
            "max(count, 1).",
        )
    return passed(name, "No value, count or gradient from ignored targets; an all-ignored batch is finite.")


def inputs_untouched(s: Subject) -> Finding:
    name = "inputs untouched"
    prediction, target = s.sample()
    for grad in (True, False):
        leaf = prediction.clone().requires_grad_(grad)
        p, t = leaf.clone(), target.clone()
        versions = p._version, t._version
        with torch.set_grad_enabled(grad):
            out = s.raw(p, t)
            if isinstance(out, Tensor) and out.requires_grad:
                out.sum().backward()
        for what, now, then, old in (("prediction", p, prediction, versions[0]), ("target", t, target, versions[1])):
            if s.task.link is not None and what == "prediction":
                continue
            if not torch.equal(now.detach(), then) or now._version != old:
                return Finding(
                    name,
                    "failure",
                    f"The {what} is overwritten by the call{'' if grad else ' (without gradient)'}.",
                    {"largest_change": float((now.detach() - then).abs().max())},
                    example(prediction[:1], target[:1]),
                    "Whoever uses the tensor afterwards (metrics, a second loss) gets other numbers: avoid op_() and "
                    "out= on arguments.",
                )
    return passed(name, "Prediction and target are the same after forward and backward.")


def repeatable(s: Subject) -> Finding:
    name = "repeatable"
    prediction, target = s.sample(64)
    p = prediction.float()
    first = s.result(p, target).detach()
    grads = [s.gradient(p, target)]
    for _ in range(4):
        again = s.result(p, target).detach()
        if not torch.equal(first.nan_to_num(), again.nan_to_num()):
            difference = float((first - again).abs().max())
            return Finding(
                name,
                "failure",
                f"Called again with the same input the value differs by {difference:.4g}.",
                {"difference": difference},
                example(prediction[:1], target[:1]),
                "State or randomness in a loss makes runs incomparable: look for counters, running means, dropout.",
            )
        grads.append(s.gradient(p, target))
    if any(not torch.equal(grads[0].nan_to_num(), g.nan_to_num()) for g in grads[1:]):
        return Finding(
            name,
            "failure",
            "Called again with the same input the gradient differs.",
            {"difference": max(float((grads[0] - g).abs().max()) for g in grads)},
            example(prediction[:1], target[:1]),
            "State or randomness in backward makes runs incomparable.",
        )
    return passed(name, "Five calls give the same value and gradient, bit for bit.")


def grad_output(s: Subject) -> Finding:
    name = "grad_output"
    prediction, target = s.sample()
    leaf = prediction.clone().requires_grad_()
    out = s.result(leaf, target)
    if not out.requires_grad:
        raise NoGradientError
    why = "Loss scaling, weighted sums of losses and gradient accumulation multiply it: backward must too."
    (unit,) = torch.autograd.grad(out, leaf, torch.ones_like(out), retain_graph=True)
    (again,) = torch.autograd.grad(out, leaf, torch.ones_like(out), retain_graph=True)
    if not torch.equal(unit.nan_to_num(), again.nan_to_num()):
        return Finding(
            name,
            "failure",
            "A second backward through the same graph (retain_graph) gives another gradient.",
            {"difference": float((unit - again).abs().max())},
            example(prediction[:1], target[:1]),
            "Backward overwrites what it saved: work on a copy.",
        )
    for factor in (3.0, -2.0, 0.0):
        (scaled,) = torch.autograd.grad(out, leaf, factor * torch.ones_like(out), retain_graph=True)
        error = float((scaled - factor * unit).abs().max())
        if not error <= 1e-9 * max(float(unit.abs().max()), 1e-30):
            return Finding(
                name,
                "failure",
                f"With grad_output {factor:g} the gradient is off by {error:.4g} (of {unit.abs().max():.4g}).",
                {"grad_output": factor, "error": error},
                example(prediction[:1], target[:1]),
                why,
            )
    each = s.result(leaf, target, **s.reduced("none"))
    if each.dim():
        g = torch.randn(each.shape, generator=s.generator(8)).double()
        h = torch.randn(each.shape, generator=s.generator(9)).double()
        a, b, both = (torch.autograd.grad(each, leaf, x.to(each.dtype), retain_graph=True)[0] for x in (g, h, g + h))
        if float((a + b - both).abs().max()) > 1e-6 * max(float(both.abs().max()), 1e-30):
            return Finding(name, "failure", "Backward is not linear in grad_output of reduction 'none'.", {}, None, why)
    return passed(name, "Gradients scale with grad_output; backward can be repeated with retain_graph.")


def layouts(s: Subject) -> Finding:
    name = "layouts"
    prediction, target = s.sample()
    want, want_grad = s.value_and_gradient(prediction, target)

    def strided(x: Tensor) -> Tensor:
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    def transposed(x: Tensor) -> Tensor:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)

    for what, view in (("strided", strided), ("transposed", transposed)):
        leaf = view(prediction).detach().requires_grad_()
        try:
            # Not through result(), whose copies may be contiguous.
            out = s.raw(leaf * torch.ones_like(leaf) if what == "transposed" else leaf, view(target))
            out = out[0] if isinstance(out, (tuple, list)) else out
            if not out.requires_grad:
                raise NoGradientError
            (grad,) = torch.autograd.grad(out.sum(), leaf)
        except NoGradientError:
            raise
        except Exception as e:
            return Finding(
                name,
                "failure",
                f"Raises for {what} inputs: {type(e).__name__}: {_line(e)}",
                {},
                example(prediction[:1], target[:1]),
                "Slices and transposes are common: use reshape() instead of view(), strides in kernels.",
            )
        value = float(out.detach().sum())
        if not _close(value, want) or float((grad - want_grad).abs().max()) > 1e-6 * float(want_grad.abs().max()):
            return Finding(
                name,
                "failure",
                f"For {what} inputs of the same numbers the value is {value:.8g} instead of {want:.8g}, or the "
                "gradient differs.",
                {"value": value, "expected": want},
                example(prediction, target),
                "Memory is read in the wrong order: respect strides, or call contiguous().",
            )
    return passed(name, "Strided and transposed inputs give the same value and gradient.")


def empty(s: Subject) -> Finding:
    name = "empty batch"
    prediction, target = s.sample(2)
    try:
        value, grad = s.value_and_gradient(prediction[:0], target[:0])
    except NoGradientError:
        raise
    except Exception as e:
        return Finding(
            name,
            "warning",
            f"Raises {type(e).__name__}: {_line(e)}",
            {},
            None,
            "The last batch of a filtered data set may be empty; torch's losses return 0 or nan.",
        )
    if value != 0 and not math.isnan(value):
        return Finding(
            name, "warning", f"The value of no sample is {value:.4g}.", {"value": value}, None, "0 or nan is."
        )
    return passed(name, f"No samples: value {value:g}, gradient of shape {list(grad.shape)}.", value=value)


def result_type(s: Subject) -> Finding:
    name = "result dtype and device"
    prediction, target = s.sample()
    found = {}
    for dtype in (torch.float32, torch.float64):
        t = target.to(dtype) if target.is_floating_point() else target
        out = s.raw(prediction.to(dtype), t)
        if isinstance(out, (tuple, list)) and out:
            out = out[0]
        if not isinstance(out, Tensor):
            return Finding(
                name,
                "failure",
                f"The result is a {type(out).__name__}, not a tensor.",
                {},
                None,
                "There is nothing to call backward() on: leave out .item(), float() and numpy.",
            )
        found[_dtype(dtype)] = _dtype(out.dtype)
        if out.dtype != dtype or out.device != prediction.device:
            return Finding(
                name,
                "failure" if not out.is_floating_point() or dtype == torch.float64 else "warning",
                f"For {_dtype(dtype)} predictions the result is {_dtype(out.dtype)} on {out.device}.",
                {"result": found},
                None,
                "A fixed dtype inside (.float(), torch.tensor(0.0), numpy) loses digits or doubles memory: make "
                "constants with new_tensor or like the prediction.",
            )
    if torch.cuda.is_available():
        t = target.cuda()
        out = s.raw(prediction.float().cuda(), t.float() if t.is_floating_point() else t)
        if out.device.type != "cuda":
            return Finding(
                name,
                "failure",
                f"For predictions on CUDA the result is on {out.device}.",
                {},
                None,
                "Make constants on the prediction's device.",
            )
    devices = "cpu and cuda" if torch.cuda.is_available() else "cpu (no GPU here)"
    return passed(name, f"As the prediction's: float32 and float64, on {devices}.", **found)


def autocast(s: Subject) -> Finding:
    name = "autocast"
    prediction, target = s.sample()
    p = prediction.float()
    want = s.value(p, target)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = s.value_and_gradient(p, target)
    error = abs(value - want) / max(abs(want), 1e-30)
    if not (error < 0.05 and grad.isfinite().all() and grad.dtype == p.dtype):
        return Finding(
            name,
            "warning" if math.isfinite(value) else "failure",
            f"Under autocast (bfloat16) the value is {value:.6g} instead of {want:.6g}.",
            {"value": value, "expected": want},
            example(prediction[:1], target[:1]),
            "Mixed precision lowers matrix products and convolutions inside the loss: call .float() there.",
        )
    return passed(name, f"Right under autocast to bfloat16 (relative difference {error:.1e}).", error=error)


def vmap(s: Subject) -> Finding:
    name = "vmap"
    pairs = [s.sample(salt=i) for i in range(3)]
    predictions, targets = torch.stack([p for p, _ in pairs]), torch.stack([t for _, t in pairs])
    want = torch.tensor([s.value(p, t) for p, t in pairs], dtype=torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.func.vmap(lambda p, t: s.raw(p, t).sum())(predictions, targets)
    except Exception as e:
        return Finding(
            name,
            "warning",
            f"torch.func.vmap raises {type(e).__name__}: {_line(e)}",
            {},
            None,
            "Per-sample gradients (torch.func) are out of reach: avoid .item(), if on values, boolean masks and "
            "in-place writes.",
        )
    error = float((found.double() - want).abs().max())
    if not error <= 1e-6 * float(want.abs().max()):
        return Finding(
            name, "failure", f"Under vmap the value is off by {error:.4g}.", {"error": error}, None, "Wrong."
        )
    return passed(name, "The same under torch.func.vmap.")


def memory(s: Subject) -> Finding:
    name = "kept for backward"
    prediction, target = s.sample(256)
    leaf = prediction.float().requires_grad_()
    base = leaf.clone()
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = s.raw(base, target.float() if target.is_floating_point() else target)
    if not (isinstance(out, Tensor) and out.requires_grad):
        raise NoGradientError
    own = {base.untyped_storage().data_ptr(), leaf.untyped_storage().data_ptr(), target.untyped_storage().data_ptr()}
    kept = sum(size for pointer, size in storages.items() if pointer not in own)
    multiple = kept / base.untyped_storage().nbytes()
    text = f"{multiple:.2g} times the prediction's bytes, beside the inputs."
    if multiple > 16:
        return Finding(
            name,
            "warning",
            text,
            {"multiple": multiple},
            None,
            "Memory limits the batch: combine steps in one autograd.Function, or use a fused loss.",
        )
    return passed(name, text, multiple=multiple)


def compiles(s: Subject) -> Finding:
    name = "torch.compile"
    prediction, target = s.sample()
    want, want_grad = s.value_and_gradient(prediction, target)
    leaf = prediction.clone().requires_grad_()
    call = torch.compile(lambda p, t: s.raw(p, t), backend="aot_eager", fullgraph=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = call(leaf, target)
            (grad,) = torch.autograd.grad(out.sum(), leaf)
    except Exception as e:
        return Finding(
            name,
            "warning",
            f"Does not compile in one graph: {type(e).__name__}: {_line(e)}",
            {},
            None,
            "The graph breaks at the loss: avoid .item(), printing, numpy and branches on values.",
        )
    value = float(out.detach().sum())
    if not _close(value, want) or float((grad - want_grad).abs().max()) > 1e-6 * float(want_grad.abs().max()):
        return Finding(
            name,
            "failure",
            f"Compiled, the value is {value:.8g} instead of {want:.8g}, or the gradient differs.",
            {"value": value, "expected": want},
            example(prediction, target),
            "Look for state and side effects that tracing does not see.",
        )
    return passed(name, "Compiles in one graph (backend aot_eager) to the same value and gradient.")


PROPERTIES = {
    "reductions": reductions,
    "batch size": batch_size,
    "sample order": sample_order,
    "no leak between samples": leaks,
    "weights": weights,
    "ignored targets": ignored_targets,
    "inputs untouched": inputs_untouched,
    "repeatable": repeatable,
    "grad_output": grad_output,
    "layouts": layouts,
    "empty batch": empty,
    "result dtype and device": result_type,
    "autocast": autocast,
    "vmap": vmap,
    "kept for backward": memory,
}
