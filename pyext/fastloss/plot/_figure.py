"""What the pictures share. matplotlib is imported when something is drawn, not before."""

from __future__ import annotations

import functools
import importlib
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
    if hasattr(figure, "number") and "inline" in importlib.import_module("matplotlib").get_backend():
        figure._ipython_display_ = functools.partial(_show_once, figure)
    return figure


def _show_once(figure: Any) -> None:
    """What a notebook calls to show a figure: closed, the cell's value is not shown again at the cell's end."""
    del figure._ipython_display_  # from now on it is shown as every other
    importlib.import_module("IPython.display").display(figure)
    pyplot().close(figure)
