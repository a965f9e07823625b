"""What the pointwise losses share: operators, reductions, weights, masks, broadcasting.

A loss is f(prediction, target, ...) summed over elements, or what is made of such sums; its mathematics is in
``csrc/pointwise/losses``, its composed form in ``fastloss/formulas.py``, the contract of the kernels in
``csrc/pointwise/pointwise.h``. A loss's own file gives the names, the docstring and the parameters, and calls
:func:`pointwise_loss`.

Fused, the gradient is computed with the value, every operand read once. Where its factor is known beforehand (a sum, a
mean over all elements) backward scales it by grad_output, or returns it untouched when that is 1; where it is known at
the end only (a mean over a mask or by weights, a root), it is scaled once, in place.

Operands are never copied to be broadcast or made contiguous: the kernels take strides.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .. import _arguments, errors, formulas
from .._autograd import (
    Engine,
    Grads,
    Needs,
    Path,
    Rules,
    Tensors,
    accum_dtype,
    batched_by_legacy,
    functorch_active,
    ordinary,
)
from .._library import DTYPE_CODES, DTYPES, MEAN, NONE, REDUCTIONS, SUM, direct, loop_vmap, ops
from .._recorded import record, recordable, recording


class _Registered(NamedTuple):
    name: str
    operands: int
    sums: int
    parameters: int


# The losses of csrc/pointwise/losses, in the order of their numbers.
REGISTRY = [
    _Registered(name, *map(int, counts))
    for name, *counts in (loss.split(":") for loss in ops.pointwise_losses().split())
]
NUMBERS = {loss.name: i for i, loss in enumerate(REGISTRY)}
OPERANDS, MAX_DIMS = 4, 24
TENSORS = OPERANDS + 3  # with weight, mask and sample weight
_MASK = OPERANDS + 1
_FINISHES = [formulas.FORMULAS[loss.name].finish is not None for loss in REGISTRY]
_CACHED = 1 << 20  # elements
# Of these torch says first what size the target has, where the sizes do not fit.
_TARGET_FIRST = ("hinge_embedding_loss", "kl_div", "poisson_nll_loss")


class Options(NamedTuple):
    """The operators' trailing arguments."""

    loss: int
    reduction: int
    loss_dtype: int
    row_dims: int = 0
    weight_denominator: float = 0.0
    p0: float = 0.0
    p1: float = 0.0
    p2: float = 0.0
    p3: float = 0.0


_ABSENT = (None,) * (OPERANDS + 1)  # all but input and target
_DEFAULTS = tuple(Options._field_defaults.values())


def _parameters(o: Options) -> list[float]:
    return list(o[5 : 5 + REGISTRY[o.loss].parameters])


def _call(op: Any, *before: Any, tensors: Tensors, o: Options, flags: int = 0) -> Any:
    input, target, third, fourth, weight, mask, sample_weight = tensors
    first = (*before, input, target, o.loss, o.reduction, o.loss_dtype, flags)
    if o[3:] == _DEFAULTS and third is weight is mask is None and not REGISTRY[o.loss].parameters:
        return op(*first)
    further = () if sample_weight is None else (sample_weight,)
    return op(*first, _parameters(o), third, fourth, weight, mask, o.row_dims, o.weight_denominator, *further)


