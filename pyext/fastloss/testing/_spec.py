"""The form of a spec."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Sample:
    """One call of a loss: ``loss(*args, **kwargs)``."""

    name: str
    args: tuple[Tensor, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    def differentiable(self) -> list[Tensor]:
        """The arguments that require grad."""
        return [t for t in self.tensors() if t.requires_grad]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sample":
        """The same call with every tensor changed."""
        args = tuple(change(t) for t in self.args)
        kwargs = {name: change(v) if isinstance(v, Tensor) else v for name, v in self.kwargs.items()}
        return Sample(self.name, args, kwargs)

    def clone(self) -> "Sample":
        """The same call on new leaves, with the same strides and requires_grad."""
        return self.map(lambda t: t.detach().clone().requires_grad_(t.requires_grad))


@dataclass(frozen=True)
class LossSpec:
    """What a loss is.

    Attributes:
        name: its name in fastloss and in torch.nn.functional.
        function: fastloss's.
        torch_function: torch's, for the arguments that both take; None where torch has no such loss.
        reference: the same in float64, composed of torch operations, differentiable as often as wanted.
        samples: small inputs that together use every shape and option, ``samples(device, dtype)``.
        dtypes: of the input, for which the result is the exact one, computed in float32 or float64 and rounded once.
        fewest_bytes: (read, written) of an implementation that moves nothing twice, ``fewest_bytes(sample, gradient)``,
            without what is small beside the input.
        operator: the private operator that computes it, ``<name>_forward`` unless said otherwise.
        stops_gradient: part of the loss is a constant to its derivatives, which numerical ones would not know; they are
            compared with those of the reference instead.
    """

    name: str
    function: Callable[..., Any]
    torch_function: Callable[..., Tensor] | None
    reference: Callable[..., Tensor]
    samples: Callable[[str | torch.device, torch.dtype], Iterator[Sample]]
    fewest_bytes: Callable[[Sample, bool], tuple[int, int]]
    dtypes: tuple[torch.dtype, ...] = FLOATING_DTYPES
    operator: str = ""
    stops_gradient: bool = False


class Maker:
    """Reproducible tensors, the same values whatever the device."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, requires_grad: bool = True) -> Tensor:
        """Normally distributed, of the maker's dtype."""
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return x.to(self.device, self.dtype).requires_grad_(requires_grad)

    def positive(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Between 0.5 and 1.5: weights."""
        x = torch.rand(shape, generator=self._generator, dtype=torch.float64) + 0.5
        return x.to(self.device, dtype or self.dtype)

    def probabilities(self, *shape: int, requires_grad: bool = False) -> Tensor:
        """Softmax over dimension 1 (0 where there is one only)."""
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64).softmax(min(1, len(shape) - 1))
        return x.to(self.device, self.dtype).requires_grad_(requires_grad)

    def classes(self, count: int, *shape: int, ignore_every: int = 0, ignore_index: int = -100) -> Tensor:
        """Class indices below ``count``, int64; every ``ignore_every``-th is ``ignore_index``."""
        t = torch.randint(count, shape, generator=self._generator)
        if ignore_every:
            t.view(-1)[::ignore_every] = ignore_index
        return t.to(self.device)
