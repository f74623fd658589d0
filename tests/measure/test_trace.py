"""Traces of real batches: against the engine's own timeline, the schedule's messages and known skews of clocks; the
page as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Elements, look
from deepspeed.pipe import LayerSpec
from deepspeed.utils import logger
from hypothesis import given
from hypothesis import strategies as st
from internals import callbacks_of
from layers import SleepingLinear
from logged import Lines
from PIL import Image
from pipelines import Job, data
from ranks import run_ranks
from torch import Tensor

from ds_vshape.config.section import ConfigError, ScheduleConfig, TraceConfig, read_section
from ds_vshape.measure.trace.batch import Clock, Delivery, Event, RankTrace
from ds_vshape.measure.trace.clocks import clocks, refined
from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.lowering import Channel, Content, Message, channels, message_into
from ds_vshape.schedule.passes import Pass
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline

RANKS, MICRO_BATCHES, WIDTH = 4, 6, 16
TRACED = (3, 4)
# How far the clock of each rank is ahead of the one before.
SKEW = 5.0
_now = time.perf_counter


# -- the config


@pytest.mark.parametrize("section, expected", [
    ({"batches": [10, 12]}, TraceConfig(batches=(10, 12), path="traces")),
    ({"batches": [1, 1], "path": "there"}, TraceConfig(batches=(1, 1), path="there")),
    (None, None),
])
def test_legal_sections(section: Any, expected: TraceConfig | None) -> None:
    assert read_section({"pipeline_schedule": {"name": "v-half", "trace": section}}) == ScheduleConfig(name="v-half",
                                                                                                       trace=expected)


@pytest.mark.parametrize("section", [
    True, "traces", 10, [10, 12], {}, {"path": "traces"}, {"batches": 10}, {"batches": [10]}, {"batches": [0, 2]},
    {"batches": [12, 10]}, {"batches": [1, 2, 3]}, {"batches": [1.5, 2]}, {"batches": ["1", "2"]},
    {"batches": [True, 2]}, {"batches": [10, 12], "path": ""}, {"batches": [10, 12], "path": 7},
    {"batches": [10, 12], "file": "x"},
])
def test_illegal_sections(section: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_section({"pipeline_schedule": {"name": "v-half", "trace": section}})
    assert str(caught.value) == (f"pipeline_schedule.trace = {section!r}: must be {{\"batches\": [first, last], "
                                 "\"path\": a folder}, where batches count from 1 and the last may be the first")


# -- what ranks record


@dataclass(frozen=True)
class Run:
    """What a rank saw of a training whose batches 3 and 4 were traced."""

    schedule: Schedule
    measured: list[Timeline]
    activations: Activations
    # Of every batch, whether the instructions ran unrecorded.
    plain: list[bool]


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    return ((outputs - labels) ** 2).mean()


def watched(engine: Any, seen: list[bool], batches: Iterator[Any]) -> Iterator[Any]:
    """`batches`, with a look at the engine's instructions while it takes them."""
    for number, batch in enumerate(batches):
        if not number:
            seen.append(engine._INSTRUCTION_MAP is type(engine)._INSTRUCTION_MAP)
        yield batch


def traced(rank: int, folder: str) -> Run:
    """Train on ranks whose clocks disagree."""
    time.perf_counter = lambda: _now() + SKEW * rank
    section = {"name": "v-half", "trace": {"batches": list(TRACED), "path": folder}}
    layers = tuple(LayerSpec(SleepingLinear, WIDTH, (0.006, 0.008, 0.004)) for _ in range(2 * RANKS))
    engine = Job(section, RANKS, MICRO_BATCHES, {}, layers).engine(loss_fn=squared)
    measured, plain = [], []
    for batch in range(1, 6):
        torch.manual_seed(batch)
        micro_batches = [(torch.randn(2, WIDTH), torch.randn(2, WIDTH)) for _ in range(MICRO_BATCHES)]
        engine.train_batch(watched(engine, plain, iter(micro_batches)))
        if TRACED[0] <= batch <= TRACED[1]:
            measured.append(engine.timelines()[1])
    assert engine._INSTRUCTION_MAP is type(engine)._INSTRUCTION_MAP
    return Run(engine.schedule(), measured, engine.activation_sizes(), plain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    runs: list[Run] = run_ranks(RANKS, traced, str(folder))
    return runs[0]


@pytest.fixture(scope="module")
def trace(run: Run, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "batches_3-4.trace.json").read_text())
    return found


