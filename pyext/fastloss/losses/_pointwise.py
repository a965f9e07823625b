"""What the pointwise losses share: reductions, weights, masks, broadcasting, and the rules of autograd.

A loss is f(prediction, target) summed over elements; its mathematics is in ``csrc/pointwise/losses.h``, the contract of
the kernels in ``csrc/pointwise/pointwise.h``. A loss's own file gives the names, the docstring and the parameter, and
calls :func:`pointwise_loss`. Two ways to a gradient:

- *fused* (scalar reductions): the gradient is computed with the value, 2 reads and 1 write in all. Where its factor is
  known beforehand (a sum, a mean over all elements) backward scales it by grad_output, or returns it untouched when
  that is 1; where it is known at the end only (a mean over a mask or by weights, a root), it is scaled once, in place;
- *recomputing* (reduction ``none``, small roots, float16, saved tensor hooks, torch.compile, torch.func, forward mode):
  forward keeps nothing but the factor; backward reads the operands again and writes the gradient.

Operands are never copied to be broadcast or made contiguous: the kernels take strides.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import define_recorded, loop_vmap, ops
from . import _common
from ._common import DTYPE_CODES, DTYPES, MEAN, NONE, REDUCTIONS, SUM

GRAD_INPUT, GRAD_TARGET = 1, 2  # bits of `flags`, as in pointwise_torch.cpp
NUMBERS: dict[str, int] = {name: i for i, name in enumerate(ops.pointwise_losses().split())}
_ROOTS = frozenset((NUMBERS["rmse_loss"],))
MAX_DIMS = 24


class Options(NamedTuple):
    """The operators' trailing arguments, in their order."""

    loss: int
    param: float
    reduction: int
    row_dims: int
    weight_denominator: float
    loss_dtype: int
    flags: int = 0


# ------------------------------------------------------------------------------------------------ fake kernels, vmap


def _like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The layout of t where that is dense, else contiguous."""
    if _common.is_dense(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype or t.dtype, device=t.device)
    return torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device)


def _fake_loss(input: Tensor, o: Options) -> Tensor:
    if o.reduction == NONE:
        return _like(input, DTYPES[o.loss_dtype])
    return input.new_empty(input.shape[: o.row_dims], dtype=DTYPES[o.loss_dtype])


def _fake_grads(input: Tensor, target: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    nothing = [0]
    return (
        _like(input) if o.flags & GRAD_INPUT else input.new_empty(nothing, dtype=torch.float32),
        _like(target) if o.flags & GRAD_TARGET else input.new_empty(nothing, dtype=torch.float32),
    )


@torch.library.register_fake("fastloss::pointwise_forward")
def _(input: Any, target: Any, weight: Any, mask: Any, *options: Any) -> Any:
    o = Options(*options)
    rows = [0] if o.reduction == NONE else input.shape[: o.row_dims]
    return (_fake_loss(input, o), input.new_empty(rows, dtype=torch.float64), *_fake_grads(input, target, o))


@torch.library.register_fake("fastloss::pointwise_backward")
def _(grad_output: Any, input: Any, target: Any, weight: Any, mask: Any, factor: Any, *options: Any) -> Any:
    return _fake_grads(input, target, Options(*options))


@torch.library.register_fake("fastloss::pointwise_second")
def _(
    grad_output: Any,
    input: Any,
    target: Any,
    weight: Any,
    mask: Any,
    factor: Any,
    tangent_input: Any,
    tangent_target: Any,
    *options: Any,
) -> Any:
    o = Options(*options)
    loss = input.new_empty([0], dtype=torch.float32) if o.flags else _fake_loss(input, o)
    return (loss, *_fake_grads(input, target, o))


for _name, _outputs in (("pointwise_forward", 4), ("pointwise_backward", 2), ("pointwise_second", 3)):
    torch.library.register_vmap(f"fastloss::{_name}", loop_vmap(getattr(ops, _name), _outputs))


# ---------------------------------------------------------------------------------------------------------- autograd


def flags_of(need_input: bool, need_target: bool) -> int:
    return GRAD_INPUT * need_input + GRAD_TARGET * need_target


def wanted(flags: int, grad_input: Any, grad_target: Any) -> tuple[Any, Any]:
    """The operators' two gradients, None where there is none."""
    return grad_input if flags & GRAD_INPUT else None, grad_target if flags & GRAD_TARGET else None


