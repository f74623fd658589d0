"""The loop of the list scheduler: whenever a rank is free, it runs the most urgent pass that it can."""

from __future__ import annotations

import numpy as np

from ds_vshape.schedule.adaptive.layout import Floats, Ints, Layout
from ds_vshape.schedule.adaptive.machine_code import jit

_NEVER = float("inf")


@jit
def fill(layout: Layout, target_starts: Floats, patience: float, eagerness: float, room: Floats, cutoff: float,
         starts: Floats, orders: Ints) -> tuple[float, float]:
    """Run a policy; the makespan, and the sum of the starts of all F and B. Both are infinite above `cutoff`.

    `target_starts` and `starts` are [rank, stream, micro-batch, piece], where F and B have piece 0 alone; `orders` are
    streams [rank, place]. `room` [rank, chunk] is what the activations of this chunk and those before it may take
    together after a forward.
    """
    batch, pieces, ranks, chunks = layout.batch, layout.pieces, len(layout.limits), layout.taken.shape[1]
    first_w = 2 * chunks
    # Fields in variables: each use of one in the loop would count references.
    limits, taken, freed, kept = layout.limits, layout.taken, layout.freed, layout.kept
    durations, scales = layout.durations, layout.scales
    next_rank, next_stream, delay = layout.next_rank, layout.next_stream, layout.delay
    counts = np.zeros((ranks, 3 * chunks), np.int64)
    arrivals = np.zeros((ranks, first_w, batch))
    sent = np.zeros((ranks, first_w), np.int64)
    sent[0, 0] = batch
    alive = np.zeros((ranks, chunks))
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
        # The most urgent stream; of equals B of the last chunk first, W last.
        best, pick, at = _NEVER, -1, now
        for stream in range(first_w - 1, -1, -1):
            number = counts[rank, stream]
            if number >= sent[rank, stream]:
                continue
            if stream < chunks:
                free_memory, together = limits[rank] - alive[rank, 0], taken[rank, stream]
                fits = True
                for chunk in range(chunks - 1):
                    together += alive[rank, chunk]
                    free_memory -= alive[rank, chunk + 1]
                    if chunk >= stream and together > room[rank, chunk]:
                        fits = False
                        break
                if not fits or taken[rank, stream] > free_memory:
                    continue
            start = arrivals[rank, stream, number]
            urgency = target_starts[rank, stream, number, 0] + patience * max(0.0, start - now)
            if urgency < best:
                best, pick, at = urgency, stream, start
        if not layout.fused:
            wait = at - now  # a W that fits into it costs nothing
            filler = _NEVER
            for stream in range(first_w, first_w + chunks):
                number = counts[rank, stream]
                if number < counts[rank, stream - chunks] * pieces:
                    micro_batch = number // pieces
                    piece = number - micro_batch * pieces
                    urgency = target_starts[rank, stream, micro_batch, piece]
                    duration = durations[rank, stream, piece] * scales[micro_batch]
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
            micro_batch = number // pieces if pick >= first_w else number
            piece = number - micro_batch * pieces if pick >= first_w else 0
            end = now + durations[rank, pick, piece] * scales[micro_batch]
            if end > cutoff:
                return _NEVER, _NEVER
            counts[rank, pick] += 1
            orders[rank, placed[rank]] = pick
            placed[rank] += 1
            left -= 1
            free[rank] = wake[rank] = end
            makespan = max(makespan, end)
            if pick >= first_w:
                starts[rank, pick, micro_batch, piece] = now
                if piece + 1 == pieces:
                    alive[rank, pick - first_w] -= kept[rank, pick - first_w]
                continue
            starts[rank, pick, number, 0] = now
            waiting += now
            if pick < chunks:
                alive[rank, pick] += taken[rank, pick]
            else:
                alive[rank, pick - chunks] -= freed[rank, pick - chunks]
            target, stream = next_rank[rank, pick], next_stream[rank, pick]
            if target >= 0:
                arrival = end + delay[rank, pick]
                arrivals[target, stream, number] = arrival
                sent[target, stream] = number + 1
                if target != rank:
                    wake[target] = min(wake[target], max(arrival, free[target]))
    return makespan, waiting
