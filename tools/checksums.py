"""Are value and gradients the same bits as those of another commit? Records them, and compares with a record.

    python tools/checksums.py --record FILE     before a change
    python tools/checksums.py --compare FILE    after it: what differs and by how much; exit status 1 if anything does

A record holds calls, with their arguments, and what came out of them, so that a spec whose samples have changed since
does no harm: the comparison makes the recorded calls. These are every sample of every spec of ``fastloss.testing``, in
every dtype and in layouts that are not contiguous, and some problems large enough for many threads, tiles and chunks
(:func:`large_problems`); each with every instruction set that this machine has, on one thread and on two. Each call is
made without a gradient, with gradients for an incoming gradient of 1, and with gradients for another one.

Both sides need the same machine and the same torch: only what both have is compared, and the rest is listed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastloss
import torch
from fastloss._library import set_isa
from fastloss.testing import SPECS, pointwise
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
THREADS = (1, 2)


def instruction_sets() -> list[str]:
    """Those that this machine and this build have."""
    found = []
    for name in ("portable", "avx2", "avx512"):
        try:
            set_isa(name)
        except ValueError:
            continue
        found.append(name)
    return found


ISAS = instruction_sets()


@dataclass
class Problem:
    """One call: ``fastloss.<function>(*args, **kwargs)``. Tensors keep strides and requires_grad."""

    function: str
    args: list[Tensor]
    kwargs: dict[str, Any]

    def differentiable(self) -> list[Tensor]:
        """The arguments that require grad."""
        return [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same call with every tensor changed."""
        kwargs = {k: change(v) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        return Problem(self.function, [change(t) for t in self.args], kwargs)


# ------------------------------------------------------------------------------------------------------ the problems


def _filled(view: Tensor, values: Tensor) -> Tensor:
    """``view``, a part of new memory, with the values: as a leaf, like them."""
    with torch.no_grad():
        view.copy_(values)
    return view.detach().requires_grad_(values.requires_grad)


def _every_other_element(t: Tensor) -> Tensor:
    return _filled(t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2], t)


def _every_other_row(t: Tensor) -> Tensor:
    return _filled(t.new_zeros(2 * t.shape[0], *t.shape[1:])[::2], t)


def _first_classes(t: Tensor) -> Tensor:
    return _filled(t.new_zeros(t.shape[0], t.shape[1] + 3, *t.shape[2:])[:, : t.shape[1]], t)


def _transposed(t: Tensor) -> Tensor:
    """Dimension 1 is the innermost one: channels last. Of two dimensions, dimension 0."""
    dim = 1 if t.dim() > 2 else 0
    return _filled(t.new_zeros(t.movedim(dim, -1).shape).movedim(-1, dim), t)


LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {  # with the fewest dimensions that they ask for
    "every other element": (1, _every_other_element),
    "every other row": (1, _every_other_row),
    "first classes": (2, _first_classes),
    "transposed": (2, _transposed),
}


def in_layouts(name: str, problem: Problem) -> Iterator[tuple[str, Problem]]:
    """The problem as it is; with its input in other layouts; with everything of the input's shape strided."""
    yield f"{name}/as given", problem
    first, *others = problem.args
    for layout, (dims, change) in LAYOUTS.items():
        if first.dim() >= dims:
            yield f"{name}/{layout}", Problem(problem.function, [change(first), *others], problem.kwargs)
    if first.dim() > 0:
        strided = problem.map(lambda t: _every_other_element(t) if t.shape == first.shape else t)
        yield f"{name}/all by every other element", strided


def small_problems() -> Iterator[tuple[str, Problem]]:
    """The samples of the specs."""
    for spec in SPECS.values():
        for dtype_name, dtype in DTYPES.items():
            for sample in spec.samples("cpu", dtype):
                problem = Problem(spec.name, list(sample.args), dict(sample.kwargs))
                yield from in_layouts(f"{spec.name}/{sample.name}/{dtype_name}", problem)


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _positive(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5).to(dtype)


