"""The version of fastloss and what it supports: the one place where these are said.

``setup.py`` executes this file without importing the package, so it must import nothing but the standard library.
"""

import re
import sys

__version__ = "0.2.0"
MIN_PYTHON = "3.10"
MIN_TORCH = "2.10"


def _release(version: str) -> tuple[int, ...]:
    """``(2, 10)`` of ``"2.10.0+cu128"`` or ``"2.10.0a0+git1234"``: as numbers, so that 2.9 is older than 2.10."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ImportError(f"fastloss {__version__} cannot read the version {version!r}")
    return tuple(int(part) for part in match.groups())


def require_supported(torch_version: str, python_version: str = sys.version) -> None:
    """Raise an ImportError that names the remedy when this Python or this torch is too old for fastloss."""
    for name, found, oldest in (("Python", python_version, MIN_PYTHON), ("torch", torch_version, MIN_TORCH)):
        if _release(found) < _release(oldest):
            raise ImportError(
                f"fastloss {__version__} needs {name} >= {oldest}, but this is {name} {found.split()[0]}: "
                f"please install a newer {name}"
            )
