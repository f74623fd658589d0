"""The table of schedules. A new one needs a file in this folder and a line here (CONTRIBUTING.md)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from ds_vshape.schedule import gpipe, one_f_one_b, v_shape, zero_bubble
from ds_vshape.schedule.fuse import fuse
from ds_vshape.schedule.placement import PLACEMENTS, Placement
from ds_vshape.schedule.schedule import Schedule, check
from ds_vshape.schedule.steady_state import extended
from ds_vshape.schedule.timeline import Times


@dataclass(frozen=True)
class NamedSchedule:
    """Placement's name, builder (ranks, micro-batches), what it costs in a line, and when it gets steady.

    The line gives memory as a share of 1F1B's, the bubble of a batch as a share of 1F1B's (equal times, many ranks),
    and the activations sent between ranks as a multiple of 1F1B's. `steady`: with so many micro-batches a rank, and a
    few more, all ranks get to repeat what they do; None where they don't. `in_groups`: of as many micro-batches as
    there are ranks, each through one stage of a rank and then the next.
    """

    placement: str
    builder: Callable[[int, int], Schedule]
    description: str
    steady: float | None = None
    in_groups: bool = False


SCHEDULES: dict[str, NamedSchedule] = {
    "gpipe": NamedSchedule("linear", gpipe.gpipe, "memory m/p, bubble 1, traffic 1"),
    "1f1b": NamedSchedule("linear", one_f_one_b.one_f_one_b, "memory 1, bubble 1, traffic 1", 1),
    "interleaved-1f1b": NamedSchedule("interleaved", one_f_one_b.interleaved_one_f_one_b,
                                      "memory 3/2, bubble 1/2 if p divides m, traffic 2", 4, True),
    "zb-h1": NamedSchedule("linear", zero_bubble.zb_h1, "memory 1, bubble 1/3, traffic 1", 1.4),
    "zb-h2": NamedSchedule("linear", zero_bubble.zb_h2, "memory 2, bubble 0 within a rank's span, traffic 1", 3),
    "1f1b-v": NamedSchedule("v", v_shape.one_f_one_b_v, "memory 2/3, bubble 1, traffic 2", 1.5),
    "zb-v": NamedSchedule("v", v_shape.zb_v, "memory 1, bubble 0 within a rank's span, traffic 2", 2),
    "v-min": NamedSchedule("v", v_shape.v_min, "memory 1/3, bubble 2/3, more where times differ, traffic 2", 1),
    "v-half": NamedSchedule("v", v_shape.v_half, "memory 1/2, bubble 1/2, traffic 2", 1),
    "v-zb": NamedSchedule("v", v_shape.v_zb, "memory 1, bubble 0 within a rank's span, traffic 2", 2),
}


# Made by the planner for given times and a memory limit; its placement.
ADAPTIVE = "adaptive"
_ADAPTIVE_PLACEMENT = "v"
# Schedules that the planner can make again at their own memory level once the times are known.
TIMED = ("v-min", "v-half", "v-zb", "zb-v")

# What takes each rank minutes and a gigabyte to put in order and check; the passes are two to three times as many.
MOST_RANKS = 1024
_MOST_STAGE_BATCHES = 2**18

# Micro-batches with which a schedule repeats itself for some periods.
_MARGIN = 8


def most_micro_batches(ranks: int) -> int:
    """How many micro-batches a batch may have on `ranks` ranks."""
    return _MOST_STAGE_BATCHES // (2 * ranks)


def named(name: str) -> NamedSchedule:
    """The table's entry for `name`; ValueError with the nearest legal name and all others."""
    try:
        return SCHEDULES[name]
    except KeyError:
        legal = [*SCHEDULES, ADAPTIVE]
        nearest = difflib.get_close_matches(name.lower().replace("_", "-"), legal, n=1, cutoff=0)[0]
        raise ValueError(f"there is no schedule {name!r}; did you mean {nearest!r}? "
                         f"Schedules: {', '.join(legal)}") from None


def placement_of(name: str, ranks: int) -> Placement:
    """Where the schedule `name` (of the table, or adaptive) puts its stages on `ranks` ranks."""
    placement = _ADAPTIVE_PLACEMENT if name == ADAPTIVE else named(name).placement
    if ranks < 1:
        raise ValueError(f"a pipeline needs at least 1 rank, not {ranks}")
    if ranks > MOST_RANKS:
        raise ValueError(f"a pipeline may have at most {MOST_RANKS} ranks, not {ranks}")
    return PLACEMENTS[placement](ranks)


def build(name: str, ranks: int, micro_batches: int) -> Schedule:
    """The schedule `name` for a batch of `micro_batches` on `ranks` ranks, checked; W right behind B runs as BW.

    Raises ValueError for an unknown name and for counts below 1.
    """
    placement = placement_of(name, ranks)
    if micro_batches < 1:
        raise ValueError(f"a batch needs at least 1 micro-batch, not {micro_batches}")
    if micro_batches > most_micro_batches(ranks):
        raise ValueError(f"a batch on {ranks} ranks may have at most {most_micro_batches(ranks)} micro-batches, not "
                         f"{micro_batches}")
    entry = named(name)

    def make(few: int) -> Schedule:
        # One pass of slack: hops and unequal times would turn a fusion that is free by a hair into a wait.
        return fuse(entry.builder(ranks, few), Times.uniform(placement.stages), slack=1.0)

    if entry.steady is None:
        schedule = make(micro_batches)
    else:
        schedule = extended(make, micro_batches, ceil(entry.steady * ranks) + _MARGIN, ranks if entry.in_groups else 1)
    check(schedule)
    return schedule
