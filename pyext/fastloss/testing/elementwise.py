"""The losses of elements that come from elsewhere than torch: references and a few samples of each.

What holds for all pointwise losses, :mod:`fastloss.testing.pointwise` tries on those of torch.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..formulas import FORMULAS
from ._spec import LossSpec, Maker, Sample
from .pointwise import _operands, fewest_bytes


def _reference(values: Callable[..., Tensor], default: str = "mean", root: bool = False) -> Callable[..., Tensor]:
    def reference(
        input: Tensor,
        target: Tensor,
        *,
        reduction: str = default,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss in float64, from its definition."""
        x, t, w, counts = _operands(input, target, weight, sample_weight, mask)
        each = w * values(x, t, **options)
        if reduction != "none":
            total = counts.sum() if weight is None and sample_weight is None else w.sum()
            each = each.sum() / total if reduction == "mean" else each.sum()
        if not root:
            return each
        zero = each == 0
        return torch.where(zero, 0.0, torch.where(zero, 1.0, each).sqrt())

    return reference


def _samples(
    *options: dict[str, Any], labels: bool = False, positive: bool = False
) -> Callable[[str | torch.device, torch.dtype], Iterator[Sample]]:
    """Of operands that are normal or ``positive``; targets of ``labels`` are probabilities."""

    def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        make = Maker(device, dtype)

        def pair(*shape: int, both: bool = False) -> tuple[Tensor, Tensor]:
            x = make.positive(*shape).requires_grad_() if positive else make.normal(*shape)
            t = make.probabilities(*shape) if labels else make.positive(*shape) if positive else make.normal(*shape)
            return x, t.detach().requires_grad_(both)

        mask = (torch.arange(12).reshape(3, 4) % 5 != 1).to(device)
        sample_weight = make.positive(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        weights = {"weight": make.positive(3, 4), "sample_weight": sample_weight}
        for reduction in ("mean", "sum", "none"):
            yield Sample(f"plain, {reduction}", pair(3, 4), {"reduction": reduction})
            yield Sample(f"both, {reduction}", pair(3, 4, both=True), {"reduction": reduction})
            yield Sample(f"weights, mask, {reduction}", pair(3, 4), {"reduction": reduction, "mask": mask, **weights})
        for own in options:
            named = ", ".join(f"{k} {v}" for k, v in own.items() if not isinstance(v, Tensor))
            own = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in own.items()}
            yield Sample(f"options {named}", pair(3, 4, both=True), {"reduction": "none", **own})
        x, t = pair(4, 3)
        yield Sample("transposed", (x.detach().t().requires_grad_(), t.t()), {"reduction": "mean"})

    return samples


def _quantile(x: Tensor, t: Tensor, quantile: Any = 0.5) -> Tensor:
    q = torch.as_tensor(quantile, dtype=torch.float64, device=x.device)
    return FORMULAS["quantiles_loss"].terms(x, t, q)  # type: ignore[no-any-return]


def _relative(symmetric: bool) -> Callable[..., Tensor]:
    return lambda x, t, eps: FORMULAS["relative_l1_loss"].terms(x, t, eps=eps, symmetric=symmetric)


def _with_eps(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """eps is by default the dtype's."""

    def of(input: Tensor, target: Tensor, **options: Any) -> Tensor:
        eps = torch.finfo(torch.promote_types(input.dtype, target.dtype)).eps
        return reference(input, target, **{"eps": eps, **options})

    return of


def _rmsle(x: Tensor, t: Tensor) -> Tensor:
    return (x.log1p() - t.log1p()) ** 2


def _focal(x: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    return FORMULAS["sigmoid_focal_loss"].terms(x, t, alpha, gamma)  # type: ignore[no-any-return]


def _asymmetric(x: Tensor, t: Tensor, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05) -> Tensor:
    return FORMULAS["asymmetric_loss"].terms(x, t, gamma_pos, gamma_neg, clip)  # type: ignore[no-any-return]


def _charbonnier(x: Tensor, t: Tensor, eps: float = 1e-3) -> Tensor:
    return FORMULAS["charbonnier_loss"].terms(x, t, eps)  # type: ignore[no-any-return]


_SEVERAL = torch.tensor([0.1, 0.5, 0.75, 0.9], dtype=torch.float64)
_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Iterator[Sample]]]] = {
    "sigmoid_focal_loss": (
        _reference(_focal, "none"),
        _samples({"alpha": -1, "gamma": 1.5}, {"alpha": 0.6, "gamma": 0.0}, labels=True),
    ),
    "asymmetric_loss": (
        _reference(_asymmetric),
        _samples({"gamma_neg": 2.5, "gamma_pos": 0.0, "clip": 0.3}, {"clip": 0.0, "gamma_pos": 2.0}, labels=True),
    ),
    "charbonnier_loss": (_reference(_charbonnier), _samples({"eps": 0.5})),
    "quantile_loss": (_reference(_quantile), _samples({"quantile": 0.9}, {"quantile": _SEVERAL})),
    "rmsle_loss": (_reference(_rmsle, root=True), _samples(positive=True)),
    "mape_loss": (_with_eps(_reference(_relative(False))), _samples({"eps": 0.3})),
    "smape_loss": (_with_eps(_reference(_relative(True))), _samples({"eps": 0.3})),
}


def _spec(name: str, reference: Callable[..., Tensor], samples: Callable[..., Iterator[Sample]]) -> LossSpec:
    function = getattr(importlib.import_module(f"fastloss.losses.{name}"), name)
    return LossSpec(name, function, None, reference, samples, fewest_bytes, operator="pointwise_")


SPECS: Mapping[str, LossSpec] = {name: _spec(name, *of) for name, of in _LOSSES.items()}
