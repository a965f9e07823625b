"""torch's losses of vectors, and of several labels for each sample: references and samples."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ._spec import LossSpec, Maker, Sample
from .pointwise import fewest_bytes


def reduced(each: Tensor, reduction: str) -> Tensor:
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


def reference_cosine_embedding(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0, *, reduction: str = "mean"
) -> Tensor:
    """:func:`fastloss.cosine_embedding_loss` in float64, from its definition."""
    x, y = input1.double(), input2.double()
    squares = ((x * x).sum(-1) + 1e-12) * ((y * y).sum(-1) + 1e-12)
    cosine = (x * y).sum(-1) / squares.sqrt()
    zero = torch.zeros_like(cosine)
    each = torch.where(target == 1, 1 - cosine, torch.where(target == -1, F.relu(cosine - margin), zero))
    return reduced(each, reduction)


def _cosine_embedding_samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every option, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)
    sides = torch.tensor([1, -1, 1, -1, 0], device=device)
    x, y = make.normal(5, 3), make.normal(5, 3)
    for reduction in ("mean", "sum", "none"):
        yield Sample(f"pairs, {reduction}", (x, y, sides), {"reduction": reduction})
        options = {"margin": 0.25, "reduction": reduction}
        yield Sample(f"margin, {reduction}", (x, y, sides.to(dtype)), options)
    yield Sample("one vector for all", (x, make.normal(1, 3), sides), {})
    yield Sample("one pair", (make.normal(4), make.normal(4), torch.tensor(-1, device=device)), {"margin": -0.9})
    yield Sample("transposed", (make.normal(3, 5, requires_grad=False).t().requires_grad_(), y, sides), {})


def reference_triplet_margin(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    *,
    reduction: str = "mean",
) -> Tensor:
    """:func:`fastloss.triplet_margin_loss` in float64, from its definition."""
    a, b, c = anchor.double(), positive.double(), negative.double()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x - y + eps, p, -1)

    far = torch.minimum(distance(a, c), distance(b, c)) if swap else distance(a, c)
    return reduced(F.relu(margin + distance(a, b) - far), reduction)


def _triplet_samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every option, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)
    a, b, c = make.normal(4, 3), make.normal(4, 3), make.normal(4, 3)
    for reduction in ("mean", "sum", "none"):
        yield Sample(f"triples, {reduction}", (a, b, c), {"reduction": reduction})
        yield Sample(f"swap, {reduction}", (a, b, c), {"swap": True, "margin": 2.5, "reduction": reduction})
    for p in (1.0, 3.0, 1.5):
        yield Sample(f"p {p}", (a, b, c), {"p": p, "eps": 0.1, "reduction": "none"})
    yield Sample("broadcast", (make.normal(2, 1, 3), make.normal(1, 2, 3), make.normal(1, 1, 3)), {"margin": 3.0})
    yield Sample("one triple", (make.normal(5), make.normal(5), make.normal(5)), {"margin": 3.0})


def reference_multilabel_soft_margin(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """:func:`fastloss.multilabel_soft_margin_loss` in float64, from its definition."""
    x, t = input.double(), target.double()
    values = t * F.softplus(-x) + (1 - t) * F.softplus(x)
    return reduced((values if weight is None else values * weight.double()).mean(-1), reduction)


def _multilabel_samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Every option, at sizes that numerical differentiation can afford."""
    make = Maker(device, dtype)
    x, t = make.normal(3, 4), make.probabilities(3, 4)
    for reduction in ("mean", "sum", "none"):
        yield Sample(f"plain, {reduction}", (x, t), {"reduction": reduction})
        options = {"weight": make.positive(4).requires_grad_(), "reduction": reduction}
        yield Sample(f"weight, {reduction}", (x, make.probabilities(3, 4, requires_grad=True)), options)
    yield Sample("integer targets", (x, (t > 0.2).long()), {"weight": make.positive(4), "reduction": "none"})
    yield Sample("one sample", (make.normal(5), make.probabilities(5)), {"reduction": "none"})


def _spec(name: str, reference: Callable[..., Tensor], samples: Callable[..., Iterator[Sample]]) -> LossSpec:
    function = getattr(importlib.import_module(f"fastloss.losses.{name}"), name)
    theirs = inspect.unwrap(getattr(F, name))  # torch's own, even where fastloss.patch() is in force
    return LossSpec(name, function, theirs, reference, samples, fewest_bytes, operator="pointwise_")


SPECS: Mapping[str, LossSpec] = {
    "cosine_embedding_loss": _spec("cosine_embedding_loss", reference_cosine_embedding, _cosine_embedding_samples),
    "triplet_margin_loss": _spec("triplet_margin_loss", reference_triplet_margin, _triplet_samples),
    "multilabel_soft_margin_loss": _spec(
        "multilabel_soft_margin_loss", reference_multilabel_soft_margin, _multilabel_samples
    ),
}
