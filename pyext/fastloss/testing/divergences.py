"""The divergences of two softmaxes: references and samples."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses.js_divergence_with_logits import js_divergence_with_logits
from ..losses.kl_divergence_with_logits import kl_divergence_with_logits
from ._spec import LossSpec, Maker, Sample


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p log(p / q) over the last dimension, 0 log 0 = 0."""
    nothing = p == 0
    return (p * (torch.where(nothing, 0.0, log_p) - torch.where(nothing, 0.0, log_q))).sum(-1)


def _reference(rows_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reference(
        input: Tensor,
        target: Tensor,
        reduction: str = "mean",
        *,
        temperature: float = 1.0,
        temperature_squared: bool = False,
        class_dim: int | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        **own: Any,
    ) -> Tensor:
        """The loss in float64, from its definition."""
        dim = 0 if input.dim() == 1 else 1 if class_dim is None else class_dim
        s, t = ((x.double().movedim(dim, -1) / temperature).log_softmax(-1) for x in (input, target))
        rows = rows_of(s, t, **own) * (temperature**2 if temperature_squared else 1.0)
        weight = torch.ones_like(rows) if sample_weight is None else sample_weight.double()
        if mask is not None:
            weight = torch.where(mask, weight, 0.0)
        rows = torch.where(weight == 0, 0.0, rows) * weight
        if reduction == "none":
            return rows
        if reduction == "batchmean":
            return rows.sum() / (1 if input.dim() == 1 else input.shape[0])
        return rows.sum() / weight.sum() if reduction == "mean" else rows.sum()

    return reference


def _kl_rows(s: Tensor, t: Tensor, *, direction: str = "forward") -> Tensor:
    return _kl(t.exp(), t, s) if direction == "forward" else _kl(s.exp(), s, t)


def _js_rows(s: Tensor, t: Tensor, *, beta: float = 0.5) -> Tensor:
    m = beta * t.exp() + (1 - beta) * s.exp()
    log_m = torch.where(m == 0, 1.0, m).log()
    return beta * _kl(t.exp(), t, log_m) + (1 - beta) * _kl(s.exp(), s, log_m)


def _samples(*own: dict[str, Any]) -> Callable[[str | torch.device, torch.dtype], Iterator[Sample]]:
    def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
        """Every shape and every option, at sizes that numerical differentiation can afford."""
        make = Maker(device, dtype)

        def pair(*shape: int, teacher: bool = False) -> tuple[Tensor, Tensor]:
            return make.normal(*shape), make.normal(*shape, requires_grad=teacher)

        def call(name: str, operands: tuple[Tensor, Tensor], **options: Any) -> Sample:
            return Sample(name, operands, options)

        def last(x: Tensor) -> Tensor:
            leaf = x.detach().contiguous(memory_format=torch.channels_last)
            return leaf.requires_grad_(x.requires_grad)

        mask = make.classes(3, 4) != 0
        for reduction in ("mean", "sum", "none"):
            for options in own:
                named = ", ".join(f"{k} {v}" for k, v in options.items())
                yield call(f"{named or 'rows'}, {reduction}", pair(4, 5), reduction=reduction, **options)
            options = {"mask": mask, "sample_weight": make.positive(4), "reduction": reduction}
            yield call(f"both, mask, weight, {reduction}", pair(4, 5, teacher=True), **options, **own[-1])
        yield call("no batch", pair(6))
        yield call("temperature", pair(4, 5, teacher=True), temperature=2.0, temperature_squared=True)
        yield call("mask alone", pair(4, 5), mask=mask)
        yield call("class_dim last", pair(2, 3, 5), class_dim=-1, sample_weight=make.positive(2, 3))
        yield call("batchmean, spatial", pair(2, 3, 2, 4, teacher=True), reduction="batchmean")
        yield call("channels last", tuple(last(x) for x in pair(2, 3, 4, 2, teacher=True)))  # type: ignore[arg-type]
        x, t = pair(5, 4, teacher=True)
        yield call("layouts that differ", (x, t.detach().t().contiguous().t().requires_grad_()), **own[-1])
        yield call("many classes", pair(2, 100, teacher=True), **own[-1])

    return samples


def fewest_bytes(sample: Sample, gradient: bool) -> tuple[int, int]:
    """Both logits read once, gradients written once."""
    input, target = sample.args
    written = input.nbytes + (target.nbytes if target.requires_grad else 0)
    return input.nbytes + target.nbytes, written if gradient else 0


def _spec(function: Callable[..., Any], rows_of: Callable[..., Tensor], *own: dict[str, Any]) -> LossSpec:
    forms = (_reference(rows_of), _samples({}, *own), fewest_bytes)
    return LossSpec(function.__name__, function, None, *forms, operator="divergence_")


SPECS: Mapping[str, LossSpec] = {
    "kl_divergence_with_logits": _spec(kl_divergence_with_logits, _kl_rows, {"direction": "reverse"}),
    "js_divergence_with_logits": _spec(js_divergence_with_logits, _js_rows, {"beta": 0.2}),
}
