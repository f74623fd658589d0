"""Measures batches one after another, as in a training: what lies between them counts, and what hides it.

    python bench/consecutive.py --batches 8 --rounds 2
    python bench/consecutive.py --batches 20 --rounds 2 --clipped 0.05    # on every 20th step

Layers sleep, as in run.py. The contenders take turns with `--batches` batches each; ranks meet before and after these,
not between them. A batch is compared with its work alone: what a rank would take without waiting for anybody.

All of them clip gradients by their norm over all ranks. In the `--clipped` share of the steps that changes something:
labels are far from what the model can learn there. DeepSpeed's engine counts in how many it did.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
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
from workloads import Batch, Sleeping

# Above the norm of the gradients of usual labels, and far below that of loud ones.
_CLIPPING, _LOUD = 10.0, 1000.0
# DeepSpeed's optimizer is ZeRO-1's.
_ZERO1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "gradient_clipping": _CLIPPING}
_DEEPSPEED, _TORCH = "DeepSpeed 1F1B", "torch ZBVZeroBubble"
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    _DEEPSPEED: ("deepspeed 1f1b", _ZERO1),
    _TORCH: ("torch zbvzerobubble", _ZERO1),
    "1f1b": ("1f1b", _ZERO1),
    "v-zb": ("v-zb", _ZERO1),
    "v-zb, validated afterwards": (
        "v-zb", {**_ZERO1, "pipeline_schedule": {"name": "v-zb", "optimizer_post_validation": True}}),
}
_WARM_UP = 3


@dataclass(frozen=True)
class Turn:
    """`batches` batches of a contender: seconds of one, those of its work alone, and how many steps were clipped."""

    seconds: float
    work: float
    clipped: int


def measure(rank: int, workload: Sleeping, batches: int, rounds: int, clipped: float) -> dict[str, list[Turn]]:
    """The turns of each contender."""
    engines = {name: engine_of(contender, workload, **keys) for name, (contender, keys) in CONTENDERS.items()}
    found: dict[str, list[Turn]] = {name: [] for name in engines}
    losses: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            first, count = number * batches, batches if number else _WARM_UP
            data = [_batch(workload, batch, clipped) for batch in range(first, first + count)]
            work = workload.work()
            active = 0
            dist.barrier()
            start = time.perf_counter()
            for micro_batches in data:
                losses[name].append(float(engine.train_batch(iter(micro_batches))))
                active += name == _DEEPSPEED and float(engine.get_global_grad_norm()) > _CLIPPING
            dist.barrier()
            if number:
                found[name].append(Turn((time.perf_counter() - start) / batches, work, active))
    expected, *others = losses.values()
    for other in others:
        assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(expected, other, strict=True)), "losses differ"
    return found


def _batch(workload: Sleeping, number: int, clipped: float) -> Batch:
    """Batch `number`; of the first n ones `clipped` * n have loud labels, rounded down."""
    is_loud = int((number + 1) * clipped) > int(number * clipped)
    return [(inputs, labels * _LOUD if is_loud else labels) for inputs, labels in workload.batch(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4, help="layers a rank")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--ms", type=float, nargs=3, default=[20, 20, 20], metavar=("F", "B", "W"), help="of one layer")
    parser.add_argument("--batches", type=int, default=4, help="one after another")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clipped", type=float, default=0.0, metavar="SHARE", help="of the steps, whose gradients are")
    record.add_json_option(parser)
    options = parser.parse_args()
    workload = Sleeping(options.ranks, options.ranks * options.layers, options.micro_batches,
                        tuple(ms / 1000 for ms in options.ms))
    found = run_ranks(options.ranks, measure, workload, options.batches, options.rounds, options.clipped,
                      timeout=3600)[0]
    clipped = sum(turn.clipped for turn in found[_DEEPSPEED]) / (options.rounds * options.batches)
    table = Table(title=f"{options.ranks} ranks, {options.micro_batches} micro-batches, {workload}; {options.batches} "
                        f"batches one after another, {clipped:.0%} of them clipped, {options.rounds} rounds")
    for column in ("contender", "median s a batch", "least", "most", "over its work alone", "speed over torch's"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, turns in found.items():
        seconds = [turn.seconds for turn in turns]
        over = statistics.median(turn.seconds / turn.work for turn in turns)
        speed = statistics.median(torchs.seconds / turn.seconds for torchs, turn in zip(found[_TORCH], turns))
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}",
                      f"{over:.3f}", f"{speed:.3f}")
    Console(width=140).print(table)
    record.write(options.json, {name: [asdict(turn) for turn in turns] for name, turns in found.items()})


if __name__ == "__main__":
    main()
