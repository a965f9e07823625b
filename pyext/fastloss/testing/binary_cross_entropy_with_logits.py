"""Binary cross entropy of logits: reference and samples."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.binary_cross_entropy_with_logits import binary_cross_entropy_with_logits as function
from ._spec import LossSpec, Maker, Sample
from .pointwise import fewest_bytes


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`fastloss.binary_cross_entropy_with_logits` in float64, from its definition."""
    counts = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.expand(target.shape)
    if ignore_index is not None:
        counts = counts & (target.detach() != ignore_index)
    x, t = (torch.where(counts, v.double(), 0.5) for v in (input, target))
    t = t * (1 - label_smoothing) + label_smoothing / 2
    positive = 1.0 if pos_weight is None else pos_weight.double()
    values = positive * t * F.softplus(-x) + (1 - t) * F.softplus(x)
    if weight is not None:
        values = values * weight.double()
    if sample_weight is not None:
        values = values * sample_weight.double().reshape(-1, *[1] * (x.dim() - 1))
    values = torch.where(counts, values, 0.0)
    if reduction == "none":
        return values
    return values.sum() / counts.sum() if reduction == "mean" else values.sum()


def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every shape of every weight and every option, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)

    def call(name: str, input: Tensor, target: Tensor, **options: Any) -> Sample:
        return Sample(name, (input, target), options)

    x = make.normal(3, 4)
    t = make.probabilities(3, 4)
    mask = (torch.arange(12).reshape(3, 4) % 5 != 1).to(device)
    for reduction in ("mean", "sum", "none"):
        yield call(f"plain, {reduction}", x, t, reduction=reduction)
        yield call(f"both, {reduction}", x, make.probabilities(3, 4, requires_grad=True), reduction=reduction)
        per_class = make.positive(4).requires_grad_()
        yield call(f"pos_weight by class, {reduction}", x, t, pos_weight=per_class, reduction=reduction)
        everything = {"pos_weight": make.positive(3, 1), "weight": make.positive(4), "label_smoothing": 0.1}
        yield call(
            f"everything, {reduction}", x, make.probabilities(3, 4, requires_grad=True), mask=mask, reduction=reduction,
            sample_weight=make.positive(3), **everything,
        )  # fmt: skip
    yield call("weight with a gradient", x, t, weight=make.positive(3, 1).requires_grad_())
    yield call("pos_weight of one number", x, t, pos_weight=make.positive().requires_grad_())
    yield call("pos_weight of each element", x, t, pos_weight=make.positive(3, 4).requires_grad_())
    ignored = t.clone()
    ignored.view(-1)[::5] = -1
    yield call("ignore_index", x, ignored, ignore_index=-1)
    yield call("channels", make.normal(2, 3, 2, 2), make.probabilities(2, 3, 2, 2), pos_weight=make.positive(3, 1, 1))
    yield call("a number", make.normal(), torch.tensor(0.25, device=device, dtype=dtype))


# unwrap: torch's own, even where fastloss.patch() is in force.
SPEC = LossSpec(
    "binary_cross_entropy_with_logits",
    function,
    inspect.unwrap(F.binary_cross_entropy_with_logits),
    reference,
    samples,
    fewest_bytes,
    operator="pointwise_",
)
