"""Properties of the loss as a function in a program: reductions, samples, weights, tensors, autograd, compilers."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .calculus import _dtype, _line, ramp
from .report import Finding, failed, passed, skipped, warned
from .subject import NoGradientError, Subject, shapes, slope

Test = Callable[[Subject, Tensor, Tensor], Finding]
Property = Callable[[Subject], Finding]


def at_random(samples: int | None = None) -> Callable[[Test], Property]:
    """Make a property of a test: at a random input, and if that shows a fault at the smallest that does."""

    def with_test(test: Test) -> Property:
        return lambda s: s.judged(functools.partial(test, s), *s.sample(samples))

    return with_test


def _close(a: float, b: float, tolerance: float = 1e-5) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-8) or (math.isnan(a) and math.isnan(b))


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _same(value: float, want: float, grad: Tensor, want_grad: Tensor) -> bool:
    """The same value and gradient, but for the order of sums."""
    return _close(value, want) and not _off(grad, want_grad) > 1e-6 * float(want_grad.abs().max())


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) and out else out


def _is_root(none: Tensor, total: float) -> bool:
    return none.numel() > 1 and not _close(float(none.sum()), total) and _close(float(none.norm()), total)


def reductions(s: Subject) -> Finding:
    if "reduction" not in s.options:
        unused = "reduction" in s.unused
        return skipped(
            "The module's attribute 'reduction' has no effect once it is constructed."
            if unused
            else "The loss has no option 'reduction'."
        )
    for reduction in ("none", "sum", "mean"):
        e = s.refuses(reduction)
        if e is not None and s.refusal(e):
            return skipped(f"Not offered: reduction={reduction!r} ({_line(e)}).")
    prediction, target = s.sample()
    if s.ignore_index is not None and not target.is_floating_point():
        target = target.clone()
        target.view(-1)[0] = s.ignore_index
    return s.judged(functools.partial(_reductions_at, s), prediction, target)


def _reductions_at(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    with torch.no_grad():
        none = s.result(prediction, target, reduction="none").double()
    total, mean = (s.value(prediction, target, reduction=r) for r in ("sum", "mean"))
    parts = float(none.sum())
    numbers = {"sum_of_none": parts, "sum": total, "mean": mean}
    why = "A learning rate tuned with one reduction is wrong with another: divide by the number of samples that count."
    if _is_root(none, total):  # a norm, as RMSE's: its squares are what adds up
        if any(_close(total, mean * math.sqrt(d)) for d in (none.numel(), len(prediction))):
            return passed("A norm: the squares of 'none' add up to that of 'sum', 'mean' divides them.", **numbers)
        return failed(f"'sum' is the norm of 'none' ({total:.6g}), but 'mean' is {mean:.6g}.", why, **numbers)
    if none.dim() == 0 and _close(total, mean) and _close(total, parts):
        if isinstance(s.fn, torch.nn.Module):
            return skipped("The module's attribute 'reduction' has no effect once it is constructed.")
        return failed(f"It is ignored: 'none', 'sum' and 'mean' all return {mean:.6g}.", why, **numbers)
    if none.dim() and len(prediction) > 1:
        alone = s.result(prediction[-1:], target[-1:], reduction="none")
        if not alone.dim():
            return failed(
                f"'none' returns shape {list(none.shape)} for {len(prediction)} samples, but a scalar for one.",
                "The last batch of an epoch may hold one sample: name the dimension in squeeze(1).",
                **numbers,
            )
    if none.dim() and len(none) not in (len(prediction), target.numel(), prediction.numel()):
        return failed(
            f"'none' returns shape {list(none.shape)} for {len(prediction)} samples.",
            "One loss per sample (or element) is what 'none' is for: look for a sum over the wrong dim.",
            **numbers,
        )
    if not _close(parts, total):
        return failed(f"The elements of 'none' add up to {parts:.8g}, 'sum' says {total:.8g}.", why, **numbers)
    if none.dim() == 0:
        return warned(
            "'none' returns a scalar.",
            "Per-sample losses are what 'none' is for (weighting, hard-example mining).",
            **numbers,
        )
    counted = target != s.ignore_index if s.ignore_index is not None else torch.ones_like(target, dtype=torch.bool)
    divisors = {float(none.numel())}
    weight = s.options.get("weight")
    if isinstance(weight, Tensor) and s.task.classes and not target.is_floating_point():
        labels = target[counted]
        if weight.dim() == 1 and not bool(((labels < 0) | (labels >= len(weight))).any()):
            divisors.add(float(weight.double()[labels].sum()))
    elif isinstance(weight, Tensor):
        with contextlib.suppress(RuntimeError):  # of another form than the elements
            divisors.add(float(weight.double().broadcast_to(none.shape).sum()))
    if not counted.all():
        divisors = (divisors - {float(none.numel())}) | {float(counted.sum())}
        if 0 < none.dim() < target.dim() and len(none) == len(target):  # of samples or their regions, as Dice
            divisors.add(none.numel() * float(counted.flatten(1).any(1).double().mean()))
    if not any(_close(total, mean * d) for d in divisors):
        return failed(
            f"'mean' is 'sum' divided by {total / mean if mean else math.nan:.6g}; "
            f"{' or '.join(f'{d:g}' for d in sorted(divisors))} would make sense.",
            why,
            **numbers,
        )
    return passed(f"'none' adds up to 'sum'; 'mean' is that divided by {total / mean if mean else 1:g}.", **numbers)


COUPLED = "The samples of a batch are compared with each other, as you say (couples_samples)."
MEANT = " If samples are meant to be compared with each other, say couples_samples=True."


def batch_size(s: Subject) -> Finding:
    if s.couples_samples:
        return skipped(COUPLED)
    prediction, target = s.sample()
    found = s.judged(functools.partial(_twice, s), prediction, target)
    if found.bad:
        return found

    def single(p: Tensor, t: Tensor) -> Finding:
        why = (
            "The last batch of an epoch may hold one sample: squeeze() drops its dimension, a deviation over it is nan."
        )
        try:
            value = s.value(p, t)
        except Exception as e:
            return failed(f"A batch of one raises {type(e).__name__}: {_line(e)}", why + MEANT)
        return passed("") if math.isfinite(value) else failed(f"A batch of one costs {value}.", why)

    alone = s.judged(single, prediction[:1], target[:1])
    return alone if alone.bad else _in_parts(s, found)


def _in_parts(s: Subject, found: Finding) -> Finding:
    """If a batch costs the mean, or the sum, of its parts, so do a large one and one of a single column."""

    def test(mean: bool, size: int, prediction: Tensor, target: Tensor) -> Finding:
        pairs = list(zip(prediction.split(size), target.split(size), strict=True))
        whole = s.value(prediction, target)
        parts = sum(s.value(p, t) * (len(p) if mean else 1) for p, t in pairs) / (len(prediction) if mean else 1)
        if math.isfinite(parts) and _close(whole, parts):
            return passed("")
        return failed(
            f"A batch of {len(prediction)} ({shapes(prediction, target)}) costs {whole:.6g}, the "
            f"{'mean' if mean else 'sum'} over its parts is {parts:.6g}; smaller or wider ones agree.",
            "Look for (N) broadcast with (N, 1), squeeze(), or chunks of which the last, incomplete one is left out.",
            value=whole,
            expected=parts,
        )

    n = s.samples
    prediction, target = s.sample(2 * n)
    means = [m for m in (True, False) if not any(test(m, size, prediction, target).bad for size in (1, n))]
    if not means:
        return found  # neither a mean nor a sum over samples
    others = [(n, *s.sample(s.many(131)))]
    if not s.task.classes and prediction.dim() == target.dim() == 2 and prediction.shape[1] > 1:
        others.append((1, prediction[:, :1], target[:, :1]))
    for size, p, t in others:
        with contextlib.suppress(Exception):  # not made for it
            cut = s.judged(functools.partial(test, means[0], size), p, t)
            if cut.bad and math.isfinite(cut.numbers["expected"]):
                return cut
    return found


def _twice(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    once, twice = s.value(prediction, target), s.value(torch.cat([prediction] * 2), torch.cat([target] * 2))
    if not (math.isfinite(once) and once):
        return skipped(f"The batch costs {once:g}.")
    ratio = twice / once
    if any(_close(ratio, r) for r in (1.0, 2.0)):
        how = "a mean" if _close(ratio, 1.0) else "a sum"
        said = s.options.get("reduction")
        if said in ("mean", "sum") and said not in how:
            return failed(
                f"It says reduction={said!r}, but the same batch twice over costs {ratio:g} times {once:.6g}, as {how} "
                "does.",
                "A learning rate that suits one batch size does not suit another: reduce over samples (dim 0), and "
                "count them.",
                ratio=ratio,
            )
        cost = "the same" if _close(ratio, 1.0) else "twice as much"
        return passed(f"Behaves as {how} over samples: the batch twice over costs {cost}.", ratio=ratio)
    coupled = s.coupled
    return (warned if coupled or _close(ratio, math.sqrt(2)) else failed)(
        f"{once:.6g} for this batch, but {ratio:.6g} times as much for the same twice over, neither 1 (a mean) nor 2 "
        "(a sum).",
        "The loss depends on the batch size, and on which samples are together: the value of another batch size cannot "
        "be compared, and the learning rate that suits may change." + MEANT
        if coupled
        else "The loss, and so the learning rate that suits, depends on the batch size: divide by the number of "
        "samples." + MEANT,
        ratio=ratio,
    )


@at_random()
def sample_order(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    n = len(prediction)
    if s.couples_samples:
        return skipped(COUPLED)
    if n < 2:
        return skipped("One sample.")
    for order in (torch.randperm(n, generator=s.generator(3)), torch.arange(n).flip(0), torch.arange(n).roll(1)):
        with torch.no_grad():
            before, after = s.result(prediction, target).double(), s.result(prediction[order], target[order]).double()
        if before.dim() and len(before) == n:
            before = before[order]
        difference = _off(before, after)
        if not difference <= 1e-6 * max(float(before.abs().max()), 1e-6):
            return failed(
                f"The same samples in the order {order.tolist()} change the value by {difference:.4g}.",
                "Samples of a batch have no order: look for indices by position, cumulative sums, or rolled targets."
                + MEANT,
                difference=difference,
                order=order.tolist(),
            )
    return passed("Permuted samples give the same value.")


LEAK = (
    "A sample's loss then depends on its neighbours in the batch; look for a statistic over dim 0, a softmax over the "
    "wrong dim, or broadcasting (N) with (N, 1). Fine if it is meant (contrastive and batch-wise Dice losses): say "
    "couples_samples=True."
)


def leaks(s: Subject) -> Finding:
    if s.couples_samples:
        return skipped(COUPLED)
    prediction, target = s.sample()
    found = s.judged(functools.partial(_leaks_at, s), prediction, target)
    s.coupled = found.status == "warning"
    if found.bad:
        return found
    # A number of samples that no other dimension has.
    n = next(n for n in itertools.count(s.samples) if n not in prediction.shape[1:])
    met = s.judged(functools.partial(_all_meet_at, s), *s.sample(n))
    return met if met.bad else found


class _Pairs(TorchDispatchMode):
    """Notes operations that pair all samples with all, where broadcasting has put a dimension before the samples'."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, self.found = samples, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        shapes = [list(x.shape) for x in args if isinstance(x, Tensor)]
        square = isinstance(out, Tensor) and list(out.shape[:2]) == [self.samples] * 2
        if square and any(shape[:1] == [self.samples] and len(shape) < out.dim() for shape in shapes):
            self.found = self.found or f"{' and '.join(map(str, shapes))} are broadcast to {list(out.shape)}"
        return out


