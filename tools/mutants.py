"""Mutation test of the CUDA kernels: are the emulated tests strong enough to notice a fault?

    python tools/mutants.py [--quick] [--list] [--jobs N] [--from NUMBER] [PATTERN]

Every barrier and fence is removed in turn, and every bound of a loop or guard over rows, classes, vectors and the like
is shifted by one either way. All faults are compiled in at once (FASTLOSS_MUTANT chooses one at run time), as plain C++
and under the sanitizers; a fault is caught when the short form of the emulated tests (tests/core/test_cuda_on_cpu.py,
test_cuda_extremes.py, test_pointwise_core.py, test_dice_core.py, test_token_log_probs_core.py, test_divergence_core.py)
fails, in the plain build or under the sanitizer that is made for it.
Exits 1 when one survives that EQUIVALENT does not explain.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("*/*_kernel*.cuh", "common/errors_cuda.cuh", "common/primitives.cuh")
# The text of primitives.cuh before this belongs to the GPU alone.
COMMON_FROM = "reductions, common to the GPU and the emulator"

SYNC = re.compile(r"\b(block_barrier|warp_barrier|memory_fence|system_fence|cluster_arrive|cluster_wait)\(\);")
LIMITS = (
    r"p\.(?:rows|classes|outer|inner|count|blocks|totals_count|slice|parts)"
    r"|(?:p\.)?a\.(?:cols|classes|rows \* p\.parts)"
    r"|classes|count|blocks|warps|parts|groups|kGroup|vectors|rows|items|elements|inner_tiles|kPositions"
    r"|span\.head(?: \+ span\.tail)?"
)
BOUND = re.compile(rf"(?<= < )(?:{LIMITS})\b(?! \+)|(?<= >= )(?:{LIMITS})\b")
NOT_CODE = re.compile(r"^\s*(//|#|template|static_assert)")

# What --quick takes: about a minute's worth of those that the plain build notices, from every kernel.
QUICK = ("group_sum(lane < warps", "the results are there", "load16_stream(x + column", "base = first; base < p.rows",
         "(*ticket !=", "i < parts", "item < items", "inner_tile >= inner_tiles", "cluster_arrive(); cluster_wait();",
         "< elements) grad", "v >= count", "< p.totals_count", "i < count; i += step")  # fmt: skip
# Faults that change nothing, by what the line says; `shift` 0: the removal.
EQUIVALENT: list[tuple[str, int, str]] = [
    ("base < vectors; base += kScaleVectors", 1, "every access in the loop has a guard of its own"),
    ("base < vectors; base += gridDim.x * tile", 1, "every access in the loop has a guard of its own"),
    ("v < vectors; v += kVectors * kWarp", 1, "every access in the loop has a guard of its own"),
    ("i < count; i += kN * blockDim.x", 1, "every access in the loop has a guard of its own"),
    ("base = first; base < p.rows", 1, "each row of a turn is looked at by itself"),
    ("row >= p.rows || !target.counts", 1, "a row past the last one was given the target to be ignored"),
    ("target[i] = t[i] != p.ignore_index", 1, "no class is equal to a class that does not exist"),
    ("base_row < p.rows; base_row += row_step", 1, "a row past the last one is not active"),
    ("left < p.slice ? left : p.slice", 1, "the same where the two are equal"),
    ("base < count; base += kN * width", 1, "a tile past the row is -inf throughout"),
    ("blockIdx.x < inner_tiles ? 0", 1, "the loop wraps round"),
    ("blockIdx.x < inner_tiles ? 0", -1, "saves a division, the quotient is 0"),
    ("base < classes; base += chunk", 1, "classes past the last one are -inf"),
    ("c0 < p.a.classes; c0 += kTogether", 1, "classes past the last one are -inf"),
    ("col < a.cols; col += parts * blockDim.x * step", 1, "a group past the row has no element"),
    ("count >= kGroup && run_from(p, i) >= kGroup", 1, "the same one element at a time"),
    ("k * lanes >= classes) break;  // spares the rest", 1, "what follows has a guard of its own"),
]


@dataclass(frozen=True)
class Mutant:
    number: int
    where: str  # file:line
    shift: int  # of a bound; 0: synchronisation removed
    text: str

    def __str__(self) -> str:
        what = f"bound {self.shift:+d}" if self.shift else "removed"
        return f"{self.number:3d}  {self.where}  {what}: {self.text}"

    def reason(self) -> str | None:
        return next((why for text, shift, why in EQUIVALENT if text in self.text and shift == self.shift), None)


def plant(source: Path, target: Path) -> list[Mutant]:
    """Copies the sources with every fault in them, each behind its number."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    mutants: list[Mutant] = []
    for path in sorted(p for pattern in KERNELS for p in target.glob(pattern)):
        lines = path.read_text().splitlines()
        begin = next((i for i, line in enumerate(lines) if COMMON_FROM in line), 0)
        for i in range(begin, len(lines)):
            if NOT_CODE.match(lines[i]):
                continue
            code, _, comment = lines[i].partition("//")
            text = lines[i].strip()

            def new(shift: int, what: str) -> int:
                where = f"{path.relative_to(target)}:{i + 1}"  # noqa: B023
                mutants.append(Mutant(len(mutants) + 1, where, shift, what))
                return len(mutants)

            def bound(match: re.Match[str]) -> str:
                up, down = new(1, f"{match[0]} in {text}"), new(-1, f"{match[0]} in {text}")  # noqa: B023
                return f"{match[0]} + fastloss::bound_shift({up}, {down})"

            def removable(match: re.Match[str]) -> str:
                if match[1] == "cluster_wait":  # goes with the arrive before it, just made: alone neither is any use
                    assert "cluster_arrive();" in lines[i - 1], text  # noqa: B023
                    number = len(mutants)
                else:
                    following = "" if "//" in text else " " + lines[i + 1].strip()  # noqa: B023
                    number = new(0, text + following)  # noqa: B023
                return f"if (!fastloss::removed({number})) {match[0]}"

            code = SYNC.sub(removable, code)
            code = BOUND.sub(bound, code)
            lines[i] = code + ("//" + comment if comment else "")
        path.write_text("\n".join(lines) + "\n")
    types = target / "common" / "types.h"
    types.write_text(
        types.read_text()
        + """
#include <cstdlib>
namespace fastloss {
inline const int mutant = std::getenv("FASTLOSS_MUTANT") ? std::atoi(std::getenv("FASTLOSS_MUTANT")) : 0;
inline bool removed(int number) { return mutant == number; }
inline int bound_shift(int up, int down) { return (mutant == up) - (mutant == down); }
}  // namespace fastloss
"""
    )
    return mutants


