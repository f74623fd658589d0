"""Every pair of features together, on some schedule, against DeepSpeed's own engine on one stage.

The oracle has one stage, no split, no messages and no checkpointing, and everything else alike: the precision, ZeRO,
the replicas, the clipping. What is exact there must be exact here; the rows with a tolerance say why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from pairwise import Row, covering, pairs
from pipelines import LENGTH, SAMPLES, VOCABULARY, WIDTH, Job, Outcome, merged
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ds_vshape.module.dummy_parameter import NAME
from ds_vshape.schedule.named import ADAPTIVE, SCHEDULES

pytestmark = pytest.mark.slow

FACTORS: dict[str, list[Any]] = {
    "schedule": [*SCHEDULES, ADAPTIVE],
    "precision": ["fp32", "bf16", "fp16"],
    "zero": [0, 1],
    "accumulation": [None, "fp32"],
    "immediate": [False, True],
    "clipping": [0.0, 0.3],
    "checkpointing": [None, "deepspeed reentrant", "deepspeed non-reentrant", "torch reentrant", "torch non-reentrant"],
    "partition": ["uniform", "parameters", "type:Block", "costs"],
    "head": ["own", "tied"],
    "flow": ["tensor", "tuple"],
    "shapes": ["fixed", "dynamic", "reset"],
    "micro_batches": ["fewer than ranks", "as many", "more"],
    "ranks": [2, 4],
    "replicas": [1, 2],
    "deferred": ["matrices", "all"],
    "fusion": [False, True],
    "frozen": [None, "first layers", "all but LoRA"],
    "dropout": [False, True],
}
# Why, and what is left out.
EXCLUSIONS: dict[str, dict[str, set[Any]]] = {
    "refused: tests/engine/test_precisions.py":
        {"precision": {"fp16"}, "zero": {0}},
    "refused as well, by the same test":
        {"precision": {"bf16"}, "zero": {0}, "accumulation": {"fp32"}},
    "a key of bf16, of which DeepSpeed's other precisions know nothing":
        {"precision": {"fp32", "fp16"}, "immediate": {True}},
    "torch's own reentrant function gives no gradients where no input wants one, in one process too":
        {"checkpointing": {"torch reentrant"}, "frozen": {"first layers", "all but LoRA"}},
}
ROWS = covering(FACTORS, list(EXCLUSIONS.values()))
# The relative difference of losses where sums are taken in another order.
ROUNDING = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 2e-4}
BATCHES = 3
ROWS_A_RUN = 10


# -- the model


@dataclass(frozen=True)
class Kind:
    """The row's settings for a layer."""

    tuples: bool
    checkpointing: str | None = None
    dropout: bool = False
    frozen: bool = False
    lora: bool = False


