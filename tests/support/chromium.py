"""Pages looked at in a real browser, without a window."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
          "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
          "--enable-logging=stderr"]
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def browser() -> str:
    """The browser of this machine; without one a test is skipped, and fails where it has to run (`.ci/run`)."""
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    reason = f"no browser: none of {', '.join(_NAMES)} is installed (Debian: apt-get install chromium)"
    if os.environ.get("DS_VSHAPE_REQUIRE_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


def look(page: Path, *options: str, size: tuple[int, int] = (1400, 1000)) -> str:
    """What the document has become when its scripts have run; AssertionError for an error or a warning of theirs."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), *_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}",
                   "--virtual-time-budget=4000", *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]
    assert not said, said
    return done.stdout


class Elements(HTMLParser):
    """The attributes of all elements of a document, and the texts by the id of the innermost element that has one."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