def _only(flags: int, grads: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(g for g, bit in zip(grads, (GRAD_INPUT, GRAD_TARGET), strict=True) if flags & bit)


def _both(flags: int, grads: Sequence[Any]) -> tuple[Any, Any]:
    """The inverse of :func:`_only`."""
    rest = iter(grads)
    return next(rest) if flags & GRAD_INPUT else None, next(rest) if flags & GRAD_TARGET else None


class _Gradient(Function):
    """First derivatives, those wanted, differentiable through the second ones of the same definition."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        o = Options(*args[6:])
        grads = _only(o.flags, ops.pointwise_backward(*args))
        _save_gradient(ctx, args, grads)
        return grads

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_output, input, target, weight, mask, factor = ctx.saved_tensors
        need = ctx.needs_input_grad
        tangents = _both(ctx.options.flags, grad_outputs)
        rest = [None] * (3 + len(Options._fields))
        if all(t is None for t in tangents):
            return (None, None, None, *rest)
        _refuse_legacy(*tangents)
        tensors = (input, target, weight, mask, factor)
        o = ctx.options._replace(flags=0)
        along = _second(None, tensors, tangents, o)[0] if need[0] else None
        o = o._replace(flags=flags_of(need[1], need[2]))
        grads = wanted(o.flags, *_second(grad_output, tensors, tangents, o)[1:]) if o.flags else (None, None)
        return (along, *grads, *rest)

    @staticmethod
    def jvp(ctx: Any, grad_output_t: Any, input_t: Any, target_t: Any, *_: Any) -> Any:
        o = ctx.options
        sums: tuple[Any, ...] = ()
        with _common.saved_for_jvp(ctx) as (grad_output, *tensors):
            if grad_output_t is not None:
                sums = gradients(grad_output_t.contiguous(), *tensors, *o)
            if input_t is not None or target_t is not None:
                second = _only(o.flags, _second(grad_output, tensors, (input_t, target_t), o)[1:])
                sums = tuple(a + b for a, b in zip(sums, second, strict=True)) if sums else second
        return sums


def _save_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.options = Options(*inputs[6:])
    ctx.save_for_backward(*inputs[:6])
    ctx.save_for_forward(*inputs[:6])
    ctx.set_materialize_grads(False)


class _GradientTransformed(Function):
    """The same in the form that torch.func transforms ask for. Options come one by one: functorch miscounts tuples."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _only(Options(*args[6:]).flags, ops.pointwise_backward(*args))

    setup_context = staticmethod(_save_gradient)
    backward = staticmethod(_Gradient.backward)  # type: ignore[assignment]
    jvp = staticmethod(_Gradient.jvp)


def gradients(*args: Any) -> tuple[Any, ...]:
    """First derivatives, those wanted, that can be differentiated; arguments as for the operator."""
    return (_GradientTransformed if _common.functorch_active() else _Gradient).apply(*args)


def _refuse_legacy(*tensors: Tensor | None) -> None:
    """In a backward pass that is to be differentiated."""
    if torch.is_grad_enabled() and _common.batched_by_legacy(*tensors):
        raise NotImplementedError(
            "pointwise losses of fastloss: create_graph=True together with vectorize=True or is_grads_batched=True; "
            "use vectorize=False or torch.func"
        )


def _formula(loss: int, param: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of one element composed of torch operations, which tests and benchmarks hold the kernels to as well."""
    from ..testing.pointwise import LOSSES

    name = ops.pointwise_losses().split()[loss]
    symmetric = name.startswith("symmetric_")
    name = name.removeprefix("symmetric_").removeprefix("wide_")
    formula = LOSSES[name].formula
    parameters = list(inspect.signature(formula).parameters)[2:]
    named = dict(zip(parameters, (param, symmetric), strict=False))
    return lambda x, t: formula(x, t, **named)


def _second(
    grad_output: Tensor | None, tensors: Sequence[Any], tangents: Sequence[Tensor | None], o: Options
) -> tuple[Any, Any, Any]:
    """The operator ``pointwise_second``: derivatives along tangents of the loss (no flags) or of its gradients.

    Where it is differentiated again, third and higher derivatives are those of the formula.
    """
    args = (grad_output, *tensors, *tangents)
    input, target, weight, mask, factor = tensors
    with torch.no_grad():
        loss, *grads = ops.pointwise_second(*args, *o)
    if not _common.differentiated_again(grad_output, input, target, *tangents) or _common.batched_by_legacy(*tangents):
        return loss, *grads
    accum = _common.accum_dtype(DTYPES[o.loss_dtype])
    counts = torch.ones_like(input, dtype=torch.bool) if mask is None else mask
    if weight is not None:
        counts = counts & (weight != 0)
    # What is left out may hold anything.
    x, t = (torch.where(counts, t.to(accum), 1.0) for t in (input, target))
    x_t, t_t = (torch.zeros_like(x) if t is None else torch.where(counts, t.to(accum), 0.0) for t in tangents)
    scale = torch.where(counts, 1.0 if weight is None else weight, 0.0)
    cols = list(range(o.row_dims, input.dim()))
    if o.reduction != NONE:
        scale = scale * factor.view([*factor.shape, *[1] * len(cols)])
    formula = _formula(o.loss, o.param)

    def along(x: Tensor, t: Tensor) -> Tensor:
        f_x, f_t = torch.func.vjp(formula, x, t)[1](torch.ones_like(x))
        return scale * (f_x * x_t + f_t * t_t)

    if not o.flags:
        total = along(x, t)
        return _common.attach(loss, total.sum(cols) if o.reduction != NONE and cols else total), *grads
    if grad_output is not None:
        per_element = grad_output if o.reduction == NONE else grad_output.view([*grad_output.shape, *[1] * len(cols)])
        scale = scale * per_element.to(accum)
    second = torch.func.vjp(along, x, t)[1](torch.ones_like(x))
    found = zip(grads, second, (GRAD_INPUT, GRAD_TARGET), strict=True)
    return loss, *(_common.attach(g, f) if o.flags & bit else g for g, f, bit in found)


def _backward(ctx: Any, grad_output: Tensor, tensors: Any) -> tuple[Any, ...]:
    """Gradients for (input, target, weight, mask, options) from the kernel."""
    input, target, weight, mask, factor = tensors
    o = ctx.options._replace(flags=flags_of(*ctx.needs_input_grad[:2]))
    if o.reduction != NONE:
        grad_output = grad_output.contiguous()
    args = (grad_output, input, target, weight, mask, factor)
    if _common.differentiated_again(grad_output, input, target) or _common.forward_mode_active():
        _refuse_legacy(grad_output)
        grads = _both(o.flags, gradients(*args, *o))
    else:
        grads = wanted(o.flags, *ops.pointwise_backward(*args, *o))
    return (*grads, None, None, None)


def _jvp(ctx: Any, input_t: Tensor | None, target_t: Tensor | None, *_: Any) -> tuple[Tensor, None]:
    with _common.saved_for_jvp(ctx) as tensors:
        return _tangent(tensors, input_t, target_t, ctx.options), None


def _tangent(tensors: Sequence[Any], input_t: Tensor | None, target_t: Tensor | None, o: Options) -> Tensor:
    if not _common.differentiated_again(*tensors[:2]):
        return ops.pointwise_second(None, *tensors, input_t, target_t, *o)[0]
    # Composed of the gradient, which can be differentiated; the kernel's result has no derivative.
    input = tensors[0]
    flags = flags_of(input_t is not None, target_t is not None)
    shape = input.shape if o.reduction == NONE else input.shape[: o.row_dims]
    ones = torch.ones(shape, dtype=DTYPES[o.loss_dtype], device=input.device)
    grads = gradients(ones, *tensors, *o._replace(flags=flags))
    accum = _common.accum_dtype(ones.dtype)
    tangents = [t for t in _only(flags, (input_t, target_t)) if t is not None]
    weight, mask = tensors[2:4]
    for counts in (mask, None if weight is None else weight != 0):
        if counts is not None:  # what is left out may hold anything
            tangents = [torch.where(counts, t, 0.0) for t in tangents]
    total: Any = sum(g.to(accum) * t for g, t in zip(grads, tangents, strict=True))
    if o.reduction != NONE and input.dim() > o.row_dims:
        total = total.sum(list(range(o.row_dims, input.dim())))
    return total.to(ones.dtype)


class Fused(Function):
    """Gradient in forward. Kept outside the saved tensors: the operands may then change, as torch allows."""

    @staticmethod
    def forward(ctx: Any, input: Any, target: Any, weight: Any, mask: Any, o: Any) -> Any:
        flags = flags_of(*ctx.needs_input_grad[:2])
        loss, factor, grad_input, grad_target = ops.pointwise_forward(input, target, weight, mask, *o[:-1], flags)
        ctx.grads = grad_input, grad_target if flags & GRAD_TARGET else None
        ctx.options = o
        # The factor is in the gradient already where it is known beforehand.
        known = o.reduction == SUM or (mask is None and o.weight_denominator == 0)
        ctx.factor = None if known and o.loss not in _ROOTS else factor
        ctx.save_for_backward(input, target, weight, mask, factor)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        return fused_backward(ctx, grad_output, _backward)


def fused_backward(ctx: Any, grad_output: Tensor, again: Any) -> tuple[Any, ...]:
    """Scales what forward has computed; ``again`` gives a gradient that can be differentiated."""
    if ctx.grads is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the gradient of this loss was given away the "
            "first time. Specify retain_graph=True when calling .backward() or autograd.grad() the first time."
        )
    grad_input, grad_target = ctx.grads
    keep = _common.keeps_graph()
    if not keep:
        ctx.grads = None
    if torch.is_grad_enabled():
        return again(ctx, grad_output, ctx.saved_tensors)
    scale = grad_output if ctx.factor is None else grad_output * ctx.factor
    if keep or _common.is_batched(grad_output):
        grad_input = ops.scale_grad(grad_input, scale)
        grad_target = None if grad_target is None else ops.scale_grad(grad_target, scale)
    else:
        ops.scale_grad_(grad_input, scale)
        if grad_target is not None:
            ops.scale_grad_(grad_target, scale)
    return grad_input, grad_target, None, None, None


_apply_fused = _common.direct_apply(Fused)


class _Recompute(Function):
    @staticmethod
    def forward(ctx: Any, input: Any, target: Any, weight: Any, mask: Any, o: Any) -> Any:
        loss, factor, _, _ = ops.pointwise_forward(input, target, weight, mask, *o)
        ctx.options = o
        ctx.save_for_backward(input, target, weight, mask, factor)
        ctx.save_for_forward(input, target, weight, mask, factor)
        ctx.mark_non_differentiable(factor)
        return loss, factor

    @staticmethod
    def backward(ctx: Any, grad_output: Any, _: Any) -> Any:
        return _backward(ctx, grad_output, ctx.saved_tensors)


class _ForwardMode(_Recompute):
    """A class of its own because torch.compile refuses functions with a jvp."""

    jvp = staticmethod(_jvp)


class _Transformed(Function):
    """The recomputing path in the form that torch.func transforms ask for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return ops.pointwise_forward(*args)[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        tensors, ctx.options = inputs[:4], Options(*inputs[4:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Any, *_: Any) -> Any:
        return (*_backward(ctx, grad_output, ctx.saved_tensors)[:4], *[None] * len(Options._fields))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _jvp(ctx, *tangents)[0], _common.no_tangent(ctx, -1)


_apply_transformed = _common.opaque_apply(_Transformed)
define_recorded("pointwise_forward_recorded", ops.pointwise_forward, _Transformed)


def run(input: Tensor, target: Tensor, weight: Tensor | None, mask: Tensor | None, o: Options) -> Tensor:
    """The loss of operands of one shape (expanded where broadcast): chooses among the paths. Not for roots."""
    args = (input, target, weight, mask, o)
    if _common.transforms_active():
        return _apply_transformed(input, target, weight, mask, *o)[0]
    if _common.forward_mode_active():
        return _ForwardMode.apply(*args)[0]
    if _common.recording():
        return ops.pointwise_forward_recorded(input, target, weight, mask, *o)[0]
    if not (torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)):
        return ops.pointwise_forward(input, target, weight, mask, *o)[0]
    return _apply_fused(*args) if is_fused(input, target, o) else _Recompute.apply(*args)[0]


def is_fused(input: Tensor, target: Tensor, o: Options) -> bool:
    """Whether the gradient is computed in forward."""
    if o.reduction == NONE or o.row_dims or not input.requires_grad or torch.compiler.is_compiling():
        return False
    # An unscaled float16 gradient could underflow before the loss scale arrives, or overflow before the factor.
    return torch.float16 not in (input.dtype, target.dtype) and not _common.saved_tensor_hooks_active()


# --------------------------------------------------------------------------------------------------------- arguments


class Operands(NamedTuple):
    """Checked arguments: operands of one shape, and how they are to be reduced."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    mask: Tensor | None
    reduction: int
    weight_denominator: float  # times the sum of the weights is what 'mean' divides by; 0: the count
    dtype: torch.dtype  # of the loss


def _require(name: str, value: Any, function: str) -> None:
    if not isinstance(value, Tensor):  # torch's losses call size() of it: numpy's arrays have one that is no function
        kind = TypeError if hasattr(value, "size") else AttributeError
        raise kind(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def _expand(function: str, name: str, t: Tensor, shape: torch.Size) -> Tensor:
    if t.shape == shape:
        return t
    try:
        return t.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{function}(): {name} of shape {list(t.shape)} does not broadcast to the loss's shape {list(shape)}"
        ) from None


def _sample_weight(function: str, sample_weight: Tensor, shape: torch.Size) -> Tensor:
    if not sample_weight.is_floating_point() or sample_weight.dtype not in DTYPE_CODES:
        raise RuntimeError(f"{function}(): sample_weight must be floating point, got {sample_weight.dtype}")
    if sample_weight.shape != shape[:1]:
        raise ValueError(
            f"{function}(): sample_weight needs one weight per sample, shape {list(shape[:1])}, but got "
            f"{list(sample_weight.shape)}"
        )
    if sample_weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}(): not differentiable with respect to argument 'sample_weight'; pass it detached, or use "
            "reduction='none' and multiply"
        )
    return sample_weight.view(-1, *[1] * (len(shape) - 1)).expand(shape) if shape else sample_weight


def is_plain(input: Any, target: Any) -> bool:
    """Whether :func:`check` would find nothing to say or do: the common call, for the sake of small inputs."""
    return (
        type(input) is Tensor
        and type(target) is Tensor
        and input.is_cpu
        and target.is_cpu
        and input.dtype is target.dtype
        and input.shape == target.shape
        and (input.dtype is torch.float32 or input.dtype is torch.float64)
        and input.layout is target.layout is torch.strided
        and input.dim() <= MAX_DIMS
    )


def check(
    function: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    *,
    torch_weight: bool = False,
    mean_counts: bool = False,
    keeps_input_dtype: bool = False,
) -> Operands:
    """Checks and brings to one shape what a pointwise loss was called with.

    ``torch_weight``: weight is of the input's size and may raise the loss's dtype, as in torch; otherwise it broadcasts
    and does not. ``mean_counts``: 'mean' divides by the count whatever the weights. ``keeps_input_dtype``: the loss has
    the input's dtype instead of the promoted one.
    """
    _require("target", target, function)
    _require("input", input, function)
    for name, t in (("weight", weight), ("sample_weight", sample_weight), ("mask", mask)):
        if t is not None:
            _require(name, t, function)
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=4,
        )
    _common.require_supported_tensors(function, input, target, weight, sample_weight, mask)
    others = (("target", target), ("weight", weight), ("sample_weight", sample_weight), ("mask", mask))
    _common.require_same_device(function, ("input", input), *others)
    if target.shape != input.shape:
        try:
            torch.broadcast_shapes(input.shape, target.shape)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}. {function}(): input of size {list(input.shape)} and target of size {list(target.shape)} do "
                "not broadcast; give both one shape"
            ) from None
    if weight is not None and torch_weight:
        if torch.bool in (input.dtype, target.dtype) and not keeps_input_dtype:
            raise RuntimeError(f"{function}(): subtraction with a bool tensor is not supported; convert it to a number")
        if weight.shape != input.shape:
            raise ValueError(
                "Weights and input must have the same size. "
                f"{function}(): weight has shape {list(weight.shape)}, input {list(input.shape)}"
            )
        if not isinstance(reduction, str) or reduction not in REDUCTIONS:
            raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")
    code = _common.reduction_code(reduction)

    dtype = torch.promote_types(input.dtype, target.dtype)
    if keeps_input_dtype:
        if (dtype in DTYPE_CODES) != (input.dtype in DTYPE_CODES):
            raise RuntimeError(
                f"{function}(): result type {dtype} can't be cast to the input's {input.dtype}; convert one of them"
            )
        dtype = input.dtype
    for name, t in (("input", input), ("target", target)):
        if t.dtype not in DTYPE_CODES and (dtype not in DTYPE_CODES or t.is_floating_point() or t.is_complex()):
            raise NotImplementedError(
                f'{function}(): "{function}" not implemented for {name} of dtype {t.dtype}: expected float32, float64, '
                "float16 or bfloat16"
            )
    if input.dtype not in DTYPE_CODES:
        input = input.to(dtype)
    if target.dtype not in DTYPE_CODES:
        target = target.to(dtype)
    if target.shape != input.shape:
        input, target = torch.broadcast_tensors(input, target)
    shape = input.shape

    cast = weight is None or not torch_weight or keeps_input_dtype  # torch's weighted L1 and MSE are not on the list
    if cast:
        dtype = _common.autocast_dtype(dtype, input.device)
    denominator = 0.0
    if weight is not None:
        floating = weight.is_floating_point()
        if weight.is_complex() or (floating and weight.dtype not in DTYPE_CODES):
            kind = NotImplementedError if weight.is_complex() else RuntimeError
            raise kind(f"{function}(): weight of dtype {weight.dtype} is not supported; call weight.float()")
        if torch_weight and floating:
            by_mean = (
                code == MEAN and not mean_counts
            )  # torch then divides by weight.sum(), a tensor without dimensions
            if weight.dim() or not shape or by_mean:
                dtype = torch.promote_types(dtype, weight.dtype)
        elif not floating:
            weight = weight.to(_common.accum_dtype(dtype))
        denominator = 1.0
        if torch_weight and weight.shape != shape:  # the target is larger: torch divides by the sum before broadcasting
            denominator = weight.numel() / max(input.numel(), 1)
            code = SUM if code == MEAN and weight.numel() and not input.numel() else code  # 0 over that sum
        weight = _expand(function, "weight", weight, shape)
    if sample_weight is not None:
        per_sample = _sample_weight(function, sample_weight, shape)
        weight = per_sample if weight is None else weight * per_sample
        denominator = denominator or 1.0
    if mask is not None:
        if mask.dtype is not torch.bool:
            raise RuntimeError(f"{function}(): mask must be a boolean tensor (True: counts), got {mask.dtype}")
        mask = _expand(function, "mask", mask, shape)
    if code != MEAN or mean_counts:
        denominator = 0.0
    if input.dim() > MAX_DIMS:  # merge what would be merged anyway, at the cost of a copy
        if code == NONE:
            raise NotImplementedError(f"{function}(): reduction 'none' takes at most {MAX_DIMS} dimensions")
        input, target = input.reshape(-1), target.reshape(-1)
        weight = weight if weight is None else weight.reshape(-1)
        mask = mask if mask is None else mask.reshape(-1)
    return Operands(input, target, weight, mask, code, denominator, dtype)


def _with_weight_grad(loss: str, param: float, x: Operands) -> Tensor:
    """Differentiable in the weight too, as torch's is: values from the kernel, products of torch operations."""
    assert x.weight is not None
    accum = _common.accum_dtype(x.dtype)
    o = Options(NUMBERS[loss], param, NONE, 0, 0.0, DTYPE_CODES[accum])
    weight = (x.weight if x.mask is None else torch.where(x.mask, x.weight, 0)).to(accum)
    values = run(x.input, x.target, None, x.mask, o) * weight
    if x.reduction == NONE:
        return values.to(x.dtype)
    total = values.sum(dtype=torch.float64)
    if x.reduction == SUM:
        return total.to(x.dtype)
    if x.weight_denominator:
        return (total / (weight.sum(dtype=torch.float64) * x.weight_denominator)).to(x.dtype)
    return (total / (values.numel() if x.mask is None else x.mask.sum())).to(x.dtype)


def differentiates(weight: Tensor | None) -> bool:
    """Whether someone may ask for the derivative with respect to it."""
    if weight is None:
        return False
    if _common.functorch_active() or _common.forward_mode_active():
        return True
    return weight.requires_grad and torch.is_grad_enabled()


def run_weighted(loss: str, param: float, x: Operands) -> Tensor:
    """The loss of checked operands, differentiable in the weight too."""
    if differentiates(x.weight):
        return _with_weight_grad(loss, param, x)
    o = Options(NUMBERS[loss], param, x.reduction, 0, x.weight_denominator, DTYPE_CODES[x.dtype])
    return run(x.input, x.target, x.weight, x.mask, o)


def pointwise_loss(
    function: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    loss: str | None = None,
    param: float = 0.0,
    **rules: bool,
) -> Tensor:
    """The whole of a pointwise loss: what a face calls.

    Args:
        function: the face's name, for messages.
        input, target, reduction, weight, sample_weight, mask: what the face was called with.
        loss: the loss's name in losses.h, where that differs from the face's.
        param: the loss's parameter.
        rules: see :func:`check`.
    """
    name = loss or function
    if weight is None and sample_weight is None and mask is None and is_plain(input, target):
        code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
        if code is not None:
            return run(input, target, None, None, Options(NUMBERS[name], param, code, 0, 0.0, DTYPE_CODES[input.dtype]))
    x = check(function, input, target, reduction, weight, sample_weight, mask, **rules)
    return run_weighted(name, param, x)


def dims_last(t: Tensor | None, dims: Sequence[int]) -> Tensor | None:
    """A view with these dimensions last."""
    if t is None:
        return None
    return t.permute([d for d in range(t.dim()) if d not in dims] + list(dims))
