"""GPT blocks whose sizes in bytes are counted by hand, jobs of them, and what the allocator gave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from pipelines import FP32, Job
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

SAMPLES, LENGTH, WIDTH, WORDS = 4, 32, 64, 256
# Bytes of [samples, length, width] in fp32.
UNIT = SAMPLES * LENGTH * WIDTH * 4


class Attention(nn.Module):
    """Self-attention in plain products, so that it is known what is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False) * 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        mixed: Tensor = self.out(weights @ self.value(x))
        return mixed


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first_norm(x))
        hidden: Tensor = x + self.scale.to(x.dtype) * self.down(functional.gelu(self.up(self.second_norm(x))))
        return hidden


# The input; the norms' outputs; query, key, value; the mix of values; what the second norm and gelu get; gelu's output;
# down's, which is multiplied by a buffer that wants no gradient, so isn't saved. Beside them two numbers a position
# from each norm, and the attention weights.
BLOCK_WHOLE = (1 + 2 + 3 + 1 + 1 + 4 + 4) * UNIT + 4 * (4 * SAMPLES * LENGTH + SAMPLES * LENGTH * LENGTH)
# Inputs of linears: the norms' outputs (one for three of them), the mix, gelu's. Gradients of query, key, value, out,
# up, down.
BLOCK_KEPT = (2 + 1 + 4) * UNIT + (3 + 1 + 4 + 1) * UNIT


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """The oracle: bytes that `run` leaves allocated on the host, and the most that it had at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    changes = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    del kept
    return now, most


def tokens(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield (torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator),
               torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator))


def job(schedule: Any, ranks: int, micro_batches: int, config: dict[str, Any] = FP32, blocks: int = 6) -> Job:
    layers = [LayerSpec(nn.Embedding, WORDS, WIDTH), *(LayerSpec(GPTBlock) for _ in range(blocks)),
              LayerSpec(nn.Linear, WIDTH, WORDS)]
    return Job(schedule, ranks, micro_batches, {**config, "train_micro_batch_size_per_gpu": SAMPLES}, tuple(layers))
