"""Puts fastloss behind torch.nn.functional, and so behind torch.nn and every library that calls it."""

import atexit
import contextlib
import functools
import importlib.abc
import importlib.machinery
import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from . import _by_hand, functional
from ._arguments import is_dtensor, unsupported
from ._library import DTYPE_CODES
from ._subclasses import handled, heeded, mode_active, overrides
from .head import lazy_log_probs
from .head.lazy import Lazy

_originals: dict[tuple[Any, str], Callable[..., Any]] = {}  # by module or class, and name
_lock = threading.RLock()

# Losses of torch.nn.functional that fastloss has not; linear and embedding layers with a loss in them are none.
_LACKING = tuple(
    name
    for name in (
        "binary_cross_entropy",
        "ctc_loss",
        "gaussian_nll_loss",
        "hinge_embedding_loss",
        "kl_div",
        "margin_ranking_loss",
        "multilabel_margin_loss",
        "poisson_nll_loss",
        "soft_margin_loss",
        "triplet_margin_with_distance_loss",
    )
    if name not in functional.__all__
)


# Losses that know DTensors.
_DISTRIBUTED = ("cross_entropy", "linear_cross_entropy")


def takes(args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "") -> str | None:
    """None if fastloss takes a call of the loss ``name`` with these arguments, else why not."""
    first = kwargs.get("input")
    tensors = [a for a in (first, *args, *kwargs.values()) if isinstance(a, Tensor)]
    if not tensors:
        return "no tensor among the arguments"
    for t in tensors:
        if (t is tensors[0] or t.is_floating_point() or t.is_complex()) and t.dtype not in DTYPE_CODES:
            return f"dtype {t.dtype}: fastloss takes float32, float64, float16 and bfloat16"
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace, whose graph is to run without fastloss"
    if name in _DISTRIBUTED and is_dtensor(*tensors[:2]) and not torch.compiler.is_compiling():
        tensors = [t.to_local() if is_dtensor(t) else t for t in tensors]  # type: ignore[attr-defined]
    return unsupported(*tensors)


# ----------------------------------------------------------------------------------------------------------- the report


