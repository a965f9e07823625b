"""Cosine embedding loss of pairs of vectors. The mathematics is in ``csrc/pointwise/losses/vectors.h``."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import not_scriptable, record, recordable, recording
from . import _vectors


@recordable
def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cosine embedding loss; a drop-in for :func:`torch.nn.functional.cosine_embedding_loss`.

    The loss of a pair of vectors is ``1 - cos(input1, input2)`` where its target is 1, ``max(0, cos(input1, input2) -
    margin)`` where it is -1, and 0 where it is anything else. ``cos`` is ``x·y / sqrt((x·x + 1e-12) (y·y + 1e-12))``.
    One read of both inputs gives the value, another their gradients.

    Args:
        input1: vectors, shape (N, D) or (D); float32, float64, float16 or bfloat16, any strides. Differentiable.
        input2: vectors that broadcast with ``input1``. Differentiable.
        target: 1 or -1 for each pair, shape (N) or (); any dtype.
        margin: cosines up to which vectors of target -1 cost nothing.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.

    Returns:
        The loss: shape () or, for ``'none'``, that of the pairs; dtype promoted over the inputs (float32 for 16-bit
        ones under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: as torch. Integer inputs, vectors whose lengths D differ, and those without
            elements are left to torch's own composition.

    Example::

        >>> loss = fastloss.cosine_embedding_loss(images, captions, belongs.float() * 2 - 1, margin=0.2)
    """
    operands = (input1, input2, target)
    if has_torch_function_variadic(*operands):
        options: dict[str, Any] = {name: value for name, value in locals().items() if name in ("margin", "reduction")}
        options |= {"size_average": size_average, "reduce": reduce}
        return handle_torch_function(cosine_embedding_loss, operands, *operands, **options)
    if recording():
        return record("cosine_embedding_loss", locals())
    name = "cosine_embedding_loss"
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    code = _arguments.reduction_code(reduction)
    margin = _arguments.as_float(name, "margin", margin)
    vectors = _vectors.checked(name, {"input1": input1, "input2": input2}, {"target": target})
    pairs = target.dim()
    if vectors is None or pairs > 1 or not input1.dim() == input2.dim() == pairs + 1 or vectors[0].shape[-1] == 0:
        return torch.cosine_embedding_loss(input1, input2, target, margin, code)
    rows = target.detach() if target.requires_grad else target
    if not rows.is_floating_point():
        rows = rows.to(dtype=input1.dtype)
    return _vectors.run(name, vectors, code, (margin,), rows=rows)


class CosineEmbeddingLoss(torch.nn.CosineEmbeddingLoss):
    """:func:`cosine_embedding_loss` as a module; a drop-in for :class:`torch.nn.CosineEmbeddingLoss`."""

    __prepare_scriptable__ = not_scriptable

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        """The loss of pairs of vectors (N, D) against targets of 1 and -1; as :func:`cosine_embedding_loss`."""
        return cosine_embedding_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)
