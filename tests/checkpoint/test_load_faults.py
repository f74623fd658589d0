"""A load that fails raises on all ranks and names the file; training continues as if nothing had been loaded."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from pipelines import BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, Job, Outcome, data, specs, tied_specs, train
from ranks import RanksFailed, run_ranks
from torch import nn

from ds_vshape.checkpoint import checkpointing

SAVED, TRIED, LAST = 2, 4, 6  # batches done when the checkpoint is saved, when loading it fails, and at the end
SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}}}
TIED = tuple(tied_specs(3))
FP16_ZERO1 = {**FP32_ZERO1, "fp16": {"enabled": True}}


def job(schedule: Any, config: dict[str, Any], layers: Any = None) -> Job:
    return Job(schedule, 2, 2, {**config, **SCHEDULER}, layers)


JOBS = {"v-half, fp32, ZeRO-1": job("v-half", FP32_ZERO1, TIED)}
MORE_JOBS = {"v-half, fp32": job("v-half", FP32), "1f1b, bf16, ZeRO-1": job("1f1b", BF16_ZERO1),
             "zb-h1, bf16, fp32 sums": job("zb-h1", BF16_ZERO1_FP32),
             "v-zb, post-validation": job({"name": "v-zb", "optimizer_post_validation": True}, BF16_ZERO1),
             "1f1b, fp32": job("1f1b", FP32, TIED), "v-half, fp16, ZeRO-1": job("v-half", FP16_ZERO1),
             "v-half, two replicas": job("v-half", BF16_ZERO1_FP32, TIED)}
WORLD = {"v-half, two replicas": 4}


class Unknown:
    """A class that a checkpoint may not hold."""


# What is done to the folder of a checkpoint.
Damage = Callable[[Path], Any]


def cut(name: str, part: float = 0.5) -> Damage:
    def damage(folder: Path) -> None:
        path, = folder.glob(name)
        os.truncate(path, int(path.stat().st_size * part))
    return damage


def removed(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path, = folder.glob(name)
        path.unlink()
    return damage


def a_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        removed(name)(folder)
        path = folder / name.replace("*", "")
        path.mkdir()
    return damage


def changed(name: str, change: Callable[[Any], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path, = folder.glob(name)
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)
    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_bytes(content.encode("latin-1"))


def nothing(folder: Path) -> None:
    pass


def other_shape(layer: dict[str, Any]) -> None:
    name = next(iter(layer))
    layer[name] = torch.zeros(3, 5)


def other_optimizer(state: dict[str, Any]) -> None:
    """Weights of another size, which is detected when half of the rest has been loaded."""
    of_zero = state["optimizer_state_dict"]
    of_zero["base_optimizer_state"]["param_groups"].append({"params": [99]})


# On which rank what of an engine is replaced while loading; the result takes it back.
Injection = Callable[[int, Any], Callable[[], None]]


def none(rank: int, engine: Any) -> Callable[[], None]:
    return lambda: None


def raising(victim: int, of: str, error: Exception, after: bool = False) -> Injection:
    """On rank `victim` a method of a part of the engine raises, before or `after` it has done its work."""
    def inject(rank: int, engine: Any) -> Callable[[], None]:
        *parts, method = of.split(".")
        owner = functools.reduce(getattr, parts, engine)

        def fail(*args: Any, **kwargs: Any) -> None:
            if after:
                original(*args, **kwargs)
            raise error
        if rank != victim:
            return lambda: None
        original = getattr(owner, method)
        setattr(owner, method, fail)
        return lambda: delattr(owner, method)
    return inject


def moved_away(rank: int, engine: Any) -> Callable[[], None]:
    """The folder isn't there when rank 0 starts to read: a job that saves it again moves the old one away first."""
    def load(load_dir: str, tag: str, **kwargs: Any) -> Any:
        Path(load_dir, tag).rename(Path(load_dir, "old"))
        return original(load_dir, tag, **kwargs)
    if rank:
        return lambda: None
    original, engine._load_checkpoint = engine._load_checkpoint, load
    return lambda: delattr(engine, "_load_checkpoint")


