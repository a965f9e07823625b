"""tools/judge.py accepts the one kind of finding that it explains, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROUNDING = ["grad", "cross_entropy float64 17", "Fail: grad 0: got -3.33066907e-16 want -2.22044605e-16 (torch -2.22044605e-16, bound 5.9e-31)"]  # fmt: skip  # noqa: E501


def verdict(tmp_path, failures, passed=100, status=1, report=True):
    """The exit status of tools/judge.py for a judge that reports these failures, and what it prints."""
    judge = tmp_path / "judge.py"
    written = json.dumps({"failures": failures, "total": {"pass": passed}})
    judge.write_text(
        "import sys\nfrom pathlib import Path\n"
        "assert sys.argv[1] == 'fastloss' and sys.argv.count('--allow') == 2 and sys.argv[-1] == '--quick'\n"
        f"if {report}: Path(sys.argv[sys.argv.index('--json') + 1]).write_text({written!r})\nsys.exit({status})\n"
    )
    run = subprocess.run(
        [sys.executable, ROOT / "tools/judge.py", judge, "--quick"], capture_output=True, text=True, check=False
    )
    return run.returncode, run.stdout


def test_clean_verdict(tmp_path):
    assert verdict(tmp_path, [], status=0)[0] == 0


def test_rounding_of_torch_is_accepted_and_counted(tmp_path):
    status, printed = verdict(tmp_path, [ROUNDING, ROUNDING])
    assert status == 0 and "2 differences" in printed


@pytest.mark.parametrize(
    "category, name, message",
    [
        ("value", *ROUNDING[1:]),  # another category
        ("grad", "cross_entropy float32 17", ROUNDING[2]),  # another dtype
        ("grad", ROUNDING[1], ROUNDING[2].replace("got -3.33066907e-16", "got -3.33066907e-14")),  # too far off
        ("grad", ROUNDING[1], ROUNDING[2].replace("got -3.33066907e-16", "got nan")),
        ("grad", ROUNDING[1], ROUNDING[2].replace("torch -2.22044605e-16", "torch -1e-16")),  # torch is not the measure
        ("grad", ROUNDING[1], "Fail: grad 0: got 0.900000001 want 0.9 (torch 0.9, bound 2.4e-15)"),  # not near 0
        ("grad", ROUNDING[1], "Fail: grad 0: no gradient"),
    ],
)
def test_anything_else_fails(tmp_path, category, name, message):
    status, printed = verdict(tmp_path, [ROUNDING, [category, name, message]])
    assert status == 1 and "1 differences" in printed and f"FAIL [{category}] {name}: {message}" in printed


def test_a_judge_that_judged_nothing_or_broke_fails(tmp_path):
    assert verdict(tmp_path, [])[0] == 1
    assert verdict(tmp_path, [ROUNDING], passed=0)[0] == 1
    assert verdict(tmp_path, [], status=3, report=False)[0] == 3
