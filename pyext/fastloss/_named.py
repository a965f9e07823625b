"""A loss by its name, for the commands."""

import importlib
import sys
from typing import Any

import torch


def named_loss(path: str) -> Any:
    """What ``package.module:name`` refers to; of a module's class, an instance made without arguments."""
    module, _, name = path.partition(":")
    if not (module and name):
        raise ValueError(f"expected package.module:name, got {path!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the caller, also where the command is an installed script
    loss = getattr(importlib.import_module(module), name)
    return loss() if isinstance(loss, type) and issubclass(loss, torch.nn.Module) else loss
