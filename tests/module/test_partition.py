"""Partitions on real ranks: given as bounds, as costs or to be measured; they move layers and never a loss."""

from __future__ import annotations

import random
import re
import time
from itertools import combinations, pairwise
from operator import add
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.pipe import LayerSpec
from pipelines import (BATCHES, BF16_ZERO1, LENGTH, SAMPLES, VOCABULARY, WIDTH, Block, Job, Outcome, PlainTraining,
                       cross_entropy, data, merged, micro_batch, specs, tied_specs, train)
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

import ds_vshape
from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.named import placement_of
from ds_vshape.schedule.partition.balance import rank_loads
from ds_vshape.schedule.partition.partition_and_order import limits_of_1f1b

EXAMPLE = micro_batch(0, 0, 0)
BOUNDS = [0, 1, 4, 6, 8]
COSTS = [0.1, 1, 1, 1, 1, 1, 1, 3]


def train_partitioned(rank: int, job: Job, options: dict[str, Any]) -> tuple[Outcome, list[int]]:
    engine = job.engine(**options)
    return train(engine, BATCHES), engine.module.parts


def plain(job: Job) -> Outcome:
    """The plain model's training, with as many threads as a rank has."""
    outcome: Outcome = run_ranks(1, lambda rank: PlainTraining(job).train(BATCHES, job.micro_batches))[0]
    return outcome


METHODS: dict[str, Any] = {
    "bounds": {"partition_method": BOUNDS},
    "costs": {"partition_method": {"costs": COSTS}},
    "profile": {"partition_method": "profile", "example": EXAMPLE},
}


