"""Mean absolute error. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._autograd import accum_dtype
from .._library import MEAN, NONE, REDUCTIONS
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise
from ._pointwise import Operands, pointwise_loss


@recordable
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Absolute error ``|input - target|``; a drop-in for :func:`torch.nn.functional.l1_loss`.

    The gradient is ``sign(input - target)``, 0 at ties and where the residual is nan, as torch's.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides. (Integers
            and complex numbers: as torch, by torch operations.)
        target: true values; another shape is broadcast, with torch's warning, and without a copy.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, in the input's size, differentiable.
        sample_weight: weight of each sample, shape (N) for input (N, ...), any floating dtype, no gradient; multiplies
            ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count. What the others hold, nan or
            inf, reaches neither the loss nor the gradient. Under ``'none'`` they are 0.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input, target and weight
        (float32 for 16-bit ones under autocast).

    Raises:
        ValueError, RuntimeError, NotImplementedError, AttributeError: as torch, for sizes, dtypes and arguments.

    Sums are taken in float64 and in an order fixed by the shape: the same bits whatever the number of threads. A mean
    over no element is nan.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            l1_loss,
            (input, target, weight),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
    if recording():
        return record("l1_loss", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    if isinstance(input, Tensor) and isinstance(target, Tensor):
        promoted = torch.promote_types(input.dtype, target.dtype)
        if promoted.is_complex or not promoted.is_floating_point:
            return _composed_l1_loss(input, target, reduction, weight, sample_weight, mask)
        if torch.bool in (input.dtype, target.dtype):
            raise RuntimeError("l1_loss(): subtraction with a bool tensor is not supported; convert it to a number")
        if reduction == "none" and torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
            x = _pointwise.checked("l1_loss", input, target, reduction, weight, sample_weight, mask, torch_weight=True)
            return _pointwise.run_checked(_of_residual(x), "l1_loss")
    return pointwise_loss("l1_loss", input, target, reduction, weight, sample_weight, mask, torch_weight=True)


def _of_residual(x: Operands) -> Operands:
    """The residual against 0: backward keeps the residual, as torch's does, and not the operands, which may then be
    changed, or be tensors of inference mode."""
    dtype = _arguments.autocast_dtype(torch.promote_types(x.input.dtype, x.target.dtype), x.input.device)
    if x.weight is not None:  # 16 bits are rounded once, after the weight
        dtype = accum_dtype(dtype)
    residual = x.input.to(dtype) - x.target.to(dtype)
    return x._replace(input=residual, target=residual.new_zeros(()).expand(residual.shape))


def _composed_l1_loss(
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Integers (exact and wrapping, as in torch) and complex numbers, which no kernel here takes."""
    if sample_weight is not None or mask is not None:
        raise NotImplementedError("l1_loss(): sample_weight and mask need real floating-point input")
    errors = torch.abs(input - target)
    if weight is not None:
        if weight.shape != input.shape:
            raise ValueError("Weights and input must have the same size.")
        if reduction not in REDUCTIONS:
            raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")
        errors = errors * weight
        if reduction == "mean":
            return errors.sum() / weight.sum()
    code = _arguments.reduction_code(reduction)
    return errors if code == NONE else errors.mean() if code == MEAN else errors.sum()


class L1Loss(torch.nn.L1Loss):
    """:func:`l1_loss` as a module; a drop-in for :class:`torch.nn.L1Loss`.

    Weights and mask are arguments of the call.
    """

    __prepare_scriptable__ = not_scriptable

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`l1_loss`."""
        return l1_loss(input, target, reduction=self.reduction, weight=weight, sample_weight=sample_weight, mask=mask)
