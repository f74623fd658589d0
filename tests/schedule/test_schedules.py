"""The named schedules: as drawn, and on any number of ranks and micro-batches."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule import drawing
from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.bounds import lower_bound
from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.builders.fuse import fuse
from ds_vshape.schedule.memory_limit import (MemoryLimitError, check_activation_limit, check_memory_limit,
                                             fraction_of_1f1b)
from ds_vshape.schedule.named import SCHEDULES, build, named, placement_of
from ds_vshape.schedule.passes import BW, B, F, Kind, Pass, W
from ds_vshape.schedule.placement import PLACEMENTS, linear, v
from ds_vshape.schedule.schedule import Schedule, ScheduleError, check
from ds_vshape.schedule.timeline import Timeline, Times, simulate

SIZES = st.tuples(st.integers(1, 8), st.integers(1, 18))

# Each row is a rank, three characters a unit of time: F, B and W take one, BW two. Capitals: the rank's first chunk.
STAIRCASES = {
    "gpipe": """
        F0 F1 F2 .........BW0-- BW1-- BW2--
        ...F0 F1 F2 BW0-- BW1-- BW2-- ......
    """,
    "1f1b": """
        F0 F1 F2 ............BW0-- F3 BW1-- ...BW2-- ...BW3--
        ...F0 F1 ......BW0-- F2 BW1-- F3 BW2-- ...BW3-- ......
        ......F0 BW0-- F1 BW1-- F2 BW2-- F3 BW3-- ............
    """,
    "interleaved-1f1b": """
        F0 F1 f0 f1 F2 ...bw0-- F3 bw1-- f2 BW0-- f3 BW1-- ...bw2-- ...bw3-- BW2-- BW3--
        ...F0 F1 f0 bw0-- f1 bw1-- F2 BW0-- F3 BW1-- f2 bw2-- f3 bw3-- BW2-- BW3-- ......
    """,
    "interleaved-zb": """
        F0 F1 F2 f0 f1 f2 ......bw0-- b1 w1 b2 B0 B1 B2 w2 W0 W1 W2
        ...F0 F1 F2 f0 f1 f2 b0 w0 b1 w1 b2 B0 B1 B2 w2 W0 W1 W2 ...
        ......F0 F1 F2 f0 b0 f1 b1 f2 b2 B0 B1 B2 w0 w1 w2 W0 W1 W2
    """,
    "zb-h1": """
        F0 F1 F2 ......BW0-- F3 BW1-- BW2-- BW3--
        ...F0 F1 F2 B0 W0 B1 W1 F3 B2 W2 B3 W3 ...
        ......F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
    """,
    "zb-h2": """
        F0 F1 F2 BW0-- BW1-- BW2-- ...
        ...F0 B0 F1 B1 F2 B2 W0 W1 W2
    """,
    "1f1b-v": """
        F0 F1 F2 f0 bw0-- f1 bw1-- ...BW0-- f2 bw2-- ...BW1-- ......BW2--
        ...F0 f0 F1 f1 ...bw0-- BW0-- F2 f2 bw1-- BW1-- bw2-- BW2-- ......
    """,
    "zb-v": """
        F0 F1 F2 F3 ...f0 b0 w0 f1 b1 w1 f2 b2 B0 w2 W0 f3 b3 B1 w3 B2 W1 B3 W2 W3 ...
        ...F0 F1 F2 f0 F3 f1 b0 w0 f2 bw1-- B0 W0 f3 b2 B1 w2 b3 B2 W1 B3 w3 W2 W3 ...
        ......F0 f0 F1 f1 F2 f2 bw0-- F3 B0 W0 f3 b1 B1 b2 B2 w1 b3 B3 W1 w2 W2 w3 W3
    """,
    "v-min": """
        F0 F1 F2 ......f0 b0 w0 f1 b1 w1 BW0-- F3 ...f2 b2 B1 w2 W1 ...f3 b3 B2 w3 W2 ...BW3--
        ...F0 F1 ...f0 ...f1 b0 w0 F2 B0 b1 W0 w1 f2 F3 B1 b2 W1 w2 f3 ...B2 b3 W2 w3 B3 W3 ...
        ......F0 f0 F1 f1 ......b0 B0 w0 W0 F2 f2 b1 B1 w1 W1 F3 f3 b2 B2 w2 W2 b3 B3 w3 W3 ...
    """,
    "v-half": """
        F0 F1 F2 ......f0 b0 w0 ......f1 b1 B0 w1 W0 F3 f2 b2 B1 w2 W1 f3 b3 B2 w3 W2 ...BW3--
        ...F0 F1 F2 f0 ......b0 w0 f1 B0 W0 b1 w1 f2 ...F3 B1 b2 w2 f3 W1 B2 b3 w3 W2 B3 W3 ...
        ......F0 f0 F1 f1 ......b0 B0 w0 W0 F2 f2 b1 B1 w1 W1 F3 f3 b2 B2 w2 W2 b3 B3 w3 W3 ...
    """,
    "v-zb": """
        F0 F1 F2 f0 b0 w0 f1 bw1-- BW0-- f2 b2 B1 w2 B2 W1 W2 ...
        ...F0 f0 F1 f1 bw0-- F2 B0 W0 f2 b1 B1 b2 B2 w1 W1 w2 W2
    """,
}


def run(schedule: Schedule) -> Timeline:
    """Equal times, the same for all of a rank's work whatever the number of its stages."""
    share = 2 * schedule.placement.ranks // schedule.placement.stages
    return simulate(schedule, Times.uniform(schedule.placement.stages, share, share, share))


