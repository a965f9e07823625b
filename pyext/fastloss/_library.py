"""Loads the compiled operators. Everything that touches ``torch.ops.fastloss`` imports ``ops`` from here."""

import torch

from ._version import require_supported

require_supported(torch.__version__)

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"fastloss: its compiled part (fastloss._C) could not be loaded: {error}. In a source tree build it with "
        "`make build`, or `pip install --no-build-isolation .`; from a wheel, reinstall it."
    ) from error

ops = torch.ops.fastloss


def cuda_built() -> bool:
    """Whether this build of fastloss contains its CUDA kernels."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("fastloss::scale_grad", "CUDA"))


def loop_vmap(op, outputs: int):
    """A batching rule that calls ``op`` once per sample and stacks: torch.func.vmap over one of our operators."""

    def rule(info, in_dims, *args):
        samples = []
        for i in range(info.batch_size):
            sample = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
            samples.append(op(*sample))
        if outputs == 1:
            return torch.stack(samples), 0
        return tuple(torch.stack(column) for column in zip(*samples, strict=True)), (0,) * outputs

    return rule


__all__ = ["_C", "cuda_built", "loop_vmap", "ops"]
