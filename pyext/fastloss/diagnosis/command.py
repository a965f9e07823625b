"""``python -m fastloss check package.module:loss``; exit status 0: no failure, 1: failures, 2: it could not be run."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import KINDS, NOTES, check


def load(path: str) -> Any:
    """``package.module:name`` or ``file.py:name``; raises with what there is instead."""
    place, _, name = path.rpartition(":") if ":" in path else (path, "", "")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the caller, also where the command is an installed script
    if place.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(place)))  # what it imports from beside it
        spec = importlib.util.spec_from_file_location(os.path.basename(place)[:-3], place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as e:
            hint = " (a file is named with its .py, directories with /)" if e.name == place.partition(".")[0] else ""
            raise ModuleNotFoundError(f"{e}{hint}") from e
    loss: Any = module
    for part in name.split(".") if name else []:
        loss = getattr(loss, part, None)
    if not name or loss is None:
        offered = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        own = [k for k in offered if getattr(vars(module)[k], "__module__", "") == module.__name__]
        near = difflib.get_close_matches(name, offered, 5) or sorted(own or offered)[:8] or ["nothing to call"]
        raise AttributeError(
            f"{place} has no {name!r}, but {', '.join(near)}"
            if name
            else f"name the loss, too, as in {place}:{near[0]}"
        )
    return loss


def main(argv: Sequence[str]) -> int:
    """Parse, check, print; the exit status."""
    kinds = "\n".join(f"  {name:<22}{what}" for name, what in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fastloss check",
        description="Examine a loss (prediction, target) -> tensor:\nis its gradient right, finite and useful, is its "
        "value least where the prediction is right, …\nExit status 0: no failure, 1: failures, 2: it could not be run.",
        epilog=f"kinds:\n{kinds}\n\nexample: python -m fastloss check torch.nn.functional:huber_loss --kind regression",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("loss", help="package.module:name or file.py:name, a function, an nn.Module or its class")
    parser.add_argument("--kind", choices=[*KINDS], help="what the loss is fed with (default: guessed)")
    parser.add_argument("--classes", type=int, help="of the logits (default: 5, or what the loss takes)")
    parser.add_argument("--samples", type=int, default=6, help="in a batch (default: 6)")
    parser.add_argument("--shape", type=int, nargs="*", help="what follows (samples,) or (samples, classes)")
    parser.add_argument("--ignore-index", type=int, help="a target that the loss leaves out")
    parser.add_argument("--couples-samples", action="store_true", help="samples are meant to be compared in a batch")
    parser.add_argument("--reference", help="another implementation to be held against, named as the loss is")
    parser.add_argument("--require", choices=NOTES, nargs="*", default=[], help="what is to warn, not to be a note")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--inductor", action="store_true", help="torch.compile generates code, too (several seconds)")
    parser.add_argument("--strict", action="store_true", help="warnings count as failures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--save", metavar="PAGE.html", help="write a page with plots")
    args = parser.parse_args(argv)
    try:
        loss = load(args.loss)
        report = check(
            loss,
            args.kind,
            classes=args.classes,
            samples=args.samples,
            shape=None if args.shape is None else tuple(args.shape),
            ignore_index=args.ignore_index,
            couples_samples=args.couples_samples,
            reference=load(args.reference) if args.reference else None,
            require=args.require,
            seed=args.seed,
            compile="inductor" if args.inductor else not args.no_compile,
        )
        if args.save:
            report.save(args.save)
    except Exception as e:
        print(f"{args.loss} could not be examined: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    print(report.to_json() if args.json else report)
    return 1 if args.strict and report.named("warning") else report.exit_status
