"""The function names of :mod:`torch.nn.functional`: ``import fastloss.functional as F``. Some are fastloss's own."""

from .head.linear_cross_entropy import linear_cross_entropy
from .losses.binary_cross_entropy_with_logits import binary_cross_entropy_with_logits
from .losses.cosine_distance_loss import cosine_distance_loss
from .losses.cross_entropy import cross_entropy
from .losses.dice_loss import dice_loss
from .losses.focal_loss import focal_loss
from .losses.huber_loss import huber_loss
from .losses.js_divergence_with_logits import js_divergence_with_logits
from .losses.kl_divergence_with_logits import kl_divergence_with_logits
from .losses.l1_loss import l1_loss
from .losses.log_cosh_loss import log_cosh_loss
from .losses.mse_loss import mse_loss
from .losses.multi_margin_loss import multi_margin_loss
from .losses.nll_loss import nll_loss
from .losses.relative_l1_loss import relative_l1_loss
from .losses.rmse_loss import rmse_loss
from .losses.smooth_l1_loss import smooth_l1_loss

__all__ = [
    "binary_cross_entropy_with_logits",
    "cosine_distance_loss",
    "cross_entropy",
    "dice_loss",
    "focal_loss",
    "huber_loss",
    "js_divergence_with_logits",
    "kl_divergence_with_logits",
    "l1_loss",
    "linear_cross_entropy",
    "log_cosh_loss",
    "mse_loss",
    "multi_margin_loss",
    "nll_loss",
    "relative_l1_loss",
    "rmse_loss",
    "smooth_l1_loss",
]