def _all_meet_at(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    if len(prediction) < 2:
        return skipped("One sample.")
    with _Pairs(len(prediction)) as pairs:
        s.value(prediction, target)
    return warned(f"Every sample meets every other: {pairs.found}.", LEAK) if pairs.found else passed("")


def _is_norm(s: Subject, prediction: Tensor, target: Tensor) -> bool:
    """The batch costs the root of a mean or sum of what its samples cost: a norm, whose slope they share."""
    whole = abs(s.value(prediction, target))
    singles = [abs(s.value(prediction[i : i + 1], target[i : i + 1])) for i in range(len(prediction))]
    return any(_close(whole**k, sum(x**k for x in singles) / n) for k in (2, 3, 4) for n in (1, len(singles)))


def _leaks_at(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    leaf = prediction.clone().requires_grad_()
    each = s.result(leaf, target, **s.reduced("none"))
    if each.dim() and len(each) == len(prediction):
        grad = slope(each[0].sum(), leaf)
        leaked = float(grad[1:].abs().max())
        if leaked > 1e-9 * max(float(grad.abs().max()), 1e-30):
            return failed(
                f"Sample 0's loss has a gradient of {leaked:.4g} with respect to another sample.", LEAK, gradient=leaked
            )
    # The gradients of the other samples may change by a common factor only (as under a root of the mean).
    before = s.gradient(prediction, target)[1:].reshape(-1)
    moved, far, other = prediction.clone(), prediction.clone(), target.clone()
    moved[0] += torch.randn(moved[0].shape, generator=s.generator(4)).double()
    far[0] += 10 * torch.randn(moved[0].shape, generator=s.generator(5)).double()
    different = [i for i in range(len(target)) if not torch.equal(target[i], target[0])]
    factors: list[float] = []
    other[0] = target[different[0] if different else 0]
    for what, p, t in (("prediction", moved, target), ("prediction", far, target), ("target", prediction, other)):
        after = s.gradient(p, t)[1:].reshape(-1)
        if bool(before.any()) != bool(after.any()):
            return warned(f"Another {what} for sample 0 decides whether the other samples have any gradient.", LEAK)
        norms = float(before.norm() * after.norm())
        apart = float((before / before.norm() - after / after.norm()).norm()) if norms > 0 else 0.0
        if apart > 1e-5:
            return warned(
                f"Another {what} for sample 0 turns the gradient of the other samples by {apart:.3g} rad.",
                LEAK,
                angle=apart,
            )
        # A mean may be weighted, so only another prediction must leave the gradient its length.
        if what == "prediction" and norms > 0:
            factors.append(float(after.norm() / before.norm()))
    factor = max(factors, key=lambda f: abs(math.log(f)), default=1.0)
    if abs(factor - 1) > 1e-4 and not _is_norm(s, prediction, target):
        return warned(
            f"Another prediction for sample 0 makes the gradient of the other samples {factor:.3g} times as long.",
            "The loss is a function of the batch's mean, or is divided by one: apply it to each sample's loss "
            "(reduction='none'), then take the mean. Fine if it is meant: say couples_samples=True.",
            factor=factor,
        )
    return passed("A sample's prediction and target do not touch the other samples' loss and gradient.")


def weights(s: Subject) -> Finding:
    forms = list(s.weight_forms())
    if not forms and "pos_weight" not in s.options:
        return skipped("The loss has no option 'weight' or 'sample_weight'.")
    checked: list[str] = []
    tried: dict[str, None] = {}
    prediction, target = s.sample(4 if not s.task.classes else 6)
    if "pos_weight" in s.options and not s.task.classes:
        forms.append(("pos_weight", "positive", lambda p, t: (p.shape[-1],)))
    for option, what, shape in forms:
        tried[option] = None
        if any(c.startswith(option + " ") for c in checked):
            continue
        found = s.judged(functools.partial(_weight_at, s, option, what, shape), prediction, target)
        if found.bad:
            return found
        if found.status == "pass":
            checked.append(f"{option} per {what}")
    if checked:
        return passed(f"Act linearly, ones change nothing, zeros give no gradient: {', '.join(checked)}.")
    return skipped(f"Of another form than per class, sample or element: {', '.join(tried)}.")


def _weight_at(
    s: Subject, option: str, what: str, shape: Callable[..., tuple[int, ...]], prediction: Tensor, target: Tensor
) -> Finding:
    """Whether one option weights what it should; skipped if the loss does not take it in this form."""
    w = ramp(*shape(prediction, target))
    v = 2.5 - w.flip(0) ** 2  # positive: a loss may refuse negative weights, or leave out what has weight 0
    bare: dict[str, Any] = {name: None for name, *_ in s.weight_forms()}
    why = "Weights are how rare classes and unreliable samples are balanced; multiply each loss before reducing."

    def call(weight: Tensor | None, **more: Any) -> float:
        return s.value(prediction, target, **{**bare, option: weight, **more})

    def fault(text: str, status: Callable[..., Finding] = failed, **numbers: Any) -> Finding:
        found = status(text, why, **numbers)
        found.example = {option: w.tolist()}
        return found

    try:
        plain, unit, weighted = call(None), call(torch.ones_like(w)), call(w)
    except Exception:
        return skipped("")
    if isinstance(s.fn, torch.nn.Module) and not s.constructs(option) and _close(unit, weighted, 1e-9):
        return skipped("")  # the attribute has no effect once it is constructed
    if not _close(plain, unit):
        return fault(f"{option} of all ones changes the value from {plain:.8g} to {unit:.8g}.", value=unit)
    # Where all samples have the same weight, a mean that divides by the weights does not show it.
    given = w[target[target >= 0]] if what == "class" else w
    seen = bool((target > 0.5).any()) if what == "positive" else len(given.unique()) > 1
    if seen and _close(unit, weighted, 1e-9):
        return fault(f"{option} is ignored: other weights than 1 give the same value {unit:.8g}.", value=unit)
    summed = s.reduced("sum")
    linear = bool(summed) or what == "positive"  # a mean may divide by the weights
    if linear and what == "positive":
        one, two, three = (call(torch.full_like(w, x), **summed) for x in (1.0, 2.0, 3.0))
        if not _close(three - two, two - one):
            return fault(f"{option} does not act linearly: {one:.8g}, {two:.8g}, {three:.8g} for 1, 2, 3.")
    elif linear:
        whole, *two_parts = (call(x, **summed) for x in (2 * w + 3 * v, w, v))
        root = normalised = False
        if s.reduced("none"):
            with torch.no_grad():
                none = s.result(prediction, target, **{**bare, "reduction": "none"}).double()
            root = _is_root(none, call(None, **summed))
            # Of regions, as in Dice, the weights may be shares.
            regions = none.numel() not in (target.numel(), prediction.numel())
            normalised = regions and _close(call(3 * w, **summed), two_parts[0])
        parts = (
            math.hypot(math.sqrt(2) * two_parts[0], math.sqrt(3) * two_parts[1])
            if root
            else 2 * two_parts[0] + 3 * two_parts[1]
        )
        if not _close(whole, parts) and not normalised:
            return fault(f"{option} does not act linearly: {whole:.8g} instead of {parts:.8g}.", value=whole)
    if what == "class" and labels_of(prediction, target) is None:
        return skipped("")
    ratio = call(3 * w) / weighted
    # Dice and cross entropy together: the first grows with the weights, the second divides by them.
    both = 1 < ratio < 3 and _close(call(3 * w) - call(2 * w), call(2 * w) - weighted)
    if what != "positive" and not both and not any(_close(ratio, r) for r in (1.0, 3.0, math.sqrt(3))):
        return fault(f"Three times the {option} costs {ratio:.6g} times (1 or 3 would make sense).", ratio=ratio)
    zeroed = w.clone()
    if what == "positive":
        zeroed[...] = 0
        off = target > 0.5
    else:
        zeroed[0] = 0
        off = torch.arange(len(target)) == 0
        if what == "class":
            labels = labels_of(prediction, target)
            assert labels is not None
            off = labels == 0
    grads = (s.gradient(prediction, target, **{**bare, option: x}) for x in (zeroed, torch.ones_like(w)))
    sizes = [
        (g.movedim(1, -1)[off] if what == "class" else g[0].reshape(-1)[:1] if what == "element" else g[off]).abs()
        for g in grads
    ]
    left, unit_size = (float(g.max()) if g.numel() else 0.0 for g in sizes)
    if what == "class" and _one_against_the_rest(s, option, bare, w, prediction, target):
        return passed("")
    # With label smoothing the other classes' weights leave a small part.
    small = what == "class" and left < 0.5 * unit_size
    if left > 1e-12 and not small and not _acts_on_its_own(s, option, what, bare, w, prediction, target):
        taken = f"the weight of another {what} is taken, or none"
        if what == "class":
            w[...] = 1
            w[prediction.movedim(1, -1)[off].argmax(-1)] = 0
            if not s.gradient(prediction, target, **{**bare, option: w}).movedim(1, -1)[off].any():
                taken = "the weight of the predicted class is taken"
        w = zeroed
        return fault(f"Where {option} is 0 the gradient is {left:.4g}: {taken}.")
    if what != "positive":
        problem = _weighted_mean(s, prediction, target, bare, option, what, w, call)
        if problem:
            # Without 'sum', smoothing over weighted classes cannot be told from a mistake.
            return fault(problem, failed if linear else warned)
    return passed("")


def labels_of(prediction: Tensor, target: Tensor) -> Tensor | None:
    """Class indices in the prediction's shape without its classes, also where the target has a dimension of 1 there."""
    shape = prediction.shape[:1] + prediction.shape[2:]
    same = target.shape == shape or target.shape == (*prediction.shape[:1], 1, *prediction.shape[2:])
    return target.reshape(shape) if same else None


def _one_against_the_rest(
    s: Subject, option: str, bare: dict[str, Any], w: Tensor, prediction: Tensor, target: Tensor
) -> bool:
    """A class's weight acts on the column of that class alone."""
    zeroed = w.clone()
    zeroed[0] = 0
    grads = [s.gradient(prediction, target, **{**bare, option: x})[:, 0] for x in (zeroed, torch.ones_like(w))]
    return not grads[0].any() and bool(grads[1].any())


def _acts_on_its_own(
    s: Subject, option: str, what: str, bare: dict[str, Any], w: Tensor, prediction: Tensor, target: Tensor
) -> bool:
    """Where a weight of 0 leaves a gradient: whether it is still the weight of what it should be.

    Label smoothing and regions let the weights of the other classes act on a sample, too. Then it is its own class's
    that matters most.
    """

    def grad(weight: Tensor, at: Tensor = prediction) -> Tensor:
        return s.gradient(at, target, **{**bare, option: weight})

    if what == "positive":
        at = torch.zeros_like(prediction)
        change = (grad(torch.ones_like(w), at) - grad(torch.zeros_like(w), at)).abs()
        positive = target > 0.5
        rest = float(change[~positive].max()) if bool((~positive).any()) else 0.0
        return bool(positive.any()) and float(change[positive].min()) > rest
    if what != "class":
        return False
    labels = labels_of(prediction, target)
    assert labels is not None

    def without(c: int) -> Tensor:
        zeroed = w.clone()
        zeroed[c] = 0
        return grad(zeroed).movedim(1, -1)

    own, off = without(0), labels == 0
    left, *others = (float(g[off].abs().sum()) for g in (own, *(without(c) for c in range(1, len(w)))))
    return left < 0.999 * min(others) or _weighs_a_region(s, option, bare, w, prediction, target, labels)


def _weighs_a_region(
    s: Subject, option: str, bare: dict[str, Any], w: Tensor, prediction: Tensor, target: Tensor, labels: Tensor
) -> bool:
    """Of a loss of regions (Lovasz-softmax): whether a class's weight is that of its region, which the other classes
    share places with. It is where the places of a sample depend on each other, and it counts for a class that has
    places and is predicted nowhere, which a weight of predicted classes does not."""
    if prediction.dim() < 3:
        return False
    elsewhere = prediction.clone()
    elsewhere.view(*prediction.shape[:2], -1)[:, :, 1:] = prediction.reshape(*prediction.shape[:2], -1)[:, :, 1:].flip(
        1
    )
    first, other = (
        s.gradient(p, target, **bare).reshape(*prediction.shape[:2], -1)[..., 0] for p in (prediction, elsewhere)
    )
    if _close(float((first - other).abs().max()) + 1, 1.0, 1e-9):
        return False
    nowhere, zeroed = prediction.clone(), w.clone()
    nowhere[:, 0] = prediction.min() - 3
    zeroed[0] = 0
    values = [s.value(nowhere, target, **{**bare, option: x}) for x in (w, zeroed)]
    return bool((labels == 0).any()) and not _close(*values)


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
            return f"Sum with this {option}: {total:.8g} is not the sum of weight times loss."
    divisors = [float(each.numel()), float(factor.sum()), float(prediction.numel())]
    if what == "sample" and not s.task.classes:
        # A prediction may hold two numbers for each of the target's, a mean and a variance.
        divisors += [divisors[1] * t[0].numel() for t in (prediction, target)]
    allowed = {total / d for d in divisors}
    if any(_close(found, a) for a in allowed):
        return ""
    return (
        f"Mean with this {option}: {found:.8g}, where sum(w * loss) / sum(w) or / N would be "
        f"{' or '.join(f'{a:.8g}' for a in sorted(allowed))}."
    )


def ignored_targets(s: Subject) -> Finding:
    if s.ignore_index is None or not s.task.classes:
        return skipped("The loss has no option 'ignore_index'.")
    prediction, target = s.sample()
    if target.is_floating_point():
        return skipped("Targets are probabilities.")
    if labels_of(prediction, target) is None:
        return skipped("Targets have another shape than one class index for each row of logits.")
    ignored, classes = s.ignore_index, prediction.shape[1]
    if 0 <= ignored < classes:
        target = torch.where(target == ignored, (ignored + 1) % classes, target)
    some = target.clone()
    some[::2] = ignored
    why = "Padding then trains the model, or changes the weight of what is not padding."

    def carried(p: Tensor, t: Tensor) -> Finding:
        out, kept = labels_of(p, t == ignored), (t != ignored).reshape(len(t), -1).any(1)
        assert out is not None
        if not kept.any():
            return passed("")  # a case of its own
        left = s.gradient(p, t).movedim(1, -1)[out]
        size = float(left.abs().max()) if left.numel() else 0.0
        if size:
            return failed(f"Ignored targets carry a gradient of {size:.4g}.", why, gradient=size)
        found, want = s.value(p, t), s.value(p[kept], t[kept])
        if not _close(found, want):
            return failed(
                f"With ignored samples the value is {found:.8g}, without those samples {want:.8g}.",
                why + " Divide by the number of targets that count.",
                value=found,
                expected=want,
            )
        return passed("")

    def reached(p: Tensor, t: Tensor) -> Finding:
        if float(s.gradient(p, t).reshape(len(t), -1).abs().amax(1).min()) > 0:
            return passed("")
        return warned(
            "A sample that is not ignored has no gradient.",
            "A class may be ignored by mistake (compare target == ignore_index, not <= or !=).",
        )

    def alone(p: Tensor, t: Tensor) -> Finding:
        try:
            value, grad = s.value_and_gradient(p, torch.full_like(t, ignored))
        except NoGradientError:
            return failed(
                "A batch in which everything is ignored returns a number without a gradient: backward() raises.",
                "One such batch stops training: return prediction.sum() * 0, or divide by max(count, 1). "
                "fastloss.cross_entropy(..., all_ignored='zero') does.",
            )
        if math.isfinite(value) and bool(grad.isfinite().all()):
            return passed("No value, count or gradient from ignored targets; an all-ignored batch is finite.")
        return warned(
            f"A batch in which everything is ignored has value {value:.4g}, gradient "
            f"{'finite' if grad.isfinite().all() else 'not finite'}.",
            "0/0, as in torch: one such batch makes every parameter nan if the gradient is nan; skip it or divide by "
            "max(count, 1), as fastloss.cross_entropy(..., all_ignored='zero') does.",
            value=value,
        )

    found = passed("")
    for test, t in ((carried, some), (reached, target), (alone, torch.full_like(target, ignored))):
        found = s.judged(test, prediction, t)
        if found.bad:
            break
    return found


@at_random()
def inputs_untouched(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    why = (
        "Whoever uses the tensor afterwards (metrics, a second loss) gets other numbers: avoid op_() and out= on "
        "arguments."
    )
    module = s.fn if isinstance(s.fn, torch.nn.Module) else torch.nn.Module()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    for scale, grad in itertools.product((1.0, 10.0), (True, False)):
        given = s.linked(scale * prediction)
        leaf = given.clone().requires_grad_(grad)
        p, t = leaf.clone(), target.clone()
        versions = p._version, t._version
        with torch.set_grad_enabled(grad):
            out = _first(s.call(p, t))
            if grad and isinstance(out, Tensor) and out.requires_grad:
                torch.autograd.grad(out.sum(), leaf, allow_unused=True)
        for what, now, then, old in (("prediction", p, given, versions[0]), ("target", t, target, versions[1])):
            # Where nan stays nan nothing is overwritten: it may mark what is missing.
            if not torch.allclose(now.detach(), then, 0, 0, equal_nan=True) or now._version != old:
                return failed(
                    f"The {what} is overwritten by the call{'' if grad else ' (without gradient)'}.",
                    why,
                    largest_change=float((now.detach() - then).abs().nan_to_num().max()),
                )
    for what, then in state.items():
        if not torch.equal(module.state_dict()[what].nan_to_num(), then.nan_to_num()):
            return warned(f"The module's own {what} is overwritten by the call.", why)
    return passed("Prediction and target are the same after forward and backward.")


@at_random()
def repeatable(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    p = prediction.float()
    if _unwritten(s, p, target):
        return failed("The value is made of memory that was never written.", UNWRITTEN)
    first, grad = s.result(p, target).detach(), s.gradient(p, target)
    for _ in range(s.some(4, 2)):
        again, other = s.result(p, target).detach(), s.gradient(p, target)
        for what, a, b in (("value", first, again), ("gradient", grad, other)):
            if not torch.equal(a.nan_to_num(), b.nan_to_num()):
                return failed(
                    f"Called again with the same input the {what} differs by {_off(a, b):.4g}.",
                    "State or randomness in a loss makes runs incomparable: look for counters, running means, dropout.",
                    difference=_off(a, b),
                )
    return passed("Further calls give the same value and gradient, bit for bit.")


@at_random()
def grad_output(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    leaf = prediction.clone().requires_grad_()
    out = s.result(leaf, target)
    why = "Loss scaling, weighted sums of losses and gradient accumulation multiply it: backward must too."
    unit, again = (slope(out, leaf, torch.ones_like(out), retain_graph=True) for _ in (0, 1))
    if not torch.equal(unit.nan_to_num(), again.nan_to_num()):
        return failed(
            "A second backward through the same graph (retain_graph) gives another gradient.",
            "Backward overwrites what it saved: work on a copy.",
            difference=_off(unit, again),
        )
    for factor in (3.0, -2.0, 0.0):
        scaled = slope(out, leaf, factor * torch.ones_like(out), retain_graph=True)
        error = _off(scaled, factor * unit)
        if not error <= 2e-3 * max(float(unit.abs().max()), 1e-30):  # it may compute in half precision
            return failed(
                f"With grad_output {factor:g} the gradient is off by {error:.4g} (of {unit.abs().max():.4g}).",
                why,
                grad_output=factor,
                error=error,
            )
    each = s.result(leaf, target, **s.reduced("none"))
    if each.dim():
        g, h = (torch.randn(each.shape, generator=s.generator(i)).double() for i in (8, 9))
        a, b, both = (slope(each, leaf, x.to(each.dtype), retain_graph=True) for x in (g, h, g + h))
        if _off(a + b, both) > 2e-3 * max(float(both.abs().max()), 1e-30):
            return failed("Backward is not linear in grad_output of reduction 'none'.", why)
    return passed("Gradients scale with grad_output; backward can be repeated with retain_graph.")


@at_random()
def layouts(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    want, want_grad = s.value_and_gradient(prediction, target)

    def strided(x: Tensor) -> Tensor:  # no two dimensions of which can be viewed as one
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]

    def transposed(x: Tensor) -> Tensor:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)

    def channels_last(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    views = [("strided", strided), ("transposed", transposed)]
    if prediction.dim() > 2:
        views.append(("channels-last", lambda x: channels_last(x) if x.dim() == prediction.dim() else x))
    for what, view in views:
        leaf = view(prediction).detach().requires_grad_()
        try:
            # Not through result(), whose copies may be contiguous.
            out = _first(s.raw(leaf * torch.ones_like(leaf) if what == "transposed" else leaf, view(target)))
            if not isinstance(out, Tensor):
                raise NoGradientError
            grad = slope(out.sum(), leaf)
        except NoGradientError:
            raise
        except Exception as e:
            return failed(
                f"Raises for {what} inputs: {type(e).__name__}: {_line(e)}",
                "Slices and transposes are common: use reshape() instead of view(), strides in kernels.",
            )
        value = float(out.detach().sum())
        if not _same(value, want, grad, want_grad):
            return failed(
                f"For {what} inputs of the same numbers "
                + (
                    f"the gradient differs by {_off(grad, want_grad):.4g}."
                    if _close(value, want)
                    else f"the value is {value:.8g} instead of {want:.8g}."
                ),
                "Memory is read in the wrong order: respect strides, or call contiguous().",
                value=value,
                expected=want,
            )
    return passed("Strided and transposed inputs give the same value and gradient.")


def empty(s: Subject) -> Finding:
    prediction, target = s.sample(2)
    return s.judged(functools.partial(_empty_at, s), prediction[:0], target[:0])


@contextlib.contextmanager
def _filled() -> Iterator[None]:
    """Memory that is made and not written holds nan."""
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    fill = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        options.fill_uninitialized_memory = fill


def _unwritten(s: Subject, prediction: Tensor, target: Tensor) -> bool:
    """The value is made of memory that nobody has written: it becomes nan where such memory is filled with that."""
    if math.isnan(s.value(prediction, target)):
        return False
    with _filled():
        return math.isnan(s.value(prediction, target))


UNWRITTEN = "Such a number is anything, and another one tomorrow: write every element, or use zeros() for empty()."


def _empty_at(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    why = "The last batch of a filtered data set may be empty; torch's losses return 0 or nan."
    given = f"No sample ({shapes(prediction, target)})"
    try:
        value, grad = s.value_and_gradient(prediction, target)
    except NoGradientError:
        if s.differentiable:
            return warned(f"{given}: the result has no gradient, backward() raises.", why)
        raise
    except Exception as e:
        return warned(f"{given} raises {type(e).__name__}: {_line(e)}", why)
    if _unwritten(s, prediction, target):
        return failed(f"{given}: the value {value:.4g} is read from memory that was never written.", UNWRITTEN)
    if value != 0 and not math.isnan(value):
        return warned(f"{given}: the value is {value:.4g}.", why, value=value)
    return passed(f"No samples: value {value:g}, gradient of shape {list(grad.shape)}.", value=value)


class _MadeOnCpu(TorchDispatchMode):
    """Notes tensors that are made on the CPU, whatever the inputs' device is."""

    found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        new = "lift_fresh" in str(func) or not any(isinstance(x, Tensor) for x in args)
        if isinstance(out, Tensor) and out.dim() and out.device.type == "cpu" and new:
            self.found = f"{str(func).split('.')[1]} of shape {list(out.shape)}"
        return out


@at_random()
def result_type(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    found, several = {}, ""
    for dtype in (torch.float32, torch.float64):
        t = target.to(dtype) if target.is_floating_point() else target
        out = s.raw(prediction.to(dtype), t)
        if isinstance(out, (tuple, list)) and out:
            several = f"The result is a {type(out).__name__} of {len(out)}; its first element is examined."
            out = out[0]
        if not isinstance(out, Tensor):
            return failed(
                f"The result is a {type(out).__name__}, not a tensor.",
                "There is nothing to call backward() on: leave out .item(), float() and numpy.",
            )
        found[_dtype(dtype)] = _dtype(out.dtype)
        if out.dtype != dtype or out.device != prediction.device:
            return (failed if not out.is_floating_point() or dtype == torch.float64 else warned)(
                f"For {_dtype(dtype)} predictions the result is {_dtype(out.dtype)} on {out.device}.",
                "A fixed dtype inside (.float(), torch.tensor(0.0), numpy) loses digits or doubles memory: make "
                "constants with new_tensor or like the prediction.",
                result=found,
            )
    with _MadeOnCpu() as made:
        try:
            p, t = (x.float() if x.is_floating_point() else x for x in (prediction, target))
            # A copy, which may keep what it has made.
            s.raw(p.to("meta"), t.to("meta"), fn=copy.deepcopy(s.fn) if isinstance(s.fn, torch.nn.Module) else s.fn)
        except Exception as e:
            if made.found and "not on the expected device meta" in str(e):
                return failed(
                    f"It makes a tensor on the CPU ({made.found}) and meets it with the inputs: on a GPU it raises.",
                    "Make constants with new_tensor, zeros_like or device=prediction.device; a module's as buffers.",
                )
    if torch.cuda.is_available():
        t = target.cuda()
        out = _first(s.raw(prediction.float().cuda(), t.float() if t.is_floating_point() else t))
        if out.device.type != "cuda":
            return failed(
                f"For predictions on CUDA the result is on {out.device}.", "Make constants on the prediction's device."
            )
    if several:
        return warned(several, "Training loops call backward() on the loss itself: return one tensor.")
    shape = "a scalar" if not out.dim() else f"of shape {list(out.shape)} (backward() needs .mean() or .sum() of it)"
    devices = "cpu and cuda" if torch.cuda.is_available() else "cpu (no GPU here)"
    return passed(f"As the prediction's: float32 and float64, on {devices}; {shape}.", **found)


@at_random()
def autocast(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    p = prediction.float()
    want, want_grad = s.value_and_gradient(p, target)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = s.value_and_gradient(p, target)
    error = abs(value - want) / max(abs(want), 1e-30)
    slope_error = _off(grad, want_grad) / max(float(want_grad.abs().max()), 1e-6 * max(abs(want), 1.0))
    if not (max(error, slope_error) < 1e-3 and grad.isfinite().all() and grad.dtype == p.dtype):
        return (warned if math.isfinite(value) else failed)(
            f"Under autocast (bfloat16) the value is {value:.6g} instead of {want:.6g} ({100 * error:.2g} % off, "
            f"the gradient {100 * slope_error:.2g} %).",
            "Mixed precision lowers matrix products and convolutions inside the loss: call .float() there.",
            value=value,
            expected=want,
        )
    return passed(f"Right under autocast to bfloat16 (relative difference {error:.1e}).", error=error)


def vmap(s: Subject) -> Finding:
    return s.judged(functools.partial(_vmap_at, s), *s.sample(2 * s.samples))


def _vmap_at(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    if len(prediction) % 2:
        return skipped("The samples do not make two batches.")
    predictions, targets = (x.unflatten(0, (2, -1)) for x in (prediction, target))
    want = torch.tensor([s.value(p, t) for p, t in zip(predictions, targets, strict=True)], dtype=torch.float64)

    try:
        values = torch.func.vmap(lambda p, t: _first(s.raw(p, t)).sum())(predictions, targets)
    except Exception as e:
        found = warned(
            f"torch.func.vmap over two batches raises {type(e).__name__}: {_line(e)}",
            "Per-sample gradients (torch.func) are out of reach: avoid .item(), if on values, boolean masks and "
            "in-place writes.",
        )
    else:
        error = _off(values.double(), want)
        if error <= 1e-6 * float(want.abs().max()):
            return passed("The same under torch.func.vmap.")
        found = failed(
            f"Under vmap over two batches the value is off by {error:.4g}.",
            "Per-sample losses (torch.func) are wrong: look for dimensions counted from the front, and state.",
            error=error,
        )
    found.example = {
        "prediction": torch.stack([s.linked(p) for p in predictions]).tolist(),
        "target": targets.tolist(),
    }
    return found


class _Saved:
    """What the graph holds of a saved tensor; gone with the graph, of which it must not hold anything itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@at_random(128)
def memory(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
    leaf = prediction.float().requires_grad_()
    base, target = leaf.clone(), target.float() if target.is_floating_point() else target
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(x: Tensor) -> _Saved:
        saved.add(holder := _Saved(x))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        out = _first(s.raw(base, target))
    if not (isinstance(out, Tensor) and out.requires_grad):
        raise NoGradientError
    # What has been saved for a result that was dropped is not kept.
    storages = {x.data_ptr(): x.nbytes() for x in (holder.tensor.untyped_storage() for holder in saved)}
    own = {x.untyped_storage().data_ptr() for x in (base, leaf, target)}
    kept = sum(size for pointer, size in storages.items() if pointer not in own)
    size = base.untyped_storage().nbytes()
    multiple = kept / size
    text = (
        f"{multiple:.2g} times the prediction's bytes, beside the inputs: {kept} for {size} ({shapes(base, target)})."
    )
    if multiple <= 16:
        return passed(text, multiple=multiple, kept=kept)
    found = warned(
        text,
        "Memory limits the batch: combine steps in one autograd.Function, or use a fused loss.",
        multiple=multiple,
        kept=kept,
    )
    found.example = {
        "prediction": f"float32 {list(base.shape)}",
        "target": f"{_dtype(target.dtype)} {list(target.shape)}",
    }
    return found


def compiles(backend: str) -> Property:
    """Under torch.compile with this backend: ``aot_eager`` traces but generates no code, ``inductor`` does."""

    @at_random()
    def with_backend(s: Subject, prediction: Tensor, target: Tensor) -> Finding:
        want, want_grad = s.value_and_gradient(prediction, target)
        leaf = prediction.clone().requires_grad_()

        def call(p: Tensor, t: Tensor) -> Any:
            return _first(s.raw(p, t))

        # Another code object for each loss, since one may be compiled only so often in a process.
        fresh = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
        try:
            out = torch.compile(fresh, backend=backend, fullgraph=True)(leaf, target)
            grad = slope(out.sum(), leaf)
        except Exception as e:
            return warned(
                f"Does not compile in one graph: {type(e).__name__}: {_line(e)}",
                "The graph breaks at the loss: avoid .item(), printing, numpy and branches on values.",
            )
        value = float(out.detach().sum())
        if not _same(value, want, grad, want_grad):
            return failed(
                f"Compiled, the value is {value:.8g} instead of {want:.8g}, or the gradient differs.",
                "Look for state and side effects that tracing does not see.",
                value=value,
                expected=want,
            )
        how = "" if backend == "inductor" else "; traced, no code generated (compile='inductor' does)"
        return passed(f"One graph with the same value and gradient (backend {backend}{how}).")

    return with_backend


def as_reference(s: Subject) -> Finding:
    """The same value, gradient, dtype and reductions as another implementation."""
    if s.reference is None:
        return skipped("No reference= to compare with.")
    compared: list[str] = []
    first_refusal = ""
    cases: list[tuple[str, Tensor, Tensor, dict[str, Any]]] = [(f"at {w} points", p, t, {}) for w, p, t in s.points()]
    prediction, target = s.sample()
    if "reduction" in s.options:
        cases += [(f"with reduction={r!r}", prediction, target, {"reduction": r}) for r in ("none", "sum", "mean")]
    if s.ignore_index is not None and not target.is_floating_point():
        some = target.clone()
        some.view(-1)[::2] = s.ignore_index
        cases.append(("with ignored targets", prediction, some, {}))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t = target.to(dtype) if target.is_floating_point() else target
        cases.append((f"in {_dtype(dtype)}", prediction.to(dtype), t, {}))
    for where, prediction, target, options in cases:
        try:
            s.result(prediction, target, fn=s.reference, **options)
        except Exception as e:
            first_refusal = first_refusal or f" Not compared {where}: the reference raises {_line(e)}"
            continue
        found = s.judged(functools.partial(_as_reference_at, s, where, options), prediction, target)
        if found.bad:
            return found
        compared.append(where)
    if not compared:
        return failed(f"Nothing could be compared.{first_refusal}", "The reference has to take the same inputs.")
    return passed(f"Value, gradient, shape and dtype are the reference's {', '.join(compared)}.{first_refusal}")


def _as_reference_at(s: Subject, where: str, options: dict[str, Any], prediction: Tensor, target: Tensor) -> Finding:
    why = "A loss that is to replace another must cost and pull the same: look at the example in both."
    leaf = prediction.clone().requires_grad_()
    try:
        own, want = (s.result(leaf, target, fn=fn, **options) for fn in (s.fn, s.reference))
    except NoGradientError:
        raise
    if own.shape != want.shape or own.dtype != want.dtype:
        form = [f"{_dtype(x.dtype)} {list(x.shape)}" for x in (own, want)]
        return failed(f"{where.capitalize()} the result is {form[0]}, the reference's {form[1]}.", why)
    # Half of the digits that the dtype has; in half precision what two roundings in a row may cost.
    eps = max(torch.finfo(x.dtype).eps for x in (own, prediction))
    if s.rounds_to is not None:
        eps = max(eps, torch.finfo(s.rounds_to).eps)
    tolerance = max(8 * eps, math.sqrt(eps) * 1e-2) if eps > 1e-5 else math.sqrt(eps) * (0.1 if eps > 1e-10 else 1)
    pairs: list[tuple[str, Tensor, Tensor]] = [("value", own.detach().double(), want.detach().double())]
    if own.requires_grad or want.requires_grad:
        pairs.append(("gradient", slope(own.sum(), leaf).double(), slope(want.sum(), leaf).double()))
    for what, a, b in pairs:
        ordinary = s.level if what == "value" else s.steepness  # next to nothing may be rounding
        level = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
        level = max(level, 1e-6 * ordinary if math.isfinite(ordinary) else 0.0, 1e-30)
        if (
            bool((a.isfinite() != b.isfinite()).any())
            or not _off(*(x.nan_to_num(0, 0, 0) for x in (a, b))) <= tolerance * level
        ):
            entry = int((a - b).abs().nan_to_num(math.inf).argmax())
            here, there = float(a.reshape(-1)[entry]), float(b.reshape(-1)[entry])
            return failed(
                f"{where.capitalize()} the {what} is {here:.8g}, the reference's {there:.8g}.",
                why,
                own=here,
                reference=there,
            )
    return passed("")


PROPERTIES: dict[str, Property] = {
    "same as reference": as_reference,
    "repeatable": repeatable,
    "reductions": reductions,
    "no leak between samples": leaks,
    "batch size": batch_size,
    "sample order": sample_order,
    "weights": weights,
    "ignored targets": ignored_targets,
    "inputs untouched": inputs_untouched,
    "grad_output": grad_output,
    "layouts": layouts,
    "empty batch": empty,
    "result dtype and device": result_type,
    "autocast": autocast,
    "vmap": vmap,
    "kept for backward": memory,
}
