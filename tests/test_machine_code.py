"""What the CUDA compiler made of the kernels.

Needs the objects of `make build` and a disassembler: cuobjdump and nvdisasm of the CUDA toolkit, or the wheels
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.

Registers, spills and shared memory are tools/cuda_report.py's.
"""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = sorted((ROOT / "build/core-cuda/CMakeFiles/fastloss_core.dir").rglob("*.cu.o"))
CLUSTERS_FROM = 90
WIDE_FROM = 100


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


def run(*command, **options) -> str:
    environment = os.environ | {"PATH": f"{CUOBJDUMP.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True, **options)
    return done.stdout


pytestmark = [
    pytest.mark.skipif(not OBJECTS, reason="no objects of the CUDA kernels: run `make build` with nvcc"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump with nvdisasm: pip install nvidia-cuda-cuobjdump "
                       "nvidia-cuda-nvdisasm"),
]  # fmt: skip


def code_of(cubin: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Mangled name and instructions, 16 bytes each, of the kernels in an ELF file."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        at = headers[names][4] + name
        section = cubin[at : cubin.index(b"\0", at)].decode()
        if section.startswith(".text."):
            yield section.removeprefix(".text."), [cubin[i : i + 16] for i in range(offset, offset + length, 16)]


def disassemble(arch: int, words: list[bytes], folder: Path) -> dict[bytes, str]:
    """What each instruction is called, with all that follows it after a dot."""
    raw = folder / f"sm_{arch}.bin"
    raw.write_bytes(b"".join(words))
    text = run("nvdisasm", "-ndf", "-b", f"SM{arch}", raw)
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+)", text, re.M)
    return dict(zip(words, names, strict=True))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[Path, list[tuple[int, str, set[str]]]]:
    """Architecture, demangled name and the instructions of every kernel in every object.

    The disassembler takes some 13 us for an instruction, and there are millions; each that is the same to the last bit
    is shown to it once.
    """
    folder = tmp_path_factory.mktemp("cubins")
    found: list[tuple[Path, int, str, set[bytes]]] = []
    words: dict[int, set[bytes]] = {}
    for path in OBJECTS:
        run("cuobjdump", "-xelf", "all", path, cwd=folder)
        for cubin in folder.glob("*.cubin"):
            arch = int(re.search(r"\.sm_(\d+)\.cubin$", cubin.name)[1])
            for mangled, code in code_of(cubin.read_bytes()):
                found.append((path, arch, mangled, set(code)))
                words.setdefault(arch, set()).update(code)
            cubin.unlink()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = pool.map(lambda arch: disassemble(arch, list(words[arch]), folder), words)
        names = dict(zip(words, tables, strict=True))
    demangled = subprocess.run(["c++filt", "--no-params"], input="\n".join(f[2] for f in found), text=True,
                               capture_output=True, check=True).stdout.splitlines()  # fmt: skip
    kernels: dict[Path, list[tuple[int, str, set[str]]]] = {path: [] for path in OBJECTS}
    for (path, arch, _, code), name in zip(found, demangled, strict=True):
        short = name.removeprefix("void ").replace("fastloss::", "")
        kernels[path].append((arch, short, {names[arch][word] for word in code}))
    return kernels


def expected(name: str) -> tuple[int, int, bool]:
    """Bytes of the widest load and store that the kernel has to have at least, and whether clusters run it; 32 stands
    for 16 before sm_100."""
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
        return 32, 32, False
    if family == "pointwise_general_kernel":
        return 16, 16, False
    if family == "scale_grad_kernel" or (family == "token_log_probs_gradient_kernel" and arguments[2] == "true"):
        return 16, 16, False
    if family == "divergence_kernel" and arguments[0] == "float" and arguments[1] != "1":
        return 16, 16, False
    return 0, 0, False


def widest(instructions: set[str], kind: str) -> int:
    """Bytes of the widest access to global memory."""
    found = [i for i in instructions if i.startswith(kind)]
    return max((32 if ".256" in i else 16 if ".128" in i else 8 if ".64" in i else 4 for i in found), default=0)


def test_every_kernel_is_looked_at():
    """Those of the groups of pointwise losses, too, which CMake writes elsewhere."""
    groups = [path.stem for path in ROOT.glob("csrc/pointwise/losses/*.h")]
    sources = [f"pointwise_{group}_cuda_{accum}.cu" for group in groups for accum in ("f32", "f64")]
    sources += [path.name for path in ROOT.glob("csrc/*/*.cu")]
    assert {path.name for path in OBJECTS} >= {f"{source}.o" for source in sources}


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name.removesuffix(".cu.o"))
def test_machine_code(path, kernels):
    """128-bit accesses in what streams (256-bit in contiguous pointwise losses from sm_100 on), nothing in local
    memory, the cluster's barriers where clusters run and only there."""
    seen, problems = set(), []
    for arch, name, instructions in kernels[path]:
        seen.add(name.partition("<")[0])
        load, store, cluster = expected(name)
        cluster &= arch >= CLUSTERS_FROM
        load, store = (min(width, 32 if arch >= WIDE_FROM else 16) for width in (load, store))
        local = sorted(i for i in instructions if re.match(r"(LDL|STL)\b", i))
        barriers = {i for i in instructions if i.startswith("UCGABAR")}
        assert "EXIT" in " ".join(instructions), f"{name}: the disassembly was not understood"
        if widest(instructions, "LDG") < load or widest(instructions, "STG") < store:
            problems.append(f"sm_{arch} {name}: no {8 * load}-bit loads or {8 * store}-bit stores")
        if local:
            problems.append(f"sm_{arch} {name}: local memory, {local}")
        if {b.partition(".")[0] for b in barriers} != ({"UCGABAR_ARV", "UCGABAR_WAIT"} if cluster else set()):
            problems.append(f"sm_{arch} {name}: barriers of a cluster {barriers or 'missing'}")
    if match := re.match(r"(cross_entropy|pointwise)_(\w+_)?cuda_", path.name):
        assert any(name.startswith(match[1]) for name in seen), "the kernels are not in the disassembly"
    assert not problems, "\n".join(problems)