class _Pointwise(Rules):
    """Operands: up to four, then weight, mask, and what multiplies the weight. All up to the weight may have
    gradients."""

    name, tensors, wants, options = "pointwise", TENSORS, OPERANDS + 1, Options

    def value(self, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
        return (_call(ops.pointwise_value, tensors=tensors, o=o),)

    def forward(self, tensors: Tensors, o: Options) -> Sequence[Tensor]:
        loss, factor, _ = _call(ops.pointwise_forward, tensors=tensors, o=o)
        return loss, factor

    def fused(self, tensors: Tensors, o: Options, needs: Needs) -> tuple[Tensor, Grads, Tensor | None, tuple[()]]:
        if _is_plain(tensors, o, needs):
            loss, grad = self.plain(tensors[0], tensors[1], o)
            return loss, (grad, None, None, None, None), None, ()
        known = _factor_is_known(tensors, o)
        flags = _FLAGS[tuple(needs[:OPERANDS])]
        loss, factor, grads = _call(ops.pointwise_forward, tensors=tensors, o=o, flags=flags)
        return loss, _placed(grads, needs), None if known else factor, ()

    def plain(self, input: Tensor, target: Tensor, o: Options) -> tuple[Tensor, Tensor]:
        if REGISTRY[o.loss].parameters:
            return _plain_grad(input, target, o.loss, o.reduction, o.loss_dtype, _parameters(o))  # type: ignore[no-any-return]
        return _plain_grad(input, target, o.loss, o.reduction, o.loss_dtype)  # type: ignore[no-any-return]

    def plain_value(self, input: Tensor, target: Tensor, o: Options) -> Tensor:
        return _call(_value, tensors=(input, target, *_ABSENT), o=o)  # type: ignore[no-any-return]

    def backward(self, grad_output: Tensor, tensors: Tensors, saved: Tensor, o: Options, needs: Needs) -> Grads:
        if not torch.compiler.is_compiling() and batched_by_legacy(
            grad_output
        ):  # has no rule for an operator that returns a list; the gradient is linear
            shape = saved.shape[: o.row_dims] if o.reduction != NONE else tensors[0].shape
            ones = torch.ones(shape, device=saved.device)
            unit = self.backward(ones.to(DTYPES[o.loss_dtype]), tensors, saved, o, [*needs[:OPERANDS], False])
            if o.reduction != NONE:
                grad_output = grad_output.view([*grad_output.shape, *[1] * (tensors[0].dim() - o.row_dims)])
            return tuple(None if grad is None else (grad * grad_output).to(grad.dtype) for grad in unit)
        grads: Sequence[Any] = ()
        if flags := _FLAGS[tuple(needs[:OPERANDS])]:
            g = grad_output if o.reduction == NONE else grad_output.contiguous()
            if o.reduction == NONE and tensors[-1] is not None:  # the kernels take one multiplier
                g, tensors = g * tensors[-1], (*tensors[:-1], None)
            grads = _call(ops.pointwise_backward, g, saved, tensors=tensors, o=o, flags=flags)
        *operands, weight = _placed(grads, needs)
        if needs[OPERANDS]:
            weight = self.gradients(grad_output, tensors, o, [False] * OPERANDS + [True])[OPERANDS]
        return (*operands, weight)

    def formula(self, tensors: Tensors, o: Options) -> Tensor:
        formula = formulas.FORMULAS[REGISTRY[o.loss].name]
        return formulas.pointwise(formula, tensors, dict(zip(formula.parameters, _parameters(o), strict=True)), o)

    def fusable(self, tensors: Tensors, o: Options) -> bool:
        weight = tensors[OPERANDS]
        if o.reduction == NONE or o.row_dims or not tensors[0].requires_grad:
            return False
        if weight is not None and weight.requires_grad:
            return False
        if not _FINISHES[o.loss]:
            return True
        # What is still in the cache is read again sooner than a gradient is scaled; both move as many bytes.
        if tensors[0].numel() > _CACHED:
            return REGISTRY[o.loss].sums == 1
        return _is_plain(tensors, o, [t is not None and t.requires_grad for t in tensors[: self.wants]])

    def regime(self, tensors: Tensors, o: Options, path: Path) -> str:
        return str(_call(ops.pointwise_regime, tensors=tensors, o=o))

    def gradient_bytes(self, tensors: Tensors, o: Options, needs: Needs) -> int:
        return super().gradient_bytes(tensors, o, needs[:OPERANDS])  # the weight's is composed

    def operators(
        self, path: Path, tensors: Tensors, o: Options, needs: Needs
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        forward, backward = super().operators(path, tensors, o, needs)
        if path is Path.FUSED and _is_plain(tensors, o, needs):
            forward = ("pointwise_plain_grad",)
        return forward, backward if any(needs[:OPERANDS]) else ()


# Bit k of the flags: the gradient of operand k.
_FLAGS = {
    needs: sum(1 << k for k, needed in enumerate(needs) if needed)
    for needs in itertools.product((False, True), repeat=OPERANDS)
}


_plain_grad, _value = direct(ops.pointwise_plain_grad), direct(ops.pointwise_value)
_INPUT_ALONE = (True, *[False] * OPERANDS)


def _is_plain(tensors: Tensors, o: Options, needs: Needs) -> bool:
    """Input and target are given and nothing else; the input's gradient is wanted; its factor is known beforehand, or
    the operands can be read again from the cache (16 bits would be rounded once more where grad_output is not 1)."""
    if tuple(tensors[2:]) != _ABSENT or tuple(needs) != _INPUT_ALONE:
        return False
    return not _FINISHES[o.loss] or (tensors[0].numel() <= _CACHED and tensors[0].element_size() > 2)


def _factor_is_known(tensors: Tensors, o: Options) -> bool:
    """Whether forward's gradients have it in them already; otherwise it is known at the end only."""
    known = o.reduction == SUM or (tensors[_MASK] is None and o.weight_denominator == 0)
    return known and not _FINISHES[o.loss]


def _placed(grads: Sequence[Tensor], needs: Needs) -> Grads:
    """The operands' gradients that are wanted, each in its place; none for the weight."""
    rest = iter(grads)
    return (*(next(rest) if needed else None for needed in needs[:OPERANDS]), None)


# --------------------------------------------------------------------------------------------------- fake kernels, vmap


def _like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The layout of t where that is dense, else contiguous."""
    if _arguments.is_dense(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype or t.dtype, device=t.device)
    return torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device)


def _fake_loss(input: Tensor, reduction: int, loss_dtype: int, row_dims: int) -> Tensor:
    if reduction == NONE:
        return _like(input, DTYPES[loss_dtype])
    return input.new_empty(input.shape[:row_dims], dtype=DTYPES[loss_dtype])


def _fake_grads(operands: Sequence[Any], flags: int) -> list[Tensor]:
    return [_like(t) for k, t in enumerate(operands) if flags >> k & 1]


@torch.library.register_fake("fastloss::pointwise_value")
def _(
    input: Any, target: Any, loss: Any, reduction: Any, loss_dtype: Any, flags: Any, params: Any = (),
    third: Any = None, fourth: Any = None, weight: Any = None, mask: Any = None, row_dims: Any = 0, *_: Any,
) -> Any:  # fmt: skip
    return _fake_loss(input, reduction, loss_dtype, row_dims)


@torch.library.register_fake("fastloss::pointwise_forward")
def _(
    input: Any, target: Any, loss: Any, reduction: Any, loss_dtype: Any, flags: Any, params: Any = (),
    third: Any = None, fourth: Any = None, weight: Any = None, mask: Any = None, row_dims: Any = 0, *_: Any,
) -> Any:  # fmt: skip
    sums = [REGISTRY[loss].sums] if REGISTRY[loss].sums > 1 else []
    factors = [0] if reduction == NONE else [*input.shape[:row_dims], *sums]
    grads = _fake_grads((input, target, third, fourth), flags)
    return _fake_loss(input, reduction, loss_dtype, row_dims), input.new_empty(factors, dtype=torch.float64), grads


@torch.library.register_fake("fastloss::pointwise_plain_grad")
def _(input: Any, target: Any, loss: Any, reduction: Any, loss_dtype: Any, params: Any = ()) -> Any:
    return _fake_loss(input, reduction, loss_dtype, 0), _like(input)


@torch.library.register_fake("fastloss::pointwise_backward")
def _(
    grad_output: Any, factor: Any, input: Any, target: Any, loss: Any, reduction: Any, loss_dtype: Any, flags: Any,
    params: Any = (), third: Any = None, fourth: Any = None, *rest: Any,
) -> Any:  # fmt: skip
    return _fake_grads((input, target, third, fourth), flags)


for _name in ("value", "forward", "plain_grad", "backward"):
    torch.library.register_vmap(f"fastloss::pointwise_{_name}", loop_vmap(getattr(ops, f"pointwise_{_name}")))

_engine = Engine(_Pointwise())


def run(
    tensors: tuple[Any, ...],
    loss: str,
    params: Sequence[float],
    reduction: int,
    dtype: torch.dtype,
    row_dims: int = 0,
    weight_denominator: float = 0.0,
) -> Tensor:
    """The loss of operands of one shape (expanded where broadcast), then weight, mask and sample weight."""
    o = Options(NUMBERS[loss], reduction, DTYPE_CODES[dtype], row_dims, weight_denominator, *params)
    return _engine(tensors, o)[0]


# ------------------------------------------------------------------------------------------------------------ arguments


class Operands(NamedTuple):
    """Checked arguments: operands of one shape, and how they are to be reduced."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    mask: Tensor | None
    reduction: int
    weight_denominator: float  # times the sum of the weights is what 'mean' divides by; 0: the count
    dtype: torch.dtype  # of the loss
    further: tuple[Tensor, ...] = ()  # operands beside input and target
    sample_weight: Tensor | None = None  # multiplies the weight, where there is one

    def tensors(self) -> tuple[Any, ...]:
        """In the operators' order, None where one is absent."""
        absent = (None,) * (OPERANDS - 2 - len(self.further))
        return (self.input, self.target, *self.further, *absent, self.weight, self.mask, self.sample_weight)

    def with_one_weight(self) -> "Operands":
        """The same, the weights multiplied: for who takes one."""
        if self.weight is None or self.sample_weight is None:
            return self
        accum = torch.promote_types(self.weight.dtype, accum_dtype(self.dtype))
        return self._replace(weight=self.weight * self.sample_weight.to(accum), sample_weight=None)


def require(function: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):  # torch's losses call size() of it: numpy's arrays have one that is no function
        kind = TypeError if hasattr(value, "size") else AttributeError
        raise kind(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def _expand(function: str, name: str, t: Tensor, shape: torch.Size) -> Tensor:
    if t.shape == shape:
        return t
    try:
        return t.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{function}(): {name} of shape {list(t.shape)} does not broadcast to the loss's shape {list(shape)}"
        ) from None


def _summed_once(t: Tensor, shape: torch.Size) -> Tensor:
    """An operand before it is broadcast: a gradient of 16 bits is to be summed in float32, and rounded at the end."""
    halves = t.dtype in _arguments.HALVES and t.shape != shape and t.requires_grad
    return t.float() if halves and torch.is_grad_enabled() else t


def broadcast(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands in the shape of all, without a copy."""
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    return tuple(_summed_once(t, shape).expand(shape) for t in operands)


def per_sample(function: str, sample_weight: Tensor, shape: torch.Size) -> Tensor:
    if not sample_weight.is_floating_point() or sample_weight.dtype not in DTYPE_CODES:
        raise RuntimeError(f"{function}(): sample_weight must be floating point, got {sample_weight.dtype}")
    if sample_weight.shape != shape[:1]:
        raise ValueError(
            f"{function}(): sample_weight needs one weight per sample, shape {list(shape[:1])}, but got "
            f"{list(sample_weight.shape)}"
        )
    if sample_weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}(): not differentiable with respect to argument 'sample_weight'; pass it detached, or use "
            "reduction='none' and multiply"
        )
    return sample_weight.view(-1, *[1] * (len(shape) - 1)).expand(shape) if shape else sample_weight


def weights(
    function: str, weight: Tensor | None, sample_weight: Tensor | None, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    """The weight of each element, and what multiplies it: neither is written out for the other's sake."""
    if sample_weight is None:
        return weight, None
    by_sample = per_sample(function, sample_weight, shape)
    return (by_sample, None) if weight is None else (weight, by_sample)


def broadcast_weight(function: str, name: str, t: Tensor | None, input: Tensor) -> Tensor | None:
    """A weight in the input's shape, of a dtype that the kernels read; torch's exception if it does not broadcast."""
    if t is None:
        return None
    if t.is_complex() or (t.is_floating_point() and t.dtype not in DTYPE_CODES):
        raise RuntimeError(f"{function}(): {name} of dtype {t.dtype} is not supported; call {name}.float()")
    if not t.is_floating_point():
        t = t.to(accum_dtype(input.dtype))
    try:
        return t.expand(input.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{function}(): {name} of shape {list(t.shape)} doesn't match the broadcast shape: it must broadcast to "
            f"the input's shape {list(input.shape)}"
        ) from None


def reported(loss: Tensor, input: Tensor) -> Tensor:
    """The loss of operands that have domains; what a GPU finds outside is raised here where errors are immediate."""
    if errors.immediate_errors() and input.is_cuda:
        errors.check_errors()
    return loss


def expanded_mask(function: str, mask: Tensor, shape: torch.Size) -> Tensor:
    """The mask in the loss's shape."""
    if mask.dtype is not torch.bool:
        raise RuntimeError(f"{function}(): mask must be a boolean tensor (True: counts), got {mask.dtype}")
    return _expand(function, "mask", mask, shape)


# Of a call that leaves everything but the reduction and the loss's parameters at its default.
_USUAL_OPTIONS = {
    (name, reduction, dtype): Options(number, code, DTYPE_CODES[dtype])
    for name, number in NUMBERS.items()
    for reduction, code in REDUCTIONS.items()
    for dtype in DTYPE_CODES
}


def usual(loss: str, input: Any, target: Any, reduction: Any, params: Sequence[float] = ()) -> Tensor | None:
    """The loss where :func:`checked` would find nothing to say or do: the common call, for the sake of small inputs.
    None where it might."""
    try:
        if not (
            ordinary()
            and type(input) is type(target) is Tensor
            and type(reduction) is str
            and ((input.is_cpu and target.is_cpu) or (input.is_cuda and input.device == target.device))
            and input.dtype is target.dtype
            and input.shape == target.shape
            and input.layout is target.layout is torch.strided
            and input.dim() <= MAX_DIMS
        ):
            return None
    except RuntimeError:  # strided nested tensors have no shape
        return None
    o = _USUAL_OPTIONS.get((loss, reduction, input.dtype))
    if o is None or _arguments.autocast_dtype(input.dtype, input.device) is not input.dtype:
        return None
    if params:
        o = Options(*o[:3], 0, 0.0, *params)
    fusable = o.reduction != NONE and input.dtype is not torch.float16
    if _FINISHES[o.loss]:
        fusable = fusable and input.element_size() > 2 and input.numel() <= _CACHED
    return _engine.plain(input, target, o, fusable)


def checked(
    function: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
    *,
    torch_weight: bool = False,
    mean_counts: bool = False,
    keeps_input_dtype: bool = False,
    broadcasts: bool = False,
    names: tuple[str, str] = ("input", "target"),
) -> Operands:
    """Checks and brings to one shape what a pointwise loss was called with.

    ``torch_weight``: weight is of the input's size and may raise the loss's dtype, as in torch; otherwise it broadcasts
    and does not. ``mean_counts``: 'mean' divides by the count whatever the weights. ``keeps_input_dtype``: the loss has
    the input's dtype instead of the promoted one. ``broadcasts``: the loss is one of those that torch composes of
    operations, which broadcast without a warning, take integers, and look at the reduction first. ``names``: of the
    first two operands.
    """
    if broadcasts:
        code = _arguments.reduction_code(reduction)
        _arguments.require_tensor(names[0], input, function)
        _arguments.require_tensor(names[1], target, function)
    else:
        require(function, names[1], target)
        require(function, names[0], input)
    for name, t in (("weight", weight), ("sample_weight", sample_weight), ("mask", mask)):
        if t is not None:
            require(function, name, t)
    _arguments.refuse_strided_nested(function, input, target)
    if target.shape != input.shape and not broadcasts:
        _arguments.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size."
        )
    _arguments.require_supported_tensors(function, input, target, weight, sample_weight, mask)
    others = ((names[1], target), ("weight", weight), ("sample_weight", sample_weight), ("mask", mask))
    _arguments.require_same_device(function, (names[0], input), *others)
    if target.shape != input.shape:
        try:
            torch.broadcast_tensors(*((target, input) if function in _TARGET_FIRST else (input, target)))
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}. {function}(): {names[0]} of size {list(input.shape)} and {names[1]} of size "
                f"{list(target.shape)} do not broadcast; give both one shape"
            ) from None
    if weight is not None and torch_weight:
        if torch.bool in (input.dtype, target.dtype) and not keeps_input_dtype:
            raise RuntimeError(f"{function}(): subtraction with a bool tensor is not supported; convert it to a number")
        if weight.shape != input.shape:
            raise ValueError(
                "Weights and input must have the same size. "
                f"{function}(): weight has shape {list(weight.shape)}, input {list(input.shape)}"
            )
        if not isinstance(reduction, str) or reduction not in REDUCTIONS:
            raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")
    if not broadcasts:
        code = _arguments.reduction_code(reduction)

    dtype = torch.promote_types(input.dtype, target.dtype)
    if broadcasts and not (keeps_input_dtype or dtype.is_floating_point or dtype.is_complex):
        dtype = torch.get_default_dtype()
    if keeps_input_dtype:
        if (dtype in DTYPE_CODES) != (input.dtype in DTYPE_CODES):
            raise RuntimeError(
                f"{function}(): result type {dtype} can't be cast to the input's {input.dtype}; convert one of them"
            )
        dtype = input.dtype
    for name, t in zip(names, (input, target), strict=True):
        if t.dtype not in DTYPE_CODES and (dtype not in DTYPE_CODES or t.is_floating_point() or t.is_complex()):
            raise NotImplementedError(
                f'{function}(): "{function}" not implemented for {name} of dtype {t.dtype}: expected float32, float64, '
                "float16 or bfloat16"
            )
    if input.dtype not in DTYPE_CODES:
        input = input.to(dtype)
    if target.dtype not in DTYPE_CODES:
        target = target.to(dtype)
    if target.shape != input.shape:
        if broadcasts:
            input, target = broadcast(input, target)
        else:
            input, target = torch.broadcast_tensors(input, target)
    shape = input.shape

    cast = weight is None or not torch_weight or keeps_input_dtype  # torch's weighted L1 and MSE are not on the list
    if cast:
        dtype = _arguments.autocast_dtype(dtype, input.device)
    denominator = 0.0
    if weight is not None:
        floating = weight.is_floating_point()
        if weight.is_complex() or (floating and weight.dtype not in DTYPE_CODES):
            kind = NotImplementedError if weight.is_complex() else RuntimeError
            raise kind(f"{function}(): weight of dtype {weight.dtype} is not supported; call weight.float()")
        if torch_weight and floating:
            by_mean = (
                code == MEAN and not mean_counts
            )  # torch then divides by weight.sum(), a tensor without dimensions
            if weight.dim() or not shape or by_mean:
                dtype = torch.promote_types(dtype, weight.dtype)
        elif not floating:
            weight = weight.to(accum_dtype(dtype))
        denominator = 1.0
        if torch_weight and weight.shape != shape:  # the target is larger: torch divides by the sum before broadcasting
            denominator = weight.numel() / max(input.numel(), 1)
            code = SUM if code == MEAN and weight.numel() and not input.numel() else code  # 0 over that sum
        weight = _expand(function, "weight", weight, shape)
    if sample_weight is not None:
        denominator = denominator or 1.0
    weight, by_sample = weights(function, weight, sample_weight, shape)
    if mask is not None:
        mask = expanded_mask(function, mask, shape)
    if code != MEAN or mean_counts:
        denominator = 0.0
    if input.dim() > MAX_DIMS:  # merge what would be merged anyway, at the cost of a copy
        if code == NONE:
            raise NotImplementedError(f"{function}(): reduction 'none' takes at most {MAX_DIMS} dimensions")
        input, target = input.reshape(-1), target.reshape(-1)
        weight = weight if weight is None else weight.reshape(-1)
        mask = mask if mask is None else mask.reshape(-1)
        by_sample = by_sample if by_sample is None else by_sample.reshape(-1)
    return Operands(input, target, weight, mask, code, denominator, dtype, sample_weight=by_sample)


