"""What a loss is fed with: seeded predictions and targets of the usual tasks, and what is perfect there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Maker = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """Inputs of a kind. A loss of your own form: ``Task("mine", make=lambda n, generator: (prediction, target))``.

    Attributes:
        name: shown in the report.
        make: ``(samples, generator) -> (prediction, target)``, float64 prediction, samples along dim 0 of both.
        link: applied to the prediction before the loss sees it (log_softmax for losses of log-probabilities, sigmoid
            for losses of probabilities), so that steps in any direction stay inside the loss's domain.
        perfect: ``target -> prediction`` where the loss should be least, or None where there is no such thing.
        decided: ``(prediction, target) -> bool tensor``, right decisions, where only they can be asked for (logits go
            to infinity); None: the prediction itself has to approach ``perfect``.
        classes: dim 1 of the prediction holds classes.
        huge: magnitude that predictions may reach without the loss overflowing.
    """

    name: str
    make: Maker
    link: Callable[[Tensor], Tensor] | None = None
    perfect: Callable[[Tensor], Tensor] | None = None
    decided: Callable[[Tensor, Tensor], Tensor] | None = None
    classes: bool = False
    huge: float = 1e4


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _one_hot(target: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(target, classes).movedim(-1, 1).double().contiguous()


def _argmax_right(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction.argmax(1) == target


def make_task(kind: str, classes: int = 5, shape: tuple[int, ...] | None = None) -> Task:
    """The task of one of :data:`KINDS`. ``shape`` is what follows (samples,) or (samples, classes)."""
    if kind in ("classification", "class_probabilities", "log_probabilities", "segmentation"):
        inner = shape if shape is not None else ((3, 3) if kind == "segmentation" else ())

        def indices(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
            # Every class occurs, in an order that depends on the seed.
            count = n * int(torch.Size(inner).numel())
            target = (torch.arange(count) % classes)[torch.randperm(count, generator=g)]
            return 2 * _normal(g, n, classes, *inner), target.view(n, *inner)

        task = Task(kind, indices, perfect=lambda t: 20 * _one_hot(t, classes), decided=_argmax_right, classes=True)
        if kind == "class_probabilities":
            return replace(task, link=lambda x: x.softmax(1), huge=5.0)
        return replace(task, link=lambda x: x.log_softmax(1)) if kind == "log_probabilities" else task
    if kind in ("probabilities", "kl"):
        inner = shape if shape is not None else ()
        return Task(
            kind,
            lambda n, g: (2 * _normal(g, n, classes, *inner), _normal(g, n, classes, *inner).softmax(1)),
            link=(lambda x: x.log_softmax(1)) if kind == "kl" else None,
            perfect=lambda t: t.log(),
            classes=True,
        )
    inner = shape if shape is not None else (3,)
    if kind in ("binary", "binary_probabilities"):
        return Task(
            kind,
            lambda n, g: (2 * _normal(g, n, *inner), (_normal(g, n, *inner) > 0).double()),
            link=torch.sigmoid if kind == "binary_probabilities" else None,
            perfect=lambda t: 40 * t - 20,
            decided=lambda p, t: (p > 0) == (t > 0.5),
            # A probability of exactly 0 or 1 has no information left: log-odds of 10 are as far as float16 can tell.
            huge=1e4 if kind == "binary" else 5.0,
        )
    if kind == "sign":
        return Task(
            kind,
            lambda n, g: (2 * _normal(g, n, *inner), 2 * (_normal(g, n, *inner) > 0).double() - 1),
            perfect=lambda t: 20 * t,
            decided=lambda p, t: (p > 0) == (t > 0),
        )
    if kind == "distance":  # target 1: close together, -1: far apart
        return Task(
            kind,
            lambda n, g: (2 * _normal(g, n, *inner), 2 * (_normal(g, n, *inner) > 0).double() - 1),
            link=torch.nn.functional.softplus,
            perfect=lambda t: -20 * t,
        )
    if kind == "counts":
        return Task(
            kind,
            lambda n, g: (_normal(g, n, *inner), (4 * _normal(g, n, *inner).abs()).round() + 1),
            perfect=lambda t: t.log(),
            huge=8.0,
        )
    if kind == "regression":
        return Task(
            kind, lambda n, g: (2 * _normal(g, n, *inner), 2 * _normal(g, n, *inner)), perfect=lambda t: t.clone()
        )
    raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}, or a fastloss.diagnosis.Task")


#: What each kind feeds the loss with.
KINDS = {
    "classification": "logits (N, C), class indices (N)",
    "class_probabilities": "probabilities (N, C), class indices (N)",
    "log_probabilities": "log-probabilities (N, C), class indices (N)",
    "segmentation": "logits (N, C, H, W), class indices (N, H, W)",
    "probabilities": "logits (N, C), probabilities (N, C)",
    "kl": "log-probabilities (N, C), probabilities (N, C)",
    "regression": "real numbers (N, D), real numbers (N, D)",
    "binary": "logits (N, D), zeros and ones (N, D)",
    "binary_probabilities": "probabilities (N, D), zeros and ones (N, D)",
    "sign": "real numbers (N, D), -1 and 1 (N, D)",
    "distance": "non-negative distances (N, D), 1 for close and -1 for apart (N, D)",
    "counts": "logarithm of the rate (N, D), counts (N, D)",
}
