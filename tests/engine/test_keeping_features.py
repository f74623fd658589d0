"""Recomputation and offload together with every other feature: the same job without them, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec
from given_back import gives_back
from internals import count_rollbacks
from logged import Lines
from parallel_pipelines import parallel_engine
from pipelines import (BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, LENGTH, SAMPLES, VOCABULARY, WIDTH, Block,
                       Dropping, FrozenBlock, FrozenEmbedding, Job, data, post_validated, specs,
                       tied_specs)
from ranks import run_ranks
from tiny_model import tiny_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ds_vshape
from ds_vshape.models import gpt
from ds_vshape.models.gpt import GPTConfig, gpt_layers
from ds_vshape.models.hugging_face import PARTITION_METHOD, next_token_loss, pipeline_layers

BATCHES, SAVED = 4, 2
GPT = GPTConfig(layers=5, hidden=8, heads=2, length=LENGTH, vocabulary=VOCABULARY)
FP16_ZERO1 = {"fp16": {"enabled": True, "initial_scale_power": 34, "hysteresis": 1},
              "zero_optimization": {"stage": 1}}


class Remembering(Dropping):
    """A block with dropout and running statistics: those of a norm in place, others in new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean((0, 1)).to(self.seen.dtype)
        normed = self.batch_norm(x.transpose(1, 2).float()).transpose(1, 2)
        return super().forward(x) + 0.1 * (normed + self.seen).to(x.dtype)


class Recomputing(Block):
    """Recomputes by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


class Compiled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.compile(backend="aot_eager", fullgraph=True)


class Tokens(nn.Embedding):
    """Tokens -> (x, a mask, a count)."""

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens), tokens > 5, tokens.sum()


class Masked(Block):
    def forward(self, inputs: Any) -> Any:
        x, mask, count = inputs
        return super().forward(x.masked_fill(mask[..., None], 0.0)) * (count % 3), ~mask, count + 1


class Mixture(Block):
    """A mixture of experts, which replicas share."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = MoE(WIDTH, nn.Linear(WIDTH, WIDTH), 4, 2, capacity_factor=4.0, use_rts=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(super().forward(x))[0]  # type: ignore[no-any-return]


class Head(nn.Linear):
    def forward(self, inputs: Any) -> Tensor:
        return super().forward(inputs[0])


def remembering(blocks: int = 6) -> tuple[Any, ...]:
    return tuple(specs(blocks, Remembering))


def token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """Every third label doesn't count."""
    labels = torch.where(torch.arange(labels.numel()).view_as(labels) % 3 == 0, -100, labels)
    total = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


