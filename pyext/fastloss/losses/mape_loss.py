"""Mean absolute percentage error: a name for what ``relative_l1_loss`` computes."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from . import relative_l1_loss


@recordable
def mape_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    eps: float | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Mean absolute percentage error ``|input - target| / max(|target|, eps)``: :func:`fastloss.relative_l1_loss`.

    It is a fraction: times 100 it is in percent.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides.
        target: true values; another shape is broadcast, with a warning, and without a copy.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        eps: positive; what nothing smaller is divided by. By default the machine epsilon of the promoted dtype.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast).

    Raises:
        ValueError: eps not positive and finite.
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.relative_l1_loss`.

    Example::

        >>> loss = fastloss.mape_loss(forecast, demand, eps=1.0)
    """
    options: dict[str, Any] = {
        "reduction": reduction,
        "eps": eps,
        "weight": weight,
        "sample_weight": sample_weight,
        "mask": mask,
    }
    if has_torch_function_variadic(input, target):
        return handle_torch_function(mape_loss, (input, target), input, target, **options)
    if recording():
        return record("mape_loss", locals())
    return relative_l1_loss.run("mape_loss", input, target, symmetric=False, **options)


class MAPELoss(torch.nn.Module):
    """:func:`mape_loss` as a module. Weights and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(self, reduction: str = "mean", *, eps: float | None = None) -> None:
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
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`mape_loss`."""
        options: dict[str, Any] = {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return mape_loss(input, target, self.reduction, eps=self.eps, **options)
