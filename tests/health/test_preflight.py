"""Ranks that can't train together all raise the same error, and none hangs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pipelines import Job, cross_entropy, data, specs
from ranks import run_ranks

import ds_vshape
from ds_vshape.config import to_schedule
from ds_vshape.health.preflight import Preflight, PreflightError, config_facts, versions
from ds_vshape.schedule.named import build

RANKS = 4
ODD = 2  # the rank that differs
JOB = Job("v-half", RANKS, 4)
CONFIG = {**JOB.ds_config(), "pipeline_schedule": "v-half"}


def module_of(config: Any, layers: int = 2 * RANKS - 1, **options: Any) -> Any:
    return ds_vshape.PipelineModule(specs(layers), **{"num_stages": RANKS, "loss_fn": cross_entropy, "config": config,
                                                      "partition_method": "uniform", **options})


def engine_of(config: Any, config_of_module: Any = None) -> Any:
    module = module_of(config if config_of_module is None else config_of_module)
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


def with_keys(**keys: Any) -> Callable[[bool], Any]:
    """A module whose config has other keys on the odd rank."""
    return lambda odd: module_of({**CONFIG, **keys} if odd else CONFIG)


def with_options(**options: Any) -> Callable[[bool], Any]:
    """A module that has other arguments on the odd rank."""
    return lambda odd: module_of(CONFIG, **(options if odd else {}))


def without_key(odd: bool) -> Any:
    return module_of(Job(None, RANKS, 4).ds_config() if odd else CONFIG)


def in_a_file(odd: bool) -> Any:
    return module_of("nowhere.json" if odd else CONFIG)


def other_version(package: str) -> Callable[[bool], Any]:
    """A module in a process where `package` appears to have another version."""
    def build_module(odd: bool) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if odd:
                stock = metadata.version
                patch.setattr(metadata, "version", lambda name: "2.13.7" if name == package else stock(name))
            return module_of(CONFIG)
    return build_module


def only_in_initialize(odd: bool) -> Any:
    return engine_of({**CONFIG, "train_micro_batch_size_per_gpu": 3} if odd else CONFIG, CONFIG)


def another_section_in_initialize(odd: bool) -> Any:
    return engine_of({**CONFIG, "pipeline_schedule": "v-zb"} if odd else CONFIG, CONFIG)


def another_order(odd: bool) -> Any:
    """The same name, but the odd rank's program is v-zb's, as of another state of the package."""
    with pytest.MonkeyPatch.context() as patch:
        if odd:
            patch.setattr(to_schedule, "build", lambda name, *of: replace(build("v-zb", *of), name="v-half"))
        return engine_of(CONFIG)


def must(name: str, usual: str, odd: str) -> str:
    """The error where the odd rank has another value of `name`."""
    return (f"the ranks must have the same: {name} = {usual} on ranks 0-1 (host-0), 3 (host-1), {odd} on rank 2 "
            "(host-1)")


BOUNDS = [0, 2, 3, 4, 5, 6, 7, 8, 9]
DIFFERENT: dict[str, tuple[Callable[[bool], Any], str]] = {
    "micro-batches": (with_keys(gradient_accumulation_steps=8), must("gradient_accumulation_steps", "4", "8")),
    "the schedule, with another placement": (with_keys(pipeline_schedule="1f1b"),
                                             must("pipeline_schedule.name", '"v-half"', '"1f1b"')),
    "a schedule that doesn't exist": (with_keys(pipeline_schedule="v-haf"),
                                      "not all ranks can go on: ConfigError: pipeline_schedule.name = 'v-haf': there "
                                      "is no schedule 'v-haf'; did you mean 'v-half'?"),
    "the memory limit": (with_keys(pipeline_schedule={"name": "v-half", "memory_limit": 0.75}),
                         must("pipeline_schedule.memory_limit", "nothing", "0.75")),
    "the partition": (with_keys(pipeline_schedule={"name": "v-half", "partition": BOUNDS}),
                      must("pipeline_schedule.partition", "nothing", str(BOUNDS))),
    "a nested key": (with_keys(zero_optimization={"stage": 1}), must("zero_optimization.stage", "nothing", "1")),
    "five keys": (with_keys(a=1, b=2, c=3, d=4, e=5), must("a", "nothing", "1") + "; b = nothing"),
    "no schedule": (without_key, must("pipeline_schedule.name", '"v-half"', "null")),
    "a key that is refused": (with_keys(pipeline_shedule="v-half"),
                              "not all ranks can go on: ConfigError: unknown key 'pipeline_shedule' in the DeepSpeed "
                              "config: did you mean 'pipeline_schedule'? on rank 2 (host-1)"),
    "no such file": (in_a_file, "not all ranks can go on: ConfigError: DeepSpeed config 'nowhere.json': no such file, "
                                "nor base64 text on rank 2 (host-1)"),
    "the number of ranks": (with_options(num_stages=2), must("PipelineModule's num_stages", "4", "2")),
    "the layers": (with_options(layers=11), must("number of layers", "9", "13")),
    "partition_method": (with_options(partition_method="parameters"),
                         must("PipelineModule's partition_method", '"uniform"', '"parameters"')),
    "torch": (other_version("torch"), must("torch", f'"{metadata.version("torch")}"', '"2.13.7"')),
    "DeepSpeed": (other_version("deepspeed"), must("deepspeed", f'"{metadata.version("deepspeed")}"', '"2.13.7"')),
    "the size of micro-batches, in initialize": (only_in_initialize,
                                                 must("train_micro_batch_size_per_gpu", "2", "3")),
    "the schedule, in initialize": (another_section_in_initialize,
                                    "not all ranks can go on: ConfigError: pipeline_schedule: the PipelineModule was "
                                    "built for {'name': 'v-half'}, initialize's config says {'name': 'v-zb'}"),
    "the orders": (another_order, "the ranks must have the same: orders = "),
}


def errors_of(rank: int, cases: dict[str, tuple[Callable[[bool], Any], str]]) -> dict[str, str]:
    """What each case raises here; the job has two hosts of two ranks each."""
    socket.gethostname = lambda: f"host-{rank // 2}"  # type: ignore[assignment]
    errors = {}
    for name, (build_with, _) in cases.items():
        try:
            build_with(rank == ODD)
            errors[name] = "nothing"
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    # Whatever was refused, the ranks still understand each other.
    engine = JOB.engine()
    assert float(engine.train_batch(data(engine, 0))) > 0
    return errors


def test_ranks_that_differ() -> None:
    told = run_ranks(RANKS, errors_of, DIFFERENT, timeout=100)
    for name, (_, message) in DIFFERENT.items():
        for rank in range(RANKS):
            assert told[rank][name].startswith(f"PreflightError: {message}"), f"{name}, rank {rank}"
            assert told[rank][name] == told[0][name], name
            assert "\n" not in told[rank][name]
    assert told[0]["five keys"].endswith("; and 1 more")


def start_all(rank: int, folder: Path) -> list[float]:
    """Jobs whose ranks differ only where they may, and the seconds that all checks of a job take, some times over."""
    own = {"csv_monitor": {"enabled": False, "output_path": str(folder / str(rank))}}
    engine = engine_of({**CONFIG, **own})
    # Without the key it is DeepSpeed's own affair what ranks have.
    engine_of({**Job(None, RANKS, 4).ds_config(), "steps_per_print": 1000 + rank})
    assert float(engine.train_batch(data(engine, 0))) > 0
    seconds = []
    for _ in range(10):
        dist.barrier()
        start = time.perf_counter()
        engine.module.preflight = preflight = Preflight(engine.module.preflight.watch)
        preflight.compare(lambda: {**versions(), **config_facts(CONFIG, engine.module.schedule_config)})
        preflight.compare(lambda: config_facts(CONFIG, engine.module.schedule_config))
        engine.preflight()
        seconds.append(time.perf_counter() - start)
    return seconds


def test_a_healthy_job_starts_at_once(tmp_path: Path) -> None:
    """Eight ranks in two pipelines. The fastest of ten counts, since other programs may have the cores."""
    seconds = run_ranks(2 * RANKS, start_all, tmp_path)
    assert min(max(of_ranks) for of_ranks in zip(*seconds)) < 1.0, seconds


def start_without_messages(rank: int, silent: int, job: Job) -> str:
    """What is raised where no message gets through to or from one rank, which comes later than the others, too."""
    socket.gethostname = lambda: f"host-{rank // 2}"  # type: ignore[assignment]
    probe = Preflight.probe

    def late(self: Preflight, ends: Any) -> None:
        if rank == silent:
            time.sleep(1.5)
        probe(self, () if rank == silent else ends, 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preflight, "probe", late)
        with pytest.raises(PreflightError) as error:
            job.engine()
    return str(error.value)


@pytest.mark.quick_cases("two pipelines")
@pytest.mark.parametrize(["job", "silent", "pairs"], [
    (Job("v-half", 4, 4), 2, "rank 1 (host-0) and rank 2 (host-1) can't reach each other; "
                             "rank 2 (host-1) and rank 3 (host-1) can't reach each other. "),
    (Job("interleaved-1f1b", 2, 4), 3, "rank 1 (host-0) and rank 3 (host-1) can't reach each other. "),
], ids=["one pipeline", "two pipelines"])
def test_channels_through_which_nothing_gets(job: Job, silent: int, pairs: str) -> None:
    """Every rank, neighbour or not, raises the same error."""
    told = run_ranks(4, start_without_messages, silent, job, timeout=60)
    assert told[0].startswith(f"no messages between pipeline ranks within 1 s: {pairs}All of them are running: check ")
    assert told == [told[0]] * 4
