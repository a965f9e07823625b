"""Tensors that are not made until somebody looks: what :class:`LazyLogits` and :class:`LazyLogProbs` share.

A lazy tensor has shape, dtype and device, a place in the graph and no memory. Operations that it overrides give another
one or a fused loss; any other gets the tensor itself, made once and kept. Its *origin*, the one that it was derived
from and the operation that did it, says how torch would have made it, so that views share memory with what they are
views of, and rounding is torch's.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

DisableTorchFunction = torch._C.DisableTorchFunctionSubclass
Overrides = dict[Any, Callable[..., Any]]


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to ``dtype``, or none at all."""
    if device.type not in ("cpu", "cuda") or (dtype is None and not torch.is_autocast_enabled(device.type)):
        yield
    elif dtype is None:
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield


class Lazy(Tensor):
    """A tensor that is made when somebody looks. See the module."""

    _overrides: ClassVar[Overrides] = {}
    _parent: "Lazy | None"
    _how: Callable[[Tensor], Tensor]
    _made: Tensor | None
    _value: Tensor | None
    _hooks: "list[Callable[[Tensor], Any]]"
    _with_grad: bool
    _versions: list[tuple[Tensor, int]]
    _family: "list[weakref.ref[Lazy]]"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with DisableTorchFunction():
                return func(*args, **kwargs)
        wrapped = getattr(func, "__wrapped__", None)  # patch() wraps log_softmax
        override = cls._overrides.get(func) or cls._overrides.get(wrapped)
        if override is not None and _takes(override, func, args, kwargs):
            result = override(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return _look(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own type is that of a function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(x: Any) -> Any:
            return x.value(func.__name__) if isinstance(x, Lazy) else x

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    @property
    def looked_at(self) -> bool:
        """Whether what this one comes from was made. From then on they are what counts: they may have been
        changed in place."""
        return bool(self._made is not None or self._hooks or (self._parent is not None and self._parent.looked_at))

    def make(self, operation: str) -> Tensor:
        """The tensor itself, differentiable; the same tensor each time."""
        if self._made is None:
            self._announce(operation)
            if self._parent is None:
                self.require_unchanged()
            base = self if self._parent is None else self._parent.make(operation)
            with torch.set_grad_enabled(self._with_grad), autocast(self._device(), None):
                self._made = self._how(base)
            for hook in self._hooks:
                if self._made.requires_grad:
                    hook(self._made)
        return self._made

    def value(self, operation: str) -> Tensor:
        """The tensor itself for an operator below autograd, whose place in the graph is this tensor's own."""
        if self._made is not None:
            return self._made.detach()
        if self._value is None:
            self._announce(operation)
            if self._parent is None:
                self.require_unchanged()
            with torch.no_grad(), autocast(self._device(), None):
                self._value = self._how(self if self._parent is None else self._parent.value(operation))
        return self._value

    noted = False  # of a root: whether it was told to somebody that it is made

    def root(self) -> "Lazy":
        """The one that this one comes from."""
        return self if self._parent is None else self._parent.root()

    def _device(self) -> torch.device:
        with DisableTorchFunction():
            return self.device

    def require_unchanged(self) -> None:
        """Raises if what it would be made of is no longer what it was."""
        raise NotImplementedError

    def _announce(self, operation: str) -> None:
        """Hears that it is about to be made, by ``operation``."""
        raise NotImplementedError

    def begin(self, operands: "tuple[Tensor, ...]", parent: "Lazy | None", how: Callable[[Tensor], Tensor]) -> None:
        """Sets what all have in common. ``operands``: what a first one, without a parent, is made of."""
        self._parent, self._how = parent, how
        self._made = self._value = None
        self._hooks, self._with_grad = [], torch.is_grad_enabled()
        self._versions = versions(operands) if parent is None else parent._versions
        self._family = [] if parent is None else parent._family
        self._family.append(weakref.ref(self))


_signature = functools.cache(inspect.signature)


def _takes(override: Callable[..., Any], *call: Any) -> bool:
    """Whether it has these parameters: ``rounding_mode`` and the like are left to torch."""
    func, args, kwargs = call
    try:
        _signature(override).bind(func, *args, **kwargs)
    except TypeError:
        return False
    return True


def versions(operands: "tuple[Tensor, ...]") -> list[tuple[Tensor, int]]:
    """Of tensors that are to be as they are now."""
    return [(t, 0 if t.is_inference() else t._version) for t in operands]


def _look(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls it with the logits made."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # of a property
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    if _may_write(name, kwargs):  # what torch would have copied by now must be copied before
        for x in tree_leaves((args, kwargs)):
            for relative in x._family if isinstance(x, Lazy) else ():
                if (alive := relative()) is not None:
                    alive.make(name)
    made = [tree_map(lambda x: x.make(name) if isinstance(x, Lazy) else x, x) for x in (args, kwargs)]
    if getattr(F, name, None) is not func and getattr(func, "__module__", "") == "torch.nn.functional":
        func = getattr(F, name, func)  # fastloss.patch() may serve it
    return func(*made[0], **made[1])


_SHARING = {"__setitem__", "data", "data_ptr", "numpy", "untyped_storage", "storage", "__dlpack__", "__array__"}


def _may_write(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether it writes to its tensor, or hands out the memory."""
    dunder = name.endswith("__")
    return (
        name in _SHARING or "out" in kwargs or (name.startswith("__i") and dunder) or (name[-1] == "_" and not dunder)
    )


# ---------------------------------------------------------------------------------------- what leaves logits unmade

_PROPERTIES = """_base _version device dtype grad_fn is_cpu is_cuda is_ipu is_leaf is_maia is_meta is_mkldnn is_mps
    is_mtia is_nested is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu itemsize layout names nbytes ndim
    output_nr requires_grad retains_grad shape"""
_METHODS = """__len__ dim element_size get_device has_names is_complex is_conj is_contiguous is_floating_point
    is_inference is_neg is_same_size is_shared is_signed ndimension nelement numel size storage_offset stride"""
METADATA: set[Any] = {getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)}
METADATA |= {getattr(holder, n) for n in _METHODS.split() for holder in (Tensor, torch) if hasattr(holder, n)}


def implements(overrides: Overrides) -> Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """The decorator that registers what stands for Tensor's methods and torch's functions of some names. It gets the
    function and its arguments; NotImplemented makes the tensor."""

    def decorator(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(override: Callable[..., Any]) -> Callable[..., Any]:
            for holder in (Tensor, torch):
                for name in names:
                    if hasattr(holder, name):
                        overrides[getattr(holder, name)] = override
            return override

        return register

    return decorator
