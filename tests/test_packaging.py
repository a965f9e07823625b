"""Building and installing: what holds before anything is compiled, and what a user is told when it cannot be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fastloss
import pytest
from fastloss import _version
from fastloss.__main__ import code_for

ROOT = Path(__file__).resolve().parent.parent

# Runs setup.py as on a machine where shutil.which finds none of the named tools.
SETUP_WITHOUT = """
import runpy, shutil, sys
missing, which = set(sys.argv[1].split()), shutil.which
shutil.which = lambda name, *rest, **options: None if name in missing else which(name, *rest, **options)
sys.argv = ["setup.py", "-q", *sys.argv[2:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def run_setup(*arguments, missing="", **environment):
    """The exit status of setup.py in a process of its own, and all that it printed."""
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "FASTLOSS_CUDA")}
    done = subprocess.run(
        [sys.executable, "-c", SETUP_WITHOUT, missing, *arguments],
        cwd=ROOT,
        env={**env, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def fake_torch(folder, source):
    """A torch that stands before the real one on the path."""
    (folder / "torch.py").write_text(source)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "pyext")])}


def test_metadata_needs_no_torch(tmp_path):
    environment = fake_torch(tmp_path, 'raise RuntimeError("torch was imported")')
    status, output = run_setup("build_ext", **environment)
    assert status != 0 and "torch was imported" in output  # building does import it

    status, output = run_setup("egg_info", "--egg-base", str(tmp_path), **environment)
    assert status == 0, output
    lines = (tmp_path / "fastloss.egg-info/PKG-INFO").read_text().splitlines()
    assert "Name: fastloss" in lines
    assert f"Version: {_version.__version__}" in lines
    assert f"Requires-Python: >={_version.MIN_PYTHON}" in lines
    assert f"torch>={_version.MIN_TORCH}" in (tmp_path / "fastloss.egg-info/requires.txt").read_text().split()


def test_a_setuptools_without_wheels_is_named(tmp_path):
    """That of a new environment of Python 3.10 or 3.11."""
    (tmp_path / "sitecustomize.py").write_text(
        "import setuptools, setuptools.errors as errors\n"
        "known = setuptools.Distribution.get_command_class\n"
        "def get(self, name):\n"
        "    if name == 'bdist_wheel':\n"
        "        raise errors.ModuleError(f'invalid command {name!r}')\n"
        "    return known(self, name)\n"
        "setuptools.Distribution.get_command_class = get\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "pyext")])
    status, output = run_setup("dist_info", "--output-dir", str(tmp_path), PYTHONPATH=path)
    assert status != 0 and "Traceback" not in output
    assert "fastloss cannot be built: this setuptools makes no wheels" in output and "setuptools>=70.1" in output
    assert run_setup("egg_info", "--egg-base", str(tmp_path), PYTHONPATH=path)[0] == 0  # needs none


@pytest.mark.parametrize(
    ("missing", "environment", "named"),
    [
        ("nvcc", {"FASTLOSS_CUDA": "1"}, ("nvcc", "FASTLOSS_CUDA=0")),
        ("c++ g++ clang++", {"FASTLOSS_CUDA": "0"}, ("C++17 compiler", "g++")),
        ("no-such-c++", {"FASTLOSS_CUDA": "0", "CXX": "no-such-c++"}, ("C++17 compiler", "no-such-c++")),
        ("cmake", {"FASTLOSS_CUDA": "0"}, ("cmake", "pip install cmake")),
        ("", {"FASTLOSS_CUDA": "yes"}, ("FASTLOSS_CUDA", "'yes'")),
    ],
)
def test_what_is_missing_is_named_in_one_message(missing, environment, named):
    status, output = run_setup("build_ext", missing=missing, **environment)
    assert status != 0
    (message,) = [line for line in output.splitlines() if "fastloss cannot be built" in line]
    for part in named:
        assert part in message
    assert "Traceback" not in output


def test_build_without_torch_names_it(tmp_path):
    environment = fake_torch(tmp_path, 'raise ImportError("No module named torch")')
    status, output = run_setup("build_ext", **environment)
    assert status != 0 and "Traceback" not in output
    assert f"fastloss cannot be built: torch >= {_version.MIN_TORCH}" in output


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.13.0+cpu", "3.0", "2.100.1"])
def test_supported_torch(version):
    _version.require_supported(version)


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.9", "1.13.1"])
def test_unsupported_torch_is_named_with_the_remedy(version):
    with pytest.raises(ImportError, match=rf"needs torch >= 2\.10, but this is torch {version[:3]}.*install a newer"):
        _version.require_supported(version)


def test_unsupported_python_is_named():
    with pytest.raises(ImportError, match=r"needs Python >= 3\.10, but this is Python 3\.9\.18:"):
        _version.require_supported("2.13.0", "3.9.18 (main, Jan 1 2026) [GCC 12.2.0]")


def test_import_checks_the_version_of_torch(tmp_path):
    environment = fake_torch(tmp_path, '__version__ = "2.9.1+cu128"\n')
    done = subprocess.run(
        [sys.executable, "-c", "import fastloss"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastloss") and "torch >= 2.10" in last and "2.9.1" in last


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ((7, 0), "not usable, sm_75"),
        ((7, 5), "own code"),
        ((8, 0), "own code"),
        ((8, 6), "code of sm_80"),
        ((8, 9), "code of sm_80"),
        ((9, 0), "own code"),
        ((10, 3), "code of sm_100"),
        ((11, 0), "PTX of compute_100"),  # of no major version in the build
        ((12, 1), "code of sm_120"),
        ((13, 0), "PTX of compute_100"),
    ],
)
def test_which_code_a_gpu_runs(gpu, said):
    assert said in code_for(*gpu, ["sm_75", "sm_80", "sm_90", "sm_100", "compute_100", "sm_120"])


def test_a_gpu_older_than_the_ptx():
    assert "FASTLOSS_CUDA_ARCHS=110" in code_for(11, 0, ["sm_80", "sm_120", "compute_120"])


def test_the_package_does_without_its_testing():
    """fastloss.testing is for tests, of users too; what it needs stands elsewhere."""
    package = Path(fastloss.__file__).parent
    modules = [path for path in package.rglob("*.py") if "testing" not in path.relative_to(package).parts]
    assert len(modules) > 50
    for path in modules:
        assert not re.search(r"^\s*(from|import)\s[^#\n]*\btesting\b", path.read_text(), re.M), path