@pytest.mark.parametrize("schedule", ["v-half", "v-zb", "interleaved-1f1b", "zb-h1"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.quick_cases("costs-v-half", "profile-zb-h1", "bounds-interleaved-1f1b")
def test_losses_are_the_plain_models(method: str, schedule: str) -> None:
    job = Job(schedule, 4 if schedule == "zb-h1" else 2, 3, layers=tuple(specs(6)))
    results = run_ranks(job.stages, train_partitioned, job, METHODS[method])
    outcome, oracle = merged([result[0] for result in results]), plain(job)
    assert outcome.losses == oracle.losses
    assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items())
    parts = results[0][1]
    assert all(other == parts for _, other in results)
    if method == "bounds":
        assert parts == BOUNDS
    if method == "costs" and schedule.startswith("v-"):
        # Work of 9.1 on 2 ranks: embedding, head and one block beside five blocks.
        assert sorted(rank_loads(COSTS, parts, placement_of(schedule, 2))) == pytest.approx([4.1, 5])


def test_bfloat16_and_tied_layers() -> None:
    """A profile in the precision of the training, of an embedding that is the head too, with two replicas."""
    job = Job("v-half", 2, 3, BF16_ZERO1, tuple(tied_specs(6)))
    measured = run_ranks(4, train_partitioned, job, METHODS["profile"])
    given = run_ranks(4, train_partitioned, job, {"partition_method": measured[0][1]})
    assert all(parts == measured[0][1] for _, parts in measured)
    assert [outcome.losses for outcome, _ in measured] == [outcome.losses for outcome, _ in given]


@pytest.mark.parametrize("partition, parts", [(BOUNDS, BOUNDS), ({"costs": COSTS}, None), ("uniform", [0, 2, 4, 6, 8]),
                                              ({"costs": [[1.0, 0.5, 0.5], *[2.0] * 7]}, [0, 2, 4, 6, 8])])
@pytest.mark.quick_cases("partition0-parts0", "partition3-parts3")
def test_the_config_counts_more_than_the_script(partition: Any, parts: list[int] | None) -> None:
    job = Job({"name": "v-half", "partition": partition}, 2, 3, layers=tuple(specs(6)))
    results = run_ranks(2, train_partitioned, job, {"partition_method": [0, 5, 6, 7, 8]})
    assert merged([result[0] for result in results]).losses == plain(job).losses
    assert results[0][1] == (parts or run_ranks(2, train_partitioned, Job("v-half", 2, 3, layers=tuple(specs(6))),
                                                METHODS["costs"])[0][1])


def parts_of(rank: int, schedule: str | None, method: str) -> list[int]:
    job = Job(schedule, 4, 2, layers=tuple(specs(9)))
    module = ds_vshape.PipelineModule(job.specs(), num_stages=4, config=job.ds_config(), partition_method=method)
    return module.parts


@pytest.mark.parametrize("method", ["uniform", "parameters", "type:Block"])
@pytest.mark.quick_cases("type:Block")
def test_deepspeeds_methods_are_as_ever(method: str) -> None:
    oracle = run_ranks(4, lambda rank: [int(bound) for bound in _stock_parts(method)])
    assert run_ranks(4, parts_of, None, method) == oracle == run_ranks(4, parts_of, "zb-h1", method)


def _stock_parts(method: str) -> Any:
    import deepspeed

    return deepspeed.pipe.PipelineModule(specs(9), num_stages=4, partition_method=method).parts


# -- measured times


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        time.sleep(ctx.seconds)
        return grads[0], None, None


class SleepingBlock(Block):
    """A block that takes at least a number of seconds."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_Sleep.apply(x, *self.seconds))


def slow_loss(logits: Tensor, labels: Tensor) -> Tensor:
    time.sleep(0.026)
    return cross_entropy(logits, labels)


HEAVY_HEAD = [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(SleepingBlock, 0.002, 0.004) for _ in range(14)),
              LayerSpec(nn.Linear, WIDTH, VOCABULARY)]


def measured(rank: int, schedule: str, ranks: int) -> tuple[Any, list[int]]:
    config = Job(schedule, ranks, 2).ds_config()
    module = ds_vshape.PipelineModule(HEAVY_HEAD, num_stages=ranks, loss_fn=slow_loss, config=config,
                                      partition_method="profile", example=EXAMPLE if rank == 0 else None)
    return module.layer_times, module.parts


def test_a_heavy_head_is_measured_and_balanced() -> None:
    """14 blocks of 6 ms and a loss of 26 ms on 4 ranks: two layers a stage are 38 ms on rank 0 and 24 on the others.
    Balanced, the three others share the blocks: 30 ms at most. Against all partitions."""
    ranks = 4
    results = run_ranks(ranks, measured, "v-half", ranks)
    times, parts = results[0]
    assert all(other == (times, parts) for other in results), "every rank has rank 0's times"
    # No sleep ends early; how late one ends is the machine's affair, so the partition is held to what was measured.
    for forward, backward in list(zip(times.forward, times.backward))[1:-1]:
        assert forward >= 0.002 and backward >= 0.004
    assert times.costs[-1] >= 0.026
    placement = placement_of("v-half", ranks)
    everywhere = ((0, *inner, 16) for inner in combinations(range(1, 16), placement.stages - 1))
    least = min(max(rank_loads(times.costs, bounds, placement)) for bounds in everywhere)
    assert max(rank_loads(times.costs, parts, placement)) <= 1.05 * least
    blocks = [sum(1 <= layer <= 14 for layer in range(start, stop)) for start, stop in pairwise(parts)]
    assert blocks[0] + blocks[-1] < min(map(add, blocks[1:4], blocks[-2:-5:-1])), "the head's rank has the fewest"


class Wide(nn.Linear):
    """A head over many words."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 600_000)


def measured_work(rank: int) -> tuple[tuple[float, ...], list[int]]:
    layers = [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(Block) for _ in range(10)), LayerSpec(Wide)]
    module = ds_vshape.PipelineModule(layers, num_stages=2, loss_fn=cross_entropy, partition_method="profile",
                                      config=Job("v-half", 2, 2).ds_config(), example=EXAMPLE)
    return module.layer_times.costs, module.parts


def test_real_work_is_measured() -> None:
    """A head that takes longer than all blocks: its rank gets nothing that another could take."""
    costs, parts = run_ranks(2, measured_work)[0]
    assert costs[-1] > sum(costs[1:-1]) / 2
    placement = placement_of("v-half", 2)
    assert max(rank_loads(costs, parts, placement)) < max(rank_loads(costs, [0, 3, 6, 9, 12], placement))


