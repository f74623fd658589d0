"""Programs for tests of what checks them, good ones and shuffled ones, and ways to share communicators."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable

from ds_vshape.schedule.lowering import AwaitSend, Channel, Lowering, Program, Send, lower
from ds_vshape.schedule.named import build
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.repeated import Repeated
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times

Communicator = Callable[[Channel], Hashable]
Programs = tuple[Program, ...]


def own(channel: Channel) -> Hashable:
    return channel


def of_the_pair(channel: Channel) -> Hashable:
    return frozenset((channel.source, channel.target))


def of_the_direction(channel: Channel) -> Hashable:
    return channel.source, channel.target


def of_all(channel: Channel) -> Hashable:
    return "all"


COMMUNICATORS = (own, of_the_pair, of_the_direction, of_all)


def lowered(name: str, ranks: int, micro_batches: int) -> tuple[Programs, Placement]:
    schedule = build(name, ranks, micro_batches)
    return lower(schedule, Times.uniform(schedule.placement.stages)), schedule.placement


def lower_announced(schedule: Schedule, times: Times) -> Programs:
    return Lowering(schedule, times).announced()


def shuffled(programs: Programs, pick: random.Random, changes: int) -> Programs:
    """`programs` with some steps moved: one a few places down, or a wait for a send up."""
    result = [list(program) for program in programs]
    for _ in range(changes):
        program = pick.choice(result)
        place = pick.randrange(len(program))
        if isinstance(program[place], AwaitSend):
            after = program.index(Send(program[place].message)) + 1
            program.insert(pick.randint(min(after, place), place), program.pop(place))
        else:
            program.insert(place + pick.randint(1, 4), program.pop(place))
    return tuple(tuple(program) for program in result)


def mutant(programs: Programs, pick: random.Random) -> Programs:
    """`programs` with one or two steps of a part moved, left out, or for another micro-batch."""
    parts = [[list(program.head), list(program.body), list(program.tail)] for program in programs]
    for _ in range(pick.randint(1, 2)):
        part = pick.choice(pick.choices(pick.choice(parts), weights=[1, 4, 1]))
        if not part:
            continue
        place = pick.randrange(len(part))
        step = part.pop(place)
        kind = pick.choice(["move", "move", "move", "move", "other", "out"])
        if kind == "move":
            part.insert(pick.randint(max(0, place - 5), min(len(part), place + 5)), step)
        elif kind == "other":
            part.insert(place, step.later(pick.choice([-1, 1])))
    return tuple(Repeated(*of_rank, program.times, program.interval) for program, of_rank in zip(programs, parts))
