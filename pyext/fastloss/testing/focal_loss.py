"""Softmax focal loss: reference and samples."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..losses.focal_loss import focal_loss as function
from . import cross_entropy
from ._spec import LossSpec, Maker, Sample


def reference(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    **options: Any,
) -> Tensor:
    """:func:`fastloss.focal_loss` in float64, from its definition; float64 whatever the arguments' dtypes."""
    dim = 0 if input.dim() == 1 else options.get("class_dim") or 1
    classes = input.shape[dim]
    sample_weight = options.pop("sample_weight", None)
    w = torch.ones(classes, dtype=torch.float64, device=input.device) if weight is None else weight.double()
    nll = cross_entropy.reference(input, target, weight, reduction="none", **options)
    e, ignore_index = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    if input.shape == target.shape:
        p = target.double().movedim(dim, -1) * (1 - e) + e / classes
        share = counted = torch.ones_like(nll)
        mass = (p * w).sum(-1)
    else:
        index = target.to(torch.int64).reshape(nll.shape)
        counted = (index != ignore_index).double()
        share = w[torch.where(index != ignore_index, index, 0)]
        mass = (1 - e) * share + e / classes * w.sum()
    each = nll / mass
    s = counted if sample_weight is None else counted * sample_weight.double()
    of_logits = {k: v for k, v in options.items() if k in ("class_dim", "logit_scale", "softcap")}
    lse = cross_entropy.reference_lse(input, **of_logits)
    # A power of 0 has no derivative.
    safe = torch.where(each == 0, 1.0, each)
    mapped = torch.where(each == 0, 0.0, (-torch.expm1(-safe)) ** gamma * safe)
    rows = torch.where(s != 0, s * mass * mapped, 0.0)
    z_rows = torch.where(s != 0, s * z_loss * lse**2, 0.0)
    if reduction == "none":
        return rows + z_rows
    if reduction == "sum":
        return rows.sum() + z_rows.sum()
    if normalizer is not None:
        return (rows.sum() + z_rows.sum()) / float(normalizer)
    return rows.sum() / (s * share).sum() + z_rows.sum() / s.sum()


def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """gamma, and every option that it meets, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, t = make.normal(4, 5), make.classes(5, 4, ignore_every=3)
    w5 = make.positive(5, dtype=weight_dtype)

    def call(name: str, input: Tensor, target: Tensor, **options: Any) -> Sample:
        return Sample(name, (input, target), options)

    yield call("no batch", make.normal(6), torch.tensor(4, device=device))
    for reduction in ("mean", "sum", "none"):
        p = make.probabilities(4, 5, requires_grad=True)
        yield call(f"rows, {reduction}", x, t, reduction=reduction)
        yield call(f"weight, {reduction}", x, t, gamma=0.5, weight=w5, reduction=reduction)
        yield call(f"weight, smoothing, {reduction}", x, t, weight=w5, label_smoothing=0.1, reduction=reduction)
        soft_weight = make.positive(5).requires_grad_()
        yield call(f"probabilities, {reduction}", x, p, weight=soft_weight, label_smoothing=0.1, reduction=reduction)
        everything = {"z_loss": 0.1, "softcap": 2.0, "logit_scale": 0.7}
        sample_weight = make.positive(4, dtype=weight_dtype)
        yield call(
            f"everything, {reduction}", x, t, gamma=3.0, weight=w5, reduction=reduction, sample_weight=sample_weight,
            label_smoothing=0.1, **everything,
        )  # fmt: skip
    yield call("gamma 0", x, t, gamma=0.0)
    yield call("normalizer", x, t, weight=w5, normalizer=7.5)
    spatial, spatial_t = make.normal(2, 3, 4, 2), make.classes(3, 2, 4, 2, ignore_every=5)
    yield call("spatial", spatial, spatial_t, weight=make.positive(3, dtype=weight_dtype))
    yield call("one class", make.normal(3, 1), make.classes(1, 3), gamma=1.0)


SPEC = LossSpec("focal_loss", function, None, reference, samples, cross_entropy.fewest_bytes, operator="cross_entropy_")
