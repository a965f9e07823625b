"""Cross entropy of a linear head whose classes are sharded over ranks, without the logits.

Forward makes this rank's logits a chunk of rows at a time, takes their statistics and forgets them; one all-gather of
the statistics of all rows follows. An input that is sharded over the rows arrives in pieces meanwhile. Backward makes
each chunk again, now with what all ranks know, turns it into its gradient, and starts the sum over the ranks of the
input's gradient before it computes the weight's, so that the sum of one chunk travels while the next is computed. Four
products in all; ``head/chunked.py`` has them. Logits that are one chunk altogether fit the budget: they are kept for
backward, and three products are left.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .. import _arguments
from .._autograd import (
    Collective,
    Path,
    Rehearsed,
    accum_dtype,
    recomputing,
    rehearsing,
    tell_rehearsal,
    traffic,
)
from .._library import DTYPE_CODES, NONE
from ..head import chunked
from ..head.chunks import cut, rows_per_chunk
from ..head.linear_cross_entropy import _flattened, _integer, _logits_dtype
from ..losses.cross_entropy import CrossEntropyStats, Given, Options, Unmade
from . import _exchange
from ._exchange import Layout
from .cross_entropy import (
    NOT_SERVED,
    Call,
    Merged,
    SavedForBackward,
    Sharded,
    ShardOperands,
    checked,
    gradient_operators,
    gradients,
    merged,
    no_results,
    no_second_derivatives,
    numbers_of,
    results,
    saved_for_backward,
    statistics_sent,
)


class Head(NamedTuple):
    """How the logits are made.

    Attributes:
        dtype: of the logits, as linear would return them.
        budget: bytes of a chunk's logits, or None.
        gathered: the input is sharded over the rows as well, and gathered.
    """

    dtype: torch.dtype
    budget: int | None
    gathered: bool

    def held(self, device: torch.device) -> torch.dtype:
        """Of the logits of a chunk."""
        return chunked.chunk_dtype(device, self.dtype)

    def rows(self, rows: int, features: int, columns: int, device: torch.device) -> int:
        """Of a chunk."""
        itemsize = self.held(device).itemsize
        return rows_per_chunk(rows, features, columns, itemsize=itemsize, device=device.type, budget=self.budget)

    def sharing(self, group: Any) -> int:
        """Ranks that share the rows."""
        return dist.get_world_size(group) if self.gathered else 1

    def own_rows_in_backward(self, rows: int, features: int, layout: Layout, sharing: int, device: torch.device) -> int:
        """Of this rank's rows, which ``sharing`` ranks share, in a chunk of backward: every rank makes the same chunks,
        for each of which there is a collective."""
        return max(1, self.rows(rows, features, max(layout.sizes), device) // sharing)


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, head: Head, needs: Sequence[bool]) -> Any:
    operands = chunked.HeadOperands(x, weight, bias, x, None, None, None)
    o = chunked.HeadOptions(
        *Options(NONE, DTYPE_CODES[torch.float32]),
        rows=0,
        budget=0,
        max_rows=0,
        logits_dtype=DTYPE_CODES[head.dtype],
        accumulate=DTYPE_CODES[accum_dtype(head.dtype)],
    )
    return chunked._Products(operands, o, needs, held=head.held(x.device))


class _Piece(NamedTuple):
    """Some rows of the input: which ones of each rank, those of all ranks in rank order, and the work to wait for, or
    None."""

    rows: slice
    x: Tensor
    work: Any

    def arrived(self) -> Tensor:
        """The rows, as soon as they are there."""
        if self.work is not None:
            try:
                self.work.wait()
            except Exception as e:
                raise _Lost(e) from None
        return self.x


class _Lost(BaseException):
    """An error of torch.distributed. Not an Exception: those are kept until the ranks have told each other, in another
    collective, which would wait for the lost rank once more."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


_PIECE = 2**24  # bytes of an input that is gathered, of all ranks


