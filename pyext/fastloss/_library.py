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
        samples = []
        for i in range(info.batch_size):
            sample = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
            samples.append(op(*sample))
        if outputs == 1:
            return torch.stack(samples), 0
        return tuple(torch.stack(column) for column in zip(*samples, strict=True)), (0,) * outputs

    return rule


__all__ = ["cuda_built", "loop_vmap", "ops", "set_isa"]
