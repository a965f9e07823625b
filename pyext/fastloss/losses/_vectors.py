"""What torch's losses of vectors share: each is a formula after sums over the last dimension."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _arguments
from .._library import DTYPE_CODES, SUM
from . import _pointwise


def _is_strided_on_cpu(t: Any) -> bool:
    return type(t) is Tensor and t.is_cpu and t.layout is torch.strided and not t.is_nested


def _are_alike(vectors: Sequence[Any]) -> bool:
    """Whether these are plain tensors of one shape and dtype on the CPU: what most small calls have, seen before
    anything is looked for that others may have."""
    if not all(map(_is_strided_on_cpu, vectors)):
        return False
    shape, dtype = vectors[0].shape, vectors[0].dtype
    for t in vectors[1:]:
        if t.dtype is not dtype or t.shape != shape:
            return False
    return dtype in DTYPE_CODES and 1 <= len(shape) <= _pointwise.MAX_DIMS


def checked(
    function: str, vectors: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None
) -> list[Tensor] | None:
    """The vectors, in one shape; None where torch's own composition is to take the call, or to refuse it."""
    given = list(vectors.values())
    if _are_alike(given) and (not others or all(map(_is_strided_on_cpu, others.values()))):
        return given
    named = {**vectors, **others} if others else vectors
    for name, t in named.items():
        _arguments.require_tensor(name, t, function)
    _arguments.require_supported_tensors(function, *named.values())
    shape, device = given[0].shape, given[0].device
    same = True  # in shape: of sizes that a recorder knows by name no set can be made
    for t in given:
        if t.dtype not in DTYPE_CODES or t.device != device:
            return None
        same = same and t.shape == shape
    if others and any(t.device != device for t in others.values()):
        return None
    if not 1 <= len(shape) <= _pointwise.MAX_DIMS:
        return None
    if same:
        return given
    if any(t.dim() != len(shape) or t.shape[-1] != shape[-1] for t in given):
        return None
    try:
        return list(torch.broadcast_tensors(*given))
    except RuntimeError:
        return None


def run(
    loss: str, vectors: Sequence[Tensor], reduction: int, params: Sequence[float], rows: Tensor | None = None
) -> Tensor:
    """The loss of vectors that are checked; ``rows`` is an operand of a number for each, which may be more."""
    shape, dtype = vectors[0].shape, vectors[0].dtype
    for t in vectors:
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    dtype = _arguments.autocast_dtype(dtype, vectors[0].device)
    if rows is not None:
        if rows.shape != shape[:-1]:
            shape = torch.Size((*torch.broadcast_shapes(rows.shape, shape[:-1]), shape[-1]))
            vectors = [t.expand(shape) for t in vectors]
        vectors = [*vectors, rows.unsqueeze(-1).expand(*shape)]
    tensors = (*vectors, *(None,) * (_pointwise.TENSORS - len(vectors)))
    each = _pointwise.run(tensors, loss, params, SUM, dtype, len(shape) - 1)
    return _pointwise.reduced(each, reduction)
