"""Compiled layers: torch.compile keeps each in one piece, whose weight gradients come in B; losses don't change."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from deepspeed.runtime.pipe.module import PipelineError
from logged import Lines
from pipelines import BATCHES, VOCABULARY, WIDTH, Block, Job, Outcome, PlainTraining, merged, train
from ranks import run_ranks
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ds_vshape.config.section import ConfigError

pytestmark = pytest.mark.slow


class InPlace(Block):
    """A block that compiles itself."""

    def __init__(self) -> None:
        super().__init__()
        self.compile(backend="aot_eager", fullgraph=True)


class Apart(nn.Module):
    """A block and a product after it."""

    backend: str | None = None

    def __init__(self) -> None:
        super().__init__()
        block = Block()
        self.block = block if self.backend is None else torch.compile(block, backend=self.backend, fullgraph=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x))  # type: ignore[no-any-return]


class Inside(Apart):
    """The block alone is compiled, within a layer that isn't."""

    backend = "aot_eager"


class ByInductor(Apart):
    backend = "inductor"


def layers(block: type[nn.Module]) -> tuple[Any, ...]:
    blocks = [LayerSpec(block)] * 4
    return (LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *blocks, LayerSpec(nn.Linear, WIDTH, VOCABULARY))


# How blocks are compiled: their class, and what engine.compile gets.
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any] | None]] = {
    "in place": (InPlace, None), "inside a layer": (Inside, None), "by the engine": (Block, {"backend": "aot_eager"}),
}
# Schedule, layers between checkpoints, reentrant.
WAYS = [("1f1b", 0, True), ("v-half", 0, True), ("v-zb", 1, True), ("v-half", 2, False)]


def train_compiled(rank: int, block: type[nn.Module], compiled: dict[str, Any] | None
                   ) -> list[tuple[Outcome, int, int, list[str]]]:
    """For each way the outcome, the graphs compiled in two batches and after them, and what is said of the split."""
    ds_checkpointing.configure(None, partition_activations=False)
    found = []
    for schedule, interval, reentrant in WAYS:
        job = Job(schedule, 2, 4, {"pipeline": {"use_reentrant": reentrant}}, layers(block))
        with Lines() as lines:
            engine = job.engine(activation_checkpoint_interval=interval)
            if compiled is not None:
                engine.compile(**compiled)
            torch._dynamo.reset()
            counters.clear()
            # In the second batch activations are measured, with hooks that a graph may be compiled anew for.
            train(engine, BATCHES[:2])
            first = counters["stats"]["unique_graphs"]
            outcome = train(engine, BATCHES[2:])
        found.append((outcome, first, counters["stats"]["unique_graphs"] - first, lines.with_word("gradients in W")))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers(kind: str) -> None:
    block, compiled = KINDS[kind]
    oracle = PlainTraining(Job(None, 2, 4, layers=layers(Apart if block is Inside else Block)))
    losses = oracle.train(BATCHES, 4).losses
    for way, *of_ranks in zip(WAYS, *run_ranks(2, train_compiled, block, compiled), strict=True):
        outcome = merged([outcome for outcome, *_ in of_ranks])
        assert outcome.losses == losses[2:], way
        for _, first, later, lines in of_ranks:
            # Torch compiles DeepSpeed's hooks of a non-reentrant checkpoint too, once for each.
            assert first > 0 and (later == 0 or way == WAYS[-1]), (way, "every batch compiles anew")
            if way[0] != "1f1b":
                line, = lines
                assert "up.weight" in line, (way, "which weights aren't split is said")


def train_by_inductor(rank: int, schedule: str) -> list[float]:
    return train(Job(schedule, 2, 2, layers=layers(ByInductor)).engine(), BATCHES).losses


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for CPUs")
def test_inductor() -> None:
    """Its fused kernels round in another way."""
    losses = PlainTraining(Job(None, 2, 2, layers=layers(Apart))).train(BATCHES, 2).losses
    for schedule in ("v-half", "v-zb"):
        assert run_ranks(2, train_by_inductor, schedule, timeout=300)[0] == pytest.approx(losses, rel=1e-4), schedule


def errors(rank: int) -> list[str]:
    found = []
    for job, error in [(Job("v-half", 2, 2), PipelineError),
                       (Job("v-half", 2, 2, {"compile": {"deepcompile": True}}), ConfigError)]:
        with pytest.raises(error) as caught:
            job.engine().compile(backend="aot_eager", compiled_autograd_enabled=True)
        found.append(str(caught.value))
    Job("1f1b", 2, 2).engine().compile(backend="aot_eager", compiled_autograd_enabled=True)
    return found


def test_what_would_undo_the_split_is_refused() -> None:
    for backward, passes in run_ranks(2, errors):
        assert backward.startswith("compiled_autograd_enabled = True: must be False with v-half")
        assert passes.startswith("compile.deepcompile = true: must be false")
