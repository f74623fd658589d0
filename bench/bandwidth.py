"""Pipelines beside ZeRO's data parallelism, by the bandwidth between two hosts: time, bytes on the wire and memory.

    python bench/bandwidth.py                                    # needs root, see hosts.py
    python bench/bandwidth.py --megabits 100 --contenders v-half "deepspeed zero-3"

Ranks 0 and 1 are on one host, 2 and 3 on the other, as in cluster.py. Layers sleep, and have parameters, messages and
activations in the proportions of a transformer's block (workloads.Blocks), so that ranks compete for the wire and not
for cores. All contenders train the same global batch; with data parallelism each rank runs its share of it through all
layers. For each bandwidth there is a job of its own, whose contenders' batches take turns, with losses compared.

DeepSpeed waits for its messages on a CPU in places where a GPU has them run beside the passes. So there is a time for
ZeRO that no implementation can be below, too: that of the passes, or of the bytes of NCCL's rings on the wire if that
is longer, as if all of them could be hidden.

Memory is the most that is resident on the fullest rank in two batches, above a process that has trained a small model
of the same kind. It is measured without sleeps and wire, with layers of --memory-width.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
from cluster import RANKS, need_two_hosts, run_on_two_hosts
from contenders import ZERO, contender_name, engine_of
from hosts import INTERFACE, two_hosts
from ranks import run_ranks
from resident import map_large_tensors, peak_in, resident
from rich.console import Console
from rich.table import Table
from run import compare_losses
from tqdm import tqdm
from turns import Turns
from workloads import Blocks

MIB = 2 ** 20
DEFAULT_CONTENDERS = ["deepspeed zero-1", "deepspeed zero-3", "deepspeed zero-3:2", "deepspeed 1f1b",
                      "deepspeed dualpipev", "torch zbvzerobubble", "v-half", "v-zb"]
# What is compared with ZeRO.
OURS = ("v-half", "v-zb")
# ZeRO-3 follows the first batch to see which parameters come next.
_WARM_UP = 2
# Of the model that a process trains before its memory counts.
_SMALL = 48


@dataclass(frozen=True)
class Measured:
    """A contender's losses (of all batches), seconds (of those that count), and the most bytes that a batch has sent
    over the wire in one direction."""

    losses: list[float]
    seconds: list[float]
    sent: int


def measure(rank: int, names: list[str], workload: Blocks, rounds: int) -> dict[str, Measured]:
    """The contenders' batches in turns (on every rank; `sent` on those of the first host)."""
    turns = Turns({name: engine_of(name, workload) for name in names}, workload)
    sent: dict[str, int] = {}
    for _ in range(_WARM_UP):
        for name in names:
            before = _on_wire()
            turns.train(name)
            sent[name] = max(now - then for now, then in zip(_on_wire(), before))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            seconds[name].append(turns.train(name))
    return {name: Measured(turns.losses[name], seconds[name], sent[name]) for name in names}


def _on_wire() -> tuple[int, int]:
    """The bytes that this host has received and sent so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        interface, _, numbers = line.strip().partition(":")
        if interface == INTERFACE:
            fields = numbers.split()
            return int(fields[0]), int(fields[8])
    raise RuntimeError(f"this host has no {INTERFACE}")


def memory_of(rank: int, name: str, workload: Blocks) -> int:
    """The most bytes that this rank has resident in the first batches, above a process that has trained before."""
    map_large_tensors()

    def train(trained: Blocks) -> Any:
        engine = engine_of(name, trained)
        for number in range(_WARM_UP):
            engine.train_batch(iter(trained.batch(number)))
        return engine

    train(replace(workload, width=_SMALL))
    gc.collect()
    before = resident()
    return peak_in(partial(train, workload)) - before


def hidden_seconds(name: str, workload: Blocks, work: float, megabits: float) -> float:
    """The least that a batch of a ZeRO contender can take: `work` seconds of passes, or all bytes on the wire.

    A ring of n ranks sends (n - 1) / n of the parameters over each of its links for each collective, of which ZeRO-1
    has two for a batch (gradients, then parameters), ZeRO-3 three for each micro-batch of a rank.
    """
    stage, joined = ZERO[name]
    collectives = 2 if stage == 1 else 3 * workload.micro_batches // (workload.ranks * joined)
    parameters = 4 * workload.width ** 2 * workload.layers
    return max(work, collectives * parameters * (workload.ranks - 1) / workload.ranks / (megabits * 1e6 / 8))


def wins_below(ours: Mapping[float, float], others: Mapping[float, float]) -> float:
    """The bandwidth below which `ours` takes less time, both by bandwidth: between two of them as powers of it.

    0 where it never does, infinite where it always does.
    """
    found = [(bandwidth, math.log(others[bandwidth] / ours[bandwidth])) for bandwidth in sorted(ours)]
    if found[-1][1] > 0:
        return math.inf
    for (low, gain), (high, loss) in reversed(list(pairwise(found))):
        if gain > 0 >= loss:
            share = gain / (gain - loss)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return 0.0


@dataclass(frozen=True)
class Job:
    """What a wire of so many megabits a second gave: each contender's results, and for ZeRO the least possible time."""

    megabits: float
    results: Mapping[str, Measured]
    hidden: Mapping[str, float]

    def seconds(self, name: str) -> float:
        """The median of a contender's batches."""
        return statistics.median(self.results[name].seconds)


