"""Sizes that this machine can't run: simulated steps of large models, and where our runtime would stop to scale.

    python bench/scale.py paper                     # the paper's models, every schedule
    python bench/scale.py paper --models 98.5B --samples 1 --micro-batches-per-rank 2 4    # its largest batch
    python bench/scale.py grid --length 1024 --batch 160        # the best layout of each schedule, as in the paper
    python bench/scale.py host                      # what a plan costs at start, and Python in a batch
    python bench/scale.py host --measure            # with the cost of an instruction measured on 2 ranks here
    python bench/scale.py ranks                     # what ranks do together at start, with up to 512 of them here

`paper` and `grid` run ds_vshape's simulator with the costs of
ds_vshape/layouts/gpt_costs.py: nothing in them is measured but the
efficiency, which the paper's own F passes show. `host` and `ranks` measure all that they print.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import record
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ds_vshape.config.section import ScheduleConfig
from ds_vshape.layouts.gpt_costs import Shape, Speeds, TrainingCosts
from ds_vshape.layouts.prediction import predict
from ds_vshape.runtime.instructions import training_instructions
from ds_vshape.schedule.adaptive import LimitError
from ds_vshape.schedule.choose import limits_at
from ds_vshape.schedule.collection import uncollected
from ds_vshape.schedule.communicators import communicators
from ds_vshape.schedule.lowering import Lowering, Run
from ds_vshape.schedule.named import ADAPTIVE, SCHEDULES, build, placement_of
from ds_vshape.schedule.proofs.own_proof import show
from ds_vshape.schedule.timeline import Times, simulate

# "Pipeline Parallelism with Controllable Memory", section 4: the models.
SHAPES = {shape.name: shape for shape in (
    Shape("9.6B", 30, 40, 5120, 16), Shape("21B", 46, 48, 6144, 24),
    Shape("38.5B", 62, 64, 7168, 32), Shape("98.5B", 78, 80, 10240, 40))}
# The paper's own figures: MFU in percent of the 98.5B model, each schedule in its best layout; by (length, batch).
PAPER_MFU = {(1024, 160): {"1f1b": 49.81, "zb-h1": 54.52, "v-half": 52.60, "v-min": 48.02, "v-zb": 57.58},
             (3072, 640): {"1f1b": 57.25, "v-half": 60.34, "v-zb": 56.89}}
GIB = 1024 ** 3
# CPU seconds of our Python in an instruction, from the least of a message to the most of a pass (bench/README.md).
INSTRUCTION_SECONDS = (25e-6, 100e-6)


# -- steps of the paper's models, simulated


@dataclass(frozen=True)
class Step:
    """A simulated batch: `memory` is the fullest rank's bytes, `seconds` with hops between nodes, `near_seconds` with
    hops inside a node, `bubble` (of the passes alone) and `mfu` go with `seconds`; the optimizer's time isn't in it."""

    schedule: str
    memory: float
    seconds: float
    near_seconds: float
    bubble: float
    mfu: float


def _config(name: str, training: TrainingCosts, time_limit: float) -> ScheduleConfig:
    """Schedule `name`, or for adaptive@x the plan for these times within x of 1F1B's bytes of activations."""
    if not name.startswith(ADAPTIVE):
        return ScheduleConfig(name=name)
    activations = training.activations(placement_of(ADAPTIVE, training.ranks))
    limit = limits_at(float(name.partition("@")[2]), training.ranks, training.micro_batches, activations)[0]
    return ScheduleConfig(name=ADAPTIVE, memory_limit={"activations": f"{ceil(limit)}B"}, times="profile",
                          planning_seconds=time_limit)


def step(name: str, training: TrainingCosts, time_limit: float = 5.0) -> Step:
    """The simulated batch of `training` by schedule `name`; LimitError where an adaptive one can't keep its limit."""
    speeds, placement = training.speeds, placement_of(name.partition("@")[0], training.ranks)
    found = predict(_config(name, training, time_limit), training, training.times(placement, speeds.between))
    near = simulate(found.schedule, training.times(placement, speeds.inside)).makespan
    return Step(name, found.fullest, found.seconds, near + found.seconds - found.timeline.makespan, found.bubble,
                found.mfu)


