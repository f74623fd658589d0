"""Python's garbage collector, out of the way of plans.

It runs whenever some hundred objects more have been made, and looks at all that the process has: in a training torch,
DeepSpeed and the model. A plan makes hundreds of thousands of objects, which are kept or freed without it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, and in functions that have it as decorator, the garbage collector doesn't run."""
    runs = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if runs:
            gc.enable()
