"""The loss under examination: one way to call functions and modules alike, and what the properties measure with."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .report import Curve, Finding
from .tasks import Task

OPTIONS = ("reduction", "weight", "sample_weight", "pos_weight", "ignore_index")


class NoGradientError(Exception):
    """The result does not depend differentiably on the prediction."""


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
    ) -> None:
        self.fn, self.task, self.samples, self.seed = fn, task, samples, seed
        self.reference, self.shift_invariant = reference, shift_invariant
        self.options = {name: default for name, default in _offered(fn) if name in OPTIONS}
        offered = self.options.get("ignore_index") if task.classes else None
        self.ignore_index = ignore_index if ignore_index is not None else offered
        self.curves: list[Curve] = []
        self._casts: dict[tuple[int, torch.dtype], torch.nn.Module] = {}

    # ---- inputs
    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 7919 * salt)

    def sample(self, samples: int | None = None, salt: int = 0) -> tuple[Tensor, Tensor]:
        """A random (prediction, target), float64 prediction."""
        return self.task.make(samples or self.samples, self.generator(salt))

    def points(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Random, extreme, tied and near-optimal predictions."""
        prediction, target = self.sample()
        yield "random", prediction, target
        yield "extreme", min(10.0, self.task.huge / 4) * prediction, target
        if self.task.classes:
            yield "tied", torch.zeros_like(prediction), target
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
        fn = fn or self.fn
        if self.task.link is not None:
            prediction = self.task.link(prediction)
        if isinstance(fn, torch.nn.Module):
            return configured(self._as_dtype(fn, prediction.dtype), options)(prediction, target)
        return fn(prediction, target, **options)

    def _as_dtype(self, module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        """The module itself, or a copy whose class weights and the like have the prediction's dtype, as after .to()."""
        own = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and t.dtype != dtype]
        if not own:
            return module
        if (id(module), dtype) not in self._casts:
            self._casts[id(module), dtype] = copy.deepcopy(module).to(dtype)
        return self._casts[id(module), dtype]

    def result(self, prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The same as a tensor, on copies."""
        if target.is_floating_point() and target.dtype == torch.float64:
            target = target.to(prediction.dtype)
        options = {k: v.to(prediction.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        out = self.raw(prediction.clone(), target.clone(), **options)
        if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
            out = out[0]
        return out if isinstance(out, Tensor) else torch.as_tensor(out, dtype=torch.float64)

    def value(self, prediction: Tensor, target: Tensor, **options: Any) -> float:
        """The result, summed if it is no scalar."""
        with torch.no_grad():
            return float(self.result(prediction, target, **options).double().sum())

    def gradient(self, prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Of the summed result by the prediction, detached."""
        return self.value_and_gradient(prediction, target, **options)[1]

    def value_and_gradient(self, prediction: Tensor, target: Tensor, **options: Any) -> tuple[float, Tensor]:
        leaf = prediction.detach().clone().requires_grad_()
        out = self.result(leaf, target, **options)
        if not out.requires_grad:
            raise NoGradientError
        (grad,) = torch.autograd.grad(out.sum(), leaf, allow_unused=True)
        if grad is None:
            raise NoGradientError
        return float(out.detach().double().sum()), grad

    def reduced(self, reduction: str) -> dict[str, Any]:
        """Options that ask for this reduction, if the loss has any."""
        return {"reduction": reduction} if "reduction" in self.options else {}

    @functools.cached_property
    def shifts(self) -> bool:
        """A small constant added to all logits of a row changes nothing: softmax is meant."""
        if not self.task.classes:
            return False
        prediction, target = self.sample()
        before, after = self.value(prediction, target), self.value(prediction + 0.5, target)
        return abs(before - after) <= 1e-6 * max(abs(before), 1e-3)

    # ---- evidence
    def shrink(
        self, prediction: Tensor, target: Tensor, shows: Callable[[Tensor, Tensor], bool]
    ) -> tuple[Tensor, Tensor]:
        """Fewer samples and rounder numbers that still show it."""

        def still(p: Tensor, t: Tensor) -> bool:
            try:
                return shows(p, t)
            except Exception:
                return False

        for i in range(len(prediction)):
            if still(prediction[i : i + 1], target[i : i + 1]):
                prediction, target = prediction[i : i + 1], target[i : i + 1]
                break
        for digits in (0, 1, 2):
            rounded = prediction.round(decimals=digits)
            exact = target.round(decimals=digits) if target.is_floating_point() and not self.task.classes else target
            for p, t in ((rounded, exact), (rounded, target), (prediction, exact)):
                if still(p, t):
                    return p, t
        return prediction, target


def example(prediction: Tensor, target: Tensor) -> dict[str, Any]:
    """For a finding."""
    return {"prediction": prediction.tolist(), "target": target.tolist()}


def passed(name: str, evidence: str, **numbers: Any) -> Finding:
    return Finding(name, "pass", evidence, numbers)


def skipped(name: str, evidence: str) -> Finding:
    return Finding(name, "skipped", evidence)


def configured(module: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
    """The module with other attributes; the original is left alone."""
    if not options:
        return module
    changed = copy.copy(module)
    changed.__dict__["_buffers"] = dict(module._buffers)
    for name, option in options.items():
        setattr(changed, name, option)
    return changed


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
