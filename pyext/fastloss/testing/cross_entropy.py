"""Cross entropy: reference and samples."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.cross_entropy import CrossEntropyStats
from ..losses.cross_entropy import cross_entropy as function
from ._spec import LossSpec, Maker, Sample


def _rows_of_classes(
    input: Tensor, class_dim: int | None, logit_scale: float, softcap: float | None
) -> tuple[Tensor, int]:
    """z [..., classes] in float64, scaled and capped; and which dimension the classes were."""
    dim = 0 if input.dim() == 1 else 1 if class_dim is None else class_dim
    z = input.double().movedim(dim, -1) * logit_scale
    return (softcap * torch.tanh(z / softcap) if softcap else z), dim


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int | None = None,
    all_ignored: str = "nan",
    zero_times_inf: str = "nan",
) -> Tensor:
    """:func:`fastloss.cross_entropy` in float64, from its definition; float64 whatever the arguments' dtypes."""
    z, dim = _rows_of_classes(input, class_dim, logit_scale, softcap)
    classes = z.shape[-1]
    ref = z.detach().amax(-1, keepdim=True) if classes else z.new_zeros(1)
    ref = torch.where(ref.isfinite(), ref, 0.0)  # lse - z would lose digits at large logits
    log_sum = torch.logsumexp(z - ref, -1)
    lse = log_sum + ref.squeeze(-1)
    minus_log_p = log_sum.unsqueeze(-1) - (z - ref)
    w = torch.ones(classes, dtype=z.dtype, device=z.device) if weight is None else weight.double()

    def times(factor: Tensor, term: Tensor) -> Tensor:
        return factor * (torch.where(factor == 0, 0.0, term) if zero_times_inf == "zero" else term)

    if input.shape == target.shape:
        p = target.double().movedim(dim, -1)
        nll = times(w * ((1 - label_smoothing) * p + label_smoothing / classes), minus_log_p).sum(-1)
        share = counted = torch.ones_like(nll)
    else:
        index = target.to(torch.int64).reshape(lse.shape)
        counted = (index != ignore_index).double()
        index = torch.where(index != ignore_index, index, 0)
        share = w[index]
        nll = (1 - label_smoothing) * times(share, minus_log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1))
        if label_smoothing:
            nll = nll + label_smoothing / classes * times(w.expand_as(z), minus_log_p).sum(-1)
    s = counted if sample_weight is None else counted * sample_weight.double()
    nll = torch.where(s != 0, s * nll, 0.0)
    z_term = torch.where(s != 0, s * z_loss * lse**2, 0.0) if z_loss else torch.zeros_like(nll)
    if reduction == "none":
        return nll + z_term
    if reduction == "sum":
        return nll.sum() + z_term.sum()
    if normalizer is not None:
        return (nll.sum() + z_term.sum()) / float(normalizer)
    if all_ignored == "zero" and not counted.any():
        return nll.sum()
    mean = nll.sum() / (s * share).sum()
    return mean + z_term.sum() / s.sum() if z_loss else mean


