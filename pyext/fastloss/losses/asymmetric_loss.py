"""Asymmetric loss of independent labels. The mathematics is in ``csrc/pointwise/losses/multilabel.h``."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss


@recordable
def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Asymmetric loss of independent labels (Ridnik et al., 2021): a focal loss with one gamma for what is positive
    and another for what is negative, of which probabilities up to ``clip`` cost nothing.

    The loss of an element is ``-t (1 - p)**gamma_pos log(p) - (1 - t) m**gamma_neg log(1 - m)``, with p = sigmoid(x)
    and ``m = max(p - clip, 0)``. Where targets are 0 and 1 it is ``timm.loss.AsymmetricLossMultiLabel``, whose default
    reduction is the sum divided by N (``'batchmean'``; just the sum before it had that argument). Not copied: its clamp
    of the probabilities at 1e-8, since log(p) is taken from the logit, finite for any; its conversion to float32.

    Args:
        input: logits x, any shape; float32, float64, float16 or bfloat16, any strides.
        target: 1 where the label applies, else 0; another shape is broadcast, with a warning. Differentiable.
        gamma_neg, gamma_pos: 0 or more.
        clip: probability margin of what is negative, 0 or more and less than 1.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; dtype promoted over input and target (float32 for
        16-bit ones under autocast).

    Raises:
        ValueError: a gamma that is negative or infinite; a clip outside [0, 1).
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.

    Example::

        >>> loss = fastloss.asymmetric_loss(logits, tags.float(), gamma_neg=2.0, clip=0.1)
    """
    name = "asymmetric_loss"
    if has_torch_function_variadic(input, target):
        options: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "reduction": reduction}
        options |= {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return handle_torch_function(asymmetric_loss, (input, target), input, target, **options)
    if recording():
        return record("asymmetric_loss", locals())
    gamma_pos = _arguments.as_non_negative(name, "gamma_pos", gamma_pos)
    gamma_neg = _arguments.as_non_negative(name, "gamma_neg", gamma_neg)
    clip = _arguments.as_float(name, "clip", clip)
    if not 0 <= clip < 1:
        raise ValueError(f"{name}(): clip must be 0 or more and less than 1, got {clip}")
    params = (float(gamma_pos), float(gamma_neg), float(clip))
    return pointwise_loss(name, input, target, reduction, weight, sample_weight, mask, params=params)


class AsymmetricLoss(torch.nn.Module):
    """:func:`asymmetric_loss` as a module. Weights and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(
        self, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.gamma_neg, self.gamma_pos, self.clip, self.reduction = gamma_neg, gamma_pos, clip, reduction

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits against targets; shapes, dtypes and errors as :func:`asymmetric_loss`."""
        options: dict[str, Any] = {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return asymmetric_loss(input, target, self.gamma_neg, self.gamma_pos, self.clip, self.reduction, **options)
