"""Soft margin loss: the logistic loss of scores. The mathematics is in ``csrc/pointwise/losses/classification.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss


@recordable
def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Soft margin loss ``log(1 + exp(-target * input))``; a drop-in for :func:`torch.nn.functional.soft_margin_loss`.

    Finite at scores of any size, where torch's is inf from 89 on.

    Args:
        input: scores, any shape; float32, float64, float16 or bfloat16, any strides.
        target: 1 or -1, floating or integer; another shape is broadcast to the input's, without a copy. A floating one
            is differentiable (torch refuses that).
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype. Differentiable.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the input's; the input's dtype (float32 for 16-bit ones under autocast).

    Raises:
        ValueError, RuntimeError, NotImplementedError, TypeError: as torch, for sizes, dtypes and arguments.

    Example, which of two classes, 1 and -1::

        >>> loss = fastloss.soft_margin_loss(scores, labels)
    """
    if has_torch_function_variadic(input, target):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(soft_margin_loss, (input, target), input, target, **options)
    if recording():
        return record("soft_margin_loss", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    both = isinstance(input, Tensor) and isinstance(target, Tensor)
    if both:
        _arguments.refuse_strided_nested("soft_margin_loss", input, target)
    if both and input.shape != target.shape:
        shape = torch.broadcast_shapes(input.shape, target.shape)
        if shape != input.shape:
            raise RuntimeError(
                f"output with shape {list(input.shape)} doesn't match the broadcast shape {list(shape)}. "
                f"soft_margin_loss(): the input is not broadcast; call input.expand({list(shape)})"
            )
    weights = (weight, sample_weight, mask)
    return pointwise_loss(
        "soft_margin_loss", input, target, reduction, *weights, keeps_input_dtype=True, broadcasts=True
    )


class SoftMarginLoss(torch.nn.SoftMarginLoss):
    """:func:`soft_margin_loss` as a module; a drop-in for :class:`torch.nn.SoftMarginLoss`.

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
        """The loss of scores against targets; shapes, dtypes and errors as :func:`soft_margin_loss`."""
        return soft_margin_loss(
            input, target, reduction=self.reduction, weight=weight, sample_weight=sample_weight, mask=mask
        )
