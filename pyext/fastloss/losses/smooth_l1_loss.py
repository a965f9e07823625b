"""Squared near zero, absolute beyond. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import is_by_element, loss_by_element, pointwise_loss


@recordable
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float | Tensor = 1.0,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Smooth L1 loss; a drop-in for :func:`torch.nn.functional.smooth_l1_loss`.

    With d = input - target it is ``d**2 / (2 beta)`` where ``|d| < beta`` and ``|d| - beta / 2`` elsewhere (Girshick,
    Fast R-CNN, 2015); ``beta=0`` is :func:`fastloss.l1_loss`.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides.
        target: true values; another shape is broadcast, with torch's warning, and without a copy.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        beta: where the two parts meet, not negative. A tensor of one for each element or, of shape (N, 1, ...), sample
            is broadcast to the loss's shape and differentiable; the loss is then composed of torch operations, with
            their time and memory. Wrong values of it raise on the CPU and give nan elsewhere.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast).

    Raises:
        RuntimeError: a negative beta.
        ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError: as torch, for the other arguments.

    Sums are taken in float64 and in an order fixed by the shape: the same bits whatever the number of threads.
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            smooth_l1_loss,
            (input, target),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            beta=beta,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
    if recording() and not is_by_element(beta):
        return record("smooth_l1_loss", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    if is_by_element(beta):
        return loss_by_element(input, target, beta, "smooth_l1_loss", "beta", reduction, weight, sample_weight, mask)
    beta = _arguments.as_float("smooth_l1_loss", "beta", beta)
    if not beta >= 0:
        raise RuntimeError(f"smooth_l1_loss does not support negative values for beta. beta is {beta}; it must be >= 0")
    loss = "smooth_l1_loss" if beta > 0 else "l1_loss"
    return pointwise_loss(
        "smooth_l1_loss", input, target, reduction, weight, sample_weight, mask, loss=loss, params=(beta,)
    )


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """:func:`smooth_l1_loss` as a module; a drop-in for :class:`torch.nn.SmoothL1Loss`.

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
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`smooth_l1_loss`."""
        return smooth_l1_loss(
            input,
            target,
            reduction=self.reduction,
            beta=self.beta,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
