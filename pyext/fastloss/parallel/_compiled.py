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
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._pytree import tree_map

from .._autograd import accum_dtype
from .._library import ops
from ..losses import _rowwise
from ..rows import RowOptions
from . import _exchange
from ._exchange import Layout
from .cross_entropy import (
    Call,
    Merged,
    SavedForBackward,
    ShardOperands,
    gradients,
    loss_of,
    loss_of_logits,
    stacked_for,
    statistics,
)
from .linear_cross_entropy import Head, head_gradients, loss_of_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_library = torch.library.Library("fastloss", "FRAGMENT")

# RowOptions, Call and Head, as an operator takes them.
_OPTIONS = {
    "reduction": "str",
    "ignore_index": "SymInt",
    "label_smoothing": "float",
    "z_loss": "float",
    "softcap": "float?",
    "logit_scale": "float",
    "row_map": "str",
    "map_params": "float[]",
    "all_ignored": "str",
    "zero_times_inf": "str",
    "loss_dtype": "ScalarType",
}
_CALL = (
    f"str function, str group, SymInt[]? sizes, {', '.join(f'{kind} {name}' for name, kind in _OPTIONS.items())}, "
    "bool stats, bool sharded_weight, bool entropy"
)
_HEAD = "ScalarType logits_dtype, SymInt? budget, bool gathered"


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """As outside of an operator's kernel, where torch.func, which differentiates row maps, is shut out."""
    none = torch._C.DispatchKeySet.from_raw_repr(0)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), none), torch.no_grad():
        yield


def _plain(call: Call) -> list[Any]:
    options = [getattr(call.options, name) for name in _OPTIONS]
    options = [list(v) if isinstance(v, tuple) else v for v in options]
    sizes = None if call.given is None else list(call.given.sizes)
    return [call.function, call.group.group_name, sizes, *options, call.stats, call.sharded_weight, call.entropy]


def _call(function: str, group_name: str, sizes: Sequence[int] | None, *rest: Any) -> Call:
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    given = None if sizes is None else _exchange.given_layout(function, sizes, group)
    named = dict(zip(_OPTIONS, rest, strict=False))
    options = RowOptions(total_classes=1, **named | {"map_params": tuple(named["map_params"])})
    return Call(function, group, given, options, *rest[len(_OPTIONS) :])


