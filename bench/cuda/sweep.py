"""Times of cross entropy on a GPU beside eager torch, over rows x classes, images and small batches: one line each.

    python bench/cuda/sweep.py [--budget 60] [--policies]

Forward, value with gradient, and backward alone are given as fewest bytes / time over the bandwidth of a copy measured
in the same run: the kernels' time in a CUDA graph, inputs cold. Small batches are given as wall time per step.

--policies: forward and forward + backward of long rows alone, once for each of several launch policies.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fastloss
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import Clock, cuda_roofline, median

# Those first that matter most, should the budget end early.
ROWS = (
    (32768, 32768), (8192, 128256), (32768, 256), (32768, 1024), (32768, 4096), (8192, 50257), (8192, 262144),
    (32768, 16384), (32768, 512), (32768, 2048), (32768, 8192), (32768, 65536), (16384, 131072), (8192, 151936),
    (262144, 10), (262144, 21), (32768, 100), (32768, 1001),
)  # fmt: skip
IMAGES = ((8, 21, 512, 512), (4, 150, 512, 512))
SMALL = ((64, 10), (4096, 1000))

# rows_to_stream, row_blocks, few_vectors of RowwiseTuning (cross_entropy_policy.h), in the order of their interest.
POLICIES = {
    "as it is": "",
    "forward in clusters": "1000000000",
    "fewer vectors a thread": "4,32,1",
    "12 blocks": "4,12,0",
}
LONG_ROWS = (
    (8192, 128256), (8192, 50257), (32768, 32768), (8192, 151936), (8192, 262144), (32768, 20000), (32768, 65536),
    (1024, 128256), (600, 128256), (400, 128256), (128, 128256), (16384, 131072),
)  # fmt: skip


def seconds(function: Any, xs: list[torch.Tensor], **options: Any) -> float:
    clock = Clock("cuda", xs, function, **options)
    return median([clock.sample() for _ in range(7)])


def copies(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> list[torch.Tensor]:
    """Logits enough to find the L2 cold at each."""
    x = torch.randn(shape, device="cuda", dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [x.clone() for _ in range(max(1, math.ceil(3 * l2 / x.nbytes)))]


def line(shape: tuple[int, ...], dtype: torch.dtype, copy: float, weighted: bool, channels_last: bool) -> str:
    xs = copies(shape, dtype, channels_last)
    size, graph = xs[0].nbytes, xs[0].nbytes <= 1 << 28
    t = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")
    w = (torch.rand(shape[1], device="cuda") + 0.5).to(dtype) if weighted else None  # eager wants the logits' dtype
    forward = seconds(lambda x: fastloss.cross_entropy(x, t, w), xs, graph=graph)
    leaves = [x.requires_grad_() for x in xs]
    times = {
        name: seconds(lambda x, f=f: f(x, t, w).backward(), leaves, graph=graph)
        for name, f in (("ours", fastloss.cross_entropy), ("eager", F.cross_entropy))
    }
    losses: list[torch.Tensor] = []

    def prepare() -> None:
        losses[:] = [fastloss.cross_entropy(x, t, w, grad_in_forward=False) for x in leaves]

    backward = seconds(lambda x: losses.pop(0).backward(), leaves, prepare=prepare, graph=False)
    name = f"{'x'.join(map(str, shape))}{' channels last' if channels_last else ''}{' weight' if weighted else ''}"
    return (
        f"{str(dtype).removeprefix('torch.'):9}{name:38} forward {size / forward / copy:5.1%}"
        f"  f+b {2 * size / times['ours'] / copy:5.1%}  backward {2 * size / backward / copy:5.1%}"
        f"   f+b {1e3 * times['ours']:.3f} ms, eager {1e3 * times['eager']:.3f} ms:"
        f" {times['eager'] / times['ours']:.2f}x"
    )


def long_rows(copy: float, budget: float) -> None:
    """One policy: a line of JSON for each shape."""
    begun = time.perf_counter()
    for shape in LONG_ROWS:
        for dtype in (torch.bfloat16, torch.float32):
            if time.perf_counter() - begun > budget:
                return
            xs = copies(shape, dtype)
            size, graph = xs[0].nbytes, xs[0].nbytes <= 1 << 28
            t = torch.randint(shape[1], shape[:1], device="cuda")
            forward = seconds(lambda x, t=t: fastloss.cross_entropy(x, t), xs, graph=graph)
            leaves = [x.requires_grad_() for x in xs]
            both = seconds(lambda x, t=t: fastloss.cross_entropy(x, t).backward(), leaves, graph=graph)
            name = f"{str(dtype).removeprefix('torch.')} {shape[0]}x{shape[1]}"
            print(json.dumps([name, size / forward / copy, 2 * size / both / copy]), flush=True)
            del xs, leaves
            torch.cuda.empty_cache()


def policies(copy: float, budget: float) -> None:
    """A process for each policy, which is read once; then all of them side by side."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    command = [sys.executable, __file__, "--one-policy", str(copy), "--budget", str(budget / len(POLICIES) - 6)]
    for policy, tuning in POLICIES.items():
        child = subprocess.Popen(
            command, env=os.environ | {"FASTLOSS_ROWWISE_TUNING": tuning}, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout
        for text in child.stdout:
            name, forward, both = json.loads(text)
            found.setdefault(name, {})[policy] = forward, both
            print(f"{policy:24}{name:24} forward {forward:6.1%}  f+b {both:6.1%}", flush=True)
        if child.wait():
            print(f"{policy}: FAILED ({child.returncode})")
    print("\nforward / f+b, of the copy")
    print(f"{'':24}" + "".join(f"{policy:>24}" for policy in POLICIES))
    for name, by in found.items():
        shown = (f"{by[p][0]:.1%} / {by[p][1]:.1%}" if p in by else "" for p in POLICIES)
        print(f"{name:24}" + "".join(f"{text:>24}" for text in shown))


def wall(shape: tuple[int, int], f: Any) -> float:
    """Microseconds per forward + backward as a training loop sees them."""
    x, t = torch.randn(shape, device="cuda", requires_grad=True), torch.randint(shape[1], shape[:1], device="cuda")
    clock = Clock("cuda", [x], lambda x: f(x, t).backward(), graph=False)
    return 1e6 * median([clock.wall(200) for _ in range(5)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--budget", type=float, default=60)
    parser.add_argument("--policies", action="store_true")
    parser.add_argument("--one-policy", type=float, metavar="COPY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    budget = options.budget
    if options.one_policy:
        long_rows(options.one_policy, budget)
        return 0
    begun = time.perf_counter()
    copy = cuda_roofline()["copy"]
    print(f"{torch.cuda.get_device_name()}, copy {copy / 1e9:.0f} GB/s (read + written)", flush=True)
    if options.policies:
        policies(copy, budget)
        return 0
    for small in SMALL:
        ours, eager = wall(small, fastloss.cross_entropy), wall(small, F.cross_entropy)
        print(f"{small} float32, forward + backward, wall: {ours:.1f} us, eager {eager:.1f} us", flush=True)
    failed, todo = 0, list[tuple[tuple[int, ...], torch.dtype, bool, bool]]()
    for image in IMAGES:
        for dtype in (torch.bfloat16, torch.float32):
            todo += [(image, dtype, True, last) for last in (False, True)]
    todo += [(rows, dtype, False, False) for rows in ROWS for dtype in (torch.bfloat16, torch.float32)]
    for number, (shape, dtype, weighted, last) in enumerate(todo):
        if time.perf_counter() - begun > budget:
            print(f"left out for lack of time: {len(todo) - number} of {len(todo)}")
            break
        try:
            print(line(shape, dtype, copy, weighted, last), flush=True)
        except RuntimeError as failure:  # no memory left, say
            failed += 1
            print(f"{shape} {dtype}: FAILED, {str(failure).partition(chr(10))[0]}", flush=True)
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
