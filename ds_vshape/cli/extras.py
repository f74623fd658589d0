"""What only some commands need."""

from __future__ import annotations

import importlib.util


def check_installed(module: str, purpose: str, extra: str) -> None:
    """ValueError that names the package's `extra` if `module` isn't installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{purpose}, which is not installed: pip install 'ds-vshape[{extra}]'")