def _cross_entropies(dtype: torch.dtype) -> Iterator[tuple[str, Problem]]:
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((64, 3000), (300, 200), (5000, 10), (2, 21, 40, 40)):
        rows, classes = (shape[0], *shape[2:]), shape[1]
        x = (3 * _normal(*shape, seed=1)).to(dtype)
        t = torch.randint(classes, rows, generator=torch.Generator().manual_seed(2))
        t.view(-1)[::7] = -100
        probabilities = _normal(*shape, seed=3, dtype=torch.float64).softmax(1).to(dtype)
        weight, by_row = _positive(classes, seed=4, dtype=weight_dtype), _positive(*rows, seed=5, dtype=weight_dtype)
        formats = {"": x}
        if len(shape) == 4:
            formats[", channels last"] = x.contiguous(memory_format=torch.channels_last)
        calls: dict[str, tuple[Tensor, dict[str, Any]]] = {
            "plain": (t, {}),
            "sum": (t, {"reduction": "sum"}),
            "none": (t, {"reduction": "none"}),
            "weight": (t, {"weight": weight}),
            "smoothing": (t, {"label_smoothing": 0.1}),
            "weight, smoothing": (t, {"weight": weight, "label_smoothing": 0.1}),
            "probabilities": (probabilities, {}),
            "probabilities, weight, none": (probabilities, {"weight": weight.to(dtype), "reduction": "none"}),
            "softcap, scale": (t, {"softcap": 5.0, "logit_scale": 0.7}),
            "z_loss, sample_weight": (t, {"z_loss": 1e-3, "sample_weight": by_row}),
            "in forward": (t, {"grad_in_forward": True}),
            "in backward": (t, {"grad_in_forward": False}),
            "in place": (t, {"inplace_grad": True}),
            "statistics": (t, {"return_stats": True}),
        }
        for memory, logits in formats.items():
            for name, (target, options) in calls.items():
                leaf = logits.clone().requires_grad_()
                title = f"{'x'.join(map(str, shape))}{memory}, {name}"
                yield title, Problem("cross_entropy", [leaf, target], options)
        leaf = probabilities.clone().requires_grad_()
        yield f"{'x'.join(map(str, shape))}, gradient for probabilities", Problem("cross_entropy", [x, leaf], {})


def _pointwise(dtype: torch.dtype) -> Iterator[tuple[str, Problem]]:
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((40000,), (3, 5000)):
        mask = torch.arange(shape[0] * (shape[1] if len(shape) == 2 else 1)).reshape(shape) % 5 != 1
        calls: dict[str, dict[str, Any]] = {
            "plain": {},
            "mask": {"mask": mask},
            "weight": {"weight": _positive(shape[-1], seed=6, dtype=dtype).expand(shape)},
            "weights, mask": {"sample_weight": _positive(shape[0], seed=7, dtype=weight_dtype), "mask": mask},
        }
        for function in pointwise.SPECS:
            for name, options in calls.items():
                for reduction in ("mean", "sum", "none"):
                    x = _normal(*shape, seed=8, dtype=dtype).requires_grad_()
                    t = _normal(*shape, seed=9, dtype=dtype).requires_grad_(name in ("plain", "weight"))
                    title = f"{function}, {'x'.join(map(str, shape))}, {name}, {reduction}"
                    yield title, Problem(function, [x, t], {"reduction": reduction, **options})
    if "rmse_loss" in SPECS:
        for dim in (0, 1, (0, 1)):
            x, t = _normal(30, 5000, seed=8, dtype=dtype).requires_grad_(), _normal(30, 5000, seed=9, dtype=dtype)
            yield f"rmse_loss, 30x5000, dim {dim}", Problem("rmse_loss", [x, t], {"dim": dim})


def large_problems() -> Iterator[tuple[str, Problem]]:
    """Enough elements for rows, tiles, chunks of both and several blocks per thread."""
    for dtype_name, dtype in DTYPES.items():
        for family in (_cross_entropies, _pointwise):
            for title, problem in family(dtype):
                yield f"{problem.function}/{title}/{dtype_name}/as given", problem


# ------------------------------------------------------------------------------------------------------- the results


def _fresh(t: Tensor) -> Tensor:
    """A leaf with the same values and strides, in memory of its own: calls may write to their arguments."""
    memory = t.detach().untyped_storage().clone()
    copy = torch.empty(0, dtype=t.dtype).set_(memory, t.storage_offset(), t.shape, t.stride())
    return copy.requires_grad_(t.requires_grad)


