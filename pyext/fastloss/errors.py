"""Errors that a CUDA kernel finds: a target out of range is noticed on the device, where nothing can be raised."""

import torch

from ._library import cuda_built, ops

_immediate = False


def set_error_mode(mode: str) -> None:
    """Choose when a bad CUDA target raises.

    A class index out of range never reads or writes out of bounds: its row gets loss nan and gradient zero. A value
    outside the domain of its operand (a probability of 2, a negative variance) gives loss nan. The kernel leaves what
    it found in host memory, and the error that the CPU would raise is raised

    - ``"deferred"`` (default): by the next fastloss call on CUDA tensors, or by :func:`check_errors`; no call waits for
      the GPU;
    - ``"immediate"``: by the call itself, which waits for the GPU each time: for debugging.

    The environment variable ``FASTLOSS_ERROR_MODE`` sets the initial mode. On the CPU the call itself always raises.

    Raises:
        ValueError: for any other mode.
    """
    global _immediate
    if mode not in ("deferred", "immediate"):
        raise ValueError(f"mode must be 'deferred' or 'immediate', not {mode!r}")
    _immediate = mode == "immediate"


def immediate_errors() -> bool:
    return _immediate


def check_errors() -> None:
    """Wait for the GPU and raise what its kernels found since the last check.

    Raises:
        IndexError: naming row and value of the first target out of range. It is forgotten afterwards.
        RuntimeError, ValueError: the same of a value outside the domain of an operand.
    """
    if cuda_built() and torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        ops.check_errors()


def _mode_from_environment() -> None:
    import os

    mode = os.environ.get("FASTLOSS_ERROR_MODE")
    if mode:
        set_error_mode(mode)


_mode_from_environment()
