"""Cross entropy of DTensors: their placements say over which ranks the classes are sharded, and over which the rows.

Each axis of the mesh may shard the classes (one axis at most), shard the rows, or replicate. The classes go to
:func:`fastloss.parallel.cross_entropy`, with the group of that axis. Over the rows each rank has its share of the loss,
divided by what all have to divide by; the sum over them is one number more. Logits in any other placement are
redistributed first, with a warning.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _arguments
from .._arguments import is_dtensor
from .._autograd import rehearsing
from ..formulas import ROW_MAP_KINDS
from ..head.linear_cross_entropy import _logits_dtype
from ..head.linear_cross_entropy import run as run_head
from ..head.linear_token_log_probs import linear_token_log_probs
from ..losses import _rowwise
from ..losses.cross_entropy import CrossEntropyStats, Given
from ..losses.cross_entropy import run as run_whole
from ..token_log_probs import token_log_probs
from .count import summed
from .cross_entropy import Sharded
from .cross_entropy import run as run_sharded
from .linear_cross_entropy import run as run_sharded_head
from .token_log_probs import linear_token_log_probs as sharded_linear_token_log_probs
from .token_log_probs import token_log_probs as sharded_token_log_probs


def _outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A graph break before ``function``, and one that says why."""
    disabled = torch.compiler.disable(
        function,
        reason="losses of DTensors run outside of graphs; without fullgraph=True they are a graph break, and "
        "fastloss.parallel takes this rank's part, .to_local(), into a graph",
    )

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return either


class Axes(NamedTuple):
    """What the axes of a mesh do to logits.

    Attributes:
        mesh: of the logits.
        logits, rows: placements of the logits, and of what has one element for each row.
        classes: the axis that shards the classes, or None.
        data: the axes that shard the rows.
    """

    mesh: Any
    logits: tuple[Any, ...]
    rows: tuple[Any, ...]
    classes: int | None
    data: tuple[int, ...]

    @property
    def replicated(self) -> list[Any]:
        """The placements of what all ranks have."""
        from torch.distributed.tensor import Replicate

        return [Replicate()] * self.mesh.ndim


def axes_of(logits: Any, class_dim: int) -> Axes:
    """Those of logits as they are, or as they should be redistributed."""
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    rows: list[Any] = []
    data: list[int] = []
    classes: int | None = None
    for axis, placement in enumerate(logits.placements):
        kept: Any = Replicate()
        if type(placement) is Shard:  # neither a strided one nor a partial sum
            dim = placement.dim % logits.dim()
            if dim != class_dim or classes is None:
                kept = Shard(dim)
        placements.append(kept)
        rows.append(Replicate())
        if isinstance(kept, Shard):
            if kept.dim == class_dim:
                classes = axis
            else:
                data.append(axis)
                rows[-1] = Shard(kept.dim - (kept.dim > class_dim))
    return Axes(logits.device_mesh, tuple(placements), tuple(rows), classes, tuple(data))


def _placed(value: Any, axes: Axes, placements: Sequence[Any]) -> Any:
    """A DTensor of these placements; a plain tensor is what every rank has of the whole."""
    from torch.distributed.tensor import DTensor

    if not is_dtensor(value):
        value = DTensor.from_local(value, axes.mesh, axes.replicated, run_check=False)
    if tuple(value.placements) != tuple(placements):
        _refuse_to_move(any(not p.is_replicate() and p != q for p, q in zip(value.placements, placements, strict=True)))
        value = value.redistribute(axes.mesh, placements)
    return value


def _refuse_to_move(moves: bool) -> None:
    """What would move between ranks does not in a rehearsal, which one rank may ask for alone."""
    if moves and rehearsing():
        raise NotImplementedError(
            "explain(): of DTensors that the call would redistribute first; give them in the placements that "
            "docs/parallel.md names"
        )


def _local(value: Any, axes: Axes, placements: Sequence[Any], of_all_rows: bool = False) -> Any:
    """This rank's part, differentiable; ``of_all_rows``: each rank's rows have a share in its gradient."""
    from torch.distributed.tensor import Partial

    if value is None:
        return None
    grads = [Partial() if of_all_rows and axis in axes.data else p for axis, p in enumerate(placements)]
    return _placed(value, axes, placements).to_local(grad_placements=grads)


