"""torch's other elementwise losses: what each is, and the values that its operands are drawn from.

They have operands of a domain (probabilities, variances, signs), so that only their own samples fit them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ._spec import LossSpec, Maker, Sample
from .pointwise import PointwiseLoss, _reference, _samples, _spec


def _normal(maker: Maker, *shape: int) -> Tensor:
    return maker.normal(*shape, requires_grad=False)


def _positive(maker: Maker, *shape: int) -> Tensor:
    return maker.positive(*shape)


def _unit(maker: Maker, *shape: int) -> Tensor:
    """Between 0.25 and 0.75."""
    return maker.positive(*shape) / 2


def _signs(maker: Maker, *shape: int) -> Tensor:
    return maker.normal(*shape, requires_grad=False).sign()


LOSSES: dict[str, PointwiseLoss] = {
    "binary_cross_entropy": PointwiseLoss(draws=(_unit, _unit), mean_counts=True),
    "gaussian_nll_loss": PointwiseLoss(({"full": True},), further=("var",), draws=(_normal, _normal, _positive)),
    "hinge_embedding_loss": PointwiseLoss(({"margin": 0.7},), draws=(_normal, _signs), fixed=(1,)),
    "kl_div": PointwiseLoss(({"log_target": True},), draws=(_normal, _unit)),
    "margin_ranking_loss": PointwiseLoss(({"margin": 0.3},), further=("target",), draws=(_normal, _normal, _signs)),
    "poisson_nll_loss": PointwiseLoss(
        ({"full": True}, {"log_input": False, "eps": 0.1, "full": True}), draws=(_positive, _positive)
    ),
    "soft_margin_loss": PointwiseLoss(draws=(_normal, _signs)),
}


def _kl_reference(name: str, loss: PointwiseLoss) -> Callable[..., Tensor]:
    plain = _reference(name, loss)

    def reference(input: Tensor, target: Tensor, reduction: str = "mean", **options: Any) -> Tensor:
        """The divergence in float64, from its definition."""
        if reduction != "batchmean":
            return plain(input, target, reduction=reduction, **options)
        return plain(input, target, reduction="sum", **options) / input.shape[0]

    return reference


def _kl_samples(loss: PointwiseLoss) -> Callable[[str | torch.device, torch.dtype], Iterator[Sample]]:
    plain = _samples(loss)

    def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        yield from plain(device, dtype)
        maker = Maker(device, dtype)
        log_p, log_t = (maker.normal(3, 4, requires_grad=False).log_softmax(1).requires_grad_() for _ in range(2))
        yield Sample("batchmean", (log_p, log_t.detach().exp()), {"reduction": "batchmean"})
        yield Sample("batchmean, log_target", (log_p, log_t), {"reduction": "batchmean", "log_target": True})

    return samples


def _gaussian_samples(loss: PointwiseLoss) -> Callable[[str | torch.device, torch.dtype], Iterator[Sample]]:
    plain = _samples(loss)

    def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        yield from plain(device, dtype)
        maker = Maker(device, dtype)
        x, t = maker.normal(3, 4), maker.normal(3, 4, requires_grad=False)
        yield Sample("one variance by row", (x, t, maker.positive(3, 1)), {})
        yield Sample("one variance by column", (x, t, maker.positive(1, 4)), {"reduction": "none"})

    return samples


def _spec_of(name: str, loss: PointwiseLoss) -> LossSpec:
    if name == "kl_div":
        return _spec(name, _kl_reference(name, loss), _kl_samples(loss))
    samples = _gaussian_samples(loss) if name == "gaussian_nll_loss" else _samples(loss)
    return _spec(name, _reference(name, loss), samples)


SPECS: Mapping[str, LossSpec] = {name: _spec_of(name, loss) for name, loss in LOSSES.items()}
