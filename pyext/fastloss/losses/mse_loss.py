"""Mean squared error. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss


@recordable
def mse_loss(
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
    r"""Squared error ``(input - target)**2``; a drop-in for :func:`torch.nn.functional.mse_loss`.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides.
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
            mse_loss,
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
        return record("mse_loss", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    return pointwise_loss("mse_loss", input, target, reduction, weight, sample_weight, mask, torch_weight=True)


class MSELoss(torch.nn.MSELoss):
    """:func:`mse_loss` as a module; a drop-in for :class:`torch.nn.MSELoss`.

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
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`mse_loss`."""
        return mse_loss(input, target, reduction=self.reduction, weight=weight, sample_weight=sample_weight, mask=mask)