class _SumOverRows(Function):
    """The sum over the ranks along the mesh's axes. Each rank's share of the loss has the gradient of the whole."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, groups: Sequence[Any]) -> Tensor:
        return sum_over(share, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def sum_over(value: Tensor, groups: Sequence[Any]) -> Tensor:
    """Over the ranks of each group in turn."""
    for group in groups:
        value = summed(value, group)
    return value


class Denominators(NamedTuple):
    """What the mean over all rows divides by, and the class weights that go with it."""

    normalizer: Tensor
    weight: Tensor | None


def _counts(target: Tensor, ignored: Sequence[int]) -> Tensor:
    return torch.stack([target.to(torch.int64) == i for i in ignored]).any(0).logical_not()


class OwnClasses(NamedTuple):
    """Those whose weights a rank has, from ``first`` on, where each rank of ``group`` has those of its own."""

    first: int
    group: Any


def denominators(
    target: Tensor,
    soft_rows: Sequence[int] | None,
    g: Given,
    ignored: Sequence[int],
    groups: Sequence[Any],
    own: OwnClasses | None = None,
) -> Denominators:
    """Of rows that are sharded over ``groups``, from this rank's. ``soft_rows``: the shape of rows of probabilities.

    ``own``: which of the classes ``g.weight`` has; None: all.

    The z-loss is divided by the count of the targets instead of their weights' sum, so that with both the weights are
    multiplied by the ratio, see ``chunked.with_denominators``.
    """
    s = None if g.sample_weight is None else g.sample_weight.detach().double()
    if soft_rows is not None:
        shares = torch.ones(list(soft_rows), dtype=torch.float64, device=target.device) if s is None else s
        return Denominators(sum_over(shares.sum(), groups), g.weight)
    counts = _counts(target, ignored)
    shares = torch.where(counts, 1.0 if s is None else s, 0.0).double()
    if g.weight is None:
        return Denominators(sum_over(shares.sum(), groups), None)
    index, none = target.to(torch.int64) - (0 if own is None else own.first), g.weight.shape[0]
    index = torch.where((index >= 0) & (index < none), index, none)  # another rank's, or a bad one, reported later
    per_class = torch.cat([g.weight.detach().double(), shares.new_zeros([1])])
    weights = torch.where(counts, shares * per_class[index], 0.0).sum()
    weights = weights if own is None else summed(weights, own.group)
    count, total = sum_over(torch.stack([shares.sum(), weights]), groups)
    if not g.z_loss:
        return Denominators(total, g.weight)
    ratio = torch.where((count == 0) & (total == 0), 1.0, count / total)  # 1: no target counts
    return Denominators(count, (g.weight.double() * ratio).to(g.weight.dtype))


def _redistributed(function: str, logits: Any, axes: Axes) -> Any:
    if tuple(logits.placements) == axes.logits:
        return logits
    _refuse_to_move(True)
    _arguments.warn(
        f"{function}(): logits in the placements {tuple(logits.placements)} are redistributed to {axes.logits}, which "
        "moves logits between ranks: fastloss takes Shard of the classes over one axis of the mesh, Shard of the rows, "
        "and Replicate. Give the layer before the loss such an output"
    )
    return logits.redistribute(axes.mesh, list(axes.logits))


def _sizes(classes: int, axes: Axes) -> list[int]:
    """The classes of each rank along their axis, as DTensor cuts it."""
    assert axes.classes is not None
    ranks = axes.mesh.size(axes.classes)
    each = -(-classes // ranks)
    return [max(0, min(each, classes - r * each)) for r in range(ranks)]


def _check(function: str, placed: Any, target: Any, g: Given, class_dim: int, shape: torch.Size) -> None:
    """``placed``: on whose mesh the others have to be; ``shape``: of the logits."""
    _arguments.require_tensor("target", target, function)
    mesh = placed.device_mesh
    if mesh.get_coordinate() is None:
        raise ValueError(f"{function}(): this rank is not in the mesh, {mesh}")
    others: Any = (("target", target), ("weight", g.weight), ("sample_weight", g.sample_weight))
    for name, t in others:
        if is_dtensor(t) and t.device_mesh != mesh:
            raise ValueError(
                f"{function}(): {name} is on another device mesh, {t.device_mesh} instead of {mesh}; redistribute "
                "it, or give the whole as a plain tensor"
            )
    rows = [n for d, n in enumerate(shape) if d != class_dim]
    if list(target.shape) not in (rows, list(shape)) and not (rows == [] and target.numel() == 1):
        raise ValueError(
            f"{function}(): the logits of all ranks together have shape {list(shape)}, so that target "
            f"needs shape {rows}, got {list(target.shape)}; what each rank has of it becomes one by "
            "DTensor.from_local(target, mesh, placements)"
        )
    if g.inplace_grad:
        raise ValueError(f"{function}(inplace_grad=True): not for DTensors; leave it out")


@_outside_of_graphs
def run(function: str, input: Any, target: Any, g: Given, row_map: int = 0, map_params: tuple[float, ...] = ()) -> Any:
    """The loss that ``function`` asks for, as a DTensor: replicated, or for ``'none'`` sharded as the rows are."""
    if not is_dtensor(input):
        raise NotImplementedError(
            f"{function}(): target, weight or sample_weight is a DTensor, but input is not; make one of it with "
            "DTensor.from_local(input, mesh, placements)"
        )
    class_dim = (1 if input.dim() > 1 else 0) if g.class_dim is None else g.class_dim
    if not -input.dim() <= class_dim < input.dim():
        raise IndexError(f"Dimension out of range: class_dim is {class_dim}, but input has {input.dim()} dimensions")
    class_dim %= input.dim()
    _check(function, input, target, g, class_dim, input.shape)
    axes = axes_of(input, class_dim)
    soft = target.is_floating_point() and target.shape == input.shape
    rows_shape = torch.Size(n for d, n in enumerate(input.shape) if d != class_dim)
    logits = _redistributed(function, input, axes).to_local(grad_placements=list(axes.logits))
    target = _local(target if soft else target.reshape(rows_shape), axes, axes.logits if soft else axes.rows)
    local_rows = [n for d, n in enumerate(logits.shape) if d != class_dim]

    def local(g: Given, s: Sharded | None) -> Any:
        g = g._replace(class_dim=class_dim)
        return (
            run_whole(function, logits, target, g, row_map, map_params)
            if s is None
            else run_sharded(function, logits, target, g, s)
        )

    p = Problem(function, axes, input.shape[class_dim], rows_shape, local_rows, soft, logits.dtype, row_map, map_params)
    return _solved(p, target, g, local)


class Problem(NamedTuple):
    """What there is to say of a loss of DTensors beside its operands.

    Attributes:
        function: its name.
        axes: of the mesh.
        classes: of all ranks.
        rows_shape, local_rows: the shapes of what has one element for each row, of all ranks and of this one.
        soft: targets are probabilities.
        dtype: of the logits.
        row_map, map_params: number and parameters of what each row's nll is mapped by.
    """

    function: str
    axes: Axes
    classes: int
    rows_shape: torch.Size
    local_rows: Sequence[int]
    soft: bool
    dtype: torch.dtype
    row_map: int
    map_params: tuple[float, ...]


def _solved(p: Problem, target: Tensor, g: Given, local: Callable[[Given, Sharded | None], Any]) -> Any:
    """The loss, from ``local``, which computes that of this rank's rows.

    ``target``: this rank's. ``local`` takes this rank's weights and, where classes are sharded, over which group.
    """
    from torch.distributed.tensor import DTensor

    axes = p.axes
    weight: Any = g.weight
    over_classes: tuple[Any, ...] | None = None
    if weight is not None:
        over_classes = _class_placements(axes)
        by_shard = axes.classes is not None and is_dtensor(weight) and tuple(weight.placements) == over_classes
        over_classes = over_classes if by_shard or (p.soft and axes.classes is not None) else None
        weight = _local(weight, axes, axes.replicated if over_classes is None else over_classes, of_all_rows=True)
    normalizer: Any = g.normalizer
    _refuse_to_move(is_dtensor(normalizer) and not all(p.is_replicate() for p in normalizer.placements))
    g = g._replace(
        weight=weight,
        sample_weight=_local(g.sample_weight, axes, axes.rows),
        normalizer=normalizer.full_tensor() if is_dtensor(normalizer) else normalizer,
    )
    groups = [axes.mesh.get_group(axis) for axis in axes.data]
    ignored = _rowwise.ignore_indices(p.function, g.ignore_index)
    if groups and g.reduction == "mean" and g.normalizer is None:
        own = None
        if over_classes is not None and axes.classes is not None:
            before = _sizes(p.classes, axes)[: axes.mesh.get_local_rank(axes.classes)]
            own = OwnClasses(sum(before), axes.mesh.get_group(axes.classes))
        normalizer, weight = denominators(target, p.local_rows if p.soft else None, g, ignored, groups, own)
        g = g._replace(normalizer=normalizer, weight=weight)
    rounded = _rounded_later(p, target, g) if groups else None
    if rounded is not None:
        g = g._replace(loss_dtype=torch.float32)
    s: Sharded | None = None
    if axes.classes is not None:
        kind, _ = ROW_MAP_KINDS[p.row_map]
        sizes = _sizes(p.classes, axes)
        shard = None if over_classes is None else g.weight
        g = g._replace(weight=None) if over_classes is not None else g
        s = Sharded(axes.mesh.get_group(axes.classes), sizes, shard, kind, p.map_params)

    per_row = g.reduction == "none"
    result = _or_all_raise(p.function, lambda: local(g, s), axes, target)
    loss, stats = result if g.return_stats else (result, None)
    if per_row:
        loss = _of_rows(loss, axes, p.rows_shape)
    else:
        loss = _SumOverRows.apply(loss, groups).to(rounded or loss.dtype) if groups else loss
        loss = DTensor.from_local(loss, axes.mesh, axes.replicated, run_check=False)
    if stats is None:
        return loss
    lse, argmax, entropy = _of_rows((stats.lse, stats.argmax, stats.entropy), axes, p.rows_shape)
    counted = torch.ones(list(p.local_rows), device=target.device) if p.soft else _counts(target, ignored)
    n = counted.sum().double()
    hits = torch.where(n > 0, (stats.accuracy.double() * n).round(), 0.0)  # a whole number, but for rounding
    hits, n = sum_over(torch.stack([hits, n]), groups)
    share = (hits / n).float()
    if g.all_ignored == "zero" and not p.soft:
        share = torch.where(n > 0, share, 0.0)
    accuracy = DTensor.from_local(share, axes.mesh, axes.replicated, run_check=False)
    return loss, CrossEntropyStats(lse, argmax, accuracy, entropy)


# ------------------------------------------------------------------------------------------------------- linear heads


class LinearAxes(NamedTuple):
    """What the axes of a mesh do to logits of ``linear(input, weight, bias)``; ``input``, ``weight``: placements."""

    axes: Axes
    input: tuple[Any, ...]
    weight: tuple[Any, ...]


def _linear_axes(function: str, input: Any, linear_weight: Any) -> LinearAxes:
    """Those of operands as they are, or as they should be redistributed: the weight's placements say who has which
    classes, the input's who has which rows."""
    from torch.distributed.tensor import Replicate, Shard

    if not is_dtensor(linear_weight):
        raise NotImplementedError(
            f"{function}(): input, target or another operand is a DTensor, but the weight is not; make one of it with "
            "DTensor.from_local(weight, mesh, placements)"
        )
    if linear_weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise RuntimeError(
            f"{function}(): for DTensors input needs shape (..., D) and the weight (C, D), got {list(input.shape)} and "
            f"{list(linear_weight.shape)}"
        )
    mesh, last = linear_weight.device_mesh, input.dim() - 1
    over_classes, of_input, logits, data = [], [], [], []
    classes: int | None = None
    given = input.placements if is_dtensor(input) else [Replicate()] * mesh.ndim
    for axis, (w, x) in enumerate(zip(linear_weight.placements, given, strict=True)):
        by_class = classes is None and type(w) is Shard and w.dim % 2 == 0
        by_row = not by_class and type(x) is Shard and x.dim % input.dim() != last
        classes = axis if by_class else classes
        over_classes.append(Shard(0) if by_class else Replicate())
        of_input.append(Shard(x.dim % input.dim()) if by_row else Replicate())
        logits.append(Shard(last) if by_class else of_input[-1])
        if by_row:
            data.append(axis)
    axes = Axes(mesh, tuple(logits), tuple(of_input), classes, tuple(data))
    if tuple(linear_weight.placements) != tuple(over_classes):
        _arguments.warn(
            f"{function}(): a weight in the placements {tuple(linear_weight.placements)} is redistributed to "
            f"{tuple(over_classes)}, which moves it between ranks: fastloss takes Shard(0) over one axis of the mesh, "
            "and Replicate"
        )
    return LinearAxes(axes, tuple(of_input), tuple(over_classes))


