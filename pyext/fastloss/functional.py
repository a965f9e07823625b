"""All names of :mod:`torch.nn.functional`: ``import fastloss.functional as F`` is all that a script changes.

``__all__`` lists fastloss's own: losses of torch, which :func:`fastloss.patch` takes from here, and losses beyond
torch's. Every other name is torch's own object.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # mypy heeds the first definition of a name, every other reader the last
    from . import *  # noqa: F403

# `import fastloss` comes here before it can patch anything, so these are torch's, whatever is in force later.
import torch.nn.functional
from torch.nn.functional import *  # type: ignore[assignment]  # noqa: F403

from .head.linear_cross_entropy import linear_cross_entropy
from .losses.arcface_loss import arcface_loss
from .losses.asymmetric_loss import asymmetric_loss
from .losses.binary_cross_entropy import binary_cross_entropy
from .losses.binary_cross_entropy_with_logits import binary_cross_entropy_with_logits
from .losses.capsule_margin_loss import capsule_margin_loss
from .losses.charbonnier_loss import charbonnier_loss
from .losses.cosface_loss import cosface_loss
from .losses.cosine_distance_loss import cosine_distance_loss
from .losses.cosine_embedding_loss import cosine_embedding_loss
from .losses.cross_entropy import cross_entropy
from .losses.dice_ce_loss import dice_ce_loss
from .losses.dice_loss import dice_loss
from .losses.focal_loss import focal_loss
from .losses.focal_tversky_loss import focal_tversky_loss
from .losses.gaussian_nll_loss import gaussian_nll_loss
from .losses.generalized_cross_entropy import generalized_cross_entropy
from .losses.hinge_embedding_loss import hinge_embedding_loss
from .losses.huber_loss import huber_loss
from .losses.js_divergence_with_logits import js_divergence_with_logits
from .losses.kl_div import kl_div
from .losses.kl_divergence_with_logits import kl_divergence_with_logits
from .losses.l1_loss import l1_loss
from .losses.log_cosh_loss import log_cosh_loss
from .losses.mape_loss import mape_loss
from .losses.margin_ranking_loss import margin_ranking_loss
from .losses.mse_loss import mse_loss
from .losses.multi_margin_loss import multi_margin_loss
from .losses.multilabel_soft_margin_loss import multilabel_soft_margin_loss
from .losses.nll_loss import nll_loss
from .losses.poisson_nll_loss import poisson_nll_loss
from .losses.poly1_loss import poly1_loss
from .losses.quantile_loss import quantile_loss
from .losses.relative_l1_loss import relative_l1_loss
from .losses.rmse_loss import rmse_loss
from .losses.rmsle_loss import rmsle_loss
from .losses.sigmoid_focal_loss import sigmoid_focal_loss
from .losses.smape_loss import smape_loss
from .losses.smooth_l1_loss import smooth_l1_loss
from .losses.soft_margin_loss import soft_margin_loss
from .losses.token_scaled_cross_entropy import token_scaled_cross_entropy
from .losses.triplet_margin_loss import triplet_margin_loss
from .losses.tversky_loss import tversky_loss

__all__ = [
    "arcface_loss",
    "asymmetric_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "capsule_margin_loss",
    "charbonnier_loss",
    "cosface_loss",
    "cosine_distance_loss",
    "cosine_embedding_loss",
    "cross_entropy",
    "dice_ce_loss",
    "dice_loss",
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
    "linear_cross_entropy",
    "log_cosh_loss",
    "mape_loss",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poisson_nll_loss",
    "poly1_loss",
    "quantile_loss",
    "relative_l1_loss",
    "rmse_loss",
    "rmsle_loss",
    "sigmoid_focal_loss",
    "smape_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "token_scaled_cross_entropy",
    "triplet_margin_loss",
    "tversky_loss",
]

if not TYPE_CHECKING:  # type checkers are to know a wrong name

    def __getattr__(name: str) -> Any:
        """What the star leaves out: names with an underscore, and what torch adds to its module later."""
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(torch.nn.functional, name)
