"""SVG and PNG of timelines: every pass a box of its length, every bubble one, and the memory below its limit."""

from __future__ import annotations

import re
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ds_vshape.cli import main
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.drawing import bubbles
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.pictures import COLOURS, Panel, save
from ds_vshape.schedule.placement import linear
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times, simulate

SVG = "{http://www.w3.org/2000/svg}"
PASS = r"panel(\d+)-((?:F|B|W|BW|C|O|R)\d+\.\d+)(?:-(\d+)(?:of(\d+))?)?"


class Picture:
    """A parsed SVG."""

    def __init__(self, file: Path) -> None:
        self.root = ElementTree.parse(file).getroot()
        assert self.root.tag == SVG + "svg"
        ids = [element.get("id") for element in self.root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        self.groups = {element.get("id", ""): element for element in self.root.iter(SVG + "g")}

    def passes(self, panel: int) -> dict[Pass, ElementTree.Element]:
        """The boxes of passes in a panel."""
        found = {}
        for name, group in self.groups.items():
            match = re.fullmatch(PASS, name)
            if match and int(match[1]) == panel:
                part = f"[{match[3]}{'/' * bool(match[4])}{match[4] or ''}]" if match[3] else ""
                found[Pass.parse(match[2] + part)] = group
        return found

    def bubbles(self, panel: int) -> list[ElementTree.Element]:
        """The boxes of bubbles in a panel."""
        return [group for name, group in self.groups.items() if name.startswith(f"panel{panel}-bubble")]

    @property
    def texts(self) -> list[str]:
        """All that is written."""
        return ["".join(element.itertext()).strip() for element in self.root.iter(SVG + "text")]


def box(group: ElementTree.Element) -> tuple[float, float, float, str]:
    """Left, right, top and colour of a box."""
    path, = group.iter(SVG + "path")
    corners = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d", ""))
    assert len(corners) == 4
    xs, ys = [float(x) for x, _ in corners], [float(y) for _, y in corners]
    colour = re.search(r"fill: (#\w+)", path.get("style", ""))
    assert colour
    return min(xs), max(xs), min(ys), colour[1]


def draw(tmp_path: Path, schedule: Schedule, timeline: Timeline, limit: float | None = None) -> Picture:
    file = tmp_path / "picture.svg"
    panel = Panel("title", "figures", schedule.placement, timeline, Activations.counted(schedule.placement), limit, 8)
    save([panel], file, "svg")
    return Picture(file)


@pytest.mark.parametrize("name", ["v-half", "1f1b", "interleaved-1f1b"])
def test_every_pass_is_a_box_at_its_place(name: str, tmp_path: Path) -> None:
    schedule = build(name, 4, 8)
    timeline = simulate(schedule, Times.uniform(schedule.placement.stages, 10, 12, 8, 1))
    picture = draw(tmp_path, schedule, timeline)
    boxes = picture.passes(0)
    assert set(boxes) == {action for _, action in schedule.passes()}
    spans = {span.action: span for rank in timeline.ranks for span in rank}
    first = box(boxes[Pass(Kind.F, 0, 0)])
    scale = (first[1] - first[0]) / (spans[Pass(Kind.F, 0, 0)].end - spans[Pass(Kind.F, 0, 0)].start)
    tops: dict[int, set[float]] = {}
    for action, group in boxes.items():
        left, right, top, colour = box(group)
        assert left == pytest.approx(first[0] + scale * spans[action].start, abs=0.01)
        assert right == pytest.approx(first[0] + scale * spans[action].end, abs=0.01)
        tops.setdefault(schedule.placement.rank_of(action.stage), set()).add(top)
        assert colour == COLOURS[action.kind][schedule.placement.chunk_of(action.stage)][0]
    # Each rank in a row of its own, from the top down.
    assert all(len(places) == 1 for places in tops.values())
    assert [min(tops[rank]) for rank in range(4)] == sorted(min(places) for places in tops.values())


@pytest.mark.parametrize("name", ["v-half", "1f1b"])
def test_every_bubble_is_a_white_box(name: str, tmp_path: Path) -> None:
    schedule = build(name, 4, 8)
    timeline = simulate(schedule, Times.uniform(schedule.placement.stages))
    picture = draw(tmp_path, schedule, timeline)
    boxes = [box(group) for group in picture.bubbles(0)]
    assert len(boxes) == sum(map(len, bubbles(timeline))) > 0
    assert {colour for *_, colour in boxes} == {"#ffffff"}
    all_boxes = boxes + [box(group) for group in picture.passes(0).values()]
    total = sum(right - left for left, right, _, _ in all_boxes)
    white = sum(right - left for left, right, _, _ in boxes)
    assert white / total == pytest.approx(timeline.bubble, abs=1e-4)


def test_pieces_of_a_w_are_boxes(tmp_path: Path) -> None:
    order = (Pass(Kind.F, 0, 0), Pass(Kind.B, 0, 0), *Pass(Kind.W, 0, 0).cut(4))
    schedule = Schedule("pieces", linear(1), 1, (order,))
    picture = draw(tmp_path, schedule, simulate(schedule, Times.uniform(1)))
    assert set(picture.passes(0)) == set(order)


def test_copies_have_thin_rows_of_their_own(tmp_path: Path) -> None:
    """Below the rank's passes, in the order out and back, each copy as long as it takes."""
    order = tuple(map(Pass.parse, "F0.0 F0.1 O0.0 BW0.1 R0.0 C0.0[2] BW0.0".split()))
    schedule = Schedule("copies", linear(1), 2, (order,))
    timeline = simulate(schedule, Times((1,), (1,), (1,), recompute=((1, 2, 3),), offload=(3,), reload=(2,)))
    boxes = {action: box(group) for action, group in draw(tmp_path, schedule, timeline).passes(0).items()}
    assert set(boxes) == set(order)
    rows = [boxes[Pass.parse(text)][2] for text in ("F0.0", "O0.0", "R0.0")]
    assert rows == sorted(set(rows)) and boxes[Pass.parse("C0.0[2]")][2] == rows[0]
    unit = boxes[order[0]][1] - boxes[order[0]][0]
    for text, start, end in (("O0.0", 1, 4), ("R0.0", 6, 8), ("C0.0[2]", 8, 10)):
        left, right, _, colour = boxes[Pass.parse(text)]
        at = left - boxes[order[0]][0], right - boxes[order[0]][0]
        assert at == pytest.approx((start * unit, end * unit), abs=0.01)
        assert colour == COLOURS[Pass.parse(text).kind][0][0]


def test_numbers_are_the_micro_batches(tmp_path: Path) -> None:
    schedule = build("v-half", 4, 8)
    picture = draw(tmp_path, schedule, simulate(schedule, Times.uniform(8)))
    axis = {"0", "10", "20", "30", "40", "50"}
    numbers = [text for text in picture.texts if text.isdigit() and text not in axis]
    expected = [str(action.micro_batch) for _, action in schedule.passes() if action.micro_batch]
    assert sorted(numbers) == sorted(expected)


def test_memory_and_limit_are_drawn_for_every_rank(tmp_path: Path) -> None:
    schedule = build("v-half", 4, 8)
    timeline = simulate(schedule, Times.uniform(8))
    heights = {}
    for limit in (None, 6.0):
        picture = draw(tmp_path, schedule, timeline, limit)
        for rank in range(4):
            points = line(picture.groups[f"panel0-memory{rank}"])
            bottom, top = max(y for _, y in points), min(y for _, y in points)
            heights[rank] = bottom - top
            assert (f"panel0-limit{rank}" in picture.groups) == (limit is not None)
            if limit is not None:
                # The peak is the limit here.
                assert {y for _, y in line(picture.groups[f"panel0-limit{rank}"])} == {top}
        assert picture.texts.count("peak 6") == 4
    assert len({round(height, 3) for height in heights.values()}) == 1


def line(group: ElementTree.Element) -> list[tuple[float, float]]:
    path, = group.iter(SVG + "path")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path.get("d", ""))]


