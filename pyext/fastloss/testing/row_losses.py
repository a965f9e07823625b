"""The losses over a class axis without a softmax: what each is, and the samples that all of them share.

:data:`LOSSES` is the registry: a loss is a line there. Tests read it through :data:`fastloss.testing.SPECS`, the table
in docs/losses.md is written from it.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formulas import ROW_LOSSES
from ._spec import LossSpec, Maker, Sample


@dataclass(frozen=True)
class RowLoss:
    """What such a loss is, beside its formula.

    Attributes:
        options: values of its own options to be tried, beside the defaults.
        ignores: it takes ``ignore_index``.
        mean_over_rows: ``'mean'`` divides by the number of rows whatever their weights.
        spatial: torch's, if there is one, takes inputs (N, C, d1, ...).
    """

    options: tuple[dict[str, Any], ...] = ()
    ignores: bool = True
    mean_over_rows: bool = False
    spatial: bool = True


LOSSES: dict[str, RowLoss] = {
    "nll_loss": RowLoss(),
    "multi_margin_loss": RowLoss(({"p": 2, "margin": 0.4},), ignores=False, mean_over_rows=True, spatial=False),
    "capsule_margin_loss": RowLoss(({"m_plus": 0.5, "m_minus": -0.5, "down_weight": 0.25},), mean_over_rows=True),
}


def _reference(name: str, loss: RowLoss) -> Callable[..., Tensor]:
    def reference(
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        **options: Any,
    ) -> Tensor:
        """The loss in float64, from its definition."""
        x = input.double()
        x = x.unsqueeze(0) if x.dim() == 1 else x
        index = target.to(torch.int64).reshape(x.shape[:1] + x.shape[2:]).unsqueeze(1)
        counted = index != ignore_index
        index = torch.where(counted, index, 0)
        w = torch.ones(x.shape[1], dtype=x.dtype, device=x.device) if weight is None else weight.double()
        share = torch.where(counted, w[index], 0.0)
        rows = torch.where(counted, share * ROW_LOSSES[name].value(x, index, **options), 0.0)
        if reduction == "none":
            return rows.reshape(target.shape)
        total = counted.sum() if loss.mean_over_rows else share.sum()
        return rows.sum() / total if reduction == "mean" else rows.sum()

    return reference


def _samples(loss: RowLoss) -> Callable[[str | torch.device, torch.dtype], Iterator[Sample]]:
    every = {"ignore_every": 3} if loss.ignores else {}

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
            x, t = log_probabilities(5, 7), make.classes(7, 5, **every)
            yield call(f"rows, {reduction}", x, t, reduction=reduction)
            yield call(f"weight, {reduction}", x, t, weight=make.positive(7), reduction=reduction)
            for own in loss.options:
                named = ", ".join(f"{k} {v}" for k, v in own.items())
                yield call(f"{named}, {reduction}", x, t, weight=make.positive(7), reduction=reduction, **own)
        transposed = log_probabilities(7, 5).detach().t().requires_grad_()
        yield call("transposed", transposed, make.classes(7, 5))
        if loss.ignores:
            x, t = log_probabilities(5, 7), make.classes(7, 5, ignore_every=2, ignore_index=2)
            yield call("ignore_index 2", x, t, ignore_index=2)
        if not loss.spatial:
            return
        for reduction in ("mean", "sum", "none"):
            spatial, t = log_probabilities(2, 3, 2, 4), make.classes(3, 2, 2, 4, **every)
            yield call(f"spatial, {reduction}", spatial, t, weight=make.positive(3), reduction=reduction)
        yield call("1 spatial dimension", log_probabilities(3, 4, 5), make.classes(4, 3, 5))
        yield call("3 spatial dimensions", log_probabilities(2, 3, 2, 1, 2), make.classes(3, 2, 2, 1, 2))
        channels_last = log_probabilities(2, 3, 4, 2).detach().contiguous(memory_format=torch.channels_last)
        yield call("channels last", channels_last.requires_grad_(), make.classes(3, 2, 4, 2))

    return samples


def _fewest_bytes(name: str) -> Callable[[Sample, bool], tuple[int, int]]:
    def fewest_bytes(sample: Sample, gradient: bool) -> tuple[int, int]:
        """The input, or of nll_loss one element per row, read once; the gradient written once."""
        input, target = sample.args[:2]
        read = target.numel() * input.element_size() if name == "nll_loss" else input.nbytes
        return read + target.nbytes, input.nbytes if gradient else 0

    return fewest_bytes


def _spec(name: str, loss: RowLoss) -> LossSpec:
    function = getattr(importlib.import_module(f"fastloss.losses.{name}"), name)
    theirs = getattr(F, name, None)
    # unwrap: torch's own, even where fastloss.patch() is in force.
    theirs = theirs and inspect.unwrap(theirs)
    forms = (_reference(name, loss), _samples(loss), _fewest_bytes(name))
    return LossSpec(name, function, theirs, *forms, operator="row_loss_forward")


SPECS: Mapping[str, LossSpec] = {name: _spec(name, loss) for name, loss in LOSSES.items()}
