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


__all__ = [
    "DTYPES",
    "DTYPE_CODES",
    "MEAN",
    "NONE",
    "REDUCTIONS",
    "SUM",
    "cuda_built",
    "direct",
    "loop_vmap",
    "ops",
    "set_isa",
]