def _linear_operands(at: LinearAxes, input: Any, linear_weight: Any, linear_bias: Any) -> tuple[Any, Any, Any]:
    """This rank's. Gathering the input over the axis of the classes is what a column-parallel layer does too."""
    return (
        _local(input, at.axes, at.input),
        _local(linear_weight, at.axes, at.weight, of_all_rows=True),
        _local(linear_bias, at.axes, at.weight, of_all_rows=True),
    )


@_outside_of_graphs
def run_linear(
    function: str,
    input: Any,
    linear_weight: Any,
    linear_bias: Any,
    target: Any,
    g: Given,
    c: Any,
    ignore_index: Any,
    row_map: int,
    map_params: tuple[float, ...],
) -> Any:
    """:func:`run` of ``linear(input, linear_weight, linear_bias)``."""
    at = _linear_axes(function, input, linear_weight)
    axes, last = at.axes, input.dim() - 1
    rows_shape = input.shape[:-1]
    shape = torch.Size((*rows_shape, linear_weight.shape[0]))
    _check(function, linear_weight, target, g, last, shape)
    if axes.classes is not None and not c.options is c.accumulate_in is c.max_rows is None:
        raise NotImplementedError(
            f"{function}(): options, accumulate_in and max_rows are not for a head whose classes are sharded; give "
            "memory_budget"
        )
    soft = target.is_floating_point() and target.shape == shape
    if soft and ignore_index is not None:
        raise RuntimeError(
            "ignore_index cannot be specified when target contains probabilities; give the rows to leave out a "
            "sample_weight of 0"
        )
    x, w, bias = _linear_operands(at, input, linear_weight, linear_bias)
    target = _local(target if soft else target.reshape(rows_shape), axes, axes.logits if soft else axes.rows)

    def local(g: Given, s: Sharded | None) -> Any:
        if s is None:
            return run_head(function, x, w, bias, target, g, c, ignore_index, row_map, map_params)
        return run_sharded_head(function, x, w, bias, target, g, s, c.memory_budget, False)

    g = g._replace(ignore_index=-100 if ignore_index is None else ignore_index)
    dtype = _logits_dtype(function, x, w, bias)
    p = Problem(function, axes, shape[-1], rows_shape, x.shape[:-1], soft, dtype, row_map, map_params)
    return _solved(p, target, g, local)


