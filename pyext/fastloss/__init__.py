"""Fused, drop-in losses for PyTorch on CPU and CUDA. ``import fastloss`` and use the names of torch.nn.functional."""

from . import _library  # noqa: F401  first: it checks the versions of Python and torch
from . import plot as plot
from ._version import __version__
from .diagnosis import check
from .errors import check_errors, set_error_mode
from .explain import explain
from .losses.cross_entropy import CrossEntropyLoss, CrossEntropyStats, cross_entropy
from .losses.dice_loss import DiceLoss, dice_loss
from .losses.huber_loss import HuberLoss, huber_loss
from .losses.l1_loss import L1Loss, l1_loss
from .losses.log_cosh_loss import LogCoshLoss, log_cosh_loss
from .losses.mse_loss import MSELoss, mse_loss
from .losses.nll_loss import NLLLoss, nll_loss
from .losses.relative_l1_loss import RelativeL1Loss, relative_l1_loss
from .losses.rmse_loss import RMSELoss, rmse_loss
from .losses.smooth_l1_loss import SmoothL1Loss, smooth_l1_loss
from .patching import patch, unpatch

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "DiceLoss",
    "HuberLoss",
    "L1Loss",
    "LogCoshLoss",
    "MSELoss",
    "NLLLoss",
    "RMSELoss",
    "RelativeL1Loss",
    "SmoothL1Loss",
    "__version__",
    "check",
    "check_errors",
    "cross_entropy",
    "dice_loss",
    "explain",
    "huber_loss",
    "l1_loss",
    "log_cosh_loss",
    "mse_loss",
    "nll_loss",
    "patch",
    "relative_l1_loss",
    "rmse_loss",
    "set_error_mode",
    "smooth_l1_loss",
    "unpatch",
]
