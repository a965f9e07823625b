"""The losses of this package as operators, for the graphs of torch.compile and torch.export.

A graph cannot hold what a rank reads of the others. So each loss is one operator in it, which takes the call's checked
operands, with the group by its name, and when the graph runs does what the loss does without torch.compile: the same
collectives. Its backward is another operator. Both keep their place in the order of collectives: a compiler that moves
operators about, by sizes that are not the same on all ranks, would let one rank's collective meet another's.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType as EffectType
from torch._higher_order_ops.effects import _register_effectful_op
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from .._autograd import accum_dtype
from .._library import ops
from ..losses import _rowwise
from ..rows import RowOptions
from . import _exchange
from ._exchange import Layout
from .cross_entropy import (
    Call,
    Merged,
    Operands,
    gradients,
    loss_of,
    merged,
    numbers_of,
    placed,
    stacked_for,
    statistics,
)
from .linear_cross_entropy import Head, Saved, head_gradients, loss_of_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_library = torch.library.Library("fastloss", "FRAGMENT")

# Call, and Head, as an operator takes them.
_CALL = (
    "str function, str group, SymInt[]? sizes, str reduction, SymInt ignore_index, float label_smoothing, "
    "float z_loss, float? softcap, float logit_scale, str row_map, float[] map_params, str all_ignored, "
    "str zero_times_inf, ScalarType loss_dtype, bool stats, bool sharded_weight, bool entropy"
)
_HEAD = "ScalarType logits_dtype, SymInt? budget, bool gathered"


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """As outside of an operator's kernel, where torch.func, which differentiates row maps, is shut out."""
    none = torch._C.DispatchKeySet.from_raw_repr(0)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), none), torch.no_grad():
        yield


def _plain(call: Call) -> list[Any]:
    o = call.options
    sizes = None if call.given is None else list(call.given.sizes)
    return [
        *(call.function, call.group.group_name, sizes, o.reduction, o.ignore_index, o.label_smoothing, o.z_loss),
        *(o.softcap, o.logit_scale, o.row_map, list(o.map_params), o.all_ignored, o.zero_times_inf, o.loss_dtype),
        *(call.stats, call.sharded_weight, call.entropy),
    ]


def _call(
    function: str,
    group_name: str,
    sizes: Sequence[int] | None,
    reduction: Any,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    row_map: str,
    map_params: Sequence[float],
    all_ignored: Any,
    zero_times_inf: Any,
    loss_dtype: torch.dtype,
    stats: bool,
    sharded_weight: bool,
    entropy: bool,
) -> Call:
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    given = None if sizes is None else _exchange.given_layout(function, sizes, group)
    options = RowOptions(
        total_classes=1,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        row_map=row_map,
        map_params=tuple(map_params),
        all_ignored=all_ignored,
        zero_times_inf=zero_times_inf,
        loss_dtype=loss_dtype,
    )
    return Call(function, group, given, options, stats, sharded_weight, entropy)


def _found(call: Call, m: Merged, target: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """What a forward operator returns; without elements what there is not."""

    def nothing() -> Tensor:
        return like.new_empty([0])

    stats: Sequence[Tensor] = [nothing() for _ in range(4)]
    if call.stats:
        stats = statistics(m.row, target, m.best, call.options)
    sizes = torch.tensor(m.layout.sizes, dtype=torch.int64)
    gathered = call.sharded_weight and not target.is_floating_point()
    return m.row.loss, *stats, m.row.saved, sizes, m.weight if gathered and m.weight is not None else nothing()


def _expected(call: Call, t: Operands, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """:func:`_found`, as far as shapes and dtypes go: of ranks with a class each."""
    ranks = dist.get_world_size(call.group)
    layout, count = Layout((1,) * ranks, 0), 1
    for n in shape:
        count *= n
    fields = stacked_for(call, t.target).fields
    numbers = t.logits.new_empty([ranks, fields, count], dtype=accum_dtype(t.logits.dtype))
    # A row map is differentiated, which fake tensors do not let it be here; it saves so many numbers more.
    mapped = 0 if call.options.row_map == "none" else 2 if t.target.is_floating_point() else 1
    plain = replace(call.options, row_map="none", map_params=())
    m = loss_of(call._replace(options=plain), t._replace(weight=None), shape, layout, numbers)
    m = m._replace(row=m.row._replace(saved=m.row.saved.new_empty([m.row.saved.numel() + mapped * count])))
    if t.weight is not None and call.given is not None:
        m = m._replace(weight=t.weight.new_empty([call.given.total]))
    return _found(call, m, t.target, t.logits)


def _of_all(weight: Tensor | None, call: Call, layout: Layout, target: Tensor) -> Tensor | None:
    """The class weights as backward looks at them: those of probabilities were not gathered."""
    return placed(weight, call, layout) if target.is_floating_point() else weight


def _layout(call: Call, sizes: Tensor) -> Layout:
    return Layout(tuple(sizes.tolist()), dist.get_rank(call.group))


def _or_nothing(grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty([0]) if g is None else g for g in grads)


# ------------------------------------------------------------------------------------------------- logits as they are


def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    *plain: Any,
) -> tuple[Tensor, ...]:
    call, t = _call(*plain), Operands(logits, target, weight, sample_weight, normalizer)
    shape = _rowwise.row_shape(logits)
    with _outside():
        m = merged(call, t, shape, logits.shape[1], lambda layout: numbers_of(call, layout, logits, target, weight))
    return _found(call, m, target, logits)


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    *plain: Any,
) -> tuple[Tensor, ...]:
    t = Operands(logits, target, weight, sample_weight, normalizer)
    return _expected(_call(*plain), t, _rowwise.row_shape(logits))


