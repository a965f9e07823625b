"""Cross entropy on a GPU against float64 on the same GPU: every launch policy, dtype and layout, value and gradient.

    python bench/cuda/check.py [--budget 40] [--few] [--sums]

--few is one case per kernel, small, for compute-sanitizer, pointwise losses included. --sums instead launches what many
blocks add up over and over, to catch a partial sum that is read before it is there. The exit status is 1 if anything is
wrong.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fastloss
import torch
import torch.nn.functional as F
from fastloss.testing.cross_entropy import reference

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
# Relative error, and error relative to the largest gradient.
TOLERANCE = {"f32": (2e-5, 3e-7), "bf16": (1e-2, 3e-7), "f16": (2e-3, 3e-7), "f64": (1e-10, 1e-13)}
LEAST = 6e-8  # float16's smallest number: rounding below it is no error
MANY = 800  # rows: more than four for each multiprocessor, from where forward alone streams what needs a cluster
VECTORS = (1, 2, 3, 6, 8, 12, 23, 24, 31, 32, 33, 64, 128, 129, 192, 256, 257, 512, 1024, 2048, 2049, 3072, 4096, 4097)
LONG = (8192, 9000, 16384, 16385, 24600, 32768, 40000, 49153, 65537, 140000)
SPATIAL = ((3, 1, 40), (5, 2, 7), (2, 8, 66), (3, 9, 640), (3, 21, 640), (2, 21, 513), (2, 24, 1030), (2, 25, 1032),
           (1, 150, 768), (2, 161, 256), (2, 400, 130), (300, 5, 3), (2, 1500, 96))  # fmt: skip
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": True, "sample_weight": True, "z_loss": 1e-3},
    "sum, in place": {"reduction": "sum", "inplace_grad": True},
    "none": {"reduction": "none", "weight": True},
    "smoothing": {"label_smoothing": 0.1, "weight": True},
    "everything": {"weight": True, "label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 0.7, "stats": True},
    "probabilities": {"soft": True},
}


Loss = Callable[..., torch.Tensor]


@dataclass
class Case:
    dtype: str
    shape: tuple[int, ...]  # [rows, classes] or [outer, classes, inner]
    layout: str
    features: dict[str, Any] = field(default_factory=dict)


def cases(few: bool) -> Iterator[Case]:
    """Every case by itself is small; the order is random, so that a budget that ends early leaves no corner dark."""
    if few:
        for dtype in ("f32", "bf16"):
            lanes = 16 // torch.empty(0, dtype=DTYPES[dtype]).element_size()
            for vectors in (1, 9, 200, 260, 2100, 4097, 9000, 33000, 66000):
                for name in ("plain", "everything") if vectors < 10000 else ("plain",):
                    layout = "off by one" if vectors == 9 else "contiguous"
                    yield Case(dtype, (5, vectors * lanes + 1), layout, FEATURES[name])
            yield Case(dtype, (MANY, 4200 * lanes + 1), "contiguous", FEATURES["plain"])
            for shape in ((2, 5, 66), (2, 21, 64), (2, 30, 64), (2, 30, 33), (1, 170, 64)):
                for name in ("plain", "weight", "everything"):
                    yield Case(dtype, shape, "contiguous", FEATURES[name])
        yield Case("f64", (5, 300), "contiguous", FEATURES["plain"])
        yield Case("f16", (5, 5000), "contiguous", FEATURES["probabilities"])
        return
    for dtype, torch_dtype in DTYPES.items():
        lanes = 16 // torch.empty(0, dtype=torch_dtype).element_size()
        for vectors in (*VECTORS, *LONG):
            for extra in (-1, 0, 1):
                classes = vectors * lanes + extra
                rows = 700 if vectors < 64 else 150 if vectors < 1000 else 37 if vectors < 5000 else 9
                for layout in ("contiguous", "off by one", "rows apart"):
                    for features in FEATURES.values():
                        long = vectors > 5000 and (dtype == "f64" or "soft" in features or extra)
                        if classes > 0 and not long:
                            yield Case(dtype, (rows, classes), layout, features)
        for vectors in (4200, 9000) if dtype != "f64" else ():
            for extra in (0, 1):
                for name in ("plain", "none"):
                    yield Case(dtype, (MANY, vectors * lanes + extra), "contiguous", FEATURES[name])
        for shape in SPATIAL:
            for layout in ("contiguous", "off by one", "channels last", "classes apart"):
                for features in FEATURES.values():
                    yield Case(dtype, shape, layout, features)


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, in memory that is nan around them."""
    shape = tuple(values.shape)
    if layout == "contiguous":
        return values.clone()
    if layout == "off by one":
        memory = values.new_full((values.numel() + 2,), torch.nan)[1:-1].view(shape)
    elif layout == "rows apart":
        memory = values.new_full((shape[0], shape[1] + 3), torch.nan)[:, : shape[1]]
    elif layout == "channels last":
        memory = values.new_full((shape[0], shape[2], shape[1]), torch.nan).transpose(1, 2)
    else:
        memory = values.new_full((shape[0], 2 * shape[1], shape[2]), torch.nan)[:, ::2]
    return memory.copy_(values)


