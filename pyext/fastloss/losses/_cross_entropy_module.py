"""What the modules of losses that are a cross entropy with a parameter of their own share."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._recorded import not_scriptable


class CrossEntropyModule(torch.nn.Module):
    """A loss as a module: ``weight`` is a buffer, ``sample_weight`` an argument of the call.

    Attributes:
        function: the loss.
        parameters_of_loss: the names of its own parameters, attributes of the module.
    """

    function: ClassVar[Callable[..., Any]]
    parameters_of_loss: ClassVar[tuple[str, ...]] = ()
    weight: Tensor | None

    __prepare_scriptable__ = not_scriptable

    def __init__(
        self,
        weight: Tensor | None,
        ignore_index: int | Sequence[int],
        reduction: str,
        label_smoothing: float,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        known = inspect.signature(self.function).parameters.keys() - {"input", "target", "sample_weight"}
        if unknown := options.keys() - known:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.options = dict(options)

    def own(self) -> dict[str, Any]:
        """The loss's own parameters."""
        return {name: getattr(self, name) for name in self.parameters_of_loss}

    def extra_repr(self) -> str:
        """The loss's own parameters, and what differs from the default."""
        return ", ".join(f"{k}={v!r}" for k, v in {**self.own(), **self.options}.items())

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Any:
        """The loss of (N, C, ...) against targets; shapes, dtypes and errors as those of the function."""
        return type(self).function(
            input,
            target,
            **self.own(),
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            **self.options,
        )
