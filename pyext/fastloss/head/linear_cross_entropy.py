"""Stand-in: cross entropy of a linear layer's output, composed chunk by chunk."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.cross_entropy import cross_entropy


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    sample_weight: Tensor | None = None,
    normalizer: Any = None,
    **more: Any,
) -> Any:
    rows = getattr(options, "batch_chunk_size", None) or 256
    counted = torch.ones(len(input), device=input.device, dtype=torch.float32)
    if not target.is_floating_point():
        counted = (target != ignore_index).float()
        if weight is not None:
            counted = counted * weight.float()[target.where(target != ignore_index, 0)]
    if sample_weight is not None:
        counted = counted * sample_weight
    losses = [
        cross_entropy(
            F.linear(input[i : i + rows], linear_weight, linear_bias),
            target[i : i + rows],
            weight,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
            sample_weight=None if sample_weight is None else sample_weight[i : i + rows],
            **more,
        )
        for i in range(0, len(input), rows)
    ]
    loss = torch.cat(losses)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (counted.sum() if normalizer is None else normalizer)
