"""Losses of jagged nested tensors: those of their values, which hold the elements of all samples without padding.

A loss imports :func:`handle_torch_function` from here instead of from torch if it is one of elements, or of rows whose
classes come last in a nested tensor (:data:`_OF_ROWS`). Ordinary calls do not come this way.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.overrides
from torch import Tensor

from ._arguments import require_tensor
from ._subclasses import mode_active

_OF_ROWS = (
    "cross_entropy",
    "focal_loss",
    "generalized_cross_entropy",
    "multi_margin_loss",
    "nll_loss",
    "poly1_loss",
    "token_scaled_cross_entropy",
)


def is_jagged(value: Any) -> bool:
    """Whether it is a nested tensor of jagged layout."""
    return isinstance(value, Tensor) and value.is_nested and value.layout is torch.jagged


def handle_torch_function(
    loss: Callable[..., Any], relevant: Iterable[Any], input: Any, target: Any, **options: Any
) -> Any:
    """torch's, except where input or target is jagged: then the loss of their values."""
    if not (is_jagged(input) or is_jagged(target)) or mode_active():  # a mode is shown the call, and makes it
        return torch.overrides.handle_torch_function(loss, relevant, input, target, **options)  # type: ignore[arg-type]
    function, of_rows = loss.__name__, loss.__name__ in _OF_ROWS
    require_tensor("input", input, function)
    require_tensor("target", target, function)
    if not is_jagged(input) or not is_jagged(target):
        name, other, dense = ("input", "target", target) if is_jagged(input) else ("target", "input", input)
        remedy = "a nested tensor of the same offsets, torch.nested.nested_tensor_from_jagged(values, offsets)"
        raise NotImplementedError(
            f"{function}(): {name} is a jagged nested tensor, and {other} of shape {list(dense.shape)} is none; make "
            f"it {remedy}"
        )
    if options.get("dim") is not None:
        raise NotImplementedError(
            f"{function}(): dim={options['dim']} of jagged nested tensors; leave it out, or call the loss with "
            "input.values() and target.values()"
        )
    values = _values(function, "input", input, input)
    if of_rows:
        if options.pop("class_dim", None) not in (None, -1, input.dim() - 1):
            raise ValueError(f"{function}(): a nested input has its classes last; leave class_dim out, or give -1")
        if values.dim() > 2:
            if function in ("multi_margin_loss", "nll_loss"):
                raise NotImplementedError(f"{function}(): a nested input has shape (B, j, C), got {input.shape}")
            options["class_dim"] = -1
        elif values.dim() < 2:
            raise ValueError(f"{function}(): a nested input has its classes last, shape (B, j, C), got {input.shape}")
    for name, value in options.items():
        if isinstance(value, Tensor):
            options[name] = _option(function, name, value, input, values)
    result = loss(values, _values(function, "target", target, input), **options)
    if isinstance(result, tuple):
        loss_of_rows, stats = result
        return _like(loss_of_rows, input), type(stats)(*(_like(t, input) for t in stats))
    return _like(result, input)


def _option(function: str, name: str, t: Tensor, input: Any, values: Tensor) -> Tensor:
    """What broadcasts against the values as it would against each sample."""
    if is_jagged(t):
        return _values(function, name, t, input)
    if t.is_nested or t.numel() == 1 or t.dim() < values.dim():
        if name != "sample_weight" or t.is_nested:
            return t
        if t.shape == input.shape[:1]:
            return t.repeat_interleave(input.offsets().diff(), output_size=values.shape[0])
    wanted = f"one for each sample, shape [{input.shape[0]}], or " if name == "sample_weight" else ""
    raise ValueError(
        f"{function}(): {name} of shape {list(t.shape)} for a jagged nested input: give {wanted}a nested tensor of the "
        "same offsets"
    )


def _values(function: str, name: str, t: Any, input: Any) -> Tensor:
    """The values of a nested tensor, which must be laid out as the input is."""
    if t.lengths() is not None or t._ragged_idx != 1:
        raise NotImplementedError(
            f"{function}(): {name} is a jagged nested tensor with holes or whose ragged dimension is not the second "
            f"one; move that to dimension 1 and call {name}.contiguous()"
        )
    theirs, ours = t.offsets(), input.offsets()
    same = theirs is ours or t.shape[1] == input.shape[1]
    if not same and theirs.is_cpu and ours.is_cpu and not torch.compiler.is_compiling():
        same = torch.equal(theirs, ours)
    if not same:
        raise ValueError(
            f"{function}(): {name} and input are nested tensors of different offsets (on CUDA: that are not one "
            "tensor, since comparing them would synchronise); make it with "
            "torch.nested.nested_tensor_from_jagged(values, input.offsets())"
        )
    return t.values()  # type: ignore[no-any-return]


def _like(result: Tensor, input: Any) -> Tensor:
    """Results of elements or rows as a nested tensor; others as they are."""
    if result.dim() == 0:
        return result
    return torch.nested.nested_tensor_from_jagged(result, input.offsets())