def slices(trace: dict[str, Any], process: int, batch: int) -> dict[int, list[dict[str, Any]]]:
    """By row, in time."""
    rows = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["pid"] == process and event["args"]["batch"] == batch:
            rows[event["tid"]].append(event)
    return {row: sorted(events, key=lambda event: event["ts"]) for row, events in rows.items()}


def test_only_the_named_batches_are_recorded(run: Run, folder: Path) -> None:
    assert run.plain == [True, True, False, False, True]
    assert sorted(file.name for file in folder.iterdir()) == ["batches_3-4.html", "batches_3-4.trace.json"]


def test_rows_hold_what_ranks_did(run: Run, trace: dict[str, Any]) -> None:
    """All passes in order, as long as the engine measured them; nothing of a row overlaps."""
    for batch, measured in zip(TRACED, run.measured, strict=True):
        rows = slices(trace, 0, batch)
        assert sorted(rows) == list(range(RANKS))
        for rank, events in rows.items():
            for event, after in zip(events, events[1:]):
                assert event["ts"] + event["dur"] <= after["ts"] + 0.01
            passes = [event for event in events if event["cat"] == "pass"]
            assert [event["name"] for event in passes] == [repr(action) for action in run.schedule.orders[rank]]
            assert [(event["args"]["stage"], event["args"]["micro_batch"]) for event in passes] == [
                (action.stage, action.micro_batch) for action in run.schedule.orders[rank]]
            # The engine measures around what the trace measures.
            around = [span.end - span.start - event["dur"] / 1e6
                      for event, span in zip(passes, measured.ranks[rank], strict=True)]
            assert min(around) >= -1e-6 and median(around) < 1e-3
            assert [event["name"] for event in events[-4:]] == ["agree on the batch", "reduce tied gradients",
                                                                "reduce gradients", "optimizer step"]
        colours = {event["cname"] for events in rows.values() for event in events if event["name"].startswith("F")}
        assert len(colours) == 1
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {"rank 0 (stages 0, 7)", "rank 3 (stages 3, 4)"} <= names
    assert {str(channel) for channel in channels(run.schedule.placement)} <= names


def test_channels_hold_every_message(run: Run, trace: dict[str, Any]) -> None:
    placement = run.schedule.placement
    expected = sorted(f"{message.channel.content} of {message.stage}.{message.micro_batch}"
                      for _, action in run.schedule.passes() if (message := message_into(action, placement)))
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in trace["traceEvents"]
             if event["name"] == "thread_name"}
    late = []
    for batch in TRACED:
        rows, messages = slices(trace, 0, batch), slices(trace, 1, batch)
        assert sorted(event["name"] for events in messages.values() for event in events) == expected
        for row, events in messages.items():
            channel = re.fullmatch(r"(activation|gradient) (\d)->(\d)(?: \(\d+\))?", names[1, row])
            assert channel is not None
            content, source, target = channel[1], int(channel[2]), int(channel[3])
            for event, after in zip(events, events[1:]):
                assert event["ts"] + event["dur"] <= after["ts"] + 0.01
            for event in events:
                label = event["name"].removeprefix(f"{content} of ")
                sent, = (other for other in rows[source] if other["name"] == f"send {content} {label}")
                wait, = (other for other in rows[target] if other["name"] == f"wait {content} {label}")
                kinds = ("F",) if content == "activation" else ("B", "BW")
                needs, = (other for other in rows[target] if other["name"] in [f"{kind}{label}" for kind in kinds])
                assert event["ts"] == sent["ts"]
                arrived = event["ts"] + event["dur"]
                assert event["dur"] >= -0.01, "nothing arrives before it is sent, whatever the clocks"
                assert arrived <= wait["ts"] + wait["dur"] + 0.01 and wait["ts"] + wait["dur"] <= needs["ts"] + 0.01
                late.append((arrived - sent["ts"], wait["ts"] + wait["dur"] - sent["ts"]))
    # A message isn't in progress until its receiver waits for it: that may be passes later.
    assert median(arrival for arrival, _ in late) < 3000
    assert max(needed for _, needed in late) > 6000


