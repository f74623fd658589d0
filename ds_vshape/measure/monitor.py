"""What a pipeline reports to DeepSpeed's own monitors (wandb, TensorBoard, csv, Comet), besides loss and learning rate.

Every `steps_per_print` batches, over samples as DeepSpeed does:

    Train/Pipeline/samples_per_second, tokens_per_second    over the batches since the report before
    Train/Pipeline/makespan_predicted, makespan_measured    seconds, of the last batch
    Train/Pipeline/bubble, bubble_rank_R                    measured shares, of the last batch
    Train/Pipeline/peak_activations_rank_R                  bytes, measured sizes in the order of the schedule, if known
    Train/Pipeline/peak_allocated_rank_R                    bytes, as the accelerator counts (on CPU the process's size)
    Train/Pipeline/share_split                              of the trained parameters, with weight gradients in W
    Train/Pipeline/schedule                                 a picture, once for each schedule; wandb only

Tokens are there where a micro-batch's first input has integers in two dimensions. The second batch, in which
activations are measured, has no times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from ds_vshape.comm.payload import members
from ds_vshape.measure.observer import Observer
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.buffers import Buffers
from ds_vshape.runtime.instructions import Execute, Instruction
from ds_vshape.runtime.rank import TrainingRank
from ds_vshape.runtime.wrappers import InstructionWrappers
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.memory_limit import peak_of_1f1b
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline

_PREFIX = "Train/Pipeline/"


class DeferringMonitor:
    """DeepSpeed's `monitor`, which writes on one rank alone. An error is given to `defer`: other ranks wait for what
    comes after it."""

    def __init__(self, monitor: Any, defer: Callable[[Exception, str], None]) -> None:
        self._monitor, self._defer = monitor, defer

    def write_events(self, events: list[Any]) -> None:
        """Write (name, value, number of samples) of each event."""
        try:
            self._monitor.write_events(events)
        except Exception as error:
            self._defer(error, "monitor")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._monitor, name)


class MonitorReports:
    """Reports to the monitor of this `rank`, which is on; on every rank, since reports are collective."""

    def __init__(self, rank: TrainingRank, observer: Observer, held: Buffers, wrappers: InstructionWrappers) -> None:
        self._rank, self._observer, self._stage_buffers = rank, observer, held
        self._pictured: Schedule | None = None
        self._seconds = 0.0
        self._samples = self._tokens = 0
        self._of_batch: dict[int, int] = {}
        if rank.stage_id == rank.placement.rank_of(0):
            wrappers.add(self._counted)

    def _counted(self, instructions: Mapping[Instruction, Execute]) -> dict[Instruction, Execute]:
        """An instruction map that counts the tokens that are loaded for training."""
        load = instructions[instr.LoadMicroBatch]

        @wraps(load)
        def load_and_count(engine: object, buffer_id: instr.BufferId) -> None:
            load(engine, buffer_id=buffer_id)
            if torch.is_grad_enabled():
                # Of a batch that runs twice they count once.
                loaded = self._stage_buffers[instr.BufferId(0, buffer_id.micro_batch)].inputs
                self._of_batch[buffer_id.micro_batch] = _tokens(loaded)

        return {**instructions, instr.LoadMicroBatch: load_and_count}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around a training batch, on every rank."""
        started = time.perf_counter()
        self._of_batch.clear()
        yield
        self._seconds += time.perf_counter() - started
        self._tokens += sum(self._of_batch.values())
        self._samples += self._rank.train_batch_size()
        every = self._rank.steps_per_print()
        if every and self._rank.global_steps % every == 0:
            self._report()
            self._seconds, self._samples, self._tokens = 0.0, 0, 0

    def _report(self) -> None:
        """Collective over the pipeline."""
        values = self._rates() | self._sizes()
        if not self._observer.has_just_measured:
            schedule, _ = self._observer.last_batch()
            predicted, measured = self._observer.timelines(self._rank.planned_times)
            values |= _times(predicted, measured)
            self._picture(schedule, predicted)
        samples = self._rank.global_samples
        self._rank.monitor.write_events([(_PREFIX + name, value, samples) for name, value in values.items()])

    def _rates(self) -> dict[str, float]:
        rates = {"samples_per_second": self._samples / self._seconds}
        if self._tokens:
            replicas = self._rank.grid.get_data_parallel_world_size()
            rates["tokens_per_second"] = replicas * self._tokens / self._seconds
        return rates

    def _sizes(self) -> dict[str, float]:
        rank, (split, trained) = self._rank, self._observer.split
        own = torch.tensor([split, trained, get_accelerator().max_memory_allocated()], device=rank.device)
        gathered = [torch.empty_like(own) for _ in range(rank.placement.ranks)]
        dist.all_gather(gathered, own, group=rank.grid.get_pipe_parallel_group())
        of_ranks = torch.stack(gathered).tolist()
        sizes = {f"peak_allocated_rank_{rank}": allocated for rank, (_, _, allocated) in enumerate(of_ranks)}
        sizes["share_split"] = sum(split for split, _, _ in of_ranks) / max(1, sum(n for _, n, _ in of_ranks))
        if self._observer.is_measured:
            memory = self._observer.memory(self._observer.last_batch()[0])
            sizes |= {f"peak_activations_rank_{rank}": needs.activations_peak for rank, needs in enumerate(memory)
                      if needs.activations_peak is not None}
        return sizes

    def _picture(self, schedule: Schedule, predicted: Timeline) -> None:
        """Show the schedule to wandb once, if wandb runs here."""
        monitor = getattr(self._rank.monitor, "wandb_monitor", None)
        if monitor is None or schedule == self._pictured:
            return
        self._pictured = schedule
        try:
            import wandb
            with TemporaryDirectory() as folder:
                file = Path(folder) / "schedule.png"
                _draw(schedule, predicted, file)
                monitor.log({f"{_PREFIX}schedule": wandb.Image(str(file), caption=schedule.name)},
                            step=self._rank.global_samples)
        except ImportError as error:
            logger.warning(f"no picture of the schedule for wandb: {error}; pip install ds-vshape[plots]")
        except Exception as error:
            # Other ranks wait for what comes after it.
            logger.warning(f"no picture of the schedule for wandb: {type(error).__name__}: {error}")


def _tokens(inputs: Any) -> int:
    """How many tokens a micro-batch has, where its first input is made of them."""
    first = members(inputs)[0]
    return 0 if first is None or first.is_floating_point() or first.dim() != 2 else first.numel()


def _times(predicted: Timeline, measured: Timeline) -> dict[str, float]:
    values = {"makespan_predicted": predicted.makespan, "makespan_measured": measured.makespan,
              "bubble": measured.bubble}
    for rank, spans in enumerate(measured.ranks):
        values[f"bubble_rank_{rank}"] = 1 - sum(span.end - span.start for span in spans) / measured.makespan
    return values


def _draw(schedule: Schedule, predicted: Timeline, file: Path) -> None:
    """As `ds-vshape plan --png` does, in seconds; ImportError without matplotlib."""
    from ds_vshape.schedule.pictures import Panel, save
    placement = schedule.placement
    title = f"{schedule.name}: {placement.ranks} ranks, {schedule.micro_batches} micro-batches"
    figures = f"predicted makespan {predicted.makespan:.4g} s, bubble {predicted.bubble:.1%}"
    full = peak_of_1f1b(placement.ranks, schedule.micro_batches)
    panel = Panel(title, figures, placement, predicted, Activations.counted(placement), None, full)
    save([panel], file, "png", "seconds")
