"""Pipeline x data x tensor parallel with ZeRO-1, on DeepSpeed's own tensor parallel layers, against the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.module_inject import set_autotp_mode
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from pipelines import FP32, FP32_ZERO1, VOCABULARY, WIDTH, Job, Outcome, PlainTraining, cross_entropy, data
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

import ds_vshape
from ds_vshape.schedule.passes import Kind

PIPE, DATA, TENSOR = 2, 2, 2
BATCHES = range(4)


class Whole(nn.Module):
    """A residual block, whole: what the tensor parallel one must equal."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Parallel(Whole):
    """The same block with its columns, then its rows, on the ranks of `group`."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.up = LinearLayer(self.up, group)
        self.down = LinearAllreduce(self.down, group)


def specs(block: type[nn.Module], *arguments: Any) -> list[LayerSpec]:
    return [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(block, *arguments) for _ in range(4)),
            LayerSpec(nn.Linear, WIDTH, VOCABULARY)]


def train_parallel(rank: int, job: Job) -> tuple[list[float], float, float]:
    set_autotp_mode(training=True)
    topology = PipeModelDataParallelTopology(num_pp=PIPE, num_mp=TENSOR, num_dp=DATA)
    groups = [torch.distributed.new_group(ranks) for ranks in topology.get_axis_comm_lists("model")]
    mine, = (group for group, ranks in zip(groups, topology.get_axis_comm_lists("model")) if rank in ranks)
    module = ds_vshape.PipelineModule(specs(Parallel, mine), topology=topology, loss_fn=cross_entropy, seed_layers=True,
                                      partition_method="uniform", config=job.ds_config())
    engine = ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=job.ds_config())[0]
    losses = [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]
    split = any(work.kind is Kind.W for work in engine.schedule().orders[engine.stage_id])
    assert split == (job.schedule != "1f1b")
    return losses, float(engine.get_global_grad_norm()), float(engine.eval_batch(data(engine, 9)))


@pytest.mark.parametrize("config", [FP32, FP32_ZERO1], ids=["zero0", "zero1"])
@pytest.mark.parametrize("schedule", ["1f1b", "v-half", "v-zb"])
def test_equals_the_plain_model(schedule: str, config: dict[str, Any]) -> None:
    """Partial products add up in another order: equal to rounding. The clip acts, so the norm must be right."""
    job = Job(schedule, PIPE, 3, {**config, "gradient_clipping": 0.5}, tuple(specs(Whole)))
    results = run_ranks(PIPE * DATA * TENSOR, train_parallel, job)
    plain = PlainTraining(job, DATA, clip=0.5)
    oracle: Outcome = plain.train(BATCHES, 3)
    assert plain.last_norm > 0.5
    for losses, norm, evaluated in results:
        assert losses == pytest.approx(oracle.losses, rel=1e-5)
        assert norm == pytest.approx(plain.last_norm, rel=1e-4)
        assert evaluated == pytest.approx(results[0][2], rel=1e-6)
