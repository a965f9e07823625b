"""All names of :mod:`torch.nn`: ``import fastloss.nn as nn`` is all that a script changes.

``__all__`` lists fastloss's own, and ``nn.functional`` is :mod:`fastloss.functional`. Every other name is torch's own
object.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # mypy heeds the first definition of a name, every other reader the last
    from . import *  # noqa: F403
    from . import functional as functional

import torch.nn
from torch.nn import *  # type: ignore[assignment,no-redef]  # noqa: F403

from . import functional as functional
from .head.linear_cross_entropy import LinearCrossEntropyLoss
from .losses.arcface_loss import ArcFaceLoss
from .losses.asymmetric_loss import AsymmetricLoss
from .losses.binary_cross_entropy import BCELoss
from .losses.binary_cross_entropy_with_logits import BCEWithLogitsLoss
from .losses.capsule_margin_loss import CapsuleMarginLoss
from .losses.charbonnier_loss import CharbonnierLoss
from .losses.cosface_loss import CosFaceLoss
from .losses.cosine_distance_loss import CosineDistanceLoss
from .losses.cosine_embedding_loss import CosineEmbeddingLoss
from .losses.cross_entropy import CrossEntropyLoss
from .losses.dice_ce_loss import DiceCELoss
from .losses.dice_loss import DiceLoss
from .losses.focal_loss import FocalLoss
from .losses.focal_tversky_loss import FocalTverskyLoss
from .losses.gaussian_nll_loss import GaussianNLLLoss
from .losses.generalized_cross_entropy import GeneralizedCrossEntropyLoss
from .losses.hinge_embedding_loss import HingeEmbeddingLoss
from .losses.huber_loss import HuberLoss
from .losses.js_divergence_with_logits import JSDivergenceWithLogitsLoss
from .losses.kl_div import KLDivLoss
from .losses.kl_divergence_with_logits import KLDivergenceWithLogitsLoss
from .losses.l1_loss import L1Loss
from .losses.log_cosh_loss import LogCoshLoss
from .losses.mape_loss import MAPELoss
from .losses.margin_ranking_loss import MarginRankingLoss
from .losses.mse_loss import MSELoss
from .losses.multi_margin_loss import MultiMarginLoss
from .losses.multilabel_soft_margin_loss import MultiLabelSoftMarginLoss
from .losses.nll_loss import NLLLoss
from .losses.poisson_nll_loss import PoissonNLLLoss
from .losses.poly1_loss import Poly1Loss
from .losses.quantile_loss import QuantileLoss
from .losses.relative_l1_loss import RelativeL1Loss
from .losses.rmse_loss import RMSELoss
from .losses.rmsle_loss import RMSLELoss
from .losses.sigmoid_focal_loss import SigmoidFocalLoss
from .losses.smape_loss import SMAPELoss
from .losses.smooth_l1_loss import SmoothL1Loss
from .losses.soft_margin_loss import SoftMarginLoss
from .losses.token_scaled_cross_entropy import TokenScaledCrossEntropyLoss
from .losses.triplet_margin_loss import TripletMarginLoss
from .losses.tversky_loss import TverskyLoss

__all__ = [
    "ArcFaceLoss",
    "AsymmetricLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CapsuleMarginLoss",
    "CharbonnierLoss",
    "CosFaceLoss",
    "CosineDistanceLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GaussianNLLLoss",
    "GeneralizedCrossEntropyLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "JSDivergenceWithLogitsLoss",
    "KLDivLoss",
    "KLDivergenceWithLogitsLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LogCoshLoss",
    "MAPELoss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "PoissonNLLLoss",
    "Poly1Loss",
    "QuantileLoss",
    "RMSELoss",
    "RMSLELoss",
    "RelativeL1Loss",
    "SMAPELoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "TokenScaledCrossEntropyLoss",
    "TripletMarginLoss",
    "TverskyLoss",
]

sys.modules[f"{__name__}.functional"] = functional  # for `import fastloss.nn.functional as F`

if not TYPE_CHECKING:  # type checkers are to know a wrong name

    def __getattr__(name: str) -> Any:
        """What the star leaves out: names with an underscore, and what torch adds to its module later."""
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(torch.nn, name)
