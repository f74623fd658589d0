"""What NCCL can't carry, on simulated GPUs: 16-bit integers travel as bytes, and a tensor that isn't on the GPU is one
error on every rank, before anything of its message is sent."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from pipelines import FP32, VOCABULARY, WIDTH, Block, Job, data
from ranks import run_ranks
from simulated_gpu.processes import run_on_gpus
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """Vectors, and the tokens as 16-bit integers."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)

    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens), tokens.to(torch.int16)


class Weighing(Block):
    """A block that weighs by the integers, which are left on the host where it's told so."""

    forgets = False

    def forward(self, inputs: Any) -> Any:
        x, tokens = inputs
        y = super().forward(x * (tokens.to(x.device) % 3)[..., None])
        return y, tokens.cpu() if Weighing.forgets else tokens


class Head(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY)

    def forward(self, inputs: Any) -> Any:
        return super().forward(inputs[0])


# Stages of a linear pipeline of two ranks, and of a V.
LAYERS = (LayerSpec(Embedding), *[LayerSpec(Weighing)] * 3, LayerSpec(Head))


def losses(rank: int, schedule: str, forgetful: dict[int, int]) -> tuple[list[float], list[str]]:
    """Of five batches: the losses of those that count, and the errors of the others. In some batches the rank of
    `forgetful` leaves its integers on the host."""
    engine = Job(schedule, 2, 3, FP32, LAYERS).engine()
    found, errors, batch = [], [], 0
    for attempt in range(5):
        Weighing.forgets = forgetful.get(attempt) == rank
        try:
            found.append(float(engine.train_batch(data(engine, batch))))
            batch += 1
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return found, errors


def test_16_bit_integers_cross() -> None:
    for schedule in ("zb-h1", "v-half"):
        assert run_on_gpus(2, losses, schedule, {}) == run_ranks(2, losses, schedule, {})


def test_a_tensor_on_the_host_is_one_error_on_every_rank() -> None:
    """In the first batch, in which shapes are announced, and in a later one; the batches around them count."""
    for schedule in ("zb-h1", "v-half"):
        expected = run_ranks(2, losses, schedule, {})[0][0]
        for found, errors in run_on_gpus(2, losses, schedule, {0: 0, 3: 0}, timeout=60):
            assert found == expected[:3]
            assert len(errors) == 2
            for error in errors:
                assert error.startswith("PipelineError: ")
                assert "a stage's output holds a int16 tensor of shape [2, 3] on cpu (member 1 of 2)" in error
