"""Measures batches one after another, as in a training: what lies between them counts, and what hides it.

    python bench/consecutive.py --batches 8 --rounds 2

Layers sleep, as in run.py. The contenders take turns with `--batches` batches each; ranks meet before and after these,
not between them. A batch is compared with its work alone: what a rank would take without waiting for anybody.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
import torch.distributed as dist
from contenders import engine_of
from ranks import run_ranks
from rich.console import Console
from rich.table import Table
from workloads import Sleeping

# The optimizer is ZeRO-1's in all of them; DeepSpeed clips by default.
_ZERO1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "gradient_clipping": 1e6}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSpeed 1F1B": ("deepspeed 1f1b", _ZERO1),
    "1f1b": ("1f1b", _ZERO1),
    "v-zb": ("v-zb", _ZERO1),
    "v-zb, validated afterwards": (
        "v-zb", {**_ZERO1, "pipeline_schedule": {"name": "v-zb", "optimizer_post_validation": True}}),
}
_WARM_UP = 3


def measure(rank: int, workload: Sleeping, batches: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Of each contender and round: the seconds of a batch, and of its work alone."""
    engines = {name: engine_of(contender, workload, **keys) for name, (contender, keys) in CONTENDERS.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    losses: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            data = [workload.batch(number * batches + batch) for batch in range(batches if number else _WARM_UP)]
            work = workload.work()
            dist.barrier()
            start = time.perf_counter()
            losses[name] += [float(engine.train_batch(iter(micro_batches))) for micro_batches in data]
            dist.barrier()
            if number:
                found[name].append(((time.perf_counter() - start) / batches, work))
    expected, *others = losses.values()
    for other in others:
        assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(expected, other, strict=True)), "losses differ"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4, help="layers a rank")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--ms", type=float, nargs=3, default=[20, 20, 20], metavar=("F", "B", "W"), help="of one layer")
    parser.add_argument("--batches", type=int, default=4, help="one after another")
    parser.add_argument("--rounds", type=int, default=5)
    record.add_json_option(parser)
    options = parser.parse_args()
    workload = Sleeping(options.ranks, options.ranks * options.layers, options.micro_batches,
                        tuple(ms / 1000 for ms in options.ms))
    found = run_ranks(options.ranks, measure, workload, options.batches, options.rounds, timeout=1800)[0]
    table = Table(title=f"{options.ranks} ranks, {options.micro_batches} micro-batches, {workload}; {options.batches} "
                        f"batches one after another, {options.rounds} rounds")
    for column in ("contender", "median s a batch", "least", "most", "over its work alone"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, rounds in found.items():
        seconds = [took for took, _ in rounds]
        over = statistics.median(took / work for took, work in rounds)
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}",
                      f"{over:.3f}")
    Console(width=120).print(table)
    record.write(options.json, {name: [{"seconds": took, "work": work} for took, work in rounds]
                                for name, rounds in found.items()})


if __name__ == "__main__":
    main()
