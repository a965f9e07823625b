"""A few faults planted in the CUDA kernels are noticed by the emulated tests; `make mutants` tries all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_planted_faults_are_caught():
    emulated = pytest.importorskip(
        "fastloss_emulated_numpy", reason="the emulated CUDA kernels are not on PYTHONPATH: run `make test`"
    )
    build = Path(emulated.__file__).parent.parent
    command = [sys.executable, ROOT / "tools" / "mutants.py", "--quick", "--build", build]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "mutants, 0 survived" in run.stdout
