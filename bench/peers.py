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
import torch.nn.functional as F
from cases import BACKWARD, MODES, TOKENS, Case, Problem, bound, token_objective

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class System:
    name: str
    make: Callable[[Problem], Function | None]
    modes: tuple[str, ...] = MODES
    inplace: bool = False  # overwrites its logits: they are restored before every sample, outside the clock
    computes: bool = True  # False: a part of the work alone, whose results nobody checks


IN_FORWARD = tuple(mode for mode in MODES if mode != BACKWARD)  # what computes its gradient in forward is measured in


def _fresh(weight: torch.Tensor, function: Function) -> Function:
    """The head's weight has its gradient in fresh memory each time, as the input has."""

    def call(x: torch.Tensor) -> torch.Tensor:
        weight.grad = None
        return function(x)

    return call


def _ours(module: Any, **extras: Any) -> Callable[[Problem], Function | None]:
    def make(problem: Problem) -> Function | None:
        case, target, classifier = problem.case, problem.target, problem.classifier
        function = getattr(module, case.loss, None)
        if function is None or (extras and case.loss != "cross_entropy"):
            return None
        if classifier is not None:
            extras_of_head = {} if case.budget is None else {"memory_budget": case.budget}
            loss = bound(function, {**problem.options, **case.own, **extras_of_head})
            weight = classifier.detach().requires_grad_()
            return _fresh(weight, lambda x: loss(x, weight, target))
        loss = bound(function, {**problem.options, **case.own, **extras})
        if case.loss == TOKENS:
            return lambda x: token_objective(*loss(x, target))
        return lambda x: loss(x, target)

    return make


def _eager(problem: Problem) -> Function:
    if problem.classifier is not None:
        weight = problem.classifier.detach().requires_grad_()
        return _fresh(weight, lambda x: F.cross_entropy(F.linear(x, weight), problem.target, **problem.options))
    loss, target = problem.torch_loss(), problem.target
    return lambda x: loss(x, target)


def _torch_chunked(problem: Problem) -> Function | None:
    """torch's own chunked path."""
    if problem.classifier is None or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    weight, options = problem.classifier.detach().requires_grad_(), torch.nn.LinearCrossEntropyOptions()
    return _fresh(weight, lambda x: F.linear_cross_entropy(x, weight, problem.target, options=options))


class _Products(torch.autograd.Function):
    """The three products of a head in our chunks and nothing else, forward: no implementation of the loss can do less.
    Its results are those of no loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor:
        logits = x.new_empty(min(rows, x.shape[0]), weight.shape[0])
        by_x, by_weight = torch.empty_like(x), torch.empty_like(weight)
        for begin in range(0, x.shape[0], rows):
            chunk = x[begin : begin + rows]
            z = torch.mm(chunk, weight.t(), out=logits[: chunk.shape[0]])
            torch.mm(z, weight, out=by_x[begin : begin + rows])
            torch.addmm(by_weight, z.t(), chunk, beta=0 if begin == 0 else 1, out=by_weight)
        ctx.grads = by_x, by_weight
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (*ctx.grads, None)


def _gemms(problem: Problem) -> Function | None:
    if problem.classifier is None:
        return None
    from fastloss.head.chunked import chunk_dtype
    from fastloss.head.chunks import rows_per_chunk

    x, weight = problem.x, problem.classifier.detach().requires_grad_()
    shape, itemsize, budget = (*x.shape, weight.shape[0]), x.element_size(), problem.case.budget
    sums = 4 * weight.numel() if x.is_cpu and chunk_dtype(x.device, x.dtype, weight.numel()).itemsize == 2 else 0
    rows = rows_per_chunk(*shape, itemsize=itemsize, device=x.device.type, budget=budget, sums=sums)
    return _fresh(weight, lambda x: _Products.apply(x, weight, rows))  # type: ignore[no-any-return,no-untyped-call]


def _compiled(**options: Any) -> Callable[[Problem], Function]:
    return lambda problem: torch.compile(_eager(problem), dynamic=False, **options)


def _plain(case: Case) -> bool:
    """Index targets, two dimensions, no weight, no smoothing: what every peer can do."""
    return case.loss == "cross_entropy" and len(case.shape) == 2 and not (case.soft or case.weight or case.smoothing)


def _peer(name: str, module: str, call: Callable[[Any, torch.Tensor, Problem], torch.Tensor], **traits: Any) -> System:
    """``call(module, logits, problem)`` for plain cases."""
    peer = importlib.import_module(module)

    def make(problem: Problem) -> Function | None:
        return (lambda x: call(peer, x, problem)) if _plain(problem.case) else None

    return System(name, make, **traits)


def _linear_peer(
    name: str, module: str, call: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
) -> System:
    """``call(module, input, weight, target)`` of what makes the logits itself."""
    peer = importlib.import_module(module)

    def make(problem: Problem) -> Function | None:
        if problem.classifier is None:
            return None
        weight = problem.classifier.detach().requires_grad_()
        return _fresh(weight, lambda x: call(peer, x, weight, problem.target))

    return System(name, make, IN_FORWARD)


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
    lambda: _linear_peer(
        "liger-linear",
        "liger_kernel.transformers.functional",
        lambda m, x, w, t: m.liger_fused_linear_cross_entropy(x, w, t),
    ),
    lambda: _linear_peer(
        "quack-linear", "quack.linear_cross_entropy", lambda m, x, w, t: m.chunked_linear_cross_entropy(x, w, t)
    ),
    lambda: _linear_peer("cce", "cut_cross_entropy", lambda m, x, w, t: m.linear_cross_entropy(x, w, t)),
]


def systems(device: str, module: str = "fastloss") -> tuple[dict[str, System], list[str]]:
    """Every system that can run here, and the names of those that a case gets unless it says otherwise."""
    found = [System("eager", _eager), System("compile", _compiled())]
    found += [System("torch-chunked", _torch_chunked, IN_FORWARD), System("gemms", _gemms, IN_FORWARD, computes=False)]
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
