"""Losses beyond one device: classes sharded over the ranks of a process group, on torch.distributed."""

from .count import count
from .cross_entropy import ParallelCrossEntropyLoss, cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .token_log_probs import linear_token_log_probs, token_log_probs

__all__ = [
    "ParallelCrossEntropyLoss",
    "count",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_token_log_probs",
    "token_log_probs",
]
