"""Writes the table of losses in docs/losses.md from the registry (fastloss.testing) and the docstrings."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

import torch
from fastloss.testing import SPECS, LossSpec

PAGE = Path(__file__).resolve().parent.parent / "docs" / "losses.md"
BEGIN, END = "<!-- written by tools/loss_table.py -->\n", "<!-- end of what is written -->\n"


def row(spec: LossSpec) -> str:
    """Function, module, the first sentence of its docstring, whether torch has it."""
    face = sys.modules[spec.function.__module__]
    modules = inspect.getmembers(face, lambda m: inspect.isclass(m) and m.__module__ == face.__name__)
    (module,) = [name for name, kind in modules if issubclass(kind, torch.nn.Module)]
    summary = " ".join((inspect.getdoc(spec.function) or "").partition("\n\n")[0].split())
    summary = re.sub(r"; a drop-in for :func:`[^`]*`", "", summary).rstrip(".")
    summary = re.sub(r":\w+:`([^`]*)`", r"`\1`", summary).replace("``", "`").replace("|", "\\|")
    drop_in = f"`F.{spec.name}`" if spec.torch_function else "no"
    return f"| `{spec.name}` | `{module}` | {summary} | {drop_in} |\n"


def table() -> str:
    return "| function | module | | drop-in for |\n|---|---|---|---|\n" + "".join(map(row, SPECS.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the table is what it should be")
    check = parser.parse_args().check
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = before + BEGIN + "\n" + table() + "\n" + END + after
    if check and new != text:
        print("The table of losses in docs/losses.md is out of date: run python tools/loss_table.py", file=sys.stderr)
    elif not check:
        PAGE.write_text(new)
    return int(check and new != text)


if __name__ == "__main__":
    sys.exit(main())
