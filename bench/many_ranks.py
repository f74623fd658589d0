"""What ranks do together at start, by their number: processes of this machine, forked from one that has imported torch.

They have no model: there are only the process groups, and what a start makes all ranks tell each other.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from contenders import engine_of
from ranks import RanksFailed, run_ranks
from torch.distributed import distributed_c10d as c10d
from workloads import Sleeping

from ds_vshape.comm.groups import FOREVER, GLOO, new_group
from ds_vshape.health.preflight import Preflight

# What each rank measures, in this order.
PARTS = ("default group", "group of all", "neighbours' groups", "equal facts", "facts of all", "largest number",
         "numbers of all")
# The number of facts that each rank tells, about as many as a config has.
FACTS = 100


@dataclass(frozen=True)
class StartCost:
    """Wall seconds of the slowest rank, and CPU seconds of all ranks together, for each part that all of them have done
    within the limit."""

    ranks: int
    seconds: dict[str, float]
    cpu: dict[str, float]


def start_cost(ranks: int, limit: float) -> StartCost:
    """Start so many ranks, and measure; they are ended after `limit` seconds. RanksFailed if one fails."""
    context = get_context("fork")
    together, port = context.Barrier(ranks), context.RawValue("i", 0)
    # [rank][part], written by the ranks.
    seconds, cpu = (context.RawArray("d", ranks * len(PARTS)) for _ in range(2))

    def measured(rank: int, part: str, work: Callable[[], Any]) -> Any:
        together.wait()
        start, busy = time.monotonic(), time.process_time()
        found = work()
        place = rank * len(PARTS) + PARTS.index(part)
        cpu[place], seconds[place] = time.process_time() - busy, time.monotonic() - start
        return found

    def start(rank: int, world: int, _: str) -> None:
        # A rank has a connection to every other rank for each group of all.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port.value = store.port
        together.wait()
        if rank:
            store = dist.TCPStore("127.0.0.1", port.value, is_master=False)
        measured(rank, "default group", lambda: dist.init_process_group(GLOO, store=store, rank=rank, world_size=world,
                                                                        timeout=FOREVER))

    deadline = time.monotonic() + limit
    try:
        run_ranks(ranks, partial(_start, measured=measured), ranks, timeout=limit, start=start)
    except RanksFailed:
        if time.monotonic() < deadline:
            raise
    done = [part for place, part in enumerate(PARTS) if all(seconds[place::len(PARTS)])]
    return StartCost(ranks, {part: max(seconds[PARTS.index(part)::len(PARTS)]) for part in done},
                     {part: sum(cpu[PARTS.index(part)::len(PARTS)]) for part in done})


def _start(rank: int, ranks: int, measured: Callable[[int, str, Callable[[], Any]], Any]) -> None:
    watch: Any = SimpleNamespace(names=[SimpleNamespace(host="here")] * ranks)
    preflight: Preflight = measured(rank, "group of all", lambda: Preflight(watch))
    # As the channels of one pipeline, one for each direction.
    measured(rank, "neighbours' groups", lambda: [new_group([first, first + 1], GLOO)
                                                  for first in range(ranks - 1) for _ in range(2)])
    facts = {f"key {number}": number for number in range(FACTS)}
    measured(rank, "equal facts", lambda: preflight.compare(lambda: facts))
    measured(rank, "facts of all", lambda: preflight.gather(facts))
    measured(rank, "largest number", lambda: preflight.exchange.largest(0))
    measured(rank, "numbers of all", lambda: preflight.exchange.start_numbers([0.0]).result())


def groups_of_all(schedule: str) -> dict[str, int]:
    """How many groups of all ranks there are when an engine of `schedule` with two pipelines of two ranks has started:
    this package's, and all others with the default group."""
    return run_ranks(4, _groups_of_all, schedule)[0]


def _groups_of_all(rank: int, schedule: str) -> dict[str, int]:
    # The engine must be alive.
    engine = engine_of(schedule, Sleeping(2, 4, 4, (0.0, 0.0, 0.0)))
    backends = [str(dist.get_backend(group)) for group in c10d._world.pg_map if group.size() == engine.world_size]
    others = backends.count(GLOO)
    return {"ds_vshape": len(backends) - others, "others": others}