def _rounded_later(p: Problem, target: Tensor, g: Given) -> torch.dtype | None:
    """The 16-bit dtype to which the sum over the ranks is rounded, instead of each share of it; None: nothing is."""
    dtype = p.dtype
    for t in (target, g.weight) if p.soft else ():
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    dtype = _arguments.autocast_dtype(dtype, target.device)
    return dtype if dtype in _arguments.HALVES and g.loss_dtype is None and g.reduction != "none" else None


_OTHER = 2**16  # an exception that is not of a bad target; more than there are ranks


def _or_all_raise(function: str, local: Callable[[], Any], axes: Axes, target: Tensor) -> Any:
    """What ``local`` returns, where it raises on no rank of the axes of the rows: the others would wait for a rank that
    did, here or in what follows. On CUDA, where errors come late, they are not told."""
    if not target.is_cpu or not axes.data:
        return local()
    result, error = None, None
    try:
        result = local()
    except Exception as e:
        error = e
    kind = 0 if error is None else 1 if isinstance(error, IndexError) else _OTHER
    kinds = int(sum_over(torch.tensor(kind, dtype=torch.int32), [axes.mesh.get_group(axis) for axis in axes.data]))
    if error is not None:
        raise error
    if kinds >= _OTHER:
        raise RuntimeError(f"{function}(): another rank of the mesh raised an exception; see there")
    if kinds:
        raise IndexError(f"{function}(): another rank of the mesh was given a bad target; see there")
    return result