def build(directory: Path, variants: tuple[str, ...], faulty: Path) -> None:
    def quietly(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    source, python = str(ROOT / "tests" / "emulate"), f"-DPython_EXECUTABLE={sys.executable}"
    quietly("cmake", "-S", source, "-B", str(directory), "-G", "Ninja", python, f"-DFASTLOSS_MUTANTS={faulty}")
    for variant in variants:
        quietly("cmake", "--build", str(directory), "-j2", "--target", variant)


def library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment(module: Path, mutant: int) -> dict[str, str]:
    """What Python needs beside the environment to load a variant of the module."""
    env = {"PYTHONPATH": str(module), "FASTLOSS_MUTANT": str(mutant), "FASTLOSS_SHORT": "1",
                        "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
    if module.name.endswith("asan"):
        env["LD_PRELOAD"] = " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so")))
        env["ASAN_OPTIONS"] = "detect_leaks=0:detect_odr_violation=0"
        env["UBSAN_OPTIONS"] = "halt_on_error=1:print_stacktrace=1"
        env["FASTLOSS_EXACT"] = "1"
    if module.name.endswith("tsan"):
        env["LD_PRELOAD"] = library("libtsan.so")
        env["TSAN_OPTIONS"] = "halt_on_error=1"
    return env


# A file, and which of its tests a process takes: those of all pointwise losses are too many for one.
TESTS = (
    ("test_cuda_on_cpu", ""),
    ("test_cuda_extremes", ""),
    ("test_pointwise_core", " and value and not float16"),
    ("test_pointwise_core", " and value and float16"),
    ("test_pointwise_core", " and vectors and not count"),
    ("test_pointwise_core", " and (several or weights or layouts or count)"),
    ("test_pointwise_core", " and not (value or vectors or several or weights or layouts or count)"),
    ("test_dice_core", ""),
    ("test_token_log_probs_core", ""),
    ("test_divergence_core", ""),
)


