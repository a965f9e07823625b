"""Fused, drop-in losses for PyTorch on CPU and CUDA. ``import fastloss`` and use the names of torch.nn.functional."""

from typing import TYPE_CHECKING, Any

from . import _library  # noqa: F401  first: it checks the versions of Python and torch
from . import plot as plot
from . import rows as rows
from ._version import __version__
from .compare import Comparison, compare
from .diagnosis import check
from .errors import check_errors, set_error_mode
from .explain import explain
from .head.lazy_head import lazy_head, restore_head
from .head.lazy_logits import LazyHeadWarning
from .head.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from .head.linear_kl_divergence import linear_kl_divergence
from .head.linear_token_log_probs import linear_token_log_probs
from .losses._torchs import CTCLoss as CTCLoss
from .losses._torchs import MultiLabelMarginLoss as MultiLabelMarginLoss
from .losses._torchs import TripletMarginWithDistanceLoss as TripletMarginWithDistanceLoss
from .losses._torchs import ctc_loss as ctc_loss
from .losses._torchs import multilabel_margin_loss as multilabel_margin_loss
from .losses._torchs import triplet_margin_with_distance_loss as triplet_margin_with_distance_loss
from .losses.arcface_loss import ArcFaceLoss, arcface_loss
from .losses.asymmetric_loss import AsymmetricLoss, asymmetric_loss
from .losses.binary_cross_entropy import BCELoss, binary_cross_entropy
from .losses.binary_cross_entropy_with_logits import BCEWithLogitsLoss, binary_cross_entropy_with_logits
from .losses.capsule_margin_loss import CapsuleMarginLoss, capsule_margin_loss
from .losses.charbonnier_loss import CharbonnierLoss, charbonnier_loss
from .losses.cosface_loss import CosFaceLoss, cosface_loss
from .losses.cosine_distance_loss import CosineDistanceLoss, cosine_distance_loss
from .losses.cosine_embedding_loss import CosineEmbeddingLoss, cosine_embedding_loss
from .losses.cross_entropy import CrossEntropyLoss, CrossEntropyStats, cross_entropy
from .losses.dice_ce_loss import DiceCELoss, dice_ce_loss
from .losses.dice_loss import DiceLoss, dice_loss
from .losses.focal_loss import FocalLoss, focal_loss
from .losses.focal_tversky_loss import FocalTverskyLoss, focal_tversky_loss
from .losses.gaussian_nll_loss import GaussianNLLLoss, gaussian_nll_loss
from .losses.generalized_cross_entropy import GeneralizedCrossEntropyLoss, generalized_cross_entropy
from .losses.hinge_embedding_loss import HingeEmbeddingLoss, hinge_embedding_loss
from .losses.huber_loss import HuberLoss, huber_loss
from .losses.js_divergence_with_logits import JSDivergenceWithLogitsLoss, js_divergence_with_logits
from .losses.kl_div import KLDivLoss, kl_div
from .losses.kl_divergence_with_logits import KLDivergenceWithLogitsLoss, kl_divergence_with_logits
from .losses.l1_loss import L1Loss, l1_loss
from .losses.log_cosh_loss import LogCoshLoss, log_cosh_loss
from .losses.mape_loss import MAPELoss, mape_loss
from .losses.margin_ranking_loss import MarginRankingLoss, margin_ranking_loss
from .losses.mse_loss import MSELoss, mse_loss
from .losses.multi_margin_loss import MultiMarginLoss, multi_margin_loss
from .losses.multilabel_soft_margin_loss import MultiLabelSoftMarginLoss, multilabel_soft_margin_loss
from .losses.nll_loss import NLLLoss, nll_loss
from .losses.poisson_nll_loss import PoissonNLLLoss, poisson_nll_loss
from .losses.poly1_loss import Poly1Loss, poly1_loss
from .losses.quantile_loss import QuantileLoss, quantile_loss
from .losses.relative_l1_loss import RelativeL1Loss, relative_l1_loss
from .losses.rmse_loss import RMSELoss, rmse_loss
from .losses.rmsle_loss import RMSLELoss, rmsle_loss
from .losses.sigmoid_focal_loss import SigmoidFocalLoss, sigmoid_focal_loss
from .losses.smape_loss import SMAPELoss, smape_loss
from .losses.smooth_l1_loss import SmoothL1Loss, smooth_l1_loss
from .losses.soft_margin_loss import SoftMarginLoss, soft_margin_loss
from .losses.token_scaled_cross_entropy import TokenScaledCrossEntropyLoss, token_scaled_cross_entropy
from .losses.triplet_margin_loss import TripletMarginLoss, triplet_margin_loss
from .losses.tversky_loss import TverskyLoss, tversky_loss
from .patching import PatchReport, patch, patch_report, unpatch
from .token_log_probs import token_log_probs

__all__ = [
    "ArcFaceLoss",
    "AsymmetricLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CapsuleMarginLoss",
    "CharbonnierLoss",
    "Comparison",
    "CosFaceLoss",
    "CosineDistanceLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "CrossEntropyStats",
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
    "LazyHeadWarning",
    "LinearCrossEntropyLoss",
    "LogCoshLoss",
    "MAPELoss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "PatchReport",
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
    "__version__",
    "arcface_loss",
    "asymmetric_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "capsule_margin_loss",
    "charbonnier_loss",
    "check",
    "check_errors",
    "compare",
    "cosface_loss",
    "cosine_distance_loss",
    "cosine_embedding_loss",
    "cross_entropy",
    "dice_ce_loss",
    "dice_loss",
    "explain",
    "focal_loss",
    "focal_tversky_loss",
    "gaussian_nll_loss",
    "generalized_cross_entropy",
    "hinge_embedding_loss",
    "huber_loss",
    "js_divergence_with_logits",
    "kl_div",
    "kl_divergence_with_logits",
    "l1_loss",
    "lazy_head",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_token_log_probs",
    "log_cosh_loss",
    "mape_loss",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "patch",
    "patch_report",
    "poisson_nll_loss",
    "poly1_loss",
    "quantile_loss",
    "relative_l1_loss",
    "restore_head",
    "rmse_loss",
    "rmsle_loss",
    "set_error_mode",
    "sigmoid_focal_loss",
    "smape_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "token_log_probs",
    "token_scaled_cross_entropy",
    "triplet_margin_loss",
    "tversky_loss",
    "unpatch",
]

if TYPE_CHECKING:
    from . import parallel as parallel
else:

    def __getattr__(name: str) -> Any:
        """``fastloss.parallel``, imported when it is asked for: torch.distributed brings torch.compile with it."""
        if name == "parallel":
            from importlib import import_module

            return import_module(".parallel", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