def reference_lse(
    input: Tensor, class_dim: int | None = None, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Log-sum-exp of each row, in float64."""
    return torch.logsumexp(_rows_of_classes(input, class_dim, logit_scale, softcap)[0], -1)


def reference_stats(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    class_dim: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> CrossEntropyStats:
    """What ``return_stats=True`` adds, in float64."""
    z, dim = _rows_of_classes(input.detach(), class_dim, logit_scale, softcap)
    predicted = z.argmax(-1)
    if input.shape == target.shape:
        hits = predicted == target.movedim(dim, -1).argmax(-1)
    else:
        index = target.to(torch.int64).reshape(predicted.shape)
        hits = (predicted == index)[index != ignore_index]
    entropy = torch.special.entr(torch.softmax(z, -1)).sum(-1)
    return CrossEntropyStats(torch.logsumexp(z, -1), predicted, hits.double().mean(), entropy)


def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every shape and every option, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, t = make.normal(4, 5), make.classes(5, 4, ignore_every=3)
    spatial, spatial_t = make.normal(2, 3, 1, 3), make.classes(3, 2, 1, 3, ignore_every=5)
    w5, w3 = make.positive(5, dtype=weight_dtype), make.positive(3, dtype=weight_dtype)

    def call(name: str, input: Tensor, target: Tensor, **options: Any) -> Sample:
        return Sample(name, (input, target), options)

    yield call("no batch", make.normal(6), torch.tensor(4, device=device))
    yield call("no batch, probabilities", make.normal(6), make.probabilities(6, requires_grad=True))
    for reduction in ("mean", "sum", "none"):
        yield call(f"rows, {reduction}", x, t, reduction=reduction)
        yield call(f"weight, {reduction}", x, t, weight=w5, reduction=reduction)
        yield call(f"weight, smoothing, {reduction}", x, t, weight=w5, label_smoothing=0.1, reduction=reduction)
        yield call(f"spatial, {reduction}", spatial, spatial_t, weight=w3, label_smoothing=0.2, reduction=reduction)
        p = make.probabilities(4, 5, requires_grad=True)
        yield call(f"probabilities, {reduction}", x, p, reduction=reduction)
        soft_weight = make.positive(5).requires_grad_()
        yield call(
            f"probabilities, weight, smoothing, {reduction}", x, p, weight=soft_weight, label_smoothing=0.1,
            reduction=reduction,
        )  # fmt: skip
        everything = {
            "z_loss": 0.1,
            "softcap": 2.0,
            "logit_scale": 0.7,
            "sample_weight": make.positive(4, dtype=weight_dtype),
            "label_smoothing": 0.1,
        }
        yield call(f"everything, {reduction}", x, t, weight=w5, reduction=reduction, **everything)
        yield call(
            f"everything, probabilities, {reduction}", x, p, weight=soft_weight, reduction=reduction, **everything
        )
    yield call("1 spatial dimension", make.normal(2, 4, 3), make.classes(4, 2, 3))
    yield call("3 spatial dimensions", make.normal(2, 3, 2, 1, 2), make.classes(3, 2, 2, 1, 2))
    yield call("spatial, probabilities", spatial, make.probabilities(2, 3, 1, 3, requires_grad=True))
    channels_last = make.normal(2, 3, 4, 2, requires_grad=False).contiguous(memory_format=torch.channels_last)
    yield call("channels last", channels_last.requires_grad_(), make.classes(3, 2, 4, 2))
    yield call("class_dim last", make.normal(2, 4, 3), make.classes(3, 2, 4, ignore_every=3), class_dim=-1)
    yield call("smoothing 1", x, t, label_smoothing=1.0)
    yield call("ignore_index 2", x, make.classes(5, 4, ignore_every=2, ignore_index=2), ignore_index=2)
    yield call("z_loss", x, t, z_loss=0.3, weight=w5)
    yield call("softcap", x, t, softcap=1.5)
    yield call("logit_scale", x, t, logit_scale=-2.0)
    yield call("sample_weight", x, t, sample_weight=make.positive(4, dtype=weight_dtype), weight=w5)
    yield call("normalizer", x, t, weight=w5, z_loss=0.1, normalizer=7.5)
    counted = torch.tensor(6, device=device)
    yield call("normalizer of a tensor", x, t, label_smoothing=0.1, normalizer=counted)
    yield call("all ignored", x, torch.full_like(t, -100), all_ignored="zero")
    yield call("one class", make.normal(3, 1), make.classes(1, 3))


def fewest_bytes(sample: Sample, gradient: bool) -> tuple[int, int]:
    """The logits, and probabilities if the target is these, read once; the gradient written once."""
    input, target = sample.args[:2]
    read = input.nbytes + (target.nbytes if target.shape == input.shape else 0)
    return read, input.nbytes if gradient else 0


# unwrap: torch's own, even where fastloss.patch() is in force.
SPEC = LossSpec("cross_entropy", function, inspect.unwrap(F.cross_entropy), reference, samples, fewest_bytes)