def worst_of(got: torch.Tensor, exact: torch.Tensor, rtol: float, atol: float) -> float:
    """The largest error over what is allowed; inf for a nan on one side only."""
    got, exact = got.detach().double(), exact.detach().double()
    if not torch.equal(got.isnan(), exact.isnan()):
        return float("inf")
    size = float(exact.abs().nan_to_num(0).max()) if exact.numel() else 0.0
    error = (got - exact).abs() / (rtol * exact.abs() + atol * size + LEAST * (rtol > 1e-9))
    return float(error.nan_to_num(0).max()) if exact.numel() else 0.0


def run(case: Case, seed: int, device: str) -> tuple[float, str]:
    """How far off the worst number is, in units of the tolerance, and which it is."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    options = dict(case.features)
    stats, soft = options.pop("stats", False), options.pop("soft", False)
    in_place = options.pop("inplace_grad", False)
    values = (3 * torch.randn(case.shape, generator=generator, device=device)).to(dtype)
    batch, classes = (case.shape[0], *case.shape[2:]), case.shape[1]
    target = torch.randint(classes, batch, generator=generator, device=device)
    target[torch.rand(batch, generator=generator, device=device) < 0.15] = -100
    target.view(-1)[0] = classes - 1
    if soft:
        target = values.flip(1).float().softmax(1)
    for name, count in (("weight", (classes,)), ("sample_weight", batch)):
        if options.get(name):
            options[name] = torch.rand(count, generator=generator, device=device) + 0.5
    rtol, atol = TOLERANCE[case.dtype]
    exact_x = values.double().requires_grad_()
    exact = reference(exact_x, target, **options)
    up = torch.linspace(0.5, 2, exact.numel(), device=device).view_as(exact)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, up.double())
    worst = (0.0, "")

    def see(what: str, got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float) -> None:
        nonlocal worst
        worst = max(worst, (worst_of(got, want, rtol, atol), what))

    x = lay_out(values, case.layout).requires_grad_()
    with torch.no_grad():
        see("loss without gradient", fastloss.cross_entropy(x, target, **options), exact, rtol, 1e-6)
    first: torch.Tensor | None = None
    for in_forward in (True, False, True):
        result = fastloss.cross_entropy(x, target, **options, return_stats=stats, grad_in_forward=in_forward)
        loss = result[0] if stats else result
        (grad,) = torch.autograd.grad(loss, x, up.to(loss.dtype))
        see("loss", loss.detach(), exact, rtol, 1e-6)
        see("gradient", grad, exact_grad, rtol, atol)
        if in_forward and first is not None and not torch.equal(first, grad):
            worst = max(worst, (float("inf"), "not the same bits again"))
        first = grad if in_forward else first
        if stats:
            z = 5.0 * torch.tanh(values.double() * 0.7 / 5.0)
            see("lse", result[1].lse, torch.logsumexp(z, 1), 1e-5, 1e-6)
    if in_place:
        y = x.detach().clone(memory_format=torch.preserve_format).requires_grad_() * 1.0
        loss = fastloss.cross_entropy(y, target, **options, inplace_grad=True)
        (grad,) = torch.autograd.grad(loss, y, up.to(loss.dtype))
        see("gradient in place", grad, exact_grad, rtol, atol)
    return worst


def sums(device: str, budget: float, launches: int) -> int:
    """Sums that the last of many blocks adds up, of two inputs in turn, so that a partial sum of the launch before is a
    wrong one: the same bits each time, and right. Returns how many were not.
    """
    generator = torch.Generator(device).manual_seed(0)
    large = torch.device(device).type == "cuda"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def pointwise(name: str, **options: Any) -> Loss:
        return lambda x: getattr(fastloss, name)(x, zero[: x.numel()].view_as(x), **options)

    zero = torch.zeros(1 << 24 if large else 1 << 18, device=device)
    row = [normal(zero.numel()) + shift for shift in (0, 3)]  # streaming, one row, as many blocks as there can be
    few = [normal(30011) + shift for shift in (0, 3)]
    groups = [normal(64, 50001 if large else 1001) + shift for shift in (0, 3)]
    logits = [normal(16384 if large else 512, 1000) * scale for scale in (1, 3)]
    long = [normal(2048 if large else 8, 65537) * scale for scale in (1, 3)]
    mask = torch.rand(row[0].shape, generator=generator, device=device) < 0.5

    def cross_entropy(f: Loss) -> Loss:
        return lambda x: f(x, torch.arange(len(x), device=device) % x.shape[1])

    work: dict[str, tuple[list[torch.Tensor], Loss, Loss]] = {
        "l1, many blocks": (row, pointwise("l1_loss"), lambda x: x.abs().mean()),
        "mse, few blocks": (few, pointwise("mse_loss"), lambda x: x.square().mean()),
        "l1, masked": (row, pointwise("l1_loss", mask=mask), lambda x: x[mask].abs().mean()),
        "rmse": (row, pointwise("rmse_loss"), lambda x: x.square().mean().sqrt()),
        "rmse of groups": (groups, pointwise("rmse_loss", dim=1), lambda x: x.square().mean(1).sqrt().mean()),
        "cross entropy": (logits, cross_entropy(fastloss.cross_entropy), cross_entropy(F.cross_entropy)),
        "cross entropy, long rows": (long, cross_entropy(fastloss.cross_entropy), cross_entropy(F.cross_entropy)),
    }
    wrong, begun = 0, time.perf_counter()
    for number, (name, (inputs, loss, plain)) in enumerate(work.items()):
        results: list[list[torch.Tensor]] = [[], []]
        while len(results[0]) < launches and time.perf_counter() - begun < budget * (number + 1) / len(work):
            for _ in range(10):
                for x, of_x in zip(inputs, results, strict=True):
                    of_x.append(loss(x))
            float(results[0][-1].sum())  # the host waits
        for x, of_x in zip(inputs, results, strict=True):
            exact = float(plain(x.double()))
            different = sum(not torch.equal(r, of_x[0]) for r in of_x)
            error = abs(float(of_x[0].double().mean()) / exact - 1)
            wrong += different + (not error < 1e-5)
            print(f"{name}: {len(of_x)} launches, {different} differ, error {error:.1g}", flush=True)
    return wrong


def pointwise_few(device: str) -> None:
    """Every kernel of the pointwise losses once or twice, for compute-sanitizer."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((40000,), (3, 7001)):
            x = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
            t = torch.randn(shape, device=device, dtype=dtype)
            for name in ("l1_loss", "huber_loss", "rmse_loss"):
                getattr(fastloss, name)(x, t).backward()
                getattr(fastloss, name)(x.t(), t.t(), mask=(t > 0).t()).backward()
            fastloss.mse_loss(x, t, reduction="none").sum().backward()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--budget", type=float, default=40)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu: to try this script")
    parser.add_argument("--sums", action="store_true")
    parser.add_argument("--launches", type=int, default=3000, help="of each sum and input")
    options = parser.parse_args()
    if options.sums:
        return int(sums(options.device, options.budget, options.launches) > 0)
    if options.few:
        pointwise_few(options.device)
    todo = list(cases(options.few))
    random.Random(0).shuffle(todo)
    todo.sort(key=lambda case: case.shape[0] != MANY)  # few, and no others take what they take
    begun, done, wrong = time.perf_counter(), 0, 0
    worst: dict[str, float] = {}
    for number, case in enumerate(todo):
        if time.perf_counter() - begun > options.budget:
            break
        try:
            ratio, what = run(case, number, options.device)
        except RuntimeError as failure:  # a launch that was refused, say: the next case may still do
            ratio, what = float("inf"), str(failure).partition("\n")[0]
        done += 1
        worst[case.dtype] = max(worst.get(case.dtype, 0.0), ratio)
        if not ratio <= 1:
            wrong += 1
            if wrong <= 60:
                print(
                    f"WRONG {case.dtype} {case.shape} {case.layout} {case.features}: {what}, {ratio:.3g} allowed errors"
                )
    fastloss.check_errors()
    errors = ", ".join(f"{dtype} {ratio:.2g}" for dtype, ratio in sorted(worst.items()))
    seconds = time.perf_counter() - begun
    print(f"{done} of {len(todo)} cases in {seconds:.0f} s, {wrong} wrong; worst error over allowed: {errors}")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    raise SystemExit(main())
