"""Losses in the programs that torch.export and torch.jit.trace record.

A recorder keeps the operators that are called, and what Python has computed between them as constants: sizes, layouts,
dtypes of the recorded call. It forgets the ``autograd.Function`` around an operator as well, so that a program would
compute the loss and train nothing. So each loss is one operator in such a program, ``fastloss::<loss>_recorded``, which
takes the arguments of the call and, when the program runs, makes that very call. Its backward makes the call once more,
with a gradient.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import torch
from torch import Tensor

from . import _arguments
from ._autograd import functorch_active, recording, running_recorded
from ._library import ops

__all__ = ["arguments_of", "not_scriptable", "record", "recordable", "recording"]

_F = TypeVar("_F", bound=Callable[..., Any])

# An argument's annotation, and its type in an operator's schema.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Tensor | float | None: "Tensor?",
    str: "str",
    str | None: "str?",
    bool: "bool",
    bool | None: "bool?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    int | None: "SymInt?",
    int | Sequence[int]: "SymInt[]",
    int | Sequence[int] | None: "SymInt[]?",
    torch.dtype | None: "ScalarType?",
}


def _type(annotation: Any, default: Any) -> str:
    if annotation == Tensor | float:  # an operand, or a parameter: of a tensor there the loss records itself otherwise
        return "Tensor" if default is inspect.Parameter.empty else "float"
    if get_origin(annotation) is Literal:
        annotation = type(get_args(annotation)[0])
    return _TYPES[annotation]


_library = torch.library.Library("fastloss", "FRAGMENT")
_arguments_of: dict[str, dict[str, str]] = {}  # by the loss's name: its arguments, with their types
# A loss that takes **options takes those of cross_entropy; their defaults.
_OPTIONS = "options"
_defaults: dict[str, Any] = {}


def record(name: str, arguments: Mapping[str, Any]) -> Any:
    """What the loss does instead of computing, where a recorder is active: one operator, with these arguments."""
    if functorch_active():
        raise NotImplementedError(
            f"{name}(): torch.jit.trace cannot record a loss within a transform of torch.func: its sizes would become "
            "constants. Use torch.export, or torch.autograd.grad instead of the transform"
        )
    values = arguments_of(name, arguments)
    if _OPTIONS in arguments:
        arguments = arguments[_OPTIONS]
    if not arguments.get("return_stats"):
        return getattr(ops, f"{name}_recorded")(*values)
    from .losses.cross_entropy import CrossEntropyStats

    loss, *stats = getattr(ops, f"{name}_stats_recorded")(*values)
    return loss, CrossEntropyStats(*stats)


def arguments_of(name: str, arguments: Mapping[str, Any]) -> list[Any]:
    """What the operator of the loss takes, in its order."""
    if _OPTIONS in arguments:
        arguments = {**_defaults, **arguments, **arguments[_OPTIONS]}
    return [_value(name, argument, kind, arguments) for argument, kind in _arguments_of[name].items()]


def _value(name: str, argument: str, kind: str, arguments: Mapping[str, Any]) -> Any:
    """An argument as the operator takes it."""
    value = arguments[argument]
    if value is None:
        return None
    if kind.startswith("Tensor"):
        if kind == "Tensor?" and isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            value = _arguments.as_non_negative(name, argument, value)
            return torch.full((), value, dtype=torch.float64, device=arguments["input"].device)
        _arguments.require_tensor(argument, value, name)
        return value
    if isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value)):
        raise TypeError(
            f"{name}(): argument '{argument}' is a tensor (under torch.jit.trace a size is one too), and the recorded "
            "program would keep the number that it holds now. Give a number, or apply it to the tensors yourself"
        )
    if kind.startswith("float"):
        return _arguments.as_float(name, argument, value)
    if kind.startswith("SymInt["):
        several = value if isinstance(value, (list, tuple, set, frozenset, range)) else [value]
        return [_arguments.as_int(name, argument, v) for v in several]
    return _arguments.as_int(name, argument, value) if kind.startswith("SymInt") else value


def recordable(function: _F) -> _F:
    """Defines the operator of a loss, from its signature. The loss itself calls :func:`record`."""
    name, parameters = function.__name__, dict(inspect.signature(function).parameters)
    rest = parameters.pop(_OPTIONS, None)
    types = {argument: _type(p.annotation, p.default) for argument, p in parameters.items()}
    if name == "cross_entropy":
        _defaults.update({argument: p.default for argument, p in parameters.items()})
    if rest is not None:
        left_out = (*types, "size_average", "reduce")
        types |= {
            argument: kind for argument, kind in _arguments_of["cross_entropy"].items() if argument not in left_out
        }
    _arguments_of[name] = types
    takes = ", ".join(f"{kind} {argument}" for argument, kind in types.items())
    _define(f"{name}_recorded", takes, 1, function, list(types))
    if "return_stats" in types:
        _define(f"{name}_stats_recorded", takes, 5, function, list(types))
    return function


def _define(operator: str, takes: str, results: int, function: Callable[..., Any], names: list[str]) -> None:
    def call(values: Sequence[Any]) -> Any:
        with running_recorded():
            return function(**dict(zip(names, values, strict=True)))

    def forward(*values: Any) -> Any:
        with torch.no_grad():
            result = call(values)
        return result if results == 1 else (result[0], *result[1])

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        if results > 1:
            ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        ctx.others = [None if isinstance(v, Tensor) else v for v in inputs]
        kind = inputs[0].device.type
        cast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind)) if cast else None

    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        none = [None] * len(names)
        if grad_output is None:
            return tuple(none)
        again = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(*ctx.autocast) if ctx.autocast else contextlib.nullcontext():
            values = list(ctx.others)
            wanted = []
            for i, (saved, needed) in enumerate(zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)):
                if saved is not None:
                    # A tensor of this call alone; of the graph around it where there is to be a second derivative.
                    values[i] = saved.view_as(saved) if again else saved.detach().requires_grad_(needed)
                    wanted += [i] * needed
            result = call(values)
            loss = result if results == 1 else result[0]
            if not loss.requires_grad:
                return tuple(none)
            inputs = [values[i] for i in wanted]
            grads = torch.autograd.grad(loss, inputs, grad_output, create_graph=again, allow_unused=True)
        for i, grad in zip(wanted, grads, strict=True):
            none[i] = grad  # type: ignore[call-overload]
        return tuple(none)

    _library.define(f"{operator}({takes}) -> ({', '.join(['Tensor'] * results)})")
    _library.impl(operator, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastloss::{operator}", forward, lib=_library)
    torch.library.register_autograd(f"fastloss::{operator}", backward, setup_context=setup_context, lib=_library)


def not_scriptable(module: torch.nn.Module) -> NoReturn:
    """``__prepare_scriptable__`` of the modules: what torch.jit.script says of them."""
    name = type(module).__name__
    theirs = f", or torch.nn.{name}, which can be compiled" if hasattr(torch.nn, name) else ""
    raise NotImplementedError(
        f"torch.jit.script cannot compile fastloss.{name}, whose code runs in Python. Use torch.jit.trace, "
        f"torch.export or torch.compile{theirs}"
    )
