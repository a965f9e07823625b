"""The pointwise losses: what each is, in plain torch, and the samples that all of them share.

:data:`LOSSES` is the registry: a loss is a line there. Tests and benchmarks read it through
:data:`fastloss.testing.SPECS`, the table in docs/losses.md is written from it.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formulas import FORMULAS
from ._spec import LossSpec, Maker, Sample


@dataclass(frozen=True)
class PointwiseLoss:
    """What a pointwise loss is.

    Attributes:
        further: names of operands beside input and target.
        per_sample: it has a formula after the sums over each sample, all dimensions but the first.
        positive: it takes operands above 0.
        options: values of its own options to be tried, beside the defaults.
        mean_counts: ``'mean'`` divides by the count of elements whatever their weights.
        defaults: options whose default depends on the dtype of input and target.
        draws: how the operands are drawn, where they are no normal numbers; each is then of the loss's shape.
        fixed: operands without a gradient, by their numbers.
    """

    options: tuple[dict[str, Any], ...] = ()
    mean_counts: bool = False
    further: tuple[str, ...] = ()
    per_sample: bool = False
    positive: bool = False
    defaults: Callable[[torch.dtype], dict[str, Any]] = lambda dtype: {}
    draws: tuple[Callable[..., Tensor], ...] = ()
    fixed: tuple[int, ...] = ()


LOSSES: dict[str, PointwiseLoss] = {
    "l1_loss": PointwiseLoss(),
    "mse_loss": PointwiseLoss(),
    "smooth_l1_loss": PointwiseLoss(({"beta": 0.4}, {"beta": 0.0})),
    "huber_loss": PointwiseLoss(({"delta": 0.4},), mean_counts=True),
    "log_cosh_loss": PointwiseLoss(),
    "relative_l1_loss": PointwiseLoss(
        ({"eps": 0.3}, {"eps": 0.3, "symmetric": True}),
        defaults=lambda dtype: {"eps": torch.finfo(dtype).eps},
    ),
}


def _operands(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    *further: Tensor,
) -> tuple[Tensor, ...]:
    """x, t, weights, mask and further operands in float64, broadcast; what the mask hides is 1 with weight 0."""
    x, t = torch.broadcast_tensors(input.double(), target.double())
    w = torch.ones_like(x) if weight is None else weight.double().expand(x.shape)
    if sample_weight is not None:
        w = w * sample_weight.double().reshape(-1, *[1] * (x.dim() - 1))
    counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    x, t, *rest = (torch.where(counts, operand.double(), 1.0) for operand in (x, t, *further))
    return x, t, torch.where(counts, w, 0.0), counts, *rest


def _reference(name: str, loss: PointwiseLoss) -> Callable[..., Tensor]:
    def reference(
        input: Tensor,
        target: Tensor,
        *further: Tensor,
        reduction: str = "mean",
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss in float64, from its definition; float64 whatever the arguments' dtypes."""
        x, t, w, counts, *others = _operands(input, target, weight, sample_weight, mask, *further)
        options = {**loss.defaults(torch.promote_types(input.dtype, target.dtype)), **options}
        formula = FORMULAS[name]
        terms = formula.terms(x, t, *others, **options)
        if formula.finish is not None:
            each = formula.finish(*((w * term).flatten(1).sum(1) for term in terms), **options)
            return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()
        values = w * terms
        if reduction == "none":
            return values
        if reduction == "sum":
            return values.sum()
        unweighted = loss.mean_counts or (weight is None and sample_weight is None)
        return values.sum() / (counts.sum() if unweighted else w.sum())

    return reference


def _root(square: Tensor) -> Tensor:
    """With derivative 0 at 0."""
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())


