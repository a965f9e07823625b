"""A bar of tqdm on stderr, where tqdm is installed; nothing where it is not."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

DELAY = 1.0  # seconds before a bar appears: what is quick needs none


class _NoBar:
    """In the place of a bar that nobody sees."""

    def update(self, n: int = 1) -> None:
        """As tqdm's."""

    def set_description(self, text: str, refresh: bool = False) -> None:
        """As tqdm's."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress_bar(label: str, total: int, show: bool | None = None, delay: float | None = None) -> Any:
    """A tqdm of so many steps, for a ``with`` block, after which it is gone; by default on a terminal only.

    ``delay``: seconds before it appears, :data:`DELAY` by default; 0 where a step is long.
    """
    if sys.stderr.isatty() if show is None else show:
        with contextlib.suppress(ImportError):
            tqdm = importlib.import_module("tqdm.auto").tqdm
            # miniters=0: update(0) shows that something is going on.
            delay = DELAY if delay is None else delay
            return tqdm(desc=label, total=total, delay=delay, miniters=0, leave=False, dynamic_ncols=True)
    return _NoBar()
