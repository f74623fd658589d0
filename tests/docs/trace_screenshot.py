"""The screenshot of a trace's page: an example batch, whose passes take up to a fifth longer or shorter than predicted.

    python tests/docs/trace_screenshot.py --write
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random

from chromium import look

from ds_vshape.measure.trace.batch import PASS, BatchTrace, Clock, Event, RankTrace
from ds_vshape.measure.trace.page import page
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.named import build
from ds_vshape.schedule.timeline import Times, simulate

SCREENSHOT = Path(__file__).parents[2] / "ds_vshape" / "docs" / "trace.png"
SIZE = 1100, 930
RANKS, MICRO_BATCHES = 4, 8


def example() -> BatchTrace:
    """A batch under V-Half."""
    schedule, random = build("v-half", RANKS, MICRO_BATCHES), Random(1)
    placement = schedule.placement

    def varied(seconds: float) -> tuple[float, ...]:
        return tuple(seconds * random.uniform(0.8, 1.2) for _ in range(placement.stages))

    predicted = simulate(schedule, Times.uniform(placement.stages, 0.010, 0.011, 0.009, 0.001))
    ran = simulate(schedule, Times(varied(0.010), varied(0.011), varied(0.009), varied(0.001)[1:]))
    ranks = tuple(RankTrace(tuple(Event(PASS, span.action, span.start, span.end) for span in spans), {})
                  for spans in ran.ranks)
    return BatchTrace(10, schedule, ranks, (Clock(0.0, 2e-5),) * RANKS, predicted, "mean measured times",
                      Activations.counted(placement), "activations of 1/8 of the model")


def write(file: Path) -> None:
    """Take the screenshot."""
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "trace.html"
        html.write_text(page([example()]))
        look(html, f"--screenshot={file}", size=SIZE)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write(SCREENSHOT)
