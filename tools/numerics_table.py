"""How far cross entropy is from the exact result, in units in the last place: the table of docs/numerics.md.

Every instruction set that this machine has, every dtype, and torch's own loss on the same inputs. The exact result
comes from float64 for the dtypes that compute in float32, and from mpmath at 50 digits for float64. The units are those
of the result's dtype: at the exact value itself or, where a gradient is a difference of two terms (smoothing,
probabilities), at the larger term. Gradients are those of the sum, from both paths (made in forward, made in backward).

    python tools/numerics_table.py             the table
    python tools/numerics_table.py --certain   the gradient at the target of a row that is nearly certain
    python tools/numerics_table.py --record    write what tests/test_numerics.py allows: what is found, times 1.5
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastloss
import mpmath  # type: ignore[import-untyped]
import numpy as np
import torch
import torch.nn.functional as F
from fastloss._library import ops, set_isa
from torch import Tensor

LIMITS = Path(__file__).resolve().parent.parent / "tests/numerics_limits.json"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("ordinary", "nearly certain", "logits of 1e4")
TARGETS = ("index", "weight, smoothing", "probabilities")
SMOOTHING = 0.125  # exact in every dtype

mpmath.mp.dps = 50
_mpf, _exp, _log, _log1p, _magnitude = (
    np.frompyfunc(f, 1, 1) for f in (mpmath.mpf, mpmath.exp, mpmath.log, mpmath.log1p, lambda x: x if x >= 0 else -x)
)
Array = Any  # numpy, of float64 or of mpmath's numbers


@dataclass
class Exact:
    loss: Array  # [rows]
    grad: Array  # [rows, classes], of the sum
    scale: Array  # [rows, classes], the larger of the terms that a gradient is the difference of


def exact(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Exact:
    """From the definition, in a form that loses nothing to cancellation (see RowStats in cross_entropy_math.h)."""
    many = logits.dtype == torch.float64
    exp, log, log1p = (_exp, _log, _log1p) if many else (np.exp, np.log, np.log1p)

    def lift(t: Tensor) -> Array:
        return _mpf(t.double().numpy()) if many else t.double().numpy()

    z = lift(logits)
    z = z - z.max(1, keepdims=True)
    e = exp(z)
    total = e.sum(1, keepdims=True)
    p, nll = e / total, log(total) - z  # nll >= 0
    w = lift(torch.ones(logits.shape[1]) if weight is None else weight)
    if target.is_floating_point():
        q = w * lift(target)
        return Exact((q * nll).sum(1), q.sum(1, keepdims=True) * p - q, np.maximum(q.sum(1, keepdims=True) * p, q))
    rows, index = np.arange(len(z)), target.numpy()
    own = np.zeros(z.shape, bool)
    own[rows, index] = True
    others = np.where(own, 0, e).sum(1)
    w_t = w[index]
    e_t = e[rows, index]
    likely = others < e_t
    nll_t = np.where(likely, log1p(others / np.where(likely, e_t, 1)), nll[rows, index])
    loss = (1 - smoothing) * w_t * nll_t
    rest = np.where(own, -others[:, None] / total, p)
    if smoothing == 0:
        grad = w_t[:, None] * rest
        return Exact(loss, grad, _magnitude(grad))
    share = smoothing / z.shape[1]
    loss = loss + share * (w * nll).sum(1)
    grad = (1 - smoothing) * w_t[:, None] * rest + share * (w.sum() * p - w)
    scale = np.maximum((1 - smoothing) * w_t[:, None] * _magnitude(rest) + share * w.sum() * p, share * w + 0 * p)
    return Exact(loss, grad, scale)


def in_ulps(got: Tensor, want: Array, scale: Array, counted: Array) -> float:
    """The largest |got - want| in units in the last place of got's dtype at ``scale``."""
    info = torch.finfo(got.dtype)
    with np.errstate(invalid="ignore"):
        error = _magnitude(got.double().numpy() - want).astype(float)
    size = np.maximum(scale.astype(float), info.tiny)
    ulp = info.eps * np.exp2(np.floor(np.log2(size)))
    return float(np.max(np.nan_to_num(error / ulp, nan=np.inf, posinf=np.inf), where=counted, initial=0.0))


