"""Cross entropy of rows whose classes lie in several shards: statistics of each, merged, and the gradient of each.

The fused operators read logits of all classes at once. Here the classes are cut into ranges, one per device or per
chunk of a head, and only O(rows) numbers pass between them:

1. :func:`row_stats` reads the logits of one range once and gives three numbers per row;
2. :func:`merge_row_stats` combines those of all ranges, in the order given: the same order gives the same bits;
3. :func:`finish_row_stats` makes of them the loss, and what the gradient needs;
4. :func:`row_gradient` reads the logits of one range again and writes their gradient.

Any split gives the loss and the gradient of the whole, but for rounding::

    options = RowOptions(total_classes=6, label_smoothing=0.1)
    stats = [row_stats(x, target, options, class_offset=o) for o, x in ((0, logits[:, :2]), (2, logits[:, 2:]))]
    loss, saved, *_ = finish_row_stats(merge_row_stats(stats), target, options)
    one = torch.ones_like(loss)
    grad = torch.cat([row_gradient(logits[:, :2], target, saved, one, options, class_offset=0),
                      row_gradient(logits[:, 2:], target, saved, one, options, class_offset=2)], 1)

Nothing here records autograd's graph; who composes these functions does that. Everything but the messages of bad
arguments is free of synchronisation with a GPU.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _arguments, formulas
from ._autograd import accum_dtype
from ._library import DTYPE_CODES, ops
from .formulas import ALL_IGNORED_ZERO, ROW_MAPS, ZERO_TIMES_INF
from .losses.cross_entropy import STATS

# Fields of the statistics, as in csrc/rowwise/cross_entropy.h (Stat).
REF, OTHERS, TARGET, DOT, MASS = range(5)
BEST, BEST_AT, EXP_DOT = -3, -2, -1


# ------------------------------------------------------------------------------------------------------ row maps


def row_maps() -> dict[str, tuple[int, tuple[str, ...]]]:
    """The row maps by name: their number and the names of their parameters.

    >>> row_maps()["focal"]
    (1, ('gamma',))
    """
    return {name: (number, parameters) for number, (name, parameters) in enumerate(formulas.ROW_MAP_KINDS)}


def _mapped(name: str, parameters: Sequence[float], nll: Tensor) -> tuple[Tensor, Tensor]:
    """g(nll) and its derivative."""
    value, pullback = torch.func.vjp(lambda each: ROW_MAPS[name](each, *parameters), nll)  # type: ignore[misc]
    (slope,) = pullback(torch.ones_like(nll))
    return value, torch.where(nll.isinf() & slope.isnan(), 1.0, slope)


# ------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class RowOptions:
    """What the functions of this module share; the names and meanings are those of :func:`fastloss.cross_entropy`.

    Attributes:
        total_classes: how many classes all shards have together, C.
        row_map: the name of a function of the row's nll, see :func:`row_maps`, with ``map_params`` in their order.
        loss_dtype: of the loss; None: float32 (float64 for float64 logits).

    Raises:
        ValueError: an option that is out of its range.
    """

    total_classes: int
    reduction: Literal["none", "mean", "sum"] = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    row_map: str = "none"
    map_params: tuple[float, ...] = ()
    all_ignored: Literal["nan", "zero"] = "nan"
    zero_times_inf: Literal["nan", "zero"] = "nan"
    loss_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        _arguments.reduction_code(self.reduction)
        maps = row_maps()
        if self.row_map not in maps:
            raise ValueError(f"RowOptions(): row_map must be one of {', '.join(maps)}, got {self.row_map!r}")
        parameters = maps[self.row_map][1]
        if len(self.map_params) != len(parameters):
            raise ValueError(
                f"RowOptions(): row_map {self.row_map!r} has {len(parameters)} parameters {list(parameters)}, but "
                f"map_params is {self.map_params}"
            )
        if self.total_classes < 1:
            raise ValueError(f"RowOptions(): total_classes must be positive, got {self.total_classes}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"RowOptions(): label_smoothing must be between 0 and 1, got {self.label_smoothing}")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"RowOptions(): softcap must be positive and finite, or None, got {self.softcap}")
        if self.loss_dtype not in (None, *DTYPE_CODES):
            raise ValueError(f"RowOptions(): loss_dtype must be a floating dtype or None, got {self.loss_dtype}")

    def loss_dtype_for(self, logits_or_stats: Tensor) -> torch.dtype:
        """The dtype of the loss, and so of grad_output."""
        return self.loss_dtype or accum_dtype(logits_or_stats.dtype)

    def arguments(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, flags: int = 0
    ) -> tuple[Any, ...]:
        """The operators' arguments after those that say what and where."""
        flags |= ALL_IGNORED_ZERO * (self.all_ignored == "zero") | ZERO_TIMES_INF * (self.zero_times_inf == "zero")
        return (
            logits,
            target,
            _arguments.reduction_code(self.reduction),
            DTYPE_CODES[self.loss_dtype_for(logits)],
            flags,
            weight,
            sample_weight,
            None,
            self.ignore_index,
            float(self.label_smoothing),
            float(self.z_loss),
            float(self.softcap or 0.0),
            float(self.logit_scale),
            row_maps()[self.row_map][0],
            [float(p) for p in self.map_params],
        )


