"""Cosine distance, from three sums in one pass. The mathematics is in ``csrc/pointwise/losses/vectors.h``."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise


@recordable
def cosine_distance_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    dim: int = -1,
    eps: float = 1e-8,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""One minus the cosine of the angle between vectors: ``1 - x·t / max(|x| |t|, eps)``.

    What is usually written ``1 - cosine_similarity(input, target)``, from one read of both, without a copy of either.

    Args:
        input: predictions, any shape of one dimension or more; float32, float64, float16 or bfloat16, any strides.
        target: true vectors; another shape is broadcast, with a warning, and without a copy.
        reduction: of the distances: ``'none'`` | ``'mean'`` | ``'sum'``.
        dim: dimension of the vectors.
        eps: positive; vectors whose lengths multiply to less are divided by it.
        weight: weight of each element in all three products, broadcast to the input's shape, any floating dtype.
        mask: boolean, broadcast to the input's shape; True marks the elements that count. A vector of which nothing
            counts has distance 0 and is left out of the mean.

    Returns:
        The loss: shape () or, for ``'none'``, the input's without ``dim``; dtype promoted over input and target
        (float32 for 16-bit ones under autocast).

    Raises:
        ValueError: eps not positive and finite.
        IndexError: a dim that is not there.
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.

    Example::

        >>> loss = fastloss.cosine_distance_loss(student_features, teacher_features)
    """
    if has_torch_function_variadic(input, target):
        options = {name: value for name, value in locals().items() if name not in ("input", "target")}
        return handle_torch_function(cosine_distance_loss, (input, target), input, target, **options)
    if recording():
        return record("cosine_distance_loss", locals())
    name = "cosine_distance_loss"
    eps = _arguments.as_positive(name, "eps", eps)
    dim = _arguments.as_int(name, "dim", dim)
    x = _pointwise.checked(name, input, target, reduction, weight, None, mask)
    rank = x.input.dim()
    if not -rank <= dim < rank:
        raise IndexError(f"{name}(): dim {dim} is out of range for input of {rank} dimensions")
    return _pointwise.loss_of_groups(name, x, [dim % rank], (float(eps),))


class CosineDistanceLoss(torch.nn.Module):
    """:func:`cosine_distance_loss` as a module. Weight and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(self, reduction: str = "mean", *, dim: int = -1, eps: float = 1e-8) -> None:
        super().__init__()
        self.reduction, self.dim, self.eps = reduction, dim, eps

    def forward(
        self, input: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`cosine_distance_loss`."""
        options = {"weight": weight, "mask": mask}
        return cosine_distance_loss(input, target, self.reduction, dim=self.dim, eps=self.eps, **options)
