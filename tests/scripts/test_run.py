"""Scripts that import nothing but deepspeed, run under `ds_vshape.run`: the key in the JSON is the one change."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from pipelines import Job
from ranks import RanksFailed, run_ranks
from user_script import write_job

from ds_vshape import run


def run_script(rank: int, arguments: list[str]) -> None:
    # The launcher puts the local rank before the script.
    run.main([f"--local_rank={rank}", *arguments])


def run_plainly(rank: int, arguments: list[str]) -> None:
    """What `python train.py` does, DeepSpeed untouched."""
    import runpy
    sys.argv = [arguments[0], f"--local_rank={rank}", *arguments[1:]]
    sys.path.insert(0, os.path.dirname(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


def outcomes(folder: Path) -> list[Any]:
    return [json.loads((folder / f"out{rank}").read_text()) for rank in range(2)]


def test_a_script_that_knows_only_deepspeed(tmp_path: Path) -> None:
    results = {}
    for name, body, keys in (("plain", run_plainly, {}), ("no key", run_script, {}),
                             ("v-half", run_script, {"pipeline_schedule": "v-half"})):
        folder = tmp_path / name
        folder.mkdir()
        run_ranks(2, body, write_job(folder, **keys))
        results[name] = outcomes(folder)
    stock, ours = "deepspeed.runtime.pipe.engine", "ds_vshape.engine.engine"
    losses = results["plain"][0][0]
    for name, engine in (("plain", stock), ("no key", stock), ("v-half", ours)):
        assert results[name] == [[losses, engine, 8, rank, 6] for rank in range(2)]


def build_dualpipev(rank: int) -> str:
    run.substitute()
    from deepspeed.pipe import DualPipeVModule
    job = Job(None, 2, 4)
    module = DualPipeVModule(job.specs(), num_stages=2, loss_fn=lambda x, y: x.sum())
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=job.ds_config())[0]
    return type(engine).__name__


def test_deepspeeds_dualpipev_stays_what_it_is() -> None:
    assert run_ranks(2, build_dualpipev) == ["DualPipeVEngine"] * 2


@pytest.mark.parametrize("arguments, message", [([], "no script given"), (["nowhere.py"], "no such script: nowhere")])
def test_a_missing_script_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(RanksFailed) as error:
        run_ranks(1, lambda rank: run.main(arguments))
    assert message in str(error.value) and "usage: deepspeed" in str(error.value)
