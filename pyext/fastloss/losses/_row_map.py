"""Losses that map each row's nll: cross entropy with a function of ``csrc/rowwise/row_maps.h`` before the sum."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import _arguments, formulas
from .cross_entropy import ROW_MAP_NUMBERS, Given
from .cross_entropy import run as run_cross_entropy


class MappedLoss(NamedTuple):
    """A map by its name there, and which parameters the loss takes: a condition, and the same in words."""

    row_map: str
    takes: Callable[..., bool] = lambda: True
    condition: str = ""


LOSSES = {
    "focal_loss": MappedLoss("focal", lambda gamma: 0 <= gamma < math.inf, "gamma must not be negative or infinite"),
    "generalized_cross_entropy": MappedLoss(
        "generalized_cross_entropy",
        lambda q: 0 < q <= 1,
        "q must be above 0 and at most 1 (for 0 use cross_entropy)",
    ),
    "poly1_loss": MappedLoss(
        "poly1", lambda epsilon: -1 <= epsilon < math.inf, "epsilon must be -1 or more, and finite"
    ),
    "token_scaled_cross_entropy": MappedLoss("token_scaled"),
}
NUMBERS = {name: ROW_MAP_NUMBERS[loss.row_map] for name, loss in LOSSES.items()}
# Their names, in the kernels' order.
PARAMETERS = {name: formulas.ROW_MAP_KINDS[number][1] for name, number in NUMBERS.items()}


def run(function: str, input: Tensor, target: Tensor, g: Given, *parameters: Any) -> Any:
    """The whole of such a loss: what a face calls.

    Args:
        function: the face's name, which is that of the loss.
        input, target, g: what the face was called with.
        parameters: those of the map.
    """
    for value in parameters:
        if type(value) is not float:
            parameters = _floats(function, parameters)
            break
    loss = LOSSES[function]
    if not loss.takes(*parameters):
        raise ValueError(f"{function}(): {loss.condition}, got {', '.join(map(str, parameters))}")
    return run_cross_entropy(function, input, target, g, NUMBERS[function], parameters)


def _floats(function: str, parameters: Sequence[Any]) -> tuple[float, ...]:
    named = zip(PARAMETERS[function], parameters, strict=True)
    return tuple(float(_arguments.as_float(function, name, value)) for name, value in named)
