"""What the CUDA compiler says of every kernel: registers, shared memory, stack and spills, from the logs that the build
keeps beside its objects (tools/log_compile.sh).

Fails on any compiler warning, on any stack frame or spill, and on more registers or shared memory than
tests/cuda_limits.json records (registers differ between compilers, so those count for the recorded nvcc only).

    python tools/cuda_report.py build/core-cuda [--verbose] [--record]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = ROOT / "tests/cuda_limits.json"


@dataclass
class Kernel:
    name: str  # demangled, without parameters
    arch: str
    registers: int = -1
    shared: int = 0
    stack: int = -1
    spills: int = 0


def parse(log: str) -> tuple[list[Kernel], list[str]]:
    """The kernels of one log, and the lines that are warnings or that make no sense."""
    kernels: list[Kernel] = []
    complaints = []
    mangled = function = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            mangled, arch = match[1], match[2]
            kernels.append(Kernel(mangled, arch))
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
            if function == mangled and kernels:
                kernels[-1].stack, kernels[-1].spills = stack, spills
            elif stack or spills:  # a device function that was not inlined
                complaints.append(f"{function}: {stack} bytes of stack, {spills} bytes spilled")
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
        elif "warning" in line.lower():
            complaints.append(line.strip())
    complaints += [f"no account of {k.name} for {k.arch}" for k in kernels if k.registers < 0 or k.stack < 0]
    return kernels, complaints


def demangle(kernels: list[Kernel]) -> None:
    names = "\n".join(kernel.name for kernel in kernels)
    command = ["c++filt", "--no-params"]
    shown = subprocess.run(command, input=names, check=True, capture_output=True, text=True).stdout.splitlines()
    for kernel, name in zip(kernels, shown, strict=True):
        kernel.name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("fastloss::", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("core", type=Path, help="CMake's build folder")
    parser.add_argument("--record", action="store_true", help=f"write what is found to {LIMITS.relative_to(ROOT)}")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each kernel and architecture")
    options = parser.parse_args()

    nvcc = json.loads((options.core / "core.json").read_text())["nvcc"]
    sources = options.core / "CMakeFiles/fastloss_core.dir"
    logs = {source: sources / f"{source.relative_to(ROOT)}.o.log" for source in sorted(ROOT.glob("csrc/*/*.cu"))}
    # Those of the groups of pointwise losses, which CMake writes.
    groups = sorted(options.core.glob("groups/*.cu"))
    logs |= {source: sources / f"groups/{source.name}.o.log" for source in groups}
    kernels: list[Kernel] = []
    problems = [] if groups else [f"no group of pointwise losses was compiled in {options.core}"]
    for source, log in logs.items():
        if not log.exists():
            problems.append(f"{source.name} was not compiled in {options.core}")
            continue
        found, complaints = parse(log.read_text())
        kernels += found
        problems += [f"{source.name}: {complaint}" for complaint in complaints]
    demangle(kernels)

    # The largest over all architectures, which are few and near each other.
    most: dict[str, list[int]] = {}
    for k in kernels:
        registers, shared = most.get(k.name, [0, 0])
        most[k.name] = [max(registers, k.registers), max(shared, k.shared)]
    if options.record:
        lines = [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(most.items())]
        text = (
            f'{{\n  "nvcc": "{nvcc}",\n  "registers, bytes of shared memory": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
        )
        LIMITS.write_text(text)
    recorded = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    limits = recorded.get("registers, bytes of shared memory", {})
    problems += [
        f"{k.name} for {k.arch}: {k.stack} bytes of stack, {k.spills} bytes spilled"
        for k in kernels
        if k.stack or k.spills
    ]
    for name, (registers, shared) in most.items():
        if name not in limits:
            problems.append(f"{name} has no recorded limits: look at it, then run with --record")
        elif shared > limits[name][1] or (registers > limits[name][0] and nvcc == recorded["nvcc"]):
            problems.append(f"{name}: {registers} registers, {shared} bytes shared; recorded limits are {limits[name]}")

    if options.verbose:
        for k in sorted(kernels, key=lambda k: (k.name, int(k.arch.removeprefix("sm_")))):
            print(f"{k.arch:>7} {k.registers:4} registers {k.shared:6} B shared  {k.name}")
    archs = sorted({k.arch for k in kernels}, key=lambda arch: int(arch.removeprefix("sm_")))
    print(f"CUDA report, nvcc {nvcc}: {len(most)} kernels from {len(logs)} files for {' '.join(archs)}")
    if most:
        name = max(most, key=lambda n: most[n][0])
        print(f"  most registers: {most[name][0]} in {name}")
    for problem in problems:
        print(f"  FAILED: {problem}")
    print("  warnings, stack, spills, limits: " + ("FAILED" if problems else "ok"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
