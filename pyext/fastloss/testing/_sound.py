"""fastloss.check as an assertion."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ..diagnosis import Report, Task, check


def assert_sound(
    loss_fn: Callable[..., Any],
    kind: str | Task | None = None,
    *,
    allow: Collection[str] = (),
    warnings: bool = True,
    compile: bool | str = False,
    **options: Any,
) -> Report:
    """Raise AssertionError with the table of :func:`fastloss.check` if a property fails.

    Args:
        loss_fn, kind, compile, options: as :func:`fastloss.check`.
        allow: names of properties that may fail.
        warnings: let properties warn; False: a warning is a failure too.

    Returns:
        The report.
    """
    report = check(loss_fn, kind, compile=compile, **options)
    unknown = set(allow) - {f.name for f in report.findings}
    if unknown:
        raise ValueError(f"no such properties: {', '.join(sorted(unknown))}")
    bad = report.named("failure") + ([] if warnings else report.named("warning"))
    if set(bad) - set(allow):
        raise AssertionError(f"\n{report}")
    return report
