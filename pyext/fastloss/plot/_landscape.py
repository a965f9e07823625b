"""The loss of a model on a plane through its parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._progress import progress_bar
from . import _interactive
from ._figure import COLORS, finish, pyplot

Direction = dict[str, Tensor]


@dataclass
class Scale:
    """How losses become heights and colours.

    Attributes:
        low, high: the least and the largest finite loss, some room around them if they are equal.
        log: whether the scale is logarithmic.
        levels: 25, from low to high, where contours lie.
        not_finite: how many losses are not, in words; empty if all are.
    """

    low: float
    high: float
    log: bool
    levels: list[float]
    not_finite: str

    @property
    def name(self) -> str:
        return "loss (logarithmic)" if self.log else "loss"

    def shade(self, loss: float) -> float:
        """What is linear in the picture."""
        return math.log10(loss) if self.log else loss

    def text(self, loss: float) -> str:
        return f"{loss:{'.2g' if self.log else '.4g'}}"


@dataclass
class Landscape:
    """The loss at ``parameters + a * directions[0] + b * directions[1]``.

    Attributes:
        a: [A] and b: [B], coordinates of the grid, float64.
        value: [B, A], float64; not finite where the loss is not.
        center: the loss of the model itself, at (0, 0).
        directions: two, each a tensor per parameter that is moved, of its name and shape.
        labels: of the axes.
        title: what was measured.
        path: [checkpoints, 2], the checkpoints projected onto the plane; None without checkpoints.
        path_value: [checkpoints], the loss at these points of the plane.
    """

    a: Tensor
    b: Tensor
    value: Tensor
    center: float
    directions: tuple[Direction, Direction]
    labels: tuple[str, str]
    title: str
    path: Tensor | None = None
    path_value: Tensor | None = None

    def _scale(self, log: bool | None) -> Scale:
        """``log`` as for :func:`landscape`."""
        value = self.value
        finite = value[value.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        if log and low <= 0:
            warnings.warn(f"log=True, but the least loss is {low:g}: the scale is linear", stacklevel=4)
        log = low > 0 and (log if log is not None else high > 30 * low)
        if high - low <= 1e-12 * max(abs(low), abs(high)):  # flat: one colour, no lines
            low, high, log = low - 0.5, high + 0.5, False
        parts = [i / 24 for i in range(1, 24)]
        between = [low * (high / low) ** t if log else low + (high - low) * t for t in parts]
        kinds = {"nan": value.isnan(), "+inf": value == math.inf, "-inf": value == -math.inf}
        counts = ", ".join(f"{int(mask.sum())} {name}" for name, mask in kinds.items() if mask.any())
        text = f"not finite: {counts} of {value.numel()}" if counts else ""
        return Scale(low, high, log, [low, *between, high], text)

    def draw(self, *, log: bool | None = None, save: str | Path | None = None) -> Any:
        """Contours and surface side by side; arguments and figure as :func:`landscape`."""
        if _interactive.is_page(save):
            return _interactive.write(_interactive.landscape(self, self._scale(log)), save)
        plt = pyplot()
        import numpy as np
        from matplotlib import colors, patheffects, ticker
        from matplotlib.patches import Patch

        scale = self._scale(log)
        low, high, log, levels = scale.low, scale.high, scale.log, scale.levels
        value = self.value.numpy()
        shown = np.ma.masked_invalid(value)
        norm = colors.LogNorm(low, high) if log else colors.Normalize(low, high)
        figure = plt.figure(figsize=(11, 5.2), layout="constrained", dpi=110)
        left = figure.add_subplot(1, 2, 1)
        left.set_facecolor("#e0e0e0")
        left.patch.set(hatch="xxx", edgecolor="#a0a0a0")
        handles: list[Any] = []
        some = bool(self.value.isfinite().any())
        if some:
            filled = left.contourf(self.a, self.b, shown, levels, norm=norm, cmap="viridis")
            lines = left.contour(self.a, self.b, shown, levels[2:-1:4], norm=norm, colors="white", linewidths=0.7)
            left.clabel(lines, fmt=scale.text, fontsize=7.5)
            bar = figure.colorbar(filled, ax=left, label=scale.name, pad=0.02)
            bar.set_ticks(levels[::4], labels=[scale.text(v) for v in levels[::4]])
            bar.ax.yaxis.set_minor_locator(ticker.NullLocator())
        if scale.not_finite:
            handles.append(Patch(facecolor="#e0e0e0", edgecolor="#a0a0a0", hatch="xxx", label=scale.not_finite))
        edge = [patheffects.withStroke(linewidth=3.2, foreground="black")]
        if self.path is not None:
            style = {"color": "white", "linewidth": 1.4, "markersize": 4.5, "path_effects": edge}
            handles += left.plot(*self.path.T, "o-", label=f"training run, {len(self.path)} points", **style)
            handles += left.plot(*self.path[0], "s", label="its start", **{**style, "markersize": 7})
        mark = {"color": COLORS[4], "markersize": 14, "markeredgecolor": "black"}
        handles += left.plot(0, 0, "*", label=f"the model, loss {self.center:.4g}", linestyle="none", **mark)
        left.set(xlabel=self.labels[0], ylabel=self.labels[1], title="contours")

        right = figure.add_subplot(1, 2, 2, projection="3d", computed_zorder=False)

        def height(z: Any) -> Any:  # matplotlib has no logarithmic axis in space
            return np.log10(np.where(np.isfinite(z), z, np.nan)) if log else np.where(np.isfinite(z), z, np.nan)

        if some:
            x, y = np.meshgrid(self.a, self.b)
            face = plt.get_cmap("viridis")(norm(shown))
            right.plot_surface(x, y, height(value), facecolors=face, rcount=200, ccount=200, linewidth=0, shade=False)
        if self.path is not None and self.path_value is not None:
            right.plot(*self.path.T, height(self.path_value.numpy()), "o-", zorder=4, **style)
        if math.isfinite(self.center):
            right.plot([0], [0], [height(self.center)], "*", zorder=5, **mark)
        right.set(xlabel=self.labels[0].split(":")[0], ylabel=self.labels[1].split(":")[0], title="surface")
        right.set_zlabel(scale.name, labelpad=8)
        for axis in (right.xaxis, right.yaxis, right.zaxis):
            axis.set_major_locator(ticker.MaxNLocator(5))
            axis.set_tick_params(labelsize=8)
        if log:
            right.zaxis.set_major_formatter(ticker.FuncFormatter(lambda z, _: f"{10**z:.2g}"))
        right.set_box_aspect(None, zoom=0.86)
        right.view_init(elev=35, azim=-60)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.suptitle(self.title)
        return finish(figure, save)


def landscape(
    model: torch.nn.Module,
    loss: Callable[..., Any],
    batch: tuple[Any, Tensor],
    *,
    points: int = 31,
    extent: float | None = None,
    checkpoints: Sequence[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    log: bool | None = None,
    progress: bool | None = None,
    save: str | Path | None = None,
) -> Any:
    """Draw the loss on a plane through the model's parameters, as contours and as a surface.

    After Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural Nets" (2018,
    arXiv:1712.09913). Without checkpoints: two random directions, normalised by filter: each slice along dim 0 of a
    parameter (an output neuron, a convolution's filter) has the norm of the model's own; parameters with fewer than two
    dimensions (biases, batch normalisation) are left where they are. With checkpoints: the first two principal
    components of all parameters along the training run; buffers stay the model's. A plane shows two of very many
    directions: what is convex here need not be so elsewhere.

    The model is evaluated in its present mode (``model.eval()`` first, if dropout and batch statistics should not act)
    with the same random numbers everywhere. It is not changed, nor is the state of torch's generators. Parameters that
    require no gradient stay fixed, unless none does.

    Args:
        model: any module for which ``loss(model(inputs), target)`` is a scalar.
        loss: ``(output, target) -> tensor``, function or module, reduced to one number.
        batch: ``(inputs, target)``; inputs that are a tuple or a dict become several arguments.
        points: along each side of the grid, points**2 evaluations; if odd, and without checkpoints, the model is one.
        extent: without checkpoints half the side of the square, by default 1, the norm of each filter; with checkpoints
            the margin around their path as a fraction of its size, by default 0.25.
        checkpoints: copies of ``model.state_dict()`` in order of time, at least one that differs from the model; the
            path ends at the model. They are put into one matrix, [checkpoints, parameters] in float64.
        seed: of the random directions and of what the model draws.
        log: logarithmic scale; by default where the largest finite loss is more than 30 times the least, above zero.
        progress: a bar of tqdm on stderr, where that is installed; by default on a terminal, after a second.
        save: a path to write to; the suffix says the format. ``.html`` makes a page that needs no other file and no
            network, where the mouse turns the surface and shows values; plotly draws it.

    Returns:
        A figure of pyplot; ``matplotlib.pyplot.close(figure)`` frees it. Points that are not finite are hatched and
        counted in the legend. With a path that ends in ``.html`` a ``plotly.graph_objects.Figure``.
        :func:`measure_landscape` returns the numbers instead.

    Raises:
        ImportError: no matplotlib (``fastloss[plot]``), or for ``.html`` no plotly (``fastloss[interactive]``).
        TypeError, ValueError: an argument means nothing; the message names it. The model's and the loss's own errors.
    """
    _interactive.graph_objects() if _interactive.is_page(save) else pyplot()  # before the work, not after it
    measured = measure_landscape(
        model, loss, batch, points=points, extent=extent, checkpoints=checkpoints, seed=seed, progress=progress
    )
    return measured.draw(log=log, save=save)


def measure_landscape(
    model: torch.nn.Module,
    loss: Callable[..., Any],
    batch: tuple[Any, Tensor],
    *,
    points: int = 31,
    extent: float | None = None,
    checkpoints: Sequence[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Landscape:
    """The numbers of :func:`landscape`, without drawing: same arguments and errors; matplotlib is not needed."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"loss must be callable, got {type(loss).__name__}")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"batch must be a pair (inputs, target), got {type(batch).__name__}")
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    extent = (1.0 if checkpoints is None else 0.25) if extent is None else extent
    if not (math.isfinite(extent) and extent > 0):
        raise ValueError(f"extent must be positive and finite, got {extent}")
    every = {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point()}
    weights = {n: every[n] for n, p in model.named_parameters() if n in every and p.requires_grad} or every
    if not weights:
        raise ValueError("model has no floating-point parameters: there is nothing to move")
    generator = torch.Generator().manual_seed(seed)
    path = None
    if checkpoints is None:
        directions = _random(weights, generator), _random(weights, generator)
        if not any(bool(d.any()) for d in directions[0].values()):
            raise ValueError("model has no parameters of two or more dimensions, and biases alone are not moved")
        labels = tuple(f"direction {i}: 1 is the norm of each filter" for i in (1, 2))
        a = b = _grid(-extent, extent, points)
        how = f"random filter-normalised directions, seed {seed}"
    else:
        directions, path, labels = _principal(weights, checkpoints, generator)
        low, high = path.min(0).values, path.max(0).values
        margin = extent * float((high - low).max())
        a, b = (_grid(float(low[i]) - margin, float(high[i]) + margin, points) for i in (0, 1))
        how = "plane of the training run, through the model"

    inputs, target = batch
    buffers = dict(model.named_buffers())
    devices = {t.device.index for t in (*weights.values(), *buffers.values()) if t.device.type == "cuda"}
    bar = progress_bar("loss landscape", points**2 + (0 if path is None else len(path)) + 1, progress)

    def evaluate(row: Direction, alpha: float) -> float:
        """The loss at row + alpha * directions[0], on copies: functional_call leaves the model alone."""
        moved = {n: torch.add(w, directions[0][n], alpha=alpha) for n, w in row.items()}
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
            generator.manual_seed(seed)
        state = {**moved, **{n: b.clone() for n, b in buffers.items()}}
        args = inputs if isinstance(inputs, (tuple, list)) else () if isinstance(inputs, Mapping) else (inputs,)
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        value = loss(torch.func.functional_call(model, state, tuple(args), kwargs), target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return one number, got {got}: reduce it, with reduction='mean' for example")
        bar.update()
        return float(value)

    def row(beta: float) -> Direction:
        return {n: torch.add(w, directions[1][n], alpha=beta) for n, w in weights.items()}

    with bar, torch.no_grad(), torch.random.fork_rng(sorted(devices), device_type="cuda"):
        center = evaluate(weights, 0.0)
        value = [[evaluate(line, alpha) for alpha in a.tolist()] for line in map(row, b.tolist())]
        path_value = None if path is None else [evaluate(row(beta), alpha) for alpha, beta in path.tolist()]
    name = getattr(loss, "__name__", None) or type(loss).__name__
    return Landscape(
        a,
        b,
        torch.tensor(value, dtype=torch.float64),
        center,
        directions,
        (labels[0], labels[1]),
        f"{name} of {type(model).__name__}: {how}",
        path,
        None if path_value is None else torch.tensor(path_value, dtype=torch.float64),
    )


def _grid(low: float, high: float, points: int) -> Tensor:
    """Like linspace, but exactly symmetric where low is -high, so that 0 is 0."""
    i = torch.arange(points, dtype=torch.float64)
    return (low * (points - 1 - i) + high * i) / (points - 1)


def _random(weights: Direction, generator: torch.Generator) -> Direction:
    """Filter-normalised: |d[i]| = |w[i]| for every slice i along dim 0; zero for biases and the like."""
    direction = {}
    for name, w in weights.items():
        d = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        if w.dim() < 2:
            d.zero_()
        else:
            norms = [t.flatten(1).norm(dim=1) for t in (w.to("cpu", torch.float64), d)]
            d *= (norms[0] / norms[1].clamp_min(1e-300)).view(-1, *[1] * (w.dim() - 1))
        direction[name] = d.to(w)
    return direction


def _principal(
    weights: Direction, checkpoints: Sequence[Mapping[str, Tensor]], generator: torch.Generator
) -> tuple[tuple[Direction, Direction], Tensor, tuple[str, str]]:
    """Two orthonormal directions, the checkpoints' coordinates in them relative to the model, the axes' labels."""
    if isinstance(checkpoints, Mapping) or not len(checkpoints):
        raise ValueError("checkpoints must be a list of at least one state_dict, in order of time")
    for i, state in enumerate(checkpoints):
        for name, w in weights.items():
            if name not in state:
                raise ValueError(f"checkpoints[{i}] has no parameter {name!r}: pass copies of model.state_dict()")
            if state[name].shape != w.shape:
                got, expected = list(state[name].shape), list(w.shape)
                raise ValueError(f"checkpoints[{i}][{name!r}] has shape {got}, the model's has {expected}")
    origin = _flat(weights, weights)
    moved = torch.stack([_flat(state, weights) for state in checkpoints]) - origin  # [checkpoints, parameters]
    if not bool(moved.isfinite().all()):
        bad = [i for i, row in enumerate(moved) if not bool(row.isfinite().all())]
        raise ValueError(f"checkpoints {bad} or the model have parameters that are not finite: leave those out")
    if bool(moved[-1].any()):
        moved = torch.cat([moved, moved.new_zeros(1, moved.shape[1])])  # the path ends at the model
    _, singular, components = torch.linalg.svd(moved - moved.mean(0), full_matrices=False)
    if not bool(singular.any()):
        raise ValueError(
            "checkpoints are all equal to the model: state_dict() refers to the live parameters, keep "
            "copy.deepcopy(model.state_dict()) of each"
        )
    share = (singular**2 / (singular**2).sum()).tolist()
    labels = [f"principal component {i + 1}: {part:.1%} of the path's variance" for i, part in enumerate(share[:2])]
    plane = components[:2].clone()
    if len(share) < 2 or share[1] < 1e-12:  # a straight path has no second direction
        other = _flat(_random(weights, generator), weights)
        other -= (other @ plane[0]) * plane[0]
        plane, labels[1:] = (
            torch.stack([plane[0], other / other.norm().clamp_min(1e-300)]),
            ["random direction: the path is straight"],
        )
    # The sign of a component means nothing: the run begins on the left, below.
    plane *= torch.where(moved[0] @ plane.T > 0, -1.0, 1.0).double()[:, None]
    sizes = [w.numel() for w in weights.values()]
    first, second = (
        {n: part.view(w.shape).to(w) for (n, w), part in zip(weights.items(), row.split(sizes), strict=True)}
        for row in plane
    )
    return (first, second), moved @ plane.T, (labels[0], labels[1])


def _flat(state: Mapping[str, Tensor], weights: Direction) -> Tensor:
    return torch.cat([state[n].detach().to("cpu", torch.float64).flatten() for n in weights])
