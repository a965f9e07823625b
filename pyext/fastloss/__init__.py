"""Fused, drop-in losses for PyTorch on CPU and CUDA. ``import fastloss`` and use the names of torch.nn.functional."""

from ._version import __version__
from .errors import check_errors, set_error_mode
from .explain import explain
from .losses.cross_entropy import CrossEntropyLoss, CrossEntropyStats, cross_entropy
from .losses.nll_loss import NLLLoss, nll_loss
from .patching import patch, unpatch

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "NLLLoss",
    "__version__",
    "check_errors",
    "cross_entropy",
    "explain",
    "nll_loss",
    "patch",
    "set_error_mode",
    "unpatch",
]
