"""Step times on two hosts, by what the wire between them takes: ranks 0 and 1 on one, 2 and 3 on the other.

    python bench/cluster.py                         # needs root, see hosts.py
    python bench/cluster.py --wire 0 2 --rounds 3 --contenders 1f1b v-half@profile

The layers sleep, as in run.py. For each delay there is a job of its own, whose contenders' batches come in turn. A V
schedule crosses the wire twice as often as 1F1B.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
import torch
import torch.distributed as dist
from contenders import contender_name
from hosts import INTERFACE, Host, missing, two_hosts
from ranks import run_ranks, start_on_gloo
from rich.console import Console
from rich.table import Table
from run import Result, compare_losses, measure, summarize
from workloads import Sleeping, Workload

RANKS_A_HOST = 2
RANKS = 2 * RANKS_A_HOST


def run_on_two_hosts(hosts: Sequence[Host], body: Callable[..., Any], *args: Any) -> list[Any]:
    """`run_ranks` of `body` with RANKS ranks, the first half of them on the first of `hosts`."""
    return run_ranks(RANKS, body, *args, timeout=3600, start=partial(_start, hosts))


def _start(hosts: Sequence[Host], rank: int, world: int, store: str) -> None:
    hosts[rank // RANKS_A_HOST].enter()
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    start_on_gloo(rank, world, store)


def need_two_hosts() -> None:
    """End the program where this machine can't have them; and have whatever ends it take them away."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if obstacle := missing():
        sys.exit(f"two hosts on this machine: {obstacle}")


def hop(rounds: int = 30) -> float:
    """The seconds that a few bytes take from one host to the other, on ranks 0 and RANKS_A_HOST; 0 on others."""
    there, sample, trips = {0: RANKS_A_HOST, RANKS_A_HOST: 0}.get(dist.get_rank()), torch.zeros(1), []
    if there is None:
        return 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for turn in (0, RANKS_A_HOST):
            if dist.get_rank() == turn:
                dist.send(sample, there)
            else:
                dist.recv(sample, there)
        trips.append(time.perf_counter() - start)
    return statistics.median(trips) / 2


def measure_on_wire(rank: int, names: list[str], workload: Workload, rounds: int) -> tuple[float, dict[str, Result]]:
    """The hop in seconds, and each contender's result (on rank 0)."""
    return hop(), measure(rank, names, workload, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wire", type=float, nargs="+", default=[0, 1, 5], help="milliseconds in each direction")
    parser.add_argument("--layers", type=int, default=4, help="layers a rank")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--ms", type=float, nargs=3, default=[5, 5, 5], metavar=("F", "B", "W"), help="of one layer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contenders", nargs="+", type=contender_name, metavar="NAME",
                        default=["1f1b", "v-half", "v-zb", "adaptive@1.0"], help="as those of run.py")
    record.add_json_option(parser)
    options = parser.parse_args()
    need_two_hosts()
    workload = Sleeping(RANKS, RANKS * options.layers, options.micro_batches, tuple(ms / 1000 for ms in options.ms))
    table = Table(title=f"{RANKS} ranks on two hosts, {options.micro_batches} micro-batches, {workload}; "
                  f"{options.rounds} rounds")
    table.add_column("wire ms")
    for column in ("hop ms", "contender", "median s", "least", "most", f"speed over {options.contenders[0]}"):
        table.add_column(column, justify="right")
    written = []
    for milliseconds in options.wire:
        with two_hosts(milliseconds) as hosts:
            took, results = run_on_two_hosts(hosts, measure_on_wire, options.contenders, workload, options.rounds)[0]
        compare_losses(results)
        summary = summarize(results, workload)
        written.append({"wire_ms": milliseconds, "hop": took, "summary": summary})
        for name, row in summary.items():
            table.add_row(f"{milliseconds:g}", f"{1000 * took:.2f}", name,
                          *(f"{row[key]:.3f}" for key in ("seconds", "least", "most")), f"{row['speed']:.2f}")
    Console(width=150).print(table)
    record.write(options.json, written)


if __name__ == "__main__":
    main()