def lengths(engine: Any, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of several lengths."""
    generator = torch.Generator().manual_seed(batch)
    for number in range(engine.micro_batches):
        tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1 + (batch + number) % 3), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def padded(engine: Any, batch: int) -> Iterator[Any]:
    """((ids, mask), next tokens)."""
    generator = torch.Generator().manual_seed(batch)
    for number in range(engine.micro_batches):
        ids = torch.randint(1, 256, (SAMPLES, 8), generator=generator)
        mask = (torch.arange(8) < 8 - number % 3).expand(SAMPLES, 8).long()
        following = torch.where(mask.bool(), ids, -100)[:, 1:]
        yield (ids, mask), nn.functional.pad(following, (0, 1), value=-100)


def hugging_face(job: Job, family: str, **options: Any) -> Any:
    layers = pipeline_layers(tiny_config(family, 6, **options))
    module = ds_vshape.PipelineModule(layers, num_stages=job.stages, loss_fn=next_token_loss, seed_layers=True,
                                      partition_method=PARTITION_METHOD, config=job.ds_config())
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=job.ds_config())[0]


@dataclass(frozen=True)
class Case:
    """A job; how its engine is made, by default as the job says; its data; whether it is saved and goes on in another
    engine; whether some of its steps are taken back; what the log must say."""

    job: Job
    make: Callable[[Job], Any] = Job.engine
    batch: Callable[[Any, int], Iterator[Any]] = data
    interrupted: bool = False
    redone: bool = False
    said: str = ""


def trained(case: Case, folder: Path, seed: int | None) -> tuple[list[float], list[Any], int]:
    """Losses; weights, buffers and random numbers; how many steps were taken back. By the case's schedule, or where
    there is a seed, with memory given back."""
    torch.manual_seed(1)
    redone = 0

    def made() -> tuple[Any, list[int]]:
        engine = case.make(case.job)
        if seed is not None:
            engine.use_schedule(gives_back(engine.schedule(), seed))
        return engine, count_rollbacks(engine) if case.redone else [0]

    engine, counts = made()
    losses = []
    for batch in range(BATCHES):
        losses.append(float(engine.train_batch(case.batch(engine, batch))))
        if batch == SAVED - 1:
            losses.append(float(engine.eval_batch(case.batch(engine, 9))))
            if case.interrupted:
                engine.save_checkpoint(str(folder))
                redone += counts[0]
                engine, counts = made()
                engine.load_checkpoint(str(folder))
    if hasattr(engine, "settle"):
        engine.settle()
    # Also what isn't saved.
    tensors = [*engine.module.parameters(), *engine.module.buffers()]
    return losses, [*(tensor.detach().clone() for tensor in tensors), torch.get_rng_state()], redone + counts[0]


def without_and_with(rank: int, cases: dict[str, Case], folder: Path) -> None:
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    for seed, (name, case) in enumerate(cases.items()):
        print(name)
        losses, state, redone = trained(case, folder / f"{name} without", None)
        with Lines() as lines:
            given_back = trained(case, folder / f"{name} with", seed)
        assert given_back[0] == losses, name
        assert all(map(torch.equal, given_back[1], state)), name
        assert given_back[2] == redone and (redone > 0) == case.redone, (name, redone)
        assert rank or not case.said or lines.with_word(case.said), (name, lines.told)


def clipped(config: dict[str, Any], norm: float) -> dict[str, Any]:
    return {**config, "gradient_clipping": norm}


DYNAMIC = partial(Job.engine, dynamic_shape=True)
FROZEN = (LayerSpec(FrozenEmbedding), *(LayerSpec(FrozenBlock) for _ in range(3)), *specs(5)[1:])
TUPLES = (LayerSpec(Tokens, VOCABULARY, WIDTH), *(LayerSpec(Masked) for _ in range(6)),
          LayerSpec(Head, WIDTH, VOCABULARY))
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}

TWO_RANKS = {
    "post-validation": Case(post_validated(Job("v-zb", 2, 4, clipped(FP32_ZERO1, 2.4), remembering())), redone=True),
    "anomalies": Case(Job({"name": "v-half", "detect_anomaly": True}, 2, 4, FP32, remembering())),
    "verification": Case(Job({"name": "v-zb", "verify_gradients": True}, 2, 4, BF16_ZERO1_FP32, remembering()),
                         said="of whole backwards, bit for bit"),
    "token mean": Case(Job("v-half", 2, 4, FP32_ZERO1), partial(Job.engine, loss_fn=token_loss)),
    "tuples, lengths": Case(Job("zb-h1", 2, 4, FP32, TUPLES), DYNAMIC, lengths),
    "Hugging Face": Case(Job("v-half", 2, 4), partial(hugging_face, family="llama"), padded),
    "checkpoint": Case(Job("v-zb", 2, 4, BF16_ZERO1, remembering()), interrupted=True),
}
MORE_ON_TWO_RANKS = {
    "post-validation, fp16": Case(post_validated(Job("1f1b", 2, 4, clipped(FP16_ZERO1, 2.2), remembering())),
                                  redone=True),
    "post-validation, lengths": Case(post_validated(Job("v-half", 2, 4, clipped(FP32_ZERO1, 0.5))), DYNAMIC, lengths,
                                     redone=True),
    "post-validation, checkpoint": Case(post_validated(Job("v-zb", 2, 4, clipped(FP32_ZERO1, 2.4), remembering())),
                                        interrupted=True, redone=True),
    "verification and post-validation": Case(Job({"name": "v-half", "verify_gradients": True,
                                                  "optimizer_post_validation": True}, 2, 4, FP32_ZERO1, remembering()),
                                             said="of whole backwards, bit for bit"),
    "chunked head": Case(Job("v-half", 2, 4, FP32_ZERO1, tuple(gpt_layers(GPT, True))),
                         partial(Job.engine, loss_fn=gpt.loss_fn)),
    "autocast": Case(Job("v-zb", 2, 4, AUTOCAST, remembering())),
    "fp16": Case(Job("v-zb", 2, 4, FP16_ZERO1, remembering())),
    "frozen": Case(Job("v-half", 2, 4, FP32, FROZEN)),
    "fusion, norms in W": Case(Job({"name": "v-zb", "gradient_accumulation_fusion": True, "deferred": "all"}, 2, 4,
                                   BF16_ZERO1)),
    "tied": Case(Job("1f1b-v", 2, 4, FP32_ZERO1, tuple(tied_specs(6)))),
    "chunks": Case(Job({"name": "v-zb", "chunks": 4}, 2, 4, FP32_ZERO1, remembering(14))),
    "recomputing layers": Case(Job("v-half", 2, 4, FP32, tuple(specs(6, Recomputing)))),
    "compiled layers": Case(Job("v-half", 2, 4, FP32, tuple(specs(6, Compiled)))),
    "micro-batches in order": Case(Job({"name": "v-half", "micro_batch_order": "length"}, 2, 4), DYNAMIC, lengths),
    "Hugging Face, tied, sliding": Case(
        Job("v-zb", 2, 4, BF16_ZERO1), partial(hugging_face, family="gemma2", sliding_window=4), padded),
    "Hugging Face, experts": Case(
        Job("v-half", 2, 4), partial(hugging_face, family="qwen3_moe", num_experts=4, num_experts_per_tok=2,
                                     moe_intermediate_size=16, output_router_logits=True), padded),
}
FOUR_RANKS = {
    "v-half": Case(Job("v-half", 4, 8, FP32, remembering(14))),
    "v-zb": Case(post_validated(Job("v-zb", 4, 8, clipped(BF16_ZERO1, 1.0), remembering(14))), redone=True),
    "interleaved": Case(Job("interleaved-zb", 4, 8, FP32_ZERO1, remembering(14))),
    "replicas": Case(post_validated(Job("v-zb", 2, 4, clipped(FP32_ZERO1, 1.0), remembering())), interrupted=True,
                     redone=True),
    "replicas, token mean": Case(Job("v-half", 2, 4, BF16_ZERO1), partial(Job.engine, loss_fn=token_loss)),
    "tensor parallel": Case(Job("v-half", 2, 4, clipped(FP32_ZERO1, 0.5)), lambda job: parallel_engine(
        job, 1, "type:Block")),
    "experts of replicas": Case(Job("v-zb", 2, 4, FP32_ZERO1, tuple(specs(6, Mixture)))),
}


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, without_and_with, TWO_RANKS, tmp_path)


@pytest.mark.slow
def test_more_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, without_and_with, MORE_ON_TWO_RANKS, tmp_path, timeout=300)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    run_ranks(4, without_and_with, FOUR_RANKS, tmp_path, timeout=300)