def kept(schedule: Schedule) -> float:
    return max(peak_activations(schedule))


@pytest.mark.parametrize("name", SCHEDULES)
def test_as_drawn(name: str) -> None:
    expected = textwrap.dedent(STAIRCASES[name]).strip().splitlines()
    ranks = len(expected)
    micro_batches = 1 + max(int(digit) for digit in STAIRCASES[name] if digit.isdigit())
    schedule = build(name, ranks, micro_batches)
    timeline = simulate(schedule, Times.uniform(schedule.placement.stages))
    rows = drawing.draw(timeline, schedule.placement).splitlines()[1:1 + ranks]
    assert [row.removeprefix(f"rank {rank}  ") for rank, row in enumerate(rows)] == expected


# ---------------------------------------------------------------- any size


@given(SIZES, st.sampled_from([(name, chunks) for name, entry in sorted(SCHEDULES.items())
                              for chunks in entry.builders if chunks <= 4]))
@settings(max_examples=120)
def test_every_pass_once_in_micro_batch_order_and_to_the_end(size: tuple[int, int], which: tuple[str, int]) -> None:
    (ranks, micro_batches), (name, chunks) = size, which
    schedule = build(name, ranks, micro_batches, chunks)
    assert (schedule.name, schedule.micro_batches) == (name, micro_batches)
    assert schedule.placement == placement_of(name, ranks, chunks)
    assert all(len(stages) == chunks for stages in schedule.placement.chunks)
    counts: dict[tuple[str, int], list[int]] = {}
    for rank, action in schedule.passes():
        assert schedule.placement.rank_of(action.stage) == rank
        for half in ("B", "W") if action.kind is Kind.BW else (action.kind.value,):
            counts.setdefault((half, action.stage), []).append(action.micro_batch)
    # Gradients are summed in the order of W: in micro-batch order everywhere, the sums equal 1F1B's bit for bit.
    assert counts == {(kind, stage): list(range(micro_batches))
                      for kind in "FBW" for stage in range(schedule.placement.stages)}
    check(schedule)
    timeline = simulate(schedule, Times.uniform(schedule.placement.stages))
    assert sum(len(spans) for spans in timeline.ranks) == sum(1 for _ in schedule.passes())


