"""Loads the compiled operators. Everything that touches ``torch.ops.fastloss`` imports ``ops`` from here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ._version import require_supported

require_supported(torch.__version__)

_PATH = Path(__file__).with_name("_C.abi3.so")

try:
    torch.ops.load_library(str(_PATH))
except OSError as error:
    raise ImportError(
        f"fastloss: its compiled part {_PATH.name} could not be loaded: {error}. In a source tree build it with "
        "`make build`, or `pip install --no-build-isolation .`; from a wheel, reinstall it."
    ) from error

ops = torch.ops.fastloss


def direct(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator without the Python around it, for small calls; not where torch.compile looks."""
    return getattr(operator, "_op", operator)


NONE, MEAN, SUM = 0, 1, 2  # codes of the C++ enum Reduction
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
# Codes of the C++ enum DType.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def set_isa(name: str) -> None:
    """Use the CPU kernels for ``'portable'``, ``'avx2'`` or ``'avx512'``. ValueError if that is not to be had here."""
    if not ops.set_isa(name):
        raise ValueError(f"instruction set {name!r} is unknown, not in this build or not on this machine")


_CUDA_BUILT = bool(torch._C._dispatch_has_kernel_for_dispatch_key("fastloss::scale_grad", "CUDA"))


def cuda_built() -> bool:
    """Whether this build of fastloss contains its CUDA kernels."""
    return _CUDA_BUILT


@torch.library.register_fake("fastloss::scale_grad")
def _(grad: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grad)


@torch.library.register_fake("fastloss::scale_grad_")
def _(grad: torch.Tensor, scale: torch.Tensor) -> None:
    return None


def loop_vmap(op: Callable[..., Any]) -> Callable[..., Any]:
    """A batching rule that calls ``op`` once per sample and stacks: torch.func.vmap over one of our operators."""
    from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        def results(sample: Callable[..., torch.Tensor]) -> Any:
            dims = zip(args, in_dims, strict=True)
            return op(*(sample(a, d) if isinstance(a, torch.Tensor) and d is not None else a for a, d in dims))

        if info.batch_size:
            samples = [results(lambda a, d, i=i: a.select(d, i)) for i in range(info.batch_size)]
            columns = zip(*(tree_leaves(sample) for sample in samples), strict=True)
            stacked = [torch.stack(column) for column in columns]
        else:  # one sample of zeros tells the shapes and dtypes
            samples = [results(lambda a, d: a.new_zeros(a.movedim(d, 0).shape[1:]))]
            stacked = [r.new_empty((0, *r.shape)) for r in tree_leaves(samples[0])]
        structure = tree_structure(samples[0])
        return tree_unflatten(stacked, structure), tree_unflatten([0] * len(stacked), structure)

    return rule


_recorded = torch.library.Library("fastloss", "FRAGMENT")


def define_recorded(name: str, tensors: int, options: Any, outputs: int, function: Any) -> None:
    """Defines ``fastloss::<name>`` with the rules of ``function``, an autograd.Function that takes so many tensors,
    then ``options`` one by one. Programs that torch.export and torch.jit.trace record keep operators and forget the
    Function around them, and would lose the gradient. Elsewhere the Function itself is faster."""
    arguments = [f"Tensor? t{i}" for i in range(tensors)]
    arguments += [f"{kind.__name__} {option}" for option, kind in options.__annotations__.items()]
    _recorded.define(f"{name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * outputs)})")
    _recorded.impl(name, lambda *args: function.forward(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastloss::{name}", lambda *args: function.forward(*args), lib=_recorded)
    torch.library.register_autograd(
        f"fastloss::{name}", function.backward, setup_context=function.setup_context, lib=_recorded
    )


__all__ = [
    "DTYPES",
    "DTYPE_CODES",
    "MEAN",
    "NONE",
    "REDUCTIONS",
    "SUM",
    "cuda_built",
    "define_recorded",
    "direct",
    "loop_vmap",
    "ops",
    "set_isa",
]
