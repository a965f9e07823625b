"""Dice loss: reference and samples."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..losses.dice_loss import dice_loss as function
from ._spec import LossSpec, Maker, Sample


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str | None = "softmax",
    ignore_index: int = -100,
    batch: bool = False,
    squared: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    include_background: bool = True,
    skip_absent: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """:func:`fastloss.dice_loss` in float64, from its definition: pixels as rows, one-hot, class by class."""
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
    losses = []
    for some in counts.flatten().unsqueeze(0) if batch else torch.eye(samples, device=x.device).bool():
        rows = some if batch else (some.unsqueeze(1) & counts).flatten()
        p_rows, t_rows = p.flatten(0, 1)[rows], t.flatten(0, 1)[rows]
        power = 2 if squared else 1
        overlap, area = (p_rows * t_rows).sum(0), (p_rows**power).sum(0) + (t_rows**power).sum(0)
        loss = 1 - (2 * overlap + smooth_nr) / (area + smooth_dr)
        losses.append(torch.where(t_rows.sum(0) == 0, 0.0, loss) if skip_absent else loss)
    loss = losses[0] if batch else torch.stack(losses)
    if weight is not None:
        loss = loss * weight.double()
    if not include_background:
        loss = loss[..., 1:]
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


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


def fewest_bytes(sample: Sample, gradient: bool) -> tuple[int, int]:
    """Input and target read, gradients written. (Backward reads again what the caches have lost since forward.)"""
    input, target = sample.args[:2]
    written = input.nbytes + (target.nbytes if target.requires_grad else 0)
    return input.nbytes + target.nbytes, written if gradient else 0


SPEC = LossSpec("dice_loss", function, None, reference, samples, fewest_bytes)