def test_arrows_go_from_sends_to_waits(trace: dict[str, Any]) -> None:
    arrows = defaultdict(dict)
    for event in trace["traceEvents"]:
        if event["ph"] in "sf":
            arrows[event["id"]][event["ph"]] = event
    rows = {row: [event for batch in TRACED for event in slices(trace, 0, batch)[row]] for row in range(RANKS)}

    def enclosing(event: dict[str, Any]) -> str:
        found, = (other["cat"] for other in rows[event["tid"]]
                  if other["ts"] <= event["ts"] < other["ts"] + other["dur"])
        return str(found)

    assert len(arrows) == sum(event["cat"] == "message" for event in trace["traceEvents"] if event["ph"] == "X")
    for ends in arrows.values():
        assert ends["s"]["ts"] <= ends["f"]["ts"]
        assert enclosing(ends["s"]) == "send" and enclosing(ends["f"]) == "wait" and ends["f"]["bp"] == "e"


def test_clocks_are_brought_together(trace: dict[str, Any]) -> None:
    """They are five seconds apart, and one clock in truth: the stated bounds have to hold."""
    for batch in trace["otherData"]["batches"]:
        ahead, bounds = batch["clocks_ahead_of_rank_0_s"], batch["clock_uncertainty_s"]
        assert ahead[0] == bounds[0] == 0
        for rank in range(1, RANKS):
            assert abs(ahead[rank] - SKEW * rank) <= bounds[rank] + 1e-9
            assert 0 < bounds[rank] < 0.02
    assert max(event["ts"] for event in trace["traceEvents"] if "ts" in event) < SKEW * 1e6


def test_activations_are_counted(run: Run, trace: dict[str, Any]) -> None:
    most: Counter[str] = Counter()
    last = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "C":
            most[event["name"]] = max(most[event["name"]], event["args"]["bytes"])
            last[event["name"]] = event["args"]["bytes"]
    expected = peak_activations(run.schedule, run.activations)
    assert most == {f"activations of rank {rank}": peak for rank, peak in enumerate(expected)}
    assert list(last.values()) == [0] * RANKS


def test_predicted_and_measured_figures(run: Run, trace: dict[str, Any]) -> None:
    for number, about, measured in zip(TRACED, trace["otherData"]["batches"], run.measured, strict=True):
        assert about["schedule"] == "v-half" and about["micro_batches"] == MICRO_BATCHES
        passes = [event for rank in slices(trace, 0, number).values() for event in rank if event["cat"] == "pass"]
        first, last = min(event["ts"] for event in passes), max(event["ts"] + event["dur"] for event in passes)
        assert about["measured_makespan_s"] == pytest.approx((last - first) / 1e6, abs=1e-5)
        # The engine counts from each rank's own begin of the batch, so ranks that begin late make the two differ; but
        # from a rank's first pass to its last it is the same.
        assert about["measured_makespan_s"] >= max(rank[-1].end - rank[0].start for rank in measured.ranks) - 5e-3
        assert 0 < about["predicted_makespan_s"] < about["measured_makespan_s"] + 1e-3
        assert 0 < about["predicted_bubble"] < about["measured_bubble"] < 1


def test_a_rank_trace_survives_its_text() -> None:
    last, first = Pass.parse("W2.5[1/4]"), Pass.parse("F0.0")
    trace = RankTrace((Event("pass", last, 0.1, 1 / 3), Event("optimizer step", None, 1e-9, 2e9)), {first: 1 / 7})
    assert RankTrace.parse(trace.text()) == trace


# -- engines that aren't traced, or can't be


