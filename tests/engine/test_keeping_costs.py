"""What recomputation and offload would save and cost, as the planner gets it."""

from __future__ import annotations

import re
import time
from itertools import count
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.module import PipelineError
from pipelines import Job, data, profiled
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.config.section import ConfigError
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.timeline import Times

pytestmark = pytest.mark.usefixtures("cache")
SAMPLES, WIDTH, LAYERS = 256, 32, 3
# The input of a linear layer, which is what it saves.
UNIT = SAMPLES * WIDTH * 4


class Numbers(nn.Linear):
    """A linear layer on floats made of the tokens, which are one sample of few."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.float().mean().expand(SAMPLES, WIDTH).contiguous())


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.mse_loss(outputs, torch.ones_like(outputs))


def job(**section: Any) -> Job:
    """4 stages of three layers."""
    layers = (LayerSpec(Numbers, WIDTH, WIDTH), *(LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(4 * LAYERS - 1)))
    return Job(profiled("adaptive", **section), 2, 5, layers=layers)


def measured(rank: int, section: dict[str, Any]) -> tuple[Activations, Times]:
    engine = job(**section).engine(loss_fn=loss)
    for batch in count():
        engine.train_batch(data(engine, batch))
        if engine.planned_times is not None:
            break
        time.sleep(0.02)
    return engine.activation_sizes(), engine.planned_times


def test_sizes_and_times_are_measured() -> None:
    (sizes, times), other = run_ranks(2, measured, {"recompute": True, "offload": True})
    assert (sizes, times) == other
    for stage in (1, 2):
        # Three inputs. (A stage's output counts too where the next stage, on the same rank, needs it until its W.)
        whole = sizes.after_forward[stage]
        assert sizes.offloadable[stage] == LAYERS * UNIT <= whole
        # The stage's own input is kept.
        assert sizes.recomputed[stage] == (whole, whole - UNIT, whole - 2 * UNIT)
        assert times.copied[stage] == pytest.approx((1, 2 / 3, 1 / 3))
    assert times.recompute and times.offload and times.reload
    for stage, row in enumerate(times.recompute):
        assert len(row) == LAYERS and 0 < row[0] < row[1] < row[2] <= times.forward[stage]
        assert 0 < times.offload[stage] < 1 and 0 < times.reload[stage] < 1


def refused(rank: int, section: Any, options: dict[str, Any]) -> str:
    with pytest.raises((ConfigError, PipelineError)) as error:
        Job(section, 2, 4).engine(**options)
    return str(error.value)


@pytest.mark.parametrize("section, options, message", [
    ({"name": "adaptive", "recompute": True}, {},
     'pipeline_schedule.recompute = true: must be false without "name": "adaptive" and "times": "profile"'),
    ({"name": "v-half", "times": "profile", "offload": True}, {}, "pipeline_schedule.offload = true: must be false"),
    (profiled("adaptive", offload=True), {"activation_checkpoint_interval": 2},
     "activation_checkpoint_interval = 2 with .*offload = true: must be 0"),
])
def test_what_cannot_be_planned_is_refused(section: Any, options: dict[str, Any], message: str) -> None:
    first, second = run_ranks(2, refused, section, options)
    assert first == second and re.match(message, first)
