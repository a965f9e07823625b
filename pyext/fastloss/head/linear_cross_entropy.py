"""``cross_entropy(linear(input, weight, bias), target)`` without the logits: function, module, and their autograd.

``chunked.py`` computes values and gradients, ``chunks.py`` says how many rows are done at once, and
``losses/cross_entropy.py`` checks the arguments that both losses have.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils.checkpoint import checkpoint

from .. import _arguments, errors
from .._autograd import (
    Chunks,
    Grads,
    Needs,
    Path,
    Rules,
    Tensors,
    accum_dtype,
    backward_of_fused,
    batched_by_legacy,
    choose,
    differentiable,
    nothing,
    opaque,
    recording,
    rehearsing,
    saved_tensor_hooks_active,
    tell_rehearsal,
    transforms_active,
    version_of,
)
from .._library import DTYPE_CODES, DTYPES, MEAN, NONE
from .._recorded import not_scriptable
from ..losses import _rowwise
from ..losses.cross_entropy import STATS, CrossEntropyStats, Given, Unmade, canonical, engine, rules
from ..losses.cross_entropy import run as run_on_logits
from . import chunked
from .chunked import COUNT, WANTS, HeadOperands, HeadOptions

_TENSORS, _OPTIONS = len(HeadOperands._fields), len(HeadOptions._fields)

# ---------------------------------------------------------------------------------------------------------- autograd


class _HeadRules(Rules):
    """What the engine asks of a head to scale what forward has made, and :func:`fastloss.explain`."""

    name, tensors, wants, options = "linear_cross_entropy", _TENSORS, WANTS, HeadOptions

    def gradients(self, grad_output: Tensor, tensors: Tensors, o: HeadOptions, needs: Needs) -> Grads:
        """Each chunk is computed again when its turn comes in the backward pass of these."""
        t = chunked.with_denominators(HeadOperands(*tensors), o.of_rows())
        per_row, batched, step = o.reduction == NONE, batched_by_legacy(grad_output), chunked.rows_at_a_time(t, o)
        parts: list[Grads] = []
        with torch.autocast(t.input.device.type, enabled=False):
            for begin in range(0, max(t.input.shape[0], 1), step):
                rows = slice(begin, begin + step)
                s = None if t.sample_weight is None else t.sample_weight[rows]
                part = t._replace(input=t.input[rows], target=t.target[rows], sample_weight=s)
                g = grad_output[rows] if per_row else grad_output
                if batched:
                    parts.append(_chunk_gradients(o, needs, g, *part))
                else:
                    again: Any = {"use_reentrant": False, "preserve_rng_state": False}
                    parts.append(checkpoint(_chunk_gradients, o, needs, g, *part, **again))
        found: list[Tensor | None] = []
        for column, by_row in zip(zip(*parts, strict=True), (True, False, False, True, False), strict=True):
            if column[0] is None:
                found.append(None)
            else:
                found.append(torch.cat(column) if by_row else torch.stack(column).sum(0))  # type: ignore[arg-type]
        return tuple(found)

    def regime(self, tensors: Tensors, o: HeadOptions, path: Path) -> str:
        dtype = str(chunked.held_dtype(HeadOperands(*tensors), o)).removeprefix("torch.")
        return f"torch's products and cross entropy, of logits in {dtype}"

    def chunks(self, tensors: Tensors, o: HeadOptions, needs: Needs) -> Chunks:
        return chunked.chunks_of(HeadOperands(*tensors), o, needs[1])

    def operators(
        self, path: Path, tensors: Tensors, o: HeadOptions, needs: Needs
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of a chunk, but for the last that scale."""
        normalizer = tensors[6] if o.reduction != MEAN else True
        held = chunked.held_dtype(HeadOperands(*tensors), o)
        of_rows = (torch.empty(0, dtype=held, device="meta"), *tensors[3:6], normalizer)
        value, _ = rules.operators(Path.VALUE, of_rows, o.of_chunk(), needs)
        if not any(needs[3:]):
            gradients: tuple[str, ...] = ("cross_entropy_forward_inplace",)
        else:  # by probabilities or class weights as well
            path_of_rows = (any(needs[:3]), needs[3], needs[4])
            forward, backward = rules.operators(Path.RECOMPUTE, of_rows, o.of_chunk(), path_of_rows)
            gradients = (*forward, *backward)
        if path is Path.FUSED:
            return gradients, ("scale_grad_",) * sum(needs)
        return value, gradients if any(needs) else ()

    def gradient_bytes(self, tensors: Tensors, o: HeadOptions, needs: Needs) -> int:
        """Of a chunk, whose logits become their gradient, and of the operands."""
        if not any(needs):
            return 0
        t, chunks = HeadOperands(*tensors), self.chunks(tensors, o, needs)
        sums = sum(tensors[i].numel() * DTYPES[o.accumulate].itemsize for i in (1, 2) if needs[i])
        if needs[1] and chunks.times == 1 and chunked.sums_in_product(t, o):
            held = chunked.held_dtype(t, o)
            sums += t.linear_weight.numel() * (held.itemsize - DTYPES[o.accumulate].itemsize)
        rest = sum(tensors[i].nbytes for i in (0, 3, 4) if needs[i])
        return chunks.nbytes + sums + rest


