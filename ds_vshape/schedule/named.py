"""The table of schedules. A new one needs a file in builders/ and a line here (CONTRIBUTING.md)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil

from ds_vshape.schedule.builders import gpipe, interleaved, one_f_one_b, v_shape, zero_bubble
from ds_vshape.schedule.builders.fuse import fuse
from ds_vshape.schedule.collection import uncollected
from ds_vshape.schedule.placement import CHUNKS, PLACEMENTS, Placement, either
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.steady_state import extended
from ds_vshape.schedule.timeline import Times


@dataclass(frozen=True)
class NamedSchedule:
    """Placement's name, builders (ranks, micro-batches), what it costs in a line, and when it gets steady.

    `builders` are by the number of chunks on a rank; the first is the one if no other is asked for.
    The line gives memory as a share of 1F1B's, the bubble of a batch as a share of 1F1B's (equal times, many ranks),
    and the activations sent between ranks as a multiple of 1F1B's. `steady`: with so many micro-batches a rank, and a
    few more, all ranks get to repeat what they do; None where they don't. `in_groups`: of as many micro-batches as
    there are ranks, each through one stage of a rank and then the next.
    """

    placement: str
    builders: Mapping[int, Callable[[int, int], Schedule]]
    description: str
    steady: float | None = None
    in_groups: bool = False


def _with(counts: Iterable[int], builder: Callable[..., Schedule]) -> dict[int, Callable[[int, int], Schedule]]:
    """A builder that takes the number of chunks too, for each of `counts`."""
    return {chunks: partial(builder, chunks=chunks) for chunks in counts}


SCHEDULES: dict[str, NamedSchedule] = {
    "gpipe": NamedSchedule("linear", {1: gpipe.gpipe}, "memory m/p, bubble 1, traffic 1"),
    "1f1b": NamedSchedule("linear", {1: one_f_one_b.one_f_one_b}, "memory 1, bubble 1, traffic 1", 1),
    "interleaved-1f1b": NamedSchedule("interleaved", _with(CHUNKS["interleaved"], interleaved.interleaved_one_f_one_b),
                                      "memory 3/2, bubble 1/2 if p divides m, traffic 2", 4, True),
    "interleaved-zb": NamedSchedule("interleaved", _with(CHUNKS["interleaved"], interleaved.interleaved_zb),
                                    "memory 1, bubble 1/6 if p divides m, traffic 2", 4, True),
    "zb-h1": NamedSchedule("linear", {1: zero_bubble.zb_h1}, "memory 1, bubble 1/3, traffic 1", 2),
    "zb-h2": NamedSchedule("linear", {1: zero_bubble.zb_h2}, "memory 2, bubble 0 within a rank's span, traffic 1", 4),
    "1f1b-v": NamedSchedule("v", {2: v_shape.one_f_one_b_v}, "memory 2/3, bubble 1, traffic 2", 1.5),
    "zb-v": NamedSchedule("v", {2: v_shape.zb_v}, "memory 1, bubble 0 within a rank's span, traffic 2", 2),
    "v-min": NamedSchedule("v", {2: v_shape.v_min}, "memory 1/3, bubble 2/3, more where times differ, traffic 2", 1),
    "v-half": NamedSchedule("v", {2: v_shape.v_half}, "memory 1/2, bubble 1/2, traffic 2", 1),
    "v-zb": NamedSchedule("v", _with(CHUNKS["v"], v_shape.v_zb),
                          "memory 1, bubble 0 within a rank's span, traffic 2", 2),
}


# Made by the planner for given times and a memory limit; on which placements, the usual one first.
ADAPTIVE = "adaptive"
ADAPTIVE_PLACEMENTS = ("v", "interleaved")
# Schedules that the planner can make again at their own memory level once the times are known.
TIMED = ("v-min", "v-half", "v-zb", "zb-v")

# What takes each rank minutes and a gigabyte to put in order and check; the passes are two to three times as many.
MOST_RANKS = 1024
_MOST_STAGE_BATCHES = 2**18
# As many of what repeats, which each rank lowers and checks for itself, take a minute and a gigabyte or two.
_MOST_REPEATED = 2**20

# Micro-batches with which a schedule repeats itself for some periods.
_MARGIN = 8


def most_micro_batches(ranks: int, chunks: int = 2, name: str = ADAPTIVE) -> int:
    """How many micro-batches a batch by schedule `name` may have on `ranks` ranks with `chunks` stages each: more where
    only what repeats is put in order."""
    chunks, entry = max(2, chunks), SCHEDULES.get(name)
    if entry is not None and entry.steady is not None:
        fewest = _fewest(entry, ranks) + (ranks if entry.in_groups else 1)
        if fewest * chunks * ranks <= _MOST_REPEATED:
            return _MOST_STAGE_BATCHES // chunks
    return _MOST_STAGE_BATCHES // (chunks * ranks)


def _fewest(entry: NamedSchedule, ranks: int) -> int:
    """With how many micro-batches the schedule is tried first, if it gets steady."""
    return ceil((entry.steady or 0) * ranks) + _MARGIN


def named(name: str) -> NamedSchedule:
    """The table's entry for `name`; ValueError with the nearest legal name and all others."""
    try:
        return SCHEDULES[name]
    except KeyError:
        legal = [*SCHEDULES, ADAPTIVE]
        nearest = difflib.get_close_matches(name.lower().replace("_", "-"), legal, n=1, cutoff=0)[0]
        raise ValueError(f"there is no schedule {name!r}; did you mean {nearest!r}? "
                         f"Schedules: {', '.join(legal)}") from None


