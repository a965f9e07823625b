"""Checks that a built extension keeps to what the wheel promises: no Python symbol, torch's stable C shim, no CUDA
library needed, nothing exported, and no function compiled for AVX that the linker could pick for everybody.

    python tools/abi_audit.py pyext/fastloss/_C.abi3.so --core build/core-cuda
    python tools/abi_audit.py --platform-tag build/dist/fastloss-*.whl     prints e.g. manylinux_2_34_x86_64
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What a wheel may need: libtorch, which `import torch` has loaded, and what every Linux has (PEP 600).
NEEDED = {"libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
NEEDED |= {"libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
# Weak symbols of the C runtime, which nobody has to define.
WEAK_ANYWHERE = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
# Mangled names of functions in fastloss::avx2 and fastloss::avx512, lambdas included.
OWN_NAMESPACE = re.compile(r"_ZZ*N[KVRO]*8fastloss(4avx2|6avx512)")


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, name) of each symbol, as nm has them."""
    lines = output_of("nm", *options, str(path)).splitlines()
    return [(words[-2], words[-1]) for words in map(str.split, lines) if len(words) >= 2]


def libtorch_cpu() -> Path | None:
    spec = importlib.util.find_spec("torch")  # does not import it
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "lib/libtorch_cpu.so"


def version_floors(undefined: list[tuple[str, str]]) -> dict[str, tuple[int, ...]]:
    """The newest version of each versioned library interface that is asked for, e.g. {"GLIBC": (2, 34)}."""
    floors: dict[str, tuple[int, ...]] = {}
    for _, name in undefined:
        match = re.search(r"@+([A-Z]+)_([0-9.]+)$", name)
        if match:
            version = tuple(int(part) for part in match[2].split("."))
            floors[match[1]] = max(floors.get(match[1], ()), version)
    return floors


def audit_library(path: Path) -> list[str]:
    problems = []
    dynamic = output_of("readelf", "-d", str(path))
    for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if name not in NEEDED:
            problems.append(f"needs {name}")
    if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
        problems.append("has a run path of the build machine")

    torch_library = libtorch_cpu()
    in_libtorch_cpu = {name for _, name in symbols(torch_library, "-D", "--defined-only")} if torch_library else None
    for kind, name in symbols(path, "-D", "--undefined-only"):
        if "@" in name or name in WEAK_ANYWHERE:
            continue
        if name.startswith("Py") or name.startswith("_Py"):
            problems.append(f"uses {name} of Python, but the library is no Python module")
        elif not re.fullmatch(r"(aoti_torch|torch)_\w+", name):
            problems.append(f"uses {name}, which is no part of torch's stable C shim")
        elif kind not in "wv" and in_libtorch_cpu is not None and name not in in_libtorch_cpu:
            problems.append(f"uses {name} strongly, but CPU builds of torch lack it: declare it weak")
    for _, name in symbols(path, "-D", "--defined-only"):
        problems.append(f"exports {name}")
    return problems


def audit_objects(core: Path) -> list[str]:
    """Weak functions are merged by name over all objects: one compiled for AVX-512 could then serve every CPU."""
    problems = []
    objects = [path for path in core.rglob("*.o") if re.search(r"_avx(2|512)\.cpp\.o$", path.name)]
    if platform.machine() == "x86_64" and not objects:
        problems.append(f"no AVX objects in {core}")
    for path in objects:
        for kind, name in symbols(path, "--defined-only"):
            if kind == "W" and not OWN_NAMESPACE.match(name):
                problems.append(f"{path.name} defines {output_of('c++filt', name).strip()} for every instruction set")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="_C.abi3.so or a wheel")
    parser.add_argument("--core", type=Path, help="CMake's build folder: its objects are audited too")
    parser.add_argument("--platform-tag", action="store_true", help="print the wheel's platform tag and nothing else")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        library: Path = options.file
        if library.suffix == ".whl":
            with zipfile.ZipFile(library) as wheel:
                library = Path(wheel.extract("fastloss/_C.abi3.so", folder))
        floors = version_floors(symbols(library, "-D", "--undefined-only"))
        if options.platform_tag:
            print("manylinux_{}_{}_".format(*floors["GLIBC"]) + platform.machine())
            return 0
        problems = audit_library(library)
    if options.core:
        problems += audit_objects(options.core)

    newest = ", ".join(f"{name} {'.'.join(map(str, version))}" for name, version in sorted(floors.items()))
    print(f"ABI audit of {options.file}: needs at least {newest}")
    for problem in problems:
        print(f"  FAILED: {problem}")
    print("  no Python symbols, stable C shim, libraries, exports and AVX symbols: " + ("FAILED" if problems else "ok"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