def _class_placements(axes: Axes) -> tuple[Any, ...]:
    """Of class weights that are sharded as the classes are."""
    from torch.distributed.tensor import Shard

    return tuple(Shard(0) if axis == axes.classes else p for axis, p in enumerate(axes.replicated))


def _whole_shape(shape: torch.Size) -> dict[str, Any]:
    """DTensor would take shards to be equal otherwise."""
    stride = [1]
    for n in reversed(shape[1:]):
        stride.insert(0, stride[0] * max(n, 1))
    return {"shape": shape, "stride": tuple(stride[: len(shape)])}


# -------------------------------------------------------------------------------------------------- log-probabilities


@_outside_of_graphs
def run_token_log_probs(function: str, logits: Any, index: Any, **options: Any) -> Any:
    """:func:`fastloss.token_log_probs`, and ``options`` its own: DTensors that are sharded as the rows are."""
    if not is_dtensor(logits):
        raise NotImplementedError(
            f"{function}(): index is a DTensor, but logits are not; make one of them with "
            "DTensor.from_local(logits, mesh, placements)"
        )
    last, rows_shape = logits.dim() - 1, logits.shape[:-1]
    axes = axes_of(logits, last)
    _check(function, logits, index, Given(), last, logits.shape)
    local = _redistributed(function, logits, axes).to_local(grad_placements=list(axes.logits))
    index = _local(index.reshape(rows_shape), axes, axes.rows)
    of_rows: Any = token_log_probs
    if axes.classes is not None:
        of_rows, sizes = sharded_token_log_probs, _sizes(logits.shape[-1], axes)
        options |= {"group": axes.mesh.get_group(axes.classes), "shard_sizes": sizes}
    found = _or_all_raise(function, lambda: of_rows(local, index, **options), axes, index)
    return _of_rows(found, axes, rows_shape)


