"""What the losses over a class axis that need no softmax share: operators, and checks of their arguments.

Such a loss is w_t f(row, t), summed over the rows. Its mathematics is in ``csrc/rowwise/row_losses.h``, its composed
form in ``fastloss/formulas.py``, the contract of the kernels in ``csrc/rowwise/row_loss.h``. A loss's own file gives
the names, the docstring and the parameters, and calls :func:`run`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _arguments, errors, formulas
from .._autograd import Engine, Grads, Needs, Path, Rules, Tensors, accum_dtype
from .._library import DTYPE_CODES, DTYPES, NONE, REDUCTIONS, direct, loop_vmap, ops
from . import _rowwise

NAMES: list[str] = ops.row_losses().split()
# Bits of `flags`, as in row_loss_torch.cpp.
MEAN_OVER_ROWS, IGNORES_NOTHING = 1, 2


class Options(NamedTuple):
    """The operators' trailing arguments."""

    loss: int
    reduction: int
    loss_dtype: int
    ignore_index: int = -100
    flags: int = 0
    p0: float = 0.0
    p1: float = 0.0
    p2: float = 0.0
    p3: float = 0.0


def _parameters(o: Options) -> dict[str, float]:
    return dict(zip(formulas.ROW_LOSSES[NAMES[o.loss]].parameters, o[-4:], strict=False))


def _call(op: Any, *tensors: Any, o: Options) -> Any:
    return op(*tensors, o.loss, list(_parameters(o).values()), o.reduction, o.loss_dtype, o.ignore_index, o.flags)


