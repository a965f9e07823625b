"""What the divergences of two softmaxes share: operators, and checks of their arguments.

The mathematics is in ``csrc/rowwise/divergence.h`` and ``divergence_math.h``, the composed form in
``fastloss/formulas.py``. The kernels know p and q, not student and teacher: who is which is said by the faces.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _arguments, formulas
from .._autograd import Engine, Grads, Needs, Path, Rules, Tensors
from .._library import DTYPE_CODES, DTYPES, MEAN, NONE, loop_vmap, ops
from . import _rowwise

KL, JS = 0, 1  # codes of the C++ enum Divergence


class Options(NamedTuple):
    """The operators' trailing arguments, in their order."""

    kind: int
    beta: float
    temperature: float
    scale: float
    reduction: int
    loss_dtype: int


_SAVED = 7  # numbers per row, as in divergence.h


class _Divergence(Rules):
    """Operands: logits of p, of q; weights of the rows; what a mean divides by. The first two may have gradients."""

    name, tensors, wants, options = "divergence", 4, 2, Options

    def value(self, tensors: Tensors, o: Options) -> tuple[Tensor, ...]:
        return (ops.divergence_value(*tensors, *o),)

    def forward(self, tensors: Tensors, o: Options) -> Sequence[Tensor]:
        return ops.divergence_forward(*tensors, *o)  # type: ignore[no-any-return]

    def fused(self, tensors: Tensors, o: Options, needs: Needs) -> tuple[Tensor, Grads, None, tuple[()]]:
        loss, *grads = ops.divergence_grad(*tensors, needs[0] + 2 * needs[1], *o)
        return loss, _wanted(grads, needs), None, ()

    def backward(self, grad_output: Tensor, tensors: Tensors, saved: Tensor, o: Options, needs: Needs) -> Grads:
        g, flags = grad_output.contiguous(), needs[0] + 2 * needs[1]
        return _wanted(ops.divergence_backward(g, *tensors, saved, flags, *o), needs)

    def formula(self, tensors: Tensors, o: Options) -> Tensor:
        return formulas.divergence(tensors, o, js=o.kind == JS)

    def fusable(self, tensors: Tensors, o: Options) -> bool:
        return o.reduction != NONE

    def regime(self, tensors: Tensors, o: Options, path: Path) -> str:
        return str(ops.divergence_regime(*tensors[:2]))

    def operators(
        self, path: Path, tensors: Tensors, o: Options, needs: Needs
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        forward, backward = super().operators(path, tensors, o, needs)
        return (("divergence_grad",) if path is Path.FUSED else forward), backward


def _wanted(grads: Sequence[Tensor], needs: Needs) -> Grads:
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


# --------------------------------------------------------------------------------------------------- fake kernels, vmap


def _fake_loss(p: Any, *options: Any) -> Any:
    o = Options(*options)
    return p.new_empty(_rowwise.row_shape(p) if o.reduction == NONE else [], dtype=DTYPES[o.loss_dtype])


def _fake_grads(p: Any, q: Any, needs: int) -> tuple[Any, Any]:
    return (
        torch.empty_like(p) if needs & 1 else p.new_empty([0]),
        torch.empty_like(q) if needs & 2 else q.new_empty([0]),
    )


@torch.library.register_fake("fastloss::divergence_value")
def _(p: Any, q: Any, weight: Any, total: Any, *options: Any) -> Any:
    return _fake_loss(p, *options)


@torch.library.register_fake("fastloss::divergence_forward")
def _(p: Any, q: Any, weight: Any, total: Any, *options: Any) -> Any:
    rows = 1
    for n in _rowwise.row_shape(p):
        rows = rows * n
    return _fake_loss(p, *options), p.new_empty([_SAVED, rows], dtype=formulas.divergence_dtype(p, q))


@torch.library.register_fake("fastloss::divergence_grad")
def _(p: Any, q: Any, weight: Any, total: Any, needs: Any, *options: Any) -> Any:
    return (_fake_loss(p, *options), *_fake_grads(p, q, needs))


@torch.library.register_fake("fastloss::divergence_backward")
def _(grad_output: Any, p: Any, q: Any, weight: Any, total: Any, saved: Any, needs: Any, *options: Any) -> Any:
    return _fake_grads(p, q, needs)


for _name in ("value", "forward", "grad", "backward"):
    torch.library.register_vmap(f"fastloss::divergence_{_name}", loop_vmap(getattr(ops, f"divergence_{_name}")))

_engine = Engine(_Divergence())


# ----------------------------------------------------------------------------------------------------------- arguments


def run(
    function: str,
    kind: int,
    input: Tensor,
    target: Tensor,
    reduction: str,
    *,
    input_first: bool,
    beta: float,
    temperature: float,
    temperature_squared: bool,
    class_dim: int | None,
    mask: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The whole of a divergence: what a face calls.

    Args:
        function: the face's name, for messages.
        kind: KL or JS.
        input_first: p is the softmax of the input, and q that of the target; otherwise the other way round.
        beta: checked already.
        input, target, reduction, temperature, temperature_squared, class_dim, mask, sample_weight: what the face was
            called with.
    """
    red = MEAN if reduction == "batchmean" else _reduction_code(function, reduction)
    for name, t in (("input", input), ("target", target), ("mask", mask), ("sample_weight", sample_weight)):
        if t is not None or name in ("input", "target"):
            _arguments.require_tensor(name, t, function)
    temperature = float(_arguments.as_positive(function, "temperature", temperature))
    if class_dim is not None:
        class_dim = _arguments.as_int(function, "class_dim", class_dim)
    _arguments.require_supported_tensors(function, input, target, mask, sample_weight)
    others = ("target", target), ("mask", mask), ("sample_weight", sample_weight)
    _arguments.require_same_device(function, ("input", input), *others)
    _rowwise.check_logits_dtype(input, function)
    _rowwise.check_logits_dtype(target, function, "target")
    if input.dim() == 0:
        raise ValueError(f"{function}(): input needs a dimension of classes, got shape []")
    if input.shape != target.shape:
        raise ValueError(
            f"{function}(): input and target must have the same shape, got {list(input.shape)} and "
            f"{list(target.shape)}; expand() the smaller one"
        )
    batch = input.shape[0]
    single = input.dim() == 1
    if class_dim is not None and not -input.dim() <= class_dim < input.dim():
        raise IndexError(f"Dimension out of range: class_dim is {class_dim}, but input has {input.dim()} dimensions")
    if single:
        input, target, batch = input.unsqueeze(0), target.unsqueeze(0), 1
    elif class_dim is not None:
        input, target = input.movedim(class_dim, 1), target.movedim(class_dim, 1)
    rows = [] if single else _rowwise.row_shape(input)
    accum = formulas.divergence_dtype(input, target)
    weight = _row_weight(function, mask, sample_weight, rows, accum)
    total = None
    if reduction == "batchmean":
        total = torch.full((), batch, dtype=accum, device=input.device)
    elif red == MEAN and weight is not None:
        total = weight.sum()
    dtype = _arguments.autocast_dtype(torch.promote_types(input.dtype, target.dtype), input.device)
    scale = temperature * temperature if temperature_squared else 1.0
    o = Options(kind, beta, temperature, scale, red, DTYPE_CODES[dtype])
    p, q = (input, target) if input_first else (target, input)
    (loss,) = _engine((p, q, weight, total), o)
    return loss.reshape(()) if single else loss


def _reduction_code(function: str, reduction: str) -> int:
    try:
        return _arguments.reduction_code(reduction)
    except ValueError as error:
        raise ValueError(f"{function}(): {error}, or 'batchmean'") from None


def _row_weight(
    function: str, mask: Tensor | None, sample_weight: Tensor | None, rows: list[int], dtype: torch.dtype
) -> Tensor | None:
    """What each row weighs, contiguous; 0 where it does not count."""
    for name, t in (("mask", mask), ("sample_weight", sample_weight)):
        if t is not None and list(t.shape) != rows:
            raise ValueError(
                f"{function}(): {name} needs an element for each row, shape {rows}, but got {list(t.shape)}"
            )
    if mask is not None and mask.dtype is not torch.bool:
        raise RuntimeError(f"{function}(): mask must be a boolean tensor (True: counts), got {mask.dtype}")
    if sample_weight is None:
        return None if mask is None else mask.to(dtype).contiguous()
    if sample_weight.dtype not in DTYPE_CODES:
        raise RuntimeError(f"{function}(): sample_weight must be floating point, got {sample_weight.dtype}")
    if sample_weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}(): not differentiable with respect to argument 'sample_weight'; pass it detached, or use "
            "reduction='none' and multiply"
        )
    weight = sample_weight.detach().to(dtype)
    return (weight if mask is None else torch.where(mask, weight, 0.0)).contiguous()
