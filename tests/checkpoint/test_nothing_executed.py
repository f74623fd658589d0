"""Nothing executable is loaded: not from a checkpoint, not from another rank, not from a plan or a trace."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed.runtime.pipe.p2p as stock_p2p
import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import ZeroStageEnum
from pipelines import BF16_ZERO1_FP32, FP32, FP32_ZERO1, Job, data
from ranks import run_ranks
from torch.distributed import distributed_c10d

from ds_vshape.checkpoint.layout import CheckpointError
from ds_vshape.checkpoint.weights_only import refusal, weights_only

JOB = Job("v-half", 2, 2, FP32_ZERO1)
FILES = ("mp_rank_*", "layer_*", "zero_pp_rank_*")


class Executed:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


class Mine:
    """A class of a user's script."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mine) and vars(self) == vars(other)


def poison(folder: Path, files: str, trace: Path) -> None:
    """Put a pickle that is executed into some files of a checkpoint."""
    for path in folder.glob(files):
        torch.save({**torch.load(path, weights_only=False), "x": Executed(trace)}, path)


def load_poisoned(rank: int, folder: Path) -> dict[str, str]:
    engine = JOB.engine()
    told = {}
    for files in FILES:
        tag = files.partition("_")[0]
        engine.save_checkpoint(str(folder), tag)
        if rank == 0:
            poison(folder / tag, files, folder / f"{tag} was executed")
        dist.barrier()
        with pytest.raises(CheckpointError) as error:
            engine.load_checkpoint(str(folder), tag)
        told[files] = str(error.value)
    # The rest of the process loads as before.
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    # Who trusts a file may say so.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    if rank == 0:
        engine.checkpoint_engine.load(str(folder / "mp" / "mp_rank_00_model_states.pt"))
    return told


def test_a_checkpoint_that_would_execute_is_refused(tmp_path: Path) -> None:
    for told in run_ranks(2, load_poisoned, tmp_path):
        for files in FILES:
            assert "holds more than tensors and plain data: " in told[files] and "posix.mkdir" in told[files]
            assert "\n" not in told[files]
    # The pickles were live: DeepSpeed's way of loading executes the one that was loaded so.
    assert [path.name for path in tmp_path.glob("* was executed")] == ["mp was executed"]


CLIENT_STATE: dict[str, Any] = {
    "random": random.Random(3).getstate(), "numpy": np.random.RandomState(3).get_state(),
    "torch": torch.get_rng_state(), "options": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "seen": {1, 2},
    "counts": Counter("abca"), "mask": np.array([True, False]), "words": ["a", None, 1.5, 2j]}


def load_state(rank: int, folder: str) -> tuple[bool, str]:
    engine = JOB.engine()
    engine.save_checkpoint(folder, "plain", CLIENT_STATE)
    _, loaded = engine.load_checkpoint(folder)
    alike = all(str(loaded[name]) == str(value) for name, value in CLIENT_STATE.items())
    mine = Mine()
    mine.epoch = 7  # type: ignore[attr-defined]
    engine.save_checkpoint(folder, "mine", {"mine": mine})
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(folder)
    torch.serialization.add_safe_globals([Mine])
    return alike and engine.load_checkpoint(folder)[1]["mine"] == mine, str(error.value)


def test_what_users_keep_beside_the_weights(tmp_path: Path) -> None:
    for alike, told in run_ranks(2, load_state, str(tmp_path)):
        assert alike
        assert "test_nothing_executed.Mine was not an allowed global" in told
        assert told.endswith("torch.serialization.add_safe_globals allows a class, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 "
                             "in the environment allows everything")


def forbid_pickles() -> None:
    """Let this process unpickle nothing from now on except by torch.load, and pickle nothing for another rank."""
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    for owner, name in [(distributed_c10d, "_object_to_tensor"), (distributed_c10d, "_tensor_to_object"),
                        (stock_p2p, "send_obj"), (stock_p2p, "recv_obj"), (pickle, "loads"), (pickle, "dumps")]:
        assert hasattr(owner, name)
        setattr(owner, name, refuse)


def run_without_pickles(rank: int, folder: Path) -> list[str]:
    forbid_pickles()
    with pytest.raises(AssertionError, match="a pickle"):
        dist.all_gather_object([None, None], rank)
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    fp16 = {**FP32_ZERO1, "fp16": {"enabled": True}}
    for name, config in [("v-half", fp16), ("1f1b", BF16_ZERO1_FP32), ("adaptive", FP32)]:
        section = {"name": name, "trace": {"batches": [2, 2], "path": str(folder / "traces")}}
        engine = Job({**section, "planning_seconds": 0.5}, 2, 3, config).engine()
        for batch in range(3):
            engine.train_batch(data(engine, batch))
        engine.eval_batch(data(engine, 3))
        engine.memory_report(), engine.pipeline_report(), engine.timelines()
        engine.save_checkpoint(str(folder / "checkpoints"))
        engine.load_checkpoint(str(folder / "checkpoints"))
        engine.train_batch(data(engine, 4))
    return [str(path) for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]


def test_no_pickle_crosses_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preflight, training, plans, traces, reports and checkpoints; and all files but weights are text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written = run_ranks(2, run_without_pickles, tmp_path)[0]
    kinds = Counter(Path(path).suffix for path in written)
    assert kinds[".json"] >= 2 and set(kinds) <= {".json", ".html", ".lock"}, kinds
    for path in written:
        if path.endswith(".json"):
            json.loads(Path(path).read_text())


class ByGetattr:
    """A pickle of what `getattr` gives."""

    def __init__(self, kind: Any, name: str) -> None:
        self.args = (kind, name)

    def __reduce__(self) -> Any:
        return getattr, self.args


def test_members_of_an_enum_as_early_versions_of_python_pickle_them(tmp_path: Path) -> None:
    """Python 3.11.0 to 3.11.3 do, by getattr, which gives nothing else."""
    torch.save({"stage": ByGetattr(ZeroStageEnum, "weights")}, tmp_path / "member")
    for kind, name in ((ZeroStageEnum, "mro"), (ZeroStageEnum, "__init__"), (np.ndarray, "tofile")):
        torch.save(ByGetattr(kind, name), tmp_path / "other")
        with weights_only(), pytest.raises(pickle.UnpicklingError) as raised:
            torch.load(tmp_path / "other", weights_only=False)
        assert "holds more than tensors and plain data: " in str(refusal(str(tmp_path / "other"), raised.value))
    with weights_only():
        assert torch.load(tmp_path / "member", weights_only=False) == {"stage": ZeroStageEnum.weights}
