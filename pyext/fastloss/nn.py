"""The class names of :mod:`torch.nn`: ``import fastloss.nn as nn``. Some are fastloss's own."""

from .head.linear_cross_entropy import LinearCrossEntropyLoss
from .losses.arcface_loss import ArcFaceLoss
from .losses.binary_cross_entropy_with_logits import BCEWithLogitsLoss
from .losses.cosface_loss import CosFaceLoss
from .losses.cosine_distance_loss import CosineDistanceLoss
from .losses.cross_entropy import CrossEntropyLoss
from .losses.dice_loss import DiceLoss
from .losses.focal_loss import FocalLoss
from .losses.generalized_cross_entropy import GeneralizedCrossEntropyLoss
from .losses.huber_loss import HuberLoss
from .losses.l1_loss import L1Loss
from .losses.log_cosh_loss import LogCoshLoss
from .losses.mse_loss import MSELoss
from .losses.multi_margin_loss import MultiMarginLoss
from .losses.nll_loss import NLLLoss
from .losses.poly1_loss import Poly1Loss
from .losses.relative_l1_loss import RelativeL1Loss
from .losses.rmse_loss import RMSELoss
from .losses.smooth_l1_loss import SmoothL1Loss
from .losses.token_scaled_cross_entropy import TokenScaledCrossEntropyLoss

__all__ = [
    "ArcFaceLoss",
    "BCEWithLogitsLoss",
    "CosFaceLoss",
    "CosineDistanceLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "HuberLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LogCoshLoss",
    "MSELoss",
    "MultiMarginLoss",
    "NLLLoss",
    "Poly1Loss",
    "RMSELoss",
    "RelativeL1Loss",
    "SmoothL1Loss",
    "TokenScaledCrossEntropyLoss",
]