def run_checked(x: Operands, loss: str, params: Sequence[float] = (), row_dims: int = 0) -> Tensor:
    """The loss of checked operands."""
    return run(x.tensors(), loss, params, x.reduction, x.dtype, row_dims, x.weight_denominator)


def with_further(function: str, x: Operands, further: Mapping[str, Tensor]) -> Operands:
    """Operands beside input and target: floating, broadcast to the loss's shape, differentiable."""
    dtype = x.dtype
    for name, t in further.items():
        require(function, name, t)
        _arguments.require_supported_tensors(function, x.input, t)
        _arguments.require_same_device(function, ("input", x.input), (name, t))
        if t.dtype not in DTYPE_CODES:
            raise NotImplementedError(
                f'{function}(): "{function}" not implemented for {name} of dtype {t.dtype}: expected float32, float64, '
                "float16 or bfloat16"
            )
        dtype = torch.promote_types(dtype, _arguments.autocast_dtype(t.dtype, t.device))
    expanded = tuple(
        _expand(function, name, _summed_once(t, x.input.shape), x.input.shape) for name, t in further.items()
    )
    return x._replace(further=expanded, dtype=dtype)


def pointwise_loss(
    function: str,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    loss: str | None = None,
    params: Sequence[float] = (),
    further: Mapping[str, Tensor] | None = None,
    torch_weight: bool = False,
    mean_counts: bool = False,
    keeps_input_dtype: bool = False,
    broadcasts: bool = False,
) -> Tensor:
    """The whole of a pointwise loss without a formula after its sums: what a face calls.

    Args:
        function: the face's name, for messages.
        input, target, reduction, weight, sample_weight, mask: what the face was called with.
        loss: the loss's name in csrc/pointwise/losses, where that differs from the face's.
        params: the loss's parameters.
        further: operands beside input and target, by the names of the face's arguments, in the order of the kernels.
        torch_weight, mean_counts, keeps_input_dtype, broadcasts: see :func:`checked`.
    """
    name = loss or function
    if further is None and weight is sample_weight is mask is None:
        result = usual(name, input, target, reduction, params)
        if result is not None:
            return result
    x = checked(
        function,
        input,
        target,
        reduction,
        weight,
        sample_weight,
        mask,
        torch_weight=torch_weight,
        mean_counts=mean_counts,
        keeps_input_dtype=keeps_input_dtype,
        broadcasts=broadcasts,
    )
    if further is not None:
        x = with_further(function, x, further)
    return run_checked(x, name, params)


