"""Root mean squared error, with a gradient at zero. The mathematics is in ``csrc/pointwise/losses/regression.h``."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _arguments, formulas
from .._library import MEAN, NONE
from .._nested import handle_torch_function
from .._recorded import not_scriptable, record, recordable, recording
from . import _pointwise
from ._pointwise import Operands


@recordable
def rmse_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    *,
    dim: int | Sequence[int] | None = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Root mean squared error ``sqrt(mean((input - target)**2) + eps)``.

    What is usually written ``sqrt(mse_loss(input, target))``, with three differences: the gradient is 0, not nan, when
    every residual is 0; 16-bit inputs do not overflow (300 against 0 in float16 is 300); it takes weights and a mask.

    The root of a mean is no sum over elements, so ``reduction`` needs saying:

    - without ``dim`` it is the root of ``mse_loss`` with the same reduction: ``'mean'`` gives the root mean square of
      everything, ``'sum'`` the Euclidean norm ``sqrt(sum(w d**2) + eps)``, and ``'none'`` each element's own
      ``sqrt(w d**2 + eps)``, the absolute residual. The mean of the ``'none'`` values is not the ``'mean'``.
    - with ``dim`` there is one root mean square per group, taken over these dimensions (per sample: all but the first),
      and ``reduction`` applies to the roots: ``'none'`` returns them in the shape of the other dimensions, ``'mean'``
      and ``'sum'`` average or add them. A group that is masked out as a whole counts as 0 under ``'none'`` and
      ``'sum'`` and is left out of the ``'mean'``.

    Args:
        input: predictions, any shape; float32, float64, float16 or bfloat16, any strides.
        target: true values; another shape is broadcast, with a warning, and without a copy.
        reduction: ``'mean'`` | ``'sum'`` | ``'none'``, see above.
        dim: dimension or dimensions of a group; None: all.
        eps: not negative; added under the root, it bounds the gradient near 0.
        weight: weight of each element, broadcast to the loss's shape, any floating dtype; means divide by its sum.
        sample_weight: weight of each sample, shape (N) for input (N, ...); multiplies ``weight``.
        mask: boolean, broadcast to the loss's shape; True marks the elements that count, see :func:`fastloss.l1_loss`.

    Returns:
        The loss, dtype promoted over input and target (float32 for 16-bit ones under autocast).

    Raises:
        ValueError: eps negative or infinite.
        IndexError: a dim that is not there.
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.

    Squares are summed in float64, in an order fixed by the shape: the same bits whatever the number of threads. Without
    ``dim`` the gradient of more than 2**20 squares is computed in the same pass and scaled once, in backward, by what
    the root is; that of fewer is computed from a second read, which finds them in the cache.
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            rmse_loss,
            (input, target),
            input,
            target,
            reduction=reduction,
            dim=dim,
            eps=eps,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
    if recording():
        return record("rmse_loss", locals())
    eps = _arguments.as_non_negative("rmse_loss", "eps", eps)
    if dim is None and weight is sample_weight is mask is None and reduction != "none":
        result = _pointwise.usual("rmse_loss", input, target, reduction, (eps,))
        if result is not None:
            return result
    if dim is not None and max(input.dim(), target.dim()) > _pointwise.MAX_DIMS:
        raise NotImplementedError(
            f"rmse_loss(): with dim at most {_pointwise.MAX_DIMS} dimensions; flatten some of them"
        )
    x = _pointwise.checked("rmse_loss", input, target, reduction, weight, sample_weight, mask)
    if dim is None:
        if x.reduction != NONE:
            return _pointwise.run_checked(x, "rmse_loss", (eps,))
        return _of_elements(x, eps)
    return _per_group(x, dim, eps)


def _of_elements(x: Operands, eps: float) -> Tensor:
    """sqrt(w d^2 + eps) of each; without either |d|, which does not overflow."""
    if x.weight is None and not eps:
        return _pointwise.run_checked(x, "l1_loss")
    # In float64 squares of float32 do not overflow. The operands stay as they are: the kernel reads them into it.
    wide = x.with_one_weight()._replace(dtype=torch.float64)
    if eps:
        roots = (_pointwise.run_checked(wide, "mse_loss") + eps).sqrt()
    else:
        roots = formulas.root(_pointwise.run_checked(wide, "mse_loss"))
    return (roots if x.mask is None else torch.where(x.mask, roots, 0)).to(x.dtype)


def _per_group(x: Operands, dim: int | Sequence[int], eps: float) -> Tensor:
    rank = x.input.dim()
    try:
        dims = [operator.index(dim)]  # type: ignore[arg-type]
    except TypeError:
        dims = [operator.index(d) for d in dim]  # type: ignore[union-attr]
    for d in dims:
        if not -rank <= d < rank:
            raise IndexError(f"rmse_loss(): dim {d} is out of range for a loss of {rank} dimensions")
    dims = sorted(d % rank for d in dims)
    if len(set(dims)) < len(dims):
        raise RuntimeError(f"rmse_loss(): dim names a dimension twice: {dim}")
    # Per group it is a mean whatever happens to the roots; 1 is the weights' share in it.
    share = 1.0 if x.weight is not None else 0.0
    return _pointwise.loss_of_groups("rmse_loss", x, dims, (eps,), inner=MEAN, share=share)


class RMSELoss(torch.nn.Module):
    """:func:`rmse_loss` as a module. Weights and mask are arguments of the call."""

    __prepare_scriptable__ = not_scriptable

    def __init__(self, reduction: str = "mean", *, dim: int | Sequence[int] | None = None, eps: float = 0.0) -> None:
        super().__init__()
        self.reduction, self.dim, self.eps = reduction, dim, eps

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of predictions against targets; shapes, dtypes and errors as :func:`rmse_loss`."""
        return rmse_loss(
            input,
            target,
            self.reduction,
            dim=self.dim,
            eps=self.eps,
            weight=weight,
            sample_weight=sample_weight,
            mask=mask,
        )