class Built(nn.Module):
    """Counts its instances: those alive, and all."""

    alive = most = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()) + random.random() + float(np.random.rand()))
        Built.alive += 1
        Built.most = max(Built.most, Built.alive)

    def __del__(self) -> None:
        Built.alive -= 1

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def weights_and_most_alive(rank: int, method: Any, example: Any) -> tuple[list[float], list[int], int]:
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(7)
    most: list[int] = []

    def seed(layer: int) -> None:
        most.append(Built.most)

    module = ds_vshape.PipelineModule([LayerSpec(Built) for _ in range(8)], num_stages=2, partition_method=method,
                                      config=Job("v-half", 2, 2).ds_config(), example=example, seed_layers=True,
                                      seed_fn=seed)
    return [float(p.detach()) for p in module.parameters()], module.parts, max(most[:8]) if example else 0


def test_layers_are_measured_one_at_a_time_and_leave_no_trace() -> None:
    """The profile doesn't touch random generators, so weights without seeds of layers are those without a profile."""
    example = (torch.rand(4, 4), None)
    profiled = run_ranks(2, weights_and_most_alive, "profile", example)
    given = run_ranks(2, weights_and_most_alive, profiled[0][1], None)
    assert [weights for weights, _, _ in profiled] == [weights for weights, _, _ in given]
    assert profiled[0][2] <= 2, "the layer that is built, and the one before it that isn't let go yet"


class Tuples(nn.Module):
    """Takes and gives tuples with an integer tensor, and changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, count = inputs
        return self.linear(x.mul_(0.5).relu_()), count + 1


def measured_odd_layers(rank: int) -> Any:
    module = nn.Linear(WIDTH, WIDTH)
    before = [p.clone() for p in module.parameters()]
    layers = [LayerSpec(Tuples), LayerSpec(Tuples), lambda inputs: inputs[0], module, torch.relu,
              LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=False)]
    built = ds_vshape.PipelineModule(layers, num_stages=2, loss_fn=functional.mse_loss, partition_method="profile",
                                     config=Job("v-half", 2, 2).ds_config(),
                                     example=((torch.rand(SAMPLES, WIDTH), torch.tensor(3)),
                                              torch.rand(SAMPLES, VOCABULARY)))
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(module.parameters(), before))
    return built.layer_times.costs


def test_layers_of_every_kind_are_measured() -> None:
    costs = run_ranks(2, measured_odd_layers)[0]
    assert len(costs) == 6 and all(0 < cost < 1 for cost in costs)


# -- planned together with the order of passes


def trained_and_planned(rank: int, job: Job, options: dict[str, Any]) -> tuple[Outcome, list[int], Any, Any]:
    engine = job.engine(**options)
    first = engine.schedule()
    return train(engine, BATCHES), engine.module.parts, engine.module.known_stages, first


@pytest.mark.parametrize("limit", [0.6, None])
@pytest.mark.quick_cases("0.6")
def test_adaptive_plans_partition_and_order_together(limit: float | None, cache: Any) -> None:
    """Half of 1F1B's memory leaves no room for the balanced stages' forwards: the first batch already runs by the plan
    that was made with the partition, within the limit by the layers' sizes, and no loss changes."""
    section = {"name": "adaptive", "planning_seconds": 1.0, "memory_limit": limit}
    job = Job(section, 2, 4, layers=tuple(specs(6)))
    results = run_ranks(2, trained_and_planned, job, {"partition_method": {"costs": [0.5, 1, 1, 1, 1, 1, 1, 8]}})
    outcome, oracle = merged([result[0] for result in results]), plain(job)
    assert outcome.losses == oracle.losses
    assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items())
    _, parts, known, first = results[0]
    assert all(result[1:] == results[0][1:] for result in results)
    assert tuple(parts) == known.bounds and first == known.schedule
    most = limits_of_1f1b(limit or 1.0, known.layers, 2, 4)[0]
    assert max(peak_activations(first, known.activations)) <= most


