"""A user's script that imports nothing but deepspeed, and the files it is started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
