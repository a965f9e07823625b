"""Negative log likelihood of given log-probabilities: reference and samples."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.nll_loss import nll_loss as function
from ._spec import LossSpec, Maker, Sample


def reference(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """:func:`fastloss.nll_loss` in float64, from its definition."""
    x = input.double().movedim(0 if input.dim() == 1 else 1, -1)
    index = target.to(torch.int64).reshape(x.shape[:-1])
    counted = index != ignore_index
    index = torch.where(counted, index, 0)
    w = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device) if weight is None else weight.double()
    share = torch.where(counted, w[index], 0.0)
    loss = torch.where(counted, -share * x.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / share.sum() if reduction == "mean" else loss.sum()


def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every shape and every option, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)

    def log_probabilities(*shape: int) -> Tensor:
        dim = min(1, len(shape) - 1)
        return make.normal(*shape, requires_grad=False).log_softmax(dim).requires_grad_()

    def call(name: str, input: Tensor, target: Tensor, **options: Any) -> Sample:
        return Sample(name, (input, target), options)

    yield call("no batch", log_probabilities(6), torch.tensor(4, device=device))
    for reduction in ("mean", "sum", "none"):
        x, t = log_probabilities(5, 7), make.classes(7, 5, ignore_every=3)
        yield call(f"rows, {reduction}", x, t, reduction=reduction)
        yield call(f"weight, {reduction}", x, t, weight=make.positive(7), reduction=reduction)
        spatial, spatial_t = log_probabilities(2, 3, 2, 4), make.classes(3, 2, 2, 4, ignore_every=5)
        yield call(f"spatial, {reduction}", spatial, spatial_t, weight=make.positive(3), reduction=reduction)
    yield call("1 spatial dimension", log_probabilities(3, 4, 5), make.classes(4, 3, 5))
    yield call("3 spatial dimensions", log_probabilities(2, 3, 2, 1, 2), make.classes(3, 2, 2, 1, 2))
    channels_last = log_probabilities(2, 3, 4, 2).detach().contiguous(memory_format=torch.channels_last)
    yield call("channels last", channels_last.requires_grad_(), make.classes(3, 2, 4, 2))
    x, t = log_probabilities(5, 7), make.classes(7, 5, ignore_every=2, ignore_index=2)
    yield call("ignore_index 2", x, t, ignore_index=2)


def fewest_bytes(sample: Sample, gradient: bool) -> tuple[int, int]:
    """One element per row read; the gradient, nearly all zeros, written once."""
    input, target = sample.args[:2]
    return target.numel() * input.element_size() + target.nbytes, input.nbytes if gradient else 0


# unwrap: torch's own, even where fastloss.patch() is in force.
SPEC = LossSpec(
    "nll_loss", function, inspect.unwrap(F.nll_loss), reference, samples, fewest_bytes, operator="row_loss_forward"
)
