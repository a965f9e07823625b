"""What is measured against what. A system turns a problem into a function of its logits; an adapter is a line or two.

Peers that are not installed are left out; None stands for a case that a system cannot do. Each is charged for exactly
the work it does: forward + backward as a whole, with any reduction over the rows that it leaves to its caller.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import BACKWARD, MODES, TOKENS, Case, Problem, bound, token_objective

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class System:
    name: str
    make: Callable[[Problem], Function | None]
    modes: tuple[str, ...] = MODES
    inplace: bool = False  # overwrites its logits: they are restored before every sample, outside the clock


IN_FORWARD = tuple(mode for mode in MODES if mode != BACKWARD)  # what computes its gradient in forward is measured in


def _ours(module: Any, **extras: Any) -> Callable[[Problem], Function | None]:
    def make(problem: Problem) -> Function | None:
        case, target, classifier = problem.case, problem.target, problem.classifier
        function = getattr(module, "cross_entropy" if case.hidden else case.loss, None)
        if function is None or (extras and case.loss != "cross_entropy" and not case.hidden):
            return None
        loss = bound(function, {**problem.options, **case.own, **extras})
        if case.loss == TOKENS:
            return lambda x: token_objective(*loss(x, target))
        if classifier is not None:
            return lambda x: loss(x @ classifier.t(), target)
        return lambda x: loss(x, target)

    return make


def _eager(problem: Problem) -> Function:
    loss, target = problem.torch_loss(), problem.target
    return lambda x: loss(x, target)


def _compiled(**options: Any) -> Callable[[Problem], Function]:
    return lambda problem: torch.compile(_eager(problem), dynamic=False, **options)


def _plain(case: Case) -> bool:
    """Index targets, two dimensions, no weight, no smoothing: what every peer can do."""
    return case.loss == "cross_entropy" and len(case.shape) == 2 and not (case.soft or case.weight or case.smoothing)


def _peer(name: str, module: str, call: Callable[[Any, torch.Tensor, Problem], torch.Tensor], **traits: Any) -> System:
    """``call(module, logits, problem)`` for plain cases; for Cut Cross Entropy, which makes its own logits, linear."""
    peer = importlib.import_module(module)

    def make(problem: Problem) -> Function | None:
        fits = problem.classifier is not None if name == "cce" else _plain(problem.case)
        return (lambda x: call(peer, x, problem)) if fits else None

    return System(name, make, **traits)


PEERS: list[Callable[[], System]] = [
    lambda: _peer(
        "liger",
        "liger_kernel.transformers.functional",
        lambda m, x, p: m.liger_cross_entropy(x, p.target),
        modes=IN_FORWARD,
        inplace=True,
    ),
    lambda: _peer("quack", "quack.cross_entropy", lambda m, x, p: m.cross_entropy(x, p.target, reduction="mean")),
    # Apex's padding_idx defaults to 0, so it is given one that does not occur.
    lambda: _peer(
        "apex", "apex.contrib.xentropy", lambda m, x, p: m.SoftmaxCrossEntropyLoss.apply(x, p.target, 0.0, -100).mean()
    ),
    lambda: _peer(
        "flash-attn",
        "flash_attn.ops.triton.cross_entropy",
        lambda m, x, p: m.cross_entropy_loss(x, p.target)[0].mean(),
    ),
    lambda: _peer("cce", "cut_cross_entropy", lambda m, x, p: m.linear_cross_entropy(x, p.classifier, p.target)),
]


def systems(device: str, module: str = "fastloss") -> tuple[dict[str, System], list[str]]:
    """Every system that can run here, and the names of those that a case gets unless it says otherwise."""
    found = [System("eager", _eager), System("compile", _compiled())]
    try:
        ours = importlib.import_module(module)
    except ImportError as missing:
        print(f"Without {module}: {missing}")
    else:
        found.insert(0, System("fastloss", _ours(ours), IN_FORWARD))
        found.append(System("fastloss-inplace", _ours(ours, inplace_grad=True), IN_FORWARD, inplace=True))
        found.append(System("fastloss-recompute", _ours(ours, grad_in_forward=False), (BACKWARD,)))
    if device == "cuda":
        # The harness replays CUDA graphs itself, so inductor is kept from making its own around static copies.
        found.append(System("compile-max", _compiled(mode="max-autotune-no-cudagraphs")))
        for peer in PEERS:
            try:
                found.append(peer())
            except Exception as missing:  # built for another torch or GPU, each fails in its own way
                print(f"Without a peer: {missing}")
    return {s.name: s for s in found}, [s.name for s in found if s.name not in ("fastloss-inplace", "compile-max")]
