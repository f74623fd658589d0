"""A progress bar for commands that take seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error, if that is a terminal. Yields a function to call with the finished share."""
    with tqdm(total=1.0, desc=text, leave=False, disable=None, file=sys.stderr,
              bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}") as bar:
        def show(done: float) -> None:
            bar.update(max(0.0, min(done, 1.0) - bar.n))

        yield show