def moved_when_found(rank: int, engine: Any) -> Callable[[], None]:
    """The folder isn't there any more when all ranks have found it."""
    def find(load_dir: str, *args: Any) -> Any:
        found = original(load_dir, *args)
        Path(load_dir, found).rename(Path(load_dir, "old"))
        return found
    if not rank:
        return lambda: None
    original, engine._find_checkpoint = engine._find_checkpoint, find
    return lambda: delattr(engine, "_find_checkpoint")


def during(of: str, happens: Callable[[Path], None]) -> Injection:
    """Something happens to the checkpoint when both ranks have done a part of loading it; meanwhile neither reads."""
    def inject(rank: int, engine: Any) -> Callable[[], None]:
        owner, method = engine.module, of.rpartition(".")[2]
        original = getattr(owner, method)

        def load(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            dist.barrier()
            if rank == 0:
                happens(Path(kwargs["load_dir"]))
            dist.barrier()
        setattr(owner, method, load)
        return lambda: delattr(owner, method)
    return inject


def saved_again(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("new"))
    folder.rename(folder.with_name("old"))
    folder.with_name("new").rename(folder)


def removed_and_copied(folder: Path) -> None:
    """Another folder of the same name, which the file system may give the number of the one before."""
    files, number = folder.with_name("files"), folder.stat().st_ino
    files.mkdir()
    for path in folder.iterdir():
        path.rename(files / path.name)
    folder.rmdir()
    for attempt in range(100):
        again = folder.with_name(f"again{attempt}")
        again.mkdir()
        if again.stat().st_ino == number:
            break
    again.rename(folder)
    for path in files.iterdir():
        path.rename(folder / path.name)


LAYER, STATES, SHARD = "layer_02*", "mp_rank_01*", "*zero_pp_rank_0_mp_rank_01*"
BOTH = range(2)

# By what is wrong: what is done to the folder, on this rank's engine, the arguments of load_checkpoint by rank, what is
# told on both ranks.
Fault = tuple[Damage, Injection, Callable[[int], dict[str, Any]], tuple[str, ...]]


def options(**given: Any) -> Callable[[int], dict[str, Any]]:
    return lambda rank: given


def of_rank(name: str, *values: Any) -> Callable[[int], dict[str, Any]]:
    return lambda rank: {name: values[min(rank, 1)]}


FAULTS: dict[str, Fault] = {
    "a layer file cut in half": (cut(LAYER), none, options(), ("layer_02-model_states.pt", "truncated or damaged")),
    "a layer file cut early": (cut(LAYER, 0.01), none, options(), ("layer_02-model_states.pt", "truncated or damaged")),
    "an empty layer file": (cut(LAYER, 0), none, options(), ("layer_02-model_states.pt is empty (0 bytes)",)),
    "a missing layer file": (removed(LAYER), none, options(), ("layer_02-model_states.pt is missing", "layer_01")),
    "another layer file is missing": (removed("layer_00*"), none, options(), ("layer_00-model_states.pt is missing",)),
    "a folder in a layer file's place": (a_folder("layer_02-model_states.pt"), none, options(),
                                         ("layer_02-model_states.pt can't be read: IsADirectoryError",)),
    "a layer of another shape": (changed(LAYER, other_shape), none, options(),
                                 ("layer_02-model_states.pt", "size mism")),
    "a layer with a part less": (changed(LAYER, lambda layer: layer.popitem()), none, options(),
                                 ("layer_02-model_states.pt", "Missing key(s)")),
    "a missing state file": (removed(STATES), none, options(), ("mp_rank_01_model_states.pt is missing",)),
    "no state file": (lambda folder: [path.unlink() for path in folder.glob("mp_rank*")], none, options(),
                      ("_model_states.pt is missing",)),
    "a cut state file": (cut(STATES), none, options(), ("mp_rank_01_model_states.pt is truncated or damaged",)),
    "an empty state file": (cut(STATES, 0), none, options(), ("mp_rank_01_model_states.pt is empty",)),
    "a state without the counts": (changed(STATES, lambda state: state.pop("skipped_steps")), none, options(),
                                   ("mp_rank_01_model_states.pt", "KeyError: 'skipped_steps'")),
    "a scheduler's state is missing": (changed(STATES, lambda state: state.update(lr_scheduler={})), none, options(),
                                       ("mp_rank_01_model_states.pt", "KeyError: 'last_batch_iteration'")),
    "a client_state of a class": (changed(STATES, lambda state: state.update(mine=Unknown())), none, options(),
                                  ("mp_rank_01_model_states.pt holds more than tensors", "Unknown")),
    "a cut placement": (cut("pipeline_placement.json"), none, options(),
                        ("pipeline_placement.json is truncated or damaged",)),
    "another placement": (text("pipeline_placement.json", '{"chunks": [[0]], "bounds": []}'), none, options(),
                          ("belongs to other layers",)),
    "latest is empty": (text("../latest", " \n"), none, options(tag=None), ("latest is empty", "global_step2")),
    "latest is cut": (text("../latest", "global_s"), none, options(tag=None),
                      ("there is no checkpoint", "global_s;", "global_step2")),
    "latest is no text": (text("../latest", "\xff\xfe"), none, options(tag=None),
                          ("latest can't be read", "global_step2")),
    "latest is a folder": (lambda folder: [(folder.parent / "latest").unlink(),
                           (folder.parent / "latest").mkdir()], none,
                           options(tag=None), ("latest can't be read",)),
    "latest is a dangling link": (lambda folder: [(folder.parent / "latest").unlink(),
                                                  (folder.parent / "latest").symlink_to("nowhere")], none,
                                  options(tag=None), ("latest can't be read",)),
    "no such tag": (nothing, none, options(tag="other"), ("there is no checkpoint", "other", "global_step2")),
    "the folder is gone": (shutil.rmtree, none, options(), ("there is no checkpoint", "none")),
    "ranks ask for other tags": (nothing, none, of_rank("tag", "global_step2", "other"),
                                 ('tag = "global_step2" on rank 0',)),
    "ranks ask for other states": (nothing, none, of_rank("load_module_only", True, False),
                                   ("load_module_only = true on",)),
    "a custom_load_fn": (nothing, none, options(custom_load_fn=print), ("custom_load_fn not supported",)),
    "weights alone, a cut layer": (cut(LAYER), none, options(load_module_only=True), ("layer_02", "or damaged")),
    "weights alone, a missing layer": (removed(LAYER), none, options(load_module_only=True),
                                       ("layer_02", "is missing")),
    "no optimizer states, a cut layer": (cut(LAYER), none, options(load_optimizer_states=False),
                                         ("layer_02", "truncated or")),
    "no optimizer states, a cut state file": (cut(STATES), none, options(load_optimizer_states=False),
                                              ("mp_rank_01", "truncated or damaged")),
    "not strict, a layer of another shape": (changed(LAYER, other_shape), none, options(load_module_strict=False),
                                             ("layer_02-model_states.pt", "size mismatch")),
    "a disk that can't be read": (nothing, raising(1, "checkpoint_engine.load", OSError(5, "Input/output error", "/f")),
                                  options(), ("mp_rank_00_model_states.pt can't be read: OSError: [Errno 5]",)),
    "no memory": (nothing, raising(1, "module.load_state_dir", MemoryError(), after=True), options(), ("MemoryError",)),
    "the optimizer fails when all else is loaded": (
        nothing, raising(1, "optimizer.load_state_dict", ValueError("not mine"), after=True), options(), ("not mine",)),
    "the scheduler fails": (nothing, raising(0, "lr_scheduler.load_state_dict", ValueError("no such"), after=True),
                            options(), ("no such",)),
    "one rank sees another checkpoint": (nothing, none, lambda rank: {"load_dir": rank and "other"},
                                         ("the ranks must have the same: global_steps of global_step2 = 2 on rank 0",)),
    "one rank sees none": (nothing, none, lambda rank: {"load_dir": rank and "none"},
                           ("there is no checkpoint", "global_step2 on rank 1")),
    "one rank sees latest": (lambda folder: (folder.parent / "latest").unlink(), none,
                             lambda rank: {"tag": None, "load_dir": rank and "good"},
                             ("rank 0 finds no file", "on rank 1 it names 'global_step2'")),
    "another job saves meanwhile": (nothing, during("module.load_state_dir", saved_again), options(),
                                    ("was replaced while it was loaded",)),
    "the folder is removed and copied again": (nothing, during("module.load_state_dir", removed_and_copied), options(),
                                               ("was replaced while it was loaded",)),
    "the folder is gone when it has been found": (nothing, moved_when_found, options(),
                                                  ("was replaced while it was loaded",)),
    "another job starts to save": (nothing, moved_away, options(), ("was replaced while it was loaded",)),
}
OF_ZERO: dict[str, Fault] = {
    "a missing shard": (removed(SHARD), none, options(), ("zero_pp_rank_0_mp_rank_01_optim_states.pt is missing",)),
    "a cut shard": (cut(SHARD), none, options(), ("zero_pp_rank_0_mp_rank_01_optim_states.pt is truncated",)),
    "an empty shard": (cut(SHARD, 0), none, options(), ("zero_pp_rank_0_mp_rank_01_optim_states.pt is empty",)),
    "a shard of another optimizer": (changed(SHARD, other_optimizer), none, options(),
                                     ("zero_pp_rank_0_mp_rank_01_optim_states.pt can't be loaded: ValueError",)),
    "a shard without a version": (changed(SHARD, lambda state: state["optimizer_state_dict"].pop("ds_version")), none,
                                  options(), ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "ds_version")),
    "shards of too few replicas": (changed(STATES, lambda state: state.update(dp_world_size=3)), none, options(),
                                   ("is missing", "_mp_rank_01_optim_states.pt")),
    "a class in a shard": (changed(SHARD, lambda state: state.update(mine=Unknown())), none, options(),
                           ("mp_rank_01_optim_states.pt holds more than tensors", "Unknown")),
}