def measured_sizes(rank: int) -> Any:
    # Beside busy processes times may balance at stages for which there is no order within much less.
    section = {"name": "adaptive", "planning_seconds": 0.5, "memory_limit": 1.0, "times": "profile"}
    module = ds_vshape.PipelineModule(specs(6), num_stages=2, loss_fn=cross_entropy, partition_method="profile",
                                      config=Job(section, 2, 4).ds_config(), example=EXAMPLE if rank == 0 else None)
    return module.known_stages, module.layer_times


def test_sizes_of_layers_are_measured() -> None:
    """Limits count what a profile finds that layers leave."""
    known, times = run_ranks(2, measured_sizes)[0]
    numbers = SAMPLES * LENGTH * 4
    # Of a block: the inputs of its norm, with two numbers for each token, of both products and of the activation.
    assert times.after_forward[1] == numbers * (WIDTH + 2 + WIDTH + 2 * WIDTH + 2 * WIDTH)
    # Both products' inputs and output gradients.
    assert times.after_backward[1] == numbers * 2 * (WIDTH + 2 * WIDTH)
    assert all(0 <= each < 1 for of_pass in (times.forward, times.input_grad, times.weight_grad) for each in of_pass)
    assert known.schedule.micro_batches == 4
    assert max(peak_activations(known.schedule, known.activations)) <= limits_of_1f1b(1.0, known.layers, 2, 4)[0]


def train_within(rank: int, section: Any, costs: list[float]) -> tuple[list[float], Any]:
    job = Job(section, 2, 4, layers=tuple(specs(6)))
    engine = job.engine(partition_method={"costs": costs})
    return [float(engine.train_batch(data(engine, batch))) for batch in range(3)], engine.module.known_stages


def test_limits_are_fractions_of_what_1f1b_keeps_of_these_layers(cache: Any) -> None:
    """A head as costly as all other layers has a stage of 1F1B's of its own, whose others keep most of the memory."""
    section = {"name": "adaptive", "memory_limit": 0.3, "times": "profile", "planning_seconds": 0.5}
    losses, known = run_ranks(2, train_within, section, [1, 1, 1, 1, 1, 1, 1, 7])[1]
    assert losses == run_ranks(2, train_within, {"name": "adaptive"}, [1] * 8)[1][0]
    assert max(peak_activations(known.schedule, known.activations)) <= 0.3 * 2 * 7


def error_for_one(rank: int, partition_method: Any) -> list[str]:
    section = {"name": "adaptive", "memory_limit": 0.75, "planning_seconds": 0.5}
    engine = Job(section, 2, 6, layers=tuple(specs(3))).engine(partition_method=partition_method)
    found = []
    for micro_batches in (1, 6):
        try:
            engine.set_train_batch_size(SAMPLES * micro_batches)
            found.append("no error")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    assert float(engine.train_batch(data(engine, 0))) > 0
    return found


def test_a_batch_that_known_stages_cannot_keep_to_a_limit_with(cache: Any) -> None:
    """Of one micro-batch 1F1B keeps no more than any other schedule: at most 3 of 5 layers that are alike."""
    errors = run_ranks(2, error_for_one, {"costs": [1, 1, 1, 1, 1]})
    assert errors[0] == errors[1]
    assert errors[0] == ["MemoryLimitError: pipeline_schedule.memory_limit = 0.75: the least possible peak on 2 ranks "
                         "with 1 micro-batches is 1 of 1F1B's", "no error"]


# -- what can't be


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


