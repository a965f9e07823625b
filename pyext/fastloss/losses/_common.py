"""What the Python faces of the losses share: reductions, dtypes, checks of what an argument is."""

import contextlib
import numbers
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import Function, forward_ad

from .._library import cuda_built

NONE, MEAN, SUM = 0, 1, 2  # codes of the C++ enum Reduction
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
# Codes of the C++ enum DType.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
HALVES = (torch.float16, torch.bfloat16)
_ORDINARY = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor, FunctionalTensor)


def _warn(message: str) -> None:
    """Of a loss's arguments, as the loss's caller sees it."""
    if not torch.compiler.is_compiling():  # it cannot trace warnings
        warnings.warn(message, stacklevel=4)


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that torch's deprecated arguments stand for; they win over ``reduction``, even a wrong one."""
    size_average, reduce = size_average is None or bool(size_average), reduce is None or bool(reduce)
    reduction = "none" if not reduce else "mean" if size_average else "sum"
    _warn(f"size_average and reduce args will be deprecated, please use reduction='{reduction}' instead.")
    return reduction


def reduction_code(reduction: str) -> int:
    """0, 1, 2 for none, mean, sum. ValueError for anything else."""
    code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is not None:
        return code
    if reduction == "elementwise_mean":
        _warn("reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.")
        return MEAN
    raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and exponentials are taken in float64 for float64, else in float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


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


def require_tensor(name: str, value: Any, function: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")


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
        if t.layout is not torch.strided:
            return f"layout {t.layout}: fastloss takes dense tensors; call .to_dense()"
        if type(t) not in _ORDINARY and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"tensor subclass {type(t).__name__}: fastloss takes plain tensors; convert it first"
    return None


def require_supported_tensors(function: str, *tensors: Tensor | None) -> None:
    reason = unsupported(*tensors)
    if reason is not None:
        raise NotImplementedError(f"{function}(): not for {reason}. fastloss.patch() leaves such calls to torch.")


def require_same_device(function: str, first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    name, tensor = first
    for other_name, other in others:
        if other is not None and other.device != tensor.device:
            raise RuntimeError(
                f"{function}(): Expected all tensors to be on the same device, but {name} is on {tensor.device} and "
                f"{other_name} is on {other.device}; move one with .to()"
            )


def forward_mode_active() -> bool:
    return bool(forward_ad._current_level >= 0)


functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def saved_tensor_hooks_active() -> bool:
    """Whether saved tensors are packed by somebody: checkpointing, offloading. Then nothing may be held beside them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


_opaque: list[Callable[..., Any]] = []


def opaque_apply(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for use after :func:`transforms_active`: torch.compile takes the call into its graph as it is,
    to be differentiated by the transforms there, instead of looking into rules of ours that it does not understand."""

    def apply(*args: Any) -> Any:
        return function.apply(*args)

    _opaque.append(apply)
    return apply


def _allow_in_graph() -> bool:
    for apply in _opaque:
        torch.compiler.allow_in_graph(apply)
    return True


# What torch.compiler.assume_constant_result sets: torch.compile runs the function instead of looking into it. That and
# allow_in_graph import torch._dynamo, for which an import of fastloss need not wait.
_allow_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def recording() -> bool:
    """Whether torch.export or torch.jit.trace records the operators that are called: see define_recorded."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()


def transforms_active() -> bool:
    """Whether the loss is called within a transform of torch.func."""
    if not functorch_active():
        return False
    if torch.compiler.is_compiling():
        _allow_in_graph()
    return True


def _primal(t: Tensor) -> Tensor:
    """In a jvp of torch.func: t without this jvp's tangent, but with those of the forward modes around it."""
    interpreter = retrieve_current_functorch_interpreter() if functorch_active() else None
    if interpreter is None or interpreter.key() != torch._C._functorch.TransformType.Vmap:
        return forward_ad.unpack_dual(t, level=0).primal
    value, dim = torch._C._functorch._unwrap_batched(t, interpreter.level())  # unpack_dual has no rule for vmap
    with interpreter.lower():
        value = _primal(value)
    return value if dim is None else torch._C._functorch._add_batch_dim(value, dim, interpreter.level())


@contextlib.contextmanager
def saved_for_jvp(ctx: Any) -> Iterator[tuple[Any, ...]]:
    """What a jvp has saved, and the state in which to compute with it: torch turns forward mode off in the jvp of a
    function, which would leave the tangents of an outer forward mode out without a word."""
    if not functorch_active():  # torch has no nested levels then
        yield ctx.saved_for_forward
        return
    # Where the jvp runs under vmap, functorch hands over as `saved_tensors` what was saved.
    saved = ctx.saved_tensors if hasattr(ctx, "_pt_new_saved_tensors") else ctx.saved_for_forward
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(None if t is None else _primal(t) for t in saved)


def no_tangent(ctx: Any, index: int) -> Tensor | None:
    """In jvp, for an output that is not differentiable, the ``index``-th that was saved. Under vmap, functorch forgets
    that it is not where it is batched, and wants a tangent; elsewhere it refuses one."""
    depth, inner = 0, ctx
    while "_pt_new_saved_tensors" in vars(inner):  # one for each vmap between the jvp and its function
        depth, inner = depth + 1, inner._pt_inner_ctx
    output = ctx.saved_tensors[index] if depth else None
    if output is None or torch._C._functorch.maybe_get_level(output) <= torch._C._functorch.current_level() - depth:
        return None
    return torch.zeros_like(output)


def is_batched(t: Tensor) -> bool:
    """Whether ``t`` stands for a batch (vmap, is_grads_batched), which operators that mutate cannot take."""
    return bool(torch._C._functorch.is_batchedtensor(t)) or batched_by_legacy(t)


# In a backward pass: whether this graph may be run again (retain_graph, create_graph).
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for calls that name every argument and have looked at :func:`functorch_active` themselves:
    without the wrapper in Python that binds defaults and looks too, which costs 3 us."""
    return super(Function, function).apply  # type: ignore[misc]


def batched_by_legacy(*tensors: Tensor | None) -> bool:
    """By the vmap of torch.autograd.functional: it hides whether a tensor requires grad, has no detach, and loses,
    without a word, the derivatives of custom functions."""
    return any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def differentiated_again(*tensors: Tensor | None) -> bool:
    """In a backward pass: whether its result must itself be differentiable (create_graph, nested torch.func)."""
    if functorch_active():  # an outer transform, forward mode maybe, which requires_grad does not tell
        return True
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors) or batched_by_legacy(*tensors)


def attach(value: Tensor, formula: Tensor) -> Tensor:
    """``value``, made by a kernel, with the derivative of ``formula``, the same thing composed of torch operations."""
    if batched_by_legacy(formula):
        return formula.to(value.dtype)
    return value + torch.nan_to_num(formula - formula.detach(), nan=0.0, posinf=0.0, neginf=0.0).to(value.dtype)


def is_dense(t: Tensor) -> bool:
    """Whether the elements of ``t`` fill a block of memory once each."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True
