"""Dice loss and its family: references and samples."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..losses.dice_ce_loss import dice_ce_loss
from ..losses.dice_loss import dice_loss
from ..losses.focal_tversky_loss import focal_tversky_loss
from ..losses.tversky_loss import tversky_loss
from ._spec import LossSpec, Maker, Sample

Score = Callable[[Tensor, Tensor, Tensor], Tensor]  # a class's loss, from sum p t, sum p, sum t


def _reference(
    score: Score,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str | None = "softmax",
    ignore_index: int = -100,
    batch: bool = False,
    squared: bool = False,
    include_background: bool = True,
    skip_absent: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """A loss of the family in float64, from its definition: pixels as rows, one-hot, class by class."""
    x = input.double().movedim(1, -1).flatten(1, -2) if input.dim() > 2 else input.double().unsqueeze(1)
    samples, pixels, classes = x.shape
    if target.is_floating_point():
        t = target.double().movedim(1, -1).reshape(samples, pixels, classes)
        counts = torch.ones(samples, pixels, dtype=torch.bool, device=x.device)
    else:
        index = target.to(torch.int64).reshape(samples, pixels)
        counts = index != ignore_index
        t = torch.nn.functional.one_hot(torch.where(counts, index, 0), classes).double()
    if activation == "softmax":
        p = x.log_softmax(-1).exp()
    else:
        p = x if activation is None else torch.nn.functional.logsigmoid(x).exp()
    losses, ignored = [], []
    for some in counts.flatten().unsqueeze(0) if batch else torch.eye(samples, device=x.device).bool():
        rows = some if batch else (some.unsqueeze(1) & counts).flatten()
        p_rows, t_rows = p.flatten(0, 1)[rows], t.flatten(0, 1)[rows]
        power = 2 if squared else 1
        loss = score((p_rows * t_rows).sum(0), (p_rows**power).sum(0), (t_rows**power).sum(0))
        ignored.append(pixels > 0 and not rows.any())
        losses.append(torch.where(t_rows.sum(0) == 0, 0.0, loss) if skip_absent else loss)
    nothing = (p.sum() * 0.0).expand(classes)  # with a gradient, of 0
    loss = torch.stack([nothing if none else one for one, none in zip(losses, ignored, strict=True)])
    if weight is not None:
        loss = loss * weight.double()
    if not include_background:
        loss = loss[..., 1:]
    if reduction == "none":
        return loss[0] if batch else loss
    if reduction == "sum" or all(ignored):
        return loss.sum()
    return loss[~torch.tensor(ignored, device=x.device)].mean()


def reference(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5,
    **options: Any,
) -> Tensor:  # fmt: skip
    """:func:`fastloss.dice_loss`."""
    return _reference(lambda i, p, t: 1 - (2 * i + smooth_nr) / (p + t + smooth_dr), input, target, weight, **options)


def tversky_reference(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, alpha: float = 0.5, beta: float = 0.5,
    gamma: float = 1.0, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5, **options: Any,
) -> Tensor:  # fmt: skip
    """:func:`fastloss.tversky_loss` and, with gamma, :func:`fastloss.focal_tversky_loss`."""

    def score(i: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return (1 - (i + smooth_nr) / (i + alpha * (p - i) + beta * (t - i) + smooth_dr)) ** gamma

    return _reference(score, input, target, weight, **options)


def focal_tversky_reference(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """:func:`fastloss.focal_tversky_loss`, with its defaults."""
    return tversky_reference(input, target, weight, **{"alpha": 0.3, "beta": 0.7, "gamma": 0.75, **options})


def dice_ce_reference(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, lambda_dice: float = 1.0, lambda_ce: float = 1.0,
    label_smoothing: float = 0.0, ignore_index: int = -100, reduction: str = "mean", **options: Any,
) -> Tensor:  # fmt: skip
    """:func:`fastloss.dice_ce_loss`: dice's reference, and torch's cross entropy of float64."""
    dice = reference(input, target, weight, ignore_index=ignore_index, reduction=reduction, **options)
    if target.dim() == input.dim() and not target.is_floating_point():
        target = target.squeeze(1)
    nll = torch.nn.functional.cross_entropy(
        input.double(),
        target.double() if target.is_floating_point() else target.to(torch.int64),
        None if weight is None else weight.double(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return lambda_dice * dice + lambda_ce * nll


def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every shape and every option, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)

    def call(name: str, input: Tensor, target: Tensor, **options: Any) -> Sample:
        return Sample(name, (input, target), options)

    def pair(**ignored: int) -> tuple[Tensor, Tensor]:
        return make.normal(2, 3, 2, 4), make.classes(3, 2, 2, 4, **ignored)

    for reduction in ("mean", "sum", "none"):
        for batch in (False, True):
            options: dict[str, Any] = {"reduction": reduction, "batch": batch}
            yield call(f"softmax, {options}", *pair(ignore_every=5), weight=make.positive(3), **options)
    yield call("sigmoid", *pair(ignore_every=5), activation="sigmoid")
    yield call("probabilities", make.probabilities(2, 3, 2, 4, requires_grad=True), pair()[1], activation=None)
    for activation in ("softmax", "sigmoid", None):
        of = make.probabilities if activation is None else make.normal
        t = make.classes(3, 2, 5, ignore_every=4)
        yield call(f"squared, {activation}", of(2, 3, 5, requires_grad=True), t, activation=activation, squared=True)
        x, t = of(2, 3, 5, requires_grad=True), make.probabilities(2, 3, 5, requires_grad=True)
        yield call(f"floating target, {activation}", x, t, activation=activation)
        x, t = of(2, 3, 5, requires_grad=True), make.probabilities(2, 3, 5, requires_grad=True)
        yield call(f"floating target, squared, {activation}", x, t, activation=activation, squared=True, batch=True)
    yield call("one class", make.normal(2, 1, 6), make.probabilities(2, 1, 6) * 0 + 1, activation="sigmoid")
    yield call("smooth", *pair(), smooth_nr=0.5, smooth_dr=2.0)
    yield call("no background", *pair(), include_background=False, reduction="none")
    yield call("no background, weight", *pair(), include_background=False, weight=make.positive(3))
    absent = make.classes(2, 2, 2, 4)
    yield call("skip_absent", make.normal(2, 3, 2, 4), absent, skip_absent=True, smooth_nr=0.0, smooth_dr=0.0)
    yield call("ignore_index 1", *pair(), ignore_index=1)
    yield call("rows", make.normal(5, 4), make.classes(4, 5), batch=True)
    yield call("rows, each a sample", make.normal(5, 4), make.classes(4, 5))
    yield call("3 spatial dimensions", make.normal(2, 3, 2, 1, 2), make.classes(3, 2, 2, 1, 2))
    yield call("a dimension of 1 in the target", make.normal(2, 3, 4), make.classes(3, 2, 1, 4))
    channels_last = make.normal(2, 3, 4, 2).detach().contiguous(memory_format=torch.channels_last)
    yield call("channels last", channels_last.requires_grad_(), make.classes(3, 2, 4, 2))
    ignored = make.classes(3, 2, 2, 4)
    ignored[1] = -100
    yield call("an ignored sample", make.normal(2, 3, 2, 4), ignored)


def fewest_bytes(sample: Sample, gradient: bool) -> tuple[int, int]:
    """Input and target read, gradients written. (Backward reads again what the caches have lost since forward.)"""
    input, target = sample.args[:2]
    written = input.nbytes + (target.nbytes if target.requires_grad else 0)
    return input.nbytes + target.nbytes, written if gradient else 0


def tversky_samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """What differs from dice: the parameters, with each kind of target and activation."""
    make = Maker(device, dtype)
    x, t = make.normal(2, 3, 2, 4), make.classes(3, 2, 2, 4, ignore_every=5)
    yield Sample("plain", (x, t), {})
    options: dict[str, Any] = {"alpha": 0.2, "beta": 0.7, "reduction": "none", "smooth_nr": 0.0}
    x, t, options["weight"] = make.normal(2, 3, 5), make.classes(3, 2, 5), make.positive(3)
    yield Sample("softmax, none", (x, t), options)
    options = {"alpha": 1.0, "beta": 2.0, "activation": "sigmoid", "batch": True}
    yield Sample("sigmoid", (make.normal(2, 3, 5), make.probabilities(2, 3, 5, requires_grad=True)), options)
    options = {"activation": None, "include_background": False, "skip_absent": True, "smooth_dr": 0.5}
    yield Sample("probabilities", (make.probabilities(2, 3, 5, requires_grad=True), make.classes(2, 2, 5)), options)


def focal_tversky_samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Those of Tversky's, with exponents below and above 1."""
    for i, sample in enumerate(tversky_samples(device, dtype)):
        yield Sample(sample.name, sample.args, {**sample.kwargs, "gamma": 2.0} if i % 2 else sample.kwargs)


