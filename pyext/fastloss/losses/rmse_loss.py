"""Root mean squared error, with a gradient at zero. The mathematics is in ``csrc/pointwise/losses.h``."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._library import ops
from . import _common, _pointwise
from ._common import DTYPE_CODES, MEAN, NONE, SUM
from ._pointwise import NUMBERS, Operands, Options

_CACHED = 1 << 20  # elements


def _safe_root(square: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _composed(input: Tensor, target: Tensor, weight: Tensor | None, mask: Tensor | None, o: Options) -> Tensor:
    """The same by way of the sum of squares, whose derivatives of every kind are the pointwise family's own."""
    squares = o._replace(
        loss=NUMBERS["wide_mse_loss"], reduction=SUM, weight_denominator=0.0, loss_dtype=DTYPE_CODES[torch.float64]
    )
    cols = list(range(o.row_dims, input.dim()))
    if weight is not None and _pointwise.differentiates(weight):
        squares = squares._replace(reduction=NONE, row_dims=0)
        parts = _pointwise.run(input, target, None, mask, squares)
        parts = parts * (weight if mask is None else torch.where(mask, weight, 0))
        square = parts.sum(cols) if cols else parts
    else:
        square = _pointwise.run(input, target, weight, mask, squares)
    if o.reduction == MEAN:
        counted = weight if o.weight_denominator else None
        if counted is not None and mask is not None:
            counted = torch.where(mask, counted, 0)
        elif counted is None:
            counted = mask
        if counted is None:
            total = torch.full_like(square, input.shape[o.row_dims :].numel())
        else:
            total = counted.sum(cols, dtype=torch.float64) if cols else counted.double()
        nothing = total == 0  # nan, but without a gradient
        square = torch.where(nothing, torch.nan, square / torch.where(nothing, 1.0, total))
    return _safe_root(square + o.param).to(_common.DTYPES[o.loss_dtype])


def _again(ctx: Any, grad_output: Tensor, tensors: Any) -> tuple[Any, ...]:
    """A gradient that can be differentiated: that of the composed form."""
    input, target, weight, mask, _ = tensors
    need = ctx.needs_input_grad[:2]
    roots = _composed(input, target, weight, mask, ctx.options)
    wanted = [t for t, needed in zip((input, target), need, strict=True) if needed]
    found = iter(torch.autograd.grad(roots, wanted, grad_output, create_graph=True))
    return (*(next(found) if needed else None for needed in need), None, None, None)


class _Fused(_pointwise.Fused):
    """The gradient of the squares in forward; backward scales it by grad_output / (2 D L)."""

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        return _pointwise.fused_backward(ctx, grad_output, _again)


class _Recompute(Function):
    """Forward keeps 1 / (2 D L) of each root; backward reads the operands again and writes the gradient."""

    @staticmethod
    def forward(ctx: Any, input: Any, target: Any, weight: Any, mask: Any, o: Any) -> Any:
        loss, factor, _, _ = ops.pointwise_forward(input, target, weight, mask, *o)
        ctx.options = o
        ctx.save_for_backward(input, target, weight, mask, factor)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing recomputes it
        if _common.differentiated_again(grad_output, *saved[:2]):
            return _again(ctx, grad_output, saved)
        flags = _pointwise.flags_of(*ctx.needs_input_grad[:2])
        grads = ops.pointwise_backward(grad_output.contiguous(), *saved, *ctx.options[:-1], flags)
        return (*_pointwise.wanted(flags, *grads), None, None, None)


_apply_fused, _apply_recompute = _common.direct_apply(_Fused), _common.direct_apply(_Recompute)


