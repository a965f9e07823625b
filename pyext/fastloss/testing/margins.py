"""Losses of cosines with a margin at the target: reference and samples."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses.arcface_loss import arcface_loss
from ..losses.cosface_loss import cosface_loss
from . import cross_entropy
from ._spec import LossSpec, Maker, Sample


def _arc(x: Tensor, margin: float) -> Tensor:
    """The angle itself, plus the margin."""
    inside = x > math.cos(math.pi - margin)
    turned = torch.cos(torch.acos(torch.where(inside, x, 0.0)) + margin)
    return torch.where(inside, turned, x - margin * math.sin(math.pi - margin))


@dataclass(frozen=True)
class MarginLoss:
    """What such a loss is.

    Attributes:
        function: the loss.
        moved: the target's cosine with the margin.
        default: the margin's default.
        margins: further ones to be tried.
    """

    function: Callable[..., Any]
    moved: Callable[[Tensor, float], Tensor]
    default: float
    margins: tuple[float, ...]


LOSSES: dict[str, MarginLoss] = {
    "arcface_loss": MarginLoss(arcface_loss, _arc, 0.5, (0.0, 1.2)),
    "cosface_loss": MarginLoss(cosface_loss, lambda x, margin: x - margin, 0.35, (0.1,)),
}


def _reference(loss: MarginLoss) -> Callable[..., Tensor]:
    def reference(
        input: Tensor, target: Tensor, *, margin: float = loss.default, scale: float = 64.0, **options: Any
    ) -> Tensor:
        """The loss in float64, from its definition; float64 whatever the arguments' dtypes."""
        x, dim = input.double(), 0 if input.dim() == 1 else options.get("class_dim") or 1
        index = target.to(torch.int64).unsqueeze(dim)
        index = torch.where(index == options.get("ignore_index", -100), 0, index)
        x = x.scatter(dim, index, loss.moved(x.gather(dim, index), margin))
        return cross_entropy.reference(x, target, logit_scale=scale, **options)

    return reference


def _samples(loss: MarginLoss) -> Callable[[str | torch.device, torch.dtype], Iterator[Sample]]:
    def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        """Margin and scale, and every option that they meet, at sizes that numerical differentiation can afford."""
        make = Maker(device, dtype)
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def cosines(*shape: int) -> Tensor:
            return make.normal(*shape, requires_grad=False).tanh().mul(0.97).requires_grad_()

        x, t = cosines(6, 5), make.classes(5, 6, ignore_every=4)
        w5 = make.positive(5, dtype=weight_dtype)

        def call(name: str, input: Tensor, target: Tensor, **options: Any) -> Sample:
            return Sample(name, (input, target), options)

        yield call("defaults", x, t)
        yield call("no batch", cosines(6), torch.tensor(4, device=device), scale=4.0)
        for reduction in ("mean", "sum", "none"):
            yield call(
                f"everything, {reduction}", x, t, weight=w5, label_smoothing=0.1, z_loss=0.1, scale=3.0,
                sample_weight=make.positive(6, dtype=weight_dtype), reduction=reduction,
            )  # fmt: skip
        for margin in loss.margins:
            yield call(f"margin {margin}", x, t, margin=margin, scale=8.0, reduction="none")
        yield call("smoothing", x, t, label_smoothing=0.2, scale=4.0)
        yield call("scale 1, normalizer", x, t, weight=w5, scale=1.0, normalizer=7.5)
        spatial, spatial_t = cosines(2, 3, 4, 2), make.classes(3, 2, 4, 2, ignore_every=5)
        yield call("spatial", spatial, spatial_t, scale=5.0, weight=make.positive(3, dtype=weight_dtype))
        yield call("class_dim last", cosines(2, 4, 3), make.classes(3, 2, 4), class_dim=-1, scale=5.0)
        yield call("rows", cosines(3, 40), make.classes(40, 3), scale=5.0, label_smoothing=0.1)
        yield call("one class", cosines(3, 1), make.classes(1, 3))

    return samples


def _spec(name: str, loss: MarginLoss) -> LossSpec:
    forms = (_reference(loss), _samples(loss), cross_entropy.fewest_bytes)
    return LossSpec(name, loss.function, None, *forms, operator="cross_entropy_")


SPECS: Mapping[str, LossSpec] = {name: _spec(name, loss) for name, loss in LOSSES.items()}
