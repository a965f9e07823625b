"""New losses of every kind, by the steps of CONTRIBUTING.md to the letter, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(
    r"(?:The new file `(?P<new>[^`]+)`|In `(?P<file>[^`]+)`,\s+above `(?P<anchor>[^`]+)`):"
    r"\n\n```\w+\n(?P<text>.*?)```\n",
    re.DOTALL,
)
NAMES = ("laplace_loss", "soft_iou_loss", "bounded_cross_entropy", "brier_loss")
# What each is, said once more and apart from the page; arguments of one call.
CHECK = """
import math
import fastloss, torch
from fastloss.testing import check_gradients

torch.manual_seed(0)
wide = torch.randn(40, 50, dtype=torch.float64) * 3
x, t, p = wide, torch.randn(40, 50, dtype=torch.float64), wide.softmax(1)
s, index = torch.randn(50, dtype=torch.float64), torch.arange(40) % 50
one_hot = torch.nn.functional.one_hot(index, 50).double()
both, either = (p * one_hot).sum(1), (p + one_hot - p * one_hot).sum(1)
p_t = p.gather(1, index[:, None])
exact = {
    "LaplaceLoss": -torch.distributions.Laplace(t, s.exp()).log_prob(x).mean() - math.log(2),
    "SoftIoULoss": (1 - (both + 0.5) / (either + 0.5)).mean(),
    "BoundedCrossEntropyLoss": (3 * torch.tanh(-p_t.log() / 3)).mean(),
    "BrierLoss": ((p - one_hot) ** 2).sum(1).mean(),
}
calls = {
    "LaplaceLoss": ({}, (x, t, s)),
    "SoftIoULoss": ({"smooth": 0.5}, (p, one_hot)),
    "BoundedCrossEntropyLoss": ({"bound": 3.0}, (x, index)),
    "BrierLoss": ({}, (p, index)),
}
for name, (options, args) in calls.items():
    module = getattr(fastloss, name)(**options)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        loss = module(*(a.to(dtype) if a.is_floating_point() else a for a in args))
        assert loss.dtype == dtype and abs(loss.item() / exact[name].item() - 1) < tolerance, (name, dtype, loss, exact)
    few = [a[:3].detach().requires_grad_() if a.is_floating_point() else a[:3] for a in args if a is not s]
    few += [s.detach().requires_grad_()] * (name == "LaplaceLoss")
    check_gradients(module, *few, forward_mode=True)

# A row map serves heads without logits as well.
head = torch.nn.Sequential(torch.nn.Linear(8, 50))
hidden = torch.randn(6, 8)
want = fastloss.bounded_cross_entropy(head(hidden), index[:6], 2.0)
fastloss.lazy_head(head, head="0")
torch.testing.assert_close(fastloss.bounded_cross_entropy(head(hidden), index[:6], 2.0), want)
assert fastloss.lazy_head.report(head).fused
"""


def steps():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Add a loss\n")[1].split("\n## ")[0]
    found = list(STEP.finditer(section))
    assert len(found) == section.count("\n```") // 2, "a code block that says not where it goes"
    return found


def apply(step, root):
    if step["new"]:
        (root / step["new"]).write_text(step["text"])
        return
    path = root / step["file"]
    text = path.read_text()
    assert step["anchor"] in text, f"{step['file']} has no {step['anchor']}"
    at = text.index(step["anchor"])
    line = text.rindex("\n", 0, at) + 1
    path.write_text(text[:line] + step["text"] + text[line:])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs commands in a copy of the repository with the new losses, built."""
    if not (ROOT / "setup.py").exists() or not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs the sources, cmake and a C++ compiler")
    root = tmp_path_factory.mktemp("copy")
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py", "*.egg-info", "results")
    for name in ("csrc", "pyext", "tests", "tools", "bench", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for step in steps():
        apply(step, root)

    # The portable kernels alone, the others are compiled from the same lines; and optimised little, in half the time.
    compiler = root / "compiler"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O1\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "FASTLOSS_CUDA": "0", "FASTLOSS_ISAS": "portable", "PYTHONPATH": str(root / "pyext")}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))
    environment["CXX"] = str(compiler)

    def run(*command):
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    return run


def test_new_losses_are_what_they_should_be(run):
    run(sys.executable, "-c", CHECK)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_loss_passes_the_tests_of_every_loss(name, run):
    """Its spec brings it to them."""
    chosen = f"{name} and (float64 or numerical or kernels or bytes)"
    options = ("-q", "--device", "cpu", "-p", "no:cacheprovider", "-k", chosen)
    said = run(sys.executable, "-m", "pytest", "tests/test_contract.py", *options)
    assert int(re.search(r"(\d+) passed", said)[1]) > 40


def test_new_losses_are_known_everywhere(run):
    """To the tests that look whether every loss has a spec, to the table of losses, to the benchmarks."""
    complete = ("tests/test_pointwise.py", "tests/test_row_losses.py", "tests/test_transforms.py")
    chosen = "has_a_spec or specs_are or operator_is_checked"
    options = ("-q", "--device", "cpu", "-p", "no:cacheprovider", "-k", chosen)
    run(sys.executable, "-m", "pytest", *complete, *options)
    run(sys.executable, "tools/loss_table.py")
    written = run(sys.executable, "-c", "print(open('docs/losses.md').read())")
    for name in NAMES:
        assert f"| `{name}` |" in written
    run(sys.executable, "-c", "import sys; sys.path.insert(0, 'bench'); import cases")


@pytest.mark.parametrize("linter", ("ruff check -q pyext", "mypy"))
def test_new_losses_pass_the_linters(linter, run):
    name, *arguments = linter.split()
    pytest.importorskip(name)
    run(sys.executable, "-m", name, *arguments, *(f"pyext/fastloss/losses/{loss}.py" for loss in NAMES))


def test_the_page_of_losses_has_every_one():
    """Its table is what tools/loss_table.py writes."""
    if not (ROOT / "tools/loss_table.py").exists():
        pytest.skip("needs the sources")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pyext")}
    done = subprocess.run([sys.executable, ROOT / "tools/loss_table.py", "--check"], env=environment)
    assert done.returncode == 0