# By the beginning of a kernel's file: the tests that are its own, which see a fault there soonest.
OWN = {
    "pointwise/": "test_pointwise_core",
    "rowwise/dice_loss": "test_dice_core",
    "rowwise/divergence": "test_divergence_core",
    "rowwise/token_log_probs": "test_token_log_probs_core",
}


def passes(
    module: Path, mutant: int = 0, tests: tuple[tuple[str, str], ...] = TESTS, quiet: bool = True, limit: int = 600
) -> bool:
    """Does the short form of the emulated tests pass, each file within so many seconds of a processor (and six times as
    many by the clock)? A fault may also make it run forever. A process for each file or part: ThreadSanitizer keeps
    memory for every CUDA thread there ever was."""
    output = subprocess.DEVNULL if quiet else None
    for name, part in tests:
        # The sanitizer is preloaded into Python alone: a shell does not survive ThreadSanitizer.
        settings = [f"{key}={value}" for key, value in environment(module, mutant).items()]
        command = ["sh", "-c", f'ulimit -t {limit}; exec env "$@"', "sh", *settings,
                   sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "-x", "-s",
                   "--tb=line", "-k", f"not policy and not [core{part}", f"tests/core/{name}.py"]  # fmt: skip
        try:
            run = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=6 * limit)
        except subprocess.TimeoutExpired:
            return False
        if run.returncode != 0:
            return False
    return True


def caught_by(mutant: Mutant, modules: list[Path]) -> str | None:
    """The build in which a test fails: those of the kernel itself are asked first, in every build. None is asked of a
    fault that changes nothing."""
    if mutant.reason():
        return None
    made_for = "tsan" if mutant.shift == 0 else "asan"
    modules = [module for module in modules if module.name.endswith(("plain", made_for))]
    beginning = next((name for name in OWN if mutant.where.startswith(name)), "")
    own = tuple(test for test in TESTS if test[0] == OWN.get(beginning, "test_cuda_on_cpu"))
    for tests in (own, tuple(test for test in TESTS if test not in own)):
        for module in modules:
            if not passes(module, mutant.number, tests):
                return module.name.removeprefix("mutants_")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="only mutants whose description contains this")
    parser.add_argument("--quick", action="store_true", help="a few, the plain build only")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--from", dest="first", type=int, default=1, help="go on with this number, of a run cut short")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "emulated", help="a build directory")
    parser.add_argument("--sanitize", choices=("asan", "tsan"), help="no mutants: the emulated tests under a sanitizer")
    options = parser.parse_args()
    if options.sanitize:
        return 0 if passes(options.build / options.sanitize, quiet=False, limit=3600) else 1

    faulty = options.build / "mutants"
    mutants = [m for m in plant(ROOT / "csrc", faulty) if options.pattern in str(m) and m.number >= options.first]
    if options.quick:
        mutants = [m for m in mutants if any(text in m.text for text in QUICK)]
    if options.list:
        print(*mutants, sep="\n")
        return 0
    variants = ("mutants_plain",) if options.quick else ("mutants_plain", "mutants_asan", "mutants_tsan")
    build(options.build, variants, faulty)
    modules = [options.build / variant for variant in variants]
    # That the tests run at all is enough for a run that goes on and has seen them pass, and for a few faults, beside
    # which `make test` has them pass.
    first = TESTS[-1:] if options.quick or options.first > 1 else TESTS
    for module in modules:
        if not passes(module, 0, first, quiet=False, limit=3600):
            raise SystemExit(f"without any fault the tests already fail: {module.name}")

    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, caught in zip(mutants, pool.map(lambda m: caught_by(m, modules), mutants), strict=True):
            why = mutant.reason()
            survivors += not (caught or why)
            print(f"{caught or ('equivalent' if why else 'SURVIVED'):10s} {mutant}", flush=True)
    print(f"{len(mutants)} mutants, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
