"""Huber's loss: squared near zero, linear beyond. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import is_by_element, loss_by_element, pointwise_loss


@recordable
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float | Tensor = 1.0,
    weight: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Huber loss; a drop-in for :func:`torch.nn.functional.huber_loss`.

    With d = input - target it is ``d**2 / 2`` where ``|d| <= delta`` and ``delta * (|d| - delta / 2)`` elsewhere
    (Huber, 1964).

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides.
        target: true values; another shape is broadcast, with torch's warning, and without a copy.
        reduction: ``'none'`` | ``'mean'`` (divided by the count of elements, whatever the weights, as torch does) |
            ``'sum'``.
        delta: where the two parts meet, positive. A tensor of one for each element or, of shape (N, 1, ...), sample is
            broadcast to the loss's shape and differentiable; the loss is then composed of torch operations, with
            their time and memory. Wrong values of it raise on the CPU and give nan elsewhere.
        weight: weight of each element, in the input's size, differentiable.
        sample_weight: weight of each sample, shape (N) for input (N, ...), any floating dtype, no gradient; multiplies
            ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; the input's dtype, promoted with the weight's
        (float32 for 16-bit ones under autocast).

    Raises:
        RuntimeError: delta not positive.
        ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError: as torch, for the other arguments.

    Sums are taken in float64 and in an order fixed by the shape: the same bits whatever the number of threads.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            huber_loss,
            (input, target, weight),
            input,
            target,
            reduction=reduction,
            delta=delta,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
    if recording() and not is_by_element(delta):
        return record("huber_loss", locals())
    if is_by_element(delta):
        return loss_by_element(input, target, delta, "huber_loss", "delta", reduction, weight, sample_weight, mask)
    delta = _arguments.as_float("huber_loss", "delta", delta)
    if not delta > 0:
        raise RuntimeError(f"huber_loss does not support non-positive values for delta. delta is {delta}")
    return pointwise_loss(
        "huber_loss",
        input,
        target,
        reduction,
        weight,
        sample_weight,
        mask,
        params=(delta,),
        torch_weight=True,
        mean_counts=True,
        keeps_input_dtype=True,
    )


class HuberLoss(torch.nn.HuberLoss):
    """:func:`huber_loss` as a module; a drop-in for :class:`torch.nn.HuberLoss`.

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
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`huber_loss`."""
        return huber_loss(
            input,
            target,
            reduction=self.reduction,
            delta=self.delta,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
