"""DeepSpeed's own MoE layer with two pipeline ranks, two replicas, and the experts divided between the replicas.

Two oracles: DeepSpeed's engine on one stage with the same replicas, bit for bit; and DeepSpeed's engine on one rank
that has all experts and the micro-batches of both replicas, to rounding. The auxiliary losses of the layers flow beside
the hidden states, and the loss function adds them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec
from internals import note_accumulated
from pipelines import (BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, VOCABULARY, WIDTH, Job, cross_entropy,
                       micro_batch)
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.checkpoint.errors import CheckpointError
from ds_vshape.comm.channels import PeerLost
from ds_vshape.config.section import ConfigError
from ds_vshape.engine.engine import PipelineEngine

EXPERTS, REPLICAS, MICRO_BATCHES = 4, 2, 4
BATCHES = range(3)
AUXILIARY = 0.1  # The weight of the auxiliary losses.
Flow = tuple[Tensor, Tensor]  # hidden states, and the auxiliary losses of the layers so far [1]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Tokens(nn.Embedding):
    def forward(self, tokens: Tensor) -> Flow:  # type: ignore[override]
        x = super().forward(tokens)
        return x, x.sum().reshape(1) * 0


class Mixture(nn.Module):
    """A norm and a mixture, of which all tokens find a place."""

    def __init__(self, ep_size: int, experts: int = EXPERTS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = MoE(WIDTH, Expert(), experts, ep_size, capacity_factor=float(experts), use_rts=False)

    def forward(self, flow: Flow) -> Flow:
        x, losses = flow
        change, loss, _ = self.moe(self.norm(x))
        return x + change, losses + loss


class Dense(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, flow: Flow) -> Flow:  # type: ignore[override]
        return flow[0] + super().forward(flow[0]), flow[1]


class Head(nn.Linear):
    def forward(self, flow: Flow) -> Flow:  # type: ignore[override]
        return super().forward(flow[0]), flow[1]


def with_auxiliary(outputs: Flow, labels: Tensor) -> Tensor:
    logits, losses = outputs
    return cross_entropy(logits, labels) + AUXILIARY * losses.sum()


def without_auxiliary(outputs: Flow, labels: Tensor) -> Tensor:
    return with_auxiliary((outputs[0], outputs[1].detach()), labels)


def layers(*middle: LayerSpec) -> tuple[LayerSpec, ...]:
    return LayerSpec(Tokens, VOCABULARY, WIDTH), *middle, LayerSpec(Head, WIDTH, VOCABULARY)


def mixtures(ep_size: int = REPLICAS) -> tuple[LayerSpec, ...]:
    return layers(*(LayerSpec(Mixture, ep_size) for _ in range(3)))


def data(engine: Any, batch: int) -> Any:
    """A replica's micro-batches; where there is one replica alone, those of both."""
    alone = engine.grid.get_data_parallel_world_size() == 1
    replicas = range(REPLICAS) if alone else [engine.grid.get_data_parallel_rank()]
    return iter([micro_batch(batch, number, replica) for replica in replicas for number in range(MICRO_BATCHES)])


Trained = tuple[list[float], dict[str, Tensor], Any, set[str]]


def train(engine: Any, batches: range = BATCHES) -> Trained:
    """Losses; weights, an expert's by its number among all; the last norm of the gradients; what came from W."""
    in_w: set[Any] = set()
    if isinstance(engine, PipelineEngine):
        note_accumulated(engine, in_w)
    losses = [float(engine.train_batch(data(engine, batch))) for batch in batches]
    name = {parameter: global_name(engine, name) for name, parameter in engine.module.named_parameters()}
    weights = {global_name(engine, name): value.clone() for name, value in engine.module.state_dict().items()}
    norm = engine.get_global_grad_norm()
    return losses, weights, norm and float(norm), {name[parameter] for parameter in in_w}


def global_name(engine: Any, name: str) -> str:
    before, here, after = name.partition("deepspeed_experts.")
    if not here:
        return name
    number, _, rest = after.partition(".")
    layer = next(module for module in engine.module.modules() if isinstance(module, MoE))
    rank = engine.grid.get_data_parallel_rank() % layer.ep_size
    return f"{before}{here}{rank * layer.num_local_experts + int(number)}.{rest}"


def train_all(rank: int, jobs: list[Job]) -> list[Trained]:
    return [train(job.engine(loss_fn=with_auxiliary)) for job in jobs]


def merged(ranks: list[Trained]) -> Trained:
    """Of all ranks; whoever has a weight must have the same."""
    weights: dict[str, Tensor] = {}
    for losses, of_rank, norm, _ in ranks:
        assert (losses, norm) == (ranks[0][0], ranks[0][2])
        for name, value in of_rank.items():
            assert torch.equal(weights.setdefault(name, value), value), name
    return ranks[0][0], weights, ranks[0][2], set().union(*(of_rank[3] for of_rank in ranks))