@given(SIZES)
@settings(max_examples=40)
def test_peaks_are_the_papers(size: tuple[int, int]) -> None:
    """In activations of one of 2p chunks, two to a micro-batch's share of a rank."""
    p, m = size
    limits = {"gpipe": 2 * m, "1f1b": 2 * p, "interleaved-1f1b": 3 * p - 1, "interleaved-zb": 2 * p, "zb-h1": 2 * p,
              "zb-h2": 2 * (2 * p - 1), "1f1b-v": (4 * p + 4) // 3, "zb-v": 2 * p, "v-min": 2 * ((p + 4) // 3),
              "v-half": 2 * ((p + 2) // 2), "v-zb": 2 * p}
    for name, limit in limits.items():
        # Interleaved 1F1B on one rank takes both stages of a micro-batch before its first backward.
        assert kept(build(name, p, m)) <= min(max(limit, 2), 2 * m), name
    assert kept(build("gpipe", p, m)) == 2 * m
    assert kept(build("1f1b", p, m)) == 2 * min(p, m)


@given(SIZES)
@settings(max_examples=40)
def test_times_are_the_papers(size: tuple[int, int]) -> None:
    """F, B and W of a chunk take 1, so a rank's work is 6 m."""
    p, m = size
    action = 6 * m
    assert run(build("gpipe", p, m)).makespan == run(build("1f1b", p, m)).makespan == action + 6 * (p - 1)
    if m % p == 0:
        assert run(build("interleaved-1f1b", p, m)).makespan == action + 3 * (p - 1)
        assert run(build("interleaved-zb", p, m)).makespan == action + p - 1
    if m >= p:
        assert run(build("zb-h1", p, m)).makespan == action + 2 * (p - 1)
    if m >= 2 * p - 1:
        for name in ("zb-h2", "zb-v", "v-zb"):
            assert run(build(name, p, m)).longest_span == action, name
        for name in ("zb-v", "v-zb"):
            assert run(build(name, p, m)).makespan == action + p - 1, name


@pytest.mark.parametrize("ranks", range(1, 17))
def test_no_schedule_of_the_same_peak_is_faster_once_the_pipeline_fills(ranks: int) -> None:
    for micro_batches in sorted({ranks, 3 * ranks // 2, 2 * ranks + 1}):
        for name, limit in (("v-min", 2 * ((ranks + 4) // 3)), ("v-half", 2 * ((ranks + 2) // 2)), ("v-zb", 2 * ranks)):
            bound = lower_bound(v(ranks), micro_batches, Times.uniform(2 * ranks), limit)
            assert run(build(name, ranks, micro_batches)).makespan == bound, (name, micro_batches)
            if limit < 2 * micro_batches:
                # The paper's bound, and the last rank's late start.
                paper = 6 * micro_batches + 6 * ranks - 3 * limit - 1
                assert bound == max(paper, 6 * micro_batches + ranks - 1), (name, micro_batches)


def test_one_f_one_b_v_takes_about_as_long_as_1f1b() -> None:
    for p in range(1, 17):
        m = 4 * p
        assert run(build("1f1b-v", p, m)).makespan <= 6 * m + 6 * (p - 1) + (p % 3 == 2), p


@pytest.mark.slow
def test_large_schedules_are_planned() -> None:
    for name in ("1f1b", "v-min", "v-half", "v-zb"):
        assert kept(build(name, 32, 128)) <= 64


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("wrong, nearest", [("v-hlf", "v-half"), ("V_ZB", "v-zb"), ("1f1bv", "1f1b-v"),
                                            ("zbh2", "zb-h2")])
def test_an_unknown_name_is_answered_with_the_nearest_and_all(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(wrong, 4, 8)
    assert repr(wrong) in str(caught.value) and f"did you mean {nearest!r}" in str(caught.value)
    assert all(name in str(caught.value) for name in SCHEDULES)


@pytest.mark.parametrize("ranks, micro_batches", [(0, 4), (4, 0), (-1, 1)])
def test_a_pipeline_without_ranks_or_micro_batches_is_refused(ranks: int, micro_batches: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        build("v-half", ranks, micro_batches)


# ---------------------------------------------------------------- whole backwards


@given(SIZES, st.sampled_from(["zb-h1", "zb-h2", "zb-v", "v-min", "v-half", "v-zb"]), st.floats(0, 2))
@settings(max_examples=40)
def test_fusing_moves_no_pass(size: tuple[int, int], name: str, hop: float) -> None:
    split = next(iter(named(name).builders.values()))(*size)
    times = Times.uniform(split.placement.stages, hop=hop)
    fused = fuse(split, times)
    assert peak_activations(fused) == peak_activations(split)
    for before, after in zip(simulate(split, times).ranks, simulate(fused, times).ranks):
        starts = {span.action: span.start for span in before}
        ends = {span.action: span.end for span in before}
        for span in after:
            stage, micro_batch = span.action.stage, span.action.micro_batch
            whole = span.action.kind is Kind.BW
            assert span.start == starts[B(stage, micro_batch) if whole else span.action]
            assert span.end == pytest.approx(ends[W(stage, micro_batch) if whole else span.action])


def test_fusing_leaves_alone_what_others_wait_for() -> None:
    """Two stages: rank 0 waits for B1.0, so only its own backward, which no rank waits for, runs whole."""
    split = Schedule("two", linear(2), 1, ((F(0, 0), B(0, 0), W(0, 0)), (F(1, 0), B(1, 0), W(1, 0))))
    assert fuse(split, Times.uniform(2)).orders == ((F(0, 0), BW(0, 0)), (F(1, 0), B(1, 0), W(1, 0)))


def test_w_at_once_after_b_runs_whole_on_one_rank() -> None:
    kinds = {action.kind for _, action in build("zb-h1", 1, 3).passes()}
    assert kinds == {Kind.F, Kind.BW}


# ---------------------------------------------------------------- evaluation


@given(SIZES, st.sampled_from(sorted(PLACEMENTS)))
@settings(max_examples=40)
def test_forwards_alone(size: tuple[int, int], name: str) -> None:
    ranks, micro_batches = size
    placement = PLACEMENTS[name](ranks)
    schedule = forward_only(placement, micro_batches)
    everything = {F(stage, i) for stage in range(placement.stages) for i in range(micro_batches)}
    assert {action for _, action in schedule.passes()} == everything
    assert sum(1 for _ in schedule.passes()) == len(everything)
    assert all(placement.rank_of(action.stage) == rank for rank, action in schedule.passes())
    timeline = simulate(schedule, Times.uniform(placement.stages))
    chunks = placement.stages // ranks
    if name != "interleaved":
        assert timeline.makespan == chunks * micro_batches + placement.stages - chunks
    assert _most_waiting(timeline, placement.last_stage) <= placement.stages


def _most_waiting(timeline: Timeline, last_stage: int) -> int:
    """The most activations that have left a stage and not yet entered the next one."""
    events = []
    for spans in timeline.ranks:
        for span in spans:
            if span.action.stage < last_stage:
                events.append((span.end, 1))
            if span.action.stage:
                events.append((span.start, -1))
    waiting = most = 0
    for _, change in sorted(events, key=lambda event: (event[0], event[1])):
        waiting += change
        most = max(most, waiting)
    return most


def test_no_forwards_without_micro_batches() -> None:
    with pytest.raises(ValueError, match="at least 1 micro-batch"):
        forward_only(v(2), 0)


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize("corrupt, message", [
    (lambda order: order[:-1], "it needs F with B and W"),
    (lambda order: order + order[-1:], "again on rank"),
    (lambda order: order + (F(1, 0),), "its stage is on rank 1|again on rank"),
    (lambda order: order + (F(0, 99),), "is outside"),
    (lambda order: order + (F(99, 0),), "is outside"),
    (lambda order: order + (B(0, 0),), "it needs F with B and W"),
])
def test_a_corrupted_schedule_is_refused(corrupt, message: str) -> None:
    good = build("1f1b", 2, 3)
    with pytest.raises(ScheduleError, match=message):
        check(good.with_orders((corrupt(good.orders[0]), *good.orders[1:])))


def test_memory_limits() -> None:
    v_half = build("v-half", 4, 8)
    assert fraction_of_1f1b(v_half) == 0.75
    for fine in (None, 0.75, 1.0):
        check_memory_limit(v_half, fine)
    check_activation_limit(v_half, 6)
    with pytest.raises(MemoryLimitError, match=r"0\.7: v-half needs 0\.75.*v-min \(0\.5\)"):
        check_memory_limit(v_half, 0.7)
    with pytest.raises(MemoryLimitError, match=r"5u: v-half needs 6u.*v-min \(4\)"):
        check_activation_limit(v_half, 5)
    with pytest.raises(MemoryLimitError, match="Within the limit: none; the least is v-min"):
        check_memory_limit(v_half, 0.1)


def test_orders_are_passes_of_the_notation() -> None:
    schedule = build("v-zb", 2, 3)
    assert tuple(tuple(Pass.parse(repr(action)) for action in order) for order in schedule.orders) == schedule.orders