_head_rules = _HeadRules()


def _as_operands(grads: Grads, operands: Tensors) -> Grads:
    """Rounded once, from the dtype of their sums to that of the operands."""
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, operands, strict=False))


class LinearCrossEntropyFused(Function):
    """The gradients for a grad_output of 1 are made in forward, chunk by chunk, and held as the engine holds them."""

    @staticmethod
    def forward(ctx: Any, o: HeadOptions, *operands: Any) -> Any:
        result = chunked.loss_and_gradients(HeadOperands(*operands), o, ctx.needs_input_grad[1 : WANTS + 1])
        ctx.held = result.grads, None, o, operands, tuple(map(version_of, operands))
        ctx.mark_non_differentiable(*result.stats)
        return (result.loss, *result.stats)

    backward = staticmethod(backward_of_fused(_head_rules, _as_operands))


class LinearCrossEntropyRecompute(Function):
    """The logits are made again in backward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, o: HeadOptions, *operands: Any) -> Any:
        result = chunked.loss_and_gradients(HeadOperands(*operands), o, [False] * WANTS)
        ctx.options = o
        ctx.save_for_backward(*operands)
        ctx.mark_non_differentiable(*result.stats)
        return (result.loss, *result.stats)

    @staticmethod
    def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
        t, needs = HeadOperands(*ctx.saved_tensors), ctx.needs_input_grad[1 : WANTS + 1]
        return (None, *_recomputed(grad_output, t, ctx.options, needs), *[None] * (_TENSORS - WANTS))


def _by_operator(grad_output: Tensor, t: HeadOperands, o: HeadOptions, needs: Needs) -> Grads:
    found = chunked.backward_operator(grad_output, *t, *o, chunked.as_bits(needs))
    return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


def _recomputed(grad_output: Tensor, t: HeadOperands, o: HeadOptions, needs: Needs, recorded: bool = False) -> Grads:
    with torch.no_grad():
        if recorded or batched_by_legacy(grad_output):  # one gradient after the other, as torch does for operators
            grads = _by_operator(grad_output, t, o, needs)
        else:
            grads = chunked.loss_and_gradients(t, o, needs, grad_output, value=False).grads
        grads = _as_operands(grads, t)
    return differentiable(_head_rules, grads, grad_output, t, o, needs)


def _chunk_gradients(o: HeadOptions, needs: Needs, grad_output: Tensor, *operands: Any) -> Grads:
    """Composed of torch operations."""
    t = HeadOperands(*operands)
    x, w, z = _chunk_logits(t, o)
    logits = chunked.as_logits(z, t)
    tensors = (logits, t.target, t.weight, t.sample_weight, t.normalizer)
    wanted = (any(needs[:3]), needs[3], needs[4])
    grad, by_target, by_weight = rules.gradients(grad_output, tensors, o.of_rows(), wanted)
    by_x = by_w = by_bias = None
    if grad is not None:
        grad = grad.reshape(z.shape)
        by_x, by_w, by_bias = grad @ w, grad.t() @ x, grad.sum(0)
    found = by_x, by_w, by_bias, by_target, by_weight
    return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


def _chunk_logits(t: HeadOperands, o: HeadOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and logits of a chunk, differentiable, in the dtype that chunks are held in."""
    rounded = DTYPES[o.logits_dtype]
    held = chunked.held_dtype(t, o)
    x, w = t.input.to(rounded).to(held), t.linear_weight.to(rounded).to(held)
    return x, w, F.linear(x, w, None if t.linear_bias is None else t.linear_bias.to(rounded).to(held))