def _or_empty(tensors: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What an operator returns; without elements what there is not."""
    return tuple(like.new_empty([0]) if t is None else t for t in tensors)


_FOUND = 9  # results of _found


def _found(call: Call, m: Merged, target: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """What a forward operator returns: loss, statistics, what backward needs."""
    stats = statistics(m.row, target, m.best, call.options) if call.stats else (None,) * 4
    sizes = torch.tensor(m.layout.sizes, dtype=torch.int64)
    return _or_empty([m.row.loss, *stats, m.row.saved, sizes, *(m.met or (None, None))], like)


def _expected(call: Call, t: ShardOperands, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """:func:`_found`, as far as shapes and dtypes go: of ranks with a class each."""
    ranks = dist.get_world_size(call.group)
    layout, count = Layout((1,) * ranks, 0), 1
    for n in shape:
        count *= n
    length = stacked_for(call, t.target).length(count)
    numbers = t.logits.new_empty([ranks, length], dtype=accum_dtype(t.logits.dtype))
    # A row map is differentiated, which fake tensors do not let it be here; it saves so many numbers more.
    mapped = 0 if call.options.row_map == "none" else 2 if t.target.is_floating_point() else 1
    plain = replace(call.options, row_map="none", map_params=())
    m = loss_of(call._replace(options=plain), t._replace(weight=None), shape, layout, numbers)
    m = m._replace(row=m.row._replace(saved=m.row.saved.new_empty([m.row.saved.numel() + mapped * count])))
    return _found(call, m, t.target, t.logits)


def _known(call: Call, sizes: Tensor, kept: SavedForBackward) -> tuple[Layout, SavedForBackward]:
    """Of a backward operator, to which forward's tensors without elements say that there are none."""
    layout = Layout(tuple(sizes.tolist()), dist.get_rank(call.group))
    if not call.sharded_weight or kept.target.is_floating_point():
        kept = kept._replace(of_targets=None, total=None)
    return layout, kept.with_known_weights(call, layout)


# ------------------------------------------------------------------------------------------------- logits as they are
#
# Forward operators take operands and options in the order of the schema; backward operators the gradients by loss and
# entropies, which gradients are wanted, how many classes each rank has, operands, what forward kept, and options.


def _forward(*given: Any) -> tuple[Tensor, ...]:
    t, call = ShardOperands(*given[:5]), _call(*given[5:])
    with _outside():
        m = loss_of_logits(call, t)
    return _found(call, m, t.target, t.logits)


def _forward_fake(*given: Any) -> tuple[Tensor, ...]:
    t = ShardOperands(*given[:5])
    return _expected(_call(*given[5:]), t, _rowwise.row_shape(t.logits))


def _backward(
    grad_output: Tensor | None,
    by_entropy: Tensor | None,
    needs: Sequence[bool],
    sizes: Tensor,
    logits: Tensor,
    *given: Any,
) -> tuple[Tensor, ...]:
    call = _call(*given[_SAVED:])
    layout, known = _known(call, sizes, SavedForBackward(*given[:_SAVED]))
    return _or_empty(gradients(call, layout, logits, known, grad_output, by_entropy, needs), logits)


_SAVED = len(SavedForBackward._fields)


# ------------------------------------------------------------------------------------------------------- linear heads


def _linear(given: Sequence[Any]) -> tuple[Any, ShardOperands, Head, Call]:
    """Input, weight and bias, other operands, and options of a forward operator."""
    linear, others, head, call = given[:3], given[3:7], Head(*given[7:10]), _call(*given[10:])
    return linear, ShardOperands(linear[0].new_empty([0], dtype=head.dtype), *others), head, call


def _head_forward(*given: Any) -> tuple[Tensor, ...]:
    (x, weight, bias), t, head, call = _linear(given)
    with _outside():
        m, logits = loss_of_head(call, head, x, weight, bias, t)
    return *_found(call, m, t.target, x), x.new_empty([0, 0]) if logits is None else logits


def _head_forward_fake(*given: Any) -> tuple[Tensor, ...]:
    (x, weight, _), t, head, call = _linear(given)
    count, features = x.shape
    count *= dist.get_world_size(call.group) if head.gathered else 1
    logits = x.new_empty([0, 0])
    if head.rows(count, features, weight.shape[0], x.device) >= count:
        logits = x.new_empty([max(count, 1), weight.shape[0]], dtype=head.held(x.device))
    return *_expected(call, t, [count]), logits


def _head_backward(
    grad_output: Tensor | None,
    by_entropy: Tensor | None,
    needs: Sequence[bool],
    sizes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *given: Any,
) -> tuple[Tensor, ...]:
    logits, options = given[_SAVED], given[_SAVED + 1 :]
    head, call = Head(*options[:3]), _call(*options[3:])
    layout, known = _known(call, sizes, SavedForBackward(*given[:_SAVED]))
    linear = x, weight, bias, None if logits.shape[0] == 0 else logits
    with torch.autocast(x.device.type, enabled=False):
        return _or_empty(head_gradients(call, head, layout, linear, known, grad_output, by_entropy, needs), x)


# ------------------------------------------------------------------------------------------------------------ operators


def _keep_in_order(operator: Any) -> None:
    """Inductor of torch 2.13 notes what an operator whose order matters has to wait for under the name of a buffer, and
    looks it up under that of an operation, so that it moves operators past each other: this notes it under both."""

    def lower(*args: Any, **kwargs: Any) -> Any:
        graph, first = V.graph, len(V.graph.operations)
        found = ir.FallbackKernel.create(operator, *args, **kwargs)
        last: Any = graph.effectful_ops.get(EffectType.ORDERED)
        noted: Any = getattr(graph, "additional_star_deps", None)  # not in every torch
        for each in graph.operations[first:] if last is not None and noted is not None else ():
            noted[each.get_operation_name()].add(last.get_name())
        return tree_map(lambda x: x.wrap_for_lowering() if isinstance(x, ir.IRNode) else x, found)

    register_lowering(operator, type_promotion_kind=None)(lower)


def _define(
    name: str,
    operands: Sequence[str],
    options: str,
    forward: Any,
    fake: Any,
    backward: Any,
    memory_format: torch.memory_format,
    logits: bool,
) -> Any:
    """The operator of a loss, that of its gradients, and how autograd goes from one to the other.

    Args:
        operands: those before the ones that every loss has.
        options: what the operators take after the tensors.
        memory_format: of the gradients.
        logits: whether forward makes logits and keeps them for backward, or a tensor without rows.
    """
    wanted = len(operands) + 2  # with the target and its class weights, which may have gradients
    more, gradient = ["Tensor logits"] if logits else [], f"{name}_backward"
    results = ", ".join(["Tensor"] * (_FOUND + len(more)))
    _library.define(f"{name}({', '.join([*operands, *_OPERANDS])}, {options}) -> ({results})", tags=_TAGS)
    of_backward = ", ".join([*operands, *_OF_BACKWARD, *more])
    _library.define(
        f"{gradient}(Tensor? grad_output, Tensor? by_entropy, bool[] needs, Tensor sizes, {of_backward}, {options}) -> "
        f"({', '.join(['Tensor'] * wanted)})",
        tags=_TAGS,
    )

    def gradients_fake(
        grad_output: Any, by_entropy: Any, needs: Sequence[bool], sizes: Any, *given: Any
    ) -> tuple[Tensor, ...]:
        of_operands = zip(given, needs, strict=False)
        grads = [torch.empty_like(t, memory_format=memory_format) if needed else None for t, needed in of_operands]
        return _or_empty(grads, given[0])

    for operator, kernel, of_shapes in ((name, forward, fake), (gradient, backward, gradients_fake)):
        _library.impl(operator, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastloss::{operator}", of_shapes, lib=_library)
        _register_effectful_op(getattr(ops, operator).default, EffectType.ORDERED)
        _keep_in_order(getattr(ops, operator).default)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *stats, saved, sizes, of_targets, total = output[:_FOUND]
        ctx.set_materialize_grads(False)
        entropy_has_gradient = inputs[-1]
        ctx.mark_non_differentiable(*(stats[:-1] if entropy_has_gradient else stats), *output[5:])
        target_and_weights = inputs[len(operands) : wanted + 1]
        kept = *target_and_weights, saved, stats[-1], of_targets, total
        ctx.save_for_backward(sizes, *inputs[: len(operands)], *kept, *output[_FOUND:])
        ctx.options, ctx.count = inputs[wanted + 2 :], len(inputs)

    def differentiate(ctx: Any, grad_output: Tensor | None, *others: Tensor | None) -> Any:
        needs = list(ctx.needs_input_grad[:wanted])
        found = getattr(ops, gradient)(grad_output, others[3], needs, *ctx.saved_tensors, *ctx.options)
        grads = [g if needed else None for g, needed in zip(found, needs, strict=True)]
        return *grads, *[None] * (ctx.count - wanted)

    torch.library.register_autograd(f"fastloss::{name}", differentiate, setup_context=setup_context, lib=_library)
    return getattr(ops, name)


_TAGS = (torch.Tag.cudagraph_unsafe,)  # a graph would send the header of the call that was recorded
_OPERANDS = ["Tensor target", "Tensor? weight", "Tensor? sample_weight", "Tensor? normalizer"]
# The fields of SavedForBackward.
_OF_BACKWARD = [*_OPERANDS[:3], "Tensor saved", "Tensor entropy", "Tensor of_targets", "Tensor total"]
_cross_entropy = _define(
    "parallel_cross_entropy",
    ["Tensor logits"],
    _CALL,
    _forward,
    _forward_fake,
    _backward,
    torch.preserve_format,
    logits=False,
)
_linear_cross_entropy = _define(
    "parallel_linear_cross_entropy",
    ["Tensor input", "Tensor linear_weight", "Tensor? linear_bias"],
    f"{_HEAD}, {_CALL}",
    _head_forward,
    _head_forward_fake,
    _head_backward,
    torch.contiguous_format,
    logits=True,
)


def _gather(mine: Tensor, group: str, ranks: int) -> Tensor:
    return _exchange.gather(mine, _resolve_process_group(group))  # type: ignore[arg-type]


_library.define("parallel_gather(Tensor mine, str group, int ranks) -> Tensor", tags=_TAGS)
_library.impl("parallel_gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastloss::parallel_gather", lambda mine, group, ranks: mine.new_empty([ranks, mine.numel()]), lib=_library
)
_register_effectful_op(ops.parallel_gather.default, EffectType.ORDERED)
_keep_in_order(ops.parallel_gather.default)


def _results(call: Call, found: Sequence[Tensor]) -> Sequence[Tensor]:
    return found[:5] if call.stats else found[:1]


def gather(mine: Tensor, group: "ProcessGroup") -> Tensor:
    """The vectors of all ranks; not differentiable."""
    found: Tensor = ops.parallel_gather(mine.detach(), group.group_name, dist.get_world_size(group))
    return found


def cross_entropy(call: Call, t: ShardOperands) -> Sequence[Tensor]:
    """Loss and statistics, as ParallelCrossEntropy has them."""
    return _results(call, _cross_entropy(*t, *_plain(call)))


def linear_cross_entropy(
    call: Call, head: Head, x: Tensor, weight: Tensor, bias: Tensor | None, t: ShardOperands
) -> Sequence[Tensor]:
    """Loss and statistics, as ParallelLinearCrossEntropy has them."""
    return _results(call, _linear_cross_entropy(x, weight, bias, *t[1:], *head, *_plain(call)))


__all__ = ["cross_entropy", "gather", "linear_cross_entropy"]