def _backward(
    grad_output: Tensor | None,
    by_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    saved: Tensor,
    entropy: Tensor,
    sizes: Tensor,
    needs: Sequence[bool],
    *plain: Any,
) -> tuple[Tensor, ...]:
    call = _call(*plain)
    layout = _layout(call, sizes)
    operands = logits, target, _of_all(weight, call, layout, target), sample_weight
    found = gradients(call, layout, grad_output, *operands, saved, needs, entropy, by_entropy)
    return _or_nothing(found, logits)


def _backward_fake(
    grad_output: Tensor | None,
    by_entropy: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    saved: Tensor,
    entropy: Tensor,
    sizes: Tensor,
    needs: Sequence[bool],
    *plain: Any,
) -> tuple[Tensor, ...]:
    operands = zip((logits, target, weight), needs, strict=True)
    return _or_nothing([torch.empty_like(t) if t is not None and needed else None for t, needed in operands], logits)


# ------------------------------------------------------------------------------------------------------- linear heads


def _head_forward(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    logits_dtype: torch.dtype,
    budget: int | None,
    gathered: bool,
    *plain: Any,
) -> tuple[Tensor, ...]:
    call, head = _call(*plain), Head(logits_dtype, budget, gathered)
    t = Operands(x.new_empty([0], dtype=logits_dtype), target, weight, sample_weight, normalizer)
    with _outside():
        m, kept = loss_of_head(call, head, x, linear_weight, linear_bias, t)
    return *_found(call, m, target, x), x.new_empty([0, 0]) if kept is None else kept


def _head_forward_fake(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    logits_dtype: torch.dtype,
    budget: int | None,
    gathered: bool,
    *plain: Any,
) -> tuple[Tensor, ...]:
    call, head = _call(*plain), Head(logits_dtype, budget, gathered)
    t = Operands(x.new_empty([0], dtype=logits_dtype), target, weight, sample_weight, normalizer)
    count, features = x.shape
    count *= dist.get_world_size(call.group) if gathered else 1
    kept = x.new_empty([0, 0])
    if head.rows(count, features, linear_weight.shape[0], x.device) >= count:
        kept = x.new_empty([max(count, 1), linear_weight.shape[0]], dtype=head.held(x.device))
    return *_expected(call, t, [count]), kept


def _head_backward(
    grad_output: Tensor | None,
    by_entropy: Tensor | None,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    saved: Tensor,
    entropy: Tensor,
    sizes: Tensor,
    kept: Tensor,
    needs: Sequence[bool],
    logits_dtype: torch.dtype,
    budget: int | None,
    gathered: bool,
    *plain: Any,
) -> tuple[Tensor, ...]:
    call, head = _call(*plain), Head(logits_dtype, budget, gathered)
    layout = _layout(call, sizes)
    of_all, logits = _of_all(weight, call, layout, target), None if kept.shape[0] == 0 else kept
    t = Saved(x, linear_weight, linear_bias, target, of_all, sample_weight, saved, entropy, logits)
    with torch.autocast(x.device.type, enabled=False):
        return _or_nothing(head_gradients(call, head, layout, t, grad_output, by_entropy, needs), x)


def _head_backward_fake(
    grad_output: Tensor | None,
    by_entropy: Tensor | None,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    saved: Tensor,
    entropy: Tensor,
    sizes: Tensor,
    kept: Tensor,
    needs: Sequence[bool],
    *plain: Any,
) -> tuple[Tensor, ...]:
    operands = zip((x, linear_weight, linear_bias, target, weight), needs, strict=True)
    return _or_nothing([t.new_empty(t.shape) if t is not None and needed else None for t, needed in operands], x)


# ------------------------------------------------------------------------------------------------------------ operators


