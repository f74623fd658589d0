"""What must be legal together in a job's config: impossible layouts are refused before anything starts.

Every refusal is one ConfigError that names the key, its value and what is legal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ds_vshape.config.compatibility import check_demands
from ds_vshape.config.section import KEY, ConfigError, ScheduleConfig, TraceConfig, nearest
from ds_vshape.config.to_schedule import check_limit, table_schedule
from ds_vshape.layouts.job import OWN_ENGINE, Job, in_terms_of_jobs
from ds_vshape.schedule.memory_limit import MemoryLimitError
from ds_vshape.schedule.named import ADAPTIVE, SCHEDULES

Kind = TypeVar("Kind", bound=BaseModel)


def read_job(config: Mapping[str, Any]) -> Job:
    """The job of a whole config; raises ConfigError for what can't be run."""
    job = section_of(Job, config)
    with in_terms_of_jobs():
        for check in (_check_schedule, _check_ranks, _check_model, _check_batch, _check_precision, _check_rest,
                      _check_memory_limit):
            check(job)
    return job


def section_of(kind: type[Kind], config: Any, name: str = "") -> Kind:
    """A section, or a whole job, of plain values; raises ConfigError for what `kind` doesn't know."""
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], kind, name)) from None


def _check_schedule(job: Job) -> None:
    # Before the section is read, which doesn't know that DeepSpeed's own engine is legal here.
    name, legal = job.schedule.get("name"), [*SCHEDULES, ADAPTIVE, OWN_ENGINE]
    if isinstance(name, str) and name not in legal:
        raise ConfigError(f"schedule.name = {name!r}: {nearest(name, legal)}")
    section = job.section
    if section is None:
        others = [key for key, value in job.schedule.items() if value is not None and key != "name"]
        if others:
            raise ConfigError(f"schedule.{others[0]} = {job.schedule[others[0]]!r}: DeepSpeed's own engine has none; "
                              f"legal with schedule={OWN_ENGINE}: name alone")
        return
    if section.partition is not None and not isinstance(section.partition, tuple):
        raise ConfigError(f"schedule.partition = {job.schedule['partition']!r}: must be a list of the first layer of "
                          "each stage with the number of layers, or null for stages by what layers cost")
    check_demands(section)


def _check_ranks(job: Job) -> None:
    parallel, hosts = job.parallel, job.hostfile
    shared = parallel.pipe * parallel.tensor
    product = f"parallel.pipe x parallel.tensor = {parallel.pipe} x {parallel.tensor} = {shared}"
    if parallel.ranks is not None:
        if parallel.data is None and parallel.ranks % shared:
            raise ConfigError(f"parallel.ranks = {parallel.ranks}: must be a multiple of {product}")
        if parallel.data is not None and parallel.ranks != shared * parallel.data:
            raise ConfigError(f"parallel.ranks = {parallel.ranks}: must be parallel.pipe x parallel.tensor x "
                              f"parallel.data = {parallel.pipe} x {parallel.tensor} x {parallel.data} = "
                              f"{shared * parallel.data}, or null")
    if hosts is not None:
        slots = sum(host.slots for host in job.hosts)
        if slots != job.ranks:
            raise ConfigError(f"hostfile = {hosts!r}: has {slots} slots, and the layout parallel.pipe x "
                              f"parallel.tensor x data has {job.ranks} ranks; both must be the same")


def _check_model(job: Job) -> None:
    model, tensor, pipe = job.model, job.parallel.tensor, job.parallel.pipe
    if model.hidden % model.heads:
        raise ConfigError(f"model.hidden = {model.hidden}: must be a multiple of model.heads = {model.heads}")
    if model.heads % tensor:
        raise ConfigError(f"parallel.tensor = {tensor}: must divide model.heads = {model.heads}; legal: "
                          f"{', '.join(str(n) for n in range(1, model.heads + 1) if model.heads % n == 0)}")
    stages = job.placement.stages
    # Of a stage without a block the embedding or the head is the work.
    if model.layers + 2 < stages:
        most = (model.layers + 2) * pipe // stages
        raise ConfigError(f"model.layers = {model.layers}: schedule {job.schedule['name']} on parallel.pipe = {pipe} "
                          f"has {stages} stages, each of which needs a block, the embedding or the head; legal: "
                          f"model.layers from {stages - 2} on, or parallel.pipe up to {most}")
    if job.section and isinstance(job.section.partition, tuple):
        _check_bounds(job.section.partition, stages, model.layers + 4)


