"""The class names of :mod:`torch.nn`: ``import fastloss.nn as nn``. Some are fastloss's own."""

from .head.linear_cross_entropy import LinearCrossEntropyLoss
from .losses.binary_cross_entropy import BCELoss
from .losses.binary_cross_entropy_with_logits import BCEWithLogitsLoss
from .losses.cosine_distance_loss import CosineDistanceLoss
from .losses.cross_entropy import CrossEntropyLoss
from .losses.dice_loss import DiceLoss
from .losses.focal_loss import FocalLoss
from .losses.gaussian_nll_loss import GaussianNLLLoss
from .losses.hinge_embedding_loss import HingeEmbeddingLoss
from .losses.huber_loss import HuberLoss
from .losses.kl_div import KLDivLoss
from .losses.l1_loss import L1Loss
from .losses.log_cosh_loss import LogCoshLoss
from .losses.margin_ranking_loss import MarginRankingLoss
from .losses.mse_loss import MSELoss
from .losses.multi_margin_loss import MultiMarginLoss
from .losses.nll_loss import NLLLoss
from .losses.poisson_nll_loss import PoissonNLLLoss
from .losses.relative_l1_loss import RelativeL1Loss
from .losses.rmse_loss import RMSELoss
from .losses.smooth_l1_loss import SmoothL1Loss
from .losses.soft_margin_loss import SoftMarginLoss

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineDistanceLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LogCoshLoss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "PoissonNLLLoss",
    "RMSELoss",
    "RelativeL1Loss",
    "SmoothL1Loss",
    "SoftMarginLoss",
]