def results(world: int, jobs: list[Job]) -> list[Trained]:
    return [merged(list(of_job)) for of_job in zip(*run_ranks(world, train_all, jobs, timeout=200), strict=True)]


# Configs, and how far losses may be from those of one rank with all experts.
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": (FP32, 1e-6), "fp32 ZeRO-1": (FP32_ZERO1, 1e-6), "bf16": (BF16_ZERO0, 1e-3),
    "bf16 ZeRO-1": (BF16_ZERO1, 1e-3), "bf16 ZeRO-1, fp32 sums": (BF16_ZERO1_FP32, 1e-3)}
SCHEDULES = ["1f1b", "zb-h1", "v-half", "v-zb"]


@pytest.mark.quick_cases("fp32 ZeRO-1")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_equals_one_stage_and_one_rank(precision: str) -> None:
    config, rounding = PRECISIONS[precision]
    ours = results(4, [Job(schedule, 2, MICRO_BATCHES, config, mixtures()) for schedule in SCHEDULES])
    one_stage, = results(2, [Job(None, 1, MICRO_BATCHES, config, mixtures())])
    one_rank, = results(1, [Job(None, 1, REPLICAS * MICRO_BATCHES, config, mixtures(1))])
    assert one_rank[0][0] > one_rank[0][-1]
    for schedule, (losses, weights, _, in_w) in zip(SCHEDULES, ours, strict=True):
        assert losses == one_stage[0], schedule
        assert weights.keys() == one_stage[1].keys() == one_rank[1].keys()
        for name, value in one_stage[1].items():
            assert torch.equal(weights[name], value), (schedule, name)
        assert losses == pytest.approx(one_rank[0], rel=rounding)
        if schedule.startswith("v-"):
            # All but norms, and the router where it multiplies by a copy of its weight in 32 bits.
            assert {name for name in weights if name not in in_w and ".wg." not in name} == {
                name for name in weights if ".norm." in name}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_clipping(precision: str) -> None:
    """By the norm of all experts, wherever they are. Without ZeRO, DeepSpeed on one stage takes the mean of replicas'
    norms, so that the experts of each count in part."""
    config, rounding = PRECISIONS[precision]
    config = {**config, "gradient_clipping": 0.1}
    ours = results(4, [Job(schedule, 2, MICRO_BATCHES, config, mixtures()) for schedule in SCHEDULES])
    one_rank, = results(1, [Job(None, 1, REPLICAS * MICRO_BATCHES, config, mixtures(1))])
    for losses, _, norm, _ in ours:
        assert losses == pytest.approx(one_rank[0], rel=rounding)
        if precision == "fp32":
            unclipped, = results(1, [Job(None, 1, REPLICAS * MICRO_BATCHES, FP32_ZERO1 | {"gradient_clipping": 0.1},
                                         mixtures(1))])
            assert norm == pytest.approx(unclipped[2], rel=1e-5)


@pytest.mark.slow
def test_the_auxiliary_loss_trains_the_routers() -> None:
    def body(rank: int) -> list[dict[str, Tensor]]:
        job = Job("v-zb", 2, MICRO_BATCHES, FP32, mixtures())
        return [train(job.engine(loss_fn=loss))[1] for loss in (with_auxiliary, without_auxiliary)]

    for with_loss, without in run_ranks(4, body):
        routers = [name for name in with_loss if ".wg." in name]
        assert routers and not any(torch.equal(with_loss[name], without[name]) for name in routers)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_a_stage_without_experts(schedule: str) -> None:
    """DeepSpeed's own engine waits forever where it makes the experts' groups."""
    middle = layers(LayerSpec(Mixture, 2), LayerSpec(Dense), LayerSpec(Dense))
    ours, = results(4, [Job(schedule, 2, MICRO_BATCHES, {"gradient_clipping": 0.1}, middle)])
    alone = layers(LayerSpec(Mixture, 1), LayerSpec(Dense), LayerSpec(Dense))
    one_rank, = results(1, [Job(None, 1, REPLICAS * MICRO_BATCHES, {"gradient_clipping": 0.1}, alone)])
    assert ours[0] == pytest.approx(one_rank[0], rel=1e-6)


def refused(rank: int, jobs: list[Job]) -> list[str]:
    told = []
    for job in jobs:
        with pytest.raises(ConfigError) as error:
            job.engine(loss_fn=with_auxiliary)
        told.append(str(error.value))
    return told


def test_what_cannot_be_trained_is_refused_on_every_rank() -> None:
    some = layers(LayerSpec(Mixture, 2), LayerSpec(Dense), LayerSpec(Dense))
    jobs = [Job("v-half", 2, MICRO_BATCHES, FP32, layers(*(LayerSpec(Mixture, 4) for _ in range(2)))),
            Job("1f1b", 2, MICRO_BATCHES, FP32_ZERO1, some), Job("1f1b", 2, MICRO_BATCHES, BF16_ZERO0, some)]
    for too_many, *uneven in run_ranks(4, refused, jobs):
        assert "ep_size = 4: must divide the 2 data parallel ranks" in too_many
        assert all("2 on pipeline rank 0, 1 on pipeline rank 1" in told for told in uneven)


