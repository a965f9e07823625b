"""The smallest input that shows a fault: fewer samples, classes and columns, then plainer numbers, while it lasts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
EVALUATIONS, SECONDS = 150, 1.0  # at most, for one fault


def shrink(
    prediction: Tensor,
    target: Tensor,
    shows: Callable[[Tensor, Tensor], bool],
    *,
    classes: bool,
    plain: bool,
    seconds: float = SECONDS,
) -> Pair:
    """Greedy: a simpler input is kept if it still shows the fault. ``classes``: dim 1 of the prediction holds classes.

    ``plain``: numbers may be rounded, too; not where the domain is unknown.
    """
    best, end, left = (prediction, target), time.perf_counter() + seconds, EVALUATIONS

    def tried(p: Tensor, t: Tensor) -> bool:
        nonlocal best, left
        if left <= 0 or time.perf_counter() > end:
            return False
        if torch.equal(p, best[0]) and torch.equal(t, best[1]):
            return False
        left -= 1
        try:
            if not shows(p, t):
                return False
        except Exception:
            return False
        best = p, t
        return True

    pairs = _dims(prediction, target, classes)
    for p_dim, t_dim in pairs:
        _fewer(lambda: best, p_dim, t_dim, tried)
    if classes:
        for c in range(prediction.shape[1] - 1, -1, -1):
            without = _without_class(*best, c)
            if without is not None:
                tried(*without)
    if plain and prediction.numel():
        _plainer_target(lambda: best, classes, tried)
        _plainer_prediction(lambda: best, tried)
    return best


def _dims(prediction: Tensor, target: Tensor, classes: bool) -> list[tuple[int, int]]:
    """Dimensions that prediction and target share: samples, then the trailing ones (classes have their own rule)."""
    pairs = [(0, 0)]
    for p, t in zip(range(prediction.dim() - 1, 0, -1), range(target.dim() - 1, 0, -1), strict=False):
        if prediction.shape[p] != target.shape[t] or (classes and p == 1):
            break
        pairs.append((p, t))
    return pairs


def _fewer(best: Callable[[], Pair], p_dim: int, t_dim: int, tried: Callable[[Tensor, Tensor], bool]) -> None:
    size = best()[0].shape[p_dim]

    def chosen(keep: list[int]) -> bool:
        p, t = best()
        index = torch.tensor(keep)
        return tried(p.index_select(p_dim, index), t.index_select(t_dim, index))

    if size < 2 or any(chosen([i]) for i in range(min(size, 8))):
        return
    chunk = size // 2
    while chunk and best()[0].shape[p_dim] > 2:
        size = best()[0].shape[p_dim]
        if not any(chosen([*range(i), *range(i + chunk, size)]) for i in range(0, size - chunk + 1, chunk)):
            chunk //= 2
        chunk = min(chunk, best()[0].shape[p_dim] - 1)


def _without_class(p: Tensor, t: Tensor, c: int) -> Pair | None:
    if p.shape[1] <= 2:
        return None
    keep = torch.tensor([i for i in range(p.shape[1]) if i != c])
    if t.is_floating_point():
        t = t.index_select(1, keep) if t.shape == p.shape else t
        return (p.index_select(1, keep), t / t.sum(1, keepdim=True)) if bool((t.sum(1) > 0).all()) else None
    return None if bool((t == c).any()) else (p.index_select(1, keep), torch.where(t > c, t - 1, t))


def _plainer_target(best: Callable[[], Pair], classes: bool, tried: Callable[[Tensor, Tensor], bool]) -> None:
    """Rounded, but what is not zero stays so: zero is a point of its own."""
    p, t = best()
    if not t.is_floating_point():
        return
    if not classes and p.shape == t.shape and tried(p - t + t.sign(), t.sign()):  # the same residual
        return
    for rounded in (*(() if classes else (t.sign(),)), *(t.round(decimals=digits) for digits in (0, 1, 2))):
        p = best()[0]
        if classes:
            rounded = rounded.scatter_add(1, t.argmax(1, keepdim=True), 1 - rounded.sum(1, keepdim=True))
        else:
            rounded = torch.where(rounded == 0, t, rounded)
        if tried(p, rounded):
            return


def _plainer_prediction(best: Callable[[], Pair], tried: Callable[[Tensor, Tensor], bool]) -> None:
    # All zeros is a point of its own, taken only where rounder numbers are not to be had. (+ 0.0: no -0.0.)
    rounder = [best()[0].round(decimals=digits) + 0.0 for digits in (0, 1, 2)]
    rounder = [r for r in rounder if bool(r.any())] + [torch.zeros_like(rounder[0])]
    any(tried(r, best()[1]) for r in rounder)
    for factor in (0.5, 0.9):  # how huge must it be
        while best()[0].isfinite().all() and best()[0].abs().max() > 4:
            if not tried((best()[0] * factor).round() + 0.0, best()[1]):
                break
    for i in range(min(best()[0].numel(), 24)):
        for number in (0.0, 1.0):
            p, t = best()
            q = p.clone()
            if not q.view(-1)[i].isfinite() or float(q.view(-1)[i]) == 0:
                break
            q.view(-1)[i] = number
            if bool(q.any()) and tried(q, t):
                break
