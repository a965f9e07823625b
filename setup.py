"""Builds fastloss: the torch-free core with CMake, then the binding against LibTorch's stable ABI.

One binary, which uses no Python symbol, serves Python >= 3.10 and torch >= 2.10, CPU or CUDA builds. torch is
imported only when the extension is really built: reading the package's metadata needs nothing but setuptools.

    FASTLOSS_CUDA=auto|1|0   auto (default): with CUDA kernels when nvcc is found, GPU or not; 1: required; 0: without
    FASTLOSS_CUDA_ARCHS=90   compile the CUDA kernels for these architectures only (comma separated)
    FASTLOSS_WERROR=1        compiler warnings in the core are errors
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
VERSION: dict = {}
exec((ROOT / "pyext/fastloss/_version.py").read_text(), VERSION)
LIMITED_API = "0x{:02x}{:02x}0000".format(*map(int, VERSION["MIN_PYTHON"].split(".")))
TORCH_TARGET = "0x{:02x}{:02x}000000000000".format(*map(int, VERSION["MIN_TORCH"].split(".")))


def fail(message: str) -> None:
    sys.exit(f"\nfastloss cannot be built: {message}\n")


def require_wheel_command() -> None:
    """pip asks for it. New environments of Python 3.10 and 3.11 have a setuptools that leaves it to another package."""
    if not {"dist_info", "bdist_wheel", "editable_wheel"}.isdisjoint(sys.argv):
        try:
            Distribution().get_command_class("bdist_wheel")
        except BaseError:
            fail("this setuptools makes no wheels. Install a newer one, with: pip install 'setuptools>=70.1'")


def find_nvcc() -> str | None:
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def choose_nvcc() -> str | None:
    """The nvcc to build the CUDA kernels with, as FASTLOSS_CUDA says; None for a build without them."""
    choice = os.environ.get("FASTLOSS_CUDA", "auto").lower()
    if choice not in ("auto", "0", "1"):
        fail(f"FASTLOSS_CUDA must be auto, 0 or 1, not {choice!r}.")
    if choice == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None and choice == "1":
        fail(
            "FASTLOSS_CUDA=1, but nvcc is neither in PATH nor in CUDA_HOME nor in /usr/local/cuda. "
            "Install the CUDA toolkit (>= 12.0), or set FASTLOSS_CUDA=0 to build for the CPU alone."
        )
    return nvcc


def build_core() -> dict:
    """Builds libfastloss_core.a; returns CMake's own account of it (core.json)."""
    nvcc = choose_nvcc()
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        fail(f"no C++17 compiler: {compiler or 'c++, g++ or clang++'} not found. Install g++ or set CXX.")
    cmake = shutil.which("cmake")
    if cmake is None:
        fail("cmake (>= 3.18) not found. Install it, for example with: pip install cmake ninja")
    # The interpreter's own folder may not be in PATH, as with /path/to/venv/bin/pip.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
    generator = "Ninja" if ninja else "Unix Makefiles"

    folder = ROOT / "build" / ("core-cuda" if nvcc else "core-cpu")
    cache = folder / "CMakeCache.txt"
    expected = (f"CMAKE_GENERATOR:INTERNAL={generator}\n", f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n")
    if cache.exists() and not all(line in cache.read_text() for line in expected):
        shutil.rmtree(folder)  # of another build tool, or copied here from elsewhere
    # Given each time, since the cache may hold tools of an isolated build that is gone by now.
    options = {
        "CMAKE_MAKE_PROGRAM": ninja or shutil.which("make"),
        "CMAKE_BUILD_TYPE": "Release",
        "FASTLOSS_CUDA": "ON" if nvcc else "OFF",
        "FASTLOSS_NUMPY": "OFF",
        "FASTLOSS_CUDA_ARCHS": os.environ.get("FASTLOSS_CUDA_ARCHS", ""),
        "FASTLOSS_ISAS": os.environ.get("FASTLOSS_ISAS", "avx2,avx512"),
        "FASTLOSS_WERROR": "ON" if os.environ.get("FASTLOSS_WERROR") == "1" else "OFF",
    }
    if nvcc:
        options["FASTLOSS_NVCC"] = nvcc
    print(f"fastloss: building the core {'with' if nvcc else 'without'} CUDA kernels in {folder}", flush=True)
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", generator]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    build = [cmake, "--build", str(folder), "--target", "fastloss_core", "-j", jobs]
    for step, command in (("configuring", configure), ("compiling", build)):
        if subprocess.run(command).returncode != 0:
            hint = f" To build without the CUDA kernels ({nvcc}), set FASTLOSS_CUDA=0." if nvcc else ""
            fail(f"{step} the core failed, see cmake's message above.{hint}")
    return json.loads((folder / "core.json").read_text())


def git_commit() -> str | None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    answer = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return answer.stdout.strip() or None


def torch_command() -> type:
    """torch's own build command, with what it adds for every extension cut down to what the stable ABI needs."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildFastloss(BuildExtension):
        build_info: dict

        def build_extensions(self):
            super().build_extensions()
            self.write_build_info(Path(self.build_lib) / "fastloss")

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            self.write_build_info(ROOT / "pyext/fastloss")

        def write_build_info(self, package: Path):
            lines = [f"    {name!r}: {value!r},\n" for name, value in self.build_info.items()]
            text = '"""What this build of fastloss contains. Written by setup.py."""\n\nfrom typing import Any\n\n'
            text += "BUILD_INFO: dict[str, Any] = {\n" + "".join(lines) + "}\n"
            package.mkdir(parents=True, exist_ok=True)
            (package / "_build_info.py").write_text(text)

    return BuildFastloss


class BuildCoreThenBinding(build_ext):
    def run(self) -> None:
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            fail(f"torch >= {VERSION['MIN_TORCH']} is needed to build, but: {error}.")
        VERSION["require_supported"](torch.__version__)
        core = build_core()
        extension = self.extensions[0]
        extension.include_dirs += [str(ROOT / "csrc"), *cpp_extension.include_paths()]
        extension.library_dirs += cpp_extension.library_paths()
        extension.extra_objects += [core["library"]]
        extension.extra_compile_args += [
            "-std=c++17",
            "-O2",
            "-fvisibility=hidden",
            "-fvisibility-inlines-hidden",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            *(f"-D{name}" for name in core["defines"]),
            *(["-DUSE_CUDA"] if core["cuda"] else []),
        ]
        # libtorch.so itself defines nothing that we use, but it is what pulls in libtorch_cuda, where the CUDA
        # stream's symbol lives. Not CppExtension's list: c10 and torch_python have no stable ABI.
        extension.extra_link_args += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        extension.extra_link_args += [
            f"-Wl,--version-script={ROOT}/csrc/torch/exports.map",
            "-Wl,--gc-sections",
            "-Wl,-s",
        ]
        extension.extra_link_args += core["link"]

        command = torch_command()(self.distribution)
        for option in ("inplace", "build_lib", "build_temp", "debug", "parallel", "editable_mode"):
            setattr(command, option, getattr(self, option))
        command.force = True  # a library of the same age may be another one, with or without CUDA
        command.build_info = {
            "cuda": core["cuda"],
            "cuda_code": core["cuda_code"],
            "nvcc": core["nvcc"] or None,
            "compiler": core["compiler"],
            "instruction_sets": core["instruction_sets"],
            "torch": torch.__version__,
            "machine": platform.machine(),
            "commit": git_commit(),
        }
        command.ensure_finalized()
        command.run()
        print("fastloss: built " + ", ".join(f"{k}={v}" for k, v in command.build_info.items() if v), flush=True)


require_wheel_command()
setup(
    version=VERSION["__version__"],
    license="MIT",
    python_requires=f">={VERSION['MIN_PYTHON']}",
    install_requires=[f"torch>={VERSION['MIN_TORCH']}"],
    ext_modules=[
        Extension(
            "fastloss._C",
            # Relative, as setuptools wants them.
            sources=sorted(
                str(p.relative_to(ROOT))
                for p in ROOT.glob("csrc/**/*.cpp")
                if p.name.endswith("_torch.cpp") or p.parent.name == "torch"
            ),
            py_limited_api=True,
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildCoreThenBinding},
    options={"bdist_wheel": {"py_limited_api": "cp" + VERSION["MIN_PYTHON"].replace(".", "")}},
)
