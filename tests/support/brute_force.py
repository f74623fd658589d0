"""The best of small schedules, by trying all there are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ds_vshape.schedule.placement import Placement


def optimum(placement: Placement, micro_batches: int, times: tuple[int, int, int], kept: int) -> int:
    """The shortest makespan with at most `kept` activations of a stage on a rank, whole times of F, B, W, no hops.

    Breadth first over all that the ranks can have begun at each moment. Micro-batches are alike, so the first to start
    on a stage may as well be called the first: counts for each stage and kind are all that matters. Whole backwards
    need no trying, being split ones that send late.
    """
    stages = placement.stages
    nothing = (0,) * (3 * stages)  # begun[3 * stage + kind], kind F B W = 0 1 2
    idle = (None,) * placement.ranks  # for each rank (pass, time left)

    def choices(rank: int, begun: tuple[int, ...], done: list[int]) -> Iterator[int | None]:
        yield None
        alive = sum(begun[3 * s] - done[3 * s + 2] for s in placement.chunks[rank])
        for s in placement.chunks[rank]:
            f, b, w = 3 * s, 3 * s + 1, 3 * s + 2
            if begun[f] < micro_batches and alive < kept and (s == 0 or done[f - 3] > begun[f]):
                yield f
            if done[f] > begun[b] and (s == stages - 1 or done[b + 3] > begun[b]):
                yield b
            if done[b] > begun[w]:
                yield w

    now = {(nothing, idle)}
    time = 0
    while True:
        following = set()
        for begun, running in now:
            done = list(begun)
            for task in running:
                if task is not None:
                    done[task[0]] -= 1
            if min(done) == micro_batches:
                return time
            free = [[task] if task is not None else list(choices(rank, begun, done))
                    for rank, task in enumerate(running)]
            for picked in product(*free):
                counts, tasks = list(begun), []
                for task in picked:
                    if isinstance(task, int):
                        counts[task] += 1
                        task = (task, times[task % 3])
                    tasks.append(task if task is None or task[1] > 1 else None)
                following.add((tuple(counts), tuple(task and (task[0], task[1] - 1) for task in tasks)))
        now = following
        time += 1
