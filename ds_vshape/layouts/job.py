"""A job's config: its sections, what is legal in each, and the numbers that follow from them.

A mapping becomes a job by rules.read_job, which refuses what doesn't go together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from ds_vshape.config.compatibility import autocast_dtype
from ds_vshape.config.section import KEY, ConfigError, ScheduleConfig, read_section
from ds_vshape.schedule.memory_limit import MemoryLimitError
from ds_vshape.schedule.placement import Placement, linear

# DeepSpeed's own engine: a ds_config without our key. It runs 1F1B.
OWN_ENGINE = "deepspeed"

Count = Annotated[StrictInt, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Dtype = Literal["fp32", "bf16", "fp16"]


class Section(BaseModel):
    """Keys that aren't here are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """A GPT of ds_vshape/models/gpt.py: `layers` blocks, for sequences of `length` bytes."""

    layers: Count
    hidden: Count
    heads: Count
    length: Count
    vocabulary: Annotated[StrictInt, Field(ge=256)]


class Parallel(Section):
    """Ranks in a pipeline, ranks that share each block, replicas; and how much replicas share (ZeRO's stage).

    `ranks` is all of them; of `data` and `ranks` one may be left to follow from the other.
    """

    pipe: Count
    tensor: Count
    data: Count | None
    ranks: Count | None
    zero: Literal[0, 1]


class Precision(Section):
    """Of weights and activations; `sums` is that of gradients added up over micro-batches, null for the same."""

    dtype: Dtype
    sums: Dtype | None


class Data(Section):
    """Sequences: of a micro-batch, of the whole batch, and how many micro-batches a replica has of it.

    Of `micro_batches` and `batch` one may follow from the other. `text` is a folder with .py files.
    """

    text: StrictStr | None
    micro_batch: Count
    micro_batches: Count | None
    batch: Count | None


class Optimizer(Section):
    """AdamW; gradients are clipped to the norm `clipping`, 0 for not at all."""

    lr: Positive
    betas: tuple[Number, Number]
    weight_decay: Number
    clipping: Number


class Machine(Section):
    """What a job runs on: `slots` ranks a host (null: all on one), and what a prediction must know of it.

    `memory` in GiB and `teraflops` by dtype of one device, `efficiency` of F, B and W; messages inside a host and
    between hosts by (GB a second, microseconds); copies of a device to the `host`'s memory, and at the same time back,
    in GB a second each way, of what ranks have to share what one of them gets.
    """

    accelerator: Literal["cpu", "cuda"]
    slots: Count | None
    memory: Positive
    teraflops: dict[Dtype, Positive]
    efficiency: tuple[Positive, Positive, Positive]
    inside: tuple[Positive, Number]
    between: tuple[Positive, Number]
    host: Positive = 10.0


@dataclass(frozen=True)
class Host:
    """Where `slots` ranks run."""

    name: str
    slots: int


class Job(Section):
    """A whole config. `schedule` is the "pipeline_schedule" section, `deepspeed` what else the ds_config shall have."""

    model: Model
    schedule: dict[str, Any]
    parallel: Parallel
    precision: Precision
    data: Data
    optimizer: Optimizer
    machine: Machine
    batches: Count
    result: StrictStr | None
    hostfile: StrictStr | None
    port: Annotated[StrictInt, Field(ge=1024, le=65535)]
    deepspeed: dict[str, Any]

    @cached_property
    def section(self) -> ScheduleConfig | None:
        """None for DeepSpeed's own engine."""
        return None if self.schedule.get("name") == OWN_ENGINE else read_section({KEY: self._given})

    @property
    def _given(self) -> dict[str, Any]:
        """The schedule's keys that have a value."""
        return {key: value for key, value in self.schedule.items() if value is not None}

    @property
    def schedule_name(self) -> str:
        """Of the table; DeepSpeed's own engine runs 1f1b."""
        return self.section.name if self.section else "1f1b"

    @property
    def autocast(self) -> Dtype | None:
        """The dtype of the torch.autocast that passes run in; None where there is none."""
        found = autocast_dtype(self.deepspeed)
        return next((dtype for dtype in get_args(Dtype) if dtype == found), None)

    @property
    def placement(self) -> Placement:
        """Of the stages on the ranks of a pipeline."""
        pipe = self.parallel.pipe
        return self.section.placement_on(pipe) if self.section else linear(pipe)

    @property
    def replicas(self) -> int:
        """Data parallel ranks."""
        parallel = self.parallel
        if parallel.data is None and parallel.ranks is not None:
            return parallel.ranks // (parallel.pipe * parallel.tensor)
        return parallel.data or 1

    @property
    def ranks(self) -> int:
        """Of the whole job."""
        return self.parallel.pipe * self.parallel.tensor * self.replicas

    @property
    def micro_batches(self) -> int:
        """Of a batch, for each replica."""
        data = self.data
        if data.micro_batches is not None:
            return data.micro_batches
        assert data.batch is not None
        return data.batch // (data.micro_batch * self.replicas)

    @cached_property
    def hosts(self) -> tuple[Host, ...]:
        """Those of the hostfile, else as many as are needed."""
        if self.hostfile is not None:
            return tuple(read_hostfile(Path(self.hostfile)))
        slots = self.machine.slots or self.ranks
        hosts, rest = divmod(self.ranks, slots)
        return tuple(Host(f"host {number}", slots) for number in range(hosts)) + (
            (Host(f"host {hosts}", rest),) if rest else ())

    def ds_config(self) -> dict[str, Any]:
        """What deepspeed.initialize gets."""
        return compose_ds_config(None if self.section is None else self._given, self.data.micro_batch,
                                 self.micro_batches, self.optimizer, self.parallel.zero, self.precision, self.deepspeed)


@contextmanager
def in_terms_of_jobs() -> Iterator[None]:
    """Let errors name keys of the section as a job's, where it has another name."""
    try:
        yield
    except (ConfigError, MemoryLimitError) as error:
        raise type(error)(str(error).replace(f"{KEY}.", "schedule.")) from None


def compose_ds_config(schedule: dict[str, Any] | None, micro_batch: int, micro_batches: int, optimizer: Optimizer,
                      zero: int, precision: Precision, others: dict[str, Any]) -> dict[str, Any]:
    """A ds_config; without a `schedule`, its section, DeepSpeed's own engine trains."""
    return {
        **({} if schedule is None else {KEY: schedule}),
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        # torch's own AdamW: DeepSpeed's would be compiled first.
        "optimizer": {"type": "AdamW", "params": {**optimizer.model_dump(exclude={"clipping"}), "torch_adam": True}},
        "gradient_clipping": optimizer.clipping,
        "zero_optimization": {"stage": zero},
        **({} if precision.dtype == "fp32" else {precision.dtype: {"enabled": True}}),
        **({} if precision.sums is None else {"data_types": {"grad_accum_dtype": precision.sums}}),
        **others,
    }


def read_hostfile(path: Path) -> Iterator[Host]:
    """The hosts of a file with lines like "worker-0 slots=4"; ConfigError for any other line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"hostfile = {str(path)!r}: {error.strerror}") from None
    for line in lines:
        entry = line.partition("#")[0].strip()
        if entry:
            parts = re.fullmatch(r"(\S+)\s+slots\s*=\s*([1-9]\d*)", entry)
            if parts is None:
                raise ConfigError(f"hostfile = {str(path)!r}: the line {entry!r} must be like 'worker-0 slots=4'")
            yield Host(parts[1], int(parts[2]))
