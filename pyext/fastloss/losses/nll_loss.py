"""Negative log likelihood of given log-probabilities. One element per row is read; backward writes each element once.

The mathematics is in ``csrc/rowwise/row_losses.h``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import errors
from .._library import define_recorded, loop_vmap, ops
from . import _common, _rowwise
from ._common import DTYPE_CODES, DTYPES, MEAN, NONE

_SCALAR_TYPES = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}


_NUMBER = ops.row_losses().split().index("nll_loss")


def _forward(input: Any, target: Any, weight: Any, *options: Any) -> Any:
    return ops.row_loss_forward(input, target, weight, _NUMBER, (), *options, 0)


@torch.library.register_fake("fastloss::row_loss_value")
def _(input: Any, target: Any, weight: Any, loss: Any, params: Any, reduction: Any, loss_dtype: Any, *_: Any) -> Any:
    return input.new_empty(target.shape if reduction == NONE else [], dtype=DTYPES[loss_dtype])


@torch.library.register_fake("fastloss::row_loss_forward")
def _(input: Any, target: Any, weight: Any, loss: Any, params: Any, reduction: Any, loss_dtype: Any, *_: Any) -> Any:
    value = input.new_empty(target.shape if reduction == NONE else [], dtype=DTYPES[loss_dtype])
    return value, input.new_empty([], dtype=_common.accum_dtype(input.dtype))


@torch.library.register_fake("fastloss::row_loss_backward")
def _(grad_output: Any, input: Any, *rest: Any) -> Any:
    return torch.empty_like(input)


torch.library.register_vmap("fastloss::row_loss_value", loop_vmap(ops.row_loss_value, 1))
torch.library.register_vmap("fastloss::row_loss_forward", loop_vmap(ops.row_loss_forward, 2))
torch.library.register_vmap("fastloss::row_loss_backward", loop_vmap(ops.row_loss_backward, 1))


def _row_weights(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _rowwise.row_weights(target, weight, ctx.options[2], _common.accum_dtype(input.dtype))


def _backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
    input, target, weight, total_weight = ctx.saved_tensors
    grad_output = grad_output.contiguous()
    with torch.no_grad():
        grad = ops.row_loss_backward(grad_output, input, target, weight, total_weight, _NUMBER, (), *ctx.options, 0)
    if _common.differentiated_again(grad_output, input):
        counts, index, w_t = _row_weights(ctx, input, target, weight)
        upstream = _rowwise.per_row(grad_output, w_t, ctx.options[0])
        if ctx.options[0] == MEAN:
            upstream = upstream / w_t.sum().view_as(upstream)
        rows = torch.where(counts, upstream * -w_t, 0.0).to(input.dtype)
        # The loss is linear in the input: the second derivative is there, and 0.
        zeros = torch.where(torch.zeros_like(input, dtype=torch.bool), input, 0.0)
        grad = _common.attach(grad, zeros.scatter(1, index, rows))
    return grad, None, None, None, None, None


def _jvp(ctx: Any, input_t: Tensor, *_: Any) -> tuple[Any, ...]:
    with _common.saved_for_jvp(ctx) as (input, target, weight, _):
        counts, index, w_t = _row_weights(ctx, input, target, weight)
        rows = torch.where(counts, -w_t * input_t.gather(1, index), 0.0).squeeze(1)
        reduction, loss_dtype, _ = ctx.options
        if reduction != NONE:
            rows = rows.sum() / w_t.sum() if reduction == MEAN else rows.sum()
        return rows.to(DTYPES[loss_dtype]), None


class _NllLoss(Function):
    @staticmethod
    def forward(ctx: Any, input: Any, target: Any, weight: Any, *options: int) -> Any:
        loss, total_weight = _forward(input, target, weight, *options)
        ctx.options = options
        ctx.save_for_backward(input, target, weight, total_weight)
        ctx.save_for_forward(input, target, weight, total_weight)  # vmap wants the same as for backward
        ctx.mark_non_differentiable(total_weight)
        return loss, total_weight

    backward = staticmethod(_backward)


class _NllLossForwardMode(_NllLoss):
    """A class of its own because torch.compile refuses functions with a jvp."""

    jvp = staticmethod(_jvp)


class _NllLossTransformed(Function):
    """The same in the form that torch.func transforms ask for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Any, target: Any, weight: Any, *options: int) -> Any:
        return _forward(input, target, weight, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        input, target, weight, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, target, weight, output[1])
        ctx.save_for_forward(input, target, weight, output[1])  # vmap wants the same as for backward

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _jvp(ctx, *tangents)[0], _common.no_tangent(ctx, -1)


