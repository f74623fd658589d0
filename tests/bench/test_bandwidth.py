"""bench/bandwidth.py: ZeRO trains what the pipelines train, and where curves cross."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from bandwidth import hidden_seconds, memory_of, wins_below
from contenders import engine_of
from ranks import run_ranks
from turns import Turns
from workloads import Blocks

SMALL = Blocks(2, 4, 4, (0.0, 0.0, 0.0), width=48)
ZERO = ("deepspeed zero-1", "deepspeed zero-3", "deepspeed zero-3:2")


def losses_of(rank: int, names: tuple[str, ...]) -> dict[str, list[float]]:
    turns = Turns({name: engine_of(name, SMALL) for name in names}, SMALL)
    for _ in range(3):
        for name in names:
            turns.train(name)
    return turns.losses


def test_zero_has_the_losses_of_the_pipeline() -> None:
    names = ("v-half", "torch 1f1b", *ZERO)
    of_ranks = run_ranks(2, losses_of, names)
    assert of_ranks[0] == of_ranks[1]
    expected = of_ranks[0]["v-half"]
    assert len(set(expected)) == 3
    for name in names:
        assert of_ranks[0][name] == pytest.approx(expected, rel=1e-6), name


def kept_parameters(rank: int) -> tuple[list[int], list[int]]:
    """The elements that this rank has of the parameters between batches, and of a layer.s in its forward."""
    engine = engine_of("deepspeed zero-3", SMALL).engine
    layers, seen = engine.module, []
    of_all = [sum(parameter.numel() for parameter in layers.parameters())]
    layers[0].register_forward_hook(lambda *_: seen.append(layers[0].weight.numel()))
    for number in range(2):
        for inputs, labels in SMALL.batch(number)[:2]:
            loss = SMALL.loss_fn(engine(inputs), labels)
            engine.backward(loss)
            engine.step()
        of_all.append(sum(parameter.numel() for parameter in layers.parameters()))
    return of_all, seen


def test_zero_3_gathers_parameters_and_lets_go_of_them() -> None:
    for between, in_forward in run_ranks(2, kept_parameters):
        assert set(between) == {0} and set(in_forward) == {SMALL.width ** 2}


def test_a_number_of_micro_batches_that_ranks_cannot_share() -> None:
    from ranks import RanksFailed

    with pytest.raises(RanksFailed, match="6 micro-batches can't be shared out over 2 ranks, 2 at a time"):
        run_ranks(2, lambda rank: engine_of("deepspeed zero-3:2", replace(SMALL, micro_batches=6)))


def test_bytes_of_rings() -> None:
    workload = Blocks(4, 16, 8, (0.01, 0.01, 0.01), width=512)
    parameters = 16 * 2 ** 20
    assert hidden_seconds("deepspeed zero-1", workload, 0.0, 8) == pytest.approx(2 * 0.75 * parameters / 1e6)
    assert hidden_seconds("deepspeed zero-3", workload, 0.0, 8) == pytest.approx(6 * 0.75 * parameters / 1e6)
    assert hidden_seconds("deepspeed zero-3:2", workload, 0.0, 8) == pytest.approx(3 * 0.75 * parameters / 1e6)
    assert hidden_seconds("deepspeed zero-3", workload, 1.0, 1e9) == 1.0


def test_where_curves_cross() -> None:
    bandwidths = (100.0, 200.0, 400.0)
    assert wins_below(dict.fromkeys(bandwidths, 1.0), dict(zip(bandwidths, (4.0, 2.0, 0.5)))) == pytest.approx(
        200 * math.sqrt(2))
    assert wins_below(dict.fromkeys(bandwidths, 1.0), dict.fromkeys(bandwidths, 2.0)) == math.inf
    assert wins_below(dict.fromkeys(bandwidths, 1.0), dict.fromkeys(bandwidths, 0.5)) == 0.0


def test_blocks_have_the_proportions_of_a_transformers() -> None:
    workload = Blocks(2, 4, 4, (0.0, 0.0, 0.0), width=384)
    layer = workload.spec(0).build()
    assert 12 * workload.rows * workload.width == sum(parameter.numel() for parameter in layer.parameters())
    x = torch.zeros(2 * workload.rows, workload.width)
    layer(x)
    assert layer.held == 2 * 16 * 4 * x.numel() // 2


@pytest.mark.parametrize("name", ["v-half", "deepspeed zero-3"])
def test_memory_grows_with_the_model(name: str) -> None:
    small, large = (run_ranks(2, memory_of, name, replace(SMALL, width=width)) for width in (512, 1024))
    for of_small, of_large in zip(small, large):
        # Four times the weights; of the small ones some lie in pages that were there before.
        assert 2.5 < of_large / of_small < 8, (small, large)
