"""Charbonnier loss, a smooth absolute error. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss


@recordable
def charbonnier_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    eps: float = 1e-3,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Charbonnier loss ``sqrt((input - target)**2 + eps**2)`` (Charbonnier et al., 1994; Lai et al., 2017).

    An absolute error that is smooth at 0, where it is ``eps``.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides.
        target: true values; another shape is broadcast, with a warning, and without a copy.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        eps: positive, in the unit of the input; it is squared here (some packages add it as it is).
        weight: weight of each element, broadcast to the loss's shape, any floating dtype.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast).

    Raises:
        ValueError: eps not positive, or so small or large that its square is 0 or infinite in float32.
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.

    Example::

        >>> loss = fastloss.charbonnier_loss(restored_image, sharp_image)

    kornia's ``charbonnier_loss`` is that of ``eps=1``, less 1.
    """
    name = "charbonnier_loss"
    if has_torch_function_variadic(input, target):
        options: dict[str, Any] = {
            "reduction": reduction,
            "eps": eps,
            "weight": weight,
            "sample_weight": sample_weight,
            "mask": mask,
        }
        return handle_torch_function(charbonnier_loss, (input, target), input, target, **options)
    if recording():
        return record("charbonnier_loss", locals())
    eps = _arguments.as_float(name, "eps", eps)
    if not 1e-19 < eps < 1e19:
        raise ValueError(f"{name}(): eps must be positive (and its square a number of float32), got {eps}")
    return pointwise_loss(name, input, target, reduction, weight, sample_weight, mask, params=(float(eps),))


class CharbonnierLoss(torch.nn.Module):
    """:func:`charbonnier_loss` as a module. Weights and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(self, reduction: str = "mean", *, eps: float = 1e-3) -> None:
        super().__init__()
        self.reduction, self.eps = reduction, eps

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`charbonnier_loss`."""
        options: dict[str, Any] = {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return charbonnier_loss(input, target, self.reduction, eps=self.eps, **options)
