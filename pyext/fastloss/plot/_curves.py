"""Value and gradient of losses along one logit or residual."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnosis.plain_call import callable_loss, guess, name_of
from ..diagnosis.subject import NoGradientError, Subject
from ..diagnosis.tasks import KINDS, Task, make_task
from . import _interactive
from ._figure import COLORS, DASHES, finish, pyplot

Loss = Callable[..., Any]
Point = tuple[float, float, float | None]  # x, value, gradient
_TARGETS = {"regression": 1.0, "binary": 1.0, "binary_probabilities": 1.0, "sign": 1.0, "distance": 1.0, "counts": 3.0}
_LINKS = {
    "class_probabilities": "softmax",
    "log_probabilities": "log_softmax",
    "kl": "log_softmax",
    "binary_probabilities": "sigmoid",
    "distance": "softplus",
}


def curves(
    losses: Loss | Mapping[str, Loss] | Sequence[Loss],
    kind: str | None = None,
    *,
    at: tuple[Tensor, Tensor] | None = None,
    vary: int = 0,
    span: tuple[float, float] | None = None,
    classes: int = 3,
    points: int = 401,
    dtype: torch.dtype = torch.float64,
    title: str | None = None,
    save: str | Path | None = None,
    figure: Any = None,
) -> Any:
    """Draw losses and their gradients as functions of one logit (classification) or residual (regression).

    Jumps of value or gradient are found by bisection: the line ends there, with a dot on either side, and a dot at the
    value in between, if there is one. Where a result is not finite a bar says so: +inf at the upper edge, -inf at the
    lower, nan in the middle. Of a loss without a gradient only the value is
    drawn, and the legend says so. Results that are no scalar are summed.

    Args:
        losses: a loss ``(prediction, target) -> tensor``, function or module, or several: ``{name: loss}`` or a list.
        kind: what they take, one of :data:`fastloss.diagnosis.KINDS`; by default what ``at`` looks like, or else the
            first that the first loss takes.
        at: ``(prediction, target)`` that the line goes through, for a batch of any size, of the kind's shapes; by
            default one sample: logits (1, classes) of zeros and target 0, or target 1 (counts: 3) in regression.
        vary: which entry of the prediction's first sample is varied, counted in memory order: for logits, the class.
        span: where x begins and ends, by default -6 to 6 for logits, -3 to 3 for residuals. ``at`` does not shift it.
        classes: number of classes C, unless ``at`` has them.
        points: evaluations along the line, at least 2; some more find the jumps.
        dtype: of the prediction, and of a floating target: float64 shows the mathematics, float16 what overflows. A
            loss that raises for float64 is given float32.
        title: above the picture.
        save: a path to write to; the suffix says the format. ``.html`` makes a page that needs no other file and no
            network, where the mouse shows values and a click in the legend hides a loss; plotly draws it.
        figure: a matplotlib Figure or SubFigure to draw in, instead of a new one.

    Returns:
        A figure of pyplot with two axes, value and gradient; ``matplotlib.pyplot.close(figure)`` frees it. With a path
        that ends in ``.html`` a ``plotly.graph_objects.Figure``.

    Raises:
        ImportError: no matplotlib (``fastloss[plot]``), or for ``.html`` no plotly (``fastloss[interactive]``).
        TypeError: a loss cannot be called.
        ValueError: losses, kind, at, vary, span or points mean nothing, or ``figure`` comes with ``.html``.
        RuntimeError: a loss raises; the message names it.
    """
    page = _interactive.is_page(save)
    if page and figure is not None:
        raise ValueError("figure= is one of matplotlib's, which save='….html' does not use: leave one of them out")
    plt = _interactive.graph_objects() if page else pyplot()  # before the work, not after it
    named = _named(losses)
    if at is None:
        task = make_task(kind, classes) if kind else guess(next(iter(named.values())), classes, None)[0]
        prediction, target = _default(task, classes)
    else:
        if not (isinstance(at, tuple) and len(at) == 2 and all(isinstance(t, Tensor) and t.numel() for t in at)):
            raise ValueError("at must be a pair of tensors (prediction, target) with at least one sample")
        prediction, target = at
        indices = prediction.dim() > 1 and not target.is_floating_point()
        task = make_task(kind or ("classification" if indices else "regression"), classes)
    prediction = prediction.detach().to(dtype).contiguous()
    entries = prediction[0].numel() if prediction.dim() else 1
    if not 0 <= vary < entries:
        raise ValueError(f"vary is {vary}, but a sample of the prediction has entries 0 to {entries - 1}")
    low, high = span or ((-6.0, 6.0) if task.classes or task.decided else (-3.0, 3.0))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"span must be (low, high) with low < high, both finite; got {span}")
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    residual = task.name == "regression" and prediction.shape == target.shape
    origin = float(target.flatten()[vary]) if residual else 0.0
    # Symmetric about the middle, so that 0 is exactly 0 and not the rounding error of linspace.
    xs = [(low * (points - 1 - i) + high * i) / (points - 1) for i in range(points)]
    lines = {name: _line(name, fn, task, prediction, target, vary, origin, xs) for name, fn in named.items()}

    if residual:
        shown = f"{origin:g}" if prediction.numel() == 1 else f"{origin:g}, {prediction.numel() - 1} more fixed"
        what, xlabel = "residual", f"residual: prediction - target  (target {shown})"
    elif task.classes:
        what, xlabel = "logit", _logits_label(prediction, target, vary)
    else:
        what = "logit" if task.decided else "prediction"
        xlabel = f"{what}  (target {float(target.flatten()[min(vary, target.numel() - 1)]):g})"
    if task.name in _LINKS:
        xlabel += f"; the loss gets {_LINKS[task.name]} of it"
    names = ("value", f"gradient: d value / d {what}")
    drawn = {
        label + ("" if any(p[2] is not None for p in line[0]) else " (no gradient)"): (
            _parts(*line, 1),
            _parts(*line, 2),
        )
        for label, line in lines.items()
    }
    if page:
        return _interactive.write(_interactive.curves(drawn, names, xlabel, (low, high), title), save)
    if figure is None:
        figure = plt.figure(figsize=(9.5, 4.2), layout="constrained", dpi=110)
    axes = figure.subplots(1, 2)
    for axis, column, name in zip(axes, (0, 1), names, strict=True):
        for i, (label, parts) in enumerate(drawn.items()):
            _draw(axis, label, parts[column], i)
        axis.set(title=name, xlabel=xlabel, xlim=(low, high))
        axis.margins(y=0.08)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    if title:
        figure.suptitle(title)
    return finish(figure, save)


def _named(losses: Loss | Mapping[str, Loss] | Sequence[Loss]) -> dict[str, Loss]:
    if isinstance(losses, Mapping):
        named = {str(name): callable_loss(fn) for name, fn in losses.items()}
    else:
        listed: list[Any] = [callable_loss(fn) for fn in (losses if isinstance(losses, (list, tuple)) else [losses])]
        names = [name_of(fn) for fn in listed]
        again = {n for n in names if names.count(n) > 1}
        named = {f"{n} {i + 1}" if n in again else n: fn for i, (n, fn) in enumerate(zip(names, listed, strict=True))}
    if not named:
        raise ValueError("losses is empty: pass a loss, {name: loss} or a list of losses")
    return named


def _default(task: Task, classes: int) -> tuple[Tensor, Tensor]:
    if task.name not in _TARGETS:
        inner = (1, 1) if task.name == "segmentation" else ()
        logits = torch.zeros(1, classes, *inner)
        if task.name in ("probabilities", "kl"):
            return logits, torch.tensor([[0.7] + [0.3 / (classes - 1)] * (classes - 1)], dtype=torch.float64)
        return logits, torch.zeros(1, *inner, dtype=torch.int64)
    target = torch.tensor([_TARGETS[task.name]], dtype=torch.float64)
    return target.clone(), target


def _logits_label(logits: Tensor, target: Tensor, vary: int) -> str:
    row = target.flatten()[0] if not target.is_floating_point() else target[0].flatten()
    shown = f"{int(row)}" if row.dim() == 0 else ", ".join(f"{float(p):.2g}" for p in row[:4])
    others = [f"{float(z):g}" for j, z in enumerate(logits[0].flatten()) if j != vary]
    text = ", ".join(others[:4]) + (", …" if len(others) > 4 else "")
    rest = "" if len(logits) == 1 else f"; {len(logits)} samples"
    return f"logit of class {vary}  (target {shown}; the other logits {text}{rest})"


def _line(
    name: str, fn: Loss, task: Task, prediction: Tensor, target: Tensor, vary: int, origin: float, xs: list[float]
) -> tuple[list[Any], list[list[tuple[float, float]]]]:
    """The points along the line, and the gaps (from, to) of value and of gradient."""
    none: dict[str, Any] = dict.fromkeys(("ignore_index", "reference", "shift_invariant"))
    subject = Subject(fn, task, samples=1, seed=0, **none)  # calls functions and modules alike

    def evaluate(x: float) -> Any:
        there = prediction.clone()
        there.view(-1)[vary] = origin + x
        try:
            value, gradient = subject.value_and_gradient(there, target)
        except NoGradientError:
            return x, subject.value(there, target), None
        except Exception as e:
            if prediction.dtype == torch.float64 and not subject.float32_only and isinstance(e, RuntimeError):
                subject.float32_only = True  # it may hold float32 tensors of its own
                return evaluate(x)
            raise RuntimeError(
                f"{name} raises {type(e).__name__} for a {task.name} prediction of shape {list(prediction.shape)}, "
                f"{prediction.dtype}: {e}; kind=, at= and dtype= choose another (kinds: {', '.join(KINDS)})"
            ) from e
        return x, value, float(gradient.flatten()[vary])

    points = [evaluate(x) for x in xs]
    eps = torch.finfo(torch.float32 if subject.float32_only else prediction.dtype).eps
    gaps: list[list[tuple[float, float]]] = []
    for column in (1, 2):
        found, ends = _gaps(evaluate, [p for p in points if p[column] is not None], column, eps)
        gaps.append(found)
        points = sorted({p[0]: p for p in points + ends}.values(), key=lambda p: p[0])
    return points, gaps


def _gaps(
    evaluate: Callable[[float], Any], points: list[Any], column: int, eps: float
) -> tuple[list[tuple[float, float]], list[Any]]:
    """Where the line must not be drawn through, and the evaluations beside jumps."""
    finite = [p[column] for p in points if math.isfinite(p[column])]
    scale = max(finite) - min(finite) if finite else 0.0
    steps = [abs(b[column] - a[column]) for a, b in itertools.pairwise(points)]
    gaps, ends = [], []
    for i, (low, high) in enumerate(itertools.pairwise(points)):
        beside = max((d for d in steps[max(i - 1, 0) : i] + steps[i + 1 : i + 2] if math.isfinite(d)), default=0.0)
        # A line whose slope varies little from step to step has no jump; one that falls from all to nothing may.
        if not (
            math.isfinite(steps[i]) and steps[i] > 1e-6 * scale and (steps[i] > 1.5 * beside or steps[i] > scale / 20)
        ):
            continue
        rounding = 16 * eps * max(abs(low[column]), abs(high[column]))
        while high[0] - low[0] > 1e-12 * max(1.0, abs(high[0])):
            middle = evaluate((low[0] + high[0]) / 2)
            y = middle[column]
            if y is None or not math.isfinite(y):
                break
            if abs(y - low[column]) > abs(high[column] - y):
                high = middle
            else:
                low = middle
        if abs(high[column] - low[column]) < max(1e-3 * scale, rounding):
            continue  # it was only steep, or is the rounding of the dtype
        gaps.append((low[0], high[0]))
        # Beside a pole the values say nothing but how near one got to it.
        ends += [p for p in (low, high) if min(finite) - scale <= p[column] <= max(finite) + scale]
    return gaps, ends


@dataclass
class Parts:
    """What is drawn of a loss in one of the two pictures.

    Attributes:
        xy: the line; y is nan where it is interrupted.
        dots: on either side of a jump, and a value in between.
        bars: (from, to, name) of points that are ``'nan'``, ``'+inf'`` or ``'-inf'``.
    """

    xy: list[tuple[float, float]]
    dots: list[tuple[float, float]]
    bars: list[tuple[float, float, str]] = field(default_factory=list)


#: The height of a bar for the first loss, and by how much that of the next differs, in parts of the axis.
HEIGHTS = {"nan": (0.5, -0.07), "+inf": (0.96, -0.07), "-inf": (0.04, 0.07)}


def _parts(points: list[Any], gaps: list[list[tuple[float, float]]], column: int) -> Parts:
    points = [(p[0], p[column]) for p in points if p[column] is not None]
    breaks = [((low + high) / 2, math.nan) for low, high in gaps[column - 1]]
    edges = {x for pair in gaps[column - 1] for x in pair}
    parts = Parts(
        sorted([(x, y if math.isfinite(y) else math.nan) for x, y in points] + breaks),
        [(x, y) for x, y in points if x in edges and math.isfinite(y)],
    )
    for name, run in itertools.groupby(points, lambda p: "" if math.isfinite(p[1]) else f"{p[1]:+}".replace("+n", "n")):
        if name:
            xs = [x for x, _ in run]
            parts.bars.append((xs[0], xs[-1], name))
    return parts


def _draw(axis: Any, label: str, parts: Parts, nth: int) -> None:
    color, dashes = COLORS[nth % len(COLORS)], DASHES[nth % len(DASHES)]
    xy = zip(*parts.xy, strict=True) if parts.xy else ((), ())
    axis.plot(*xy, color=color, linestyle=dashes, linewidth=1.8, label=label)
    if parts.dots:
        axis.plot(*zip(*parts.dots, strict=True), "o", color=color, markersize=3.5, zorder=3)
    for first, last, name in parts.bars:
        height = HEIGHTS[name][0] + HEIGHTS[name][1] * nth
        where = {"color": color, "transform": axis.get_xaxis_transform()}
        axis.plot((first, last), (height, height), linewidth=7, alpha=0.3, solid_capstyle="butt", **where)
        axis.plot((first + last) / 2, height, {"nan": "x", "+inf": "^", "-inf": "v"}[name], markersize=7, **where)
        axis.text((first + last) / 2, height, f"   {name}", va="center", **where)
