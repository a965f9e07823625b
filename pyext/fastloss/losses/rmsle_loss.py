"""Root mean squared logarithmic error. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._autograd import accum_dtype
from .._library import NONE
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise


@recordable
def rmsle_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Root mean squared logarithmic error ``sqrt(mean((log1p(input) - log1p(target))**2))``.

    The gradient is 0, not nan, when every residual is 0. The root of a mean is no sum over elements: ``'mean'`` is the
    root of the mean square, ``'sum'`` the root of the sum, and ``'none'`` each element's own ``sqrt(w d**2)``, the
    absolute residual. The mean of the ``'none'`` values is not the ``'mean'``. (Residuals of :func:`fastloss.rmse_loss`
    may be of any size; these are of logarithms, and small.)

    Args:
        input: predictions above -1, any shape; float32, float64, float16 or bfloat16, any strides.
        target: true values above -1; another shape is broadcast, with a warning, and without a copy.
        reduction: ``'mean'`` | ``'sum'`` | ``'none'``, see above.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype; the mean divides by its sum.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast). It is nan where an input or a target is -1 or less.

    Raises:
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.

    Example::

        >>> loss = fastloss.rmsle_loss(predicted_price, price)
    """
    name = "rmsle_loss"
    if has_torch_function_variadic(input, target):
        options: dict[str, Any] = {
            "reduction": reduction,
            "weight": weight,
            "sample_weight": sample_weight,
            "mask": mask,
        }
        return handle_torch_function(rmsle_loss, (input, target), input, target, **options)
    if recording():
        return record("rmsle_loss", locals())
    if weight is sample_weight is mask is None and reduction != "none":
        result = _pointwise.usual(name, input, target, reduction)
        if result is not None:
            return result
    x = _pointwise.checked(name, input, target, reduction, weight, sample_weight, mask)
    return _of_elements(x) if x.reduction == NONE else _pointwise.run_checked(x, name)


def _of_elements(x: _pointwise.Operands) -> Tensor:
    """sqrt(w) |log1p input - log1p target| of each."""
    x = x.with_one_weight()
    input, target, weight = x.input, x.target, x.weight
    if x.mask is not None:  # what is hidden may hold anything
        input, target = torch.where(x.mask, input, 0), torch.where(x.mask, target, 0)
        weight = None if weight is None else torch.where(x.mask, weight, 1)
    accum = accum_dtype(x.dtype)
    # log1p(-1) is -inf, and of two of them the difference is nan; of one it is to be nan as well.
    input, target = (torch.where(t > -1, t, torch.nan).log1p() for t in (input.to(accum), target.to(accum)))
    weight = None if weight is None else weight.to(accum).sqrt()
    return _pointwise.run_checked(x._replace(input=input, target=target, weight=weight), "l1_loss")


class RMSLELoss(torch.nn.Module):
    """:func:`rmsle_loss` as a module. Weights and mask are arguments of the call."""

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
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`rmsle_loss`."""
        options: dict[str, Any] = {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return rmsle_loss(input, target, self.reduction, **options)
