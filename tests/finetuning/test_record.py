"""A training that has ended isn't repeated, and another one's model isn't overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksFailed, run_ranks

from ds_vshape.finetuning.record import Record
from ds_vshape.finetuning.training import Result

RESULT = Result([1.5, 1.25], {2: 1.0}, {2: {"margin": 0.5}}, 100.0)


def results(rank: int, settings: dict[str, Any], model: Path) -> list[Result | None]:
    """Before the training has ended, before its model is written, and after that."""
    record = Record(settings)
    found = [record.result()]
    record.write(RESULT)
    found.append(record.result())
    if rank == 0:
        model.parent.mkdir()
        model.touch()
    torch.distributed.barrier()
    return [*found, record.result()]


def again(rank: int, settings: dict[str, Any]) -> Result | None:
    return Record(settings).result()


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "adapter_model.safetensors"])
def test_a_command_ends_at_once_when_its_model_is_there(file: str, tmp_path: Path) -> None:
    settings = {"output": tmp_path / "output", "checkpoints": tmp_path / "checkpoints", "batches": 2,
                "ds_config": {"train_batch_size": 4, "betas": (0.9, 0.95)}}
    assert run_ranks(2, results, settings, tmp_path / "output" / file) == [[None, None, RESULT]] * 2
    assert run_ranks(2, again, settings) == [RESULT] * 2
    for other in ({"batches": 3}, {"ds_config": {"train_batch_size": 8}}, {"checkpoints": None}):
        with pytest.raises(RanksFailed) as failed:
            run_ranks(2, again, {**settings, **other})
        assert str(failed.value).count("output holds a model already: must be a new folder") >= 2
