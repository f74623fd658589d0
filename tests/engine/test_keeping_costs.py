"""Plans that recompute and offload: the sizes and times that they are made of, and training by them."""

from __future__ import annotations

import re
import time
from collections import Counter
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.module import PipelineError
from pipelines import Job, Outcome, data, merged, profiled, train
from ranks import run_ranks
from resident import map_large_tensors, rise_in
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.config.section import ConfigError
from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.adaptive.compilation import compile_loops
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times

pytestmark = pytest.mark.usefixtures("cache")
SAMPLES, WIDTH, LAYERS = 8192, 32, 3
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


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The planning process, which gives way to the ranks, would take long to compile its loops beside them."""
    compile_loops(memory=True)


def measured(rank: int, section: dict[str, Any]) -> tuple[Activations, Times]:
    engine = job(**section).engine(loss_fn=loss)
    for batch in count():
        engine.train_batch(data(engine, batch))
        if engine.planned_times is not None:
            break
        time.sleep(0.1)
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


class Trained(NamedTuple):
    """A rank's job from its start until a plan for its own times has run."""

    outcome: Outcome
    schedule: Schedule
    sizes: Activations
    memory: RankMemory
    rise: int
    ran: Timeline


def train_through(rank: int, section: dict[str, Any]) -> Trained:
    map_large_tensors()
    engine = job(**section).engine(loss_fn=loss)
    losses = list[float]()

    def train_one() -> None:
        losses.append(float(engine.train_batch(data(engine, len(losses)))))

    while engine.planned_times is None:
        train_one()
        time.sleep(0.1)
    # In the first batch by a plan messages are announced.
    train_one()
    for parameter in engine.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rise = rise_in(train_one)
    sizes = engine.activation_sizes()
    return Trained(Outcome(losses, engine.module.state_dict()), engine.schedule(), sizes, engine.memory_report()[rank],
                   rise, engine.timelines()[1])


def train_without(rank: int, batches: int) -> Outcome:
    return train(job().engine(loss_fn=loss), range(batches))


@pytest.mark.slow
@pytest.mark.parametrize("limit, means, planned", [
    (0.3, ("recompute", "offload"), (Kind.O, Kind.R)),
    (0.3, ("offload",), (Kind.O, Kind.R)),
    (0.4, ("recompute",), (Kind.C,)),
], ids=["both", "offload", "recompute"])
def test_from_the_start_through_a_plan(limit: float, means: tuple[str, ...], planned: tuple[Kind, ...]) -> None:
    """Training is that without recomputation and offload, bit for bit, and keeps to a limit that no order alone can."""
    ranks = run_ranks(2, train_through, {"memory_limit": limit, **dict.fromkeys(means, True)})
    outcome = merged([of_rank.outcome for of_rank in ranks])
    oracle = merged(run_ranks(2, train_without, len(outcome.losses)))
    assert outcome.losses == oracle.losses
    assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items())

    schedule, ran = ranks[0].schedule, ranks[0].ran
    found = Counter(action.kind for _, action in schedule.passes())
    assert schedule.name == "adaptive" and all(found[kind] for kind in planned)
    assert found == Counter(span.action.kind for spans in ran.ranks for span in spans)
    assert sum(map(len, ran.offloads)) == found[Kind.O] == found[Kind.R] == sum(map(len, ran.reloads))

    counted = Activations.counted(schedule.placement)
    peaks = peak_activations(schedule, ranks[0].sizes.shares_in(counted))
    assert max(peaks) <= limit * 4 < min(peak_activations(build("v-min", 2, 5), counted))
    for of_rank in ranks:
        assert 0 < of_rank.rise <= of_rank.memory.passes


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
