"""Triplet margin loss of vectors. The mathematics is in ``csrc/pointwise/losses/vectors.h``."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import not_scriptable, record, recordable, recording
from . import _vectors


@recordable
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Triplet margin loss (Balntas et al., 2016); a drop-in for :func:`torch.nn.functional.triplet_margin_loss`.

    The loss of three vectors is ``max(0, margin + d(anchor, positive) - d(anchor, negative))``, d the distance ``(sum
    of |x - y + eps|**p) ** (1 / p)``. One read of the three gives the value, another their gradients.

    Args:
        anchor: vectors, shape (..., D); float32, float64, float16 or bfloat16, any strides. Differentiable.
        positive: vectors that should be near, of as many dimensions; broadcast with the others. Differentiable.
        negative: vectors that should be far; as ``positive``.
        margin: positive; by how much farther.
        p: of the distance. For 0, infinity and negative ones the loss is torch's own composition.
        eps: added to each difference.
        swap: take the distance of negative and positive where it is less than that of negative and anchor.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.

    Returns:
        The loss: shape () or, for ``'none'``, the broadcast shape without D; dtype promoted over the three (float32 for
        16-bit ones under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: as torch. Integers, and vectors whose lengths D differ, are left to torch's
            own composition.

    Example::

        >>> loss = fastloss.triplet_margin_loss(faces, same_person, another_person, margin=0.3, swap=True)
    """
    operands = (anchor, positive, negative)
    if has_torch_function_variadic(*operands):
        options: dict[str, Any] = {"margin": margin, "p": p, "eps": eps, "swap": swap}
        options |= {"size_average": size_average, "reduce": reduce, "reduction": reduction}
        return handle_torch_function(triplet_margin_loss, operands, *operands, **options)
    if recording():
        return record("triplet_margin_loss", locals())
    name = "triplet_margin_loss"
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    code = _arguments.reduction_code(reduction)
    margin, p = _arguments.as_float(name, "margin", margin), _arguments.as_float(name, "p", p)
    eps = _arguments.as_float(name, "eps", eps)
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")
    vectors = _vectors.checked(name, {"anchor": anchor, "positive": positive, "negative": negative})
    if vectors is None or not 0 < p < math.inf:
        return torch.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, code)
    return _vectors.run(name, vectors, code, (p, margin, eps, float(bool(swap))))


class TripletMarginLoss(torch.nn.TripletMarginLoss):
    """:func:`triplet_margin_loss` as a module; a drop-in for :class:`torch.nn.TripletMarginLoss`."""

    __prepare_scriptable__ = not_scriptable

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of triples of vectors (..., D); as :func:`triplet_margin_loss`."""
        return triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )
