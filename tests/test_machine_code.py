"""What the CUDA compiler made of the kernels.

Needs the objects of `make build` and a disassembler: cuobjdump and nvdisasm of the CUDA toolkit, or the wheels
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.

Registers, spills and shared memory are tools/cuda_report.py's.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = sorted((ROOT / "build/core-cuda/CMakeFiles/fastloss_core.dir/csrc").glob("*/*.cu.o"))
CLUSTERS_FROM = 90


def disassembler() -> Path | None:
    nvidia = importlib.util.find_spec("nvidia")
    wheels = nvidia.submodule_search_locations or () if nvidia else ()
    folders = [str(f) for wheel in wheels for f in Path(wheel).glob("*/bin")] + [os.environ["PATH"]]
    for folder in [*folders, "/usr/local/cuda/bin"]:
        found = shutil.which("cuobjdump", path=folder)
        if found and (shutil.which("nvdisasm", path=folder) or shutil.which("nvdisasm")):
            return Path(found)
    return None


CUOBJDUMP = disassembler()
pytestmark = [
    pytest.mark.skipif(not OBJECTS, reason="no objects of the CUDA kernels: run `make build` with nvcc"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump with nvdisasm: pip install nvidia-cuda-cuobjdump "
                       "nvidia-cuda-nvdisasm"),
]  # fmt: skip


def kernels(disassembly: str) -> Iterator[tuple[int, str, set[str]]]:
    """Architecture, demangled name and the instructions of every kernel."""
    pieces = re.split(r"^\s*(?:arch = sm_(\d+)|Function : (\S+))\s*$", disassembly, flags=re.MULTILINE)
    found, arch = [], 0
    for number, mangled, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        arch = int(number) if number else arch
        if mangled:
            found.append((arch, mangled, set(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+)", text, re.M))))
    names = subprocess.run(["c++filt", "--no-params"], input="\n".join(f[1] for f in found), text=True,
                           capture_output=True, check=True).stdout.splitlines()  # fmt: skip
    for (arch, _, instructions), name in zip(found, names, strict=True):
        yield arch, name.removeprefix("void ").replace("fastloss::", ""), instructions


def expected(name: str) -> tuple[int, int, bool]:
    """Bytes of the widest load and store that the kernel has to have at least, and whether clusters run it."""
    family, _, rest = name.partition("<")
    arguments = [a.strip() for a in re.sub(r"[()]", " ", rest.rstrip(">")).replace("Pass", "").split(",")]
    if family == "cross_entropy_row_kernel":
        _, _, which, warp_rows, _, _ = arguments
        return 16, 0 if which == "0" else 16, warp_rows == "false"
    if family == "cross_entropy_tile_kernel":
        return 16, 0 if arguments[1] == "0" else 16, False
    if family == "cross_entropy_plane_kernel" and arguments[3] == "true":
        return 8, 0 if arguments[2] == "0" else 8, False
    if family == "pointwise_streaming_kernel":
        return 16, 16 if arguments[-1] == "true" else 0, False
    if family == "scale_grad_kernel":
        return 16, 16, False
    return 0, 0, False


def widest(instructions: set[str], kind: str) -> int:
    """Bytes of the widest access to global memory."""
    found = [i for i in instructions if i.startswith(kind)]
    return max((16 if ".128" in i else 8 if ".64" in i else 4 for i in found), default=0)


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name.removesuffix(".cu.o"))
def test_machine_code(path):
    """128-bit accesses in what streams, nothing in local memory, the cluster's barriers where clusters run and only
    there."""
    environment = os.environ | {"PATH": f"{CUOBJDUMP.parent}:{os.environ['PATH']}"}
    text = subprocess.run(
        [CUOBJDUMP, "-sass", path], env=environment, text=True, capture_output=True, check=True
    ).stdout
    seen, problems = set(), []
    for arch, name, instructions in kernels(text):
        seen.add(name.partition("<")[0])
        load, store, cluster = expected(name)
        cluster &= arch >= CLUSTERS_FROM
        local = sorted(i for i in instructions if re.match(r"(LDL|STL)\b", i))
        barriers = {i for i in instructions if i.startswith("UCGABAR")}
        assert "EXIT" in " ".join(instructions), f"{name}: the disassembly was not understood"
        if widest(instructions, "LDG") < load or widest(instructions, "STG") < store:
            problems.append(f"sm_{arch} {name}: no {8 * load}-bit loads or {8 * store}-bit stores")
        if local:
            problems.append(f"sm_{arch} {name}: local memory, {local}")
        if {b.partition(".")[0] for b in barriers} != ({"UCGABAR_ARV", "UCGABAR_WAIT"} if cluster else set()):
            problems.append(f"sm_{arch} {name}: barriers of a cluster {barriers or 'missing'}")
    if match := re.match("(cross_entropy|pointwise)_cuda_", path.name):
        assert any(name.startswith(match[1]) for name in seen), "the kernels are not in the disassembly"
    assert not problems, "\n".join(problems)