# ---- transforms of torch.func, forward mode


def _composed(*args: Any) -> tuple[Tensor, ...]:
    """Chunks of logits through :func:`fastloss.cross_entropy`'s engine, which knows transforms and forward mode."""
    t, o = HeadOperands(*args[:_TENSORS]), HeadOptions(*args[_TENSORS:])
    t = chunked.with_denominators(t, o.of_rows())
    options = o.of_rows()
    if o.reduction != NONE:
        options = options._replace(loss_dtype=DTYPE_CODES[torch.float64])
    found: list[tuple[Tensor, ...]] = []
    step = chunked.rows_at_a_time(t, o)
    with torch.autocast(t.input.device.type, enabled=False):
        for begin in range(0, max(t.input.shape[0], 1), step):
            rows = slice(begin, begin + step)
            s = None if t.sample_weight is None else t.sample_weight[rows]
            part = t._replace(input=t.input[rows], target=t.target[rows], sample_weight=s)
            logits = chunked.as_logits(_chunk_logits(part, o)[2], part)
            tensors = (logits, part.target, t.weight, s, t.normalizer)
            found.append(engine(tensors, options))
    losses, *stats = zip(*found, strict=True)
    loss = torch.cat(losses) if o.reduction == NONE else torch.stack(losses).sum(0)
    if stats:
        lse, argmax, entropy = (torch.cat(stats[i]) for i in (0, 1, 3))
        stats = [lse, argmax, chunked.accuracy(argmax, t, options), entropy]  # type: ignore[list-item]
    return (loss.to(DTYPES[o.loss_dtype]), *stats)  # type: ignore[arg-type]


_opaque_composed = opaque(_composed)


# ---- recorded programs


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.options = HeadOptions(*inputs[_TENSORS : _TENSORS + _OPTIONS])
    ctx.in_forward = chunked.from_bits(inputs[-1])
    ctx.mark_non_differentiable(*output[1:])
    kept = [g for g, made in zip(output[5:], ctx.in_forward, strict=True) if made]
    ctx.save_for_backward(*inputs[:_TENSORS], *kept)


