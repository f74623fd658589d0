"""The text picture: literally, and when it doesn't fit."""

from __future__ import annotations

import re

import pytest

from ds_vshape.schedule import drawing
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import BW, B, F, Pass, W
from ds_vshape.schedule.placement import linear, v
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times, simulate


def picture(name: str, ranks: int, micro_batches: int, times: tuple[float, ...] = (1, 1, 1),
            columns: int = 200) -> str:
    schedule = build(name, ranks, micro_batches)
    timeline = simulate(schedule, Times.uniform(schedule.placement.stages, *times))
    return drawing.draw(timeline, schedule.placement, columns)


def test_literally() -> None:
    assert picture("1f1b", 2, 2).splitlines() == [
        "time    0              5",
        "rank 0  F0 F1 ......BW0-- ...BW1--",
        "rank 1  ...F0 BW0-- F1 BW1-- ......",
        drawing.LEGEND]


def test_the_figure_of_the_docstring() -> None:
    indented = [line[4:] for line in (drawing.__doc__ or "").splitlines() if line.startswith("    ")]
    assert indented[1:3] == picture("v-zb", 2, 2).splitlines()[1:3]
    order = tuple(map(Pass.parse, "F0.0 F0.1 O0.0 F0.2 BW0.2 R0.0 BW0.1 C0.0 BW0.0".split()))
    schedule = Schedule("copies", linear(1), 3, (order,))
    rows = drawing.draw(simulate(schedule, Times.uniform(1, copy=2)), schedule.placement).splitlines()
    assert indented[3:] == rows[1:4]
    assert rows[4] == f"{drawing.LEGEND}; C forward again; O copy to the host; R copy back"
    assert [re.findall(drawing.PASSES[kind], rows[place]) for kind, place in (("C", 1), ("O", 2), ("R", 3))] == [
        ["C0"], ["O0---"], ["R0---"]]


def test_a_wait_for_a_copy_is_one_bubble() -> None:
    order = tuple(map(Pass.parse, "F0.0 O0.0 R0.0 BW0.0".split()))
    schedule = Schedule("copies", linear(1), 1, (order,))
    assert drawing.bubbles(simulate(schedule, Times.uniform(1, copy=2))) == [[(1, 5)]]


def test_a_pass_is_as_wide_as_it_is_long() -> None:
    rows = picture("1f1b", 2, 2, times=(1, 3, 1)).splitlines()
    assert rows[2] == "rank 1  ...F0 BW0-------- F1 BW1-------- ............"


def test_long_numbers_get_room() -> None:
    row = picture("1f1b", 1, 101, columns=10_000).splitlines()[1]
    assert row.startswith("rank 0  F0-- BW0------ F1-- BW1------ ") and row.endswith("F99- BW99----- F100 BW100----")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_usual_size_fits_a_terminal_of_200_columns(name: str) -> None:
    lines = picture(name, 4, 8).splitlines()
    assert all(len(line) <= 200 for line in lines)
    if name != "1f1b-v":  # the longest of them all: 206 columns
        assert len(lines) == 4 + 2


def test_what_does_not_fit_is_cut_with_a_note() -> None:
    whole, cut = picture("v-half", 4, 8).splitlines(), picture("v-half", 4, 8, columns=80).splitlines()
    assert all(len(line) <= 80 for line in cut[:5])
    assert [line[:80].rstrip() for line in whole[1:5]] == cut[1:5]
    assert cut[5] == "... cut off at time 24 of 53: all of it takes 167 columns"


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_pass_is_found_by_its_colour(name: str) -> None:
    schedule = build(name, 3, 4)
    rows = "\n".join(drawing.draw(simulate(schedule, Times.uniform(schedule.placement.stages)),
                                  schedule.placement, 1000).splitlines()[1:4])
    for kind, pattern in drawing.PASSES.items():
        assert len(re.findall(pattern, rows)) == sum(action.kind.value == kind for _, action in schedule.passes())


def test_a_measured_timeline_may_start_anywhere() -> None:
    schedule = Schedule("one", linear(1), 1, ((F(0, 0), BW(0, 0)),))
    timeline = simulate(schedule, Times.uniform(1))
    later = Timeline(tuple(tuple(type(span)(span.action, span.start + 1e6, span.end + 1e6) for span in rank)
                           for rank in timeline.ranks))
    assert drawing.draw(later, linear(1)) == drawing.draw(timeline, linear(1))


def test_pieces_of_a_w_without_room_for_their_number_have_none() -> None:
    first, *others = W(0, 10).cut(4)
    halves = W(0, 11).cut(2)
    order = (F(0, 10), F(0, 11), B(0, 10), first, B(0, 11), *others, *halves)
    schedule = Schedule("pieces", linear(1), 12, (order,))
    # 4 characters a unit: a quarter of W has one, a half has two.
    shown = drawing.draw(simulate(schedule, Times.uniform(1)), linear(1))
    assert shown.splitlines()[1] == "rank 0  F10 F11 B10 WB11 WWWW-W-"
    assert [match.group() for match in re.finditer(drawing.PASSES["W"], shown)] == ["W", "W", "W", "W", "W-", "W-"]
    assert [match.group() for match in re.finditer(drawing.PASSES["B"], shown)] == ["B10", "B11"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_bubbles_are_all_the_time_without_a_pass(name: str) -> None:
    schedule = build(name, 3, 4)
    timeline = simulate(schedule, Times.uniform(schedule.placement.stages, 10, 12, 8, 1))
    found = drawing.bubbles(timeline)
    assert sum(end - start for gaps in found for start, end in gaps) == pytest.approx(
        3 * timeline.makespan * timeline.bubble)
    for rank, gaps in zip(timeline.ranks, found, strict=True):
        parts = sorted([*gaps, *((span.start, span.end) for span in rank)])
        assert (parts[0][0], parts[-1][1]) == (0, timeline.makespan)
        assert all(before[1] == after[0] for before, after in zip(parts, parts[1:]))


def test_no_bubbles_without_passes() -> None:
    assert drawing.bubbles(Timeline(((), ()))) == [[], []]


def test_nothing_to_draw() -> None:
    assert drawing.draw(Timeline(((), ())), v(2)) == "(no passes)"
