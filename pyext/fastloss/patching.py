"""Puts fastloss behind torch.nn.functional, and so behind torch.nn and every library that calls it."""

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import functional
from ._arguments import unsupported
from ._library import DTYPE_CODES

_originals: dict[str, Callable[..., Any]] = {}
_lock = threading.RLock()
_DISABLED = torch._C._disabled_torch_function_impl


def takes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """None if fastloss takes a call with these arguments, else why not."""
    first = kwargs.get("input")
    tensors = [a for a in (first, *args, *kwargs.values()) if isinstance(a, Tensor)]
    if not tensors:
        return "no tensor among the arguments"
    if has_torch_function(tensors):
        return "a tensor subclass or mode with its own __torch_function__"
    for t in tensors:
        if (t is tensors[0] or t.is_floating_point() or t.is_complex()) and t.dtype not in DTYPE_CODES:
            return f"dtype {t.dtype}: fastloss takes float32, float64, float16 and bfloat16"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace, whose graph is to run without fastloss"
    return unsupported(*tensors)


def _overrides(value: Any) -> bool:
    """Whether it is of a type with its own __torch_function__, whatever mode is on."""
    return type(value) is not Tensor and getattr(type(value), "__torch_function__", _DISABLED) is not _DISABLED


def _behind(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if takes(args, kwargs) is None:
            return ours(*args, **kwargs)
        if overloaded := [a for a in (*args, *kwargs.values()) if _overrides(a)]:
            # torch's own function would hand over what it finds under its name, which is this one; who overrides it
            # may know it by identity.
            return handle_torch_function(original, overloaded, *args, **kwargs)
        return original(*args, **kwargs)

    # What torch.jit.script compiles instead. torch.compile, which heeds the mark of torch.jit.script_if_tracing, does
    # not heed this one.
    call.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
    return call


class _Patched:
    """What :func:`patch` returns: as a context manager it undoes the patch at the end, if it made it."""

    def __init__(self, made: bool) -> None:
        self._made = made

    def __enter__(self) -> "_Patched":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._made:
            unpatch()


def patch() -> _Patched:
    """Replace the losses of torch.nn.functional by fastloss, for torch.nn and every caller of ``F.<loss>``.

    What fastloss does not take (complex, sparse, integer, float8; other devices; DTensor and other subclasses) goes to
    torch unchanged, as do torch.jit.script and torch.jit.trace, whose graphs run without Python. Names that were
    imported from torch.nn.functional before (``from ... import cross_entropy``) keep pointing at torch's own, and
    cannot be pickled meanwhile. Calling it twice changes nothing; :func:`unpatch` undoes it, as does leaving a
    ``with``::

        with fastloss.patch():
            loss = model(batch).loss
    """
    with _lock:
        if _originals:
            return _Patched(made=False)
        for name in functional.__all__:
            if hasattr(F, name):
                _originals[name] = getattr(F, name)
                setattr(F, name, _behind(_originals[name], getattr(functional, name)))
    return _Patched(made=True)


def unpatch() -> None:
    """Undo :func:`patch`. Without a patch it does nothing."""
    with _lock:
        while _originals:
            name, original = _originals.popitem()
            setattr(F, name, original)
