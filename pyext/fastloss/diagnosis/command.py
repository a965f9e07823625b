"""``python -m fastloss check package.module:loss``; exit status 0: no failure, 1: failures, 2: it could not be run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch

from . import KINDS, check


def main(argv: Sequence[str]) -> int:
    """Parse, check, print; the exit status."""
    kinds = "\n".join(f"  {name:<22}{what}" for name, what in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fastloss check",
        description="Examine a loss (prediction, target) -> tensor.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("loss", help="package.module:name of a function, a module or a module's class")
    parser.add_argument("--kind", choices=[*KINDS], help="what the loss is fed with (default: guessed)")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--shape", type=int, nargs="*", help="what follows (samples,) or (samples, classes)")
    parser.add_argument("--ignore-index", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--strict", action="store_true", help="warnings count as failures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--save", metavar="PAGE.html", help="write a page with plots")
    args = parser.parse_args(argv)
    module, _, name = args.loss.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the caller, also where the command is an installed script
    try:
        loss = getattr(importlib.import_module(module), name)
        if isinstance(loss, type) and issubclass(loss, torch.nn.Module):
            loss = loss()
        report = check(
            loss,
            args.kind,
            classes=args.classes,
            samples=args.samples,
            shape=None if args.shape is None else tuple(args.shape),
            ignore_index=args.ignore_index,
            seed=args.seed,
            compile=not args.no_compile,
        )
    except Exception as e:
        print(f"{args.loss} could not be examined: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    print(report.to_json() if args.json else report)
    if args.save:
        report.save(args.save)
    return 1 if args.strict and report.named("warning") else report.exit_status
