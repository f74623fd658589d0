"""A part of this process's work in a child of its own, which has all that this process has imported."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(log: Path, body: Callable[[], int]) -> int:
    """Run `body` in a child, whose output goes to the file `log`; the child's id.

    Its exit status is what `body` returns, and 1 after an exception.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)  # pytest has put others in their place
        status = body()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # No interpreter shutdown: the parent's atexit handlers and fixtures aren't this process's business.
        os._exit(status)
