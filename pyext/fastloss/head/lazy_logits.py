"""Logits that are not made until somebody looks: a tensor of hidden states and the head's weight.

:class:`LazyLogits` has the shape, dtype and device of ``F.linear(hidden, weight, bias)`` and no memory. What models do
to logits before the loss (:attr:`LazyLogits._overrides`) gives another one; a cross entropy becomes
:func:`linear_cross_entropy`; anything else gets the logits themselves, made once and kept.

Each is two things at once. Its *form* says what it is in terms of hidden states, for the fused loss; its origin says
how torch would have made it (:mod:`fastloss.head.lazy`).
"""

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import HALVES, autocast_dtype, is_dtensor, legacy_reduction
from .._autograd import accum_dtype, attach
from ..losses import _row_map, _rowwise
from ..losses.cross_entropy import CrossEntropyStats, Given, cross_entropy
from ..token_log_probs import IGNORE_INDEX, token_log_probs
from .chunked import chunk_dtype
from .lazy import DisableTorchFunction, Lazy, Overrides, autocast, implements
from .linear_cross_entropy import Chunking, linear_cross_entropy, run
from .linear_token_log_probs import linear_token_log_probs

_TORCHS_CROSS_ENTROPY = F.cross_entropy


class LazyHeadWarning(UserWarning):
    """Logits of a lazy head had to be made, or its head gives ordinary ones; once for each operation and line."""


@dataclass
class Step:
    """What became of the logits of one call of the head."""

    plain: str | None = None
    fused: int = 0
    bytes_not_allocated: int = 0
    made: list[str] = field(default_factory=list)


@dataclass
class HeadState:
    """What a lazy head keeps beside its parameters."""

    evaluation: bool
    options: Any
    compiled: bool = False
    forward: Any = None  # that of its own which it had before
    step: Step | None = None
    said: set[tuple[str, str, int]] = field(default_factory=set)

    def say(self, operation: str, message: str) -> str:
        """Warns once for each operation and line of the caller; returns the two."""
        file, line = _caller()
        if (operation, file, line) not in self.said:
            self.said.add((operation, file, line))
            warnings.warn_explicit(message, LazyHeadWarning, file, line)
        return f"{operation} at {file}:{line}"


def _caller() -> tuple[str, int]:
    """File and line of the first frame outside torch and this package."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastloss", "torch"):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@dataclass(frozen=True)
class Form:
    """``z = scale * linear(hidden, weight, bias)``, or ``cap * tanh(z)``, in ``dtype``, classes on axis ``classes``.

    ``placed``: of hidden states and a weight that are DTensors, the placements; None there: all of it, a plain tensor.
    """

    classes: int
    dtype: torch.dtype
    scale: float = 1.0
    cap: float | None = None
    copies: int = 1  # tensors of this size that torch would have made so far
    placed: tuple[Any, ...] | None = None

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The tensor that this is the form of."""
        z: Any = F.linear(hidden.movedim(self.classes, -1), weight, bias).to(self.dtype) * self.scale
        z = (z if self.cap is None else self.cap * torch.tanh(z)).movedim(-1, self.classes)
        if is_dtensor(z):
            z = z.full_tensor() if self.placed is None else z.redistribute(placements=self.placed)
        return cast(Tensor, z)


class _Origin(torch.autograd.Function):
    """Makes the tensor, which has no memory, and its place in the graph.

    The gradient comes this way only if something that does not ask ``__torch_function__`` (an autograd.Function of
    somebody else) took the tensor; without it, it would be lost in silence.
    """

    @staticmethod
    def forward(ctx: Any, form: Form, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.form, ctx.operands = form, (hidden, weight, bias)  # not saved: hooks on saved tensors would move the weight
        shape = list(hidden.shape)
        shape[form.classes] = weight.shape[0]
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, shape, dtype=form.dtype, device=hidden.device
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        again = torch.is_grad_enabled()
        with torch.enable_grad(), autocast(ctx.operands[0].device, None):
            operands = [
                t if t is None or again else t.detach().requires_grad_(needed)
                for t, needed in zip(ctx.operands, ctx.needs_input_grad[1:], strict=True)
            ]
            z = ctx.form.of(*operands)
            wanted = [t for t, needed in zip(operands, ctx.needs_input_grad[1:], strict=True) if needed]
            found = iter(torch.autograd.grad(z, wanted, grads[0], create_graph=again))
        return (None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:]))