def test_a_measured_timeline_may_start_anywhere(tmp_path: Path) -> None:
    schedule = build("v-half", 2, 2)
    timeline = simulate(schedule, Times.uniform(4))
    later = Timeline(tuple(tuple(type(span)(span.action, span.start + 64, span.end + 64) for span in rank)
                           for rank in timeline.ranks))
    first, second = draw(tmp_path, schedule, timeline).passes(0), draw(tmp_path, schedule, later).passes(0)
    assert ({action: box(group) for action, group in first.items()}
            == {action: box(group) for action, group in second.items()})


# ---------------------------------------------------------------- from the command line


def test_plan_writes_both_kinds(tmp_path: Path) -> None:
    svg, png = tmp_path / "a.svg", tmp_path / "a.png"
    arguments = ["plan", "--schedule", "v-zb", "--stages", "2", "--micro-batches", "3", "--svg", str(svg)]
    assert main([*arguments, "--png", str(png)]) == 0
    picture = Picture(svg)
    assert len(picture.passes(0)) == sum(1 for _ in build("v-zb", 2, 3).passes())
    assert "v-zb: 2 ranks, 4 stages (v), 3 micro-batches" in picture.texts
    assert any("bubble" in text and "lower bound" in text and "of 1F1B's" in text for text in picture.texts)
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000 and height > 300
    # The same schedule gives the same file.
    again = svg.read_bytes()
    assert main(arguments) == 0
    assert svg.read_bytes() == again


def test_compare_draws_a_panel_for_each_on_one_scale(tmp_path: Path) -> None:
    svg = tmp_path / "a.svg"
    names = ["1f1b", "v-half", "v-zb"]
    assert main(["plan", "--compare", ",".join(names), "--stages", "4", "--micro-batches", "8", "--svg", str(svg)]) == 0
    picture = Picture(svg)
    scales = []
    for panel, name in enumerate(names):
        boxes = picture.passes(panel)
        assert set(boxes) == {action for _, action in build(name, 4, 8).passes()}
        left, right, _, _ = box(boxes[Pass(Kind.F, 0, 0)])
        scales.append((right - left) / (2 if name == "1f1b" else 1))
    assert scales == [pytest.approx(scales[0], rel=1e-3)] * 3


@pytest.mark.parametrize("arguments", [
    ["--schedule", "v-half", "--png", "x.png"],
    ["--schedule", "v-half", "--svg", "x.svg"],
    ["--compare", "v-half,1f1b", "--svg", "x.svg"],
    ["--curve", "x.png"],
])
def test_without_matplotlib_the_error_names_the_extra(arguments: list[str], monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", *arguments, "--stages", "4", "--micro-batches", "8"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pip install 'ds-vshape[plots]'" in captured.err


def test_without_matplotlib_all_else_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    size = ["--stages", "2", "--micro-batches", "2", "--time-limit", "0.1", "--no-cache"]
    assert main(["plan", "--schedule", "v-half", *size]) == 0
    assert main(["plan", "--compare", "v-half,1f1b", *size]) == 0
    assert main(["plan", "--curve", str(tmp_path / "curve.json"), *size]) == 0


def test_a_picture_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--schedule", "v-half", "--stages", "2", "--micro-batches", "2",
                 "--png", "/nowhere/at/all.png"]) == 2
    assert "--png /nowhere/at/all.png: No such file" in capsys.readouterr().err
