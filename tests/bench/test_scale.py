"""The costs of large models against the paper's figures and independent formulas; what bench/scale.py makes of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scale
from many_ranks import PARTS, groups_of_all, start_cost
from scale import SHAPES, best_layout, layouts, parser, plan_cost, speeds_of, step

from ds_vshape.layouts.gpt_costs import TrainingCosts
from ds_vshape.schedule.placement import linear, v

OPTIONS = parser().parse_args(["paper"])
SMALL = TrainingCosts(SHAPES["9.6B"], speeds_of(OPTIONS), length=1024, samples=1, micro_batches=32, ranks=16)


@pytest.mark.parametrize(("samples", "milliseconds"), [(4, 13.0), (8, 26.3), (12, 39.5)])
def test_the_papers_forward_passes(samples: int, milliseconds: float) -> None:
    """The default efficiency is read off them: of a chunk of the 9.6B model, which is one block."""
    times = replace(SMALL, samples=samples).times(v(16), SMALL.speeds.between)
    assert times.forward[1] == pytest.approx(milliseconds / 1000, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_shapes_have_the_parameters_of_their_names(shape: scale.Shape) -> None:
    """The paper counts a tied embedding once."""
    layers = TrainingCosts(shape, SMALL.speeds, 1024, 1, 1, shape.gpus).layers
    assert sum(layer.parameters for layer in layers[:-1]) == pytest.approx(float(shape.name[:-1]) * 1e9, rel=0.015)


def test_mfu_is_megatrons() -> None:
    """72 B s l h^2 (1 + s / 6h + V / 12lh), from "Efficient Large-Scale Language Model Training on GPU Clusters"."""
    h, layers, s, vocabulary = SMALL.shape.hidden, SMALL.shape.layers, SMALL.length, SMALL.shape.vocabulary
    flops = 72 * 32 * s * layers * h ** 2 * (1 + s / (6 * h) + vocabulary / (12 * layers * h))
    assert SMALL.mfu(1.0) == pytest.approx(flops / (16 * 312e12))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "v-half", "adaptive@0.9"])
def test_a_step_does_all_the_work(name: str, recompute: bool) -> None:
    """What the bubble leaves of the ranks' time is 3 times the products, and the attention that passes run."""
    training = replace(SMALL, recompute=recompute)
    result = step(name, training, time_limit=0.001)
    blocks = training.layers[1:-1]
    products = sum(layer.products for layer in training.layers)
    attention = sum(layer.attention for layer in blocks)
    again = sum(layer.products for layer in blocks) + attention if recompute else 0
    work = 32 * (3 * products + 3.5 * attention + again) / (0.65 * 312e12)
    assert (1 - result.bubble) * 16 * result.seconds == pytest.approx(work)
    assert result.near_seconds < result.seconds
    assert result.mfu == training.mfu(result.seconds)


def test_memory_is_state_activations_and_what_passes_need() -> None:
    """1F1B's fullest rank is the second one: p - 1 micro-batches of its two blocks, a running BW, and messages."""
    embedding, block, head = (SMALL.layers[place] for place in (0, 1, -1))
    message, running = 2 * SMALL.tokens * SMALL.shape.hidden, block.working[2]
    first = 18 * (embedding.parameters + block.parameters) + 16 * (embedding.after_forward + block.after_forward)
    second = 2 * (18 * block.parameters + 15 * block.after_forward)
    assert first + max(embedding.working[2], running) < second
    in_transit, rest = divmod(step("1f1b", SMALL).memory - second - running, message)
    assert 1 <= in_transit <= 6 and rest == 0
    # v-half keeps (p + 2) // 2 micro-batches of two blocks, some of them behind their B.
    most = 2 * (18 * block.parameters + 9 * block.after_forward)
    least = most - 9 * 2 * (block.after_forward - block.after_backward)
    assert least <= step("v-half", SMALL).memory <= most + running + 6 * message
    shared = [of_rank.total for of_rank in replace(SMALL, tensor=2, data=4).state(linear(16))]
    assert shared[1] == (6 + 12 / 4) / 2 * 2 * block.parameters
    assert shared[-1] == (6 + 12 / 4) / 2 * (block.parameters + head.parameters)


def test_data_parallel_ranks_reduce_after_the_passes() -> None:
    """Three quarters of the fullest rank's gradients (fp32) and weights (bf16), at the bandwidth between nodes."""
    embedding, block = SMALL.layers[:2]
    fullest = max(embedding.parameters + block.parameters, 2 * block.parameters) / 2
    shared = replace(SMALL, data=4, tensor=2)
    alone = step("1f1b", replace(shared, data=1))
    assert step("1f1b", shared).seconds - alone.seconds == pytest.approx(0.75 * 6 * fullest / 20e9)
    assert step("1f1b", shared).bubble == alone.bubble


def test_layouts_use_all_gpus_and_the_whole_batch() -> None:
    found = list(layouts(SMALL, 64, [1, 4]))
    assert {(each.ranks, each.tensor) for each in found} >= {(16, 1), (8, 2), (4, 4), (2, 8)}
    for each in found:
        assert each.ranks * each.tensor * each.data == 16
        assert each.micro_batches * each.samples * each.data == 64
    few = [each for each in found if each.ranks == 4]
    assert best_layout("1f1b", few, memory=1e9) is None
    assert best_layout("1f1b", few, memory=1e15) == max(
        ((each, step("1f1b", each)) for each in few), key=lambda pair: pair[1].mfu)


@pytest.mark.parametrize(("name", "instructions", "communicators"), [
    # Inner ranks of 1F1B: F and BW of each micro-batch with post, await, send and release; and the loss is shared.
    ("1f1b", 16 * 2 * 5 + 1, 2 * 3),
    # Of a V twice that, and W of each chunk, which sends nothing; less where B and W run as one.
    ("v-half", 16 * 2 * 11 + 1, 2 * 3),
])
def test_plans_are_counted(name: str, instructions: int, communicators: int) -> None:
    cost = plan_cost(name, 4, 16)
    assert instructions * 0.9 < cost.instructions <= instructions
    assert cost.communicators == communicators
    assert cost.least_pass(1e-4) == pytest.approx(1e-4 * cost.instructions / cost.passes)
    assert min(cost.build, cost.lower, cost.check) > 0


def test_what_ranks_do_together_is_measured_as_far_as_they_come() -> None:
    cost = start_cost(3, 60)
    assert list(cost.seconds) == list(cost.cpu) == list(PARTS)
    assert min(cost.seconds.values()) > 0 and min(cost.cpu.values()) > 0
    assert len(start_cost(3, 0.0).seconds) < len(PARTS)


def test_planning_and_limits_make_no_groups_of_all_ranks() -> None:
    """Each connects every rank with every other one."""
    assert groups_of_all("adaptive@0.75") == groups_of_all("v-half") == {"ds_vshape": 2, "others": 2}


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "steps.json"
    monkeypatch.setattr(sys, "argv", ["scale.py", "paper", "--models", "9.6B", "--micro-batches-per-rank", "2",
                                      "--schedules", "1f1b", "v-half", "gpipe", "--samples", "16",
                                      "--json", str(written)])
    scale.main()
    [model] = json.loads(written.read_text())["results"]
    steps = {each["schedule"]: each for each in model["steps"]}
    assert steps["v-half"]["memory"] < 80 * scale.GIB < steps["1f1b"]["memory"] < steps["gpipe"]["memory"]
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if len(line.split()) > 2}
    assert ["OOM" in lines[name] for name in ("1f1b", "v-half", "gpipe")] == [True, False, True]