class LazyLogits(Lazy):
    """Logits that are made when somebody looks. See the module."""

    _overrides: ClassVar[Overrides] = {}
    _form: Form
    _hidden: Tensor
    _weight: Tensor
    _bias: Tensor | None
    _state: HeadState
    _step: Step
    _of_whole: "tuple[LazyLogits, int] | None" = None  # what it was iterated out of, and where
    _logsumexp: Tensor | None = None

    # ------------------------------------------------------------------------------------------------ how it is made

    @staticmethod
    def from_head(state: HeadState, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "LazyLogits":
        """The output of a head."""
        classes = hidden.dim() - 1
        form = Form(classes, hidden.dtype, placed=_placements(hidden, weight, classes))
        state.step = Step()
        return _new(form, hidden, weight, bias, state, state.step, None, lambda _: F.linear(hidden, weight, bias))

    def derive(
        self, how: Callable[[Tensor], Tensor], *, copies: int = 0, operands: Any = None, **changes: Any
    ) -> "LazyLogits":
        """Another one, which torch would make of this one's logits by ``how``."""
        form = replace(self._form, copies=self._form.copies + copies, **changes)
        hidden, weight, bias = operands or (self._hidden, self._weight, self._bias)
        if form.placed is not None and operands is not None:
            by_class = [p.is_shard(self._form.classes) for p in form.placed]
            whole = _placements(hidden, weight, form.classes) or ()
            gathered = [
                p if kept or not p.is_shard(form.classes) else old
                for kept, p, old in zip(by_class, whole, form.placed, strict=True)
            ]
            form = replace(form, placed=tuple(gathered))
        return _new(form, hidden, weight, bias, self._state, self._step, self, how)

    # What the hooks of a tensor-parallel layer ask a DTensor.

    @property
    def placements(self) -> tuple[Any, ...]:
        """Of logits that are a DTensor."""
        if self._form.placed is None:
            raise AttributeError("these logits are a plain tensor, without placements")
        return self._form.placed

    @property
    def device_mesh(self) -> Any:
        """Of logits that are a DTensor."""
        if self._form.placed is None:
            raise AttributeError("these logits are a plain tensor, without a device mesh")
        return cast(Any, self._weight).device_mesh

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **kwargs: Any) -> Any:
        """With the classes gathered: no logits travel for it before somebody looks. Anything else makes them."""
        classes, dims = self._form.classes, self._hidden.dim()
        placed = tuple(type(p)(p.dim % dims) if p.is_shard() else p for p in placements or ())
        pairs = list(zip(self.placements, placed, strict=False))
        if kwargs.keys() - {"async_op"} or len(placed) != len(self.placements):
            pairs = []
        if not pairs or any(new != old and not (new.is_replicate() and old.is_shard(classes)) for old, new in pairs):
            return cast(Any, self.make("redistribute")).redistribute(device_mesh, placements, **kwargs)
        return self.derive(lambda z: cast(Any, z).redistribute(device_mesh, placements, **kwargs), placed=placed)

    def to_local(self, **kwargs: Any) -> Any:
        """All of it as a plain tensor, where every rank has all; else this rank's part, which is made."""
        if kwargs or not all(p.is_replicate() for p in self.placements):
            return cast(Any, self.make("to_local")).to_local(**kwargs)
        return self.derive(lambda z: cast(Any, z).to_local(), placed=None)

    def full_tensor(self, **kwargs: Any) -> Any:
        """All of it on every rank, a plain tensor."""
        if kwargs or self._form.placed is None:
            return cast(Any, self.make("full_tensor")).full_tensor(**kwargs)
        return self.derive(lambda z: cast(Any, z).full_tensor(), placed=None)

    def _announce(self, operation: str) -> None:
        if not self.root().noted:
            self.root().noted = True
            with DisableTorchFunction():
                shape, dtype, size = list(self.shape), self.dtype, self.numel() * self.element_size() / 2**20
            where = self._state.say(
                operation,
                f"fastloss.lazy_head: {operation} needs the logits themselves, {shape} of {dtype}: they are made here "
                f"({size:.1f} MiB), once. Only a cross entropy does without; fastloss.restore_head(model) gives the "
                "model its ordinary head back.",
            )
            self._step.made.append(where)

    def require_unchanged(self) -> None:
        """Raises if hidden states or weight are no longer what they were in the head's forward."""
        names = "the hidden states", "the head's weight", "the head's bias"
        for name, (t, version) in zip(names, self._versions, strict=False):
            held = cast(Any, t)._local_tensor if is_dtensor(t) else t
            if held.untyped_storage().size() == 0 and held.numel() and t.device.type != "meta":
                raise RuntimeError(
                    f"fastloss.lazy_head: {name} were freed since the head's forward (sharded again?), so the logits "
                    "cannot be made. Read them before, or call fastloss.restore_head(model)"
                )
            if not t.is_inference() and t._version != version:
                raise RuntimeError(
                    f"fastloss.lazy_head: {name} changed in place since the head's forward (an optimizer's step?), so "
                    "the logits of that forward cannot be made any more. Read them before, or call "
                    "fastloss.restore_head(model)"
                )


def _placements(hidden: Any, weight: Any, classes: int) -> tuple[Any, ...] | None:
    """Of the logits that DTensors make; None for plain tensors."""
    if not is_dtensor(weight):
        return None
    pairs = zip(weight.placements, hidden.placements, strict=True)
    return tuple(type(w)(classes) if w.is_shard() else x for w, x in pairs)


def _new(
    form: Form,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: HeadState,
    step: Step,
    parent: LazyLogits | None,
    how: Callable[[Tensor], Tensor],
) -> LazyLogits:
    lazy = cast(LazyLogits, _Origin.apply(form, hidden, weight, bias))
    lazy._form, lazy._hidden, lazy._weight, lazy._bias = form, hidden, weight, bias
    lazy._state, lazy._step = state, step
    lazy.begin((hidden, weight) if bias is None else (hidden, weight, bias), parent, how)
    return lazy


# ---------------------------------------------------------------------------------------- what leaves logits unmade

_implements = implements(LazyLogits._overrides)