_apply_transformed = _common.opaque_apply(_NllLossTransformed)


class _NllLossRecorded(_NllLossTransformed):
    """The same with the operator's own arguments."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        _NllLossTransformed.setup_context(ctx, (*inputs[:3], *inputs[5:8]), output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*_backward(ctx, *grads), None, None, None)


define_recorded("nll_loss_forward_recorded", ops.row_loss_forward, _NllLossRecorded)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood loss; a drop-in for :func:`torch.nn.functional.nll_loss`.

    The loss of a row with class index t is ``-w_t * input_t``. For logits use :func:`fastloss.cross_entropy`, which
    needs no log-probabilities in memory.

    Args:
        input: log-probabilities, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16.
        target: class indices, shape (), (N) or (N, d1, ..., dK), any integer dtype.
        weight: weight of each class, shape (C), in the input's dtype.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        ignore_index: class index that marks targets to leave out.
        reduction: ``'none'`` | ``'mean'`` (divided by the sum of ``weight[target]`` over the counted) | ``'sum'``.

    Returns:
        The loss, in the input's dtype (float32 for 16-bit input under autocast).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index; on CUDA by a later call, see
            :func:`fastloss.set_error_mode`.
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch, for shapes, dtypes and arguments.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            nll_loss,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
        )
    if size_average is not None or reduce is not None:
        reduction = _common.legacy_reduction(size_average, reduce)
    red = _common.reduction_code(reduction)
    _common.require_tensor("input", input, "nll_loss_nd")
    _common.require_tensor("target", target, "nll_loss_nd")
    if weight is not None:
        _common.require_tensor("weight", weight, "nll_loss_nd")
    ignore_index = _common.as_int("nll_loss_nd", "ignore_index", ignore_index)
    _common.require_supported_tensors("nll_loss", input, target, weight)
    _common.require_same_device("nll_loss", ("input", input), ("target", target), ("weight", weight))
    if input.dim() == 0:
        raise ValueError("Expected 1 or more dimensions (got 0)")
    single = input.dim() == 1
    if single:
        _rowwise.check_single_target(target, "nll_loss")
        input, target = input.unsqueeze(0), target.reshape(1)
    _rowwise.check_index_shapes(input, target, "nll_loss")
    _rowwise.check_index_dtype(target, "nll_loss")
    _rowwise.check_logits_dtype(input, "nll_loss")
    target = _rowwise.index_target(target)
    if not _rowwise.mergeable(input):
        input = input.contiguous()
    loss_dtype = _common.autocast_dtype(input.dtype, input.device)
    if weight is not None:
        _rowwise.check_weight(weight, input.shape[1], "nll_loss", any_shape=input.dim() > 2)
        if _common.autocast_dtype(weight.dtype, input.device) is not loss_dtype:
            raise RuntimeError(
                f"expected scalar type {_SCALAR_TYPES[input.dtype]} but found "
                f"{_SCALAR_TYPES.get(weight.dtype, weight.dtype)}: "
                "nll_loss(): weight needs the dtype of the "
                "input; call weight.to(input.dtype)"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "nll_loss(): not differentiable with respect to argument 'weight'. This input cannot have "
                "requires_grad True; pass weight.detach()"
            )
        weight = weight.to(_common.accum_dtype(input.dtype)).flatten().contiguous()

    options = (red, DTYPE_CODES[loss_dtype], ignore_index)
    if _common.transforms_active():
        loss = _apply_transformed(input, target, weight, *options)[0]
    elif _common.forward_mode_active():
        loss = _NllLossForwardMode.apply(input, target, weight, *options)[0]
    elif _common.recording():
        loss = ops.nll_loss_forward_recorded(input, target, weight, _NUMBER, (), *options, 0)[0]
    elif torch.is_grad_enabled() and input.requires_grad:
        loss = _NllLoss.apply(input, target, weight, *options)[0]
    else:
        loss = _forward(input, target, weight, *options)[0]
    if errors.immediate_errors() and input.is_cuda:
        errors.check_errors()
    return loss.reshape(()) if single else loss


class NLLLoss(torch.nn.NLLLoss):
    """:func:`nll_loss` as a module; a drop-in for :class:`torch.nn.NLLLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of log-probabilities (N, C, ...) against class indices; as :func:`nll_loss`."""
        return nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)
