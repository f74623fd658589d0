"""Traces of batches with recomputation and copies: what is shown of them, from a simulated batch."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from chromium import Elements, look

from ds_vshape.measure.trace.batch import OFFLOAD, PASS, WAIT_RELOAD, BatchTrace, Clock, Event, RankTrace
from ds_vshape.measure.trace.chrome import chrome_trace
from ds_vshape.measure.trace.page import page
from ds_vshape.schedule.activations import Activations, memory_curve
from ds_vshape.schedule.passes import Kind, O, Pass, R
from ds_vshape.schedule.placement import linear
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate

ORDER = tuple(map(Pass.parse, "F0.0 F0.1 O0.0 F0.2 BW0.2 R0.0 BW0.1 C0.0 BW0.0".split()))
SCHEDULE = Schedule("copies", linear(1), 3, (ORDER,))
PREDICTED = simulate(SCHEDULE, Times.uniform(1, copy=2))
SIZES = Activations((4,), (4,), ((1,),))


def traced() -> BatchTrace:
    """A batch that ran as predicted; its O was called when F0.1 had ended, and waited for a unit."""
    events = [Event(PASS, span.action, span.start - (span.action.kind is Kind.O), span.end)
              for span in PREDICTED.ranks[0]]
    events += [Event(OFFLOAD, O(0, 0), 1, 1), Event(WAIT_RELOAD, R(0, 0), 9, 9)]
    copies = (*PREDICTED.offloads[0], *PREDICTED.reloads[0])
    rank = RankTrace.parse(RankTrace(tuple(events), {}, copies).text())
    return BatchTrace(1, SCHEDULE, (rank,), (Clock(0, 0),), PREDICTED, "its times", SIZES, "activations")


def test_measured_is_what_was_predicted() -> None:
    """The wait of an O is no span, so the bubble and the memory are right."""
    assert traced().measured.ranks == PREDICTED.ranks
    assert traced().measured.bubble == PREDICTED.bubble


def test_every_event_has_a_slice() -> None:
    events = chrome_trace([traced()])["traceEvents"]
    slices = {event["name"]: event["dur"] / 1e6 for event in events if event["ph"] == "X" and event["pid"] == 0}
    assert set(slices) == {*map(repr, ORDER), "start O0.0", "wait for R0.0"}
    assert slices["O0.0"] == 1 and slices["C0.0"] == 1


def test_the_page_shows_recomputation_and_copies() -> None:
    data = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page([traced()]), re.DOTALL)
    assert data
    for which in ("predicted", "measured"):
        row = json.loads(data[1])["batches"][0][which]["ranks"][0]
        assert [kind for kind, *_ in row["passes"]] == ["F", "F", "F", "BW", "BW", "C", "BW"]
        assert row["copies"] == [[["O", 0, 0, 0, 1, 1, 3]], [["R", 0, 0, 0, 1, 6, 8]]]
        assert row["memory"] == [list(point) for point in memory_curve(PREDICTED.ranks[0], SIZES)]


@pytest.mark.browser
def test_a_browser_shows_each_copy_in_a_row_of_its_direction(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page([traced()]))
    document = look(path, "--dump-dom")
    root, *elements = [attributes for _, attributes in Elements(document).found]
    assert "data-error" not in root
    boxes = [attributes for attributes in elements if "data-pass" in attributes]
    assert Counter(box["data-pass"] for box in boxes) == Counter({repr(action): 2 for action in ORDER})
    tops = {name: {float(box["y"] or 0) for box in boxes if (box["data-pass"] or "").startswith(name)}
            for name in "FOR"}
    passes, outwards, backwards = (*tops["F"], *tops["O"], *tops["R"])
    assert passes < outwards < backwards
    assert "copy to the host" in document and "copy back" in document