def dice_ce_samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """What differs from dice: the factors, smoothing, weights in both; probabilities, whose path is another."""
    make = Maker(device, dtype)
    x, t = make.normal(2, 3, 2, 4), make.classes(3, 2, 2, 4, ignore_every=5)
    yield Sample("plain", (x, t), {})
    options: dict[str, Any] = {"lambda_dice": 0.5, "lambda_ce": 2.0, "reduction": "sum", "squared": True}
    yield Sample("factors, sum", (make.normal(2, 3, 5), t[:, 0, :1].repeat(1, 5)), options)
    options = {"label_smoothing": 0.1, "batch": True, "include_background": False, "weight": make.positive(3)}
    yield Sample("smoothing, weight", (make.normal(2, 3, 5), make.classes(3, 2, 1, 5)), options)
    x, t = make.normal(5, 4), make.classes(4, 5, ignore_every=4, ignore_index=2)
    yield Sample("rows", (x, t), {"ignore_index": 2, "weight": make.positive(4)})
    x, t = make.normal(2, 3, 5), make.probabilities(2, 3, 5, requires_grad=True)
    yield Sample("probabilities", (x, t), {"label_smoothing": 0.2, "weight": make.positive(3)})


def _spec(function: Callable[..., Any], reference: Callable[..., Tensor], samples: Any) -> LossSpec:
    return LossSpec(function.__name__, function, None, reference, samples, fewest_bytes, operator="dice_loss_forward")


SPECS = {
    spec.name: spec
    for spec in (
        _spec(dice_loss, reference, samples),
        _spec(tversky_loss, tversky_reference, tversky_samples),
        _spec(focal_tversky_loss, focal_tversky_reference, focal_tversky_samples),
        _spec(dice_ce_loss, dice_ce_reference, dice_ce_samples),
    )
}