def _define(
    name: str, operands: Sequence[str], call: str, forward: Any, fake: Any, backward: Any, backward_fake: Any, more: str
) -> Any:
    """The operator of a loss, that of its gradients, and how autograd goes from one to the other.

    ``operands`` end in those that have no gradient: target or class weights may have one. ``more``: what forward keeps
    for backward beside what every loss does.
    """
    wanted = len(operands) - 2  # all but sample_weight and normalizer
    results = ["Tensor"] * (8 + bool(more))
    saved = [*operands[:-1], "Tensor saved", "Tensor entropy", "Tensor sizes", *([f"Tensor {more}"] if more else [])]
    gradient = f"{name}_backward"
    _library.define(f"{name}({', '.join(operands)}, {call}) -> ({', '.join(results)})", tags=_TAGS)
    _library.define(
        f"{gradient}(Tensor? grad_output, Tensor? by_entropy, {', '.join(saved)}, bool[] needs, {call}) -> "
        f"({', '.join(['Tensor'] * wanted)})",
        tags=_TAGS,
    )
    for operator, kernel, of_shapes in ((name, forward, fake), (gradient, backward, backward_fake)):
        _library.impl(operator, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastloss::{operator}", of_shapes, lib=_library)
        _register_effectful_op(getattr(ops, operator).default, EffectType.ORDERED)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *stats, kept, sizes, all_weights = output[:8]
        *_, sharded_weight, has_entropy = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats[:-1], *([] if has_entropy else stats[-1:]), *output[5:])
        weight = inputs[wanted - 1]
        if weight is not None and sharded_weight and not inputs[wanted - 2].is_floating_point():
            weight = all_weights
        of_rows = inputs[wanted], kept, stats[-1], sizes
        ctx.save_for_backward(*inputs[: wanted - 1], weight, *of_rows, *output[8:])
        ctx.plain, ctx.count = inputs[wanted + 2 :], len(inputs)

    def differentiate(ctx: Any, grad_output: Tensor | None, *others: Tensor | None) -> Any:
        needs = list(ctx.needs_input_grad[:wanted])
        found = getattr(ops, gradient)(grad_output, others[3], *ctx.saved_tensors, needs, *ctx.plain)
        grads = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        return *grads, *[None] * (ctx.count - wanted)

    torch.library.register_autograd(f"fastloss::{name}", differentiate, setup_context=setup_context, lib=_library)
    return getattr(ops, name)


_TAGS = (torch.Tag.cudagraph_unsafe,)  # a graph would send the header of the call that was recorded
_OPERANDS = ["Tensor target", "Tensor? weight", "Tensor? sample_weight", "Tensor? normalizer"]
_cross_entropy = _define(
    "parallel_cross_entropy",
    ["Tensor logits", *_OPERANDS],
    _CALL,
    _forward,
    _forward_fake,
    _backward,
    _backward_fake,
    "",
)
_linear_cross_entropy = _define(
    "parallel_linear_cross_entropy",
    ["Tensor input", "Tensor linear_weight", "Tensor? linear_bias", *_OPERANDS],
    f"{_HEAD}, {_CALL}",
    _head_forward,
    _head_forward_fake,
    _head_backward,
    _head_backward_fake,
    "kept",
)


def _gather(mine: Tensor, group: str, ranks: int) -> Tensor:
    return _exchange.gather(mine, _resolve_process_group(group))  # type: ignore[arg-type]


_library.define("parallel_gather(Tensor mine, str group, int ranks) -> Tensor", tags=_TAGS)
_library.impl("parallel_gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastloss::parallel_gather", lambda mine, group, ranks: mine.new_empty([ranks, mine.numel()]), lib=_library
)
_register_effectful_op(ops.parallel_gather.default, EffectType.ORDERED)


def _results(call: Call, found: Sequence[Tensor]) -> Sequence[Tensor]:
    return found[:5] if call.stats else found[:1]


def _check(call: Call, t: Operands) -> None:
    """Raises where the size of a result is not known before the graph runs."""
    if call.sharded_weight and call.given is None and not t.target.is_floating_point():
        raise NotImplementedError(
            f"{call.function}(): within torch.compile weight_shard needs shard_sizes where target has class indices: "
            "the graph has to know how many classes all ranks have. Give shard_sizes, or the weights of all classes as "
            "weight"
        )


def gather(mine: Tensor, group: "ProcessGroup") -> Tensor:
    """The vectors of all ranks; not differentiable."""
    found: Tensor = ops.parallel_gather(mine.detach(), group.group_name, dist.get_world_size(group))
    return found


def cross_entropy(call: Call, t: Operands) -> Sequence[Tensor]:
    """Loss and statistics, as ParallelCrossEntropy has them."""
    _check(call, t)
    return _results(call, _cross_entropy(*t, *_plain(call)))


def linear_cross_entropy(
    call: Call, head: Head, x: Tensor, weight: Tensor, bias: Tensor | None, t: Operands
) -> Sequence[Tensor]:
    """Loss and statistics, as ParallelLinearCrossEntropy has them."""
    _check(call, t)
    return _results(call, _linear_cross_entropy(x, weight, bias, *t[1:], *head, *_plain(call)))


__all__ = ["cross_entropy", "gather", "linear_cross_entropy"]
