"""Tensor types with a say of their own in calls of torch's losses, for :func:`fastloss.patch`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_overloaded_args, handle_torch_function

_DISABLED = torch._C._disabled_torch_function_impl
heeded: Callable[[], bool] = torch._C._is_torch_function_enabled
mode_active: Callable[[], bool] = torch._C._is_torch_function_mode_enabled


def overrides(value: Any) -> bool:
    """Whether it is of a type with its own __torch_function__, whatever mode is on."""
    return type(value) is not Tensor and getattr(type(value), "__torch_function__", _DISABLED) is not _DISABLED


class _Serving(TorchFunctionMode):
    """While a subclass handles a call of torch's function: what it leaves to torch in the end, fastloss takes."""

    def __init__(self, original: Callable[..., Any], call: Callable[..., Any]) -> None:
        super().__init__()
        self._original, self._call = original, call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch's own names itself by what stands under its name, which is patch()'s.
        own = getattr(func, "__wrapped__", func) is self._original
        return (self._call if own else func)(*args, **(kwargs or {}))


def handled(
    original: Callable[..., Any], call: Callable[..., Any], overloaded: Iterable[Any], args: Any, kwargs: Any
) -> Any:
    """The call as the types of its arguments handle it. They are shown torch's own function, which they may know by
    identity, and get its result, type and metadata; those that end in torch's default end in ``call``."""
    overloaded = _get_overloaded_args(overloaded)
    types = tuple(map(type, overloaded))
    for argument in overloaded:
        with _Serving(original, call):
            result = argument.__torch_function__(original, types, args, kwargs)
        if result is not NotImplemented:
            return result
    return handle_torch_function(original, overloaded, *args, **kwargs)  # raises what torch raises
