"""How far a batch's step has got on this rank, and what has failed in it.

DeepSpeed's steps communicate with other ranks before the optimizer at their core computes, and mostly after it. If that
raised on one rank, the others would wait. So its error is kept, and the rank continues with the rest of the step. At
the end of the batch all ranks agree on the outcome:

    no rank has reached the optimizer      the batch doesn't count, and training continues
    all ranks have taken the whole step    the step counts (a monitor has failed, say), and training continues
    anything else                          weights, or states of the optimizer, differ between ranks
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import wraps
from typing import Any


class Reached(IntEnum):
    """How far a rank's step has come."""

    BEFORE = 0
    MIDWAY = 1
    WHOLE = 2


class BatchStep:
    """The step of one batch on this rank."""

    def __init__(self) -> None:
        self.reached = Reached.BEFORE
        # The error to raise at the end of the batch, and whether the optimizer at the core has raised one.
        self.error: Exception | None = None
        self.core_failed = False

    @contextmanager
    def watching(self, optimizer: Any) -> Iterator[None]:
        """Around DeepSpeed's step, in which `optimizer` (torch's at its core, or one like that) steps. Keeps its
        error in `error`."""
        step = optimizer.step

        @wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.reached = Reached.MIDWAY
            try:
                return step(*args, **kwargs)
            except Exception as error:
                self.error, self.core_failed = self.error or error, True
                return None

        own = vars(optimizer).get("step")
        optimizer.step = watched
        try:
            yield
        finally:
            # The step may have replaced the method itself.
            if vars(optimizer).get("step") is watched:
                if own is None:
                    del optimizer.step
                else:
                    optimizer.step = own
