"""The class names of :mod:`torch.nn`: ``import fastloss.nn as nn``."""

from .losses.cross_entropy import CrossEntropyLoss
from .losses.nll_loss import NLLLoss

__all__ = ["CrossEntropyLoss", "NLLLoss"]