def _check_shard(function: str, logits: Tensor, target: Tensor, options: RowOptions, class_offset: int) -> None:
    if logits.dim() < 2 or logits.dtype not in DTYPE_CODES:
        raise ValueError(
            f"{function}(): logits must be floating point of shape [N, C_r, d1, ...], got {logits.dtype} of shape "
            f"{list(logits.shape)}"
        )
    classes = logits.shape[1]
    if not 0 <= class_offset <= options.total_classes - classes:
        raise ValueError(
            f"{function}(): class_offset is {class_offset} and logits have {classes} classes, but there are "
            f"{options.total_classes} in all: expected 0 <= class_offset <= {options.total_classes - classes}"
        )
    rows = [logits.shape[0], *logits.shape[2:]]
    if list(target.shape) != (list(logits.shape) if target.is_floating_point() else rows):
        raise ValueError(
            f"{function}(): target must be class indices of shape {rows} or probabilities of this shard, of shape "
            f"{list(logits.shape)}, got {target.dtype} of shape {list(target.shape)}"
        )


def _whole_weight(function: str, weight: Tensor | None, dtype: torch.dtype, options: RowOptions) -> Tensor | None:
    if weight is None:
        return None
    if list(weight.shape) != [options.total_classes]:
        raise ValueError(
            f"{function}(): weight must be that of all classes, of shape [{options.total_classes}], on every shard, "
            f"got {list(weight.shape)}"
        )
    return weight.detach().to(dtype).contiguous()


