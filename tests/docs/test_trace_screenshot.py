"""The screenshot on the page of traces is made by its command, and looks at the page as it is."""

from __future__ import annotations

import struct
from pathlib import Path

from trace_screenshot import SCREENSHOT, SIZE, write


def size_of(file: Path) -> tuple[int, int]:
    """Width and height, from the header of a PNG."""
    start = file.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", start[16:])
    return width, height


def test_the_screenshot_can_be_taken_again(tmp_path: Path) -> None:
    """Fonts differ between machines, so that bytes may; the page itself must not fail, which `look` sees."""
    write(tmp_path / "trace.png")
    assert size_of(tmp_path / "trace.png") == size_of(SCREENSHOT) == SIZE
    # A page without timelines takes a few kilobytes.
    assert (tmp_path / "trace.png").stat().st_size > 15_000