# -- failures


class Failing(Mixture):
    """Fails on one rank alone, before it exchanges tokens: the other replica waits for these."""

    forwards = 0

    def forward(self, flow: Flow) -> Flow:
        Failing.forwards += 1
        if Failing.forwards == 2 and torch.distributed.get_rank() == 2:
            raise ValueError("an unlikely token")
        return super().forward(flow)


def failed(rank: int) -> str:
    job = Job({"name": "v-half", "timeout_seconds": 3}, 2, MICRO_BATCHES,
              layers=layers(*(LayerSpec(Failing, REPLICAS) for _ in range(3))))
    engine = job.engine(loss_fn=with_auxiliary)
    with pytest.raises(PeerLost) as error:
        engine.train_batch(data(engine, 0))
    return str(error.value)


@pytest.mark.slow
def test_a_failure_before_an_exchange_of_tokens_ends_all_ranks_with_its_cause() -> None:
    """Not with what follows from it on the first rank, which gets no activations."""
    for told in run_ranks(4, failed, timeout=60):
        assert re.search(r"pipeline rank 1 has failed \(replica 0, global rank 2.*ValueError: an unlikely token; "
                         r"waiting for it: .*rank 3 in SplitForwardPass", told), told


# -- checkpoints


def save_and_go_on(rank: int, job: Job, folder: Path) -> list[Trained]:
    """The batches after a checkpoint, without and with loading it."""
    engine = job.engine(loss_fn=with_auxiliary)
    train(engine, range(2))
    engine.save_checkpoint(str(folder), tag="saved")
    outcomes = [train(engine, range(2, 4))]
    again = job.engine(loss_fn=with_auxiliary)
    _, client_state = again.load_checkpoint(str(folder), tag="saved")
    again.save_checkpoint(str(folder), tag="saved again", client_state=client_state)
    return [*outcomes, train(again, range(2, 4))]


def cannot_load(rank: int, job: Job, folder: Path) -> list[str]:
    """What is told, of a whole state and of weights alone."""
    told = []
    engine = job.engine(loss_fn=with_auxiliary)
    for weights_alone in (False, True):
        with pytest.raises(CheckpointError) as error:
            engine.load_checkpoint(str(folder), tag="saved", load_module_only=weights_alone)
        told.append(str(error.value))
    return told


@pytest.mark.quick_cases("fp32 ZeRO-1")
@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "bf16"])
def test_checkpoints(precision: str, tmp_path: Path) -> None:
    """DeepSpeed's files: an expert of a layer in each; and a file that isn't there is told on every rank."""
    job = Job("v-half", 2, MICRO_BATCHES, PRECISIONS[precision][0], mixtures())
    before, after = [merged(list(of_run)) for of_run in zip(*run_ranks(4, save_and_go_on, job, tmp_path, timeout=100))]
    assert before[0] == after[0]
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())
    files = [name for name in os.listdir(tmp_path / "saved") if "_expert_" in name]
    assert len(files) == 3 * EXPERTS
    lost = sorted(files)[-1]
    (tmp_path / "saved" / lost).unlink()
    for told in run_ranks(4, cannot_load, job, tmp_path):
        assert all(lost in of_load for of_load in told)


@pytest.mark.slow
def test_a_checkpoint_of_another_placement_is_refused(tmp_path: Path) -> None:
    """DeepSpeed names the files of experts by ranks and by their layers' places there."""
    before, after = [Job(schedule, 2, MICRO_BATCHES, FP32, mixtures()) for schedule in ("v-half", "1f1b")]
    run_ranks(4, save_and_go_on, before, tmp_path, timeout=100)
    for whole, weights in run_ranks(4, cannot_load, after, tmp_path):
        assert "was saved with stages [[0, 3], [1, 2]]" in whole
        # The weights alone would go anywhere, but for the experts': the first file that isn't there or has other names.
        assert "_expert_" in weights and ("is missing" in weights or "can't be loaded" in weights)


@pytest.mark.slow
def test_states_that_deepspeed_cannot_load_are_not_saved(tmp_path: Path) -> None:
    """BF16_Optimizer's without ZeRO: DeepSpeed looks for those of all ranks in a file that has one rank's."""
    def body(rank: int) -> str:
        engine = Job("v-half", 2, MICRO_BATCHES, BF16_ZERO0, mixtures()).engine(loss_fn=with_auxiliary)
        with pytest.raises(CheckpointError) as error:
            engine.save_checkpoint(str(tmp_path))
        return str(error.value)

    assert all("zero_optimization.stage must be 1" in told for told in run_ranks(4, body))
    assert not list(tmp_path.iterdir())