def _row_vector(function: str, name: str, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Any:
    if value is None:
        return None
    if list(value.shape) != list(shape):
        raise ValueError(f"{function}(): {name} must have shape {list(shape)}, got {list(value.shape)}")
    return value.detach().to(dtype).contiguous()


# ---------------------------------------------------------------------------------------------------- statistics


def row_stats(
    logits: Tensor,
    target: Tensor,
    options: RowOptions,
    *,
    class_offset: int,
    weight: Tensor | None = None,
    best: bool = False,
) -> Tensor:
    """Statistics of the rows over one range of the classes: one read of its logits.

    Args:
        logits: classes class_offset, ..., class_offset + C_r - 1, shape [N, C_r, d1, ...], float32, float64, float16 or
            bfloat16, any strides. C_r may be 0.
        target: class indices in [0, total_classes), whichever shard has them, shape [N, d1, ...], or probabilities of
            this shard, shape of the logits.
        weight: weights of all classes, shape [total_classes].
        best: with what arg-max and entropy need; at most 2**24 classes unless logits are float64.

    Returns:
        float32 (float64 for float64 logits) of shape [fields, N, d1, ...]. With z the scaled and capped logits: 0 the
        largest z (the reference), 1 the sum of exp(z - reference) without the target, 2 the target's z (-inf where it
        is elsewhere). With label_smoothing or probabilities: 3 the sum of q (z - reference), 4 the sum of q, where q
        is the class weight or weight times smoothed probability. With ``best`` at the end: the largest z (or nan), its
        class, and the sum of exp(z - reference) (z - reference) without the target.

    Raises:
        IndexError: a target outside [0, total_classes) that is not ignore_index; on CUDA by a later call.
        ValueError: shapes or a range that do not fit.

    >>> row_stats(torch.zeros(1, 2), torch.tensor([4]), RowOptions(total_classes=6), class_offset=0).flatten().tolist()
    [0.0, 2.0, -inf]
    """
    _check_shard("row_stats", logits, target, options, class_offset)
    accum = accum_dtype(logits.dtype)
    if best and accum is torch.float32 and options.total_classes > 2**24:
        raise ValueError(f"row_stats(): best=True takes at most 2**24 classes in float32, got {options.total_classes}")
    weight = _whole_weight("row_stats", weight, accum, options)
    arguments = options.arguments(logits, target, weight, None, STATS * best)
    return ops.row_stats(class_offset, options.total_classes, *arguments)


def merge_row_stats(stats: Sequence[Tensor]) -> Tensor:
    """The statistics of several ranges as one, of the same fields and shape.

    Args:
        stats: of disjoint ranges, in the order of their classes (which decides between equal maxima); also results of
            this function.

    Raises:
        ValueError: no statistics, or of different shapes.
    """
    if not stats or any(s.shape != stats[0].shape for s in stats):
        shapes = [list(s.shape) for s in stats]
        raise ValueError(f"merge_row_stats(): expected statistics of one shape, one for each shard, got {shapes}")
    s = torch.stack(tuple(stats))  # [shards, fields, N, d1, ...]
    merged = torch.empty_like(s[0])
    refs = s[:, REF]
    ref = merged[REF] = refs.amax(0)
    # Nothing but -inf: sums are relative to 0.
    base, bases = (torch.where(r == -torch.inf, 0.0, r) for r in (ref, refs))
    factor, shift = torch.exp(refs - base), bases - base
    merged[OTHERS] = (s[:, OTHERS] * factor).sum(0)
    merged[TARGET] = s[:, TARGET].amax(0)
    if s.shape[1] in (5, 8):
        merged[DOT] = (s[:, DOT] + s[:, MASS] * shift).sum(0)
        merged[MASS] = s[:, MASS].sum(0)
    if s.shape[1] in (6, 8):
        first = s[:, BEST].argmax(0, keepdim=True)  # a nan is the largest; of equal ones the first
        merged[BEST] = s[:, BEST].gather(0, first)[0]
        merged[BEST_AT] = s[:, BEST_AT].gather(0, first)[0]
        merged[EXP_DOT] = (factor * (s[:, EXP_DOT] + shift * s[:, OTHERS])).sum(0)
    return merged


# ---------------------------------------------------------------------------------------------------------- loss


class LossOfRows(NamedTuple):
    """What the merged statistics of all classes give.

    Attributes:
        loss: shape () or, for reduction ``'none'``, [N, d1, ...].
        saved: what :func:`row_gradient` needs, on every shard the same; two to six numbers per row.
        lse: log-sum-exp of each row.
        argmax: int64, and entropy of each row; None without ``best``.
        entropy: see argmax.
    """

    loss: Tensor
    saved: Tensor
    lse: Tensor
    argmax: Tensor | None
    entropy: Tensor | None


class TargetWeights(NamedTuple):
    """What the loss takes of the class weights, for who does not have all of them.

    Attributes:
        of_targets: the weight of each row's target, shape [N, d1, ...]; of ignored rows any number.
        total: the sum of all class weights, shape (); any number without label smoothing.
    """

    of_targets: Tensor
    total: Tensor


def _spread(mass: Any, log_sum: Tensor, dot: Tensor) -> Tensor:
    """sum_c q_c (lse - z_c), see spread_nll in csrc/rowwise/cross_entropy_math.h."""
    mass = torch.as_tensor(mass, dtype=log_sum.dtype, device=log_sum.device)
    return torch.where(mass - mass == 0, mass * log_sum - dot, mass + (log_sum - log_sum))


def finish_row_stats(
    stats: Tensor,
    target: Tensor,
    options: RowOptions,
    *,
    weight: Tensor | TargetWeights | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
) -> LossOfRows:
    """The loss of all classes from their merged statistics, O(rows).

    Args:
        stats: of all classes, shape [fields, N, d1, ...], from :func:`merge_row_stats`.
        target: as in :func:`row_stats`; of probabilities only the dtype matters, so any shard's will do.
        weight: weights of all classes, shape [total_classes], or for class indices what the loss takes of them.
        sample_weight: weight of each row, shape [N, d1, ...].
        normalizer: tensor without dimensions, on the device of the statistics: what ``'mean'`` divides by.

    Raises:
        ValueError: shapes that do not fit, or statistics without the fields that the options need.
    """
    o, accum, shape = options, stats.dtype, stats.shape[1:]
    soft, smooth = target.is_floating_point(), options.label_smoothing > 0
    if stats.shape[0] not in ((5, 8) if soft or smooth else (3, 6)):
        raise ValueError(
            f"finish_row_stats(): stats have {stats.shape[0]} fields, which are not those of these options and target; "
            "make them by row_stats() with the same options"
        )
    met = weight if isinstance(weight, TargetWeights) else None
    weight = None if isinstance(weight, TargetWeights) else _whole_weight("finish_row_stats", weight, accum, o)
    s = _row_vector("finish_row_stats", "sample_weight", sample_weight, shape, accum)
    s = torch.ones_like(stats[REF]) if s is None else s

    ref = torch.where(stats[REF] == -torch.inf, 0.0, stats[REF])
    others = torch.where(stats[REF] == -torch.inf, torch.nan, stats[OTHERS])
    z_t, w_t, bad = stats[TARGET], torch.ones_like(ref), None
    if soft:
        counts, e_t = torch.ones_like(ref, dtype=torch.bool), torch.zeros_like(ref)
    else:
        index = _row_vector("finish_row_stats", "target", target, shape, torch.int64)
        counts = index != o.ignore_index
        bad = counts & ((index < 0) | (index >= o.total_classes))  # of CUDA; the CPU has raised
        counts = counts & ~bad
        e_t = torch.where(counts, torch.exp(z_t - ref), 0.0)
        if weight is not None:
            w_t = torch.where(counts, weight[torch.where(counts, index, 0)], 1.0)
        elif met is not None:
            given = _row_vector("finish_row_stats", "weight.of_targets", met.of_targets, shape, accum)
            w_t = torch.where(counts, given, 1.0)
    log_sum = torch.log(others + e_t)
    lse = ref + log_sum

    share = o.label_smoothing / o.total_classes
    total: Any = float(o.total_classes)
    if weight is not None:
        total = weight.double().sum().to(accum)
    elif met is not None:
        total = met.total.to(accum)
    parts: list[Tensor]  # of the row's nll, each divided by itself
    if soft:
        mass = stats[MASS]
        parts = [_spread(mass, log_sum, stats[DOT])]
    else:
        mass = (1 - o.label_smoothing) * w_t + share * total if smooth else w_t
        nll = torch.where(others < e_t, torch.log1p(others / e_t), log_sum - (z_t - ref))
        if o.zero_times_inf == "zero":
            nll = torch.where(w_t == 0, 0.0, nll)
        parts = [(1 - o.label_smoothing) * w_t * nll]
        if smooth:
            parts.append(share * _spread(total, log_sum, stats[DOT]))
    saved = [ref, others, z_t]
    if soft:
        saved.append(mass)
    if o.row_map != "none":
        mean = nll if not soft and not smooth else torch.stack(parts).sum(0) / mass
        value, slope = _mapped(o.row_map, o.map_params, mean.clamp(min=0))
        endless = torch.where(slope == 0, value, 0 * slope)  # as mapped_row in csrc/rowwise/row_maps.h
        level = torch.where(torch.isfinite(mean), value - mean * slope, endless)
        value, slope, level = (torch.where(mass == 0, 0.0, v) for v in (mass * value, slope, level))
        # The smoothing's share is in the value; its own, divided by no weights, is nan, as in reduced_loss.
        parts = [value, torch.zeros_like(value)] if smooth and not soft else [value]
        saved.append(torch.where(counts, slope, 1.0))
        if soft:
            saved.append(level)
    parts = [torch.where(counts, s * p, 0.0) for p in parts]
    z_part = torch.where(counts, s * (o.z_loss * lse * lse), 0.0)
    if bad is not None:
        parts[0] = torch.where(bad, torch.nan, parts[0])

    count = torch.where(counts, s, 0.0).double().sum()
    divisors = count if soft else torch.where(counts, s.double() * w_t.double(), 0.0).sum(), count
    if normalizer is not None:
        if normalizer.numel() != 1:
            raise ValueError(f"finish_row_stats(): normalizer must be one number, got shape {list(normalizer.shape)}")
        divisors = (normalizer.detach().reshape(()).double(),) * 2
    if o.reduction == "none":
        loss = torch.stack(parts).sum(0) + (z_part if o.z_loss else 0.0)
    else:
        by = divisors if o.reduction == "mean" else (1.0, 1.0)
        loss = torch.stack([p.double().sum() / by[0] for p in parts]).sum()
        if o.z_loss:
            loss = loss + z_part.double().sum() / by[1]
        if o.reduction == "mean" and o.all_ignored == "zero":
            loss = torch.where(counts.any(), loss, 0.0 * parts[0].double().sum())
    ends = torch.stack(divisors).to(accum)
    argmax = entropy = None
    if stats.shape[0] in (6, 8):
        argmax = stats[BEST_AT].to(torch.int64)
        own = torch.where(e_t > 0, e_t * (z_t - ref), 0.0)
        entropy = log_sum - (stats[EXP_DOT] + own) / (others + e_t)
    lse = torch.where(stats[REF].isinf(), stats[REF], lse)  # as logsumexp has it; the loss of such a row is nan
    return LossOfRows(
        loss.to(o.loss_dtype_for(stats)), torch.cat([*(f.reshape(-1) for f in saved), ends]), lse, argmax, entropy
    )


# ------------------------------------------------------------------------------------------------------ gradient


def row_gradient(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    grad_output: Tensor,
    options: RowOptions,
    *,
    class_offset: int,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    of_target: bool = False,
) -> Tensor:
    """The gradient by the logits of one range, or by its probabilities: one read (of both) and one write.

    Args:
        logits, target, class_offset, weight: as in :func:`row_stats`.
        saved, sample_weight: as in and from :func:`finish_row_stats`.
        grad_output: of the loss's shape and dtype.
        of_target: by the probabilities instead of the logits.

    Returns:
        Shape and dtype of the logits (of the probabilities), dense.

    Raises:
        ValueError: shapes or a range that do not fit.
    """
    _check_shard("row_gradient", logits, target, options, class_offset)
    accum = accum_dtype(logits.dtype)
    rows = [logits.shape[0], *logits.shape[2:]]
    weight = _whole_weight("row_gradient", weight, accum, options)
    sample_weight = _row_vector("row_gradient", "sample_weight", sample_weight, rows, accum)
    shape = rows if options.reduction == "none" else []
    grad_output = _row_vector("row_gradient", "grad_output", grad_output, shape, options.loss_dtype_for(logits))
    op = ops.row_target_gradient if of_target else ops.row_gradient
    arguments = options.arguments(logits, target, weight, sample_weight)
    return op(grad_output, saved, class_offset, options.total_classes, *arguments)


# -------------------------------------------------------------------------------------------------- fake kernels


@torch.library.register_fake("fastloss::row_stats")
def _(
    class_offset: Any, total: Any, logits: Any, target: Any, reduction: Any, dtype: Any, flags: Any, *rest: Any
) -> Any:
    label_smoothing = rest[4] if len(rest) > 4 else 0.0
    dots = 2 if target.is_floating_point() or label_smoothing > 0 else 0
    shape = [3 + dots + (3 if flags & STATS else 0), logits.shape[0], *logits.shape[2:]]
    return logits.new_empty(shape, dtype=accum_dtype(logits.dtype))


@torch.library.register_fake("fastloss::row_gradient")
def _(grad_output: Any, saved: Any, class_offset: Any, total: Any, logits: Any, *rest: Any) -> Any:
    return torch.empty_like(logits)


@torch.library.register_fake("fastloss::row_target_gradient")
def _(grad_output: Any, saved: Any, class_offset: Any, total: Any, logits: Any, target: Any, *rest: Any) -> Any:
    return torch.empty_like(target)


def __getattr__(name: str) -> Any:
    """The name that :func:`finish_row_stats` had: a row loss is a loss over a class axis without a softmax."""
    if name != "row_loss":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("fastloss.rows.row_loss is called finish_row_stats now", DeprecationWarning, stacklevel=2)
    return finish_row_stats


__all__ = [
    "LossOfRows",
    "RowOptions",
    "TargetWeights",
    "finish_row_stats",
    "merge_row_stats",
    "row_gradient",
    "row_maps",
    "row_stats",
]