class Embedding(nn.Embedding):
    """Vectors; in a tuple with a boolean mask, an integer, and a float that wants no gradient."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(VOCABULARY, WIDTH)
        self.kind = kind
        self.requires_grad_(not kind.frozen)

    def forward(self, tokens: Tensor) -> Any:
        x = super().forward(tokens)
        return (x, tokens > 5, tokens.sum(), x.new_full((2, 1), 0.5)) if self.kind.tuples else x


class Block(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.requires_grad_(not kind.frozen)
        if kind.lora:
            self.low, self.high = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 2 * WIDTH, bias=False)

    def forward(self, inputs: Any) -> Any:
        members = inputs if isinstance(inputs, tuple) else (inputs,)
        if (self.kind.checkpointing or "").startswith("torch"):
            x = checkpoint(self._work, *members, use_reentrant=self.kind.checkpointing == "torch reentrant")
        else:
            x = self._work(*members)
        return (x, *members[1:]) if isinstance(inputs, tuple) else x

    def _work(self, x: Tensor, mask: Tensor | None = None, total: Any = 1, scale: Any = 1.0) -> Tensor:
        normed = self.norm(x)
        inner = self.up(normed)
        if self.kind.lora:
            inner = inner + self.high(self.low(normed))
        change = self.down(functional.gelu(inner))
        if mask is not None:
            assert mask.dtype is torch.bool and total.dtype is torch.int64
            change = change.masked_fill(mask[..., None], 0.0) * (total % 3) * scale.mean()
        return x + (functional.dropout(change, 0.3, self.training) if self.kind.dropout else change)


class Head(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY)

    def forward(self, inputs: Any) -> Tensor:
        return super().forward(inputs[0] if isinstance(inputs, tuple) else inputs)


def tied_head(embedding: Embedding, inputs: Any) -> Tensor:
    return functional.linear(inputs[0] if isinstance(inputs, tuple) else inputs, embedding.weight)


def layers(row: Row) -> tuple[Any, ...]:
    """An odd number of blocks and two layers around them, which no number of stages divides."""
    tuples, dropout = row["flow"] == "tuple", row["dropout"]
    some, lora = row["frozen"] == "first layers", row["frozen"] == "all but LoRA"
    embedding = Kind(tuples, frozen=some or lora)
    blocks = [Kind(tuples, row["checkpointing"], dropout, some and place < 2 or lora, lora)
              for place in range(2 * row["ranks"] + 1)]
    middle = (LayerSpec(Block, kind) for kind in blocks)
    if row["head"] == "own":
        return LayerSpec(Embedding, embedding), *middle, LayerSpec(Head)
    return (TiedLayerSpec("embedding", Embedding, embedding), *middle,
            TiedLayerSpec("embedding", Embedding, embedding, forward_fn=tied_head))


# -- one row


def ds_config(row: Row) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": row["zero"]}, "gradient_clipping": row["clipping"],
                              "pipeline": {"use_reentrant": row["checkpointing"] != "deepspeed non-reentrant"}}
    if row["precision"] != "fp32":
        config[row["precision"]] = {"enabled": True}
    if row["precision"] == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    if row["immediate"]:
        config["bf16"]["immediate_grad_update"] = True
    if row["accumulation"]:
        config["data_types"] = {"grad_accum_dtype": row["accumulation"]}
    return config


def job(row: Row) -> tuple[Job, dict[str, Any]]:
    """What is to be trained, and the module's options."""
    section = {"name": row["schedule"], "deferred": row["deferred"], "gradient_accumulation_fusion": row["fusion"]}
    if row["schedule"] == ADAPTIVE:
        section |= {"memory_limit": 1.0, "planning_seconds": 0.2}
    costs = {"costs": [0.5, *(1.0 for _ in range(2 * row["ranks"] + 1)), 1.5]}
    options: dict[str, Any] = {"partition_method": costs if row["partition"] == "costs" else row["partition"],
                               "dynamic_shape": row["shapes"] == "dynamic"}
    if (row["checkpointing"] or "").startswith("deepspeed"):
        options |= {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
    return Job(section, row["ranks"], micro_batches(row), ds_config(row), layers(row)), options


def oracle_job(row: Row) -> tuple[Job, dict[str, Any]]:
    return Job(None, 1, micro_batches(row), ds_config(row), layers({**row, "checkpointing": None})), {}


def micro_batches(row: Row) -> int:
    return {"fewer than ranks": row["ranks"] - 1, "as many": row["ranks"], "more": 2 * row["ranks"] + 1}[
        row["micro_batches"]]


def data(engine: Any, batch: int, row: Row) -> Iterator[tuple[Tensor, Tensor]]:
    length = LENGTH if row["shapes"] == "fixed" else (3, 5, 2, 4)[batch]
    generator = torch.Generator().manual_seed(101 * batch + engine.grid.get_data_parallel_rank())
    for _ in range(engine.micro_batches):
        tokens = torch.randint(VOCABULARY, (SAMPLES, length + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def train(engine: Any, row: Row) -> Outcome:
    """The losses of all batches and of an evaluation, and the weights."""
    losses = []
    for batch in range(BATCHES + 1):
        if row["shapes"] == "reset":
            engine.reset_activation_shape()
        samples = data(engine, batch, row)
        losses.append(float(engine.train_batch(samples) if batch < BATCHES else engine.eval_batch(samples)))
    return Outcome(losses, {name: value.clone() for name, value in engine.module.state_dict().items()})


def train_rows(rank: int, rows: list[Row], oracle: bool) -> list[Outcome]:
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    ds_checkpointing.configure(None, partition_activations=False)
    outcomes = []
    for row in rows:
        print(f"row {ROWS.index(row)}: {row}")
        work, options = oracle_job(row) if oracle else job(row)
        outcomes.append(train(work.engine(**options), row))
    return outcomes


def outcomes_of(rows: list[Row], world: int, oracle: bool) -> list[Outcome]:
    results = run_ranks(world, train_rows, rows, oracle, timeout=240)
    return [merged(list(of_row)) for of_row in zip(*results, strict=True)]


def is_exact(row: Row) -> bool:
    """No sum is taken in another order: not that of a norm over ranks, not that of a tied weight's two gradients, not
    that of a product with what it is added to."""
    return not row["clipping"] and not row["fusion"] and (row["head"] == "own" or row["frozen"] is not None)


def runs() -> list[tuple[int, int, list[Row]]]:
    """Ranks, replicas and rows of each forked run."""

    def world(row: Row) -> tuple[int, int]:
        return row["ranks"], row["replicas"]

    return [(*of_world, some[start:start + ROWS_A_RUN]) for of_world, group in groupby(sorted(ROWS, key=world), world)
            for some in [list(group)] for start in range(0, len(some), ROWS_A_RUN)]


@pytest.mark.parametrize(["ranks", "replicas", "rows"], runs())
def test_rows(ranks: int, replicas: int, rows: list[Row]) -> None:
    ours, oracles = outcomes_of(rows, ranks * replicas, False), outcomes_of(rows, replicas, True)
    for row, outcome, oracle in zip(rows, ours, oracles, strict=True):
        outcome.weights.pop(NAME, None)
        assert outcome.weights.keys() == oracle.weights.keys(), row
        if is_exact(row):
            assert outcome.losses == oracle.losses, row
            assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), row
        else:
            assert outcome.losses == pytest.approx(oracle.losses, rel=ROUNDING[row["precision"]]), row


def test_every_pair_is_tried_or_excluded() -> None:
    tried = {pair for row in ROWS for pair in pairs(row)}
    excluded = {frozenset([(one, a), (other, b)]) for exclusion in EXCLUSIONS.values() if len(exclusion) == 2
                for (one, values), (other, others) in [exclusion.items()] for a in values for b in others}
    everything = {pair for one, values in FACTORS.items() for other, others in FACTORS.items() if one < other
                  for a in values for b in others for pair in pairs({one: a, other: b})}
    assert everything - excluded == tried