def _roots(x: Operands, row_dims: int, eps: float) -> Tensor:
    """sqrt(mean or sum of w d^2 over the trailing dimensions + eps)."""
    o = Options(NUMBERS["rmse_loss"], eps, x.reduction, row_dims, x.weight_denominator, DTYPE_CODES[x.dtype])
    args = (x.input, x.target, x.weight, x.mask, o)
    transformed = _common.functorch_active() or _common.forward_mode_active() or _common.recording()
    if transformed or _pointwise.differentiates(x.weight):
        return _composed(*args)
    if not (torch.is_grad_enabled() and (x.input.requires_grad or x.target.requires_grad)):
        return ops.pointwise_forward(*args[:4], *o)[0]
    if torch.compiler.is_compiling():
        return _composed(*args)
    # Both move 5 times the input's bytes. What is still in the cache is read again sooner than a gradient is scaled.
    if x.input.numel() > _CACHED and _pointwise.is_fused(x.input, x.target, o):
        return _apply_fused(*args)
    return _apply_recompute(*args)


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
        ValueError: a negative eps.
        IndexError: a dim that is not there.
        ValueError, RuntimeError, NotImplementedError, AttributeError: as :func:`fastloss.mse_loss`.

    Squares are summed in float64, in an order fixed by the shape: the same bits whatever the number of threads. Without
    ``dim`` the gradient of more than 2**20 squares is computed in the same pass and scaled once, in backward, by what
    the root is; that of fewer is computed in backward.
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
    eps = _common.as_float("rmse_loss", "eps", eps)
    if not eps >= 0:
        raise ValueError(f"rmse_loss(): eps must not be negative, got {eps}")
    if dim is None and weight is None and sample_weight is None and mask is None:
        code = {"mean": MEAN, "sum": SUM}.get(reduction) if isinstance(reduction, str) else None
        if code is not None and _pointwise.is_plain(input, target):
            return _roots(Operands(input, target, None, None, code, 0.0, input.dtype), 0, eps)
    if dim is not None and max(input.dim(), target.dim()) > _pointwise.MAX_DIMS:
        raise NotImplementedError(
            f"rmse_loss(): with dim at most {_pointwise.MAX_DIMS} dimensions; flatten some of them"
        )
    x = _pointwise.check("rmse_loss", input, target, reduction, weight, sample_weight, mask)
    if dim is None:
        if x.reduction != NONE:
            return _roots(x, 0, eps)
        return _of_elements(x, eps)
    return _per_group(x, dim, eps)


def _of_elements(x: Operands, eps: float) -> Tensor:
    """sqrt(w d^2 + eps) of each; without eps by way of sqrt(w) |d|, which does not overflow."""
    weight = x.weight
    if weight is not None and x.mask is not None:  # what is hidden may hold anything, also for the weight's gradient
        weight = torch.where(x.mask, weight, 1)
    if not eps:
        weight = None if weight is None else weight.to(_common.accum_dtype(x.dtype)).sqrt()
        return _pointwise.run_weighted("l1_loss", 0.0, x._replace(weight=weight))
    # By the squares, smooth where the residual is 0, and the weights, of which those of 0 and below have a derivative.
    # In float64, where squares of float32 do not overflow.
    o = Options(NUMBERS["mse_loss"], 0.0, NONE, 0, 0.0, DTYPE_CODES[torch.float64])
    square = _pointwise.run(x.input.double(), x.target.double(), None, x.mask, o)
    roots = ((square if weight is None else weight * square) + eps).sqrt()
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
    input, target, weight, mask = (_pointwise.dims_last(t, dims) for t in (x.input, x.target, x.weight, x.mask))
    assert input is not None and target is not None
    row_dims = rank - len(dims)
    # Per group it is a mean whatever happens to the roots; 1 is the weights' share in it.
    share = 1.0 if weight is not None else 0.0
    roots = _roots(Operands(input, target, weight, mask, MEAN, share, x.dtype), row_dims, eps)
    counted: Any = None
    if mask is not None:
        counted = mask.any(-1) if len(dims) == 1 else mask.flatten(row_dims).any(-1) if dims else mask
        roots = torch.where(counted, roots, 0)
    if x.reduction == NONE:
        return roots
    if x.reduction == SUM:
        return roots.sum()
    return roots.mean() if counted is None else (roots.sum() / counted.sum()).to(roots.dtype)


class RMSELoss(torch.nn.Module):
    """:func:`rmse_loss` as a module. Weights and mask are arguments of the call."""

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
