"""Logarithm of the hyperbolic cosine of the residual. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss


@recordable
def log_cosh_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Log-cosh loss ``log(cosh(input - target))``: d**2 / 2 near zero, ``|d| - log 2`` far away, smooth everywhere.

    Its gradient is ``tanh(d)``. Nothing overflows, and small residuals keep their digits.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides.
        target: true values; another shape is broadcast, with a warning, and without a copy.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast).

    Raises:
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            log_cosh_loss,
            (input, target),
            input,
            target,
            reduction=reduction,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
    if recording():
        return record("log_cosh_loss", locals())
    return pointwise_loss("log_cosh_loss", input, target, reduction, weight, sample_weight, mask)


class LogCoshLoss(torch.nn.Module):
    """:func:`log_cosh_loss` as a module. Weights and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`log_cosh_loss`."""
        return log_cosh_loss(input, target, self.reduction, weight=weight, sample_weight=sample_weight, mask=mask)