def problems(dtype: torch.dtype, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and class indices. mpmath is slow, so float64 gets fewer."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((32, 10), (8, 300), (1, 2003)) if dtype == torch.float64 else ((512, 10), (32, 1000), (2, 32003))
    for rows, classes in shapes:
        x = torch.randn(rows, classes, dtype=torch.float64, generator=generator)
        t = torch.randint(classes, (rows,), generator=generator)
        if kind == "logits of 1e4":
            x = (1e4 * x).clamp(-2e4, 2e4)
        elif kind == "nearly certain":
            x[torch.arange(rows), t] += torch.linspace(8, 40, rows, dtype=torch.float64)
        else:
            x = 3 * x
        yield x.to(dtype), t


def errors(loss: Callable[..., Tensor], dtype: torch.dtype, truths: dict[Any, Exact]) -> dict[str, tuple[float, float]]:
    """The largest error of value and of gradient for each kind of logits and of target. ``truths`` is filled once."""
    found = {}
    accum = torch.float64 if dtype == torch.float64 else torch.float32
    for kind in KINDS:
        for name in TARGETS:
            worst = [0.0, 0.0]
            for number, (x, t) in enumerate(problems(dtype, kind)):
                generator = torch.Generator().manual_seed(1)
                weight = None
                smoothing = SMOOTHING if "smoothing" in name else 0.0
                target = t
                if "weight" in name:
                    weight = (torch.rand(x.shape[1], generator=generator) + 0.5).to(dtype)
                if name == "probabilities":
                    target = torch.randn(x.shape, generator=generator).softmax(1).to(dtype)
                key = (dtype, kind, name, number)
                if key not in truths:
                    truths[key] = exact(x, target, weight, smoothing)
                truth = truths[key]
                # Exponentials below the smallest normal number of the arithmetic are 0 by design.
                normal = (truth.scale > 2 * torch.finfo(accum).tiny).astype(bool)
                options = {"weight": weight, "label_smoothing": smoothing}
                value = loss(x, target, reduction="none", **options)
                worst[0] = max(worst[0], in_ulps(value, truth.loss, truth.loss, np.ones(len(x), bool)))
                paths: list[dict[str, Any]] = [{"grad_in_forward": True}, {"grad_in_forward": False}]
                for path in paths if loss is fastloss.cross_entropy else [{}]:
                    leaf = x.clone().requires_grad_()
                    (grad,) = torch.autograd.grad(loss(leaf, target, reduction="sum", **options, **path), leaf)
                    worst[1] = max(worst[1], in_ulps(grad, truth.grad, truth.scale, normal))
            found[f"{kind}, {name}"] = (worst[0], worst[1])
    return found


def instruction_sets() -> list[str]:
    before = ops.current_isa()
    found = [isa for isa in ("portable", "avx2", "avx512") if ops.set_isa(isa)]
    set_isa(before)
    return found


Table = dict[str, dict[str, dict[str, tuple[float, float]]]]


def measure(dtypes: tuple[str, ...] = tuple(DTYPES), with_torch: bool = False) -> Table:
    """Errors by instruction set (and "torch"), dtype, and kind of problem."""
    truths: dict[Any, Exact] = {}
    table: Table = {}
    before = ops.current_isa()
    for isa in instruction_sets():
        set_isa(isa)
        table[isa] = {name: errors(fastloss.cross_entropy, DTYPES[name], truths) for name in dtypes}
    set_isa(before)
    if with_torch:
        table["torch"] = {name: errors(F.cross_entropy, DTYPES[name], truths) for name in dtypes}
    return table


def short(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.0f}" if x < 1e4 else f"{x:.0e}"


def show(table: Table) -> None:
    """Markdown: value / gradient."""
    print("| logits | target | dtype | " + " | ".join(table) + " |")
    print("|---|---|---|" + "---|" * len(table))
    for kind in KINDS:
        for target in TARGETS:
            for dtype in DTYPES:
                cells = [table[isa][dtype][f"{kind}, {target}"] for isa in table]
                row = " | ".join(f"{short(value)} / {short(gradient)}" for value, gradient in cells)
                print(f"| {kind} | {target} | {dtype} | {row} |")


def certain() -> None:
    """100 rows of 300 normal logits, 12 more at the target: d loss / d x_t against 50 digits, by relative error."""
    rows = torch.arange(100)
    x = torch.randn(100, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.randint(300, (100,), generator=torch.Generator().manual_seed(1))
    x[rows, t] += 12
    for dtype in (torch.float64, torch.float32):
        for smoothing in (0.0, SMOOTHING):
            want = exact(x.to(dtype).double(), t, None, smoothing).grad[rows, t]
            for name, loss in (("fastloss", fastloss.cross_entropy), ("torch", F.cross_entropy)):
                leaf = x.to(dtype, copy=True).requires_grad_()
                (grad,) = torch.autograd.grad(loss(leaf, t, reduction="sum", label_smoothing=smoothing), leaf)
                error = _magnitude((_mpf(grad[rows, t].double().numpy()) - want) / want).astype(float)
                print(
                    f"{str(dtype).removeprefix('torch.'):8} smoothing {smoothing:<6} {name:9} relative error: "
                    f"median {np.median(error):.1e}, largest {error.max():.1e}"
                )


def limit(error: float) -> float:
    return math.ceil(150 * error) / 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--certain", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.certain:
        certain()
        return 0
    table = measure(with_torch=not options.record)
    if not options.record:
        show(table)
        return 0
    lines = []
    for dtype in DTYPES:
        for problem in table["portable"][dtype]:
            worst = [limit(max(table[isa][dtype][problem][i] for isa in table)) for i in (0, 1)]
            lines.append(f"  {json.dumps(f'{dtype}, {problem}')}: {json.dumps(worst)}")
    LIMITS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