def _backward_of_recorded(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
    saved = ctx.saved_tensors
    t, kept = HeadOperands(*saved[:_TENSORS]), list(saved[_TENSORS:])
    needs = ctx.needs_input_grad[:WANTS]
    if any(ctx.in_forward):
        made = [kept.pop(0) if m else None for m in ctx.in_forward]
        with torch.no_grad():
            scaled = tuple(None if g is None else g * grad_output.to(g.dtype) for g in made)
            grads = _as_operands(scaled, t)
        grads = differentiable(_head_rules, grads, grad_output, t, ctx.options, ctx.in_forward)
    else:
        grads = _recomputed(grad_output, t, ctx.options, needs, recorded=True)
    return (*grads, *[None] * (_TENSORS - WANTS + _OPTIONS + 1))


torch.library.register_autograd(
    "fastloss::linear_cross_entropy_forward",
    _backward_of_recorded,
    setup_context=_setup_context,
    lib=chunked.library,
)


def _is_abstract(t: HeadOperands) -> bool:
    """Whether somebody looks at operators instead of values."""
    ordinary = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return any(x is not None and (x.is_meta or type(x) not in ordinary) for x in t)


def _path(wanted: bool, half: bool, o: HeadOptions, in_forward: bool | None) -> Path:
    return choose(
        wanted=wanted,
        transformed=transforms_active(),
        forward_mode=forward_ad._current_level >= 0,
        fusable=o.reduction != NONE,
        deferred=saved_tensor_hooks_active(),
        in_forward=not (half or DTYPES[o.logits_dtype] is torch.float16) if in_forward is None else in_forward,
        in_place=False,
    )


def _call(t: HeadOperands, o: HeadOptions, in_forward: bool | None) -> tuple[Tensor, ...]:
    """Loss and statistics, by the path that the engine would take for logits."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in t[:WANTS])
    half = any(x is not None and x.requires_grad and x.dtype is torch.float16 for x in t[:WANTS])
    needs = tuple(wanted and x is not None and x.requires_grad for x in t[:WANTS])
    if rehearsing():
        tell_rehearsal(_head_rules.rehearsed(_path(wanted, half, o, in_forward), t, o, needs))
        rows = nothing(t.input, chunked.row_shape(t), torch.int64)
        loss = nothing(t.input, rows.shape if o.reduction == NONE else [], DTYPES[o.loss_dtype])
        return (loss, rows, rows, loss, rows) if o.flags & STATS else (loss,)
    if transforms_active():
        return _opaque_composed(*t, *o)  # type: ignore[no-any-return]
    if forward_ad._current_level >= 0:
        return _composed(*t, *o)
    compiling = torch.compiler.is_compiling()
    if compiling or recording() or _is_abstract(t):
        # A recorded program may be run with other wishes than it was recorded with.
        fused = wanted and compiling and not recording() and o.reduction != NONE
        fused = fused and (not half if in_forward is None else in_forward)
        made = [fused and needed for needed in needs]
        loss, *rest = chunked.forward_operator(*t, *o, chunked.as_bits(made))
        return (loss, *rest[:4]) if o.flags & STATS else (loss,)
    path = _path(wanted, half, o, in_forward)
    if path is Path.VALUE:
        result = chunked.loss_and_gradients(t, o, [False] * WANTS)
        assert result.loss is not None
        return (result.loss, *result.stats)
    function = LinearCrossEntropyFused if path is Path.FUSED else LinearCrossEntropyRecompute
    return function.apply(o, *t)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------- arguments


class Chunking(NamedTuple):
    """How the chunks are made: what :func:`linear_cross_entropy` takes beside the loss's arguments."""

    options: Any = None
    memory_budget: int | None = None
    accumulate_in: torch.dtype | None = None
    max_rows: int | Literal["count"] | None = None


def _check_shapes(function: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """torch's exceptions in torch's order."""
    if input.dim() < 1:
        raise RuntimeError("expected input with dimensionality 1 or 2, got 0: input needs shape (..., in_features)")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}: it needs shape "
            "(C, in_features)"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), got "
            f"{input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    outputs = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != outputs:
        raise RuntimeError(f"expected linear_bias shape {outputs}, got {tuple(linear_bias.shape)}")
    if len(outputs) > 1 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[0]}), got unbatched input with shape {tuple(input.shape)}"
        )


def _logits_dtype(function: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> torch.dtype:
    """What linear would return, under autocast too."""
    kind = input.device.type
    autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)

    def of(t: Tensor) -> torch.dtype:
        cast = autocast and t.is_floating_point() and t.dtype is not torch.float64
        return torch.get_autocast_dtype(kind) if cast else t.dtype

    dtype = of(input)
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and of(t) is not dtype:
            raise RuntimeError(
                f"{function}(): input and {name} must have the same dtype, but got {input.dtype} and {t.dtype}; "
                f"convert one, or call under torch.autocast"
            )
    return dtype


def _flattened(function: str, name: str, t: Tensor, lead: Sequence[int]) -> Tensor:
    """[*lead, ...] as [rows, ...]."""
    if list(t.shape[: len(lead)]) != list(lead):
        raise RuntimeError(
            f"expected input with dimensionality 1 or 2, got {len(lead) + 1}: {function}() takes more with a {name} "
            f"whose shape begins with {list(lead)}, as the input's does, but got {list(t.shape)}"
        )
    return t.reshape(math.prod(lead), *t.shape[len(lead) :])


