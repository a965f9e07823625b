"""The class names of :mod:`torch.nn`: ``import fastloss.nn as nn``. Some are fastloss's own."""

from .head.linear_cross_entropy import LinearCrossEntropyLoss
from .losses.binary_cross_entropy_with_logits import BCEWithLogitsLoss
from .losses.cosine_distance_loss import CosineDistanceLoss
from .losses.cross_entropy import CrossEntropyLoss
from .losses.dice_loss import DiceLoss
from .losses.focal_loss import FocalLoss
from .losses.huber_loss import HuberLoss
from .losses.js_divergence_with_logits import JSDivergenceWithLogitsLoss
from .losses.kl_divergence_with_logits import KLDivergenceWithLogitsLoss
from .losses.l1_loss import L1Loss
from .losses.log_cosh_loss import LogCoshLoss
from .losses.mse_loss import MSELoss
from .losses.multi_margin_loss import MultiMarginLoss
from .losses.nll_loss import NLLLoss
from .losses.relative_l1_loss import RelativeL1Loss
from .losses.rmse_loss import RMSELoss
from .losses.smooth_l1_loss import SmoothL1Loss

__all__ = [
    "BCEWithLogitsLoss",
    "CosineDistanceLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "HuberLoss",
    "JSDivergenceWithLogitsLoss",
    "KLDivergenceWithLogitsLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LogCoshLoss",
    "MSELoss",
    "MultiMarginLoss",
    "NLLLoss",
    "RMSELoss",
    "RelativeL1Loss",
    "SmoothL1Loss",
]
