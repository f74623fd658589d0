"""The check that a package which only some commands need is installed."""

from __future__ import annotations

import importlib.util


def check_installed(module: str, purpose: str, extra: str) -> None:
    """Raise ValueError, which names the `extra` to install, if `module` is missing."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{purpose}, which is not installed: pip install 'ds-vshape[{extra}]'")