class _RowLoss(Rules):
    """Operands: input, target, weight. The first may have a gradient."""

    name, tensors, wants, options = "row_loss", 3, 1, Options

    def value(self, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
        return (_call(ops.row_loss_value, *tensors, o=o),)

    def forward(self, tensors: Tensors, o: Options) -> Sequence[Tensor]:
        return _call(ops.row_loss_forward, *tensors, o=o)  # type: ignore[no-any-return]

    def backward(self, grad_output: Tensor, tensors: Tensors, saved: Tensor, o: Options, needs: Needs) -> Grads:
        return (_call(ops.row_loss_backward, grad_output.contiguous(), *tensors, saved, o=o),)

    def formula(self, tensors: Tensors, o: Options) -> Tensor:
        return formulas.row_loss(formulas.ROW_LOSSES[NAMES[o.loss]], tensors, _parameters(o), o)

    def gradients(self, grad_output: Tensor, tensors: Tensors, o: Options, needs: Needs) -> Grads:
        (grad,) = super().gradients(grad_output, tensors, o, needs)
        # Where the loss is linear its second derivative is there all the same, and 0.
        nowhere = torch.zeros_like(tensors[0], dtype=torch.bool)
        return (None if grad is None else grad + torch.where(nowhere, tensors[0], 0.0),)

    def fusable(self, tensors: Tensors, o: Options) -> bool:
        return False  # backward reads less than it writes, or what is still in the cache

    def regime(self, tensors: Tensors, o: Options, path: Path) -> str:
        return str(_call(ops.row_loss_regime, *tensors, o=o))

    def plain_value(self, input: Tensor, target: Tensor, o: Options) -> Tensor:
        return _call(_value, input, target, None, o=o)  # type: ignore[no-any-return]


_value = direct(ops.row_loss_value)

# ------------------------------------------------------------------------------------------------ fake kernels, vmap


def _fake_loss(input: Tensor, target: Tensor, reduction: int, loss_dtype: int) -> Tensor:
    return input.new_empty(target.shape if reduction == NONE else [], dtype=DTYPES[loss_dtype])


@torch.library.register_fake("fastloss::row_loss_value")
def _(input: Any, target: Any, weight: Any, loss: Any, params: Any, reduction: Any, loss_dtype: Any, *_: Any) -> Any:
    return _fake_loss(input, target, reduction, loss_dtype)


@torch.library.register_fake("fastloss::row_loss_forward")
def _(input: Any, target: Any, weight: Any, loss: Any, params: Any, reduction: Any, loss_dtype: Any, *_: Any) -> Any:
    total_weight = input.new_empty([], dtype=accum_dtype(input.dtype))
    return _fake_loss(input, target, reduction, loss_dtype), total_weight


@torch.library.register_fake("fastloss::row_loss_backward")
def _(grad_output: Any, input: Any, *rest: Any) -> Any:
    return torch.empty_like(input)


for _name in ("value", "forward", "backward"):
    torch.library.register_vmap(f"fastloss::row_loss_{_name}", loop_vmap(getattr(ops, f"row_loss_{_name}")))

_engine = Engine(_RowLoss())

# Of a call of a loss without parameters that leaves everything but the reduction at its default.
_USUAL_OPTIONS = {
    (name, reduction, dtype): Options(number, code, DTYPE_CODES[dtype])
    for number, name in enumerate(NAMES)
    for reduction, code in REDUCTIONS.items()
    for dtype in DTYPE_CODES
}

# ---------------------------------------------------------------------------------------------------------- arguments


def run(
    function: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    *,
    ignore_index: int | Sequence[int] = -100,
    params: Sequence[float] = (),
    flags: int = 0,
    same_dtype: bool = False,
) -> Tensor:
    """The whole of a row loss: what a face calls.

    Args:
        function: the face's name, for messages, and the loss's in row_losses.h.
        input, target, weight, reduction, ignore_index: what the face was called with.
        params: the loss's parameters.
        flags: see above.
        same_dtype: the weight must have the input's dtype; otherwise any floating one will do.
    """
    usual = weight is None and type(reduction) is str and type(ignore_index) is int and ignore_index == -100
    if usual and not (params or flags) and _rowwise.is_usual(input, target) and target.is_contiguous():
        o = _USUAL_OPTIONS.get((function, reduction, input.dtype))
        if o is not None and _arguments.autocast_dtype(input.dtype, input.device) is input.dtype:
            return _engine.plain(input, target, o, fusable=False)
    red = _arguments.reduction_code(reduction)
    _arguments.require_tensor("input", input, function)
    _arguments.require_tensor("target", target, function)
    if weight is not None:
        _arguments.require_tensor("weight", weight, function)
    ignored = _rowwise.ignore_indices(function, ignore_index)
    _arguments.require_supported_tensors(function, input, target, weight)
    _arguments.require_same_device(function, ("input", input), ("target", target), ("weight", weight))
    if input.dim() == 0:
        raise ValueError("Expected 1 or more dimensions (got 0)")
    single = input.dim() == 1
    if single:
        _rowwise.check_single_target(target, function)
        input, target = input.unsqueeze(0), target.reshape(1)
    _rowwise.check_index_shapes(input, target, function)
    _rowwise.check_index_dtype(target, function)
    _rowwise.check_logits_dtype(input, function)
    target = _rowwise.ignored_as_one(_rowwise.index_target(target), ignored)
    loss_dtype = _arguments.autocast_dtype(input.dtype, input.device)
    if weight is not None:
        _rowwise.check_weight(weight, input.shape[1], function, any_shape=input.dim() > 2)
        if same_dtype and _arguments.autocast_dtype(weight.dtype, input.device) is not loss_dtype:
            raise RuntimeError(
                f"expected scalar type {SCALAR_TYPES[input.dtype]} but found "
                f"{SCALAR_TYPES.get(weight.dtype, weight.dtype)}: {function}(): weight needs the dtype of the input; "
                "call weight.to(input.dtype)"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{function}(): not differentiable with respect to argument 'weight'. This input cannot have "
                "requires_grad True; pass weight.detach()"
            )
        weight = weight.to(accum_dtype(input.dtype)).flatten().contiguous()
    options = Options(NAMES.index(function), red, DTYPE_CODES[loss_dtype], ignored[0], flags, *params)
    (loss,) = _engine((input, target, weight), options)
    if errors.immediate_errors() and input.is_cuda:
        errors.check_errors()
    return loss.reshape(()) if single else loss


SCALAR_TYPES = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}