def on_the_side(rank: int, folder: str) -> dict[str, Any]:
    """Two replicas of two ranks: without the key, with a path that goes, and with a batch that fails."""
    lines = Lines()
    logger.addHandler(lines)
    off = Job("v-half", 2, 3).engine()
    plain: list[bool] = []
    off.train_batch(watched(off, plain, data(off, 0)))
    below = Path(folder) / f"goes{rank}" / "below"
    unwritable = Job({"name": "v-half", "trace": {"batches": [1, 2], "path": str(below)}}, 2, 3).engine()
    shutil.rmtree(below.parent, ignore_errors=True)
    below.parent.write_text("")
    losses = [float(unwritable.train_batch(data(unwritable, batch))) for batch in range(2)]
    failing = Job({"name": "v-half", "trace": {"batches": [2, 3], "path": folder}}, 2, 3).engine()
    failing.train_batch(data(failing, 0))
    seen: list[bool] = []
    with pytest.raises(Exception) as caught:
        failing.train_batch(watched(failing, seen, iter(list(data(failing, 1))[:1])))
    restored = failing._INSTRUCTION_MAP is type(failing)._INSTRUCTION_MAP
    again = float(failing.train_batch(data(failing, 1)))
    return {"replica": off.grid.get_data_parallel_rank(), "callbacks": callbacks_of(off), "plain": plain,
            "losses": losses, "error": repr(caught.value), "recorded": seen, "restored": restored, "again": again,
            "said": lines.told}


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("side")
    return run_ranks(4, on_the_side, str(folder)), folder


def test_nothing_is_installed_without_the_key(side: tuple[list[dict[str, Any]], Path]) -> None:
    for rank in side[0]:
        assert rank["callbacks"] == []
        assert all(rank["plain"])


def test_a_trace_that_cannot_be_written_is_a_warning(side: tuple[list[dict[str, Any]], Path]) -> None:
    ranks = side[0]
    assert [sum("the trace can't be written" in line for line in rank["said"]) for rank in ranks] == [2, 0, 0, 0]
    assert all(rank["losses"] == ranks[0]["losses"] and len(rank["losses"]) == 2 for rank in ranks)


def test_a_batch_that_fails_leaves_no_trace(side: tuple[list[dict[str, Any]], Path]) -> None:
    """It is traced when it is tried again; the second replica never is."""
    ranks, folder = side
    for rank in ranks:
        assert rank["restored"]
        assert all(plain == (rank["replica"] == 1) for plain in rank["recorded"])
        assert rank["again"] == ranks[0]["again"]
    assert any(rank["recorded"] for rank in ranks)
    found = json.loads((folder / "batches_2-3.trace.json").read_text())
    assert [about["batch"] for about in found["otherData"]["batches"]] == [2]


def clocks_of_a_part(rank: int) -> Any:
    """Clocks of a pipeline alone, for a group that starts elsewhere than at global rank 0."""
    import torch.distributed as dist
    group = dist.new_group([1, 2])
    time.perf_counter = lambda: _now() + (3.0 if rank == 2 else 0.0)
    return clocks([1, 2], group) if rank else ()


def test_clocks_of_any_pipeline() -> None:
    nothing, found, empty = run_ranks(3, clocks_of_a_part)
    assert nothing == empty == ()
    assert abs(found[1].offset - 3) <= found[1].uncertainty


@given(st.data())
def test_messages_narrow_the_bounds_of_clocks(draw: st.DataObject) -> None:
    """Around the truth, which round trips and messages never contradict."""
    times = st.floats(0, 1e-3)
    offsets = [0.0, *(draw.draw(st.floats(-1, 1)) for _ in range(3))]
    asked = [Clock(0.0, 0.0)]
    for offset in offsets[1:]:
        bound = draw.draw(st.floats(1e-6, 1e-3))
        asked.append(Clock(offset + draw.draw(st.floats(-1, 1)) * bound, bound))
    messages = []
    for source, target in draw.draw(st.lists(st.permutations(range(4)).map(lambda pair: pair[:2]), max_size=12)):
        sent, took = draw.draw(times), draw.draw(times)
        send = Event("send", None, sent + offsets[source], sent + offsets[source])
        arrived = sent + took + offsets[target]
        channel = Channel(source, target, Content.ACTIVATION)
        messages.append(Delivery(Message(channel, 1, 0), send, arrived, Event("wait", None, arrived, arrived)))
    found = refined(asked, messages)
    for before, after, offset in zip(asked, found, offsets, strict=True):
        assert after.uncertainty <= before.uncertainty + 1e-12
        assert abs(after.offset - offset) <= after.uncertainty + 1e-12
    for delivery in messages:
        source, target = delivery.message.channel.source, delivery.message.channel.target
        assert delivery.arrived - found[target].offset >= delivery.sent.start - found[source].offset - 1e-12


