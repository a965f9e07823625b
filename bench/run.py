"""Measures fastloss beside eager PyTorch, torch.compile and, on CUDA, its peers: ``python bench/run.py --help``.

Every system of a case is first checked against float64; a wrong one gets no time. Then the systems take turns, so that
a busy moment of the machine meets all of them; the results are medians, with all samples kept. Results go to
``bench/results/<device>-<date>-<commit>.json``, with a Markdown table and plots beside it (``bench/report.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from cases import BACKWARD, CASES, FORWARD, SCALED, Case, Problem
from measure import Clock, cpu_roofline, cuda_roofline, environment, interleaved, median, peak_bytes
from peers import Function, System, systems

# Relative and absolute (to the largest gradient) tolerance, wide enough for eager's own rounding: its bfloat16
# softmax starts from a log-softmax rounded to 8 bits.
TOLERANCE = {"float64": (1e-10, 1e-12), "float32": (1e-4, 1e-6), "bfloat16": (6e-2, 1e-5), "float16": (2e-2, 1e-5)}
LARGE = 1 << 28  # bytes; above, graphs of several systems would not fit side by side


class Produced(torch.autograd.Function):
    """Logits as a model leaves them: no leaf, so that their memory may be given away."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, buffer: list[torch.Tensor]) -> torch.Tensor:
        return buffer[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


def stepper(system: System, function: Function, mode: str, x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """One step of a mode, as a function of the logits."""
    if mode == FORWARD:
        return function
    scale = torch.tensor(0.5, dtype=x.dtype, device=x.device) if mode == SCALED else None

    anchor = torch.zeros((), device=x.device, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = function(x)
        torch.autograd.backward(loss, scale)
        return loss

    def inplace_step(x: torch.Tensor) -> torch.Tensor:
        logits = Produced.apply(anchor, [x])  # type: ignore[no-untyped-call]
        loss = function(logits)
        (x.grad,) = torch.autograd.grad(loss, logits, scale)
        return loss

    return inplace_step if system.inplace else step


def error(case: Case, mode: str, x: torch.Tensor, value: torch.Tensor, truth: tuple[float, torch.Tensor]) -> float:
    """How far off value and gradient are, in units of the tolerance: above 1 is wrong."""
    rtol, atol = TOLERANCE[case.dtype]
    atol = 2e-2 if case.hidden else atol  # a product of matrices rounds relative to its largest terms
    worst = abs(value.item() - truth[0]) / (rtol * abs(truth[0]))
    if mode != FORWARD:
        if x.grad is None:
            return math.inf
        expected, factor = truth[1], 0.5 if mode == SCALED else 1.0
        least = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps  # results may be subnormal
        floor = atol * factor * float(max(expected.max(), -expected.min())) + least
        for part, exact in zip(torch.split(x.grad, 1024), torch.split(expected, 1024), strict=True):
            exact = exact * factor
            worst = max(worst, float(((part - exact).abs() / (rtol * exact.abs() + floor)).max()))
    return worst if worst == worst else math.inf


@dataclasses.dataclass
class Bench:
    """One run: a machine, the systems found there, and the results so far."""

    device: str
    threads: int
    found: dict[str, System]
    default: Sequence[str]
    chosen: Sequence[str] | None  # by the user: then these and no others
    seconds: float  # of sampling per case and mode

    def case(self, case: Case) -> Iterator[dict[str, Any]]:
        """The results of every mode and system, as they go into the JSON file."""
        torch._dynamo.reset()
        torch.set_num_threads(case.threads or self.threads)
        wanted = self.chosen or (*(case.systems or self.default), *case.also)
        names = [name for name in self.found if name in wanted]
        problem = Problem(case, self.device)
        functions = {name: self.found[name].make(problem) for name in names}
        truth, master = problem.reference(), problem.x
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if self.device == "cuda" else 0
        copies = [master.clone() for _ in range(max(1, math.ceil(3 * l2 / master.nbytes)))]  # clones keep the layout
        for mode in case.goals:
            clocks: dict[str, Clock] = {}
            rows: dict[str, dict[str, Any]] = {}
            for name in names:
                function, system = functions[name], self.found[name]
                if function is None or mode not in system.modes:
                    continue
                progress(f"{case.name}, {mode}: preparing {name}")
                rows[name] = row = {"case": case.name, "mode": mode, "system": name}
                try:
                    clock = self._clock(case, mode, system, function, truth, copies, master, row)
                except Exception as failure:
                    row["status"] = f"failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0][:80]}"
                    clock = None
                if clock is not None:
                    clocks[name] = clock
            if clocks:
                progress(f"{case.name}, {mode}: measuring {', '.join(clocks)}")
                samples = interleaved(list(clocks.values()), self.seconds)
                for (name, clock), taken in zip(clocks.items(), samples, strict=True):
                    rows[name] |= {"timer": clock.timer, "samples": [float(f"{s:.4g}") for s in taken]}
                    if self.device == "cuda" and clock.timer == "graph":
                        rows[name]["wall"] = float(f"{median([clock.wall(len(copies) + 10) for _ in range(5)]):.4g}")
            del clocks
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            yield from rows.values()

    def _clock(
        self,
        case: Case,
        mode: str,
        system: System,
        function: Function,
        truth: tuple[float, torch.Tensor],
        copies: Sequence[torch.Tensor],
        master: torch.Tensor,
        row: dict[str, Any],
    ) -> Clock | None:
        """Checks the system and measures its memory on the way; None, with the reason in ``row``, if it is wrong."""
        if system.inplace:
            xs = [copy.clone() for copy in copies]
        else:
            xs = [copy.detach().requires_grad_(mode != FORWARD) for copy in copies]

        def restore() -> None:
            for x in xs:
                x.copy_(master)

        step = stepper(system, function, mode, master)
        value = step(xs[0]).detach()
        row["error"] = float(f"{error(case, mode, xs[0], value, truth):.3g}") if system.computes else 0.0
        row["status"] = "ok" if row["error"] <= 1 else "WRONG"
        if row["status"] != "ok":
            return None
        if system.inplace:
            restore()
        if mode not in (FORWARD, BACKWARD):
            row["peak"] = peak_bytes(self.device, xs[0], step)
        if mode == BACKWARD:
            losses: list[torch.Tensor] = []
            return Clock(
                self.device,
                xs,
                lambda x: torch.autograd.backward(losses.pop(0)),
                prepare=lambda: losses.extend(function(x) for x in xs),
                graph=False,
            )
        return Clock(self.device, xs, step, prepare=restore if system.inplace else None, graph=master.nbytes <= LARGE)


class OutOfTime(BaseException):
    """The budget is spent, or somebody sent SIGTERM: what has been measured is kept."""


def out_of_time(number: int, frame: object) -> None:
    raise OutOfTime


def progress(text: str) -> None:
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def run(
    device: str,
    threads: int,
    cases: Sequence[Case],
    names: Sequence[str] | None = None,
    seconds: float = 1.5,
    budget: float = math.inf,
    module: str = "fastloss",
    isa: str | None = None,
    complete: bool = True,
) -> dict[str, Any]:
    """Measures ``cases``; no case is begun when ``budget`` seconds are over, and those left out are named."""
    begun = time.perf_counter()
    torch.set_num_threads(threads)
    found, default = systems(device, module)
    unknown = set(names or ()) - set(found)
    if unknown:
        raise SystemExit(f"No such system here: {', '.join(sorted(unknown))}. There are: {', '.join(found)}.")
    data: dict[str, Any] = {"environment": environment(device, threads, isa), "complete": complete, "left_out": []}
    if data["environment"]["load"] > 0.25 * (os.cpu_count() or 1):
        print(f"Others are using this machine (load {data['environment']['load']:.1f}): expect times to be off.")
    print("Systems:", ", ".join(names or default))
    progress("measuring the roofline")
    data["roofline"] = cpu_roofline(threads) if device == "cpu" else cuda_roofline()
    progress("")
    print("Roofline:", report.roofline_text(data["roofline"]), flush=True)
    bench = Bench(device, threads, found, default, names, seconds)
    data["cases"] = {case.name: case_facts(case) for case in cases}
    data["results"] = []
    for number, case in enumerate(cases, 1):
        rows: list[dict[str, Any]] = []
        try:
            if time.perf_counter() - begun > budget:
                raise OutOfTime
            for row in bench.case(case):
                rows.append(row)
        except OutOfTime:
            data["left_out"] += [left.name for left in cases[number - 1 :]]
            data["complete"] = False
            break
        except Exception as failure:  # out of memory, say: the next case may still do
            rows.append({"case": case.name, "mode": FORWARD, "system": "all", "status": f"failed: {failure}"})
        data["results"] += rows
        progress("")
        for line in report.console_lines(rows):
            print(f"[{number}/{len(cases)}] {line}", flush=True)
    torch.set_num_threads(threads)
    data["seconds"] = round(time.perf_counter() - begun)
    return data


def limit_isa(isa: str, argv: Sequence[str] | None) -> None:
    """Keeps torch, torch.compile and fastloss to an instruction set; torch reads it when it is loaded, hence again."""
    if os.environ.get("ATEN_CPU_CAPABILITY") != isa:
        again = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, again, {**os.environ, "ATEN_CPU_CAPABILITY": isa})
    import torch._inductor.config
    from fastloss._library import set_isa

    torch._inductor.config.cpp.simdlen = 256
    set_isa(isa)


def case_facts(case: Case) -> dict[str, Any]:
    """What the report needs to know of a case, so that a results file stands by itself."""
    return {
        "shape": case.shape,
        "dtype": case.dtype,
        "loss": case.loss,
        "bytes": case.bytes,
        "fewest_bytes": {mode: case.fewest_bytes(mode) for mode in case.goals},
        "exps": case.exps,
        "linear": case.hidden > 0,
        "goals": case.goals,
        "detail": case.detail,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", action="append", help="only cases with this text in their name; may be repeated")
    parser.add_argument("--systems", help="only these, separated by commas")
    parser.add_argument("--isa", choices=("avx2",), help="CPU: torch, torch.compile and fastloss with AVX2 alone")
    parser.add_argument("--quick", action="store_true", help="a few cases, less time each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=math.inf, help="begin no case after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--module", default="fastloss", help="the module measured as fastloss")
    args = parser.parse_args(argv)
    wanted = args.cases or [""]
    cases = [c for c in CASES[args.device] if any(w in c.name for w in wanted) and (c.quick or not args.quick)]
    if not cases:
        parser.error(f"no case matches {args.cases!r}; there are: " + "; ".join(c.name for c in CASES[args.device]))
    names = args.systems.split(",") if args.systems else None
    if args.isa:
        limit_isa(args.isa, argv)
    signal.signal(signal.SIGTERM, out_of_time)
    data = run(
        args.device,
        args.threads,
        cases,
        names,
        seconds=(0.4 if args.quick else 1.5) / (4 if args.device == "cuda" else 1),
        budget=args.budget,
        module=args.module,
        isa=args.isa,
        complete=len(cases) == len(CASES[args.device]) and names is None and args.module == "fastloss",
    )
    path = report.write(data, args.out)
    print(f"\n{report.summary(data)}\n\n{data['seconds']} s. Results: {path}, and .md and .png beside it.")
    ours = [r for r in data["results"] if r["system"].startswith("fastloss")]
    if not ours and names is None:
        print(f"{args.module} has not been measured: see above.", file=sys.stderr)
    return 1 if (not ours and names is None) or any(r["status"] != "ok" for r in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
