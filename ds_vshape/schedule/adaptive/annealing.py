"""The inner loop of simulated annealing: move a pass of a critical path, and time the passes after it again.

Most of an order is unchanged by a move, so only the passes after the first change are timed, and not even these once
the rest of the batch is known to take too long: the tails of job-shop scheduling tell that. `left_shift` times whole
orders.

    times     _duration, _cut, _replay, _take, _settled, _find_tails
    moves     _shift, _move, _allowed, _move_on_ranks
    anneal    _critical, anneal

machine_code.py says why all of it is in one file. Several threads run it at once (lanes.py).
"""

from __future__ import annotations

from math import log
from typing import Any, NamedTuple

import numpy as np

from ds_vshape.schedule.adaptive.layout import Floats, Ints, Layout
from ds_vshape.schedule.adaptive.machine_code import jit

_NEVER = float("inf")
_CLOSE = 1e-9
# How far a pass is moved, one of these by chance; for how many micro-batches in a row; on how many ranks either side.
_DISTANCES = np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 6, 6, 12])
_REPEATS = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 1 << 30])
_SPREADS = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1 << 30])
# The random numbers of a plan: a linear congruential generator modulo 2 ** 31, of which the upper bits are used.
_RANDOM_BITS = 0x7FFFFFFF


# Files of machine code refer to these classes by name: renaming one makes older files unreadable.
class Orders(NamedTuple):
    """The stream of each pass, and its number in the stream [rank, place]."""

    streams: Ints
    numbers: Ints


class Times(NamedTuple):
    """When passes start [rank, place in the order], and inputs of F and B arrive [rank, stream, number].

    `places` [rank, stream, number] says where in the order each pass is.
    """

    starts: Floats
    arrivals: Floats
    places: Ints


class Prefix(NamedTuple):
    """The part of all orders that stays: each rank's first `place` passes, `counts` [rank, stream] of them.

    `sent` [rank, stream] inputs come from there. The ranks are free again at `free`.
    """

    place: Ints
    counts: Ints
    sent: Ints
    free: Floats


class Timing(NamedTuple):
    """What is known of the times of orders: those `now`, and those `new` after a change that keeps `prefix`.

    `at` says how far timing came. From place `settled` [rank] on, `tails` [rank, place] say how long the batch lasts at
    least from each pass's start.
    """

    now: Times
    new: Times
    prefix: Prefix
    at: Prefix
    settled: Ints
    tails: Floats


class Move(NamedTuple):
    """A pass and how far it moves: with as many following micro-batches, and on up to `spread` ranks either side."""

    rank: int
    place: int
    distance: int
    repeats: int
    spread: int


class Change(NamedTuple):
    """The places that a move has changed, from `firsts` to `lasts` [rank], and these ranks' `old` orders."""

    firsts: Ints
    lasts: Ints
    old: Orders


@jit
def _random(last: int) -> int:
    """The random number after `last`."""
    return (last * 1103515245 + 12345) & _RANDOM_BITS


@jit
def _copy(source: Ints, target: Ints) -> None:
    # A slice of an array could be assigned as well, but takes seconds to compile.
    for index in range(len(source)):
        target[index] = source[index]


@jit
def _greatest(values: Floats) -> float:
    greatest = -_NEVER
    for value in values:
        greatest = max(greatest, value)
    return greatest