def layouts(training: TrainingCosts, batch: int, samples: Sequence[int]) -> Iterator[TrainingCosts]:
    """`training` in every way to share its GPUs among pipeline, tensor and data parallel ranks."""
    for tensor, data, each in product((1, 2, 4, 8), (1, 2, 4, 5, 8, 10), samples):
        ranks, rest = divmod(training.shape.gpus, tensor * data)
        micro_batches, left = divmod(batch, data * each)
        if not rest and not left and ranks > 1 and not (training.shape.layers + 2) % (2 * ranks):
            yield replace(training, samples=each, micro_batches=micro_batches, ranks=ranks, tensor=tensor, data=data)


def best_layout(name: str, candidates: Sequence[TrainingCosts], memory: float) -> tuple[TrainingCosts, Step] | None:
    """The layout in which schedule `name` has the highest MFU within `memory` bytes; None if none fits."""
    found = [(training, step(name, training)) for training in candidates]
    return max(((training, result) for training, result in found if result.memory <= memory),
               key=lambda pair: pair[1].mfu, default=None)


def paper_mfu(training: TrainingCosts, batch: int) -> dict[str, float]:
    """What the paper measured for this model, length and batch; empty where it doesn't tell."""
    return PAPER_MFU.get((training.length, batch), {}) if training.shape.name == "98.5B" else {}


def compared(theirs: dict[str, float], name: str) -> list[str]:
    """The paper's cells for schedule `name`: MFU, and over 1F1B."""
    return [f"{theirs[name]:.2f}", f"{theirs[name] / theirs['1f1b']:.3f}"] if name in theirs else ["-", "-"]


def show_steps(training: TrainingCosts, steps: Sequence[Step], memory: float) -> None:
    """A model's table. What doesn't fit is marked, as in the paper, and simulated all the same."""
    base = next(result for result in steps if result.schedule == "1f1b")
    shape = training.shape
    table = Table(title=f"{shape.name}, p = {training.ranks}, m = {training.micro_batches}, {training.samples} x "
                        f"{training.length} tokens{', recomputed' if training.recompute else ''}: simulated")
    theirs = paper_mfu(training, training.samples * training.micro_batches)
    for column in ("schedule", "GiB", "step s", "bubble", "MFU %", "over 1F1B, hops between nodes", "inside a node",
                   *(["paper's MFU %", "paper's over 1F1B"] if theirs else [])):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for result in steps:
        table.add_row(result.schedule, f"{result.memory / GIB:.0f}{' OOM' if result.memory > memory else ''}",
                      f"{result.seconds:.2f}", f"{result.bubble:.1%}", f"{100 * result.mfu:.1f}",
                      f"{base.seconds / result.seconds:.3f}", f"{base.near_seconds / result.near_seconds:.3f}",
                      *(compared(theirs, result.schedule) if theirs else []))
    Console(width=150).print(table)