def state_of(engine: Any) -> list[Any]:
    """Everything that a training continues with."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state = [value for _, value in sorted(engine.module.state_dict().items())]
    for group in inner.param_groups:
        state += [value for name, value in sorted(group.items()) if name != "params"]
        for parameter in group["params"]:
            state += [parameter.detach(), *(value for _, value in sorted(inner.state[parameter].items()))]
    for parameter in engine.module.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        state += sorted((mapping and mapping.optim_fragment or {}).items())
    scheduler = engine.lr_scheduler
    state += [dict(scheduler.state_dict()), list(scheduler.get_last_lr()), engine.global_steps, engine.global_samples,
              engine.skipped_steps]
    return [value.clone() if torch.is_tensor(value) else value for value in state]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else bool(one == other)


def load_with_faults(rank: int, training: Job, folder: Path,
                     faults: list[str]) -> tuple[dict[str, str], Outcome, Outcome]:
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    engine = training.engine()
    train(engine, range(SAVED))
    engine.save_checkpoint(str(folder / "good"))
    tag = f"global_step{SAVED}"
    train(engine, range(SAVED, TRIED))
    engine.save_checkpoint(str(folder / "other"), tag)
    before = state_of(engine)
    told = {}
    for name in faults:
        damage, inject, arguments, _ = {**FAULTS, **OF_ZERO}[name]
        place = folder / "bad"
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder / "good", place)
            damage(place / tag)
        dist.barrier()
        take_back = inject(rank, engine)
        try:
            given = {"tag": tag, **arguments(rank)}
            engine.load_checkpoint(str(folder / (given.pop("load_dir", 0) or "bad")), **given)
            told[name] = "nothing"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        take_back()
        if not same(before, state_of(engine)):
            told[name] += "; and the state has changed"
            engine.load_checkpoint(str(folder / "good"))
            train(engine, range(SAVED, TRIED))
        dist.barrier()
    went_on = train(engine, range(TRIED, LAST))
    engine.load_checkpoint(str(folder / "good"))
    return told, went_on, train(engine, range(SAVED, LAST))


def oracle(rank: int, training: Job) -> Outcome:
    get_accelerator().is_fp16_supported = lambda: True
    return train(training.engine(), range(LAST))


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> tuple[list[tuple[dict[str, str], Outcome, Outcome]], list[Outcome]]:
    """What the ranks of a job report for each fault, and for a training without one."""
    training, world = {**JOBS, **MORE_JOBS}[request.param], WORLD.get(request.param, 2)
    faults = [*FAULTS, *(OF_ZERO if "zero_optimization" in training.config else ())]
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(world, load_with_faults, training, Path(folder), faults, timeout=300)
    return results, run_ranks(world, oracle, training)


in_all_jobs = pytest.mark.parametrize(
    "outcome", [*JOBS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_JOBS)], indirect=True)


@in_all_jobs
def test_training_goes_on_as_if_nothing_had_been_tried(outcome: Any) -> None:
    results, whole = outcome
    for (_, went_on, loaded), expected in zip(results, whole):
        assert went_on.losses == expected.losses[TRIED:]
        assert loaded.losses == expected.losses[SAVED:]
        for after in (went_on, loaded):
            assert all(torch.equal(after.weights[name], value) for name, value in expected.weights.items())


@in_all_jobs
@pytest.mark.parametrize("fault", [*FAULTS, *OF_ZERO])
def test_all_ranks_say_what_is_wrong(fault: str, outcome: Any) -> None:
    results, _ = outcome
    if fault not in results[0][0]:
        pytest.skip("without ZeRO there is no shard")
    for told, _, _ in results:
        assert told[fault].startswith(("CheckpointError: ", "PreflightError: ")), told[fault]
        for part in {**FAULTS, **OF_ZERO}[fault][3]:
            assert part in told[fault]
        assert "and the state has changed" not in told[fault]
        assert "\n" not in told[fault]


def die_while_loading(rank: int, folder: str) -> None:
    training = {**JOBS, **MORE_JOBS}["v-half, fp32"]
    engine = training.engine()
    train(engine, range(SAVED))
    engine.save_checkpoint(folder)
    train(engine, range(SAVED, TRIED))
    before = state_of(engine)
    if rank:
        engine.checkpoint_engine.load = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    try:
        engine.load_checkpoint(folder)
    finally:
        print("the state is as before:", same(before, state_of(engine)))


@pytest.mark.slow
def test_a_rank_that_dies_while_it_loads(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed, match="the state is as before: True") as failed:
        run_ranks(2, die_while_loading, str(tmp_path), timeout=60)
    assert "PeerLost" in str(failed.value) and "still running" not in str(failed.value)
    assert time.monotonic() - began < 60


class Counting(nn.Linear):
    """A layer that saves more than tensors, and one of whose files can't be loaded to its end."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        return super().forward(x)