@jit
def _position(line: Any, value: float) -> int:
    """How many of the ascending `line` are below `value`."""
    low, high = 0, len(line)
    while low < high:
        middle = (low + high) // 2
        if line[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _duration(layout: Layout, orders: Orders, rank: int, place: int) -> float:
    """How long the pass at `place` of a rank's order takes."""
    stream, number = orders.streams[rank, place], orders.numbers[rank, place]
    first_w = 2 * layout.taken.shape[1]
    micro_batch = number // layout.pieces if stream >= first_w else number
    piece = number - micro_batch * layout.pieces if stream >= first_w else 0
    duration: float = layout.durations[rank, stream, piece] * layout.scales[micro_batch]
    return duration


@jit
def _cut(layout: Layout, orders: Orders, timing: Timing, firsts: Ints) -> int:
    """Into `timing.prefix`: what stays as it is when orders change from `firsts` [rank] on. The number of the other
    passes."""
    now, prefix = timing.now, timing.prefix
    ranks, length = orders.streams.shape
    first_w, streams = 2 * layout.taken.shape[1], 3 * layout.taken.shape[1]
    time = _NEVER
    for rank in range(ranks):
        place = firsts[rank]
        if place == 0:
            time = 0.0
        elif place < length:
            time = min(time, now.starts[rank, place - 1] + _duration(layout, orders, rank, place - 1))
    left = 0
    for other in range(ranks):
        here = min(firsts[other], _position(now.starts[other], time)) if time > 0 else 0
        prefix.place[other] = here
        prefix.free[other] = 0.0
        if here > 0:
            prefix.free[other] = now.starts[other, here - 1] + _duration(layout, orders, other, here - 1)
        for stream in range(streams):
            line = now.places[other, stream]
            of_stream = line if stream >= first_w else line[:layout.batch]
            prefix.counts[other, stream] = _position(of_stream, here) if here > 0 else 0
        left += length - here
    for other in range(ranks):
        for stream in range(first_w):
            source = layout.from_rank[other, stream]
            prefix.sent[other, stream] = (prefix.counts[source, layout.from_stream[other, stream]] if source >= 0 else
                                          layout.batch)
    return left


@jit
def _settled(timing: Timing, lasts: Ints) -> None:
    """Into `timing.settled`: the place on each rank from which on nothing leads to the passes up to `lasts` [rank]."""
    now = timing.now
    ranks, length = now.starts.shape
    time = 0.0
    for rank in range(ranks):
        if lasts[rank] >= 0:
            time = max(time, now.starts[rank, lasts[rank] + 1] if lasts[rank] + 1 < length else _NEVER)
    for rank in range(ranks):
        timing.settled[rank] = max(lasts[rank] + 1, _position(now.starts[rank], time))


@jit
def _find_tails(layout: Layout, orders: Orders, timing: Timing) -> None:
    """Into `timing.tails`: those of the passes before `timing.settled`, which is overwritten."""
    now, settled, tails = timing.now, timing.settled, timing.tails
    ranks, length = orders.streams.shape
    left = 0
    for rank in range(ranks):
        left += settled[rank]
    rank, step = ranks - 1, -1
    while left > 0:
        place = settled[rank] - 1
        while place >= 0:
            stream = orders.streams[rank, place]
            tail = tails[rank, place + 1] if place + 1 < length else 0.0
            target = layout.next_rank[rank, stream]
            if target >= 0:
                to = now.places[target, layout.next_stream[rank, stream], orders.numbers[rank, place]]
                if to < settled[target] and target != rank:
                    break
                tail = max(tail, layout.delay[rank, stream] + tails[target, to])
            tails[rank, place] = tail + _duration(layout, orders, rank, place)
            place -= 1
        left -= settled[rank] - 1 - place
        settled[rank] = place + 1
        rank += step
        if rank == ranks or rank < 0:
            step = -step
            rank += step


@jit
def _replay(layout: Layout, orders: Orders, timing: Timing, left: int, rank: int, cutoff: float) -> bool:
    """Into `timing.new`: the times of the `left` passes after the prefix, each as early as can be, from `rank` on.

    False if ranks wait for each other, or the batch ends after `cutoff`, which the tails foretell.
    """
    now, new, prefix, at = timing.now, timing.new, timing.prefix, timing.at
    ranks, length = orders.streams.shape
    chunks, first_w = layout.taken.shape[1], 2 * layout.taken.shape[1]
    for other in range(ranks):
        at.place[other], at.free[other] = prefix.place[other], prefix.free[other]
        _copy(prefix.counts[other], at.counts[other])
        _copy(prefix.sent[other], at.sent[other])
    idle, step = 0, 1
    while left > 0:
        place, free = at.place[rank], at.free[rank]
        began = place
        while place < length:
            stream, number = orders.streams[rank, place], orders.numbers[rank, place]
            if stream < first_w:
                if number >= at.sent[rank, stream]:
                    break
                before = number < prefix.sent[rank, stream]
                free = max(free, now.arrivals[rank, stream, number] if before else new.arrivals[rank, stream, number])
            elif number >= at.counts[rank, stream - chunks] * layout.pieces:
                break
            if place >= timing.settled[rank] and free + timing.tails[rank, place] > cutoff:
                return False
            new.places[rank, stream, number] = place
            new.starts[rank, place] = free
            free += _duration(layout, orders, rank, place)
            at.counts[rank, stream] = number + 1
            place += 1
            target = layout.next_rank[rank, stream]
            if target >= 0:
                to = layout.next_stream[rank, stream]
                new.arrivals[target, to, number] = free + layout.delay[rank, stream]
                at.sent[target, to] = number + 1
        if place == began:
            idle += 1
            if idle > 2 * ranks:
                return False
        else:
            idle = 0
            left -= place - began
            at.place[rank], at.free[rank] = place, free
            if free > cutoff:
                return False
        # Back and forth over the ranks, as micro-batches do.
        rank += step
        if rank == ranks or rank < 0:
            step = -step
            rank += step
    return True


@jit
def _take(layout: Layout, timing: Timing) -> None:
    """The new times after the prefix into `timing.now`."""
    now, new, prefix = timing.now, timing.new, timing.prefix
    ranks, length = now.starts.shape
    first_w, streams = 2 * layout.taken.shape[1], 3 * layout.taken.shape[1]
    for rank in range(ranks):
        for place in range(prefix.place[rank], length):
            now.starts[rank, place] = new.starts[rank, place]
        for stream in range(streams):
            numbers = layout.batch * (layout.pieces if stream >= first_w else 1)
            for number in range(prefix.counts[rank, stream], numbers):
                now.places[rank, stream, number] = new.places[rank, stream, number]
        for stream in range(first_w):
            if layout.from_rank[rank, stream] >= 0:
                for number in range(prefix.sent[rank, stream], layout.batch):
                    now.arrivals[rank, stream, number] = new.arrivals[rank, stream, number]


@jit
def _critical(layout: Layout, orders: Orders, timing: Timing, path: Ints, chance: int) -> int:
    """Into `path`: passes [rank, place] of which each one's delay delays the batch's end. How many they are.

    Where a pass waited for two others just as long, the bits of `chance` choose.
    """
    now, ends = timing.now, timing.at.free
    rank, place = 0, orders.streams.shape[1] - 1
    for other in range(len(ends)):
        if ends[other] > ends[rank]:
            rank = other
    length = 0
    while True:
        path[length, 0], path[length, 1] = rank, place
        length += 1
        start, stream = now.starts[rank, place], orders.streams[rank, place]
        if start <= _CLOSE:
            return length
        follows = place > 0 and (now.starts[rank, place - 1] + _duration(layout, orders, rank, place - 1)
                                 >= start - _CLOSE)
        fed = stream < 2 * layout.taken.shape[1] and layout.from_rank[rank, stream] >= 0 and (
            now.arrivals[rank, stream, orders.numbers[rank, place]] >= start - _CLOSE)
        if fed and follows:
            chance = _random(chance)
            follows = (chance >> 16) % 2 == 0
        if follows or not fed:
            place -= 1
        else:
            source, fed_by = layout.from_rank[rank, stream], layout.from_stream[rank, stream]
            rank, place = source, now.places[source, fed_by, orders.numbers[rank, place]]


@jit
def _shift(order: Ints, number: Ints, place: int, to: int) -> bool:
    """Move the pass at `place` to `to`; whether it passed none of its own stream."""
    stream, which = order[place], number[place]
    step = 1 if to > place else -1
    for here in range(place, to, step):
        order[here], number[here] = order[here + step], number[here + step]
        if order[here] == stream:
            return False
    order[to], number[to] = stream, which
    return True


@jit
def _move(layout: Layout, order: Ints, number: Ints, places: Ints, place: int, distance: int,
          repeats: int) -> tuple[int, int]:
    """Move a rank's pass by `distance`, and as many following micro-batches' past the same neighbours of theirs.

    From where to where the order changed; (0, -1) if the move isn't possible. Overwrites `places`.
    """
    stream, other = order[place], order[place + distance]
    mine, others = number[place], number[place + distance]
    first_w = 2 * layout.taken.shape[1]
    step = layout.pieces if stream >= first_w else 1
    other_step = layout.pieces if other >= first_w else 1
    first, last = len(order), -1
    to = place + distance
    for repeat in range(repeats):
        if repeat > 0:
            mine, others = mine + step, others + other_step
            if mine >= layout.batch * step or others >= layout.batch * other_step:
                break
            place, to = places[stream, mine], places[other, others]
            # At the ramps the two may stand otherwise.
            if (to > place) != (distance > 0) or abs(to - place) > 2 * abs(distance):
                continue
        if not _shift(order, number, place, to):
            return 0, -1
        first, last = min(first, place, to), max(last, place, to)
        if repeats > 1:
            for here in range(min(place, to), max(place, to) + 1):
                places[order[here], number[here]] = here
    return first, last


@jit
def _allowed(layout: Layout, rank: int, order: Ints, end: int, counts: Ints) -> bool:
    """Whether the first passes up to `end` of a rank's `order` keep its limit and have what they need from itself."""
    chunks, first_w = layout.taken.shape[1], 2 * layout.taken.shape[1]
    for stream in range(3 * chunks):
        counts[stream] = 0
    alive = 0.0
    for place in range(end + 1):
        stream = order[place]
        counts[stream] += 1
        if stream < chunks:
            alive += layout.taken[rank, stream]
            if alive > layout.limits[rank]:
                return False
        elif stream < first_w:
            alive -= layout.freed[rank, stream - chunks]
            if counts[stream] > counts[stream - chunks]:
                return False
        else:
            if counts[stream] > counts[stream - chunks] * layout.pieces:
                return False
            if counts[stream] % layout.pieces == 0:
                alive -= layout.kept[rank, stream - first_w]
    return True


@jit
def _restore(orders: Orders, old: Orders, rank: int) -> None:
    """The old order of `rank`."""
    _copy(old.streams[rank], orders.streams[rank])
    _copy(old.numbers[rank], orders.numbers[rank])


@jit
def _move_on_ranks(layout: Layout, orders: Orders, timing: Timing, move: Move, change: Change, counts: Ints) -> bool:
    """`move` on its rank, and past the same neighbour on the ranks beside it that allow it; False if its own doesn't.

    What changed comes into `change`. The places of `timing.new` and `counts` are overwritten.
    """
    places, spare = timing.now.places, timing.new.places
    streams, numbers = orders.streams, orders.numbers
    rank, distance = move.rank, move.distance
    stream, mine = streams[rank, move.place], numbers[rank, move.place]
    past, others = streams[rank, move.place + distance], numbers[rank, move.place + distance]
    for other in range(len(streams)):
        change.firsts[other], change.lasts[other] = streams.shape[1], -1
    for step in range(2 * move.spread + 1):
        # The rank itself first, then those below it, then those above.
        other = rank - step if step <= move.spread else rank + step - move.spread
        if not 0 <= other < len(streams):
            continue
        here, to = places[other, stream, mine], places[other, past, others]
        if (to > here) != (distance > 0) or abs(to - here) > 2 * abs(distance):
            continue
        _copy(streams[other], change.old.streams[other])
        _copy(numbers[other], change.old.numbers[other])
        if move.repeats > 1:
            for line in range(len(places[other])):
                _copy(places[other, line], spare[other, line])
        first, last = _move(layout, streams[other], numbers[other], spare[other], here, to - here, move.repeats)
        if last >= 0 and _allowed(layout, other, streams[other], last, counts):
            change.firsts[other], change.lasts[other] = first, last
            continue
        _restore(orders, change.old, other)
        if other == rank:
            return False
    return True


@jit
def _empty_prefix(layout: Layout, ranks: int) -> Prefix:
    chunks = layout.taken.shape[1]
    return Prefix(np.zeros(ranks, np.int64), np.zeros((ranks, 3 * chunks), np.int64),
                  np.zeros((ranks, 2 * chunks), np.int64), np.zeros(ranks))


@jit
def _empty_times(layout: Layout, ranks: int, length: int) -> Times:
    chunks = layout.taken.shape[1]
    return Times(np.zeros((ranks, length)), np.zeros((ranks, 2 * chunks, layout.batch)),
                 np.zeros((ranks, 3 * chunks, layout.batch * layout.pieces), np.int64))


@jit
def _numbered(streams: Ints, counts: Ints) -> Orders:
    """Orders with the number of each pass in its stream; `counts` are overwritten."""
    numbers = np.zeros(streams.shape, np.int64)
    for rank in range(len(streams)):
        for stream in range(len(counts)):
            counts[stream] = 0
        for place in range(streams.shape[1]):
            stream = streams[rank, place]
            numbers[rank, place] = counts[stream]
            counts[stream] += 1
    return Orders(streams, numbers)


@jit
def _empty_timing(layout: Layout, ranks: int, length: int) -> Timing:
    return Timing(_empty_times(layout, ranks, length), _empty_times(layout, ranks, length),
                  _empty_prefix(layout, ranks), _empty_prefix(layout, ranks), np.full(ranks, length),
                  np.zeros((ranks, length)))


@jit
def _replay_all(layout: Layout, orders: Orders, timing: Timing) -> bool:
    """Into `timing.now`: the times of all passes; False if ranks wait for each other."""
    # Not with literal numbers, for which numba would compile these a second time.
    rank = len(orders.streams) - 1
    left = _cut(layout, orders, timing, timing.at.place)
    fine = _replay(layout, orders, timing, left, rank, _NEVER)
    if fine:
        _take(layout, timing)
    return fine


@jit
def left_shift(layout: Layout, orders: Ints) -> Floats:
    """When passes start [rank, place], as early as `orders` allow; empty if ranks wait for each other."""
    timing = _empty_timing(layout, orders.shape[0], orders.shape[1])
    fine = _replay_all(layout, _numbered(orders, np.zeros(3 * layout.taken.shape[1], np.int64)), timing)
    return timing.now.starts if fine else timing.now.starts[:0]


@jit
def _random_move(layout: Layout, path: Ints, on_path: int, ranks: int, chance: int) -> tuple[Move, int]:
    """A move of one of the first `on_path` passes of `path`, and the last random number that it took."""
    chance = _random(chance)
    rank, place = path[(chance >> 8) % on_path, 0], path[(chance >> 8) % on_path, 1]
    chance = _random(chance)
    distance = _DISTANCES[(chance >> 10) % 16] * (1 if (chance >> 16) % 2 == 0 else -1)
    chance = _random(chance)
    repeats = min(layout.batch, _REPEATS[(chance >> 12) % 16])
    spread = min(ranks, _SPREADS[(chance >> 18) % 16])
    return Move(rank, place, distance, repeats, spread), chance


@jit
def anneal(layout: Layout, orders: Ints, best_orders: Ints, best: float, tries: int, temperature: float, goal: float,
           seed: int) -> float:
    """Change `orders` (streams [rank, place]) by `tries` moves; the makespan of the best, which `best_orders` are then.

    So far that is `best`. Each try moves a pass of a critical path, alone or for several micro-batches in a row, on its
    rank or on those beside it as well, and takes an order that is longer by d with the chance exp(-d / temperature).
    Ends early at `goal`.
    """
    ranks, length = orders.shape
    counts = np.zeros(3 * layout.taken.shape[1], np.int64)
    numbered = _numbered(orders, counts)
    timing = _empty_timing(layout, ranks, length)
    path = np.zeros((ranks * length, 2), np.int64)
    change = Change(np.full(ranks, length), np.full(ranks, length),
                    Orders(orders.copy(), numbered.numbers.copy()))
    _replay_all(layout, numbered, timing)
    _find_tails(layout, numbered, timing)
    makespan = _greatest(timing.at.free)
    chance = seed
    on_path = _critical(layout, numbered, timing, path, chance)
    for _ in range(tries):
        if best <= goal * (1 + _CLOSE):
            break
        move, chance = _random_move(layout, path, on_path, ranks, chance)
        rank, to = move.rank, move.place + move.distance
        if not 0 <= to < length or orders[rank, move.place] == orders[rank, to]:
            continue
        fine = _move_on_ranks(layout, numbered, timing, move, change, counts)
        if fine:
            chance = _random(chance)
            cutoff = makespan - temperature * log(((chance >> 8) + 1) / 2 ** 23)
            left = _cut(layout, numbered, timing, change.firsts)
            _settled(timing, change.lasts)
            fine = _replay(layout, numbered, timing, left, rank, cutoff)
        if not fine:
            for other in range(max(0, rank - move.spread), min(ranks, rank + move.spread + 1)):
                if change.lasts[other] >= 0:
                    _restore(numbered, change.old, other)
            continue
        _take(layout, timing)
        _find_tails(layout, numbered, timing)
        makespan = _greatest(timing.at.free)
        on_path = _critical(layout, numbered, timing, path, chance)
        if makespan < best - _CLOSE:
            best = makespan
            for other in range(ranks):
                _copy(orders[other], best_orders[other])
    return best
