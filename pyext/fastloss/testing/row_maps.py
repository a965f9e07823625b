"""The losses that map each row's nll: what each is, and the samples that all of them share.

:data:`LOSSES` is the registry: a loss is a line there. Tests read it through :data:`fastloss.testing.SPECS`, the table
in docs/losses.md is written from it.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..formulas import ROW_MAPS
from ..losses import _row_map
from . import cross_entropy
from ._spec import LossSpec, Maker, Sample


@dataclass(frozen=True)
class RowMapLoss:
    """What such a loss is, beside its formula.

    Attributes:
        defaults: the map's parameters, by their names in the face and in the kernels' order.
        options: other values of them to be tried.
        stops_gradient: as of a :class:`LossSpec`.
    """

    defaults: dict[str, float] = field(default_factory=dict)
    options: tuple[dict[str, float], ...] = ()
    stops_gradient: bool = False


LOSSES: dict[str, RowMapLoss] = {
    "focal_loss": RowMapLoss({"gamma": 2.0}, ({"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 3.0})),
    "poly1_loss": RowMapLoss({"epsilon": 1.0}, ({"epsilon": -1.0}, {"epsilon": 2.5})),
    "generalized_cross_entropy": RowMapLoss({"q": 0.7}, ({"q": 0.1}, {"q": 1.0})),
    "token_scaled_cross_entropy": RowMapLoss(stops_gradient=True),
}


def _reference(name: str, loss: RowMapLoss) -> Callable[..., Tensor]:
    g = ROW_MAPS[_row_map.LOSSES[name].row_map]

    def reference(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        reduction: str = "mean",
        normalizer: Tensor | float | None = None,
        z_loss: float = 0.0,
        **options: Any,
    ) -> Tensor:
        """The loss in float64, from its definition; float64 whatever the arguments' dtypes."""
        parameters = [options.pop(parameter, default) for parameter, default in loss.defaults.items()]
        # Once: a gradient that comes by several conversions from 16 bits would be rounded in each of them.
        input, weight = input.double(), None if weight is None else weight.double()
        target = target.double() if target.is_floating_point() else target
        dim = 0 if input.dim() == 1 else options.get("class_dim") or 1
        classes = input.shape[dim]
        sample_weight = options.pop("sample_weight", None)
        w = torch.ones(classes, dtype=torch.float64, device=input.device) if weight is None else weight
        nll = cross_entropy.reference(input, target, weight, reduction="none", **options)
        e, ignore_index = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
        if input.shape == target.shape:
            p = target.movedim(dim, -1) * (1 - e) + e / classes
            share = counted = torch.ones_like(nll)
            mass = (p * w).sum(-1)
        else:
            index = target.to(torch.int64).reshape(nll.shape)
            counted = (index != ignore_index).double()
            share = w[torch.where(index != ignore_index, index, 0)]
            mass = (1 - e) * share + e / classes * w.sum()
        s = counted if sample_weight is None else counted * sample_weight.double()
        of_logits = {k: v for k, v in options.items() if k in ("class_dim", "logit_scale", "softcap")}
        lse = cross_entropy.reference_lse(input, **of_logits)
        rows = torch.where(s != 0, s * mass * g(nll / mass, *parameters), 0.0)
        z_rows = torch.where(s != 0, s * z_loss * lse**2, 0.0)
        if reduction == "none":
            return rows + z_rows
        if reduction == "sum":
            return rows.sum() + z_rows.sum()
        if normalizer is not None:
            return (rows.sum() + z_rows.sum()) / float(normalizer)
        return rows.sum() / (s * share).sum() + z_rows.sum() / s.sum()

    return reference


def _samples(loss: RowMapLoss) -> Callable[[str | torch.device, torch.dtype], Iterator[Sample]]:
    def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        """The parameter, and every option that it meets, at sizes that numerical differentiation can afford."""
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
            yield call(f"weight, smoothing, {reduction}", x, t, weight=w5, label_smoothing=0.1, reduction=reduction)
            of_probabilities = {"weight": make.positive(5).requires_grad_(), "label_smoothing": 0.1}
            yield call(f"probabilities, {reduction}", x, p, reduction=reduction, **of_probabilities)
            yield call(
                f"everything, {reduction}", x, t, weight=w5, label_smoothing=0.1, z_loss=0.1, softcap=2.0,
                logit_scale=0.7, sample_weight=make.positive(4, dtype=weight_dtype), reduction=reduction,
            )  # fmt: skip
        for own, reduction in zip(loss.options, itertools.cycle(("none", "mean", "sum")), strict=False):
            named = ", ".join(f"{k} {v}" for k, v in own.items())
            yield call(f"{named}, {reduction}", x, t, weight=w5, reduction=reduction, **own)
        yield call("normalizer", x, t, weight=w5, normalizer=7.5)
        spatial, spatial_t = make.normal(2, 3, 4, 2), make.classes(3, 2, 4, 2, ignore_every=5)
        yield call("spatial", spatial, spatial_t, weight=make.positive(3, dtype=weight_dtype))
        yield call("one class", make.normal(3, 1), make.classes(1, 3))

    return samples


def _spec(name: str, loss: RowMapLoss) -> LossSpec:
    function = getattr(importlib.import_module(f"fastloss.losses.{name}"), name)
    forms = (_reference(name, loss), _samples(loss), cross_entropy.fewest_bytes)
    return LossSpec(name, function, None, *forms, operator="cross_entropy_", stops_gradient=loss.stops_gradient)


SPECS: Mapping[str, LossSpec] = {name: _spec(name, loss) for name, loss in LOSSES.items()}
