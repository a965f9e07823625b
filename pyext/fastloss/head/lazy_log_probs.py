"""Log-softmax that is not made until somebody looks: what ``fastloss.patch(log_softmax=True)`` puts behind torch's, and
what the logits of a lazy head have without it.

Programs take ``log_softmax`` and then pick a class, or weigh the classes and sum. :class:`LazyLogProbs` keeps the
logits and becomes :func:`fastloss.cross_entropy` of them: for ``gather`` of a class, ``nll_loss``, ``sum`` and ``mean``
over the classes, of itself or of its product with targets. The sum of its product with its own exponential is an
entropy, :func:`fastloss.token_log_probs`'s. Anything else gets the log-probabilities, as torch makes them, once.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .._arguments import HALVES, autocast_dtype
from .._autograd import accum_dtype, functorch_active
from .._library import DTYPE_CODES
from .._subclasses import mode_active
from ..losses._rowwise import NO_INDEX
from ..losses.cross_entropy import cross_entropy
from ..losses.nll_loss import nll_loss
from ..token_log_probs import token_log_probs
from .lazy import Lazy, Overrides, autocast, implements
from .lazy_logits import LazyLogits

# Below so many logits the log-probabilities are made at once: a tensor subclass costs more than it saves.
FEWEST_LOGITS = 1 << 20
_LOG_SOFTMAX, _TORCHS_NLL = torch.log_softmax, F.nll_loss

# Hears of every loss that was fused (None), and of the operations for which log-probabilities were made.
report: Callable[[str | None], Any] = lambda made_by: None  # noqa: E731


@dataclass(frozen=True)
class Form:
    """``sign`` times log_softmax(logits, classes) in ``dtype``, or its exponential, or the product of the two; times
    ``targets`` where there are some."""

    classes: int
    dtype: torch.dtype
    sign: int = 1
    targets: Tensor | None = None
    kind: Literal["log p", "p", "p log p"] = "log p"

    def of(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        """The tensor that this is the form of."""
        log_p = _LOG_SOFTMAX(logits, self.classes, self.dtype)
        result = log_p if self.kind == "log p" else log_p.exp() if self.kind == "p" else log_p.exp() * log_p
        result = self.sign * result
        return result if targets is None else result * targets


def _made(logits: Tensor) -> Tensor:
    """Those of a lazy head, made."""
    return logits.make("log_softmax") if isinstance(logits, Lazy) else logits


class _Origin(torch.autograd.Function):
    """Makes the tensor, which has no memory, and its place in the graph, for what does not ask __torch_function__."""

    @staticmethod
    def forward(ctx: Any, form: Form, logits: Tensor, targets: Tensor | None) -> Tensor:
        ctx.form, ctx.operands = form, (logits, targets)
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogProbs, logits.shape, dtype=form.dtype, device=logits.device
        )

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        again = torch.is_grad_enabled()
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad(), autocast(grad.device, None):
            logits, targets = ctx.operands
            operands = [
                t if t is None or again else t.detach().requires_grad_(needed)
                for t, needed in zip((_made(logits), targets), wanted, strict=True)
            ]
            result = ctx.form.of(*operands)
            inputs = [t for t, needed in zip(operands, wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(result, inputs, grad, create_graph=again))
        return (None, *(next(found) if needed else None for needed in wanted))


class LazyLogProbs(Lazy):
    """Log-probabilities that are made when somebody looks. See the module."""

    _overrides: ClassVar[Overrides] = {}
    _form: Form
    _logits: Tensor

    def _announce(self, operation: str) -> None:
        root = self.root()
        if not root.noted:
            root.noted = True
            report(operation)

    def require_unchanged(self) -> None:
        """Raises if the logits are no longer what they were."""
        if any(not t.is_inference() and t._version != version for t, version in self._versions):
            raise RuntimeError(
                "fastloss.patch(log_softmax=True): the logits changed in place since log_softmax, which was to be made "
                "of them. Change them before or not in place, or patch without log_softmax"
            )

    def derive(self, how: Callable[[Tensor], Tensor], logits: Tensor | None = None, **changes: Any) -> "LazyLogProbs":
        """Another one, which torch would make of this one by ``how``."""
        return _new(replace(self._form, **changes), self._logits if logits is None else logits, self, how)

    def loss(self, target: Tensor, **options: Any) -> Tensor:
        """Cross entropy of the logits, in the dtype of the log-probabilities."""
        self.require_unchanged()
        form, dims = self._form, self._logits.dim()
        wide = form.dtype is torch.float32 and self._logits.dtype in HALVES
        with autocast(self._logits.device, None):
            result = cross_entropy(
                self._logits,
                target,
                class_dim=form.classes if dims > 1 else None,
                loss_dtype=torch.float32 if wide else None,
                **options,
            )
        report(None)
        return cast(Tensor, result)

    def entropy(self) -> Tensor:
        """Of each row, in the dtype of the log-probabilities."""
        self.require_unchanged()
        logits, axis = self._logits, self._form.classes
        logits = logits.permute([*(i for i in range(logits.dim()) if i != axis), axis])
        index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        with autocast(logits.device, None):
            _, entropy = token_log_probs(logits, index, return_entropy=True)
        report(None)
        return cast(Tensor, entropy.to(self._form.dtype))


def _new(form: Form, logits: Tensor, parent: LazyLogProbs | None, how: Callable[[Tensor], Tensor]) -> LazyLogProbs:
    lazy = cast(LazyLogProbs, _Origin.apply(form, logits, form.targets))
    lazy._form, lazy._logits = form, logits
    lazy.begin((logits,), parent, how)
    if parent is None and isinstance(logits, Lazy):  # made before somebody writes to the logits
        lazy._family = logits._family
        lazy._family.append(weakref.ref(lazy))
    if form.targets is not None:
        lazy._versions = [*lazy._versions, (form.targets, form.targets._version)]
    return lazy


def _takes(dtype: Any, input: Tensor) -> bool:
    """Whether the fused losses give results in that dtype, as log_softmax would."""
    return dtype is None or dtype is input.dtype or (dtype is torch.float32 and input.dtype in HALVES)


def log_softmax(input: Any, dim: Any, dtype: Any) -> Any:
    """A lazy one, or None where torch should make it at once."""
    if isinstance(input, LazyLogits):
        return _of_lazy_logits(input, dim, dtype)
    if (
        torch.compiler.is_compiling()  # which cannot trace what follows
        or (type(input) is not Tensor and type(input) is not torch.nn.Parameter)
        or input.numel() < FEWEST_LOGITS
        or type(dim) is not int
        or input.dtype not in DTYPE_CODES
        or not _takes(dtype, input)
        or not -input.dim() <= dim < input.dim()
        or input.dim() < 2
        or not (input.is_cpu or input.is_cuda)
        or input.is_nested
        or input.layout is not torch.strided
        or input.is_inference()
        or functorch_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or mode_active()
        or torch._C._len_torch_dispatch_stack()
    ):
        return None
    return _begun(input, dim % input.dim(), dtype)


def _begun(input: Tensor, axis: int, dtype: torch.dtype | None) -> LazyLogProbs:
    result = dtype or (autocast_dtype(input.dtype, input.device) if input.is_cuda else input.dtype)
    logits = input if torch.is_grad_enabled() else input.detach()
    wanted = None if result is logits.dtype else result
    return _new(Form(axis, result), logits, None, lambda _: _LOG_SOFTMAX(_made(logits), axis, wanted))


def _of_lazy_logits(x: LazyLogits, dim: Any, dtype: Any) -> LazyLogProbs | None:
    """Of a lazy head's, whatever their size: with them unmade the log-probabilities are a loss from hidden states."""
    axis, dims = x._form.classes, x.dim()
    if x.looked_at or type(dim) is not int or dims < 2 or not -dims <= dim < dims or dim % dims != axis:
        return None
    if x._form.placed is not None:  # a DTensor's log-probabilities are DTensor's own
        return None
    return _begun(x, axis, dtype) if _takes(dtype, x) else None


