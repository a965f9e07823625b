"""The function names of :mod:`torch.nn.functional`: ``import fastloss.functional as F``."""

from .losses.cross_entropy import cross_entropy
from .losses.nll_loss import nll_loss

__all__ = ["cross_entropy", "nll_loss"]
