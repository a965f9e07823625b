"""The loss under examination: one way to call functions and modules alike, and what the properties measure with."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .report import Curve, Finding
from .shrink import shrink
from .tasks import KINDS, Task

WEIGHTS = ("weight", "weights", "class_weight", "class_weights", "sample_weight", "sample_weights")
OPTIONS = ("reduction", "ignore_index", "label_smoothing", "pos_weight", *WEIGHTS)

_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_NUMBERS = re.compile(rf"\[?(?<![\w.]){_NUMBER}(?:(?:, | or ){_NUMBER})*\]?")
Total = Callable[[Tensor], Tensor]  # a scalar of a result that may be none


class NoGradientError(Exception):
    """The result does not depend differentiably on the prediction."""

    def __str__(self) -> str:
        return "the result has no gradient here, though it has one elsewhere: backward() raises"


class NotOfferedError(Exception):
    """The loss does not take an option that was tried on it: nothing is wrong with that."""


class Subject:
    """A loss, the task that it is fed with, and measurements of it.

    Every call gets fresh copies, so that a loss that overwrites its inputs spoils only what looks for that. Predictions
    are passed as non-leaf tensors, as a model's output is.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        task: Task,
        *,
        samples: int,
        seed: int,
        ignore_index: int | None,
        reference: Callable[..., Any] | None,
        shift_invariant: bool | None,
        couples_samples: bool = False,
    ) -> None:
        self.fn, self.task, self.samples, self.seed = fn, task, samples, seed
        self.couples_samples = couples_samples or task.couples_samples
        self.reference, self.shift_invariant = reference, shift_invariant
        # A weight that is a number balances terms of a loss, not samples.
        self.options = {
            name: default
            for name, default in _offered(fn)
            if name in OPTIONS and not (name in WEIGHTS and isinstance(default, (int, float)))
        }
        offered = self.options.get("ignore_index") if task.classes else None
        self.ignore_index = ignore_index if ignore_index is not None else offered
        self.curves: list[Curve] = []
        self.float32_only = False  # raises for float64: examined all the same
        self.coupled = False  # samples are seen to depend on each other
        self.unused: list[str] = []  # options of a module that have no effect
        self.needs_graph = False  # differentiates inside: cannot be called under no_grad
        self.step = 1  # numbers of samples that it takes are multiples of this
        self.differentiable = False  # whether an ordinary result has a gradient
        self.cost = 0.0  # seconds that a call with its gradient takes
        self.tick: Callable[[], None] = lambda: None  # called with every call of the loss
        self.last: tuple[Tensor, Tensor] | None = None  # the inputs of the last call
        self._shrinking = 2.0  # seconds left for it
        self._copies: dict[tuple[int, torch.device, torch.dtype], torch.nn.Module] = {}
        self._taken: dict[str, Exception | None] = {}

    # ---- effort
    def measure(self) -> None:
        """Time the loss, so that a slow one is examined with fewer calls."""
        prediction, target = self.sample()
        seconds: list[float] = []
        for _ in range(5):
            began = time.perf_counter()
            with contextlib.suppress(NoGradientError):
                self.gradient(prediction, target)
                self.differentiable = True
            seconds.append(time.perf_counter() - began)
            if min(seconds) > 0.02 and len(seconds) > 1:
                break
        self.cost = min(seconds)
        try:
            for more in (1, 2):
                self.value(*self.sample(self.samples + more))
        except Exception:  # it may want pairs, or as many of each class
            with contextlib.suppress(Exception):
                self.value(*self.sample(2 * self.samples))
                self.step = self.samples

    @property
    def effort(self) -> float:
        """1 for a loss that takes up to a millisecond, less for a slower one."""
        return min(1.0, 1e-3 / max(self.cost, 1e-9))

    def some(self, number: int, least: int = 1) -> int:
        """That many tries, or fewer with a slow loss."""
        return max(least, round(number * self.effort))

    def many(self, samples: int) -> int:
        """That many samples, or as many as a loss that is slow with samples takes some fiftieth of a second for."""
        tried = min(64, samples)
        while tried < samples:
            pair, seconds = self.sample(tried), []
            for _ in range(3):  # the fastest counts, so that a busy machine does not decide what is looked at
                began = time.perf_counter()
                self.value(*pair)
                seconds.append(time.perf_counter() - began)
            if min(seconds) > 0.02:
                break
            tried = min(2 * tried, samples)
        return tried

    # ---- inputs
    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 7919 * salt)

    def sample(self, samples: int | None = None, salt: int = 0) -> tuple[Tensor, Tensor]:
        """A random (prediction, target), float64 prediction."""
        samples = samples or self.samples
        return self.task.make(max(samples // self.step, 1) * self.step, self.generator(salt))

    def points(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Random, extreme, tied, zero and near-optimal predictions."""
        prediction, target = self.sample()
        yield "random", prediction, target
        yield "extreme", min(10.0, self.task.huge / 4) * prediction, target
        yield ("tied" if self.task.classes else "zero"), torch.zeros_like(prediction), target
        if self.task.name in ("regression", "counts"):
            yield "zero-target", prediction, torch.zeros_like(target)
        if self.task.perfect is not None:
            best = self.task.perfect(target)
            yield "near-optimal", best + 1e-3 * torch.randn(best.shape, generator=self.generator(5)).double(), target
            if not self.task.classes and self.task.decided is None:
                tied = prediction.clone()
                tied.view(-1)[::2] = best.reshape(-1)[::2]
                yield "tied", tied, target

    # ---- calls
    def raw(self, prediction: Tensor, target: Tensor, fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Whatever the loss returns, on exactly these tensors."""
        return self.call(self.linked(prediction), target, fn, **options)

    def linked(self, prediction: Tensor) -> Tensor:
        """What the loss is given."""
        return prediction if self.task.link is None else self.task.link(prediction)

    def call(self, prediction: Tensor, target: Tensor, fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """The same of what is linked already."""
        fn = fn or self.fn
        if self.needs_graph and not (prediction.requires_grad and torch.is_grad_enabled()):
            with torch.enable_grad():
                out = self.call(prediction.detach().requires_grad_(), target, fn, **options)
            outs = [
                x.detach() if isinstance(x, Tensor) else x for x in (out if isinstance(out, (tuple, list)) else [out])
            ]
            return outs if isinstance(out, (tuple, list)) else outs[0]
        if self.float32_only and prediction.dtype == torch.float64:
            target = target.float() if target.is_floating_point() else target
            options = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}
            out = self.call(prediction.float(), target, fn, **options)
            out = out[0] if isinstance(out, (tuple, list)) and out else out
            return out.double() if isinstance(out, Tensor) and out.is_floating_point() else out
        if isinstance(fn, torch.nn.Module):
            module = self._like(fn, prediction)
            if options:
                own = fn is self.fn
                fn, options = (self._configured(module, options) if own else configured(module, options)), {}
            else:
                fn = module
        if self.task.call is not None:
            return self.task.call(functools.partial(fn, **options) if options else fn, prediction, target)
        return fn(prediction, target, **options)

    def _configured(self, module: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
        given = {name: x for name, x in options.items() if self.constructs(name)}
        if given:
            tensors = [x for x in given.values() if isinstance(x, Tensor)]
            try:
                anew = rebuilt(module, given)
            except Exception as e:
                raise NotOfferedError(f"{', '.join(given)}: {e}") from e
            assert anew is not None
            module = anew.to(tensors[0].device, tensors[0].dtype) if tensors else anew
        return configured(module, {name: x for name, x in options.items() if name not in given})

    def constructs(self, option: str) -> bool:
        """Whether this option can be given to the module's constructor."""
        return self.rebuilds and option in _constructor(self.fn)

    @functools.cached_property
    def rebuilds(self) -> bool:
        """A module constructed anew, from its attributes, is the same: options can be given to the constructor."""
        if not isinstance(self.fn, torch.nn.Module) or any(True for _ in self.fn.parameters()):
            return False
        prediction, target = self.sample()
        try:
            module = self._like(self.fn, prediction)
            anew = rebuilt(module, {})
            return anew is not None and torch.equal(
                *(self.result(prediction, target, fn=m).detach() for m in (module, anew.to(prediction.dtype)))
            )
        except Exception:
            return False

    def refusal(self, e: Exception) -> bool:
        """Whether an exception for an option that was tried means that it is not offered."""
        if isinstance(e, NotOfferedError) or (isinstance(self.fn, torch.nn.Module) and not self.rebuilds):
            return True  # set behind the constructor's back
        return isinstance(e, (ValueError, NotImplementedError, KeyError, AssertionError))

    def drop_unused(self) -> None:
        """Forget a module's attribute 'reduction' if nothing depends on it: many inherit it."""
        if "reduction" not in self.options or not isinstance(self.fn, torch.nn.Module):
            return
        try:
            with torch.no_grad():
                found = [self.result(*self.sample(), reduction=r).nan_to_num() for r in ("none", "sum", "mean")]
        except Exception:  # said elsewhere
            return
        if all(torch.equal(found[0], other) for other in found[1:]):
            del self.options["reduction"]
            self.unused.append("reduction")

    def refuses(self, reduction: str) -> Exception | None:
        """What the loss raises for this reduction, which it need not offer."""
        if reduction not in self._taken:
            self._taken[reduction] = None
            try:
                self.value(*self.sample(), reduction=reduction)
            except Exception as e:
                self._taken[reduction] = e
        return self._taken[reduction]

    def _like(self, module: torch.nn.Module, prediction: Tensor) -> torch.nn.Module:
        """The module itself, or a copy whose class weights and the like go with the prediction, as after .to()."""
        device, dtype = prediction.device, prediction.dtype
        own = [*module.parameters(), *module.buffers()]
        if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in own):
            return module
        key = id(module), device, dtype
        if key not in self._copies:
            self._copies[key] = copy.deepcopy(module).to(device, dtype)
        return self._copies[key]

    def result(
        self, prediction: Tensor, target: Tensor, fn: Callable[..., Any] | None = None, **options: Any
    ) -> Tensor:
        """The same as a tensor, on copies."""
        self.tick()
        self.last = prediction, target
        if target.is_floating_point() and target.dtype == torch.float64:
            target = target.to(prediction.dtype)
        options = {k: v.to(prediction.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        out = self.raw(prediction.clone(), target.clone(), fn, **options)
        if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
            out = out[0]
        return out if isinstance(out, Tensor) else torch.as_tensor(out, dtype=torch.float64)

    def value(self, prediction: Tensor, target: Tensor, total: Total = Tensor.sum, **options: Any) -> float:
        """The result, summed if it is no scalar."""
        with torch.no_grad():
            return float(total(self.result(prediction, target, **options).double()))

    def gradient(self, prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Of the summed result by the prediction, detached."""
        return self.value_and_gradient(prediction, target, **options)[1]

    def value_and_gradient(
        self, prediction: Tensor, target: Tensor, total: Total = Tensor.sum, **options: Any
    ) -> tuple[float, Tensor]:
        leaf = prediction.detach().clone().requires_grad_()
        out = self.result(leaf, target, **options)
        grad = slope(total(out), leaf)
        return float(total(out.detach().double())), grad

    def reduced(self, reduction: str) -> dict[str, Any]:
        """Options that ask for this reduction, if the loss has any."""
        return {"reduction": reduction} if "reduction" in self.options and not self.refuses(reduction) else {}

    def weight_forms(self) -> Iterator[tuple[str, str, Callable[[Tensor, Tensor], tuple[int, ...]]]]:
        """(option, what it weights, (prediction, target) -> the weight's shape), each form that may fit."""
        _, target = self.sample(1)
        for option in (o for o in self.options if o in WEIGHTS):
            if not option.startswith("sample"):
                if not self.task.classes:
                    yield option, "element", lambda p, t: tuple(p.shape)
                elif not target.is_floating_point():
                    yield option, "class", lambda p, t: (p.shape[1],)
            if not option.startswith("class"):
                yield option, "sample", lambda p, t: (len(p),)

    @functools.cached_property
    def rounds_to(self) -> torch.dtype | None:
        """float16 or float32 if values have no more digits than that though the prediction is float64."""
        values = []
        for salt in range(3):
            prediction, target = self.sample(4, salt)  # a mean over 4 samples costs no digits
            try:
                values.append(self.value(prediction, target) * (prediction.numel() // 4))
            except Exception:  # so few are not taken: said elsewhere
                return None
            values.append(values[-1] * 4 / prediction.numel())
        for dtype in (torch.float16, torch.float32):
            for kept in (values[::2], values[1::2]):
                if all(abs(v - round(v)) <= 1e-9 for v in kept if math.isfinite(v)):
                    continue  # counts
                if len({*kept}) > 1 and all(abs(v - float(torch.tensor(v).to(dtype))) <= 1e-12 * abs(v) for v in kept):
                    return dtype
        return None

    @functools.cached_property
    def level(self) -> float:
        """The size of an ordinary value."""
        try:
            value = abs(self.value(*self.sample()))
        except Exception:  # said elsewhere
            return 0.0
        return value if math.isfinite(value) else 0.0

    @functools.cached_property
    def steepness(self) -> float:
        """The largest entry of the gradient at ordinary inputs."""
        tops = [float(self.gradient(*self.sample(salt=salt)).abs().max()) for salt in range(3)]
        return max([x for x in tops if math.isfinite(x)], default=math.inf) or math.inf

    @functools.cached_property
    def shifts(self) -> bool:
        """A small constant added to all logits of a row changes nothing: softmax is meant."""
        if not self.task.classes:
            return False
        prediction, target = self.sample()
        before, after = self.value(prediction, target), self.value(prediction + 0.5, target)
        return abs(before - after) <= 1e-6 * max(abs(before), 1e-3)

    # ---- evidence
    def judged(self, test: Callable[[Tensor, Tensor], Finding], prediction: Tensor, target: Tensor) -> Finding:
        """What the test says of this input; of a fault, what it says of the smallest input found that shows it, too."""
        finding = test(prediction, target)
        if not finding.bad:
            return finding
        latest = finding

        def shows(p: Tensor, t: Tensor) -> bool:
            nonlocal latest
            found = test(p, t)
            same = _reason(found) == _reason(finding)
            latest = found if same else latest
            return same

        began = time.perf_counter()
        p, t = shrink(
            prediction.detach(),
            target,
            shows,
            classes=self.task.classes,
            plain=self.task.name in KINDS,
            seconds=min(1.0, self._shrinking),
        )
        self._shrinking = max(0.2, self._shrinking - (time.perf_counter() - began))
        return self.shown(latest, p, t)

    def shown(self, finding: Finding, prediction: Tensor, target: Tensor) -> Finding:
        """With this input, as the loss is given it."""
        inputs = {"prediction": self.linked(prediction).tolist(), "target": target.tolist()}
        dtype = str(prediction.dtype)
        return replace(finding, example={**inputs, **(finding.example or {})}, dtype=finding.dtype or dtype)


def _reason(finding: Finding) -> tuple[str, str, str]:
    """What a smaller input has to show, too: the same words, and where nan or inf was found not a number."""
    evidence = re.sub(r"[-+]?\binf\b", "nan", finding.evidence)
    return finding.status, _NUMBERS.sub("#", evidence), finding.why


def shapes(prediction: Tensor, target: Tensor) -> str:
    return f"prediction {list(prediction.shape)}, target {list(target.shape)}"


def slope(out: Any, leaf: Tensor, grad_output: Tensor | None = None, **options: Any) -> Tensor:
    """The gradient of the result with respect to the prediction, if it has any."""
    if not (isinstance(out, Tensor) and out.requires_grad):
        raise NoGradientError
    (grad,) = torch.autograd.grad(out, leaf, grad_output, allow_unused=True, **options)
    if grad is None:
        raise NoGradientError
    return grad


def _constructor(module: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of the module's constructor."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(type(module)).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p for name, p in parameters.items() if p.kind in named}


def rebuilt(module: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module | None:
    """Constructed anew with other options, the rest read from its attributes; None where they do not tell."""
    arguments = {}
    for name, p in _constructor(module).items():
        if name in options or hasattr(module, name):
            arguments[name] = options[name] if name in options else getattr(module, name)
        elif p.default is p.empty:
            return None
    return type(module)(**arguments).train(module.training)


def configured(module: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
    """The module with other attributes; the original is left alone."""
    if not options:
        return module
    inner = [m for m in module.modules() if m is not module and any(hasattr(m, name) for name in options)]
    changed = copy.deepcopy(module) if inner else copy.copy(module)
    changed.__dict__["_buffers"] = dict(changed._buffers)
    for name, option in options.items():
        old = getattr(changed, name)
        for m in changed.modules():  # also where the option was handed on to a loss inside
            if m is changed or (hasattr(m, name) and _same(getattr(m, name), old)):
                setattr(m, name, option)
    return changed


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


def _offered(fn: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(fn, torch.nn.Module):
        parameters = dict(fn.named_parameters(recurse=False))
        yield from ((name, getattr(fn, name)) for name in OPTIONS if hasattr(fn, name) and name not in parameters)
        return
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # built-in functions have none
        return
    for p in list(signature.parameters.values())[2:]:
        yield p.name, None if p.default is p.empty else p.default
