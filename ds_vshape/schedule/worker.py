"""A process that plans: one request as JSON on standard input, one answer as JSON on standard output.

    python -m ds_vshape.schedule.worker [PARENT] < request.json > answer.json

It doesn't outlive the process PARENT, even while it is stopped, and gives way to it on the same cores. Until it has
answered it sets the time of its output file anew twice a second, so that a planner that is stopped can be told from one
that takes long.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress

_SECONDS_BETWEEN_SIGNS = 0.5
_NICENESS = 10
# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """End this process with its `parent`, however that ends; until then give signs of life."""
    with suppress(AttributeError, OSError):  # where there is Linux: at once, and even if this process is stopped
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            with suppress(OSError):  # no file
                os.utime(sys.stdout.fileno())
            time.sleep(_SECONDS_BETWEEN_SIGNS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """One request, one answer."""
    if len(sys.argv) > 1:
        end_with(int(sys.argv[1]))
    with suppress(OSError):
        os.nice(_NICENESS)
    # Takes a while: not before this process ends with its parent.
    from ds_vshape.schedule.request import Request, answer

    json.dump(answer(Request.from_json(json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main()
