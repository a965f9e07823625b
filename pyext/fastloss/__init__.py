"""Fused, drop-in losses for PyTorch on CPU and CUDA. ``import fastloss`` and use the names of torch.nn.functional."""

from . import _library  # noqa: F401  first: it checks the versions of Python and torch
from . import parallel as parallel
from . import plot as plot
from . import rows as rows
from ._version import __version__
from .diagnosis import check
from .errors import check_errors, set_error_mode
from .explain import explain
from .head.lazy_head import lazy_head, restore_head
from .head.lazy_logits import LazyHeadWarning
from .head.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from .head.linear_kl_divergence import linear_kl_divergence
from .head.linear_token_log_probs import linear_token_log_probs
from .losses.binary_cross_entropy_with_logits import BCEWithLogitsLoss, binary_cross_entropy_with_logits
from .losses.cosine_distance_loss import CosineDistanceLoss, cosine_distance_loss
from .losses.cross_entropy import CrossEntropyLoss, CrossEntropyStats, cross_entropy
from .losses.dice_loss import DiceLoss, dice_loss
from .losses.focal_loss import FocalLoss, focal_loss
from .losses.huber_loss import HuberLoss, huber_loss
from .losses.l1_loss import L1Loss, l1_loss
from .losses.log_cosh_loss import LogCoshLoss, log_cosh_loss
from .losses.mse_loss import MSELoss, mse_loss
from .losses.multi_margin_loss import MultiMarginLoss, multi_margin_loss
from .losses.nll_loss import NLLLoss, nll_loss
from .losses.relative_l1_loss import RelativeL1Loss, relative_l1_loss
from .losses.rmse_loss import RMSELoss, rmse_loss
from .losses.smooth_l1_loss import SmoothL1Loss, smooth_l1_loss
from .patching import PatchReport, patch, patch_report, unpatch
from .token_log_probs import token_log_probs

__all__ = [
    "BCEWithLogitsLoss",
    "CosineDistanceLoss",
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "DiceLoss",
    "FocalLoss",
    "HuberLoss",
    "L1Loss",
    "LazyHeadWarning",
    "LinearCrossEntropyLoss",
    "LogCoshLoss",
    "MSELoss",
    "MultiMarginLoss",
    "NLLLoss",
    "PatchReport",
    "RMSELoss",
    "RelativeL1Loss",
    "SmoothL1Loss",
    "__version__",
    "binary_cross_entropy_with_logits",
    "check",
    "check_errors",
    "cosine_distance_loss",
    "cross_entropy",
    "dice_loss",
    "explain",
    "focal_loss",
    "huber_loss",
    "l1_loss",
    "lazy_head",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_token_log_probs",
    "log_cosh_loss",
    "mse_loss",
    "multi_margin_loss",
    "nll_loss",
    "patch",
    "patch_report",
    "relative_l1_loss",
    "restore_head",
    "rmse_loss",
    "set_error_mode",
    "smooth_l1_loss",
    "token_log_probs",
    "unpatch",
]
