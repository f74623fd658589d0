"""Activation checkpointing with the split: each layer's forward runs twice, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from pipelines import BATCHES, BF16_ZERO1, BF16_ZERO1_FP32, FP32, VOCABULARY, WIDTH, Block, Job, Outcome, merged, train
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

calls = 0


class Counting(Block):
    """A block that counts its forwards in training."""

    def forward(self, x: Tensor) -> Tensor:
        global calls
        calls += self.training
        return super().forward(x)


class SelfCheckpointing(Counting):
    """A block that checkpoints itself with torch's own function."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return output


class SelfCheckpointingReentrantly(SelfCheckpointing):
    reentrant = True


def layers(block: type[nn.Module]) -> tuple[Any, ...]:
    return (LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(block) for _ in range(6)),
            LayerSpec(nn.Linear, WIDTH, VOCABULARY))


BLOCKS = 6
# In pairs of layers, the first and the last block share theirs with the embedding and the head.
CHECKPOINTED = {"deepspeed reentrant, two layers": BLOCKS - 2}
MICRO_BATCHES = 3
# Without it DeepSpeed would checkpoint the embedding too, whose integers carry no gradient through a reentrant one.
ONLY_BLOCKS = {"checkpointable_layers": ["Counting"]}
# How a block is checkpointed: its class, the module's options, the config's.
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    "deepspeed reentrant": (Counting, {"activation_checkpoint_interval": 1, **ONLY_BLOCKS}, {}),
    "deepspeed reentrant, two layers": (Counting, {"activation_checkpoint_interval": 2, **ONLY_BLOCKS}, {}),
    "deepspeed non-reentrant": (Counting, {"activation_checkpoint_interval": 1, **ONLY_BLOCKS},
                                {"pipeline": {"use_reentrant": False}}),
    "torch reentrant": (SelfCheckpointingReentrantly, {}, {}),
    "torch non-reentrant": (SelfCheckpointing, {}, {}),
}


def train_counting(rank: int, job: Job, options: dict[str, Any]) -> tuple[Outcome, int]:
    global calls
    # The only thing DeepSpeed's checkpointing must know: without model parallelism its own random states do.
    ds_checkpointing.configure(None, partition_activations=False)
    engine = job.engine(**options)
    calls = 0
    return train(engine, BATCHES), calls


@pytest.mark.quick_cases("torch reentrant-bf16")
@pytest.mark.parametrize("precision", [FP32, BF16_ZERO1, BF16_ZERO1_FP32], ids=["fp32", "bf16", "bf16-fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_forwards_run_twice_and_gradients_are_equal(kind: str, precision: dict[str, Any]) -> None:
    block, options, config = KINDS[kind]

    def outcome(schedule: Any, block: type[nn.Module], options: dict[str, Any]) -> tuple[Outcome, int]:
        job = Job(schedule, 2, MICRO_BATCHES, {**precision, **config}, layers(block))
        results = run_ranks(2, train_counting, job, options)
        return merged([result for result, _ in results]), sum(count for _, count in results)

    plain, once = outcome("v-half", Counting, {})
    assert once == BLOCKS * MICRO_BATCHES * len(BATCHES)
    for schedule in ("zb-h1", "v-half", "v-zb"):
        recomputed, twice = outcome(schedule, block, options)
        assert twice == once + CHECKPOINTED.get(kind, BLOCKS) * MICRO_BATCHES * len(BATCHES), schedule
        assert recomputed.losses == plain.losses, schedule
        assert all(torch.equal(recomputed.weights[name], value) for name, value in plain.weights.items()), schedule
