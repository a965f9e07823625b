"""Cross entropy of logits whose classes are sharded over the ranks of a process group: function, module, autograd.

Each rank reads its logits once and has three numbers per row (:func:`fastloss.rows.row_stats`). One all-gather brings
those of all ranks to all ranks, who merge them in rank order and so have the same bits of the same loss. Backward reads
the logits again and writes their gradient, without a collective. ``_exchange.py`` says what travels.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _arguments, rows
from .._autograd import (
    Collective,
    Path,
    Rehearsed,
    accum_dtype,
    nothing,
    recomputing,
    rehearsing,
    tell_rehearsal,
    traffic,
)
from .._library import REDUCTIONS, ops
from ..formulas import ALL_IGNORED_ZERO, ZERO_TIMES_INF
from ..losses import _rowwise
from ..losses.cross_entropy import (
    CrossEntropyStats,
    Given,
    Options,
    Unmade,
    _checked_loss_dtype,
    _class_dim,
    _classes_second,
    accuracy_of,
    canonical,
)
from ..rows import MASS, LossOfRows, RowOptions, TargetWeights
from . import _exchange
from ._exchange import Bad, Layout, Part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_REDUCTION_NAMES = {code: name for name, code in REDUCTIONS.items()}


class Call(NamedTuple):
    """What a call is made with, beside tensors; the same on every rank.

    Attributes:
        options: of rows; total_classes is filled in when it is known.
        stats: whether arg-max and entropy are wanted.
        sharded_weight: the class weights are those of this rank's classes.
        entropy: whether entropies, one of the statistics, have gradients.
    """

    function: str
    group: "ProcessGroup"
    given: Layout | None
    options: RowOptions
    stats: bool
    sharded_weight: bool
    entropy: bool = False

    def of(self, layout: Layout) -> RowOptions:
        """The options for so many classes."""
        fields = dict(vars(self.options))
        return RowOptions(**(fields | {"total_classes": layout.total}))


class ShardOperands(NamedTuple):
    """logits [N, C_r, d1, ...], target, weight of all or of this rank's classes, sample_weight, normalizer."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None
    normalizer: Tensor | None


class Merged(NamedTuple):
    """What all ranks have together.

    Attributes:
        row: loss, statistics, and what the gradient of each shard needs.
        met: what class indices take of the others' class weights, where those are sharded.
        best: the class that probabilities want most, with ``stats``.
    """

    layout: Layout
    row: LossOfRows
    met: TargetWeights | None
    best: Tensor | None


# ------------------------------------------------------------------------------------------------------- the numbers


def known_weights(
    weight: Tensor | None, met: TargetWeights | None, target: Tensor, call: Call, layout: Layout
) -> Tensor | None:
    """Class weights [C] with which this rank's numbers and gradients are those of all classes' weights.

    Of the other ranks' weights only those of the targets matter, and the sum of all. Where ``met`` says them, they are
    in their places; what is missing in the sum has the first class that is no target.
    """
    if weight is None or not call.sharded_weight:
        return weight
    here, o = layout.ranges()[layout.rank], call.options
    whole = weight.new_zeros([layout.total + 1])  # the last: of rows without a target
    if met is None:
        whole[here] = weight
        return whole[:-1]
    index = target.to(torch.int64).flatten()
    index = torch.where((index >= 0) & (index < layout.total) & (index != o.ignore_index), index, layout.total)
    whole.scatter_(0, index, met.of_targets.flatten())
    whole[here] = weight
    whole[-1:] = 0
    if o.label_smoothing > 0:
        free = torch.ones_like(whole, dtype=torch.bool).scatter_(0, index, False)
        free[here] = False
        free[-1:] = False
        present = whole.double().sum()
        missing = torch.where(free.any() & (met.total != present), met.total - present, 0.0)
        whole += torch.where(free & (free.cumsum(0) == 1), missing, 0.0).to(whole.dtype)
    return whole[:-1]