def _places(x: Tensor, call: Call, head: Head) -> list[slice]:
    """Rows of the input that are gathered together."""
    mine, step = x.shape[0], max(x.shape[0], 1)
    if head.gathered:
        size = dist.get_world_size(call.group) * x.numel() * x.element_size()
        step = -(-step // max(1, -(-size // _PIECE)))
    return [slice(begin, min(begin + step, mine)) for begin in range(0, max(mine, 1), step)]


def _pieces(x: Tensor, call: Call, head: Head) -> list[_Piece]:
    """The input, of all ranks where each has some of its rows. All of it is on its way before anything is computed, and
    whatever a rank raises then: products of one piece are computed while the next arrives."""
    return [_Piece(rows, *_input_of_chunk(x[rows], call, head)) for rows in _places(x, call, head)]


def _numbers(
    pieces: Sequence[_Piece],
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    head: Head,
    t: ShardOperands,
    layout: Layout,
) -> tuple[Tensor, Tensor | None]:
    """What this rank sends of all rows, from logits a chunk at a time; and all of them, where they are one chunk."""
    mine, ranks = pieces[-1].rows.stop, head.sharing(call.group)
    count, features = mine * ranks, weight.shape[1]
    step = head.rows(count, features, weight.shape[0], weight.device)
    if step >= count and len(pieces) > 1:  # backward takes the logits in the order of the rows
        x = torch.cat([piece.arrived().view(ranks, -1, features) for piece in pieces], 1).flatten(0, 1)
        pieces = [_Piece(slice(0, mine), x, None)]
    products = _products(pieces[0].x, weight, bias, head, (False,) * 3)
    z = weight.new_empty([min(step, max(count, 1)), weight.shape[0]], dtype=products.held)
    found = []
    for piece in pieces:
        x, target = piece.arrived(), _of_ranks(t.target, ranks, piece.rows)
        rows = x.shape[0]
        chunks = []
        for begin in range(0, max(rows, 1), step):
            chunk = slice(begin, min(begin + step, rows))
            part = z[: chunk.stop - begin]
            products.logits(products.cast(x[chunk]), part)
            chunks.append(numbers_of(call, layout, part, target[chunk], t.weight))
        found.append(torch.cat(chunks, 1).unflatten(1, (ranks, rows // ranks)))
    return torch.cat(found, 2).flatten(1), z if step >= count else None


def _of_ranks(whole: Tensor, ranks: int, rows: slice) -> Tensor:
    """Of what has one element for each row of all ranks, that of these rows of each rank."""
    each = whole.view(ranks, whole.shape[0] // ranks, *whole.shape[1:])
    return each[:, rows].flatten(0, 1)


def loss_of_head(
    call: Call, head: Head, x: Tensor, weight: Tensor, bias: Tensor | None, t: ShardOperands
) -> tuple[Merged, Tensor | None]:
    """The loss of all ranks, and this rank's logits where they are one chunk."""
    logits: Tensor | None = None
    pieces = _pieces(x.detach(), call, head)

    def make(layout: Layout) -> Tensor:
        nonlocal logits
        numbers, logits = _numbers(pieces, weight, bias, call, head, t, layout)
        return numbers

    rows = x.shape[0] * head.sharing(call.group)
    try:
        with torch.autocast(x.device.type, enabled=False):
            return merged(call, t, [rows], weight.shape[0], make, head), logits
    except _Lost as lost:
        raise lost.error from None


class ParallelLinearCrossEntropy(Function):
    """The loss, and the gradients by input, head, bias, probabilities and class weights."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, head: Head, x: Tensor, weight: Tensor, bias: Tensor | None, *operands: Any
    ) -> Any:
        t = ShardOperands(*operands)
        m, logits = loss_of_head(call, head, x, weight, bias, t)
        ctx.call, ctx.head, ctx.layout = call, head, m.layout
        ctx.save_for_backward(x, weight, bias, logits, *saved_for_backward(t, m))
        return results(ctx, call, m, t.target)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad[2:5] + ctx.needs_input_grad[6:8]
        by_entropy = grads[-1] if ctx.call.entropy else None
        if grads[0] is None and by_entropy is None:
            return (None,) * 10
        x, weight, bias, logits, *others = ctx.saved_tensors
        linear, known = (x, weight, bias, logits), SavedForBackward(*others).with_known_weights(ctx.call, ctx.layout)
        found: Sequence[Tensor | None]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            found = head_gradients(ctx.call, ctx.head, ctx.layout, linear, known, grads[0], by_entropy, needs)
        if torch.is_grad_enabled():
            found = no_second_derivatives(ctx.call.function, found)
        return (None, None, *found[:3], None, *found[3:], None, None)


def head_gradients(
    call: Call,
    head: Head,
    layout: Layout,
    linear: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    known: SavedForBackward,
    grad_output: Tensor | None,
    by_entropy: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """By input, head, bias, probabilities and class weights, as far as ``needs`` names them.

    ``linear``: input, head and bias, and the logits where they were one chunk. ``known``: as in
    :func:`~fastloss.parallel.cross_entropy.gradients`.
    """
    x, weight, bias, logits = linear
    target, class_weight, sample_weight, saved, entropy = known[:5]
    x = x.detach()
    mine, features = x.shape  # rows of each rank's input
    ranks = head.sharing(call.group)
    count = mine * ranks
    products = _products(x, weight, bias, head, needs[:3])
    step = head.own_rows_in_backward(count, features, layout, ranks, x.device)
    z = (
        None
        if logits is not None
        else x.new_empty([ranks * min(step, max(mine, 1)), weight.shape[0]], dtype=products.held)
    )
    per_row, ends = saved[:-2].view((saved.numel() - 2) // max(count, 1), count), saved[-2:]
    grad_x = x.new_empty([mine, features], dtype=products.held) if needs[0] else None
    grad_target = torch.empty_like(target, memory_format=torch.contiguous_format) if needs[3] else None
    grad_class_weight = torch.zeros_like(class_weight[layout.ranges()[layout.rank]]) if needs[4] else None
    started, coming = [], _input_of_chunk(x[:step], call, head)
    for begin in range(0, max(mine, 1), step):
        rows = slice(begin, min(begin + step, mine))

        def pick(whole: Tensor, rows: slice = rows) -> Tensor:
            return _of_ranks(whole, ranks, rows)

        arriving, work = coming
        if work is not None:
            work.wait()
        if rows.stop < mine:  # while this chunk is computed
            coming = _input_of_chunk(x[rows.stop : rows.stop + step], call, head)
        x_rows = products.cast(arriving)
        if z is None:
            assert logits is not None
            part = pick(logits[:count])
        else:
            part = z[: x_rows.shape[0]]
            products.logits(x_rows, part)
        g = grad_output if grad_output is None or grad_output.dim() == 0 else pick(grad_output)
        h, by_h = (None, None) if by_entropy is None else (pick(entropy), pick(by_entropy))
        s = None if sample_weight is None else pick(sample_weight)
        numbers = torch.cat([*(pick(field) for field in per_row), ends])
        wanted = (any(needs[:3]), needs[3], needs[4])
        chunk = SavedForBackward(pick(target), class_weight, s, numbers, h)
        by_logits, by_target, by_weight = gradients(call, layout, part, chunk, g, by_h, wanted)
        if grad_target is not None:
            columns = target.shape[1]
            grad_target.view(ranks, mine, columns)[:, rows] = by_target.view(ranks, rows.stop - begin, columns)  # type: ignore[union-attr]
        if grad_class_weight is not None:
            grad_class_weight += by_weight  # type: ignore[arg-type]
        if by_logits is None:
            continue
        if grad_x is not None:
            partial = torch.empty_like(x_rows) if head.gathered else grad_x[rows]
            if weight.shape[0]:
                products.by_input(by_logits, partial)
            else:
                partial.zero_()
            started.append((_start_sum(partial, grad_x[rows], call, head), partial))
        products.by_weight_and_bias(by_logits, x_rows)
        if head.gathered and len(started) > 1:  # no more than two chunks of all ranks' rows are held
            started.pop(0)[0].wait()
    for summing, _ in started:
        summing.wait()
    found = grad_x, products.grad_weight, products.grad_bias, grad_target, grad_class_weight
    dtypes = x, weight, bias, target, class_weight
    return tuple(None if g is None else g.to(like.dtype) for g, like in zip(found, dtypes, strict=True))


def _input_of_chunk(x: Tensor, call: Call, head: Head) -> tuple[Tensor, Any]:
    """The input's rows of a chunk, of this rank or of all, and the work to wait for, or None."""
    if not head.gathered:
        return x, None
    everyone, work = _exchange.start_gather(x.reshape(-1), call.group)
    return everyone.view(-1, x.shape[1]), work


def _start_sum(partial: Tensor, out: Tensor, call: Call, head: Head) -> Any:
    """The sum over the ranks of the gradient of a chunk's input, into ``out``: of this rank's rows, or of all."""
    if not head.gathered:
        return dist.all_reduce(partial, group=call.group, async_op=True)
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return reduce_scatter(out, partial, group=call.group, async_op=True)


# --------------------------------------------------------------------------------------------------------- rehearsal


def _rehearse(
    call: Call, head: Head, x: Tensor, weight: Tensor, bias: Tensor | None, t: ShardOperands
) -> tuple[Tensor, ...]:
    (mine, features), columns, device = x.shape, weight.shape[0], x.device
    ranks, sharing = dist.get_world_size(call.group), head.sharing(call.group)
    count, held = mine * sharing, head.held(device).itemsize
    rows = head.rows(count, features, columns, device)
    pieces = _places(x, call, head)
    if rows < count:  # a chunk has rows of one piece
        cuts = [cut((place.stop - place.start) * sharing, rows, columns * held) for place in pieces]
        chunks = cuts[0]._replace(times=sum(c.times for c in cuts))
    else:
        chunks = cut(count, rows, columns * held)
    assumed = Layout((columns,) * ranks, dist.get_rank(call.group))
    layout = _exchange.assumed_layout(call.group, columns, call.given) or assumed
    wanted = x, weight, bias, t.target, t.weight
    path = recomputing(*wanted)
    again = path is Path.RECOMPUTE
    needs = [again and w is not None and w.requires_grad for w in wanted]
    step = head.own_rows_in_backward(count, features, layout, sharing, device)
    times = max(1, -(-mine // step))
    gradient = path.value if path is Path.VALUE else NOT_SERVED
    if again:
        logits = "kept" if chunks.times == 1 else "made again"
        gradient = f"in backward, from logits that are {logits}, {times} of {min(step * sharing, count)} rows at a time"
    input_row, grad_row = features * x.element_size(), features * held
    sent = [statistics_sent(call, t, count)]
    if head.gathered:
        sent.insert(0, Collective("forward", "all_gather", len(pieces), input_row, mine * input_row))
        if again:
            sent.append(Collective("backward", "all_gather", times, input_row, mine * input_row))
    if needs[0]:
        name = "reduce_scatter" if head.gathered else "all_reduce"
        sent.append(Collective("backward", name, times, sharing * grad_row, count * grad_row))
    sizes = accum_dtype(head.dtype).itemsize  # of the sums of weight and bias
    kinds = held, sizes, sizes, t.target.element_size(), 0 if t.weight is None else t.weight.element_size()
    read, written = traffic((*wanted, t.sample_weight), needs, again)
    made = [w.numel() * kind for w, kind, needed in zip(wanted, kinds, needs, strict=True) if needed and w is not None]
    tell_rehearsal(
        Rehearsed(
            f"torch's products and statistics of this rank's {columns} classes; loss of all ranks' by torch operations",
            gradient,
            ("row_stats",),
            gradient_operators(call, (any(needs[:3]), *needs[3:])),
            read,
            written,
            sum(made) + chunks.nbytes * again,
            chunks,
            tuple(sent),
        )
    )
    return no_results(call, t, [count])


# --------------------------------------------------------------------------------------------------------- arguments


# After a graph break it is not to be a graph of its own.
_apply = torch.compiler.disable(ParallelLinearCrossEntropy.apply)


def run(
    function: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    g: Given,
    s: Sharded,
    memory_budget: int | None,
    sequence_parallel: bool,
) -> Any:
    """The loss that ``function`` asks for."""
    for name, t in (("input", input), ("linear_weight_shard", linear_weight), ("target", target)):
        _arguments.require_tensor(name, t, function)
    tensors = input, linear_weight, linear_bias, target, g.weight, g.sample_weight, s.weight_shard
    _arguments.require_supported_tensors(function, *tensors)
    if input.dim() < 1 or linear_weight.dim() != 2 or input.shape[-1] != linear_weight.shape[1]:
        raise RuntimeError(
            f"{function}(): input needs shape (..., D) and linear_weight_shard (C_r, D), got {list(input.shape)} and "
            f"{list(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"{function}(): linear_bias_shard must be that of this rank's {linear_weight.shape[0]} classes, got shape "
            f"{list(linear_bias.shape)}"
        )
    budget = None if memory_budget is None else _integer(function, "memory_budget", memory_budget, 1)
    dtype = _logits_dtype(function, input, linear_weight, linear_bias)
    head = Head(dtype, budget, sequence_parallel)
    lead, features = list(input.shape[:-1]), input.shape[-1]
    if sequence_parallel:
        if not lead:
            raise ValueError(f"{function}(sequence_parallel=True): input needs rows, shape (..., D), got {features}")
        lead[0] *= dist.get_world_size(_exchange.process_group(function, s.group))
    rows, single = math.prod(lead), input.dim() == 1
    if len(lead) > 1:
        target = _flattened(function, "target", target, lead)
        if g.sample_weight is not None:
            g = g._replace(sample_weight=_flattened(function, "sample_weight", g.sample_weight, lead))
    classes = linear_weight.shape[0]
    shape = (classes,) if single else (rows, classes)
    unmade: Any = Unmade(shape, dtype, input.device)
    call, operands, final = checked(function, unmade, target, g, s)
    operands = operands._replace(logits=input.new_empty([0], dtype=dtype))
    x = input.reshape(-1, features)
    if rehearsing():
        loss, *stats = _rehearse(call, head, x, linear_weight, linear_bias, operands)
    elif torch.compiler.is_compiling():
        from . import _compiled  # which imports this module

        loss, *stats = _compiled.linear_cross_entropy(call, head, x, linear_weight, linear_bias, operands)
    else:
        loss, *stats = _apply(call, head, x, linear_weight, linear_bias, *operands)
    final = final if single else lead
    if call.options.reduction == "none":
        loss = loss.reshape(final)
    if not call.stats:
        return loss
    lse, argmax, accuracy, entropy = stats
    return loss, CrossEntropyStats(lse.reshape(final), argmax.reshape(final), accuracy, entropy.reshape(final))


def linear_cross_entropy(
    input: Tensor,
    linear_weight_shard: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    linear_bias_shard: Tensor | None = None,
    weight: Tensor | None = None,
    weight_shard: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | Sequence[int] = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    row_map: str = "none",
    map_params: tuple[float, ...] = (),
    all_ignored: Literal["nan", "zero"] = "nan",
    zero_times_inf: Literal["nan", "zero"] = "nan",
    return_stats: bool = False,
    loss_dtype: torch.dtype | None = None,
    shard_sizes: Sequence[int] | None = None,
    memory_budget: int | None = None,
    sequence_parallel: bool = False,
) -> Any:
    r""":func:`fastloss.linear_cross_entropy` with a head whose classes are sharded over the ranks of a process group.

    The logits of this rank's classes are made a chunk of rows at a time, twice: for the statistics in forward, for the
    gradients in backward. Only logits that are one chunk altogether, and so fit ``memory_budget``, are kept instead of
    made again. Forward has the all-gather of
    :func:`fastloss.parallel.cross_entropy`. Backward sums the input's gradient over the ranks, one all-reduce for each
    chunk, which travels while the weight's gradient is computed: the gradient of ``input`` is the whole one, so nothing
    else may sum it again (no ``copy_to_tensor_parallel_region`` before the head).

    Args:
        input: hidden states, the same on every rank, shape (D), (N, D) or (..., D).
        linear_weight_shard: of this rank's classes, shape (C_r, D).
        target: class indices among all classes, or probabilities of this rank's classes, shape (..., C_r).
        group, weight, weight_shard, row_map, map_params, shard_sizes: as :func:`fastloss.parallel.cross_entropy`.
        linear_bias_shard: shape (C_r).
        memory_budget: as :func:`fastloss.linear_cross_entropy`; the same on every rank.
        sequence_parallel: ``input`` has this rank's rows alone, equally many on each rank, in rank order along its
            first dimension; ``target`` and ``sample_weight`` have those of all ranks. The input is gathered in forward,
            in pieces of 16 MiB while logits are made, and again in backward, a chunk at a time. Its gradient is
            scattered instead of summed everywhere.
        reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, sample_weight, normalizer, all_ignored,
            zero_times_inf, return_stats, loss_dtype: as :func:`fastloss.cross_entropy`.

    Returns:
        The loss, or a pair (loss, stats). Gradients of weight and bias are those of this rank's shard, summed up in
        float32 (float64 for float64) and rounded once; the input's is summed in the dtype of the logits.

    Raises:
        IndexError, ValueError, RuntimeError: as :func:`fastloss.parallel.cross_entropy`; shapes and dtypes of the head.

    Second derivatives, forward mode and torch.func are not served, and raise.

    Example::

        >>> fastloss.parallel.linear_cross_entropy(hidden, lm_head_shard, labels, tp_group).backward()
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
        all_ignored=all_ignored,
        zero_times_inf=zero_times_inf,
        return_stats=return_stats,
        loss_dtype=loss_dtype,
    )
    s = Sharded(group, shard_sizes, weight_shard, row_map, map_params)
    name = "parallel.linear_cross_entropy"
    return run(name, input, linear_weight_shard, linear_bias_shard, target, g, s, memory_budget, sequence_parallel)