def time_table(jobs: Sequence[Job], memory: Mapping[str, int], workload: Blocks) -> Table:
    """Seconds of a batch by bandwidth."""
    table = Table(title=f"{RANKS} ranks on two hosts, {workload.micro_batches} micro-batches, {workload}; seconds")
    table.add_column("contender")
    for column in ("MiB resident", "MiB on the wire", *(f"{job.megabits:g} Mbit/s" for job in jobs)):
        table.add_column(column, justify="right")
    for name, found in jobs[0].results.items():
        table.add_row(name, f"{memory[name] / MIB:.0f}" if name in memory else "-", f"{found.sent / MIB:.1f}",
                      *(f"{job.seconds(name):.3f}" for job in jobs))
    for name in jobs[0].hidden:
        table.add_row(f"{name}, all messages hidden", "", "", *(f"{job.hidden[name]:.3f}" for job in jobs))
    return table


def break_evens(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """For each pair of ours and ZeRO's, the bandwidths in Mbit/s below which ours wins; None: at all of them."""
    found = []
    for ours in OURS:
        for zero in jobs[0].hidden:
            if ours in jobs[0].results:
                seconds = {job.megabits: job.seconds(ours) for job in jobs}
                below = {"measured": wins_below(seconds, {job.megabits: job.seconds(zero) for job in jobs}),
                         "hidden": wins_below(seconds, {job.megabits: job.hidden[zero] for job in jobs})}
                found.append({"ours": ours, "zero": zero,
                              **{kind: None if math.isinf(at) else at for kind, at in below.items()}})
    return found


def break_even_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """As text."""
    table = Table(title="wins below, Mbit/s")
    for column in ("", "over", "measured", "if ZeRO hid all messages"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for row in rows:
        table.add_row(row["ours"], row["zero"], *(
            "all of these" if row[kind] is None else f"{row[kind]:.0f}" if row[kind] else "none of these"
            for kind in ("measured", "hidden")))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, nargs="+", default=[100, 200, 400, 800, 1600],
                        help="a second in each direction")
    parser.add_argument("--layers", type=int, default=4, help="layers a rank")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--ms", type=float, nargs=3, default=[6, 6, 6], metavar=("F", "B", "W"), help="of one layer")
    parser.add_argument("--width", type=int, default=512, help="of a layer, which has its square of parameters")
    parser.add_argument("--memory-width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2, help="batches of each contender that count")
    parser.add_argument("--contenders", nargs="+", type=contender_name, default=DEFAULT_CONTENDERS, metavar="NAME",
                        help="as those of run.py")
    record.add_json_option(parser)
    options = parser.parse_args()
    need_two_hosts()
    names = options.contenders
    workload = Blocks(RANKS, RANKS * options.layers, options.micro_batches, tuple(ms / 1000 for ms in options.ms),
                      options.width)
    instant = replace(workload, seconds=(0.0, 0.0, 0.0), width=options.memory_width)
    memory = {name: max(run_ranks(RANKS, memory_of, name, instant, timeout=900))
              for name in tqdm(names, desc="memory", disable=None)}
    jobs = []
    for megabits in tqdm(sorted(options.megabits), desc="bandwidths", disable=None):
        with two_hosts(megabits=megabits) as hosts:
            results = run_on_two_hosts(hosts, measure, names, workload, options.rounds)[0]
        compare_losses(results)
        work = workload.work()
        jobs.append(Job(megabits, results, {name: hidden_seconds(name, workload, work, megabits)
                                            for name in names if name in ZERO}))
    console = Console(width=150)
    console.print(time_table(jobs, memory, workload))
    wins = break_evens(jobs)
    console.print(break_even_table(wins))
    record.write(options.json, {
        "workload": str(workload), "memory": memory, "wins_below": wins,
        "jobs": [{"megabits": job.megabits, "hidden": job.hidden,
                  "results": {name: {**asdict(found), "median": job.seconds(name)}
                              for name, found in job.results.items()}} for job in jobs]})


if __name__ == "__main__":
    main()