def error_of(rank: int, layers: list[Any], section: Any, options: dict[str, Any]) -> str:
    try:
        ds_vshape.PipelineModule(layers, num_stages=2, loss_fn=cross_entropy,
                                 config=Job(section, 2, 2).ds_config(), **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def method(value: Any, **options: Any) -> dict[str, Any]:
    return {"partition_method": value, **options}


LAYERS = specs(4)
OF_MODULE = "PartitionError: partition_method: "
BAD: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "too few bounds": (LAYERS, "v-half", method([0, 3, 6]),
                       f"{OF_MODULE}the partition has 3 bounds: 4 stages need 5"),
    "bounds that fall": (LAYERS, "v-half", method([0, 3, 2, 4, 6]),
                         f"{OF_MODULE}the partition's bounds 3, 2 leave stage 1 without a layer"),
    "bounds beyond the layers": (LAYERS, "v-half", method([0, 1, 2, 3, 9]),
                                 f"{OF_MODULE}the partition goes from 0 to 9: it must go from 0 to 6"),
    "bounds that are no integers": (LAYERS, "v-half", method([0, 1.5, 2, 3, 6]),
                                    "PartitionError: partition_method = [0, 1.5, 2, 3, 6]: must be a method's name, "),
    "another key than costs": (LAYERS, "v-half", method({"cost": [1]}),
                               "PartitionError: partition_method = {'cost': [1]}: must be"),
    "too few costs": (LAYERS, "v-half", method({"costs": [1, 2]}),
                      f"{OF_MODULE}the partition has costs of 2 layers: the model has 6"),
    "a negative cost": (LAYERS, "v-half", method({"costs": [1, 2, 3, -4, 5, 6]}),
                        f"{OF_MODULE}the partition's cost of layer 3 is -4"),
    "no cost at all": (LAYERS, "v-half", method({"costs": [0] * 6}), f"{OF_MODULE}the partition's costs are all 0"),
    "a profile without an example": (LAYERS, "v-half", method("profile"),
                                     f"{OF_MODULE}the partition 'profile' can't be measured: it needs an example"),
    "an example that isn't a pair": (LAYERS, "v-half", method("profile", example=EXAMPLE[0]),
                                     f"{OF_MODULE}the partition 'profile' can't be measured: it needs an example"),
    "a profile of a broken layer": ([*LAYERS, LayerSpec(Broken)], "v-half", method("profile", example=EXAMPLE),
                                    f"{OF_MODULE}the partition 'profile' can't be measured: layer 6 (Broken): "
                                    "RuntimeError: no such kernel"),
    "bounds in the config": (LAYERS, {"name": "v-half", "partition": [0, 3, 6]}, {},
                             "PartitionError: pipeline_schedule.partition: the partition has 3 bounds"),
    "words for bounds in the config": (LAYERS, {"name": "v-half", "partition": ["0", "3"]}, {},
                                       "ConfigError: pipeline_schedule.partition = ['0', '3']: must be a method's"),
    "a method that matches no layer": (LAYERS, "v-half", method("type:Foo"),
                                       f"{OF_MODULE}the partition's method 'type:Foo' matches no layer: must match "
                                       "one of "),
    "an unknown method": (LAYERS, "v-half", method("profiled"),
                          f"{OF_MODULE}the partition's method 'profiled' isn't known: must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_error_on_every_rank(case: str) -> None:
    layers, section, options, message = BAD[case]
    errors = run_ranks(2, error_of, layers, section, options, timeout=60)
    assert errors[0] == errors[1]
    assert errors[0].startswith(message)


def test_a_limit_that_no_partition_meets(cache: Any) -> None:
    section = {"name": "adaptive", "planning_seconds": 0.2, "memory_limit": 0.2}
    errors = run_ranks(2, error_of, LAYERS, section, method({"costs": [1, 1, 1, 1, 1, 1]}), timeout=60)
    assert errors[0] == errors[1]
    said = re.fullmatch(rf"{OF_MODULE}no partition of the layers keeps to pipeline_schedule\.memory_limit = 0\.2; the "
                        r"least for which one was found is ([0-9.]+): a limit of .*", errors[0])
    assert said is not None, errors[0]
    # It can be set, and a hair less can't.
    for limit, holds in ((float(said[1]), True), (float(said[1]) - 0.002, False)):
        errors = run_ranks(2, error_of, LAYERS, {**section, "memory_limit": limit},
                           method({"costs": [1, 1, 1, 1, 1, 1]}), timeout=60)
        assert errors[0] == errors[1]
        assert (errors[0] == "no error") is holds, errors[0]
