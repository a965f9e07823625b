"""What the pictures share. matplotlib is imported when something is drawn, not before."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

#: Okabe and Ito's colours, which colour-blind people tell apart, and dashes for everybody who prints in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1.5, 1.5, 1.5, 1.5)))


def pyplot() -> Any:
    """matplotlib.pyplot, or an ImportError that names the extra."""
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as missing:
        raise ImportError(f"fastloss.plot needs matplotlib ({missing}): pip install 'fastloss[plot]'") from missing


def finish(figure: Any, save: str | Path | None) -> Any:
    """Write the figure, if asked to, and hand it over."""
    if save is not None:
        figure.figure.savefig(save)  # of a part, the whole
    return figure


class Progress:
    """A bar on stderr that appears after a second; by default on a terminal only."""

    def __init__(self, label: str, total: int, show: bool | None) -> None:
        self.label, self.total, self.done, self.began = label, total, 0, time.perf_counter()
        self.show, self.drawn = sys.stderr.isatty() if show is None else show, 0.0

    def step(self) -> None:
        self.done += 1
        now = time.perf_counter()
        if self.show and now - self.began > 1 and (now - self.drawn > 0.1 or self.done == self.total):
            bar, self.drawn = "#" * (30 * self.done // self.total), now
            left = (now - self.began) / self.done * (self.total - self.done)
            text = f"\r{self.label} [{bar:<30}] {self.done}/{self.total}, {left:.0f} s left "
            print(text, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.drawn:
            print(file=sys.stderr)