def paper(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every schedule on every model, at some numbers of micro-batches a rank."""
    written = []
    for name, each in product(options.models, options.micro_batches_per_rank):
        shape = SHAPES[name]
        training = TrainingCosts(shape, speeds_of(options), options.length, options.samples, each * shape.gpus,
                                 shape.gpus, recompute=options.recompute)
        steps = []
        for schedule in tqdm(options.schedules, desc=f"{name} m={training.micro_batches}", disable=None):
            try:
                steps.append(step(schedule, training, options.time_limit))
            except LimitError as error:
                tqdm.write(f"{name}: {schedule}: {error}")
        show_steps(training, steps, options.memory * GIB)
        written.append({"training": asdict(training), "steps": [asdict(result) for result in steps]})
    return written


def grid(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every schedule in its best layout, beside the paper's MFU where it tells one."""
    start = TrainingCosts(SHAPES[options.model], speeds_of(options), options.length, 1, 1, 1,
                          recompute=options.recompute)
    candidates = list(layouts(start, options.batch, options.samples))
    theirs = paper_mfu(start, options.batch)
    table = Table(title=f"{options.model}, sequence {options.length}, batch {options.batch}: best of "
                        f"{len(candidates)} layouts within {options.memory:g} GiB")
    for column in ("schedule", "p x tensor x data", "micro-batch", "GiB", "simulated MFU %", "over 1F1B",
                   "paper's MFU %", "paper's over 1F1B"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    found = {name: best_layout(name, candidates, options.memory * GIB)
             for name in tqdm(options.schedules, disable=None)}
    base = found.get("1f1b")
    written = []
    for name, best in found.items():
        if best is None:
            table.add_row(name, "OOM", "-", "-", "-", "-", *compared(theirs, name))
            continue
        training, result = best
        table.add_row(name, f"{training.ranks} x {training.tensor} x {training.data}", str(training.samples),
                      f"{result.memory / GIB:.0f}", f"{100 * result.mfu:.1f}",
                      f"{result.mfu / base[1].mfu:.3f}" if base else "-", *compared(theirs, name))
        written.append({"training": asdict(training), "step": asdict(result)})
    Console(width=130).print(table)
    return written


# -- the host's share, measured


@dataclass(frozen=True)
class PlanCost:
    """CPU seconds and bytes of what a rank does at start, and the instructions and passes of its batch: of an inner
    rank, which has most. And the communicators of a pipeline."""

    schedule: str
    ranks: int
    micro_batches: int
    build: float
    lower: float
    check: float
    memory: int
    instructions: int
    passes: int
    communicators: int

    @property
    def seconds(self) -> float:
        """Of the whole start."""
        return self.build + self.lower + self.check

    def least_pass(self, instruction: float) -> float:
        """Seconds that a pass must take on average, lest the host be slower than the device."""
        return self.instructions / self.passes * instruction


def plan_cost(name: str, ranks: int, micro_batches: int) -> PlanCost:
    """Plan once and measure; memory is right in a process that did nothing before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    moments = [time.process_time()]
    schedule = build(name, ranks, micro_batches)
    moments.append(time.process_time())
    times, rank = Times.uniform(schedule.placement.stages), ranks // 2
    seconds = [moments[1] - moments[0], 0.0, 0.0]
    with uncollected():
        # The programs of batches in which messages are announced, as in the first one, and of all others.
        for lower in (Lowering.announced, Lowering.programs):
            start = time.process_time()
            lowering = Lowering(schedule, times)
            program, = lower(lowering, [rank])
            lowered = time.process_time()
            show(program, rank, schedule, lowering)
            seconds[1] += lowered - start
            seconds[2] += time.process_time() - lowered
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    training_instructions(program)
    return PlanCost(name, ranks, micro_batches, *seconds, memory, len(program),
                    sum(isinstance(step, Run) for step in program), len(communicators(schedule.placement)))


def host(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The costs of plans of some sizes, each in a process of its own, and of Python in a batch."""
    if options.measure:
        from instructions import measured_instruction
    cost = (measured_instruction(2, 10),) if options.measure else tuple(options.instruction_us)
    table = Table(title="what a rank does at start, and the host's part in a batch: measured")
    for column in ("schedule", "p", "m", "build s", "lower s", "check s", "MiB", "instructions a rank", "a pass",
                   *(f"s a batch at {1e6 * each:.0f} us" for each in cost),
                   *(f"least ms a pass at {1e6 * each:.0f} us" for each in cost), "communicators"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    sizes = list(product(options.schedules, options.ranks, options.micro_batches))
    found = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as process:
        for size in tqdm(sizes, disable=None):
            plan = process.submit(plan_cost, *size).result()
            found.append(plan)
            table.add_row(plan.schedule, str(plan.ranks), str(plan.micro_batches),
                          f"{plan.build:.2f}", f"{plan.lower:.2f}", f"{plan.check:.2f}",
                          f"{plan.memory / 1024 ** 2:.0f}",
                          str(plan.instructions), f"{plan.instructions / plan.passes:.2f}",
                          *(f"{each * plan.instructions:.2f}" for each in cost),
                          *(f"{1e3 * plan.least_pass(each):.2f}" for each in cost), str(plan.communicators))
    Console(width=170).print(table)
    return [{**asdict(plan), "instruction_seconds": cost} for plan in found]


def ranks(options: argparse.Namespace) -> dict[str, Any]:
    """What ranks do together at start, by their number; and the groups of all ranks that a start makes."""
    from many_ranks import PARTS, groups_of_all, start_cost
    table = Table(title="what ranks do together at start, here: seconds of the slowest rank (CPU seconds of all)")
    for column in ("ranks", *PARTS):
        table.add_column(column, justify="right")
    found = []
    for size in tqdm(options.ranks, disable=None):
        cost = start_cost(size, options.time_limit)
        found.append(cost)
        table.add_row(str(size), *(f"{cost.seconds[part]:.3f} ({cost.cpu[part]:.2f})" if part in cost.seconds else "-"
                                   for part in PARTS))
        # At once: large numbers take minutes, and may be ended from outside.
        missing = [part for part in PARTS if part not in cost.seconds]
        tqdm.write(f"{size} ranks: {', '.join(f'{part} {spent:.2f} s' for part, spent in cost.seconds.items()) or '-'}"
                   + (f"; not done within {options.time_limit:g} s: {', '.join(missing)}" if missing else ""))
    groups = {schedule: groups_of_all(schedule) for schedule in options.schedules}
    Console(width=170).print(table)
    for schedule, counts in groups.items():
        print(f"{schedule}: a start makes {counts['ds_vshape']} groups of all ranks, besides {counts['others']} of "
              "DeepSpeed and the job")
    return {"starts": [asdict(cost) for cost in found], "groups of all ranks": groups}


def speeds_of(options: argparse.Namespace) -> Speeds:
    """What GPUs and messages reach, by the options."""
    microseconds = 1e-6 * options.latency_us
    return Speeds(options.teraflops * 1e12, tuple(options.efficiency), (options.inside_gb * 1e9, microseconds),
                  (options.between_gb * 1e9, microseconds))


def parser() -> argparse.ArgumentParser:
    """Of all programs."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = result.add_subparsers(required=True, metavar="PROGRAM")
    gpus = argparse.ArgumentParser(add_help=False)
    gpus.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    gpus.add_argument("--teraflops", type=float, default=312, help="of a GPU; default: A100, bf16")
    gpus.add_argument("--efficiency", type=float, nargs=3, default=[0.65, 0.65, 0.65], metavar=("F", "B", "W"),
                      help="the share of it that passes reach; the default is what the paper's F passes show")
    gpus.add_argument("--memory", type=float, default=80, help="GiB of a GPU")
    gpus.add_argument("--inside-gb", type=float, default=200, help="GB/s of a message inside a node (NVLink)")
    gpus.add_argument("--between-gb", type=float, default=20, help="GB/s of a message between nodes")
    gpus.add_argument("--latency-us", type=float, default=20, help="of a message")
    gpus.add_argument("--recompute", action="store_true", help="recompute blocks in B")
    for_all = argparse.ArgumentParser(add_help=False)
    record.add_json_option(for_all)

    of_paper = programs.add_parser("paper", parents=[gpus, for_all], help="the paper's models, every schedule")
    of_paper.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    of_paper.add_argument("--samples", type=int, default=4, help="sequences in a micro-batch")
    of_paper.add_argument("--micro-batches-per-rank", type=int, nargs="+", default=[2, 8], metavar="M/P")
    of_paper.add_argument("--time-limit", type=float, default=5, help="seconds for each adaptive plan")
    of_paper.add_argument("--schedules", nargs="+",
                          default=[*SCHEDULES, "adaptive@0.4", "adaptive@0.6", "adaptive@0.8", "adaptive@1.1"])
    of_paper.set_defaults(run=paper)

    of_grid = programs.add_parser("grid", parents=[gpus, for_all], help="the best layout of each schedule")
    of_grid.add_argument("--model", choices=SHAPES, default="98.5B")
    of_grid.add_argument("--batch", type=int, default=160, help="sequences")
    of_grid.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4], help="sequences in a micro-batch")
    of_grid.add_argument("--schedules", nargs="+", default=["1f1b", "interleaved-1f1b", "zb-h1", "v-min", "v-half",
                                                            "v-zb"])
    of_grid.set_defaults(run=grid)

    of_host = programs.add_parser("host", parents=[for_all], help="what a plan costs, and Python in a batch")
    of_host.add_argument("--schedules", nargs="+", default=["1f1b", "v-half"])
    of_host.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    of_host.add_argument("--micro-batches", type=int, nargs="+", default=[64, 256, 1024])
    of_host.add_argument("--instruction-us", type=lambda text: 1e-6 * float(text), nargs="+",
                         default=INSTRUCTION_SECONDS, help="CPU microseconds of an instruction")
    of_host.add_argument("--measure", action="store_true", help="measure that on 2 ranks of this machine instead")
    of_host.set_defaults(run=host)

    of_ranks = programs.add_parser("ranks", parents=[for_all], help="what ranks do together at start")
    of_ranks.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128, 512])
    of_ranks.add_argument("--time-limit", type=float, default=120, help="seconds for each number of ranks")
    of_ranks.add_argument("--schedules", nargs="+", default=["v-half", "adaptive@0.75"],
                          help="of the engines whose groups are counted")
    of_ranks.set_defaults(run=ranks)
    return result


def main() -> None:
    options = parser().parse_args()
    written = options.run(options)
    record.write(options.json, written)


if __name__ == "__main__":
    main()
