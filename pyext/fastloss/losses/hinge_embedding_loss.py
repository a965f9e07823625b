"""Hinge embedding loss of distances. The mathematics is in ``csrc/pointwise/losses/classification.h``."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from ._pointwise import pointwise_loss


@recordable
def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Hinge embedding loss; a drop-in for :func:`torch.nn.functional.hinge_embedding_loss`.

    The loss of a distance x is x where the target is 1, and ``max(0, margin - x)`` where it is -1: what belongs
    together is drawn together, the rest pushed a margin apart. At the margin the slope is -1, as torch's.

    Args:
        input: distances, any shape; float32, float64, float16 or bfloat16, any strides. (Integers, without weights,
            give torch's result.)
        target: 1 or -1, floating, integer or boolean; another shape is broadcast, without a copy. (Where it is neither,
            both terms count, as in torch.) No gradient.
        margin: how far apart the others are to be.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` (divided by the count, or by the sum of the weights) | ``'sum'``.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype. Differentiable.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape; the input's dtype (float32 for 16-bit ones under
        autocast).

    Raises:
        ValueError, RuntimeError, NotImplementedError, TypeError: as torch, for sizes, dtypes and arguments.

    Example, pairs of sentences that say the same or not::

        >>> loss = fastloss.hinge_embedding_loss((a - b).norm(dim=-1), same, margin=2.0)
    """
    name = "hinge_embedding_loss"
    if has_torch_function_variadic(input, target):
        options = {key: value for key, value in locals().items() if key not in ("name", "input", "target")}
        return handle_torch_function(hinge_embedding_loss, (input, target), input, target, **options)
    if recording():
        return record("hinge_embedding_loss", locals())
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    if isinstance(target, Tensor) and target.requires_grad:
        target = target.detach()
    if _arguments.is_integral(input) and weight is sample_weight is mask is None:
        # Of integers the loss is one of integers, without a gradient: torch's own.
        return torch.hinge_embedding_loss(input, target, margin, _arguments.reduction_code(reduction))
    params, weights = (float(_arguments.as_float(name, "margin", margin)),), (weight, sample_weight, mask)
    return pointwise_loss(
        name, input, target, reduction, *weights, params=params, keeps_input_dtype=True, broadcasts=True
    )


class HingeEmbeddingLoss(torch.nn.HingeEmbeddingLoss):
    """:func:`hinge_embedding_loss` as a module; a drop-in for :class:`torch.nn.HingeEmbeddingLoss`.

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
        """The loss of distances against targets; shapes, dtypes and errors as :func:`hinge_embedding_loss`."""
        return hinge_embedding_loss(
            input,
            target,
            margin=self.margin,
            reduction=self.reduction,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
