"""What a loss is fed with: seeded predictions and targets of the usual tasks, and what is perfect there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MakeInputs = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


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
        call: ``(loss, prediction, target) -> result`` for a loss of other arguments than these two; the prediction then
            holds all that a gradient is wanted for, as in ``lambda loss, p, t: loss(p[:, 0], p[:, 1], t)``.
        couples_samples: the loss compares the samples of a batch with each other.
    """

    name: str
    make: MakeInputs
    link: Callable[[Tensor], Tensor] | None = None
    perfect: Callable[[Tensor], Tensor] | None = None
    decided: Callable[[Tensor, Tensor], Tensor] | None = None
    classes: bool = False
    huge: float = 1e4
    call: Callable[[Callable[..., object], Tensor, Tensor], object] | None = None
    couples_samples: bool = False


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
    if kind in ("images", "masks", "boxes", "positive", "gaussian"):
        return _real_task(kind, shape)
    if kind in ("embeddings", "pairs", "triplets", "rankings"):
        return _compared_task(kind, classes, shape)
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
    if kind in ("distance", "distance_same", "distance_different"):
        # What the target says of a pair that is close together, and of one that is far apart.
        close, apart = {"distance": (1, -1), "distance_same": (1, 0), "distance_different": (0, 1)}[kind]
        return Task(
            kind,
            lambda n, g: (2 * _normal(g, n, *inner), torch.where(_normal(g, n, *inner) > 0, close, apart).double()),
            link=torch.nn.functional.softplus,
            perfect=lambda t: torch.where(t == close, -20.0, 20.0).double(),
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


def _real_task(kind: str, shape: tuple[int, ...] | None) -> Task:
    """Real numbers of some domain."""
    if kind == "masks":
        return replace(make_task("binary", shape=shape or (1, 4, 4)), name=kind)
    if kind == "images":
        pixels = shape or (3, 16, 16)
        return Task(
            kind,
            lambda n, g: (_normal(g, n, *pixels), torch.rand(n, *pixels, generator=g, dtype=torch.float64)),
            link=torch.sigmoid,
            perfect=lambda t: t.clamp(1e-6, 1 - 1e-6).logit(),
            huge=5.0,
        )
    if kind == "boxes":

        def corners(x: Tensor) -> Tensor:
            center, size = x[..., :2], x[..., 2:].exp()
            return torch.cat([center - size / 2, center + size / 2], -1)

        def from_corners(t: Tensor) -> Tensor:
            low, high = t[..., :2], t[..., 2:]
            return torch.cat([(low + high) / 2, (high - low).log()], -1)

        return Task(
            kind,
            lambda n, g: (0.5 * _normal(g, n, 4), corners(0.5 * _normal(g, n, 4))),
            link=corners,
            perfect=from_corners,
            huge=5.0,
        )
    inner = shape if shape is not None else (3,)
    if kind == "positive":
        return Task(
            kind, lambda n, g: (_normal(g, n, *inner), _normal(g, n, *inner).exp()), torch.exp, torch.log, huge=8.0
        )
    return Task(  # mean and logarithm of the variance; there is no best variance for a mean that is right
        kind,
        lambda n, g: (_normal(g, n, 2, *inner), _normal(g, n, *inner)),
        call=lambda loss, p, t: loss(p[:, 0], t, p[:, 1].exp()),
        huge=8.0,
    )


def _compared_task(kind: str, classes: int, shape: tuple[int, ...] | None) -> Task:
    """Vectors or scores that are compared with each other."""
    inner = shape if shape is not None else (() if kind == "rankings" else (4,))
    if kind == "embeddings":

        def labelled(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
            # At least two of each label, which is what there is to be compared.
            labels = torch.arange(n) % max(1, min(classes, n // 2))
            return _normal(g, n, *inner), labels[torch.randperm(n, generator=g)]

        return Task(kind, labelled, couples_samples=True)
    if kind == "triplets":

        def apart(t: Tensor) -> Tensor:
            best = torch.ones(len(t), 3, *inner, dtype=torch.float64)
            best[:, 2] = -20
            return best

        return Task(
            kind,
            lambda n, g: (_normal(g, n, 3, *inner), torch.zeros(n, dtype=torch.long)),
            perfect=apart,
            call=lambda loss, p, t: loss(p[:, 0], p[:, 1], p[:, 2]),
        )

    def signs(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        return _normal(g, n, 2, *inner), 2 * (torch.randperm(n, generator=g) % 2).double() - 1

    def both(t: Tensor) -> Tensor:
        first = torch.ones(len(t), *inner, dtype=torch.float64) * (20 if kind == "rankings" else 1)
        sign = t.view(-1, *[1] * len(inner))
        return torch.stack([first * sign, -first * sign] if kind == "rankings" else [first, first * sign], 1)

    return Task(kind, signs, perfect=both, call=lambda loss, p, t: loss(p[:, 0], p[:, 1], t))


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
    "distance_same": "non-negative distances (N, D), 1 for close and 0 for apart (N, D)",
    "distance_different": "non-negative distances (N, D), 0 for close and 1 for apart (N, D)",
    "counts": "logarithm of the rate (N, D), counts (N, D)",
    "positive": "positive numbers (N, D), positive numbers (N, D)",
    "masks": "logits (N, 1, H, W), zeros and ones (N, 1, H, W)",
    "images": "numbers in (0, 1) (N, 3, 16, 16), numbers in (0, 1) of that shape",
    "boxes": "x1, y1, x2, y2 (N, 4), the same (N, 4)",
    "embeddings": "vectors (N, D), labels (N); samples are compared with each other",
    "pairs": "two arguments of vectors (N, D), then 1 for alike and -1 (N); as prediction (N, 2, D)",
    "rankings": "two arguments of scores (N), then 1 where the first is to be larger and -1 (N); as prediction (N, 2)",
    "triplets": "anchor, positive, negative (N, D), no target; as prediction (N, 3, D)",
    "gaussian": "mean (N, D), target (N, D), variance (N, D); as prediction (N, 2, D), mean and log of the variance",
}
