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


def loop_vmap(op: Callable[..., Any], outputs: int) -> Callable[..., Any]:
    """A batching rule that calls ``op`` once per sample and stacks: torch.func.vmap over one of our operators."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        def results(sample: Callable[..., torch.Tensor]) -> Any:
            # Of a list, torch gives a list of dimensions: only tensors have one.
            result = op(*(sample(a, d) if type(d) is int else a for a, d in zip(args, in_dims, strict=True)))
            return (result,) if outputs == 1 else result

        if info.batch_size:
            samples = [results(lambda a, d, i=i: a.select(d, i)) for i in range(info.batch_size)]
            columns = [torch.stack(column) for column in zip(*samples, strict=True)]
        else:  # one sample of zeros tells the shapes and dtypes
            zeros = results(lambda a, d: a.new_zeros(a.movedim(d, 0).shape[1:]))
            columns = [r.new_empty((0, *r.shape)) for r in zeros]
        return (columns[0], 0) if outputs == 1 else (tuple(columns), (0,) * outputs)

    return rule


_recorded = torch.library.Library("fastloss", "FRAGMENT")


def define_recorded(name: str, op: Any, function: Any) -> None:
    """Defines ``fastloss::<name>``: ``op`` with the rules of ``function``, a torch.autograd.Function that takes its
    arguments one by one. Programs that torch.export and torch.jit.trace record keep operators and forget the Function
    around them, and would lose the gradient. Elsewhere the Function itself is faster."""
    schema = str(op.default._schema).partition("(")
    _recorded.define(f"{name}({schema[2]}")
    _recorded.impl(name, lambda *args: op(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastloss::{name}", lambda *args: op(*args), lib=_recorded)
    torch.library.register_autograd(
        f"fastloss::{name}", function.backward, setup_context=function.setup_context, lib=_recorded
    )


__all__ = ["cuda_built", "define_recorded", "loop_vmap", "ops", "set_isa"]