def _integer(function: str, name: str, value: Any, least: int) -> int:
    value = _arguments.as_int(function, name, value)
    if value < least:
        raise ValueError(f"{function}(): {name} must be at least {least}, got {value}")
    return value


def _rows(function: str, c: Chunking, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> int:
    """Of a chunk, as torch's options have it; 0: the budget says."""
    options = c.options
    if options is None:
        return 0
    if not hasattr(options, "batch_chunk_size"):
        raise TypeError(
            f"{function}(): options must be torch.nn.LinearCrossEntropyOptions, not {type(options).__name__}"
        )
    if options.batch_chunk_size is None and options.chunking_method is not None:
        if recording():  # a choice by the sizes of this call alone
            return 0
        if all(shape):
            options = options._adjust(*shape, dtype, device)
    return options.batch_chunk_size or sys.maxsize


def _accumulate(function: str, c: Chunking, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradients by weight and bias are summed up."""
    asked = c.accumulate_in
    if asked is None:
        return accum_dtype(dtype)
    if asked not in (dtype, accum_dtype(dtype), torch.float64):
        raise ValueError(
            f"{function}(): accumulate_in must be {accum_dtype(dtype)}, torch.float64 or {dtype}, the "
            f"logits' dtype, got {asked!r}"
        )
    return asked


def _max_rows(function: str, c: Chunking) -> int:
    if c.max_rows is None:
        return 0
    if c.max_rows == "count":
        return COUNT
    if isinstance(c.max_rows, str):
        raise ValueError(f"{function}(): max_rows must be a number, 'count' or None, got {c.max_rows!r}")
    return _integer(function, "max_rows", c.max_rows, 1)


def run(
    function: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    g: Given,
    c: Chunking,
    ignore_index: int | Sequence[int] | None = None,
    row_map: int = 0,
    map_params: tuple[float, ...] = (),
) -> Any:
    """The loss that ``function`` asks for, each row's nll mapped as ``row_map`` says; see ``cross_entropy.run``."""
    tensors = input, linear_weight, linear_bias, target, g.weight, g.sample_weight
    if _arguments.is_dtensor(*tensors):
        from ..parallel.dtensor import run_linear

        return run_linear(function, input, linear_weight, linear_bias, target, g, c, ignore_index, row_map, map_params)
    for name, t in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        _arguments.require_tensor(name, t, function)
    if linear_bias is not None:
        _arguments.require_tensor("linear_bias", linear_bias, function)
    _arguments.refuse_strided_nested(function, input, target)
    _check_shapes(function, input, linear_weight, linear_bias)
    _arguments.require_supported_tensors(function, input, linear_weight, linear_bias, target)
    others = ("linear_weight", linear_weight), ("linear_bias", linear_bias)
    _arguments.require_same_device(function, ("input", input), *others)
    lead, features = input.shape[:-1], input.shape[-1]
    classes, outputs = linear_weight.shape[0], linear_weight.shape[1:-1]
    rows = math.prod(lead)
    if target.shape == (*lead, classes, *outputs) and ignore_index is not None:
        raise RuntimeError(
            "ignore_index cannot be specified when target contains probabilities; give the rows to leave out a "
            "sample_weight of 0"
        )
    sample_weight = g.sample_weight
    if len(lead) > 1:
        target = _flattened(function, "target", target, lead)
        if isinstance(sample_weight, Tensor):
            sample_weight = _flattened(function, "sample_weight", sample_weight, lead)
    g = g._replace(sample_weight=sample_weight, ignore_index=-100 if ignore_index is None else ignore_index)
    dtype = _logits_dtype(function, input, linear_weight, linear_bias)
    single, matrix = input.dim() == 1, linear_weight.reshape(classes * math.prod(outputs), features)
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    shape = (classes,) if single else (rows, classes, *outputs)
    if classes == 0:  # there are no logits to make
        made = F.linear(input.reshape(rows, features), matrix, bias).reshape(shape)
        return run_on_logits(function, made, target, g, row_map, map_params)
    checked = canonical(function, Unmade(shape, dtype, input.device), target, g, row_map, map_params)
    _, target, weight, sample_weight, normalizer = checked.tensors
    soft = target.is_floating_point()
    row_dims = _rowwise.row_shape(target) if soft else list(target.shape)  # [rows, *outputs]
    if outputs:
        target = target.reshape(rows, classes, math.prod(outputs)) if soft else target.reshape(rows, math.prod(outputs))
        if sample_weight is not None:
            sample_weight = sample_weight.reshape(rows, math.prod(outputs))
    operands = HeadOperands(input.reshape(rows, features), matrix, bias, target, weight, sample_weight, normalizer)
    size = rows, features, matrix.shape[0]
    o = HeadOptions(
        *checked.options,
        rows=_rows(function, c, size, dtype, input.device),
        budget=0 if c.memory_budget is None else _integer(function, "memory_budget", c.memory_budget, 1),
        max_rows=_max_rows(function, c),
        logits_dtype=DTYPE_CODES[dtype],
        accumulate=DTYPE_CODES[_accumulate(function, c, dtype)],
    )
    loss, *stats = _call(operands, o, g.grad_in_forward)
    if errors.immediate_errors() and input.is_cuda:
        errors.check_errors()
    final = checked.single_shape if single else (*lead, *row_dims[1:])
    if o.reduction == NONE:
        loss = loss.reshape(() if single else final)
    if not g.return_stats:
        return loss
    lse, argmax, accuracy, entropy = stats
    return loss, CrossEntropyStats(lse.reshape(final), argmax.reshape(final), accuracy, entropy.reshape(final))


# ------------------------------------------------------------------------------------------------- function, module


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | Sequence[int] | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    all_ignored: Literal["nan", "zero"] = "nan",
    zero_times_inf: Literal["nan", "zero"] = "nan",
    return_stats: bool = False,
    grad_in_forward: bool | None = None,
    loss_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    accumulate_in: torch.dtype | None = None,
    max_rows: int | Literal["count"] | None = None,
) -> Any:
    r"""Cross entropy of ``linear(input, linear_weight, linear_bias)`` without making the logits; a drop-in for
    :func:`torch.nn.functional.linear_cross_entropy`.

    The logits are made a chunk of rows at a time, in a buffer that all chunks share. No combination of arguments makes
    all of them at once. Rows that are ignored, or whose ``sample_weight`` is 0, are left out of the products on a CPU
    (unless ``return_stats`` asks for their statistics), on a GPU with ``max_rows``.

    Args:
        input: hidden states, shape (D), (N, D) or (..., D); float32, float64, float16 or bfloat16.
        linear_weight: shape (C, D), or (C, d1, ..., dK, D) for logits of shape (N, C, d1, ..., dK); dtype of the input
            (under autocast: any).
        target: class indices of shape (), (N) or (...) (and d1, ..., dK behind), any integer dtype, or probabilities in
            the shape of the logits, any floating dtype.
        linear_bias: shape of ``linear_weight`` without its last dimension.
        weight: weight of each class, shape (C), any floating dtype. Differentiable with probability targets.
        reduction, label_smoothing, z_loss, softcap, logit_scale, sample_weight, normalizer, all_ignored,
            zero_times_inf, return_stats, loss_dtype: as :func:`fastloss.cross_entropy`.
        ignore_index: class index (or several) that marks targets to leave out; None: -100, and nothing else goes with
            probabilities.
        options: :class:`torch.nn.LinearCrossEntropyOptions`; its size of a chunk is kept to (in recorded programs only
            where it is given as a number), the rest does not apply.
        grad_in_forward: make the gradients in forward (three products) or make the logits again in backward (four, and
            no gradient held in between). None, the default, chooses forward for scalar reductions except for float16.
        memory_budget: bytes that the logits of a chunk may take. None: as much as the input, and at least 64 MiB; on a
            GPU also 1024 rows, which feed its products, if they take no more than the weight in float32; on a CPU all
            rows, where these exceed that by no more than the sums in float32 that several chunks of 16 bits need.
        accumulate_in: dtype in which the gradients of weight and bias are summed up over the chunks before they are
            rounded, once. None: float32 (float64 for float64); the logits' own dtype takes less memory. Where one chunk
            holds all rows, a CPU's product in 16 bits, which sums up in float32, is the weight's gradient, and rounded
            before backward scales it.
        max_rows: on a GPU, how many rows count at most: others are left out of the products without waiting for the
            GPU. More than that make the loss nan (on a CPU a ValueError). ``'count'`` counts them, and waits.

    Returns:
        The loss: shape () or, for ``'none'``, that of an index target; dtype as :func:`fastloss.cross_entropy` of the
        logits. With ``return_stats`` a pair (loss, stats).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index; on CUDA by a later call.
        RuntimeError, ValueError, TypeError, NotImplementedError: as torch, for shapes, dtypes and arguments.

    On a CPU without instructions for products of 16 bits, and for a weight of fewer than 2**20 elements, 16-bit logits
    are held in float32. Second derivatives make each chunk again. Under torch.func and forward mode the logits are made
    in chunks as well, but reverse mode then keeps them.

    Example::

        >>> loss = fastloss.linear_cross_entropy(hidden, lm_head.weight, labels, softcap=30.0)
    """
    tensors = (input, linear_weight, target, linear_bias, weight, sample_weight)
    if has_torch_function_variadic(*tensors):
        given = {n: v for n, v in locals().items() if n not in ("input", "linear_weight", "target", "tensors")}
        return handle_torch_function(linear_cross_entropy, tensors, input, linear_weight, target, **given)
    g = Given(
        weight=weight,
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
        grad_in_forward=grad_in_forward,
        loss_dtype=loss_dtype,
    )
    c = Chunking(options, memory_budget, accumulate_in, max_rows)
    return run("linear_cross_entropy", input, linear_weight, linear_bias, target, g, c, ignore_index)


class LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """:func:`linear_cross_entropy` as a module with the linear layer in it; a drop-in for
    :class:`torch.nn.LinearCrossEntropyLoss`, with the same state dict.

    Args:
        in_features, num_classes: of the layer.
        out_features: (d1, ..., dK) of a K-dimensional loss; the layer has ``num_classes * d1 * ... * dK`` outputs.
        bias, device, dtype: of the layer.
        reduction, weight, ignore_index, label_smoothing, options: as :func:`linear_cross_entropy`; ``weight`` is a
            buffer.
        further: what else :func:`linear_cross_entropy` takes, by name; ``sample_weight`` is an argument of the call.

    Raises:
        RuntimeError: ``weight`` of another shape, ``label_smoothing`` outside [0, 1].

    Example::

        >>> fastloss.LinearCrossEntropyLoss(512, 32000, bias=True)(hidden, labels).backward()
    """

    __prepare_scriptable__ = not_scriptable

    # Of modules that were torch's before they became one of this class.
    further: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | Sequence[int] | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **further: Any,
    ) -> None:
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        if unknown := further.keys() - _FURTHER:
            raise TypeError(f"LinearCrossEntropyLoss() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.options, self.further = options, further
        outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """As torch's, and what goes beyond it."""
        shown = {
            "in_features": self.linear.in_features,
            "num_classes": self.num_classes,
            "out_features": self.out_features,
            "bias": self.linear.bias is not None,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "options": self.options,
            **self.further,
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Any:
        """The loss of hidden states (N, in_features) against targets, as :func:`linear_cross_entropy`."""
        outputs = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*outputs, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(outputs),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            sample_weight=sample_weight,
            **self.further,
        )


_FURTHER = {
    "z_loss",
    "softcap",
    "logit_scale",
    "normalizer",
    "all_ignored",
    "zero_times_inf",
    "return_stats",
    "grad_in_forward",
    "loss_dtype",
    "memory_budget",
    "accumulate_in",
    "max_rows",
}
