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

from ds_vshape import run

# A user's script, with a module class of its own and the config from the command line.
SCRIPT = '''
import argparse, json, sys
import torch
import deepspeed
from deepspeed.pipe import PipelineModule, LayerSpec
from helper_of_the_script import LEARNING_RATE

class Net(PipelineModule):
    def __init__(self, blocks, **options):
        self.blocks = blocks
        layers = [LayerSpec(torch.nn.Linear, 6, 6) for _ in range(blocks)]
        super().__init__(layers=layers, loss_fn=torch.nn.functional.mse_loss, **options)

    def number_of_blocks(self):
        return self.blocks

if __name__ == "__main__":
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--out")
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    net = Net(8, num_stages=2, seed_layers=True, partition_method="uniform")
    engine, optimizer, _, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=net.parameters(),
        optimizer=torch.optim.SGD(net.parameters(), lr=LEARNING_RATE))
    generator = torch.Generator().manual_seed(0)
    data = iter([(torch.randn(2, 6, generator=generator), torch.randn(2, 6, generator=generator)) for _ in range(12)])
    losses = [engine.train_batch(data).item() for _ in range(3)]
    with open(args.out + str(torch.distributed.get_rank()), "w") as out:
        json.dump([losses, type(engine).__module__, net.number_of_blocks(), args.local_rank, len(sys.argv)], out)
'''


def write_job(folder: Path, **keys: Any) -> list[str]:
    (folder / "train.py").write_text(SCRIPT)
    (folder / "helper_of_the_script.py").write_text("LEARNING_RATE = 0.1\n")
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "gradient_clipping": 0.0, **keys}
    (folder / "ds_config.json").write_text(json.dumps(config))
    return [str(folder / "train.py"), "--deepspeed_config", str(folder / "ds_config.json"), "--out",
            str(folder / "out")]


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
