"""Arguments of every loss, from what a user passed to what the operators take: reductions, dtypes, kinds, devices.

Exceptions are torch's, with a remedy. What a family of losses checks beside that stands with the family.
"""

import numbers
import operator
import sys
import warnings
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ._library import MEAN, REDUCTIONS, cuda_built

HALVES = (torch.float16, torch.bfloat16)
_ORDINARY = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor, FunctionalTensor)


def warn(message: str) -> None:
    """Of a loss's arguments, as the loss's caller sees it: the first frame outside this package, and outside of what
    autograd and tensor subclasses put between."""
    if torch.compiler.is_compiling():  # it cannot trace warnings
        return
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_between(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


_OF_TORCH = ("torch.autograd.function", "torch._dynamo.eval_frame", "torch.overrides")


def _is_between(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    if module.partition(".")[0] == "fastloss" or frame.f_code.co_name == "__torch_function__":
        return True
    handed_over = frame.f_back is not None and frame.f_back.f_code.co_name == "__torch_function__"
    return module in _OF_TORCH or (module == "torch.nn.functional" and handed_over)


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that torch's deprecated arguments stand for; they win over ``reduction``, even a wrong one."""
    size_average, reduce = size_average is None or bool(size_average), reduce is None or bool(reduce)
    reduction = "none" if not reduce else "mean" if size_average else "sum"
    warn(f"size_average and reduce args will be deprecated, please use reduction='{reduction}' instead.")
    return reduction


def is_integral(t: object) -> bool:
    """A tensor of integers or booleans."""
    return isinstance(t, Tensor) and not (t.is_floating_point() or t.is_complex())


def reduction_code(reduction: str) -> int:
    """0, 1, 2 for none, mean, sum. ValueError for anything else."""
    code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is not None:
        return code
    if reduction == "elementwise_mean":
        warn("reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.")
        return MEAN
    raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What torch's losses compute with: float32 instead of float16 and bfloat16 where autocast is on for the device."""
    if dtype not in HALVES:
        return dtype
    kind = device.type
    return torch.float32 if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else dtype


def as_int(function: str, name: str, value: Any) -> int:
    """An int argument, as anything that can be an index (numpy's integers too)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{function}(): argument '{name}' must be int, not {type(value).__name__}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{function}(): argument '{name}' is {value}, more than 64 bits hold; give a smaller number")
    return value


def as_float(function: str, name: str, value: Any) -> float:
    """A float argument, as any real number (numpy's too) or a tensor without dimensions."""
    if type(value) is float:
        return value
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0:
        if value.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{function}(): argument '{name}' must be float, not a Tensor that requires grad: it would get none "
                "here. Apply it to the tensors yourself, or pass it detached"
            )
        return float(value)
    raise TypeError(f"{function}(): argument '{name}' must be float, not {type(value).__name__}")


def as_non_negative(function: str, name: str, value: Any) -> float:
    """A float argument that must not be negative, nor nan, nor infinite."""
    value = as_float(function, name, value)
    if not value >= 0:
        raise ValueError(f"{function}(): {name} must not be negative, got {value}")
    if value == float("inf"):
        raise ValueError(f"{function}(): {name} must be finite, got {value}")
    return value


def as_positive(function: str, name: str, value: Any) -> float:
    """A float argument that must be positive and finite."""
    value = as_float(function, name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{function}(): {name} must be positive and finite, got {value}")
    return value


def require_tensor(name: str, value: Any, function: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def is_dtensor(*values: Any) -> bool:
    """Whether one of them is a DTensor, of a module that nobody has imported as a rule."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(v, module.DTensor) for v in values)


_NESTED = (
    "give the values of jagged ones, input.values() and target.values(), which hold the elements of all samples "
    "without padding (a mean is then over these), or torch.nested.to_padded_tensor with a mask"
)
_STRIDED_NESTED = (
    "these have the strided layout; elementwise losses and cross entropies take the jagged one: "
    "torch.nested.as_nested_tensor(list(x.unbind()), layout=torch.jagged). Or torch.nested.to_padded_tensor with a mask"
)


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why fastloss cannot take these tensors, or None. The first one is the loss's input."""
    first: Tensor | None = None
    for t in tensors:
        if t is None:
            continue
        if first is None:
            first = t
            kind = "cpu" if t.is_cpu else t.device.type  # the first is faster
            if kind not in ("cpu", "cuda", "meta"):
                return f"device {t.device}: fastloss has kernels for cpu and cuda"
            if kind == "cuda" and not cuda_built() and not isinstance(t, FakeTensor):
                return "CUDA tensors: this build of fastloss has no CUDA kernels (see python -m fastloss info)"
        if t.is_nested:
            return f"nested tensors: {_NESTED if t.layout is torch.jagged else _STRIDED_NESTED}"
        if t.layout is not torch.strided:
            return f"layout {t.layout}: fastloss takes dense tensors; call .to_dense()"
        if type(t) not in _ORDINARY and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            remedy = "give this rank's part, .to_local()" if is_dtensor(t) else "convert it first"
            return f"tensor subclass {type(t).__name__}: fastloss takes plain tensors; {remedy}"
    return None


def require_supported_tensors(function: str, *tensors: Tensor | None) -> None:
    reason = unsupported(*tensors)
    if reason is not None:
        raise NotImplementedError(f"{function}(): not for {reason}. fastloss.patch() leaves such calls to torch.")


def refuse_strided_nested(function: str, *tensors: Tensor) -> None:
    """Before anybody asks for their shape, which they have not."""
    if any(t.is_nested and t.layout is torch.strided for t in tensors):
        require_supported_tensors(function, *tensors)


def require_same_device(function: str, first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    name, tensor = first
    for other_name, other in others:
        if other is not None and other.device != tensor.device:
            raise RuntimeError(
                f"{function}(): Expected all tensors to be on the same device, but {name} is on {tensor.device} and "
                f"{other_name} is on {other.device}; move one with .to()"
            )


def is_dense(t: Tensor) -> bool:
    """Whether the elements of ``t`` fill a block of memory once each."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True