def _own_targets_weights(weight: Tensor, target: Tensor, call: Call, layout: Layout) -> Tensor:
    """The weight of each row's target where it is one of this rank's classes, else 0."""
    index, here = target.to(torch.int64), layout.ranges()[layout.rank]
    own = (index >= here.start) & (index < here.stop) & (index != call.options.ignore_index)
    return torch.cat([weight, weight.new_zeros([1])])[torch.where(own, index - here.start, weight.shape[0])]


def _first_bad(target: Tensor, ignore_index: int, classes: int) -> Bad | None:
    if target.is_floating_point() or not target.is_cpu:
        return None
    index = target.to(torch.int64).flatten()
    bad = ((index < 0) | (index >= classes)) & (index != ignore_index)
    if not bad.any():
        return None
    row = int(bad.nonzero()[0])
    return Bad(row, int(index[row]))


def _wanted(target: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """The largest probability of each row and its class, as numbers of the same dtype."""
    if target.shape[1] == 0:
        shape = [target.shape[0], *target.shape[2:]]
        return target.new_full(shape, -torch.inf), target.new_full(shape, 0.0)
    value, at = target.max(1)
    return value, (at + offset).to(value.dtype)


class Stacked(NamedTuple):
    """How the numbers of a rank are sent: without those that ranks can work out themselves.

    Attributes:
        weighted: with the weight of each target from the rank that has it, and at the end, for smoothing, the sum of
            the rank's weights.
    """

    soft: bool
    smooth: bool
    stats: bool
    weighted: bool

    @property
    def fields(self) -> int:
        """Numbers of a row."""
        dots = 2 if self.soft else int(self.smooth)
        return 3 + dots + 3 * self.stats + 2 * (self.stats and self.soft) + self.weighted

    def length(self, rows: int) -> int:
        """Numbers of a rank."""
        return self.fields * rows + (self.weighted and self.smooth)

    def packed(self, stats: Tensor, target: Tensor, layout: Layout, weights: Tensor | None) -> Tensor:
        """Statistics [fields, N, d1, ...] and ``weights`` of targets as [numbers, rows]."""
        if self.smooth and not self.soft:  # MASS is the sum of the rank's class weights
            stats = torch.cat([stats[:MASS], stats[MASS + 1 :]])
        if self.stats and self.soft:
            stats = torch.cat([stats, torch.stack(_wanted(target.detach().to(stats.dtype), layout.offset))])
        if weights is not None:
            stats = torch.cat([stats, weights.unsqueeze(0)])
        return stats.reshape(self.fields, -1)

    def unpacked(
        self, numbers: Tensor, shape: Sequence[int], weight: Tensor | None, layout: Layout
    ) -> tuple[list[Tensor], TargetWeights | None, Tensor | None]:
        """Of each rank's numbers [ranks, length]: statistics, what there is to know of class weights, and the classes
        that probabilities want. ``weight``: of all classes, where all ranks have them."""
        sums = numbers[:, -1] if self.weighted and self.smooth else None
        numbers = numbers if sums is None else numbers[:, :-1]
        numbers, met, best = numbers.reshape(layout.ranks, self.fields, *shape), None, None
        if self.weighted:
            total = numbers.new_zeros([], dtype=torch.float64) if sums is None else sums.double().sum()
            numbers, met = numbers[:, :-1], TargetWeights(numbers[:, -1].sum(0), total)
        if self.stats and self.soft:
            numbers, wanted = numbers[:, :-2], numbers[:, -2:]
            first = wanted[:, 0].argmax(0, keepdim=True)
            best = wanted[:, 1].gather(0, first)[0].to(torch.int64)
        if not self.smooth or self.soft:
            return list(numbers), met, best
        found = []
        for r, (each, n, classes) in enumerate(zip(numbers, layout.sizes, layout.ranges(), strict=True)):
            if sums is not None:
                mass = sums[r]
            else:
                mass = each.new_full([], n) if weight is None else weight[classes].double().sum().to(each.dtype)
            found.append(torch.cat([each[:MASS], mass.expand(1, *shape), each[MASS:]]))
        return found, met, best


def numbers_of(call: Call, layout: Layout, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """What a rank sends about some rows, [numbers, rows]."""
    target, stacked = target.detach(), stacked_for(call, target)
    stats = rows.row_stats(
        logits.detach(),
        target,
        call.of(layout),
        class_offset=layout.offset,
        weight=known_weights(weight, None, target, call, layout),
        best=call.stats,
    )
    weights = None
    if stacked.weighted:
        assert weight is not None
        weights = _own_targets_weights(weight, target, call, layout)
    return stacked.packed(stats, target, layout, weights)


def stacked_for(call: Call, target: Tensor) -> Stacked:
    """How these numbers are sent."""
    soft = target.is_floating_point()
    return Stacked(soft, call.options.label_smoothing > 0, call.stats, call.sharded_weight and not soft)


def merged(call: Call, t: ShardOperands, shape: Sequence[int], classes: int, make: Any, others: Any = None) -> Merged:
    """All ranks' numbers as one loss. ``make(layout)``: this rank's, for rows of ``shape``; raises what all raise.
    ``others``: what ranks have to agree on beside what is in ``call``."""
    target, o = t.target, call.options
    stacked, like = stacked_for(call, target), t.logits
    rows_count = 1
    for n in shape:
        rows_count *= n
    length = stacked.length(rows_count)

    def part(layout: Layout) -> Part:
        if t.weight is not None and not call.sharded_weight and t.weight.shape[0] != layout.total:
            raise RuntimeError(
                f"{call.function}(): weight must be that of all {layout.total} classes, got {t.weight.shape[0]}; give "
                "the weights of this rank's classes as weight_shard"
            )
        failed = None
        if like.is_cuda and not target.is_floating_point():
            index = target.to(torch.int64)
            failed = (((index < 0) | (index >= layout.total)) & (index != o.ignore_index)).any()
        numbers = make(layout).reshape(-1)
        if numbers.shape[0] < length:
            assert t.weight is not None
            numbers = torch.cat([numbers, t.weight.double().sum().to(numbers.dtype).view(1)])
        return Part(numbers, failed)

    alike = _exchange.fingerprint(
        call.function,
        vars(o),
        tuple(shape),
        stacked,
        t.normalizer is None,
        t.sample_weight is None,
        t.weight is None,
        like.dtype,
        others,
    )
    layout, numbers, poison = _exchange.exchange(
        call.function,
        call.group,
        classes,
        call.given,
        alike,
        length,
        like,
        part,
        lambda layout: _first_bad(target, o.ignore_index, layout.total),
    )
    m = loss_of(call, t, shape, layout, numbers)
    if poison is not None:
        m = m._replace(row=m.row._replace(loss=m.row.loss + poison.to(m.row.loss.dtype)))
    return m


def loss_of(call: Call, t: ShardOperands, shape: Sequence[int], layout: Layout, numbers: Tensor) -> Merged:
    """The loss of all ranks' ``numbers`` [ranks, length]."""
    weight = None if call.sharded_weight else t.weight
    stats, met, best = stacked_for(call, t.target).unpacked(numbers, shape, weight, layout)
    row = rows.finish_row_stats(
        rows.merge_row_stats(stats),
        t.target.detach(),
        call.of(layout),
        weight=weight if met is None else met,
        sample_weight=t.sample_weight,
        normalizer=t.normalizer,
    )
    return Merged(layout, row, met, best)


def statistics(row: LossOfRows, target: Tensor, best: Tensor | None, o: RowOptions) -> CrossEntropyStats:
    """As :func:`fastloss.cross_entropy` returns them."""
    assert row.argmax is not None and row.entropy is not None
    wanted = target.to(torch.int64) if best is None else best
    counts = wanted != o.ignore_index if best is None else None
    accuracy = accuracy_of(row.argmax == wanted, counts, o.all_ignored == "zero")
    return CrossEntropyStats(row.lse, row.argmax, accuracy, row.entropy)


# ---------------------------------------------------------------------------------------------------------- autograd


class SavedForBackward(NamedTuple):
    """What backward needs beside the logits, or what they are made of.

    Attributes:
        weight: the class weights as they were given.
        saved, entropy: of :class:`LossOfRows`.
        of_targets, total: of :class:`TargetWeights`, where there are.
    """

    target: Tensor
    weight: Any
    sample_weight: Any
    saved: Tensor
    entropy: Any
    of_targets: Any = None
    total: Any = None

    def with_known_weights(self, call: Call, layout: Layout) -> "SavedForBackward":
        """With the class weights that the gradients take, see :func:`known_weights`."""
        met = None if self.of_targets is None else TargetWeights(self.of_targets, self.total)
        return self._replace(weight=known_weights(self.weight, met, self.target, call, layout))


def saved_for_backward(t: ShardOperands, m: Merged) -> SavedForBackward:
    """After forward."""
    return SavedForBackward(t.target, t.weight, t.sample_weight, m.row.saved, m.row.entropy, *(m.met or ()))


class ParallelCrossEntropy(Function):
    """The loss, and the gradients by this rank's logits, probabilities and class weights."""

    @staticmethod
    def forward(ctx: Any, call: Call, *operands: Any) -> Any:
        t = ShardOperands(*operands)
        m = loss_of_logits(call, t)
        ctx.call, ctx.layout = call, m.layout
        ctx.save_for_backward(t.logits, *saved_for_backward(t, m))
        return results(ctx, call, m, t.target)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, *others = ctx.saved_tensors
        call, layout, by_entropy = ctx.call, ctx.layout, grads[-1] if ctx.call.entropy else None
        with torch.no_grad():
            known = SavedForBackward(*others).with_known_weights(call, layout)
            found = gradients(call, layout, logits, known, grads[0], by_entropy, ctx.needs_input_grad[1:4])
        if torch.is_grad_enabled():
            found = no_second_derivatives(call.function, found)
        return (None, *found, None, None)


def loss_of_logits(call: Call, t: ShardOperands) -> Merged:
    """The loss of all ranks, from this rank's logits."""

    def make(layout: Layout) -> Tensor:
        return numbers_of(call, layout, t.logits, t.target, t.weight)

    return merged(call, t, _rowwise.row_shape(t.logits), t.logits.shape[1], make)


def results(ctx: Any, call: Call, m: Merged, target: Tensor) -> tuple[Tensor, ...]:
    """What forward returns: loss and statistics."""
    ctx.set_materialize_grads(False)
    if not call.stats:
        return (m.row.loss,)
    stats = statistics(m.row, target, m.best, call.options)
    ctx.mark_non_differentiable(*(stats[:-1] if call.entropy else stats))
    return (m.row.loss, *stats)


def no_second_derivatives(function: str, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The same, which raise where somebody asks for their derivatives."""
    message = (
        f"{function}(): has no second derivatives, which would need what the other ranks know; gather the logits of "
        "all ranks (torch.distributed.nn.functional.all_gather) and give them to fastloss.cross_entropy"
    )
    refuse = torch._C._functions.DelayedError(message, 1)
    return tuple(None if g is None else refuse(g.detach().requires_grad_()) for g in grads)


def gradients(
    call: Call,
    layout: Layout,
    logits: Tensor,
    known: SavedForBackward,
    grad_output: Tensor | None,
    by_entropy: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """By this rank's logits, probabilities and class weights, as far as ``needs`` names them; no collective.

    ``known``: with the class weights that it takes. ``grad_output``, ``by_entropy``: the gradients by the loss and by
    the entropies, None: 0.
    """
    target, weight, sample_weight, saved, entropy = known[:5]
    o = call.of(layout)
    place: Any = {"class_offset": layout.offset, "sample_weight": sample_weight}
    by_logits = by_target = by_weight = None
    if grad_output is None:
        if by_entropy is not None and needs[0]:
            by_logits = _entropy_gradient(by_entropy, entropy, saved, logits, target, o)
        return by_logits, by_target, by_weight
    if needs[0]:
        by_logits = rows.row_gradient(logits, target, saved, grad_output, o, weight=weight, **place)
        if by_entropy is not None:
            by_logits += _entropy_gradient(by_entropy, entropy, saved, logits, target, o)
    if needs[1]:
        by_target = rows.row_gradient(logits, target, saved, grad_output, o, weight=weight, of_target=True, **place)
    if needs[2]:  # with unit weights and no smoothing the probabilities' gradient is u (lse - z), mapped
        assert weight is not None
        wide, plain = target.detach().to(weight.dtype), RowOptions(**(vars(o) | {"label_smoothing": 0.0}))
        per_class = rows.row_gradient(logits, wide, saved, grad_output, plain, of_target=True, **place)
        p = wide * (1 - o.label_smoothing) + o.label_smoothing / o.total_classes
        product = p * per_class
        if o.zero_times_inf == "zero":
            product = torch.where(p == 0, 0.0, product)
        by_weight = product.sum([d for d in range(product.dim()) if d != 1])
    return by_logits, by_target, by_weight


def _entropy_gradient(
    by_entropy: Tensor, entropy: Tensor | None, saved: Tensor, logits: Tensor, target: Tensor, o: RowOptions
) -> Tensor:
    """By the kernel of token_log_probs, to which no row has a target: the sum of all classes' exponentials is given as
    that of the others."""
    assert entropy is not None
    ref, others, z_t = saved[:-2].view(3, -1)
    own = torch.where(z_t == -torch.inf, 0.0, torch.exp(z_t - ref))
    whole = torch.cat([ref, others + own, saved[-2:]])
    none = torch.full_like(target, o.ignore_index)
    given = whole, entropy.contiguous(), logits, none, o.ignore_index, o.softcap or 0.0, o.logit_scale
    return ops.token_log_probs_backward(None, by_entropy.contiguous(), *given)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------- arguments


class Sharded(NamedTuple):
    """What the functions of this package take beside the loss's own arguments."""

    group: Any = None
    shard_sizes: Sequence[int] | None = None
    weight_shard: Tensor | None = None
    row_map: str = "none"
    map_params: tuple[float, ...] = ()
    entropy: bool = False


def row_options(o: Options, loss_dtype: torch.dtype, row_map: str, map_params: tuple[float, ...]) -> RowOptions:
    """The operators' options as those of rows; how many classes there are is not known yet."""
    return RowOptions(
        total_classes=1,
        reduction=_REDUCTION_NAMES[o.reduction],  # type: ignore[arg-type]
        ignore_index=o.ignore_index,
        label_smoothing=o.label_smoothing,
        z_loss=o.z_loss,
        softcap=o.softcap or None,
        logit_scale=o.logit_scale,
        row_map=row_map,
        map_params=tuple(map_params),
        all_ignored="zero" if o.flags & ALL_IGNORED_ZERO else "nan",
        zero_times_inf="zero" if o.flags & ZERO_TIMES_INF else "nan",
        loss_dtype=loss_dtype,
    )


class Checked(NamedTuple):
    """A call as :class:`ParallelCrossEntropy` takes it; ``shape``: of the rows as the user has them."""

    call: Call
    operands: ShardOperands
    shape: Sequence[int]


def checked(function: str, logits: Tensor, target: Tensor, g: Given, s: Sharded) -> Checked:
    """torch's exceptions, as :func:`fastloss.cross_entropy` raises them; ``logits`` may be :class:`Unmade`."""
    for name, asked in (("inplace_grad", g.inplace_grad), ("grad_in_forward", g.grad_in_forward)):
        if asked:
            raise ValueError(
                f"{function}({name}=True): the gradient of shards needs what the other ranks know, and is made in "
                "backward, in memory of its own; leave it out"
            )
    unmade = isinstance(logits, Unmade)
    if not unmade:
        _arguments.require_tensor("logits_shard", logits, function)
    _arguments.require_tensor("target", target, function)
    if not unmade:
        _arguments.require_supported_tensors(function, logits, target, g.weight, g.sample_weight, s.weight_shard)
    if g.weight is not None and s.weight_shard is not None:
        raise ValueError(f"{function}(): give weight, of all classes, or weight_shard, of this rank's, but not both")
    group = _exchange.process_group(function, s.group)
    given = None if s.shard_sizes is None else _exchange.given_layout(function, s.shard_sizes, group)
    soft = target.is_floating_point() and target.shape == logits.shape
    if not unmade:
        logits, target = _classes_second(logits, target, soft, _class_dim(function, g.class_dim))
    if target.dtype is torch.uint64:  # what is no index is bad, on every rank
        signed = target.view(torch.int64)
        target = torch.where(signed < 0, torch.iinfo(torch.int64).max, signed)
    shape = list(logits.shape)
    at = min(1, len(shape) - 1)
    if shape and shape[at] == 0 and not soft:
        shape[at] = 1  # an empty shard has targets nevertheless
    stand_in = Unmade(tuple(shape), logits.dtype, logits.device)
    weight = g.weight if s.weight_shard is None else s.weight_shard
    if weight is not None:
        _check_weight(function, weight, logits.shape[at], soft, sharded=s.weight_shard is not None)
    plain = g._replace(weight=None, class_dim=None, inplace_grad=False)
    by_weight = soft and weight is not None  # the loss's dtype
    c = canonical(function, stand_in, target, plain._replace(loss_dtype=None) if by_weight else plain)
    _, target, _, sample_weight, normalizer = c.tensors
    loss_dtype = c.loss_dtype
    if weight is not None:
        if by_weight:
            loss_dtype = _checked_loss_dtype(function, g.loss_dtype, torch.promote_types(loss_dtype, weight.dtype))
        weight = weight.to(accum_dtype(logits.dtype)).contiguous()
    o = row_options(c.options, loss_dtype, s.row_map, s.map_params)
    call = Call(function, group, given, o, bool(g.return_stats), s.weight_shard is not None, s.entropy)
    rows_shape = c.single_shape if c.single else _rowwise.row_shape(logits)
    if c.single and not unmade:
        logits = logits.unsqueeze(0)
    return Checked(call, ShardOperands(logits, target, weight, sample_weight, normalizer), rows_shape)


def _check_weight(function: str, weight: Tensor, classes: int, soft: bool, sharded: bool) -> None:
    name = "weight_shard" if sharded else "weight"
    _arguments.require_tensor(name, weight, function)
    if not weight.is_floating_point() or weight.dim() != 1:
        raise RuntimeError(
            f"{function}(): {name} must be floating point of one dimension, got {weight.dtype} of shape "
            f"{list(weight.shape)}"
        )
    if sharded and weight.shape[0] != classes:
        raise RuntimeError(
            f"{function}(): weight_shard must be that of this rank's {classes} classes, got {weight.shape[0]}; give "
            "the weights of all classes as weight"
        )
    if weight.requires_grad and torch.is_grad_enabled() and not (soft and sharded):
        raise RuntimeError(
            f"{function}(): not differentiable with respect to argument '{name}'; pass it detached"
            + ("" if not soft else ", or give the weights of this rank's classes as weight_shard, which are")
        )


# ---------------------------------------------------------------------------------------------------------- rehearsal


NOT_SERVED = "none: torch.func and forward mode raise"


def statistics_sent(call: Call, t: ShardOperands, rows_count: int) -> Collective:
    """The all-gather of forward."""
    stacked, size = stacked_for(call, t.target), accum_dtype(t.logits.dtype).itemsize
    length = stacked.length(rows_count)
    return Collective("forward", "all_gather", 1, stacked.fields * size, 8 * _exchange.HEADER + length * size)


def gradient_operators(call: Call, needs: Sequence[bool]) -> tuple[str, ...]:
    """Those of :func:`gradients`."""
    by_logits = ("row_gradient", *["token_log_probs_backward"] * call.entropy) if needs[0] else ()
    return (*by_logits, *["row_target_gradient"] * (needs[1] + needs[2]))


def no_results(call: Call, t: ShardOperands, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """What forward returns, for rows of ``shape``."""
    like, accum, per_row = t.target, accum_dtype(t.logits.dtype), call.options.reduction == "none"
    loss = nothing(like, shape if per_row else [], call.options.loss_dtype or accum)
    if not call.stats:
        return (loss,)
    lse, argmax = nothing(like, shape, accum), nothing(like, shape, torch.int64)
    return loss, lse, argmax, nothing(like, [], torch.float32), lse


def _rehearse(call: Call, t: ShardOperands) -> tuple[Tensor, ...]:
    shape, wanted = _rowwise.row_shape(t.logits), (t.logits, t.target, t.weight)
    path = recomputing(*wanted)
    again = path is Path.RECOMPUTE
    needs = [again and x is not None and x.requires_grad for x in wanted]
    read, written = traffic(t, needs, again)
    tell_rehearsal(
        Rehearsed(
            f"statistics of this rank's {t.logits.shape[1]} classes; loss of all ranks' by torch operations",
            path.value if again or path is Path.VALUE else NOT_SERVED,
            ("row_stats",),
            gradient_operators(call, needs),
            read,
            written,
            bytes_allocated=written,
            collectives=(statistics_sent(call, t, math.prod(shape)),),
        )
    )
    return no_results(call, t, shape)


# After a graph break it is not to be a graph of its own.
_apply = torch.compiler.disable(ParallelCrossEntropy.apply)


def run(function: str, logits: Tensor, target: Tensor, g: Given, s: Sharded) -> Any:
    """The loss that ``function`` asks for."""
    call, operands, shape = checked(function, logits, target, g, s)
    if rehearsing():
        loss, *stats = _rehearse(call, operands)
    elif torch.compiler.is_compiling():
        from . import _compiled  # which imports this module

        loss, *stats = _compiled.cross_entropy(call, operands)
    else:
        loss, *stats = _apply(call, *operands)
    if call.options.reduction == "none":
        loss = loss.reshape(shape)
    if not call.stats:
        return loss
    lse, argmax, accuracy, entropy = stats
    return loss, CrossEntropyStats(lse.reshape(shape), argmax.reshape(shape), accuracy, entropy.reshape(shape))


# -------------------------------------------------------------------------------------------------- function, module


def cross_entropy(
    logits_shard: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    weight: Tensor | None = None,
    weight_shard: Tensor | None = None,
    ignore_index: int | Sequence[int] = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    row_map: str = "none",
    map_params: tuple[float, ...] = (),
    class_dim: int | None = None,
    all_ignored: Literal["nan", "zero"] = "nan",
    zero_times_inf: Literal["nan", "zero"] = "nan",
    return_stats: bool = False,
    inplace_grad: bool = False,
    grad_in_forward: bool | None = None,
    loss_dtype: torch.dtype | None = None,
    shard_sizes: Sequence[int] | None = None,
) -> Any:
    r""":func:`fastloss.cross_entropy` of logits whose classes are sharded over the ranks of a process group.

    Rank 0 has the first classes, rank 1 those that follow, and so on; shards may have any sizes, 0 too. All ranks call
    with the same arguments, but for their shards of logits, probabilities and class weights. All get the same loss, bit
    for bit. Forward has one all-gather, of 12 bytes a row and rank for class indices (16 with smoothing, 20 for
    probabilities, 12 more with ``return_stats``, 4 more with ``weight_shard`` and class indices; twice as many in
    float64). Backward has none.

    Args:
        logits_shard: of this rank's classes, shape (C_r), (N, C_r) or (N, C_r, d1, ..., dK).
        target: class indices among all classes, the same on every rank, shape (), (N) or (N, d1, ..., dK), or
            probabilities of this rank's classes, shape of the logits. Probabilities may have gradients.
        group: process group, or DeviceMesh of one dimension; None: the default group.
        weight: of all classes, shape (C), the same on every rank; no gradient.
        weight_shard: instead, those of this rank's classes, shape (C_r). Differentiable with probability targets. With
            class indices the weight of each target travels too, in the same all-gather.
        row_map, map_params: a function of each row's nll, see :func:`fastloss.rows.row_maps`: ``"focal", (gamma,)`` is
            :func:`fastloss.focal_loss`.
        shard_sizes: how many classes each rank has. None: ranks tell each other, in the group's first call by its store
            and then within the all-gather. A rank takes what it has seen before; where that was wrong they do it again,
            with a second all-gather: for uneven shards of other sizes once, for shards that change on some ranks only
            each time, with a warning (on CUDA these raise a ValueError).
        inplace_grad, grad_in_forward: True is a ValueError: the gradient needs what the other ranks know.
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, sample_weight, normalizer, class_dim,
            all_ignored, zero_times_inf, return_stats, loss_dtype: as :func:`fastloss.cross_entropy`.

    Returns:
        The loss, or a pair (loss, stats), as :func:`fastloss.cross_entropy` of all classes. Gradients are those of this
        rank's shard.

    Raises:
        IndexError: a rank's target is outside [0, C) and not ignore_index: raised on every rank. On CUDA by a later
            call; until then the loss is nan.
        ValueError: ranks were called with other options; ``shard_sizes`` that do not fit; arguments.
        RuntimeError: another rank raised an exception while it read its logits; shapes and dtypes as torch.

    Logits of which ranks have another number of rows end in an error of torch.distributed. Second derivatives, forward
    mode and torch.func are not served, and raise. torch.compile takes the call into its graph, with the same
    collectives.

    Example::

        >>> logits = hidden @ lm_head_shard.t()  # (N, C_r)
        >>> fastloss.parallel.cross_entropy(logits, labels, tp_group).backward()
    """
    g = Given(
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        sample_weight=sample_weight,
        normalizer=normalizer,
        class_dim=class_dim,
        all_ignored=all_ignored,
        zero_times_inf=zero_times_inf,
        return_stats=return_stats,
        inplace_grad=inplace_grad,
        grad_in_forward=grad_in_forward,
        loss_dtype=loss_dtype,
    )
    s = Sharded(group, shard_sizes, weight_shard, row_map, map_params)
    return run("parallel.cross_entropy", logits_shard, target, g, s)


class ParallelCrossEntropyLoss(torch.nn.Module):
    """:func:`cross_entropy` as a module.

    Args:
        group: as :func:`cross_entropy`.
        weight: of all classes, a buffer.
        options: what else :func:`cross_entropy` takes, by name; ``sample_weight`` and ``normalizer`` are arguments of
            the call.

    Example::

        >>> fastloss.parallel.ParallelCrossEntropyLoss(tp_group, label_smoothing=0.1)(logits_shard, labels).backward()
    """

    weight: Tensor | None

    def __init__(self, group: Any = None, *, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        if unknown := options.keys() - _MODULE_OPTIONS:
            raise TypeError(f"ParallelCrossEntropyLoss() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        self.register_buffer("weight", weight)
        self.group, self.options = group, options

    def extra_repr(self) -> str:
        """The options given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def forward(
        self,
        logits_shard: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Any:
        """The loss of this rank's logits, as :func:`cross_entropy`."""
        return cross_entropy(
            logits_shard,
            target,
            self.group,
            weight=self.weight,
            sample_weight=sample_weight,
            normalizer=normalizer,
            **self.options,
        )


_MODULE_OPTIONS = {
    "weight_shard",
    "ignore_index",
    "reduction",
    "label_smoothing",
    "z_loss",
    "softcap",
    "logit_scale",
    "row_map",
    "map_params",
    "class_dim",
    "all_ignored",
    "zero_times_inf",
    "return_stats",
    "inplace_grad",
    "grad_in_forward",
    "loss_dtype",
    "shard_sizes",
}