def placement_of(name: str, ranks: int, chunks: int | None = None, placement: str | None = None) -> Placement:
    """Where the schedule `name` (of the table, or adaptive) puts its stages on `ranks` ranks.

    `chunks` is how many stages each of them holds, and `placement` the name of the placement; None is the schedule's
    own. Raises ValueError for an unknown name, what the schedule can't have, and too few or too many ranks.
    """
    placement = check_placement(name, placement)
    chunks = check_chunks(name, chunks, placement)
    if ranks < 1:
        raise ValueError(f"a pipeline needs at least 1 rank, not {ranks}")
    if ranks > MOST_RANKS:
        raise ValueError(f"a pipeline may have at most {MOST_RANKS} ranks, not {ranks}")
    return PLACEMENTS[placement](ranks, chunks)


def check_placement(name: str, placement: str | None) -> str:
    """The name of the placement where `placement` is asked for; ValueError if the schedule can't have it."""
    legal = ADAPTIVE_PLACEMENTS if name == ADAPTIVE else (named(name).placement,)
    if placement is None:
        return legal[0]
    if placement not in legal:
        raise ValueError(f"{name} has the placement {' or '.join(legal)}")
    return placement


def check_chunks(name: str, chunks: int | None, placement: str | None = None) -> int:
    """How many stages a rank holds where `chunks` and `placement`, a legal one, are asked for; ValueError if the
    schedule can't have so many."""
    placement = check_placement(name, placement)
    legal = tuple(CHUNKS[placement] if name == ADAPTIVE else named(name).builders)
    if chunks is None:
        return legal[0]
    if chunks not in legal:
        where = f" with the placement {placement}" if name == ADAPTIVE else ""
        raise ValueError(f"{name} has {either(legal)} stage{'s' * (legal[-1] > 1)} on a rank{where}")
    return chunks


def names_on(placement: Placement) -> list[str]:
    """The schedules of the table that can have this placement."""
    return [name for name, entry in SCHEDULES.items()
            if entry.placement == placement.name and placement.chunks_each in entry.builders]


@uncollected()
def build(name: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """The schedule `name` for a batch of `micro_batches` on `ranks` ranks, checked; W right behind B runs as BW.

    Raises ValueError as `placement_of`.
    """
    placement = placement_of(name, ranks, chunks)
    if micro_batches < 1:
        raise ValueError(f"a batch needs at least 1 micro-batch, not {micro_batches}")
    most = most_micro_batches(ranks, placement.chunks_each, name)
    if micro_batches > most:
        raise ValueError(f"a batch on {ranks} ranks may have at most {most} micro-batches, not {micro_batches}")
    entry = named(name)
    builder = entry.builders[placement.chunks_each]

    def make(few: int) -> Schedule:
        # One pass of slack: hops and unequal times would turn a fusion that is free by a hair into a wait.
        return fuse(builder(ranks, few), Times.uniform(placement.stages), slack=1.0)

    if entry.steady is None:
        schedule = make(micro_batches)
    else:
        schedule = extended(make, micro_batches, _fewest(entry, ranks), ranks if entry.in_groups else 1)
    check(schedule)
    return schedule
