"""Focal loss of independent labels. The mathematics is in ``csrc/pointwise/losses/multilabel.h``."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss, require


@recordable
def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Focal loss of independent labels (Lin et al., 2017); a drop-in for :func:`torchvision.ops.sigmoid_focal_loss`.

    The loss of an element is ``alpha_t (1 - p_t)**gamma ce``, with ``ce`` the binary cross entropy of the logit x and
    the target t, ``p_t = p t + (1 - p)(1 - t)``, p = sigmoid(x), and ``alpha_t = alpha t + (1 - alpha)(1 - t)``. It is
    computed from softplus(x) and sigmoid(x) of either sign, so that no logit makes it infinite or nan, and reads x and
    t once. (For a softmax over classes: :func:`fastloss.focal_loss`.)

    Args:
        inputs: logits, any shape; float32, float64, float16 or bfloat16, any strides.
        targets: 1 where the label applies, else 0, or what lies between; the shape of ``inputs``. Differentiable.
        alpha: weight of what is positive, between 0 and 1; -1: none.
        gamma: 0 or more; by how much what is certain already is left out.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, broadcast to the inputs' shape, any floating dtype.
        sample_weight: weight of each sample, shape (N) for inputs (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the inputs' shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, that of ``inputs``; dtype promoted over both (float32 for 16-bit ones
        under autocast).

    Raises:
        ValueError: alpha outside [0, 1] and not -1; gamma negative or infinite; targets of another size; an unknown
            reduction.
        RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.

    Example, boxes of a detector, normalised by how many are there::

        >>> loss = fastloss.sigmoid_focal_loss(logits, is_object, reduction="sum") / is_object.sum()

    Where targets are 0 and 1, kornia's ``binary_focal_loss_with_logits``, MONAI's ``FocalLoss`` and
    segmentation_models_pytorch's ``FocalLoss('binary')`` are the same; ``alpha=None`` is -1 here, ignored elements are
    those of ``mask=False``. Not copied: MONAI's ``'sum'`` adds means over the pixels; MONAI converts to float32.
    """
    name = "sigmoid_focal_loss"
    if has_torch_function_variadic(inputs, targets):
        options: dict[str, Any] = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
        options |= {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return handle_torch_function(sigmoid_focal_loss, (inputs, targets), inputs, targets, **options)
    if recording():
        return record("sigmoid_focal_loss", locals())
    alpha = _arguments.as_float(name, "alpha", alpha)
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"Invalid alpha value: {alpha}. alpha must be in the range [0,1] or -1 for ignore.")
    params = (float(alpha), float(_arguments.as_non_negative(name, "gamma", gamma)))
    require(name, "inputs", inputs)
    require(name, "targets", targets)
    _arguments.refuse_strided_nested(name, inputs, targets)
    if inputs.shape != targets.shape:
        raise ValueError(f"Target size ({targets.size()}) must be the same as input size ({inputs.size()})")
    return pointwise_loss(name, inputs, targets, reduction, weight, sample_weight, mask, params=params)


class SigmoidFocalLoss(torch.nn.Module):
    """:func:`sigmoid_focal_loss` as a module. Weights and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none") -> None:
        super().__init__()
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits against targets; shapes, dtypes and errors as :func:`sigmoid_focal_loss`."""
        options: dict[str, Any] = {"weight": weight, "sample_weight": sample_weight, "mask": mask}
        return sigmoid_focal_loss(inputs, targets, self.alpha, self.gamma, self.reduction, **options)
