"""What the modules of dice's family share."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._recorded import not_scriptable


class DiceModule(torch.nn.Module):
    """A loss of the family as a module: the weight is a buffer, what else the loss takes an attribute of that name.

    Attributes:
        function: the loss.
    """

    function: ClassVar[Callable[..., Tensor]]
    weight: Tensor | None

    __prepare_scriptable__ = not_scriptable

    def __init__(self, weight: Tensor | None, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        parameters = inspect.signature(self.function).parameters
        self._options = tuple(name for name in parameters if name not in ("input", "target", "weight"))
        for name in self._options:
            setattr(self, name, given[name])

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of (N, C, ...) against targets; shapes, dtypes and errors as those of the function."""
        options = {name: getattr(self, name) for name in self._options}
        return type(self).function(input, target, self.weight, **options)