# -- the page


@pytest.fixture(scope="module")
def page(run: Run, folder: Path) -> Path:
    return folder / "batches_3-4.html"


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"\b(src|href)\s*=|@import|url\((?!#)|fetch\(|XMLHttpRequest", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.browser
def test_a_browser_shows_every_pass_once_in_each_timeline(run: Run, page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    document = look(page, "--dump-dom")
    elements = Elements(document)
    root = elements.found[0][1]
    assert root["data-ready"] == "3" and "data-error" not in root
    expected = Counter(repr(action) for _, action in run.schedule.passes())
    predicted, measured = document.split('id="measured"')
    for timeline in (predicted, measured):
        assert Counter(re.findall(r'data-pass="([^"]+)"', timeline)) == expected
        for rank in range(RANKS):
            assert f">rank {rank}</text>" in timeline
        assert timeline.count('class="area"') == timeline.count('class="curve"') == RANKS
    for attributes in (attributes for _, attributes in elements.found if "data-pass" in attributes):
        assert float(attributes["width"] or 0) > 0 and 0 < float(attributes["x"] or 0) < 1400
    look(page, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    for colour in ["2f62b5", "b3ccf2", "0f8a8a", "9adbd6", "4c9a2a", "c3e6ae"]:
        assert (pixels == list(bytes.fromhex(colour))).all(axis=2).sum() > 1000


ACTIONS = """
const note = (name, text) => { document.documentElement.dataset[name] = text; };
const middle = (element) => { const box = element.getBoundingClientRect();
                              return {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2,
                                      bubbles: true}; };
const view = () => document.documentElement.dataset.view;
const measured = document.getElementById("measured");
note("before", view());
measured.dispatchEvent(new WheelEvent("wheel", {...middle(measured), ctrlKey: true, deltaY: -300, cancelable: true}));
note("zoomed", view());
dispatchEvent(new KeyboardEvent("keydown", {key: "d"}));
note("panned", view());
const pass = measured.querySelector('[data-pass="F2.1"]');
pass.dispatchEvent(new PointerEvent("pointermove", middle(pass)));
note("pointed", document.querySelectorAll(".same").length);
note("tip", document.getElementById("tip").textContent);
pass.dispatchEvent(new MouseEvent("click", middle(pass)));
note("details", document.getElementById("details").textContent);
note("followed", [...new Set([...document.querySelectorAll(".pass.followed")].map((box) => box.dataset.pass))].join());
const select = document.getElementById("batch");
select.value = 1;
select.dispatchEvent(new Event("change"));
note("passes", document.querySelectorAll("#measured .pass").length);
"""


@pytest.mark.browser
def test_a_browser_zooms_pans_and_tells(run: Run, page: Path, tmp_path: Path) -> None:
    acting = tmp_path / "acting.html"
    acting.write_text(page.read_text().replace("</body>", f"<script>{{{ACTIONS}}}</script></body>"))
    root = Elements(look(acting, "--dump-dom")).found[0][1]
    assert "data-error" not in root
    before, zoomed, panned = ([float(end) for end in (root[f"data-{name}"] or "").split()]
                              for name in ("before", "zoomed", "panned"))
    assert before[0] == 0 and before[0] < zoomed[0] < zoomed[1] < before[1]
    assert panned[0] > zoomed[0] and panned[1] - panned[0] == pytest.approx(zoomed[1] - zoomed[0])
    assert root["data-pointed"] == "2" and "F2.1  forward" in (root["data-tip"] or "")
    details = root["data-details"] or ""
    assert "stage 2, micro-batch 1, rank 2" in details and "predicted" in details and "from rank 1" in details
    of_micro_batch = {repr(action) for _, action in run.schedule.passes() if action.micro_batch == 1}
    assert set((root["data-followed"] or "").split(",")) == of_micro_batch
    assert root["data-ready"] == "4"
    assert root["data-passes"] == str(sum(1 for _ in run.schedule.passes()))


def test_colours_are_those_of_the_pictures(page: Path) -> None:
    from ds_vshape.schedule.pictures import COLOURS
    text = page.read_text()
    for kind in COLOURS:
        for chunk, (colour, _) in enumerate(COLOURS[kind]):
            assert f"--{kind}{chunk}: {colour};" in text
