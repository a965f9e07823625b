"""Negative log likelihood of given log-probabilities. One element per row is read; backward writes each element once.

The mathematics is in ``csrc/rowwise/nll_loss.h``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _arguments, errors, formulas
from .._autograd import Engine, Grads, Needs, Outcome, Rules, Tensors, accum_dtype
from .._library import DTYPE_CODES, DTYPES, NONE, loop_vmap, ops
from . import _rowwise

_SCALAR_TYPES = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}


class Options(NamedTuple):
    """The operators' trailing arguments, in their order."""

    reduction: int
    loss_dtype: int
    ignore_index: int


class _NllLoss(Rules):
    """Operands: input, target, weight. The first may have a gradient."""

    name, tensors, wants, options = "nll_loss", 3, 1, Options

    def value(self, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
        return (ops.nll_loss_forward(*tensors, *o)[0],)

    def forward(self, tensors: Tensors, o: Options, needs: Needs | None) -> Outcome:
        return Outcome(*ops.nll_loss_forward(*tensors, *o))

    def backward(self, grad_output: Tensor, tensors: Tensors, saved: Tensor, o: Options, needs: Needs) -> Grads:
        return (ops.nll_loss_backward(grad_output.contiguous(), *tensors, saved, *o),)

    def gradients(self, grad_output: Tensor, tensors: Tensors, o: Options, needs: Needs) -> Grads:
        return formulas.nll_loss_gradients(grad_output, tensors, o, needs)

    def tangent(self, tensors: Tensors, tangents: Sequence[Tensor | None], o: Options) -> Tensor:
        return formulas.nll_loss_tangent(tensors, tangents, o)

    def fusable(self, tensors: Tensors, o: Options) -> bool:
        return False  # backward writes every element anyway, and reads none


@torch.library.register_fake("fastloss::nll_loss_forward")
def _(input: Any, target: Any, weight: Any, *options: Any) -> Any:
    o = Options(*options)
    loss = input.new_empty(target.shape if o.reduction == NONE else [], dtype=DTYPES[o.loss_dtype])
    return loss, input.new_empty([], dtype=accum_dtype(input.dtype))


@torch.library.register_fake("fastloss::nll_loss_backward")
def _(grad_output: Any, input: Any, *rest: Any) -> Any:
    return torch.empty_like(input)


for _name in ("nll_loss_forward", "nll_loss_backward"):
    torch.library.register_vmap(f"fastloss::{_name}", loop_vmap(getattr(ops, _name)))

_engine = Engine(_NllLoss())


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood loss; a drop-in for :func:`torch.nn.functional.nll_loss`.

    The loss of a row with class index t is ``-w_t * input_t``. For logits use :func:`fastloss.cross_entropy`, which
    needs no log-probabilities in memory.

    Args:
        input: log-probabilities, shape (C), (N, C) or (N, C, d1, ..., dK); float32, float64, float16 or bfloat16.
        target: class indices, shape (), (N) or (N, d1, ..., dK), any integer dtype.
        weight: weight of each class, shape (C), in the input's dtype.
        size_average, reduce: deprecated in torch; they override ``reduction``, with a warning.
        ignore_index: class index that marks targets to leave out.
        reduction: ``'none'`` | ``'mean'`` (divided by the sum of ``weight[target]`` over the counted) | ``'sum'``.

    Returns:
        The loss, in the input's dtype (float32 for 16-bit input under autocast).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index; on CUDA by a later call, see
            :func:`fastloss.set_error_mode`.
        ValueError, RuntimeError, TypeError, NotImplementedError: as torch, for shapes, dtypes and arguments.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            nll_loss,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
        )
    if size_average is not None or reduce is not None:
        reduction = _arguments.legacy_reduction(size_average, reduce)
    red = _arguments.reduction_code(reduction)
    _arguments.require_tensor("input", input, "nll_loss_nd")
    _arguments.require_tensor("target", target, "nll_loss_nd")
    if weight is not None:
        _arguments.require_tensor("weight", weight, "nll_loss_nd")
    ignore_index = _arguments.as_int("nll_loss_nd", "ignore_index", ignore_index)
    _arguments.require_supported_tensors("nll_loss", input, target, weight)
    _arguments.require_same_device("nll_loss", ("input", input), ("target", target), ("weight", weight))
    if input.dim() == 0:
        raise ValueError("Expected 1 or more dimensions (got 0)")
    single = input.dim() == 1
    if single:
        _rowwise.check_single_target(target, "nll_loss")
        input, target = input.unsqueeze(0), target.reshape(1)
    _rowwise.check_index_shapes(input, target, "nll_loss")
    _rowwise.check_index_dtype(target, "nll_loss")
    _rowwise.check_logits_dtype(input, "nll_loss")
    target = _rowwise.index_target(target)
    if not _rowwise.mergeable(input):
        input = input.contiguous()
    loss_dtype = _arguments.autocast_dtype(input.dtype, input.device)
    if weight is not None:
        _rowwise.check_weight(weight, input.shape[1], "nll_loss", any_shape=input.dim() > 2)
        if _arguments.autocast_dtype(weight.dtype, input.device) is not loss_dtype:
            raise RuntimeError(
                f"expected scalar type {_SCALAR_TYPES[input.dtype]} but found "
                f"{_SCALAR_TYPES.get(weight.dtype, weight.dtype)}: "
                "nll_loss(): weight needs the dtype of the "
                "input; call weight.to(input.dtype)"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "nll_loss(): not differentiable with respect to argument 'weight'. This input cannot have "
                "requires_grad True; pass weight.detach()"
            )
        weight = weight.to(accum_dtype(input.dtype)).flatten().contiguous()

    (loss,) = _engine((input, target, weight), Options(red, DTYPE_CODES[loss_dtype], ignore_index))
    if errors.immediate_errors() and input.is_cuda:
        errors.check_errors()
    return loss.reshape(()) if single else loss


class NLLLoss(torch.nn.NLLLoss):
    """:func:`nll_loss` as a module; a drop-in for :class:`torch.nn.NLLLoss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of log-probabilities (N, C, ...) against class indices; as :func:`nll_loss`."""
        return nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)
