"""A new pointwise loss, by the steps of CONTRIBUTING.md to the letter, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(
    r"(?:The new file `(?P<new>[^`]+)`|In `(?P<file>[^`]+)`, above `(?P<anchor>[^`]+)`):\n\n```\w+\n(?P<text>.*?)```\n",
    re.DOTALL,
)
CHECK = """
import fastloss, torch
from fastloss.testing import check_gradients

x, t = torch.randn(40, 50, dtype=torch.float64) * 3, torch.randn(40, 50, dtype=torch.float64)
exact = (0.7**2 / 2 * torch.log1p(((x - t) / 0.7) ** 2)).mean()
for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    loss = fastloss.CauchyLoss(scale=0.7)(x.to(dtype), t.to(dtype))
    assert loss.dtype == dtype and abs(loss.item() / exact.item() - 1) < tolerance, (dtype, loss, exact)
check_gradients(fastloss.cauchy_loss, x[0].requires_grad_(), t[0].requires_grad_(), forward_mode=True, scale=0.7)
"""


def steps():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Add a pointwise loss\n")[1].split("\n## ")[0]
    found = list(STEP.finditer(section))
    assert len(found) == section.count("\n```") // 2, "a code block that says not where it goes"
    return found


def apply(step, root):
    if step["new"]:
        (root / step["new"]).write_text(step["text"])
        return
    path = root / step["file"]
    text = path.read_text()
    at = text.index(step["anchor"])
    line = text.rindex("\n", 0, at) + 1
    path.write_text(text[:line] + step["text"] + text[line:])


def test_a_new_loss(tmp_path):
    if not (ROOT / "setup.py").exists() or not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs the sources, cmake and a C++ compiler")
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py", "*.egg-info", "results")
    for name in ("csrc", "pyext", "tests", "tools", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for step in steps():
        apply(step, tmp_path)

    # The CPU alone, and one instruction set beside the portable one.
    environment = {**os.environ, "FASTLOSS_CUDA": "0", "FASTLOSS_ISAS": "avx2", "PYTHONPATH": str(tmp_path / "pyext")}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    run(sys.executable, "-c", CHECK)
    # The registry brings it to the tests of every loss, to the benchmarks and to the README.
    tests = ("tests/test_contract.py", "tests/test_pointwise.py")
    chosen = "cauchy and (float64 or numerical or kernels or mask or sum)"
    said = run(sys.executable, "-m", "pytest", "-q", "--device", "cpu", "-p", "no:cacheprovider", *tests, "-k", chosen)
    assert int(re.search(r"(\d+) passed", said)[1]) > 100
    run(sys.executable, "tools/loss_table.py")
    assert "| `cauchy_loss` | `CauchyLoss` | Cauchy's loss" in (tmp_path / "README.md").read_text()
    cases = "import sys; sys.path.insert(0, 'bench'); import cases; print([c.name for c in cases.CPU])"
    assert "cauchy_loss" in run(sys.executable, "-c", cases)


def test_the_readme_has_every_loss():
    """Its table is what tools/loss_table.py writes."""
    if not (ROOT / "tools/loss_table.py").exists():
        pytest.skip("needs the sources")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pyext")}
    done = subprocess.run([sys.executable, ROOT / "tools/loss_table.py", "--check"], env=environment)
    assert done.returncode == 0
