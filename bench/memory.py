"""Measures the peak memory of each rank in a batch, beside what was predicted, on a GPT with real tensors.

    python bench/memory.py
    python bench/memory.py --contenders "torch zbvzerobubble" v-half --checkpointing off
    python bench/memory.py --contenders v-half --checkpointing off --head chunked --partition blocks multiplications

Each contender trains in processes of its own. A rank's peak is the high-water mark of its resident memory (Linux,
/proc/self) over one batch, above what was resident when the batch began with all gradients there (zeros): activations,
and what passes need while they run. glibc is told to map large tensors one by one, so that memory goes back when a
tensor dies.

With --head the model ends in a head of --vocabulary words. --partition says how the layers are divided: as many blocks
on each rank, and the head on rank 0; by the multiplications in them; or by times measured at the start. Each rank's
share of all multiplications, and of the time of all passes in the measured batch, stands beside its memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
import torch
import torch.distributed as dist
from contenders import engine_of, section_of
from ranks import run_ranks
from resident import map_large_tensors, rise_in
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from workloads import Gpt, GptWithHead

from ds_vshape.schedule.timeline import Timeline

DEFAULT_CONTENDERS = ["torch zbvzerobubble", "1f1b", "v-zb", "v-half", "v-min", "adaptive@0.9", "adaptive@0.75",
                      "adaptive@0.6", "adaptive@0.5"]
MIB = 2 ** 20
# The first batches exchange shapes, and measure the activations of one micro-batch.
_WARM_UP = 3


def _section_of_partition(partition: str, workload: GptWithHead) -> Any:
    if partition == "times":
        return "profile"
    return {"costs": workload.costs() if partition == "multiplications" else [1] * workload.blocks + [0]}


def _share_of_time(timeline: Timeline, rank: int) -> float:
    """What this rank's passes took of the time of all ranks' passes."""
    return sum(span.end - span.start for span in timeline.ranks[rank]) / timeline.work


def measure(rank: int, name: str, workload: Gpt, interval: int, partition: str) -> dict[str, float]:
    """Bytes on this rank: the peak over a batch, and where it's known what activations should take, with what passes
    need while they run."""
    map_large_tensors()
    keys: dict[str, Any] = {"pipeline": {"activation_checkpoint_interval": interval}}
    if isinstance(workload, GptWithHead):
        section = section_of(name, "equal")
        keys["pipeline_schedule"] = {**({"name": section} if isinstance(section, str) else section),
                                     "partition": _section_of_partition(partition, workload)}
    engine = engine_of(name, workload, times="equal", **keys)
    batches = [workload.batch(number) for number in range(_WARM_UP + 1)]
    for batch in batches[:-1]:
        engine.train_batch(iter(batch))
    predicted = engine.memory_report()[rank] if hasattr(engine, "memory_report") else None
    for parameter in engine.module.parameters():
        parameter.grad = torch.empty_like(parameter).zero_()
    dist.barrier()
    measured: dict[str, float] = {"peak": rise_in(lambda: engine.train_batch(iter(batches[-1])))}
    if isinstance(workload, GptWithHead):
        parts, costs = engine.module.parts, workload.costs()
        of_rank = sum(sum(costs[parts[stage]:parts[stage + 1]]) for stage in engine.placement.chunks[rank])
        measured["multiplications"] = of_rank / sum(costs)
        measured["time"] = _share_of_time(engine.timelines()[1], rank)
    if predicted is not None:
        measured["predicted"] = predicted.activations_peak + predicted.working
    return measured


def show(rows: list[dict[str, Any]], workload: Gpt) -> None:
    """A row for each contender and rank."""
    table = Table(title=f"{workload.ranks} ranks, {workload.micro_batches} micro-batches, {workload}; MiB")
    with_head = isinstance(workload, GptWithHead)
    columns = ["contender", "checkpointing", "rank", "peak", "predicted", "ratio"]
    if with_head:
        columns = [*columns[:2], "partition", *columns[2:], "multiplications", "time"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("contender", "partition") else "right")
    for row in rows:
        for rank, found in enumerate(row["ranks"]):
            cells = [f"{found['peak'] / MIB:.0f}"]
            if "predicted" in found:
                cells += [f"{found['predicted'] / MIB:.0f}", f"{found['peak'] / found['predicted']:.3f}"]
            if with_head:
                cells += [f"{found[share]:.1%}" for share in ("multiplications", "time")]
            table.add_row(row["contender"], row["checkpointing"], *([row["partition"]] if with_head else []), str(rank),
                          *cells)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4, help="blocks a rank")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--contenders", nargs="+", default=DEFAULT_CONTENDERS, metavar="NAME",
                        help="as in run.py; adaptive@0.6 is planned for passes that take equally long")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--head", choices=("whole", "chunked"), help="a head with whole logits, or in chunks of tokens")
    parser.add_argument("--vocabulary", type=int, default=64 * 256, help="words of that head")
    parser.add_argument("--partition", nargs="+", choices=("blocks", "multiplications", "times"),
                        default=["multiplications"], help="how the layers are divided where there is that head")
    record.add_json_option(parser)
    options = parser.parse_args()
    workload = Gpt(options.ranks, options.ranks * options.layers, options.micro_batches, options.hidden, options.length)
    if options.head is not None:
        workload = GptWithHead(workload.ranks, workload.layers + 1, workload.micro_batches, workload.hidden,
                               workload.length, vocabulary=options.vocabulary, chunked=options.head == "chunked")
    partitions = options.partition if options.head is not None else [""]
    cases = [(name, checkpointing, partition) for checkpointing in options.checkpointing for name in options.contenders
             for partition in partitions if checkpointing == "off" or not name.startswith("torch")]
    rows = []
    for name, checkpointing, partition in tqdm(cases, desc="measuring", disable=None):
        ranks = run_ranks(options.ranks, measure, name, workload, int(checkpointing == "on"), partition, timeout=900)
        rows.append({"contender": name, "checkpointing": checkpointing, "partition": partition, "ranks": ranks})
    show(rows, workload)
    record.write(options.json, rows)


if __name__ == "__main__":
    main()