def reference_rmse(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    dim: Any = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`fastloss.rmse_loss` in float64, from its definition."""
    x, t, w, counts = _operands(input, target, weight, sample_weight, mask)
    squares = w * (x - t) ** 2
    total = w if weight is not None or sample_weight is not None else counts.double()
    if dim is None:
        if reduction == "none":
            return torch.where(counts, _root(squares + eps), 0.0)
        return _root((squares.sum() / total.sum() if reduction == "mean" else squares.sum()) + eps)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    some = counts.any(dims[0]) if len(dims) == 1 else counts.sum(dims) > 0
    share = torch.where(some, total.sum(dims), 1.0)
    roots = torch.where(some, _root(squares.sum(dims) / share + eps), 0.0)
    if reduction == "none":
        return roots
    return roots.sum() if reduction == "sum" else roots.sum() / some.sum()


def _channels_last(t: Tensor) -> Tensor:
    return t.detach().contiguous(memory_format=torch.channels_last).requires_grad_(t.requires_grad)


def _samples(loss: PointwiseLoss) -> Callable[[str | torch.device, torch.dtype], Iterator[Sample]]:
    def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        """Every shape and every option, at sizes that numerical differentiation can afford."""
        maker = Maker(device, dtype)
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def make(*shape: int, requires_grad: bool = True, operand: int = 0) -> Tensor:
            if loss.draws:
                values = loss.draws[operand](maker, *shape)
            else:
                values = maker.positive(*shape) if loss.positive else maker.normal(*shape, requires_grad=False)
            return values.requires_grad_(requires_grad and operand not in loss.fixed)

        def target(*shape: int, requires_grad: bool = True) -> Tensor:
            return make(*shape, requires_grad=requires_grad, operand=1)

        def call(name: str, input: Tensor, target: Tensor, **options: Any) -> Sample:
            # A number for each column, broadcast; but autograd sums gradients of 16 bits in 16 bits.
            shape = input.shape if dtype.itemsize == 2 or loss.draws else input.shape[-1:]
            further = [make(*shape, operand=k) for k, _ in enumerate(loss.further, 2)]
            return Sample(name, (input, target, *further), options)

        mask = (torch.arange(12).reshape(3, 4) % 5 != 1).to(device)
        weights = {"weight": maker.positive(3, 4), "sample_weight": maker.positive(3, dtype=weight_dtype)}
        by_sample = {"sample_weight": weights["sample_weight"]}
        if loss.per_sample:
            del weights["sample_weight"]
        for reduction in ("mean", "sum", "none"):
            x, t = make(3, 4), target(3, 4, requires_grad=False)
            yield call(f"plain, {reduction}", x, t, reduction=reduction)
            yield call(f"both, {reduction}", x, target(3, 4), reduction=reduction)
            yield call(f"mask, {reduction}", x, t, mask=mask, reduction=reduction)
            yield call(f"weights, {reduction}", x, target(3, 4), reduction=reduction, **weights)
            yield call(f"weights and mask, {reduction}", x, t, mask=mask, reduction=reduction, **weights)
            for own in loss.options:
                named = ", ".join(f"{k} {v}" for k, v in own.items())
                yield call(f"{named}, {reduction}", x, target(3, 4), reduction=reduction, **own)
        if not loss.per_sample:
            yield call("a number", make(), target())
        yield call("transposed", make(4, 3, requires_grad=False).t().requires_grad_(), target(3, 4))
        channels_last = make(2, 3, 2, 2, requires_grad=False).contiguous(memory_format=torch.channels_last)
        sample = call("channels last", channels_last.requires_grad_(), target(2, 3, 2, 2), reduction="none")
        yield sample.map(_channels_last) if loss.draws else sample
        if not loss.per_sample:
            yield call("weight by sample", make(3, 4), target(3, 4), **by_sample)

    return samples


def fewest_bytes(sample: Sample, gradient: bool) -> tuple[int, int]:
    """Every operand read once; the gradients that are wanted written once."""
    read = sum(t.nbytes for t in sample.tensors())
    return read, sum(t.nbytes for t in sample.args if t.requires_grad) if gradient else 0


def _spec(name: str, reference: Callable[..., Tensor], samples: Callable[..., Iterator[Sample]]) -> LossSpec:
    function = getattr(importlib.import_module(f"fastloss.losses.{name}"), name)
    theirs = getattr(F, name, None)
    # unwrap: torch's own, even where fastloss.patch() is in force.
    theirs = theirs and inspect.unwrap(theirs)
    return LossSpec(name, function, theirs, reference, samples, fewest_bytes, operator="pointwise_")


def reference_cosine(
    input: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    dim: int = -1,
    eps: float = 1e-8,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`fastloss.cosine_distance_loss` in float64, from its definition."""
    x, t, w, counts = _operands(input, target, weight, None, mask)
    product, x_square, t_square = ((w * v).sum(dim) for v in (x * t, x * x, t * t))
    some = counts.any(dim)
    norms = (torch.where(some, x_square, 1.0).sqrt() * torch.where(some, t_square, 1.0).sqrt()).clamp(min=eps)
    distances = torch.where(some, 1 - product / norms, 0.0)
    if reduction == "none":
        return distances
    return distances.sum() if reduction == "sum" else distances.sum() / some.sum()


def _cosine_samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every option, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)
    mask = (torch.arange(12).reshape(3, 4) % 5 != 1).to(device)
    mask[1] = False
    for reduction in ("mean", "sum", "none"):
        x, t = make.normal(3, 4), make.normal(3, 4)
        for name, options in (
            ("plain", {}),
            ("dim 0", {"dim": 0}),
            ("mask", {"mask": mask}),
            ("large eps", {"eps": 9.0}),
        ):
            yield Sample(f"{name}, {reduction}", (x, t), {"reduction": reduction, **options})
        yield Sample(f"weight, {reduction}", (x, t), {"reduction": reduction, "weight": make.positive(4)})
    yield Sample("one vector", (make.normal(5), make.normal(5, requires_grad=False)), {})


_ROOTS = ({"dim": 1}, {"dim": (0, -1), "eps": 0.01}, {"dim": 0}, {"eps": 0.1})
SPECS: Mapping[str, LossSpec] = {
    **{name: _spec(name, _reference(name, loss), _samples(loss)) for name, loss in LOSSES.items()},
    "rmse_loss": _spec("rmse_loss", reference_rmse, _samples(PointwiseLoss(_ROOTS))),
    "cosine_distance_loss": _spec("cosine_distance_loss", reference_cosine, _cosine_samples),
}