def _call(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what else came with it."""
    input, *others = problem.args
    if problem.kwargs.get("inplace_grad"):
        input = input.clone()  # a leaf cannot be written to
    result = getattr(fastloss, problem.function)(input, *others, **problem.kwargs)
    return (result, {}) if isinstance(result, Tensor) else (result[0], result[1]._asdict())


def _outcomes(problem: Problem) -> dict[str, Tensor]:
    with torch.no_grad():
        value, extra = _call(problem.map(_fresh))
    outcomes = {"value": value, **extra}
    if not problem.differentiable():
        return outcomes
    generator = torch.Generator().manual_seed(10)
    random = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    incoming = {"gradient": torch.ones_like(value), "gradient for another": random}
    if problem.kwargs.get("reduction") == "none":
        incoming = {"gradient": random}
    for name, grad_output in incoming.items():
        again = problem.map(_fresh)
        loss, _ = _call(again)
        outcomes["value with a gradient"] = loss.detach()
        for i, grad in enumerate(torch.autograd.grad(loss, again.differentiable(), grad_output)):
            outcomes[f"{name} {i}"] = grad.detach().clone()
    return outcomes


def outcomes(problem: Problem) -> dict[str, Tensor]:
    """Value and gradients by name, or the exception by its type."""
    try:
        return _outcomes(problem)
    except Exception as error:  # which calls raise is part of what is compared
        return {f"raises {type(error).__name__}": torch.zeros(())}


def results(problems: Iterable[tuple[str, Problem]]) -> Iterator[tuple[str, Tensor]]:
    """Every outcome of every problem, with its key."""
    for name, problem in problems:
        for isa in ISAS:
            set_isa(isa)
            for threads in THREADS:
                torch.set_num_threads(threads)
                for what, tensor in outcomes(problem).items():
                    yield f"{name}/{isa}/{threads} threads/{what}", tensor


def digest(t: Tensor) -> str:
    """Of dtype, shape and elements; the strides do not count."""
    data = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{t.dtype} {tuple(t.shape)} ".encode() + data).hexdigest()[:24]


# -------------------------------------------------------------------------------------------- recording and comparing


def record(path: Path) -> None:
    """Writes calls and results; equal tensors are written once."""
    problems = dict([*small_problems(), *large_problems()])
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for key, tensor in results(problems.items()):
        keys[key] = digest(tensor)
        tensors.setdefault(keys[key], tensor.contiguous().clone())
    calls = {name: (p.function, p.args, p.kwargs) for name, p in problems.items()}
    torch.save({"torch": str(torch.__version__), "calls": calls, "results": keys, "tensors": tensors}, path)
    print(f"{path}: {len(keys)} results of {len(calls)} calls, {path.stat().st_size / 2**20:.0f} MiB")


def _ordered(t: Tensor) -> Tensor:
    """Integers in the order of the floating-point numbers, neighbours one apart."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    i = t.contiguous().view(bits).to(torch.int64)
    lowest = -(2 ** (8 * t.element_size() - 1))
    return torch.where(i < 0, lowest - i, i)


@dataclass
class Difference:
    """How far two results are from each other."""

    text: str
    ulp: float = float("inf")


def difference(before: Tensor, after: Tensor) -> Difference:
    """Between a result before and after, of which the digests differ."""
    if before.dtype != after.dtype or before.shape != after.shape:
        return Difference(f"{before.dtype} {tuple(before.shape)} before, {after.dtype} {tuple(after.shape)} after")
    b, a = before.reshape(-1), after.reshape(-1)
    if not b.is_floating_point():
        return Difference(f"{int((a != b).sum())} of {b.numel()} differ")
    same = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
    if same.all():
        return Difference("only the bits of nan differ", 0)
    one_sided = ~same & ~(a.isfinite() & b.isfinite())
    text = f"{int((~same).sum())} of {b.numel()} differ"
    if one_sided.any():
        return Difference(f"{text}, {int(one_sided.sum())} of them are inf or nan on one side")
    ulp = (_ordered(a[~same]) - _ordered(b[~same])).abs().max().item()
    x, y = a.double(), b.double()
    absolute = (x - y)[~same].abs()
    relative = absolute / torch.maximum(x.abs(), y.abs())[~same].clamp(min=1e-300)
    of_largest = absolute.max().item() / max(y[y.isfinite()].abs().max().item(), 1e-300)
    text += f", at most by {relative.max():.2g} of itself, {ulp} ulp, {of_largest:.2g} of the largest element"
    return Difference(text, ulp)


def compare(path: Path) -> int:
    """Makes the recorded calls again; how many results differ."""
    saved = torch.load(path, mmap=True)
    if saved["torch"] != str(torch.__version__):
        print(f"recorded with torch {saved['torch']}, this is {torch.__version__}")
    problems = {name: Problem(*call) for name, call in saved["calls"].items() if hasattr(fastloss, call[0])}
    before = saved["results"]
    missing, new, differing = dict.fromkeys(before), Counter[str](), Counter[str]()
    for name, problem in problems.items():
        found: dict[str, dict[str, Difference]] = {}  # for each result, by how it was computed
        for key, tensor in results([(name, problem)]):
            if key not in before:
                new[problem.function] += 1
                continue
            del missing[key]
            if digest(tensor) != before[key]:
                isa, threads, what = key.removeprefix(f"{name}/").split("/")
                found.setdefault(what, {})[f"{isa}/{threads}"] = difference(saved["tensors"][before[key]], tensor)
        for what, by_way in found.items():
            differing[problem.function] += len(by_way)
            print(f"{name}/{what} ({', '.join(by_way)}): {max(by_way.values(), key=lambda d: d.ulp).text}", flush=True)
    unknown = {name for name, _ in small_problems()} - saved["calls"].keys()
    for sample in sorted({name.rsplit("/", 2)[0] for name in unknown}):  # without dtype and layout
        print(f"not recorded: {sample}")
    for function, count in Counter(key.partition("/")[0] for key in missing).items():
        print(f"only before: {count} results of {function}")
    for function, count in new.items():
        print(f"only after: {count} results of {function}")
    for function, count in differing.items():
        print(f"{function}: {count} differ")
    compared = len(before) - len(missing)
    print(f"{sum(differing.values())} of {compared} results differ")
    if not compared:
        sys.exit("nothing in the record can be compared here")
    return sum(differing.values())


def main() -> None:
    """Records or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE", help="write calls and their results")
    what.add_argument("--compare", type=Path, metavar="FILE", help="make the calls of a record and compare")
    options = parser.parse_args()
    if options.record:
        record(options.record)
    elif compare(options.compare):
        sys.exit(1)


if __name__ == "__main__":
    main()
