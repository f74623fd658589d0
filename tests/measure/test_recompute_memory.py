"""What activation checkpointing saves, under schedules that split the backward too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counted_blocks import BLOCK_WHOLE, UNIT, allocated, job, tokens
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from live_memory import CHECKPOINTS, Block, Storages, linear_nodes
from pipelines import FP32, Job
from ranks import run_ranks
from torch import Tensor

from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.schedule.activations import Activations
from ds_vshape.split_backward import SplitBackward, WeightGradientStore, WholeGradients

pytestmark = pytest.mark.slow

H, BATCH, SEQUENCE = 64, 3, 40
BSH = BATCH * SEQUENCE * H * 4


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_recomputed_block_leaves_to_w_what_any_block_leaves(kind: str) -> None:
    """Between F and B its input; between B and W the inputs and output gradients of its four products, and neither a
    node of the graph that was recomputed, nor anything else that it saved."""
    run: Callable[..., Tensor] = CHECKPOINTS[kind]
    block, store, watched, nodes = Block(H), WeightGradientStore(), Storages(), len(linear_nodes())
    with watched:
        x = torch.randn(BATCH, SEQUENCE, H).clone().requires_grad_()
        with SplitBackward(store):
            output = run(block, x)
        assert watched.live([*block.parameters(), output]) == BSH
        output_gradient = torch.randn(output.shape)
        with SplitBackward(store):
            torch.autograd.backward(output, output_gradient)
        del output, output_gradient
        assert x.grad is not None
        elsewhere = [x, x.grad, *block.parameters(), *(p.grad for p in block.parameters() if p.grad is not None)]
        # The inputs are 1 + 1 + 1 + 4, the output gradients 3 + 1 + 4 + 1 times as large.
        assert watched.live(elsewhere) == 16 * BSH
        assert len(linear_nodes()) == nodes and len(store) == 4
        store.run(WholeGradients(lambda parameter, gradient: None))
        assert watched.live(elsewhere) == 0


NON_REENTRANT = {"pipeline": {"use_reentrant": False}}


def train_measured(rank: int, jobs: list[Job], options: dict[str, Any]
                   ) -> list[tuple[Activations, tuple[RankMemory, ...], int, list[float]]]:
    ds_checkpointing.configure(None, partition_activations=False)
    found = []
    for each in jobs:
        engine = each.engine(**options)
        losses = [float(engine.train_batch(tokens(engine.micro_batches))) for _ in range(2)]
        activations = engine.activation_sizes()
        _, most = allocated(lambda engine=engine: engine.train_batch(tokens(engine.micro_batches)))
        found.append((activations, engine.memory_report(), most, losses))
    return found


# At most so much of the peak without checkpoints, on the rank with the highest. Until B there is next to nothing, but W
# needs as much as ever: the more W are put off at once, the less is saved. A pass that recomputes has a block for
# itself.
SHARES = {"1f1b": 0.3, "v-min": 0.7, "v-half": 0.8, "v-zb": 1.0}


def test_peaks_are_lower() -> None:
    """As predicted from the measured stages, and as the allocator sees them. A stage between embedding and head, of two
    blocks, holds two inputs in place of two blocks' activations until B; what it leaves to W is the same."""
    def measured(schedules: list[str], options: dict[str, Any], config: dict[str, Any] = FP32) -> list[Any]:
        jobs = [job(schedule, 4, 8, config, blocks=14) for schedule in schedules]
        return list(zip(*run_ranks(4, train_measured, jobs, options, timeout=300)))

    schedules, checkpointed = list(SHARES), {"activation_checkpoint_interval": 1}
    whole, reentrant = measured(schedules, {}), measured(schedules, checkpointed)
    other, = measured(["v-half"], checkpointed, NON_REENTRANT)
    half = schedules.index("v-half")
    for schedule, kept, recomputed in [*zip(schedules, whole, reentrant), ("v-half", whole[half], other)]:
        assert [losses for *_, losses in recomputed] == [losses for *_, losses in kept], schedule
        for was, now in zip(kept[0][1], recomputed[0][1], strict=True):
            assert now.activations_peak < was.activations_peak, schedule
        most, least = (max(peak for _, _, peak, _ in ranks) for ranks in (kept, recomputed))
        print(f"{schedule}: {most / 2**20:.2f} MiB allocated without checkpoints, {least / 2**20:.2f} with")
        assert least < SHARES[schedule] * most, schedule
        if schedule.startswith("v-"):
            before, after = kept[0][0], recomputed[0][0]
            assert before.after_forward[1:-1] == (2 * BLOCK_WHOLE,) * 6 and after.after_forward[1:-1] == (2 * UNIT,) * 6
            assert after.after_backward == before.after_backward
