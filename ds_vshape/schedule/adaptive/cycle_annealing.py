"""The loop that anneals what repeats: each rank's order of one period, by how soon the next period can follow.

A period holds the passes of a few micro-batches. Which pass waits for which makes a graph whose arcs take time, and
some lead into a later period; the interval at which all ranks can go round for ever is the greatest ratio of time to
periods among the graph's cycles. Howard's policy iteration finds it, and such a cycle with it (Cochet-Terrasson et al.,
"Numerical computation of spectral elements in max-plus algebra", 1998; Dasdan's comparison of algorithms, 2004): each
node follows one of the nodes it waits for, and changes over to one that holds it up more. From one try to the next
little changes, so it begins with the last choices. A move that is too long shows with the first cycle that is. Several
threads run it at once (lanes.py).
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import numpy as np

from ds_vshape.schedule.adaptive.layout import Floats, Ints, Layout
from ds_vshape.schedule.adaptive.machine_code import jit

_NEVER = float("inf")
_CLOSE = 1e-9
# Rounds of policy iteration after which a graph is given up; few are needed.
_ROUNDS = 200
# How far a pass is moved, one of these by chance; on how many ranks either side.
_DISTANCES = np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 6, 6])
_SPREADS = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1 << 30])
_RANDOM_BITS = 0x7FFFFFFF


class Graph(NamedTuple):
    """What each pass waits for [rank * passes + place, 0 or 1]: the pass before it on its rank, and its input.

    `source` is -1 where there is none; that pass's start is `time` earlier at least, `turns` periods ago. `numbers`
    [rank, place] and `places` [rank, stream, number] say which pass of its stream in this period each one is.
    """

    source: Ints
    time: Floats
    turns: Ints
    numbers: Ints
    places: Ints


class State(NamedTuple):
    """Of the nodes: which of the two they follow, and when they start as they do so; the cycle found last."""

    follows: Ints
    starts: Floats
    critical: Ints


@jit
def _random(last: int) -> int:
    """The random number after `last`."""
    return (last * 1103515245 + 12345) & _RANDOM_BITS


@jit
def _copy(source: Ints, target: Ints) -> None:
    for index in range(len(source)):
        target[index] = source[index]


@jit
def _connect(layout: Layout, group: int, orders: Ints, leads: Ints, graph: Graph, first: int, last: int) -> None:
    """Bring `graph` up to date after the orders of ranks `first` to `last` changed."""
    ranks, length = orders.shape
    chunks, first_w, streams = layout.taken.shape[1], 2 * layout.taken.shape[1], 3 * layout.taken.shape[1]
    # Whether the last rank hands over to rank 0 without one between.
    wraps = layout.next_rank[ranks - 1, 0] == 0
    counts = np.zeros(streams, np.int64)
    for rank in range(first, last + 1):
        for stream in range(streams):
            counts[stream] = 0
        for place in range(length):
            stream = orders[rank, place]
            graph.numbers[rank, place] = counts[stream]
            graph.places[rank, stream, counts[stream]] = place
            counts[stream] += 1
    for rank in range(ranks):
        beside = first - 1 <= rank <= last + 1 or (
            wraps and (rank == ranks - 1 and first == 0 or rank == 0 and last == ranks - 1))
        if not beside:
            continue
        for place in range(length):
            stream, node = orders[rank, place], rank * length + place
            before = place - 1 if place > 0 else length - 1
            graph.source[node, 0] = rank * length + before
            past = orders[rank, before]
            piece = (leads[rank, past] + graph.numbers[rank, before]) % layout.pieces if past >= first_w else 0
            graph.time[node, 0] = layout.durations[rank, past, piece]
            graph.turns[node, 0] = 0 if place > 0 else 1
            # Which micro-batch's input it is, in its stream's own count.
            number = leads[rank, stream] + graph.numbers[rank, place]
            if stream < first_w:
                source, fed_by, delay = layout.from_rank[rank, stream], layout.from_stream[rank, stream], 0.0
                if source >= 0:
                    delay = layout.delay[source, fed_by]
            else:
                source, fed_by, delay, number = rank, stream - chunks, 0.0, number // layout.pieces
            graph.source[node, 1] = -1
            if source >= 0:
                number -= leads[source, fed_by]
                period = number // group
                graph.source[node, 1] = source * length + graph.places[source, fed_by, number - period * group]
                graph.time[node, 1] = layout.durations[source, fed_by, 0] + delay
                graph.turns[node, 1] = -period


@jit
def _interval(graph: Graph, state: State, cutoff: float, seen: Ints, path: Ints) -> tuple[float, int]:
    """The interval and the length of the critical cycle, which is in `state` then.

    Never and 0 if passes wait for each other, or the interval is above `cutoff`; `state.critical` is as it was. `seen`
    and `path` are for notes.
    """
    nodes = len(state.follows)
    for _ in range(_ROUNDS):
        interval, root = -1.0, -1
        for node in range(nodes):
            seen[node] = 0
        for first in range(nodes):
            node = first
            while seen[node] == 0:
                seen[node] = first + 1
                node = graph.source[node, state.follows[node]]
            if seen[node] != first + 1:
                continue
            time, turns, here = 0.0, 0, node
            while True:
                time += graph.time[here, state.follows[here]]
                turns += graph.turns[here, state.follows[here]]
                here = graph.source[here, state.follows[here]]
                if here == node:
                    break
            if turns <= 0 or time > (cutoff + _CLOSE) * turns:
                return _NEVER, 0
            if time / turns > interval:
                interval, root = time / turns, node
        # Start everything that follows this cycle as early as it lets it.
        for node in range(nodes):
            seen[node] = 0
        seen[root] = 2
        for first in range(nodes):
            count, node = 0, first
            while seen[node] == 0:
                seen[node] = 1
                path[count] = node
                count += 1
                node = graph.source[node, state.follows[node]]
            # 1 is another cycle, 3 what follows one.
            follows_root = seen[node] == 2
            for index in range(count - 1, -1, -1):
                node = path[index]
                seen[node] = 3
                if follows_root:
                    way = state.follows[node]
                    state.starts[node] = (state.starts[graph.source[node, way]] + graph.time[node, way]
                                          - interval * graph.turns[node, way])
                    seen[node] = 2
        improved = False
        for node in range(nodes):
            for way in range(2):
                source = graph.source[node, way]
                if source >= 0:
                    start = state.starts[source] + graph.time[node, way] - interval * graph.turns[node, way]
                    if start > state.starts[node] + 1e-7:
                        state.starts[node], state.follows[node], improved = start, way, True
        if not improved:
            length, node = 0, root
            while True:
                state.critical[length] = node
                length += 1
                node = graph.source[node, state.follows[node]]
                if node == root:
                    return interval, length
    return _NEVER, 0


@jit
def _shift(order: Ints, lead: Ints, place: int, distance: int) -> bool:
    """Move a pass by `distance`, round the end if need be; whether it passed none of its own stream."""
    length, stream = len(order), order[place]
    step = 1 if distance > 0 else -1
    for _ in range(abs(distance)):
        to = (place + step) % length
        other = order[to]
        if other == stream:
            return False
        order[place], order[to] = other, stream
        # Over the end of the period the two come from a period earlier and later.
        if (place if step > 0 else to) == length - 1:
            lead[stream] -= step
            lead[other] += step
        place = to
    return True


@jit
def _allowed(layout: Layout, rank: int, order: Ints, lead: Ints, counts: Ints) -> bool:
    """Whether a rank's order keeps its limit and has what it needs from itself."""
    alive = 0.0
    chunks, first_w = layout.taken.shape[1], 2 * layout.taken.shape[1]
    _copy(lead, counts)
    for chunk in range(chunks):
        done = counts[first_w + chunk] // layout.pieces
        alive += layout.taken[rank, chunk] * (counts[chunk] - counts[chunks + chunk])
        alive += layout.kept[rank, chunk] * (counts[chunks + chunk] - done)
    for stream in order:
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
def _neighbour(order: Ints, place: int, past: int, distance: int) -> int:
    """How far the next pass of stream `past` is in the direction of `distance`, if it's near; else 0."""
    step = 1 if distance > 0 else -1
    for away in range(step, 2 * distance + step, step):
        stream = order[(place + away) % len(order)]
        if stream == past:
            return away
        if stream == order[place]:
            return 0
    return 0