def is_by_element(parameter: Any) -> TypeGuard[Tensor]:
    """Whether a loss's parameter is a tensor of numbers, or one that is to have a gradient."""
    return isinstance(parameter, Tensor) and (parameter.dim() > 0 or parameter.requires_grad)


@recordable
def loss_by_element(
    input: Tensor,
    target: Tensor,
    parameter: Tensor,
    function: str,
    name: str,
    reduction: str,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """A loss whose parameter ``name`` is a tensor, which broadcasts to the loss's shape: of torch operations.

    torch's losses take a number there. Kernels would take a loss of three operands each, with all their instantiations,
    for what few ask for.
    """
    if recording():
        return record("loss_by_element", locals())
    huber = function == "huber_loss"
    x = checked(
        function, input, target, reduction, weight, sample_weight, mask,
        torch_weight=huber, mean_counts=huber, keeps_input_dtype=huber,
    )  # fmt: skip
    dtype = x.dtype
    x = with_further(function, x, {name: parameter})
    known = parameter.is_cpu and not (
        torch.compiler.is_compiling() or functorch_active() or type(parameter) not in (Tensor, torch.nn.Parameter)
    )
    least = "positive" if huber else "0 or more"
    if known and not ((parameter > 0) if huber else (parameter >= 0)).all():
        kind = "non-positive" if huber else "negative"
        raise RuntimeError(
            f"{function} does not support {kind} values for {name}: each must be {least}, got {parameter}"
        )
    tensors = (x.input, x.target, *x.further, x.weight, x.mask, x.sample_weight)
    o = Options(NUMBERS[function], x.reduction, DTYPE_CODES[dtype], 0, x.weight_denominator)
    return formulas.pointwise(formulas.BY_ELEMENT[function], tensors, {}, o).to(dtype)


def loss_of_groups(
    loss: str, x: Operands, dims: Sequence[int], params: Sequence[float] = (), *, inner: int = SUM, share: float = 0.0
) -> Tensor:
    """What a loss with a formula after its sums is of each group of elements, over ``dims``, reduced as ``x`` says.

    A group that is masked out as a whole counts as 0, and not in the mean.

    Args:
        loss, params: as above.
        x: the operands, checked.
        dims: dimensions of a group, none of them negative.
        inner, share: how each group itself is reduced: SUM, or MEAN, over the weights where ``share`` is 1.
    """
    row_dims = x.input.dim() - len(dims)
    tensors = x.tensors()
    if list(dims) != list(range(row_dims, x.input.dim())):
        tensors = tuple(dims_last(t, dims) for t in tensors)
    each = run(tensors, loss, params, inner, x.dtype, row_dims, share)
    mask = tensors[_MASK]
    counted: Any = None
    if mask is not None:
        counted = mask.any(-1) if len(dims) == 1 else mask.flatten(row_dims).any(-1) if dims else mask
        each = torch.where(counted, each, 0)
    if counted is not None and x.reduction == MEAN:
        return (each.sum() / counted.sum()).to(each.dtype)
    return reduced(each, x.reduction)


def reduced(each: Tensor, reduction: int) -> Tensor:
    """The losses of groups, reduced."""
    return each if reduction == NONE else each.sum() if reduction == SUM else each.mean()


def dims_last(t: Tensor | None, dims: Sequence[int]) -> Tensor | None:
    """With these dimensions last: a view."""
    return None if t is None else t.permute([d for d in range(t.dim()) if d not in dims] + list(dims))
