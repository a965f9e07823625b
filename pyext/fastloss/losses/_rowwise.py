"""What the losses over a class axis share: checks of logits and class indices, with torch's exceptions and a remedy."""

from typing import Any

import torch
from torch import Tensor

from .. import _arguments, errors
from .._autograd import ordinary
from .._library import DTYPE_CODES

INDEX_DTYPES = frozenset(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)
NO_INDEX = -(2**62)  # for an ignore_index that ignores nothing


def row_shape(logits: Tensor) -> list[int]:
    """Of logits [N, C, d1, ...]: the shape of an index target."""
    return [*logits.shape[:1], *logits.shape[2:]]


def is_usual(input: Any, target: Any) -> bool:
    """Whether these are rows [N, C] and class indices [N] of which a loss would say nothing and change nothing: what
    most calls have, seen at once for small inputs' sake."""
    try:
        if not (
            ordinary()
            and type(input) is type(target) is Tensor
            and ((input.is_cpu and target.is_cpu) or _usual_on_cuda(input, target))
            and target.dtype is torch.int64
            and input.layout is target.layout is torch.strided
        ):
            return False
        rows, classes = input.shape
        return target.shape == (rows,) and rows != 0 != classes
    except (RuntimeError, ValueError):  # strided nested tensors have no shape; other dimensions
        return False


def _usual_on_cuda(input: Tensor, target: Tensor) -> bool:
    return input.is_cuda and input.device == target.device and not errors.immediate_errors()


def index_target(target: Tensor) -> Tensor:
    """Class indices as the kernels take them: contiguous, and no uint64 past 2**63 that would wrap to ignore_index."""
    if target.dtype is torch.uint64:
        signed = target.view(torch.int64)
        if target.device.type == "cpu" and type(target) is Tensor and (signed < 0).any():
            row = (signed < 0).nonzero()[0].tolist()
            value = int(signed[tuple(row)]) + 2**64
            raise IndexError(f"Target {value} is out of bounds. target{row or ''} = {value} is no class index")
        target = torch.where(signed < 0, torch.iinfo(torch.int64).max, signed)
    return target if target.is_contiguous() else target.contiguous()


def ignore_indices(function: str, ignore_index: Any) -> tuple[int, ...]:
    """The class indices that mark targets to leave out, of which there is one as a rule."""
    if not isinstance(ignore_index, (list, tuple, set, frozenset, range)):
        return (_arguments.as_int(function, "ignore_index", ignore_index),)
    if not ignore_index:
        raise ValueError(f"{function}(): ignore_index is empty; give a class index that no target has, as -100")
    return tuple(_arguments.as_int(function, "ignore_index", i) for i in ignore_index)


def ignored_as_one(target: Tensor, ignored: tuple[int, ...]) -> Tensor:
    """Targets of which all that are to be left out hold the first of these class indices."""
    if len(ignored) == 1:
        return target
    target = target.to(torch.int64)  # torch compares no uint16
    marked = target == ignored[1]
    for i in ignored[2:]:
        marked |= target == i
    return torch.where(marked, ignored[0], target)


def check_single_target(target: Tensor, function: str) -> None:
    """The class index of logits [C], shape () or (1): torch's exceptions in torch's order."""
    if target.dim() > 1:
        raise RuntimeError(
            "0D or 1D target tensor expected, multi-target not supported: target has shape "
            f"{list(target.shape)} for 1D input; give one class index"
        )
    check_index_dtype(target, function)
    if target.numel() != 1:
        raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target.numel()}")


def check_index_shapes(logits: Tensor, target: Tensor, function: str, class_dim: bool = False) -> None:
    """logits [N, C, d1, ...] against target [N, d1, ...]: torch's exceptions in torch's order, with a remedy.

    ``class_dim``: whether the function has this option.
    """
    x, t = list(logits.shape), list(target.shape)
    batch = t[0] if t else 0
    if batch != x[0]:
        raise ValueError(
            f"Expected input batch_size ({x[0]}) to match target batch_size ({batch}). input has shape {x}, target {t}"
        )
    if len(x) == 2:
        if len(t) > 1:
            raise RuntimeError(
                f"0D or 1D target tensor expected, multi-target not supported: target has shape {t} for input {x}; "
                "give one class index per row, or floating-point probabilities of the input's shape"
            )
        if not t:
            check_index_dtype(target, function)
            raise IndexError(
                f"Dimension specified as 0 but tensor has no dimensions: target for input {x} needs shape {x[:1]}"
            )
    elif len(x) == 4:
        if len(t) != 3:
            raise RuntimeError(
                f"only batches of spatial targets supported (3D tensors) but got targets of dimension: {len(t)}; for "
                f"input {x} the target needs shape {[x[0], *x[2:]]}"
            )
        if t[1:] != x[2:]:
            raise RuntimeError(
                f"size mismatch (got input: {x} , target: {t}): the target needs shape {[x[0], *x[2:]]}"
                f"{_classes_last(x, t, function, class_dim)}"
            )
    elif not t or t[1:] != x[2:]:
        raise RuntimeError(f"Expected target size {[x[0], *x[2:]]}, got {t}{_classes_last(x, t, function, class_dim)}")
    elif x[1] == 0 and target.numel():
        raise RuntimeError(f"size mismatch (got input: {x} , target: {t}): input has no classes, but there are targets")


def _classes_last(x: list[int], t: list[int], function: str, class_dim: bool) -> str:
    """What to do where the shapes are those of classes in the last dimension: (N, T, V) and (N, T)."""
    if t != x[:-1]:
        return ""
    remedy = "class_dim=-1" if class_dim else "input.movedim(-1, 1)"
    return f". {function}(): where the classes are the last dimension of the input, give {remedy}"


def check_weight(weight: Tensor, classes: int, function: str, prefix: str = "", any_shape: bool = False) -> None:
    """``any_shape``: any tensor with an element for each class will do, as it does for torch's spatial losses."""
    if weight.dtype not in DTYPE_CODES:
        raise RuntimeError(
            f"{function}(): weight must be floating point, float32, float64, float16 or bfloat16, but found "
            f"{weight.dtype}; call weight.float()"
        )
    if weight.numel() != classes or (weight.dim() != 1 and not any_shape):
        raise RuntimeError(
            f"{prefix}weight tensor should be defined either for all {classes} classes or no classes but got weight "
            f"tensor of shape: {list(weight.shape)}"
        )


def check_logits_dtype(logits: Tensor, function: str, name: str = "input") -> None:
    if logits.dtype not in DTYPE_CODES:
        raise NotImplementedError(
            f'{function}(): "{function}" not implemented for {name} of dtype {logits.dtype}: expected float32, '
            "float64, float16 or bfloat16"
        )


def check_index_dtype(target: Tensor, function: str) -> None:
    if target.dtype not in INDEX_DTYPES:
        # torch's own types: a CUDA kernel that does not exist, a check on the CPU
        raise (NotImplementedError if target.is_cuda else RuntimeError)(
            f"{function}(): expected target dtype to be Long or Byte, but got {target.dtype} (any integer dtype will "
            "do); floating-point targets are class probabilities and need the shape of the input"
        )
