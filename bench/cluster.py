"""Step times on two hosts, by what the wire between them takes: ranks 0 and 1 on one, 2 and 3 on the other.

    python bench/cluster.py                         # the table of README.md; needs root, see hosts.py
    python bench/cluster.py --wire 0 2 --rounds 3 --contenders 1f1b v-half@profile

The layers sleep, as in run.py. For each delay there is a job of its own, whose contenders' batches come in turn. A V
schedule crosses the wire twice as often as 1F1B.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
import record
import torch
import torch.distributed as dist
from contenders import contender_name
from hosts import INTERFACE, missing, two_hosts
from rich.console import Console
from rich.table import Table
from run import Result, compare_losses, measure, summarize
from workloads import Sleeping

RANKS_A_HOST = 2
RANKS = 2 * RANKS_A_HOST


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


def run_rank(folder: Path, rank: int, options: argparse.Namespace) -> None:
    """One rank; rank 0 writes what was measured into `folder`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % RANKS_A_HOST), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    deepspeed.init_distributed("gloo", verbose=False)
    took = hop()
    results = measure(rank, options.contenders, workload_of(options), options.rounds)
    if rank == 0:
        measured = {name: [result.losses, result.seconds, result.simulated] for name, result in results.items()}
        (folder / "measured").write_text(json.dumps({"hop": took, "results": measured}))
    dist.barrier()


def run_job(milliseconds: float, options: argparse.Namespace) -> tuple[float, dict[str, Result]]:
    """The measured hop in seconds, and each contender's result, with such a wire between the hosts."""
    with tempfile.TemporaryDirectory() as folder, two_hosts(milliseconds) as hosts:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE}
        ranks = [subprocess.Popen(hosts[rank // RANKS_A_HOST].command(
            [sys.executable, __file__, *sys.argv[1:], "--as-rank", str(rank), folder]), env=environment,
            # DeepSpeed prints the partition.
            stdout=subprocess.DEVNULL) for rank in range(RANKS)]
        for rank in ranks:
            if rank.wait():
                sys.exit(f"a rank ended with status {rank.returncode}; see its output above")
        measured = json.loads((Path(folder) / "measured").read_text())
    return measured["hop"], {name: Result(*lists, None, None) for name, lists in measured["results"].items()}


def workload_of(options: argparse.Namespace) -> Sleeping:
    return Sleeping(RANKS, RANKS * options.layers, options.micro_batches, tuple(ms / 1000 for ms in options.ms))


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
    parser.add_argument("--as-rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        rank, folder = options.as_rank
        run_rank(Path(folder), int(rank), options)
        return
    # Whatever ends this takes the hosts away.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if obstacle := missing():
        sys.exit(f"two hosts on this machine: {obstacle}")
    workload = workload_of(options)
    table = Table(title=f"{RANKS} ranks on two hosts, {options.micro_batches} micro-batches, {workload}; "
                  f"{options.rounds} rounds")
    table.add_column("wire ms")
    for column in ("hop ms", "contender", "median s", "least", "most", f"speed over {options.contenders[0]}"):
        table.add_column(column, justify="right")
    written = []
    for milliseconds in options.wire:
        took, results = run_job(milliseconds, options)
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