def _check_bounds(bounds: Sequence[int], stages: int, layers: int) -> None:
    rising = all(start < stop for start, stop in zip(bounds, bounds[1:]))
    if len(bounds) != stages + 1 or bounds[0] != 0 or bounds[-1] != layers or not rising:
        raise ConfigError(f"schedule.partition = {list(bounds)}: must be {stages + 1} rising numbers from 0 to "
                          f"{layers} (embedding, positions, the blocks, a norm, the head)")
    if {1, layers - 1} & set(bounds):
        raise ConfigError(f"schedule.partition = {list(bounds)}: embedding and positions (0, 1) stay together, "
                          f"and norm and head ({layers - 2}, {layers - 1}); legal between: 2 to {layers - 2}")


def _check_batch(job: Job) -> None:
    data, replicas = job.data, job.replicas
    if data.batch is None and data.micro_batches is None:
        raise ConfigError("data.micro_batches = null: must be a number where data.batch is null too")
    if data.batch is None:
        return
    if data.micro_batches is None:
        if data.batch % (data.micro_batch * replicas):
            raise ConfigError(f"data.batch = {data.batch}: must be a multiple of data.micro_batch x replicas = "
                              f"{data.micro_batch} x {replicas} = {data.micro_batch * replicas}")
    elif data.batch != data.micro_batch * data.micro_batches * replicas:
        raise ConfigError(f"data.batch = {data.batch}: must be data.micro_batch x data.micro_batches x replicas = "
                          f"{data.micro_batch} x {data.micro_batches} x {replicas} = "
                          f"{data.micro_batch * data.micro_batches * replicas}, or null")


def _check_precision(job: Job) -> None:
    """As ds_vshape/config/compatibility.py, which needs torch."""
    dtype, sums = job.precision.dtype, job.precision.sums
    if job.parallel.zero == 0 and dtype == "fp16":
        raise ConfigError("parallel.zero = 0 with precision.dtype = 'fp16': must be 1, because DeepSpeed scales no "
                          "loss without ZeRO")
    if job.parallel.zero == 0 and sums not in (None, dtype):
        raise ConfigError(f"precision.sums = {sums!r}: must be null or {dtype!r} with parallel.zero = 0")
    for key, used in (("precision.dtype", dtype), ("deepspeed.torch_autocast.dtype", job.autocast)):
        if used is not None and used not in job.machine.teraflops:
            raise ConfigError(f"{key} = {used!r}: machine.teraflops has {', '.join(job.machine.teraflops)} only")


def _check_rest(job: Job) -> None:
    if job.data.text is not None and not Path(job.data.text).is_dir():
        raise ConfigError(f"data.text = {job.data.text!r}: must be a folder with .py files, or null for Python's own "
                          "library")
    composed = job.model_copy(update={"deepspeed": {}}).ds_config()
    twice = [key for key in job.deepspeed if key in {*composed, KEY, "fp16", "bf16", "data_types", "train_batch_size"}]
    if twice:
        raise ConfigError(f"deepspeed.{twice[0]} = {job.deepspeed[twice[0]]!r}: this key of the ds_config comes from "
                          "the other sections; legal: any other one")


def _check_memory_limit(job: Job) -> None:
    section, pipe, micro_batches = job.section, job.parallel.pipe, job.micro_batches
    if section is None or not isinstance(section.memory_limit, float):
        return  # bytes are predicted, with the rest
    try:
        check_limit(section, pipe, micro_batches)
        if section.name != ADAPTIVE:
            table_schedule(section, pipe, micro_batches)
    except MemoryLimitError as error:
        raise ConfigError(str(error)) from None


def legal_keys() -> list[str]:
    """Every key of a job, with dots."""
    keys = []
    for name, field in Job.model_fields.items():
        keys.append(name)
        kind = ScheduleConfig if name == "schedule" else field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [f"{name}.{key}" for key in kind.model_fields]
    return keys + [f"schedule.trace.{key}" for key in TraceConfig.model_fields] + [
        f"machine.teraflops.{dtype}" for dtype in ("fp32", "bf16", "fp16")]


def unknown_key(key: str, value: Any, legal: Sequence[str]) -> ConfigError:
    """The error for a key that isn't in `legal`; it names the keys of its section."""
    section, _, name = key.rpartition(".")
    siblings = [each.rpartition(".")[2] for each in legal if each.rpartition(".")[0] == section]
    return ConfigError(f"unknown key {key} = {value!r}: "
                       f"{nearest(name, siblings or [each for each in legal if '.' not in each])}")


def _explain(problem: Any, kind: type[BaseModel], name: str) -> str:
    key = ".".join(map(str, [*([name] if name else []), *problem["loc"]]))
    if problem["type"] == "extra_forbidden":
        legal = legal_keys() if kind is Job else [f"{name}.{each}" if name else each for each in kind.model_fields]
        return str(unknown_key(key, problem["input"], legal))
    if problem["type"] == "missing":
        return f"{key} is missing"
    return f"{key} = {problem['input']!r}: {problem['msg'].replace('Input should', 'must')}"
