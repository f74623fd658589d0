"""Reorders the cool-down: after a rank's last forward no more memory is taken, so W can be postponed.

A repeated block keeps its order to the end. There the inputs of B arrive late, and every delay of a B delays the whole
batch. So each B runs as early as it can, and W fills the gaps between them and the end.
"""

from __future__ import annotations

import numpy as np

from ds_vshape.schedule.adaptive.list_scheduler import ListScheduler, PolicyRun
from ds_vshape.schedule.adaptive.problem import SLACK


def reschedule_cooldown(run: PolicyRun, scheduler: ListScheduler) -> PolicyRun:
    """`run` with its cool-down reordered, or unchanged if that is faster."""
    if scheduler.fused:
        return run
    chunks, first_w = scheduler.first_b, scheduler.first_w
    firsts = [int(np.flatnonzero(order < chunks)[-1]) + 1 for order in run.orders]
    backwards_first = [np.concatenate([order[:first], (tail := order[first:])[tail < first_w], tail[tail >= first_w]])
                       for order, first in zip(run.orders, firsts)]
    fastest = scheduler.left_shift(np.array(backwards_first), run.policy)
    if fastest is None:
        return run
    filled = [_filled(rank, first, fastest, scheduler) for rank, first in enumerate(firsts)]
    improved = scheduler.left_shift(np.array(filled), run.policy)
    return improved if improved is not None and improved.makespan < run.makespan else run


def _filled(rank: int, first: int, fastest: PolicyRun, scheduler: ListScheduler) -> list[int]:
    """The order of `rank` in which the passes from place `first` on are B as in `fastest`, and W wherever one fits."""
    chunks, first_w, pieces = scheduler.first_b, scheduler.first_w, fastest.policy.pieces
    layout = scheduler.layouts(pieces)
    durations, scales = layout.durations[rank], layout.scales
    order: list[int] = fastest.orders[rank, :first].tolist()
    counts = np.bincount(order, minlength=len(durations))
    # A forward: those behind the last one are rescheduled.
    last = order[-1]
    free = fastest.starts[rank, last, counts[last] - 1, 0] + durations[last, 0] * scales[counts[last] - 1]

    def fill(until: float) -> None:
        nonlocal free
        while True:
            waiting: list[tuple[float, float, int, float]] = []
            for stream in range(first_w, first_w + chunks):
                micro_batch, piece = divmod(counts[stream], pieces)
                if micro_batch < fastest.starts.shape[2]:
                    seconds = durations[stream, piece] * scales[micro_batch]
                    ready = (fastest.starts[rank, stream - chunks, micro_batch, 0]
                             + durations[stream - chunks, 0] * scales[micro_batch])
                    waiting.append((max(free, ready), ready, stream, seconds))
            fitting = [each for each in waiting if each[0] + each[3] <= until * (1 + SLACK)]
            if not fitting:
                return
            start, _, stream, seconds = min(fitting)
            order.append(stream)
            counts[stream] += 1
            free = start + seconds

    for stream in fastest.orders[rank, first:].tolist():
        if stream < first_w:
            start = fastest.starts[rank, stream, counts[stream], 0]
            fill(start)
            free = start + durations[stream, 0] * scales[counts[stream]]
            order.append(stream)
            counts[stream] += 1
    fill(float("inf"))
    return order
