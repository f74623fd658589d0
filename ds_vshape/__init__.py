"""V-shape pipeline schedules for DeepSpeed.

Importing the package imports neither torch nor deepspeed: the schedules and the planner work without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_vshape.module.pipeline_module import PipelineModule
    from ds_vshape.plugin import initialize

__version__ = "0.2.0"
__all__ = ["PipelineModule", "initialize"]

_HOMES = {"PipelineModule": "ds_vshape.plugin", "initialize": "ds_vshape.plugin"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
