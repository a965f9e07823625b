"""Losses of cosines with a margin at the target: what ``arcface_loss`` and ``cosface_loss`` share. The mathematics is
Margin in ``csrc/rowwise/cross_entropy_math.h``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import _arguments
from .cross_entropy import given
from .cross_entropy import run as run_cross_entropy


def run(function: str, margins: tuple[float, float], arguments: Mapping[str, Any]) -> Any:
    """Cross entropy of the scaled cosines; ``margins``: an angle and a cosine; ``arguments``: those of ``function``."""
    target = arguments["target"]
    if isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(
            f"{function}(): target must be class indices, of an integer dtype, got {target.dtype}: probabilities have "
            "no class of their own to move"
        )
    scale = _arguments.as_positive(function, "scale", arguments["scale"])
    g = given(arguments)._replace(logit_scale=float(scale))
    return run_cross_entropy(function, arguments["input"], target, g, margins=margins)
