"""``python -m fastloss plot curves package.module:loss … --save x.png``; exit status 2: it could not be drawn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ..diagnosis import KINDS
from ..diagnosis.command import load
from ._curves import curves


def main(argv: Sequence[str]) -> int:
    """Parse, draw, write; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastloss plot",
        description="Draw the value and the gradient of losses, as a picture or as a page that answers to the mouse.",
        epilog="example: python -m fastloss plot curves fastloss:huber_loss fastloss:l1_loss --save robust.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # an example that is wrapped is two commands in a shell
    )
    parser.add_argument("what", choices=["curves"], help="value and gradient along one logit or residual")
    parser.add_argument(
        "loss", nargs="+", help="package.module:name or file.py:name, a function, an nn.Module or its class"
    )
    parser.add_argument("--kind", choices=[*KINDS], help="what the losses are fed with (default: guessed)")
    parser.add_argument("--classes", type=int, default=3, help="of the logits (default: 3)")
    parser.add_argument("--vary", type=int, default=0, help="which class, or entry of the prediction (default: 0)")
    parser.add_argument("--span", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of the logit or residual")
    dtypes = ["float64", "float32", "float16", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="float64", help="of the predictions (default: %(default)s)")
    parser.add_argument(
        "--save", metavar="PICTURE.png", default="curves.png", help="or .svg, .pdf, .html, … (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        curves(
            {path.rpartition(":")[2] if len(args.loss) == 1 else path: load(path) for path in args.loss},
            args.kind,
            vary=args.vary,
            span=args.span and tuple(args.span),
            classes=args.classes,
            dtype=getattr(torch, args.dtype),
            save=args.save,
        )
    except Exception as e:
        print(f"{', '.join(args.loss)} could not be drawn: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    print(f"written: {args.save}")
    return 0
