"""Pipeline x data x tensor parallel with ZeRO-1, on DeepSpeed's own tensor parallel layers, against the plain model."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from gpt import PARTITION_METHOD, GPTConfig, gpt_layers
from gpt_parallel import ParallelBlock, parallel_gpt_layers, tensor_group
from pipelines import FP32, FP32_ZERO1, LENGTH, Job, Outcome, PlainTraining, cross_entropy, data
from ranks import RanksFailed, run_ranks

import ds_vshape

PIPE, DATA, TENSOR = 2, 2, 2
BATCHES = range(4)
MODEL = GPTConfig(layers=4, hidden=8, heads=2, length=LENGTH)


def train_parallel(rank: int, job: Job) -> tuple[list[float], float, float]:
    topology = PipeModelDataParallelTopology(num_pp=PIPE, num_mp=TENSOR, num_dp=DATA)
    layers = parallel_gpt_layers(MODEL, tensor_group(topology))
    module = ds_vshape.PipelineModule(layers, topology=topology, loss_fn=cross_entropy, seed_layers=True,
                                      partition_method=PARTITION_METHOD, config=job.ds_config())
    engine = ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=job.ds_config())[0]
    late, watch = set(), engine._observer.weights_split

    def note(store: Any) -> None:
        late.update(store.parameters())
        watch(store)

    engine._observer.weights_split = note
    losses = [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]
    in_w = {".".join(name.split(".")[1:]) for name, parameter in module.named_parameters() if parameter in late}
    of_blocks = {"query_key_value.weight", "attention_out.weight", "mlp_in.weight", "mlp_out.weight"}
    assert in_w & of_blocks == (set() if job.schedule == "1f1b" else of_blocks)
    return losses, float(engine.get_global_grad_norm()), float(engine.eval_batch(data(engine, 9)))


@pytest.mark.parametrize("config", [FP32, FP32_ZERO1], ids=["zero0", "zero1"])
@pytest.mark.parametrize("schedule", ["1f1b", "v-half", "v-zb"])
def test_equals_the_plain_model(schedule: str, config: dict[str, Any]) -> None:
    """Partial products add up in another order: equal to rounding. The clip acts, so the norm must be right."""
    job = Job(schedule, PIPE, 3, {**config, "gradient_clipping": 0.5}, tuple(gpt_layers(MODEL)))
    results = run_ranks(PIPE * DATA * TENSOR, train_parallel, job)
    plain = PlainTraining(job, DATA, clip=0.5)
    oracle: Outcome = plain.train(BATCHES, 3)
    assert plain.last_norm > 0.5
    for losses, norm, evaluated in results:
        assert losses == pytest.approx(oracle.losses, rel=1e-5)
        assert norm == pytest.approx(plain.last_norm, rel=1e-4)
        assert evaluated == pytest.approx(results[0][2], rel=1e-6)


def test_heads_that_the_ranks_cannot_share_are_refused() -> None:
    def body(rank: int) -> None:
        topology = PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)
        ParallelBlock(GPTConfig(layers=1, hidden=9, heads=3, length=4), tensor_group(topology))

    with pytest.raises(RanksFailed, match="heads = 3 must be a multiple of the 2 tensor parallel ranks"):
        run_ranks(2, body)