@_outside_of_graphs
def run_linear_token_log_probs(
    function: str, input: Any, linear_weight: Any, linear_bias: Any, index: Any, **options: Any
) -> Any:
    """:func:`run_token_log_probs` of ``linear(input, linear_weight, linear_bias)``."""
    at = _linear_axes(function, input, linear_weight)
    axes, rows_shape, classes = at.axes, input.shape[:-1], linear_weight.shape[0]
    _check(function, linear_weight, index, Given(), input.dim() - 1, torch.Size((*rows_shape, classes)))
    x, w, bias = _linear_operands(at, input, linear_weight, linear_bias)
    index = _local(index.reshape(rows_shape), axes, axes.rows)
    of_rows: Any = linear_token_log_probs
    options["bias"] = bias
    if axes.classes is not None:
        of_rows, sizes = sharded_linear_token_log_probs, _sizes(classes, axes)
        options["linear_bias_shard"] = options.pop("bias")
        options |= {"group": axes.mesh.get_group(axes.classes), "shard_sizes": sizes}
    found = _or_all_raise(function, lambda: of_rows(x, w, index, **options), axes, index)
    return _of_rows(found, axes, rows_shape)


def _of_rows(found: Any, axes: Axes, rows_shape: torch.Size) -> Any:
    """As DTensors: what has one element for each row, or a tuple of such."""
    from torch.distributed.tensor import DTensor

    if isinstance(found, tuple):
        return tuple(_of_rows(t, axes, rows_shape) for t in found)
    return DTensor.from_local(found, axes.mesh, axes.rows, run_check=False, **_whole_shape(rows_shape))


__all__ = ["run", "run_linear", "run_linear_token_log_probs", "run_token_log_probs"]