def _method(func: Any, input: Any, dim: Any, dtype: Any = None) -> Any:
    lazy = _of_lazy_logits(input, dim, dtype)
    return NotImplemented if lazy is None else lazy


def _functional(func: Any, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _method(func, input, dim, dtype)


LazyLogits._overrides[F.log_softmax] = _functional
LazyLogits._overrides[torch.log_softmax] = LazyLogits._overrides[Tensor.log_softmax] = _method


# -------------------------------------------------------------------------------------------- what leaves them unmade

_implements = implements(LazyLogProbs._overrides)


def _lazy(x: Any, *, bare: bool = True) -> bool:
    """Whether it is a lazy one that nobody has looked at; ``bare``: log-probabilities, without targets."""
    if not isinstance(x, LazyLogProbs) or x.looked_at:
        return False
    return not bare or (x._form.targets is None and x._form.kind == "log p")


@_implements("neg", "negative", "__neg__")
def _neg(func: Any, x: Any) -> Any:
    return x.derive(torch.neg, sign=-x._form.sign) if _lazy(x, bare=False) else NotImplemented


@_implements("exp")
def _exp(func: Any, x: Any) -> Any:
    return x.derive(torch.exp, kind="p") if _lazy(x) and x._form.sign == 1 else NotImplemented


def _entropies(p: Any, log_p: Any) -> Any:
    """The product of probabilities and log-probabilities of the same logits."""
    same = p._logits is log_p._logits and p._form.dtype is log_p._form.dtype and p._form.classes == log_p._form.classes
    if not same or p.looked_at or p._form.kind != "p" or not _lazy(log_p):
        return NotImplemented
    return p.derive(lambda made: made * log_p.make("mul"), kind="p log p", sign=p._form.sign * log_p._form.sign)


@_implements("mul", "multiply", "__mul__", "__rmul__")
def _mul(func: Any, x: Any, other: Any) -> Any:
    """With a number for each class of each row, or with its own exponential."""
    if isinstance(x, LazyLogProbs) and isinstance(other, LazyLogProbs):
        return _entropies(x, other) if x._form.kind == "p" else _entropies(other, x)
    if not isinstance(x, LazyLogProbs):
        x, other = other, x
    if not _lazy(x) or type(other) is not Tensor or not other.is_floating_point() or other.is_inference():
        return NotImplemented
    logits = x._logits
    fits = other.shape == logits.shape and other.device == logits.device and other.dtype in DTYPE_CODES
    wide = torch.promote_types(x._form.dtype, other.dtype)
    if not fits or wide not in (x._form.dtype, accum_dtype(logits.dtype)) or other.layout is not torch.strided:
        return NotImplemented
    targets = other if torch.is_grad_enabled() else other.detach()
    return x.derive(lambda log_p: log_p * other, targets=targets, dtype=wide)


@_implements("detach")
def _detach(func: Any, x: Any) -> Any:
    return x.derive(Tensor.detach, logits=x._logits.detach()) if _lazy(x) else NotImplemented


@_implements("float", "to")
def _cast(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Where it is of that dtype already."""
    dtype = torch.float32 if func.__name__ == "float" else args[0] if len(args) == 1 else None
    return x if not kwargs and _lazy(x) and dtype is x._form.dtype else NotImplemented


def _last(x: Any) -> bool:
    return _lazy(x) and x._form.classes == x._logits.dim() - 1


def _reshaped(x: Any, shape: Sequence[Any]) -> Any:
    """In another shape whose last axis is the classes' as well."""
    classes = x._logits.shape[-1]
    if not shape or not all(type(n) is int for n in shape) or list(shape).count(-1) > 1:
        return NotImplemented
    rows = x._logits.numel() // classes if classes else 0
    known = 1
    for n in shape[:-1]:
        known *= 1 if n == -1 else n
    if shape[-1] == -1:
        if known != rows:
            return NotImplemented
        shape = [*shape[:-1], classes]
    if shape[-1] != classes or known == 0 or rows % known or (-1 not in shape[:-1] and known != rows):
        return NotImplemented
    logits = x._logits.reshape(shape)
    return x.derive(lambda log_p: log_p.reshape(shape), logits=logits, classes=logits.dim() - 1)


@_implements("view", "reshape")
def _view(func: Any, x: Any, *shape: Any, **kwargs: Any) -> Any:
    sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else list(shape)
    return _reshaped(x, sizes) if not kwargs and _last(x) else NotImplemented


@_implements("contiguous")
def _contiguous(func: Any, x: Any, **kwargs: Any) -> Any:
    return x.derive(Tensor.contiguous) if not kwargs and _lazy(x) else NotImplemented


@_implements("transpose", "swapaxes", "swapdims")
def _transpose(func: Any, x: Any, first: Any, second: Any) -> Any:
    if not _lazy(x) or type(first) is not int or type(second) is not int:
        return NotImplemented
    dims = x._logits.dim()
    order = list(range(dims))
    order[first], order[second] = order[second], order[first]
    return _permuted(x, order)


@_implements("permute")
def _permute(func: Any, x: Any, *dims: Any) -> Any:
    flat = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else list(dims)
    if not _lazy(x) or not all(type(d) is int for d in flat):
        return NotImplemented
    return _permuted(x, [d % x._logits.dim() for d in flat])


def _permuted(x: Any, order: list[int]) -> Any:
    if sorted(order) != list(range(x._logits.dim())):
        return NotImplemented
    logits = x._logits.permute(order)
    return x.derive(lambda log_p: log_p.permute(order), logits=logits, classes=order.index(x._form.classes))


@_implements("__getitem__")
def _getitem(func: Any, x: Any, key: Any) -> Any:
    """Of rows: slices and numbers."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if not _last(x) or any(k is not ... and type(k) not in (int, slice) for k in keys) or keys.count(...) > 1:
        return NotImplemented
    dims = x._logits.dim()
    used = sum(k is not ... for k in keys)
    at = keys.index(...) if ... in keys else len(keys)
    full = [*keys[:at], *[slice(None)] * (dims - used), *keys[at + 1 :]]
    if used > dims or full[-1] != slice(None):
        return NotImplemented
    logits = x._logits[key]
    return x.derive(lambda log_p: log_p[key], logits=logits, classes=logits.dim() - 1)


# ------------------------------------------------------------------------------------------------------------ losses


@_implements("gather")
def _gather(func: Any, x: Any, dim: Any, index: Any, **kwargs: Any) -> Any:
    """Of one class for each row."""
    if not _lazy(x) or kwargs or type(dim) is not int or type(index) is not Tensor or index.dtype is not torch.int64:
        return NotImplemented
    axis, shape = x._form.classes, list(x._logits.shape)
    shape[axis] = 1
    if dim % len(shape) != axis or list(index.shape) != shape:
        return NotImplemented
    try:
        nll = x.loss(index.squeeze(axis), reduction="none", ignore_index=NO_INDEX)
    except IndexError:
        return NotImplemented  # torch says so in its own words
    return (nll if x._form.sign < 0 else -nll).unsqueeze(axis)


def _nll_loss(
    func: Any,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    if not _lazy(input) or not (size_average is reduce is None) or input._form.classes != 1:
        return NotImplemented
    rows = [*input._logits.shape[:1], *input._logits.shape[2:]]
    if type(target) is not Tensor or target.is_floating_point() or list(target.shape) != rows or input._form.sign < 0:
        return NotImplemented
    if weight is not None and weight.requires_grad:
        return NotImplemented
    return input.loss(target, weight=weight, ignore_index=ignore_index, reduction=reduction)


LazyLogProbs._overrides[_TORCHS_NLL] = LazyLogProbs._overrides[nll_loss] = _nll_loss


@_implements("sum", "mean")
def _reduced(func: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Over the classes, of log-probabilities or their product with targets; or over everything."""
    if not _lazy(x, bare=False) or dtype not in (None, x._form.dtype, torch.float32) or keepdim not in (False, True):
        return NotImplemented
    if isinstance(dim, (tuple, list)):
        dim = dim[0] if len(dim) == 1 else NotImplemented
    if dim is None and keepdim:
        return NotImplemented
    form, logits = x._form, x._logits
    if dim is not None and (type(dim) is not int or not -logits.dim() <= dim < logits.dim()):
        return NotImplemented
    if dim is not None and dim % logits.dim() != form.classes:
        return NotImplemented
    classes = logits.shape[form.classes]
    if classes == 0 or logits.numel() == 0 or form.kind == "p":
        return NotImplemented
    if form.kind == "p log p":
        if dim is None or func.__name__ == "mean":
            return NotImplemented
        entropy = -form.sign * x.entropy()
        entropy = entropy if dtype is None else entropy.to(dtype)
        return entropy.unsqueeze(form.classes) if keepdim else entropy
    # Without targets each class counts 1, or 1 / C of a mean.
    share = 1.0 / classes if func.__name__ == "mean" else 1.0
    weigh = 1.0
    reduction = "none" if dim is not None else "sum" if func.__name__ == "sum" else "mean"
    if form.targets is not None:
        loss, weigh = x.loss(form.targets, reduction=reduction), share
    elif isinstance(logits, LazyLogits):  # smoothed all the way, without a target for each class
        rows = [n for i, n in enumerate(logits.shape) if i != form.classes]
        target = torch.zeros(rows, dtype=torch.int64, device=logits.device)
        loss = x.loss(target, reduction=reduction, label_smoothing=1.0, ignore_index=NO_INDEX)
        weigh = share * classes
    else:
        targets = logits.new_full((), share, dtype=form.dtype).expand(logits.shape)
        loss = x.loss(targets, reduction=reduction)
    loss = loss if form.sign < 0 else -loss
    loss = loss * weigh if weigh != 1 else loss
    loss = loss if dtype is None else loss.to(dtype)
    return loss.unsqueeze(form.classes) if keepdim else loss
