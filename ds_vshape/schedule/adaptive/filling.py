"""The loop of the list scheduler: whenever a rank is free, it runs the most urgent pass that it can."""

from __future__ import annotations

import numpy as np

from ds_vshape.schedule.adaptive.layout import Floats, Ints, Layout
from ds_vshape.schedule.adaptive.machine_code import jit

_NEVER = float("inf")


@jit
def fill(layout: Layout, target_starts: Floats, patience: float, eagerness: float, first_room: Floats, cutoff: float,
         starts: Floats, orders: Ints) -> tuple[float, float]:
    """Run a policy; the makespan, and the sum of the starts of all F and B. Both are infinite above `cutoff`.

    `target_starts` and `starts` are [rank, stream, micro-batch, piece], where F and B have piece 0 alone; `orders` are
    streams [rank, place]. `first_room` is how full a rank may be after a forward of chunk 0.
    """
    batch, pieces, ranks = layout.batch, layout.pieces, len(layout.limits)
    taken, freed, kept = layout.taken, layout.freed, layout.kept
    counts = np.zeros((ranks, 6), np.int64)
    arrivals = np.zeros((ranks, 4, batch))
    sent = np.zeros((ranks, 4), np.int64)
    sent[0, 0] = batch
    alive = np.zeros((ranks, 2))
    placed = np.zeros(ranks, np.int64)
    free = np.zeros(ranks)
    wake = np.zeros(ranks)  # when each rank looks again what it could do
    waiting = makespan = 0.0
    left = orders.size
    while left > 0:
        now, rank = _NEVER, -1
        for other in range(ranks):
            if wake[other] < now:
                now, rank = wake[other], other
        if rank < 0:
            raise AssertionError("a batch got stuck under its memory limit")
        room = layout.limits[rank] - alive[rank, 0] - alive[rank, 1]
        # The most urgent stream; of equals B of the second chunk first, W last.
        best, pick, at = _NEVER, -1, now
        for stream in range(3, -1, -1):
            number = counts[rank, stream]
            if number >= sent[rank, stream] or (stream < 2 and taken[rank, stream] > room):
                continue
            if stream == 0 and alive[rank, 0] + taken[rank, 0] > first_room[rank]:
                continue
            start = arrivals[rank, stream, number]
            urgency = target_starts[rank, stream, number, 0] + patience * max(0.0, start - now)
            if urgency < best:
                best, pick, at = urgency, stream, start
        if not layout.fused:
            wait = at - now  # a W that fits into it costs nothing
            filler = _NEVER
            for stream in range(4, 6):
                number = counts[rank, stream]
                if number < counts[rank, stream - 2] * pieces:
                    urgency = target_starts[rank, stream, number // pieces, number % pieces]
                    duration = layout.durations[rank, stream, number % pieces] * layout.scales[number // pieces]
                    fits = duration <= wait and urgency < filler
                    if urgency < best or fits:
                        best, pick, at = urgency, stream, now
                        filler = urgency
        if pick < 0:
            wake[rank] = _NEVER
        elif at > now:
            wake[rank] = at
        elif best - eagerness > now:
            wake[rank] = best - eagerness
        else:
            number = counts[rank, pick]
            micro_batch = number // pieces if pick >= 4 else number
            piece = number % pieces if pick >= 4 else 0
            end = now + layout.durations[rank, pick, piece] * layout.scales[micro_batch]
            if end > cutoff:
                return _NEVER, _NEVER
            counts[rank, pick] += 1
            orders[rank, placed[rank]] = pick
            placed[rank] += 1
            left -= 1
            free[rank] = wake[rank] = end
            makespan = max(makespan, end)
            if pick >= 4:
                starts[rank, pick, micro_batch, piece] = now
                if piece + 1 == pieces:
                    alive[rank, pick - 4] -= kept[rank, pick - 4]
                continue
            starts[rank, pick, number, 0] = now
            waiting += now
            if pick < 2:
                alive[rank, pick] += taken[rank, pick]
            else:
                alive[rank, pick - 2] -= freed[rank, pick - 2]
            target, stream = layout.next_rank[rank, pick], layout.next_stream[rank, pick]
            if target >= 0:
                arrival = end + layout.delay[rank, pick]
                arrivals[target, stream, number] = arrival
                sent[target, stream] = number + 1
                if target != rank:
                    wake[target] = min(wake[target], max(arrival, free[target]))
    return makespan, waiting