class _Tally:
    """A count that threads may raise at once, at the price of one call."""

    def __init__(self) -> None:
        self._ticks, self._reads = itertools.count(), 0
        self.add: Callable[[], int] = self._ticks.__next__

    def value(self) -> int:
        with _lock:
            self._reads += 1
            return next(self._ticks) - self._reads + 1


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch_report` returns; ``print`` it.

    Attributes:
        served: how many calls fastloss took, by torch's function, or by another package's and its class
            (``timm.LabelSmoothingCrossEntropy``).
        declined: how many went to torch, or were left to that class, by the same names, then by the reason.
        lacking: how many calls of losses that fastloss has not; counted under ``patch(report=True)``.
    """

    served: dict[str, int] = field(default_factory=dict)
    declined: dict[str, dict[str, int]] = field(default_factory=dict)
    lacking: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {count} served" for name, count in self.served.items()]
        lines += [
            f"{name}: {count} left to torch ({reason})"
            for name, reasons in self.declined.items()
            for reason, count in reasons.items()
        ]
        lines += [f"{name}: {count} torch's, fastloss has no such loss" for name, count in self.lacking.items()]
        lines = lines or ["no call of a loss that fastloss has"]
        return "fastloss.patch(): " + ("; ".join(lines) if len(lines) == 1 else "\n  ".join(["", *lines]).lstrip(" "))


_served: dict[str, _Tally] = {}
_declined: dict[str, dict[str, _Tally]] = {}
_lacking: dict[str, _Tally] = {}


def patch_report() -> PatchReport:
    """What :func:`patch` has done since it came into force: calls that fastloss served, by function; calls that it left
    to torch, with the reasons; under ``patch(report=True)`` also calls of losses that fastloss has not.

    After :func:`unpatch` it is what the last patch did. Calls within programs of torch.compile are not counted.

    Example::

        >>> with fastloss.patch():
        ...     train(model)
        >>> print(fastloss.patch_report())
        fastloss.patch(): cross_entropy: 400 served
    """
    with _lock:
        declined = {name: {r: t.value() for r, t in list(reasons.items())} for name, reasons in _declined.items()}
        return PatchReport(
            {name: count for name, tally in _served.items() if (count := tally.value())},
            {name: reasons for name, reasons in declined.items() if reasons},
            {name: count for name, tally in _lacking.items() if (count := tally.value())},
        )


def _decline(name: str, reason: str) -> None:
    if not torch.compiler.is_compiling():
        _declined[name].setdefault(reason, _Tally()).add()


# ------------------------------------------------------------------------------------------------------------- patching


def _behind(name: str, original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    served = _served[name]

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if mode_active():  # it is shown this function, and calls it
            return original(*args, **kwargs)
        reason = takes(args, kwargs, name)
        if heeded():
            overloaded = [a for a in (*args, *kwargs.values()) if overrides(a)]
            if any(isinstance(a, Lazy) for a in overloaded):  # it knows, and calls fastloss or torch
                served.add()
                return handle_torch_function(original, overloaded, *args, **kwargs)
            if overloaded and (reason is not None or torch.compiler.is_compiling()):
                # torch's own function would hand over what it finds under its name, which is this one.
                _decline(name, reason or "a tensor subclass under torch.compile")
                return handle_torch_function(original, overloaded, *args, **kwargs)
            if overloaded:
                return handled(original, call, overloaded, args, kwargs)
        if reason is None:
            if not torch.compiler.is_compiling():
                served.add()
            return ours(*args, **kwargs)
        _decline(name, reason)
        return original(*args, **kwargs)

    # What torch.jit.script compiles instead. torch.compile, which heeds the mark of torch.jit.script_if_tracing, does
    # not heed this one.
    call.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
    return call


def _counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """torch's function, its calls counted."""
    tally = _lacking[name] = _Tally()

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            tally.add()
        return original(*args, **kwargs)

    call.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
    return call


# ------------------------------------------------------------------------------------------- losses of other packages

_PLACES = {module for module, _ in _by_hand.FUNCTIONS} | {entry.module for entry in _by_hand.CLASSES}
_imported: list[tuple[str, str, Callable[..., Any], Callable[..., Any]]] = []  # package, name, theirs, ours


def _in_place_of(entry: _by_hand.ByHand, original: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a class that computes its loss by hand."""
    name, served = entry.name, _served[entry.name]

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # its parts become kernels of the program
            return original(self, *args, **kwargs)
        given = [*args, *kwargs.values()]
        flat = [t for a in given for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if any(isinstance(t, Lazy) for t in flat):  # its parts know these
            return original(self, *args, **kwargs)
        if mode_active():
            result: Any = "under a mode of torch.overrides, which is to see its parts"
        else:
            result = takes(tuple(flat), {}) or entry.why_not(self, flat) or entry.serve(self, *args, **kwargs)
        if isinstance(result, str):
            _decline(name, result)
            return original(self, *args, **kwargs)
        served.add()
        return result

    return call


def _modules_with(package: str, name: str, function: Callable[..., Any]) -> list[Any]:
    """Those of the package that are imported and have the function, under its name."""
    modules = [module for path, module in list(sys.modules.items()) if path.partition(".")[0] == package]
    return [module for module in modules if vars(module).get(name) is function]


def _reach(module: ModuleType) -> None:
    """Serves what the module, which is imported, defines."""
    path = module.__name__
    package = path.partition(".")[0]
    for where, name in _by_hand.FUNCTIONS:
        theirs = getattr(module, name, None) if where == path else None
        if theirs is not None:
            _served[name], _declined[name] = _Tally(), {}
            ours = _behind(name, theirs, getattr(functional, name))
            _imported.append((package, name, theirs, ours))
            for holder in _modules_with(package, name, theirs):
                setattr(holder, name, ours)
    for entry in _by_hand.CLASSES:
        owner = getattr(module, entry.owner, None) if entry.module == path else None
        method = vars(owner).get(entry.method) if owner is not None else None
        if method is not None and list(inspect.signature(method).parameters) == entry.parameters:
            _served[entry.name], _declined[entry.name] = _Tally(), {}
            _replace([owner], entry.method, _in_place_of(entry, method))


class _Imports(importlib.abc.MetaPathFinder):
    """Has a module of _PLACES that is imported under the patch reached as soon as it is there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in _PLACES:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(name, path, target)) is not None), None)
        loader: Any = None if spec is None else spec.loader
        run = getattr(loader, "exec_module", None)
        if run is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            with _lock:
                if _holders:
                    _reach(module)

        with contextlib.suppress(AttributeError):  # a loader without a place for it
            loader.exec_module = exec_module
        return spec


_IMPORTS = _Imports()


# ------------------------------------------------------------------------------------------- the patch while it is held

_holders: set["_Patched"] = set()  # the patch is in force while there is one


class _Patched:
    """What :func:`patch` returns: as a context manager it ends its hold on the patch when the block is left."""

    def __init__(self, report: bool, log_softmax: bool) -> None:
        self.report, self.log_softmax, self._entered = report, log_softmax, 0

    def __enter__(self) -> "_Patched":
        with _lock:
            self._entered += 1
            _hold(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            self._entered -= 1
            if not self._entered:
                _release(self)


# log_softmax of torch.nn.functional, torch and Tensor, which inherits it: what stood there, or None for nothing.
_HOLDERS = ((F, "log_softmax"), (torch, "log_softmax"), (Tensor, "log_softmax"))
_log_softmaxes: list[Callable[..., Any] | None] = []


def _lazily(holder: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """log_softmax that is lazy where that pays."""
    bind = _functional_log_softmax if holder is F else _log_softmax

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("input")
        small = isinstance(x, Tensor) and x.numel() < lazy_log_probs.FEWEST_LOGITS
        if not small:
            with contextlib.suppress(TypeError):  # out=, names of dimensions, mistakes
                lazy = lazy_log_probs.log_softmax(*bind(*args, **kwargs))
                if lazy is not None:
                    return lazy
        # F's own ends in Tensor's; a mode makes the call once more; a lazy head's logits say what becomes of them.
        if holder is not F and not mode_active() and not isinstance(x, Lazy):
            few = f"of fewer than {lazy_log_probs.FEWEST_LOGITS:,} elements, which torch makes at once"
            _decline("log_softmax", few if small else "called in a form that torch makes at once")
        return original(*args, **kwargs)

    call.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
    return call


def _functional_log_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> tuple[Any, ...]:
    return input, dim, dtype


def _log_softmax(input: Any, dim: Any, dtype: Any = None) -> tuple[Any, ...]:
    return input, dim, dtype


def _report_log_softmax(made_by: str | None) -> None:
    if "log_softmax" not in _served:  # of a patch that has ended
        return
    if made_by is None:
        _served["log_softmax"].add()
    else:
        _decline("log_softmax", f"{made_by} needs all log-probabilities")


def _hold_log_softmax() -> None:
    _served["log_softmax"], _declined["log_softmax"] = _Tally(), {}
    lazy_log_probs.report = _report_log_softmax
    for holder, name in _HOLDERS:
        original = getattr(holder, name)
        _log_softmaxes.append(original if name in vars(holder) else None)
        setattr(holder, name, _lazily(holder, original))


def _release_log_softmax() -> None:
    for (holder, name), original in zip(_HOLDERS, _log_softmaxes, strict=True):
        if original is None:
            delattr(holder, name)
        else:
            setattr(holder, name, original)
    _log_softmaxes.clear()


def _hold(holder: _Patched) -> None:
    if not _originals:
        for tallies in (_served, _declined, _lacking):
            tallies.clear()
        for name in functional.__all__:
            if hasattr(F, name):
                _served[name], _declined[name] = _Tally(), {}
                _replace([F], name, _behind(name, getattr(F, name), getattr(functional, name)))
        for module in _PLACES & sys.modules.keys():
            _reach(sys.modules[module])
        sys.meta_path.insert(0, _IMPORTS)
    if holder.report and not _lacking:
        for name in _LACKING:
            if hasattr(F, name):
                _replace([F], name, _counting(name, getattr(F, name)))
    if holder.log_softmax and not _log_softmaxes:
        _hold_log_softmax()
    _holders.add(holder)


def _replace(modules: Iterable[Any], name: str, function: Callable[..., Any]) -> None:
    for module in modules:
        _originals[module, name] = getattr(module, name)
        setattr(module, name, function)


def _release(holder: _Patched) -> None:
    if holder not in _holders:
        return
    _holders.remove(holder)
    if holder.report:
        print(patch_report())
    if _log_softmaxes and not any(other.log_softmax for other in _holders):
        _release_log_softmax()
    if not _holders:
        sys.meta_path.remove(_IMPORTS)
        while _imported:
            package, name, theirs, ours = _imported.pop()
            for module in _modules_with(package, name, ours):
                setattr(module, name, theirs)
        while _originals:
            (module, name), original = _originals.popitem()
            setattr(module, name, original)


def patch(report: bool = False, *, log_softmax: bool = False) -> _Patched:
    """Replace the losses of torch.nn.functional by fastloss, for torch.nn and every caller of ``F.<loss>``; and losses
    that other packages define by hand, which the page of the API reference lists: functions and classes of torchvision,
    timm, fastai, segmentation_models_pytorch, ultralytics and sentence-transformers, whether these are imported before
    or under the patch. Of such a class, an instance with options that fastloss has not computes its loss itself.

    What fastloss does not take (complex, sparse, integer, float8; other devices; subclasses that see operators, but for
    DTensors in cross entropy) goes to torch unchanged, as do torch.jit.script and torch.jit.trace, whose graphs run
    without Python. Subclasses with a ``__torch_function__`` (fastai's TensorBase) handle the call as they do torch's:
    what they leave to torch, fastloss takes. :func:`patch_report` says what happened. Names that were imported from
    torch.nn.functional before (``from ... import cross_entropy``) keep pointing at torch's own, and cannot be pickled
    meanwhile.

    A patch is in force until :func:`unpatch`, or until the ``with`` is left; of several that overlap, in threads or
    not, until the last is left::

        with fastloss.patch():
            loss = model(batch).loss

    Args:
        report: print :func:`patch_report` at the end (of the block, at :func:`unpatch` or of the program), and count
            calls of losses that fastloss has not too.
        log_softmax: make ``log_softmax`` of torch, torch.nn.functional and Tensor lazy as well, for logits of 2**20
            elements and more and of two dimensions and more (others: torch's, at once). Its result keeps the logits;
            ``gather`` of a class, ``nll_loss``, ``sum`` and ``mean`` over the classes (or over everything), of itself
            or of its product with targets, are then computed from these, and are the only tensors in memory. Any other
            operation gets the log-probabilities, made by torch, once. Logits that change in place in between raise.

    Example, label smoothing by hand without a tensor of log-probabilities::

        >>> with fastloss.patch(log_softmax=True):
        ...     logp = F.log_softmax(logits, dim=-1)
        ...     loss = -0.9 * logp.gather(-1, labels[:, None]).mean() - 0.1 * logp.mean()
    """
    holder = _Patched(report, bool(log_softmax))
    with _lock:
        _hold(holder)
    return holder


@atexit.register
def unpatch() -> None:
    """Undo :func:`patch`, whoever made it. Without a patch it does nothing."""
    with _lock:
        for holder in list(_holders):
            _release(holder)
