"""Clocks, memory meters and the roofline: everything here is about one machine and knows no loss."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

Step = Callable[[torch.Tensor], object]  # does the work under the clock for one copy of the logits


def median(samples: Sequence[float]) -> float:
    return float(torch.tensor(samples, dtype=torch.float64).quantile(0.5))


# ---- the machine


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _built_from() -> str:
    """The commit that the extension was built from, where there is no repository."""
    try:
        info = importlib.import_module("fastloss._build_info").BUILD_INFO
    except ImportError:
        return "uncommitted"
    return str(info.get("commit") or "uncommitted")[:10]


def environment(device: str, threads: int, isa: str | None) -> dict[str, Any]:
    """What somebody needs to know to repeat the run."""
    root = str(Path(__file__).parent)
    compiler = _output(os.environ.get("CXX", "c++"), "--version").partition("\n")[0]
    commit = _output("git", "-C", root, "rev-parse", "--short=10", "HEAD") or _built_from()
    dirty = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    found: dict[str, Any] = {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
        "limited_to": isa,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": compiler,
        "system": platform.platform(),
        "huge_pages": _output("cat", "/sys/kernel/mm/transparent_hugepage/enabled"),
        "load": os.getloadavg()[0],  # before the run: above a half or so, others were using the machine
        "commit": commit + ("-dirty" if dirty else ""),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda or ""
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def _best(work: Callable[[], object], repetitions: int = 7) -> float:
    """Shortest of several times: a roofline is what the machine can do."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def cpu_roofline(threads: int) -> dict[str, float]:
    """Bytes per second read, copied (read + written) and copied into fresh memory; exponentials per second."""
    x = torch.randn(1 << 26)
    y, size = torch.empty_like(x).copy_(x), x.nbytes
    roofline = {"copy": 2 * size / _best(lambda: y.copy_(x)), "fresh_copy": 2 * size / _best(x.clone)}
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        library = Path(folder) / "roofline.so"
        options = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-o", str(library)]
        try:
            subprocess.run([*compiler.split(), *options, str(Path(__file__).with_name("roofline.cpp"))], check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"No roofline for reads and exponentials: {error}")
            return roofline
        core = ctypes.CDLL(str(library))  # ctypes lets go of the interpreter lock while a function runs
        core.read_sum.restype = core.exp_sum.restype = ctypes.c_float
        parts, part = [ctypes.c_void_p(p.data_ptr()) for p in x.chunk(threads)], ctypes.c_int64(x.numel() // threads)

        def read(pieces: int) -> float:
            return _best(lambda: list(pool.map(lambda p: core.read_sum(p, part, ctypes.c_int64(pieces)), parts)))

        roofline["read"] = size / min(read(1), read(4))
        in_cache, repeats = ctypes.c_int64(1 << 12), ctypes.c_int64(1 << 11)
        seconds = _best(lambda: list(pool.map(lambda p: core.exp_sum(p, in_cache, repeats), parts)))
        roofline["exp"] = threads * in_cache.value * repeats.value / seconds
    return roofline


def cuda_roofline() -> dict[str, float]:
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    clock = Clock("cuda", [x], lambda x: y.copy_(x))
    return {"copy": 2 * x.nbytes / median([clock.sample() for _ in range(20)])}


# ---- clocks


class Clock:
    """Times one step of one system: samples are seconds per step. Several clocks take turns.

    On the CPU a sample is one step, or so many that it lasts a quarter of a millisecond. On CUDA it is one step for
    every copy of the logits (together well past the L2 cache, so that each step finds it cold), replayed from a CUDA
    graph, or, where a system cannot be captured or memory is short, queued behind a waiting kernel so that the host
    runs ahead of the device and its own time shows only where the system itself waits for the device.
    """

    def __init__(
        self,
        device: str,
        xs: Sequence[torch.Tensor],
        step: Step,
        prepare: Callable[[], object] | None = None,  # before every sample, outside the clock
        graph: bool = True,
    ) -> None:
        self.device, self.xs, self.step, self.prepare, self.count = device, xs, step, prepare, 1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.timer = "clock"
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        self._once()
        self.sync()
        self.seconds = time.perf_counter() - start  # the second call: the first has compiled and warmed up
        if device == "cuda":
            self.timer = "events"
            if graph:
                self._capture()
            self._wait = int(2e9 * (1.5 * self.seconds + 1e-4))  # cycles, at no more than 2 GHz

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _once(self) -> None:
        for x in self.xs:
            x.grad = None
            self.step(x)

    def _capture(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._once()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                self._once()
            graph.replay()
            torch.cuda.synchronize()
        except Exception:  # a synchronisation inside, or no memory left: events then
            torch.cuda.synchronize()
            return
        self.graph, self.timer = graph, "graph"

    def sample(self) -> float:
        if self.prepare is not None:
            self.prepare()
        if self.device == "cuda":
            return self._cuda_sample()
        (x,) = self.xs
        x.grad = None
        start = time.perf_counter()
        for i in range(self.count):
            if i:
                x.grad = None
            self.step(x)
        return (time.perf_counter() - start) / self.count

    def _cuda_sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        if self.graph is None:
            torch.cuda._sleep(self._wait)  # type: ignore[no-untyped-call]
        start.record()
        if self.graph is None:
            self._once()
        else:
            self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000 / len(self.xs)

    def wall(self, calls: int) -> float:
        """CUDA: seconds per call as a training loop sees them, the host's time included."""
        self.sync()
        start = time.perf_counter()
        for i in range(calls):
            x = self.xs[i % len(self.xs)]
            x.grad = None
            self.step(x)
        self.sync()
        return (time.perf_counter() - start) / calls


def interleaved(clocks: Sequence[Clock], budget: float, most: int = 300) -> list[list[float]]:
    """Samples of every clock, taken in turns (A B C A B C ...), for about ``budget`` seconds, five at least."""
    start = time.perf_counter()
    first = [clock.sample() for clock in clocks]  # thrown away: it warms what the others left cold
    per_round = time.perf_counter() - start
    if clocks[0].device == "cpu" and not any(clock.prepare for clock in clocks):
        count = max(1, int(2.5e-4 / min(first)))
        per_round *= count
        for clock in clocks:
            clock.count = count
    rounds = max(5, min(most, int(budget / per_round)))
    samples: list[list[float]] = [[] for _ in clocks]
    for _ in range(rounds):
        for clock, collected in zip(clocks, samples, strict=True):
            collected.append(clock.sample())
    return samples


# ---- memory


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_bytes(device: str, x: torch.Tensor, step: Step) -> int | None:
    """The most memory that one step needs beside what was there before it.

    CUDA: what the caching allocator handed out. CPU: the process's resident memory, whose high-water mark Linux
    resets on request; whoever allocates, however, is seen. None where that is not to be had, and for small tensors,
    whose memory the C library keeps and hands out again.
    """
    x.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if x.nbytes < 1 << 26:
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        step(x)
        return _resident("VmHWM") - before
    except (OSError, StopIteration):
        return None
