"""`"verify_gradients": true` changes nothing where the split is right, and ends the job where it isn't."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from pipelines import (BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, SAMPLES, VOCABULARY, WIDTH, Block, Dropping,
                       Job, head, micro_batch, tied_specs)
from ranks import RanksFailed, run_ranks
from test_meter import lines_of
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.config import read_section
from ds_vshape.schedule.fuse import with_whole_backwards
from ds_vshape.schedule.lowering import lower
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import check
from ds_vshape.schedule.timeline import Times
from ds_vshape.split_backward import SplitFunction

BATCHES = 5
FP16_ZERO1 = {"fp16": {"enabled": True, "initial_scale_power": 40}, "zero_optimization": {"stage": 1}}
ADAPTIVE = {"name": "adaptive", "memory_limit": 0.9, "planning_seconds": 0.5}


class Stateful(Block):
    """A block with state of all kinds: a norm's running statistics, counters, a tensor, a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.calls, self.seen = 0, [0.0]
        self.random, self.generator = random.Random(1), torch.Generator().manual_seed(2)
        self.mean = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.detach().sum()))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean((0, 1))
        noise = torch.rand(WIDTH, generator=self.generator) * self.random.random() / (self.calls + len(self.seen))
        normed = self.batch_norm(x.transpose(1, 2).float()).transpose(1, 2).to(x.dtype)
        return super().forward(x) + functional.dropout(normed, 0.3) * (noise + self.mean).to(x.dtype)


def layers(ranks: int = 2) -> tuple[Any, ...]:
    blocks = [LayerSpec(kind) for kind in (Stateful, Dropping, Block, Stateful, Block, Block)]
    return (LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *blocks, LayerSpec(nn.Linear, WIDTH, VOCABULARY))


def endless(replica: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches that draw random numbers on the host."""
    number = 0
    while True:
        tokens, labels = micro_batch(number, random.randrange(100), replica)
        yield (tokens + torch.randint(2, tokens.shape)) % VOCABULARY, labels
        number += 1


def state(engine: Any) -> list[Any]:
    """All that a batch changes: weights, buffers, moments, random numbers, state of layers, DeepSpeed's counters."""
    module, optimizer = engine.module, engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    found: list[Any] = [*module.state_dict().values(), torch.get_rng_state(), random.getstate()[1]]
    for of_weight in inner.state.values():
        found += [value for _, value in sorted(of_weight.items())]
    for layer in module.modules():
        if isinstance(layer, Stateful):
            found += [layer.calls, layer.seen, layer.mean, layer.random.getstate()[1], layer.generator.get_state()]
    found += [value for owner in (engine, optimizer) for name, value in sorted(vars(owner).items())
              if isinstance(value, (bool, int, float)) and name not in ("iteration",)]
    scaler = getattr(optimizer, "loss_scaler", None)
    return found + ([value for _, value in sorted(vars(scaler).items())] if scaler is not None else [])


def trained(job: Job, **options: Any) -> tuple[list[float], list[Any], list[str]]:
    random.seed(3)
    torch.manual_seed(4)
    engine = job.engine(**options)
    data = endless(engine.grid.get_data_parallel_rank())
    run = lambda: [float(engine.train_batch(data)) for _ in range(BATCHES)]  # noqa: E731
    losses, lines = lines_of(run, "verify_gradients")
    if hasattr(engine, "settle"):
        engine.settle()
    return losses, [*state(engine), next(data)[0]], lines


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def with_and_without(rank: int, cases: list[tuple[Any, dict[str, Any], dict[str, Any]]], micro_batches: int = 4,
                     specs: Any = None) -> list[list[str]]:
    told = []
    for section, config, options in cases:
        section = {"name": section} if isinstance(section, str) else section
        job = partial(Job, stages=2, micro_batches=micro_batches, config=config, layers=specs or layers())
        losses, without, nothing = trained(job(section), **options)
        verified_losses, verified, lines = trained(job({**section, "verify_gradients": True}), **options)
        assert verified_losses == losses and nothing == []
        assert len(verified) == len(without)
        differing = [place for place, pair in enumerate(zip(verified, without)) if not same(*pair)]
        assert not differing, (section, config, differing)
        told.append(lines)
    return told


EXACT = [("v-half", FP32, {}), ("v-zb", FP32_ZERO1, {}), ("zb-h1", BF16_ZERO1, {}), ("v-half", BF16_ZERO1_FP32, {}),
         ("v-half", BF16_ZERO0, {}), (ADAPTIVE, FP32_ZERO1, {}), ("v-zb", FP32, {"activation_checkpoint_interval": 1}),
         ("zb-h1", FP32, {"dynamic_shape": True})]


def test_nothing_changes_and_all_agrees_bit_for_bit() -> None:
    told, nothing = run_ranks(2, with_and_without, EXACT)
    assert nothing == [[] for _ in EXACT]
    for (line,), case in zip(told, EXACT, strict=True):
        assert "in training batch 3 the losses of 4 micro-batches and" in line and line.endswith("bit for bit"), case


def test_with_fusion_sums_agree_to_rounding() -> None:
    cases = [({"name": name, "gradient_accumulation_fusion": True}, config, {})
             for name, config in [("v-half", FP32), ("v-zb", BF16_ZERO1), ("zb-h1", BF16_ZERO1_FP32)]]
    told, _ = run_ranks(2, with_and_without, cases)
    assert all("bit for bit for" in line and "of their norm for the others" in line for line, in told)


def test_with_post_validation_and_replicas() -> None:
    ahead = {"name": "v-zb", "optimizer_post_validation": True}
    cases = [("v-half", FP32_ZERO1, {}), (ahead, {**FP32_ZERO1, "gradient_clipping": 0.1}, {}), ("v-half", FP32, {})]
    told = run_ranks(4, with_and_without, cases)[0]
    assert all(line.endswith("bit for bit") for line, in told)


def test_an_overflow_puts_it_off() -> None:
    """A loss scale that is too high by far: gradients are infinite in the first batches."""
    cases = [("v-half", FP16_ZERO1, {})]
    told = run_ranks(2, overflowing, cases)[0]
    assert told == [[]]


def overflowing(rank: int, cases: list[Any]) -> list[list[str]]:
    return with_and_without(rank, cases, specs=(*layers()[:1], *[LayerSpec(Block)] * 6, *layers()[-1:]))


def test_tied_layers() -> None:
    told = run_ranks(2, with_and_without, [("v-half", FP32, {}), ("zb-h1", FP32_ZERO1, {})], 4, tuple(tied_specs(6)))[0]
    assert all("bit for bit" in line for line, in told)