def load_extra_states(rank: int, folder: Path) -> list[int]:
    layers = tuple(LayerSpec(Counting) if 0 < place < 4 else spec for place, spec in enumerate(specs(3)))
    engine = Job("v-half", 2, 2, FP32, layers).engine()
    for batch in range(TRIED):
        engine.train_batch(data(engine, batch))
        if batch == 0:
            engine.save_checkpoint(str(folder), "good")
    if rank == 0:
        cut("layer_00*")(folder / "good")
    dist.barrier()
    with pytest.raises(Exception, match="layer_00"):
        engine.load_checkpoint(str(folder), "good")
    return [layer.seen for layer in engine.module.modules() if isinstance(layer, Counting)]


@pytest.mark.slow
def test_what_layers_save_besides_tensors(tmp_path: Path) -> None:
    assert sum(run_ranks(2, load_extra_states, tmp_path), []) == 3 * [2 * TRIED]


def load_with_latest_renamed(rank: int, folder: str) -> int:
    """The file "latest" changes between the reads of two ranks."""
    engine = job("v-half", FP32).engine()
    for tag in ("first", "second"):
        train(engine, range(1))
        engine.save_checkpoint(folder, tag)
    read = checkpointing.latest
    checkpointing.latest = lambda *args: "first" if rank == 0 else read(*args)
    engine.load_checkpoint(folder)
    return int(engine.global_steps)


@pytest.mark.slow
def test_all_ranks_load_what_rank_0_finds(tmp_path: Path) -> None:
    assert run_ranks(2, load_with_latest_renamed, str(tmp_path)) == [1, 1]