@jit
def anneal_cycle(layout: Layout, group: int, orders: Ints, leads: Ints, best_orders: Ints, best_leads: Ints,
                 best: float, tries: int, temperature: float, goal: float, seed: int) -> float:
    """Change `orders` [rank, place] and `leads` [rank, stream] by `tries` moves; the interval of the best, of a period.

    So far that is `best`, and `best_orders` and `best_leads` have it. A period is `group` micro-batches; the first pass
    of a stream in it is that of the micro-batch (or piece) numbered with its lead. Each try moves a pass of a critical
    cycle, on its rank or on those beside it as well, and takes an interval that is longer by d with the chance
    exp(-d / temperature). Ends early at `goal`. Never if `orders` wait for themselves.
    """
    ranks, length = orders.shape
    nodes, streams = ranks * length, 3 * layout.taken.shape[1]
    graph = Graph(np.full((nodes, 2), -1), np.zeros((nodes, 2)), np.zeros((nodes, 2), np.int64),
                  np.zeros((ranks, length), np.int64), np.zeros((ranks, streams, group * layout.pieces), np.int64))
    state = State(np.zeros(nodes, np.int64), np.zeros(nodes), np.zeros(nodes, np.int64))
    old_follows, old_starts = state.follows.copy(), state.starts.copy()
    old_orders, old_leads = orders.copy(), leads.copy()
    seen, path, counts = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64), np.zeros(streams, np.int64)
    _connect(layout, group, orders, leads, graph, 0, ranks - 1)
    interval, critical = _interval(graph, state, _NEVER, seen, path)
    if critical == 0:
        return _NEVER
    if interval < best - _CLOSE:
        best = interval
        best_orders[:], best_leads[:] = orders, leads
    chance = seed
    for _ in range(tries):
        if best <= goal * (1 + _CLOSE):
            break
        chance = _random(chance)
        node = state.critical[(chance >> 8) % critical]
        rank, place = node // length, node % length
        chance = _random(chance)
        distance = _DISTANCES[(chance >> 10) % 16] * (1 if (chance >> 16) % 2 == 0 else -1)
        spread = min(ranks, _SPREADS[(chance >> 18) % 16])
        stream, past = orders[rank, place], orders[rank, (place + distance) % length]
        if stream == past:
            continue
        number = graph.numbers[rank, place]
        first, last = max(0, rank - spread), min(ranks - 1, rank + spread)
        fine, touched = True, first
        for other in range(first, last + 1):
            touched = other
            _copy(orders[other], old_orders[other])
            _copy(leads[other], old_leads[other])
            here = graph.places[other, stream, number]
            far = distance if other == rank else _neighbour(orders[other], here, past, distance)
            if far != 0 and not (_shift(orders[other], leads[other], here, far)
                                 and _allowed(layout, other, orders[other], leads[other], counts)):
                _copy(old_orders[other], orders[other])
                _copy(old_leads[other], leads[other])
                if other == rank:
                    fine = False
                    break
        if fine:
            _connect(layout, group, orders, leads, graph, first, last)
            _copy(state.follows, old_follows)
            for index in range(nodes):
                old_starts[index] = state.starts[index]
                if graph.source[index, state.follows[index]] < 0:
                    state.follows[index] = 0
            chance = _random(chance)
            cutoff = interval - temperature * log(((chance >> 8) + 1) / 2 ** 23)
            new_interval, new_critical = _interval(graph, state, cutoff, seen, path)
            if new_critical > 0:
                interval, critical = new_interval, new_critical
                if interval < best - _CLOSE:
                    best = interval
                    best_orders[:], best_leads[:] = orders, leads
                continue
            _copy(old_follows, state.follows)
            for index in range(nodes):
                state.starts[index] = old_starts[index]
        for other in range(first, touched + 1):
            _copy(old_orders[other], orders[other])
            _copy(old_leads[other], leads[other])
        if fine:
            _connect(layout, group, orders, leads, graph, first, last)
    return best