def _row_major(x: Any) -> bool:
    """Lazy, with the classes last."""
    return isinstance(x, LazyLogits) and x._form.classes == x._hidden.dim() - 1


def _reshaped(func: Any, x: LazyLogits, shape: list[int]) -> Any:
    """``x`` in another shape, if its last axis stays the classes'."""
    with DisableTorchFunction():
        total, classes = x.numel(), x.shape[-1]
    if -1 in shape:
        others = -math.prod(shape)
        if shape.count(-1) != 1 or others == 0 or total % others:
            return NotImplemented
        shape = [total // others if n == -1 else n for n in shape]
    if not shape or shape[-1] != classes or math.prod(shape) != total:
        return NotImplemented
    hidden = x._hidden.reshape(*shape[:-1], x._hidden.shape[-1])
    return x.derive(lambda z: func(z, shape), operands=(hidden, x._weight, x._bias), classes=len(shape) - 1)


@_implements("view", "reshape")
def _view(func: Any, x: Any, *shape: Any, **kwargs: Any) -> Any:
    if "size" in kwargs or "shape" in kwargs:
        shape = kwargs.pop("size", None) or kwargs.pop("shape")
    sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else list(shape)
    if kwargs or not _row_major(x) or not all(isinstance(n, int) for n in sizes):
        return NotImplemented
    return _reshaped(Tensor.reshape, x, sizes)


@_implements("view_as", "reshape_as")
def _view_as(func: Any, x: Any, other: Any) -> Any:
    return _reshaped(Tensor.reshape, x, list(other.shape)) if _row_major(x) else NotImplemented


@_implements("flatten")
def _flatten(func: Any, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not _row_major(x):
        return NotImplemented
    with DisableTorchFunction():
        shape = list(x.shape)
    start, end = start_dim % len(shape), end_dim % len(shape)
    return _reshaped(Tensor.reshape, x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


@_implements("squeeze", "unsqueeze")
def _squeeze(func: Any, x: Any, dim: Any = None) -> Any:
    if not _row_major(x) or not isinstance(dim, int):
        return NotImplemented
    with DisableTorchFunction():
        shape = list(x.shape)
    if func.__name__ == "unsqueeze":
        shape.insert(dim % (len(shape) + 1), 1)
    elif shape[dim] == 1:
        del shape[dim]
    return _reshaped(Tensor.reshape, x, shape)


@_implements("contiguous")
def _contiguous(func: Any, x: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs or not isinstance(x, LazyLogits) else x.derive(Tensor.contiguous)


@_implements("clone")
def _clone(func: Any, x: Any) -> Any:
    return x.derive(torch.clone, copies=1)


@_implements("movedim", "moveaxis")
def _movedim(func: Any, x: Any, source: Any, destination: Any) -> Any:
    if not isinstance(x, LazyLogits) or type(source) is not int or type(destination) is not int:
        return NotImplemented
    order = list(range(x._hidden.dim()))
    order.insert(destination % len(order), order.pop(source % len(order)))
    return _permute(Tensor.permute, x, order)


@_implements("transpose", "swapaxes", "swapdims", "permute")
def _permute(func: Any, x: Any, *dims: Any, **kwargs: Any) -> Any:
    flat = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else list(dims)
    if kwargs or not isinstance(x, LazyLogits) or not all(isinstance(d, int) for d in flat):
        return NotImplemented
    n = x._hidden.dim()
    flat = [d % n for d in flat]
    order = list(range(n))
    if func.__name__ == "permute":
        order = flat
    elif len(flat) == 2:
        order[flat[0]], order[flat[1]] = flat[1], flat[0]
    if sorted(order) != list(range(n)):
        return NotImplemented
    operands = (x._hidden.permute(order), x._weight, x._bias)
    return x.derive(lambda z: z.permute(order), operands=operands, classes=order.index(x._form.classes))


@_implements("detach")
def _detach(func: Any, x: Any) -> Any:
    operands = (x._hidden.detach(), x._weight.detach(), None if x._bias is None else x._bias.detach())
    return x.derive(Tensor.detach, operands=operands)


@_implements("float", "double", "half", "bfloat16", "to", "type", "type_as", "cpu", "cuda")
def _cast(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, LazyLogits):
        return NotImplemented
    with DisableTorchFunction():
        device, current = x.device, x.dtype
    name = func.__name__
    rest: Any
    named = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
    try:
        if name in named:
            to, dtype, rest = device, named[name], args or kwargs
        elif name in ("type_as", "to", "type"):
            if name != "to" and (len(args) != 1 or kwargs or not isinstance(args[0], (torch.dtype, Tensor))):
                return NotImplemented
            if args and isinstance(args[0], LazyLogits):
                with DisableTorchFunction():
                    args = (args[0].device, args[0].dtype, *args[1:])
            to, dtype, _, rest = torch._C._nn._parse_to(*args, **kwargs)
        else:
            to, dtype, rest = torch.device(name, *args), current, kwargs
    except (TypeError, RuntimeError):
        return NotImplemented
    to, dtype = to or device, dtype or current
    if rest or to not in (device, torch.device(device.type)) or not dtype.is_floating_point:
        return NotImplemented
    if dtype is current:
        return x
    if torch.promote_types(dtype, x._hidden.dtype) is not dtype:  # narrower than the logits
        return NotImplemented
    return x.derive(lambda z: z.to(dtype), dtype=dtype, copies=1)


def _basic(key: Any, dims: int) -> list[Any] | None:
    """An index with one entry for each axis of the tensor, or None where that is not simple."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(k is None for k in keys) or any(not isinstance(k, (int, slice, Tensor)) and k is not ... for k in keys):
        return None
    if any(isinstance(k, (bool, LazyLogits)) for k in keys) or sum(k is ... for k in keys) > 1:
        return None
    used = sum(k.dim() if isinstance(k, Tensor) and k.dtype is torch.bool else k is not ... for k in keys)
    if used > dims:
        return None
    at = next((i for i, k in enumerate(keys) if k is ...), len(keys))
    return [*keys[:at], *[slice(None)] * (dims - used), *keys[at + 1 :]]


@_implements("__getitem__")
def _getitem(func: Any, x: Any, key: Any) -> Any:
    keys = _basic(key, x._hidden.dim()) if _row_major(x) else None
    if keys is None or not isinstance(keys[-1], slice) or keys[-1].step not in (None, 1):
        return NotImplemented
    weight, bias = x._weight, x._bias
    if keys[-1] != slice(None):  # a padded vocabulary cut to size
        weight, bias = weight[keys[-1]], None if bias is None else bias[keys[-1]]
        if weight.shape[0] == 0:
            return NotImplemented
    picked = any(isinstance(k, Tensor) for k in keys)
    hidden = x._hidden[tuple(keys)[:-1]]  # wherever picked rows go, the classes stay last
    return x.derive(
        lambda z: z[key], operands=(hidden, weight, bias), classes=hidden.dim() - 1, copies=1 if picked else 0
    )


def _pieces(x: Any, dim: Any, ends: Sequence[int]) -> Any:
    """Slices of rows that end there."""
    before, found = (slice(None),) * (dim % x._hidden.dim()), []
    for begin, end in zip((0, *ends), ends, strict=False):
        key = (*before, slice(begin, end))
        found.append(x[key])
    return tuple(found)


@_implements("split")
def _split(func: Any, x: Any, split_size: Any, dim: Any = 0) -> Any:
    if not _row_major(x) or not isinstance(dim, int) or dim % x._hidden.dim() == x._form.classes:
        return NotImplemented
    rows = x._hidden.shape[dim]
    if isinstance(split_size, int):
        if split_size < 1 or rows == 0:
            return NotImplemented
        return _pieces(x, dim, [min(end, rows) for end in range(split_size, rows + split_size, split_size)])
    ends = list(itertools.accumulate(split_size))
    return _pieces(x, dim, ends) if ends and ends[-1] == rows and min(split_size) >= 0 else NotImplemented


@_implements("chunk")
def _chunk(func: Any, x: Any, chunks: Any, dim: Any = 0) -> Any:
    if not _row_major(x) or type(chunks) is not int or chunks < 1 or not isinstance(dim, int):
        return NotImplemented
    with DisableTorchFunction():
        rows = x.shape[dim]
    return _split(func, x, max(1, -(-rows // chunks)), dim)


@_implements("narrow", "select", "index_select")
def _picked(func: Any, x: Any, dim: Any, *at: Any, **named: Any) -> Any:
    """Rows, of one axis."""
    if not _row_major(x) or not isinstance(dim, int) or any(isinstance(a, LazyLogits) for a in (*at, *named.values())):
        return NotImplemented
    if "out" in named or not -x._hidden.dim() <= dim < x._hidden.dim() or dim % x._hidden.dim() == x._form.classes:
        return NotImplemented
    hidden = func(x._hidden, dim, *at, **named)
    return x.derive(
        lambda z: func(z, dim, *at, **named),
        operands=(hidden, x._weight, x._bias),
        classes=hidden.dim() - 1,
        copies=int(func.__name__ == "index_select"),
    )


@_implements("unbind")
def _unbind(func: Any, x: Any, dim: Any = 0) -> Any:
    """Of iteration too."""
    if not _row_major(x) or dim != 0 or x._form.classes == 0:
        return NotImplemented
    rows = tuple(x[i] for i in range(x._hidden.shape[0]))
    for i, row in enumerate(rows):
        row._of_whole = (x, i)
    return rows


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@_implements("mul", "multiply", "__mul__", "__rmul__")
def _mul(func: Any, x: Any, other: Any) -> Any:
    if not isinstance(x, LazyLogits):
        x, other = other, x
    return _scaled(x, other, lambda z: z * other)


@_implements("div", "divide", "true_divide", "__div__", "__truediv__")
def _div(func: Any, x: Any, other: Any) -> Any:
    if _number(other) and other != 0:
        return _scaled(x, 1.0 / other, lambda z: z / other)
    if isinstance(other, Tensor) and other.is_floating_point():
        return _scaled(x, other, lambda z: z / other, invert=True)
    return NotImplemented


def _scaled(x: Any, factor: Any, how: Callable[[Tensor], Tensor], invert: bool = False) -> Any:
    if not isinstance(x, LazyLogits) or isinstance(factor, LazyLogits):
        return NotImplemented
    if is_dtensor(x._weight) and isinstance(factor, Tensor):
        return NotImplemented
    form = x._form
    if _number(factor):
        if form.cap is None:
            scale = form.scale * factor
            return x.derive(how, scale=scale, copies=1) if scale != 0 and math.isfinite(scale) else NotImplemented
        return x.derive(how, cap=form.cap * factor, copies=1) if factor > 0 else NotImplemented
    if isinstance(factor, Tensor) and factor.dim() == 0 and factor.is_floating_point() and form.cap is None:
        # A learnt or measured temperature: on the hidden states instead, where it has its gradient. An expanded scale
        # would have the same value, but is read back from the device.
        if factor.device != x._hidden.device and factor.device.type != "cpu":
            return NotImplemented
        s = factor.to(torch.float32) if x._hidden.dtype in HALVES else factor
        s = 1 / s if invert else s
        operands = ((x._hidden * s).to(x._hidden.dtype), x._weight, None if x._bias is None else x._bias * s)
        return x.derive(how, operands=operands, copies=1)
    if _per_class(x, factor):  # a learned scale for each class: on the weight
        s = factor.reshape(-1)
        s = 1 / s if invert else s
        weight = (x._weight * s.unsqueeze(-1)).to(x._weight.dtype)
        bias = None if x._bias is None else (x._bias * s).to(x._bias.dtype)
        return x.derive(how, operands=(x._hidden, weight, bias), copies=1)
    return NotImplemented


def _per_class(x: Any, other: Any) -> bool:
    """Whether ``other`` has a number for each class and is the same for every row."""
    if not isinstance(other, Tensor) or isinstance(other, LazyLogits) or not _row_major(x) or x._form.cap is not None:
        return False
    if is_dtensor(x._weight):
        return False
    if other.dim() == 0 or other.dim() > x._hidden.dim() or other.numel() != other.shape[-1]:
        return False
    same_device = other.device == x._hidden.device
    kept = other.is_floating_point() and torch.promote_types(x._form.dtype, other.dtype) is x._form.dtype
    return same_device and kept and other.shape[-1] == x._weight.shape[0]


@_implements("tanh")
def _tanh(func: Any, x: Any) -> Any:
    return NotImplemented if x._form.cap is not None else x.derive(torch.tanh, cap=1.0, copies=1)


@_implements("add", "__add__", "__radd__")
def _add(func: Any, x: Any, other: Any) -> Any:
    """A bias that torch adds afterwards."""
    if not isinstance(x, LazyLogits):
        x, other = other, x
    base = x._hidden.dtype
    if not _per_class(x, other) or torch.promote_types(base, other.dtype) is not base:
        return NotImplemented
    more = other.reshape(-1).to(base) / x._form.scale
    bias = more if x._bias is None else x._bias + more
    return x.derive(lambda z: z + other, operands=(x._hidden, x._weight, bias), copies=1)


@_implements("sub", "subtract", "__sub__")
def _sub(func: Any, x: Any, other: Any) -> Any:
    """A prior's logarithm, for instance."""
    return _add(func, x, -other) if isinstance(other, Tensor) and not isinstance(other, LazyLogits) else NotImplemented


@_implements("neg", "negative", "__neg__")
def _neg(func: Any, x: Any) -> Any:
    return _scaled(x, -1.0, torch.neg)


# ------------------------------------------------------------------------- classes that are ruled out; changes in place


class _Replaced(torch.autograd.Function):
    """Gives a tensor without memory the place in the graph of another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0]


def _in_place(x: Any, derive: Callable[[], Any]) -> Any:
    """``x`` becomes what ``derive`` makes of it, if no other lazy tensor shares its memory or was derived from it."""
    if not isinstance(x, LazyLogits) or x.looked_at or not _alone(x):
        return NotImplemented
    with DisableTorchFunction():
        if x.requires_grad and not torch.is_grad_enabled():  # torch changes values there, and no derivative
            return NotImplemented
    other = derive()
    if not isinstance(other, LazyLogits) or other._form.dtype is not x._form.dtype:
        return NotImplemented
    before, how = x._how, other._how
    x._how, x._form = lambda base: how(before(base)), replace(other._form, copies=x._form.copies)
    x._hidden, x._weight, x._bias, x._logsumexp = other._hidden, other._weight, other._bias, None
    with DisableTorchFunction():
        if other.requires_grad:
            _Replaced.apply(x, other)
    return x


def _filled(x: Any, where: Tensor | None, value: Any, how: Callable[[Tensor], Any]) -> Any:
    """``x`` with ``value`` for the classes ``where``, whose rows of the weight become 0 and whose bias ``value``."""
    if where is None or x.looked_at or is_dtensor(x._weight) or type(value) not in (int, float):
        return NotImplemented
    weight, bias = x._weight, x._bias
    if x._form.cap is not None or x._form.scale != 1 or torch.tensor(float(value), dtype=weight.dtype).item() != value:
        return NotImplemented
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    operands = x._hidden, weight.masked_fill(where.unsqueeze(-1), 0), bias.masked_fill(where, value)
    return x.derive(how, operands=operands, copies=1)


def _alone(x: LazyLogits) -> bool:
    """Whether torch would have given ``x`` memory of its own, of which no other lazy tensor knows."""
    own = x._parent is None or x._form.copies > cast(LazyLogits, x._parent)._form.copies
    others: list[Any] = [r for ref in x._family if (r := ref()) is not None and r is not x]
    while own and others:
        origins = [
            getattr(r, "_logits", None) if r._parent is None else r._parent for r in others
        ]  # log-probabilities'
        others = [r for r in origins if isinstance(r, Lazy)]
        own = all(r is not x for r in others)
    return own


def _classes_of_mask(x: Any, mask: Any) -> Tensor | None:
    """The mask as [classes], if it is the same for every row."""
    if not _row_major(x) or type(mask) is not Tensor or mask.dtype is not torch.bool or mask.dim() == 0:
        return None
    if mask.dim() > x._hidden.dim() or not mask.numel() == mask.shape[-1] == x._weight.shape[0]:
        return None
    return mask.reshape(-1) if mask.device == x._hidden.device else None


def _classes_at(x: Any, key: Any) -> Tensor | None:
    """A mask [classes] of those that an index of classes names; None: it is none, or out of range."""
    device, classes = x._hidden.device, x._weight.shape[0]
    if isinstance(key, Tensor) and (type(key) is not Tensor or key.device != device or key.dim() > 1):
        return None
    if isinstance(key, Tensor) and key.dtype is torch.bool:
        return key.clone() if key.shape == (classes,) else None
    try:
        where = torch.zeros(classes, dtype=torch.bool, device=device)
        where[key] = True
    except (IndexError, TypeError, ValueError, RuntimeError):
        return None  # torch says so in its own words
    return where


@_implements("masked_fill")
def _masked_fill(func: Any, x: Any, mask: Any, value: Any) -> Any:
    return _filled(x, _classes_of_mask(x, mask), value, lambda z: z.masked_fill(mask, value))


@_implements("where")
def _where(func: Any, condition: Any, *others: Any) -> Any:
    if len(others) != 2 or isinstance(condition, LazyLogits):
        return NotImplemented
    lazy, value = others
    if isinstance(value, LazyLogits):
        lazy, value = value, lazy
        return _filled(lazy, _classes_of_mask(lazy, condition), value, lambda z: func(condition, value, z))
    where = _classes_of_mask(lazy, condition)
    return _filled(lazy, None if where is None else ~where, value, lambda z: func(condition, z, value))


@_implements("index_fill")
def _index_fill(func: Any, x: Any, dim: Any, index: Any, value: Any) -> Any:
    if not _row_major(x) or dim not in (-1, x._form.classes) or not isinstance(index, Tensor):
        return NotImplemented
    return _filled(x, _classes_at(x, index), value, lambda z: z.index_fill(dim, index, value))


@_implements("__setitem__")
def _setitem(func: Any, x: Any, key: Any, value: Any) -> Any:
    """The same classes of every row: an image's tokens, a padded vocabulary."""
    keys = list(key) if isinstance(key, tuple) else [key]
    rows, classes = keys[:-1], keys[-1]
    whole = all(k is ... or (isinstance(k, slice) and k == slice(None)) for k in rows)
    dots = sum(k is ... for k in rows) if whole else 2
    if not _row_major(x) or dots > 1 or not (dots or len(keys) == x._hidden.dim()):
        return NotImplemented
    if not isinstance(classes, (int, slice, list, Tensor)) or isinstance(classes, bool):
        return NotImplemented
    where = _classes_at(x, classes)

    def how(z: Tensor) -> Tensor:
        return z.masked_fill(cast(Tensor, where), value)

    return NotImplemented if _in_place(x, lambda: _filled(x, where, value, how)) is NotImplemented else None


def _changing(override: Callable[..., Any]) -> Callable[..., Any]:
    """What overrides the operation that does the same in place."""

    def change(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return _in_place(x, lambda: override(func, x, *args, **kwargs))

    return change


for _names, _same in (
    ("mul_ multiply_ __imul__", _mul),
    ("div_ divide_ true_divide_ __itruediv__ __idiv__", _div),
    ("add_ __iadd__", _add),
    ("sub_ subtract_ __isub__", _sub),
    ("tanh_", _tanh),
    ("masked_fill_", _masked_fill),
    ("index_fill_", _index_fill),
):
    _implements(*_names.split())(_changing(_same))


@_implements("register_hook")
def _register_hook(func: Any, x: Any, hook: Any) -> Any:
    """Whoever wants the gradient by the logits gets one: their losses are not fused from here on."""
    if x._made is not None:
        return x._made.register_hook(hook)
    x._hooks.append(lambda made: made.register_hook(hook))
    with DisableTorchFunction():
        return x.register_hook(hook)


@_implements("retain_grad")
def _retain_grad(func: Any, x: Any) -> Any:
    x.make("retain_grad").retain_grad()


# ------------------------------------------------------------------------------------------------------------ losses


def _loss(
    func: Any,
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int | Sequence[int] = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    logit_scale: Any = 1.0,
    sample_weight: Tensor | None = None,
    class_dim: int | None = None,
    return_stats: bool = False,
    inplace_grad: bool = False,  # there is nothing whose memory it could take
    grad_in_forward: bool | None = None,
    zero_times_inf: str = "nan",
    counted: bool = True,
    row_map: tuple[int, tuple[float, ...]] | None = None,
    **ours: Any,
) -> Any:
    """A cross entropy of lazy logits is one of hidden states and weight.

    ``counted``: in the report, as a loss. ``row_map``: number and parameters of what each row's nll is mapped by.
    """
    x, others = input, (target, weight, sample_weight)
    if not isinstance(x, LazyLogits) or any(isinstance(t, LazyLogits) for t in others) or x.looked_at:
        return NotImplemented
    if not isinstance(target, Tensor) or zero_times_inf != "nan":
        return NotImplemented
    form, hidden, dims = x._form, x._hidden, x._hidden.dim()
    axis = 0 if dims == 1 else 1 if class_dim is None else class_dim % dims
    with DisableTorchFunction():
        rows, dtype = [n for i, n in enumerate(x.shape) if i != form.classes], x.dtype
        soft = target.shape == x.shape
    if axis != form.classes or not (soft or list(target.shape) == rows) or 0 in (*rows, *hidden.shape):
        return NotImplemented  # the loss itself knows what to say of wrong shapes
    if sample_weight is not None and list(sample_weight.shape) != rows:
        return NotImplemented
    if not soft:
        ours["ignore_index"] = ignore_index
    elif max(_rowwise.ignore_indices("cross_entropy", ignore_index)) >= 0:
        return NotImplemented
    scale = form.scale
    if form.cap is not None:
        if softcap is not None or not _number(logit_scale) or logit_scale <= 0:
            return NotImplemented
        softcap = form.cap
        scale *= form.cap
        if logit_scale != 1:
            softcap, scale = softcap * logit_scale, scale * logit_scale
    elif not _number(logit_scale):
        return NotImplemented
    else:
        scale *= logit_scale
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    x.require_unchanged()
    wanted = autocast_dtype(torch.promote_types(dtype, target.dtype) if soft else dtype, hidden.device)
    if hidden.dtype not in HALVES and wanted is not hidden.dtype:
        return NotImplemented  # float32 logits made double
    if soft and isinstance(weight, Tensor):
        wanted = torch.promote_types(wanted, weight.dtype)
    ours |= {"softcap": softcap} if softcap is not None else {}
    ours |= {"logit_scale": scale} if scale != 1 else {}
    ours |= {"sample_weight": sample_weight.reshape(-1)} if sample_weight is not None else {}
    ours |= {"return_stats": True} if return_stats else {}
    chunks = Chunking(x._state.options)
    flat = hidden.movedim(form.classes, -1).reshape(-1, hidden.shape[form.classes])
    if soft:
        target = target.movedim(form.classes, -1)
    target = target.reshape(-1, x._weight.shape[0]) if soft else target.reshape(-1)
    of_loss = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing, **ours}
    # A loss that is to be float32 over logits of 16 bits: what autocast does.
    with autocast(hidden.device, hidden.dtype if hidden.dtype in HALVES and wanted not in HALVES else None):
        if row_map is None:
            bias, options = x._bias, chunks.options
            result = linear_cross_entropy(flat, x._weight, target, linear_bias=bias, options=options, **of_loss)
        else:
            ignored, name = of_loss.pop("ignore_index", None), func.__name__
            result = run(name, flat, x._weight, x._bias, target, Given(**of_loss), chunks, ignored, *row_map)
    if counted:
        _count(x, wanted)
    loss, stats = result if return_stats else (result, None)
    if form.placed is None and is_dtensor(x._weight):
        loss = loss.full_tensor()
        stats = None if stats is None else CrossEntropyStats(*(cast(Any, t).full_tensor() for t in stats))
    loss = loss.to(ours.get("loss_dtype") or wanted)
    if reduction == "none":
        loss = loss.reshape(rows)
    if stats is None:
        return loss
    lse, argmax, accuracy, entropy = stats
    return loss, CrossEntropyStats(lse.reshape(rows), argmax.reshape(rows), accuracy, entropy.reshape(rows))


def _mapped_loss(func: Any, input: Any, target: Any, **options: Any) -> Any:
    """A loss that maps each row's nll."""
    name = func.__name__
    values = [options.pop(parameter) for parameter in _row_map.PARAMETERS[name]]
    if not all(map(_number, values)) or not _row_map.LOSSES[name].takes(*values):
        return NotImplemented  # the loss itself says what is wrong
    row_map = _row_map.NUMBERS[name], tuple(map(float, values))
    return _loss(func, input, target, row_map=row_map, **options)


def _count(x: LazyLogits, dtype: torch.dtype) -> None:
    """One more loss in the report, without logits, their copies, log-probabilities and these's gradient."""
    with DisableTorchFunction():
        size = x.numel() * dtype.itemsize
    x._step.fused += 1
    x._step.bytes_not_allocated += size * (x._form.copies + 2)


LazyLogits._overrides[_TORCHS_CROSS_ENTROPY] = LazyLogits._overrides[cross_entropy] = _loss
for _name in _row_map.LOSSES:
    LazyLogits._overrides[getattr(import_module(f"fastloss.losses.{_name}"), _name)] = _mapped_loss


def _token_log_probs(
    func: Any,
    logits: Any,
    index: Any,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> Any:
    """Log-probabilities and entropies from hidden states and weight."""
    x = logits
    if not _row_major(x) or x.looked_at or isinstance(index, LazyLogits) or 0 in x._hidden.shape:
        return NotImplemented
    form = x._form
    wide = form.dtype is x._hidden.dtype or (form.dtype is torch.float32 and x._hidden.dtype in HALVES)
    if not wide or form.scale <= 0 or (form.cap is not None and softcap is not None):
        return NotImplemented
    x.require_unchanged()
    # c tanh(s z / c) / T is c' tanh(z / c') / T' with c' = c / s and T' = T / s.
    temperature = temperature / form.scale
    if form.cap is not None:
        softcap, temperature = 1 / form.scale, temperature / form.cap
    elif softcap is not None:
        softcap = softcap / form.scale
    chunk = getattr(x._state.options, "batch_chunk_size", None)
    budget = 2 * chunk * x._weight.shape[0] * x._hidden.element_size() if chunk else None
    with autocast(x._hidden.device, None):
        result = linear_token_log_probs(
            x._hidden,
            x._weight,
            index,
            bias=x._bias,
            temperature=temperature,
            softcap=softcap,
            return_entropy=return_entropy,
            memory_budget=budget,
            ignore_index=ignore_index,
        )
    _count(x, form.dtype)
    if form.placed is None and is_dtensor(x._weight):
        result = tuple(t.full_tensor() for t in result) if return_entropy else result.full_tensor()
    return result


LazyLogits._overrides[token_log_probs] = _token_log_probs


@_implements("argmax")
def _argmax(func: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Which class is largest, as for an accuracy."""
    if not isinstance(x, LazyLogits) or x.looked_at or not isinstance(dim, int):
        return NotImplemented
    axis, dims = x._form.classes, x._hidden.dim()
    if not -dims <= dim < dims or dim % dims != axis:
        return NotImplemented
    with DisableTorchFunction():
        rows = [n for i, n in enumerate(x.shape) if i != axis]
    target = torch.zeros(rows, dtype=torch.int64, device=x._hidden.device)
    with torch.no_grad():
        found = _loss(cross_entropy, x, target, reduction="sum", class_dim=axis, return_stats=True, counted=False)
    if found is NotImplemented:
        return NotImplemented
    return found[1].argmax.unsqueeze(axis) if keepdim else found[1].argmax


# -------------------------------------------------------------------------- log-probabilities as a difference, by hand


@_implements("gather")
def _gather(func: Any, x: Any, dim: Any, index: Any, **kwargs: Any) -> Any:
    """Logits of a few classes for each row: products of hidden states and rows of the weight."""
    if not _row_major(x) or x.looked_at or kwargs or type(dim) is not int or type(index) is not Tensor:
        return NotImplemented
    if is_dtensor(x._weight):  # each rank has some of its rows
        return NotImplemented
    hidden, dims = x._hidden, x._hidden.dim()
    fits = index.dtype is torch.int64 and index.shape[:-1] == hidden.shape[:-1] and index.dim() == dims
    # No more numbers than the logits have.
    if not fits or dim not in (-1, dims - 1) or index.shape[-1] * hidden.shape[-1] > x._weight.shape[0]:
        return NotImplemented
    x.require_unchanged()
    try:
        return _logits_at(x, index)
    except IndexError:
        return NotImplemented  # torch says so in its own words


def _logits_at(x: LazyLogits, index: Tensor) -> Tensor:
    """[..., K] for classes [..., K], rounded as the logits of a chunk are."""
    hidden, form = x._hidden, x._form
    wide = accum_dtype(hidden.dtype)
    with autocast(hidden.device, None):
        z = (hidden.to(wide).unsqueeze(-2) * F.embedding(index, x._weight).to(wide)).sum(-1)
        if x._bias is not None:
            z = z + x._bias[index]
        z = z.to(chunk_dtype(hidden.device, hidden.dtype, x._weight.numel())).to(form.dtype) * form.scale
        return z if form.cap is None else form.cap * torch.tanh(z)


@_implements("logsumexp")
def _log_sum_exp(func: Any, x: Any, dim: Any, keepdim: Any = False) -> Any:
    """Over the classes. Of rows that are iterated over, for all of them at once."""
    if not _row_major(x) or x.looked_at or 0 in x._hidden.shape or keepdim not in (False, True):
        return NotImplemented
    if is_dtensor(x._weight):  # the derivative takes rows of it
        return NotImplemented
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if type(dim) is not int or dim not in (-1, x._form.classes):
        return NotImplemented
    if x._of_whole is not None and not x._of_whole[0].looked_at:
        whole, place = x._of_whole
        found = _log_sum_exp(func, whole, -1)
        lse = found if found is NotImplemented else found[place]
    else:
        lse = _of_rows(x)
    return lse if lse is NotImplemented or not keepdim else lse.unsqueeze(-1)


def _of_rows(x: LazyLogits) -> Any:
    """The value is a statistic of the loss; its derivative that of the loss of a class plus the logit of this class."""
    x.require_unchanged()
    kept = x._logsumexp
    if kept is not None and kept.requires_grad == (torch.is_grad_enabled() and x.requires_grad):
        return kept
    with DisableTorchFunction():
        rows = list(x.shape[:-1])
    first = torch.zeros(rows, dtype=torch.int64, device=x._hidden.device)
    found = _loss(cross_entropy, x, first, reduction="none", class_dim=x._form.classes, return_stats=True)
    if found is NotImplemented:
        return NotImplemented
    nll, stats = found
    x._logsumexp = attach(stats.lse.to(x._form.dtype), nll + _logits_at(x, first.unsqueeze(-1)).squeeze(-1))
    return x._logsumexp
