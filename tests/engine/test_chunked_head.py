"""A head in chunks of tokens in pipelines: the losses and weights of a head with whole logits, under every schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from pipelines import (BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, LENGTH, VOCABULARY, WIDTH, Job,
                       Outcome, data, merged, micro_batch, specs)
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.models import gpt
from ds_vshape.models.gpt import GPTConfig, gpt_layers
from ds_vshape.split_backward.head import HeadOutput, Projection

MODEL = GPTConfig(layers=5, hidden=8, heads=2, length=LENGTH, vocabulary=VOCABULARY)
BATCHES, MICRO_BATCHES = range(3), 4
FP16_ZERO1 = {"fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": 1}}


class UntiedHead(nn.Linear):
    """A biased head that leaves its logits to the loss."""

    def forward(self, hidden: Tensor) -> Any:
        return HeadOutput(hidden, Projection(self.weight, self.bias))


def of_tokens(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Any:
    """Every third label doesn't count; with an auxiliary loss."""
    labels = torch.where(torch.arange(labels.numel()).view_as(labels) % 3 == 0, -100, labels)
    if isinstance(outputs, HeadOutput):
        return outputs.loss(labels, num_items_in_batch), outputs.hidden.square().mean()
    hidden, logits = outputs
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / num_items_in_batch, hidden.square().mean()


class WithHidden(nn.Linear):
    """Logits, and what they are made of."""

    def forward(self, hidden: Tensor) -> Any:
        return hidden, super().forward(hidden)


def layers(chunked: bool, tied: bool) -> tuple[Any, ...]:
    if tied:
        return tuple(gpt_layers(MODEL, chunked))
    found = specs(5)
    found[-1].typename = UntiedHead if chunked else WithHidden
    found[-1].module_args = (WIDTH, VOCABULARY)
    return tuple(found)


def trained(rank: int, jobs: list[Job], tied: bool) -> list[Outcome]:
    get_accelerator().is_fp16_supported = lambda: True
    found = []
    for job in jobs:
        engine = job.engine(loss_fn=gpt.loss_fn if tied else of_tokens, **(
            {} if job.schedule is None or tied else {"loss_average": "tokens"}))
        losses = [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]
        evaluated, logits = engine.eval_batch(data(engine, 9), return_logits=True)
        losses.append(float(evaluated))
        if logits is not None and tied:
            assert logits.shape[-1] == VOCABULARY
        found.append(Outcome(losses, {name: value.clone() for name, value in engine.module.state_dict().items()}))
    return found


def check(jobs: list[Job], tied: bool, world: int, tolerance: float = 2e-6, of_weights: float = 1e-4) -> None:
    """Each with a chunked head against the same with whole logits."""
    both = [replace(job, layers=layers(chunked, tied)) for job in jobs for chunked in (True, False)]
    outcomes = [merged(list(of_ranks)) for of_ranks in zip(*run_ranks(world, trained, both, tied))]
    for job, ours, oracle in zip(jobs, outcomes[::2], outcomes[1::2], strict=True):
        about = f"{job.schedule} with {job.config}"
        assert ours.losses == pytest.approx(oracle.losses, rel=tolerance), about
        assert len(set(ours.losses)) > 1, (about, ours.losses, oracle.losses)
        for name, value in oracle.weights.items():
            difference = float((ours.weights[name] - value).float().norm() / value.float().norm())
            assert difference < of_weights, f"{name}: {about}"


SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "zero_allow_untested_optimizer": True}
CLIPPED = {**FP32_ZERO1, **SGD, "gradient_clipping": 0.3}


def test_losses_and_weights_are_those_with_whole_logits() -> None:
    """Tied and untied with a bias and the token mean; SGD, so that a wrong size of gradients shows."""
    fused = {"name": "v-half", "gradient_accumulation_fusion": True}
    check([Job("1f1b", 2, MICRO_BATCHES, {**FP32, **SGD}), Job(fused, 2, MICRO_BATCHES, CLIPPED)], True, 2)
    check([Job("v-zb", 2, MICRO_BATCHES, {**FP32, **SGD}), Job(fused, 2, MICRO_BATCHES, CLIPPED)], False, 2)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_under_every_schedule(tied: bool) -> None:
    names = ("gpipe", "1f1b", "1f1b-v", "zb-h1", "zb-h2", "v-min", "v-half", "v-zb")
    sections = [{"name": name, "gradient_accumulation_fusion": True} for name in names]
    later = [{"name": "v-zb", "gradient_accumulation_fusion": fusion, **more} for fusion in (False, True) for more in (
        {"optimizer_post_validation": True}, {"verify_gradients": True})]
    check([Job(section, 2, MICRO_BATCHES, CLIPPED) for section in (*sections, *later)], tied, 2)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_replicas_precisions_and_checkpoints(tied: bool) -> None:
    """In 16 bits whole logits give a loss in 16 bits, and gradients are rounded somewhere else."""
    fused = {"name": "v-half", "gradient_accumulation_fusion": True}
    exact = [{**FP32, **SGD}, CLIPPED, {**FP32_ZERO1, **SGD, "pipeline": {"activation_checkpoint_interval": 1}}]
    rounded = [{**config, **SGD} for config in (BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP16_ZERO1)]
    check([Job(fused, 2, MICRO_BATCHES, config) for config in exact], tied, 4)
    check([Job(fused, 2, MICRO_BATCHES, config) for config in rounded], tied, 4, 1e-2, 3e-2)


def profiled(rank: int) -> tuple[int, ...]:
    job = Job("v-half", 2, MICRO_BATCHES, layers=layers(True, True))
    engine = job.engine(loss_fn=gpt.loss_fn, partition_method="profile", example=micro_batch(0, 0, 0))
    assert min(engine.module.layer_times.costs) > 0
    return tuple(engine.module.parts)


def test_layers_are_profiled_with_it() -> None:
    """The last of them gives no tensors that another could take."""
    one, other = run_ranks(2, profiled)
    assert one == other and one[-1] == len(layers(True, True))


def changed(outputs: Any, labels: Tensor) -> Tensor:
    return 2 * gpt.loss_fn(outputs, labels)


def refused(rank: int) -> list[str]:
    job = Job("v-half", 2, MICRO_BATCHES, layers=layers(True, True))
    engine = job.engine(loss_fn=changed)
    errors = []
    for batch in range(2):
        with pytest.raises(Exception) as error:
            engine.train_batch(data(engine, batch))
        errors.append(str(error.value))
    return errors


def test_a_loss_that_is_multiplied_afterwards_is_an_error_on_every_rank() -> None:
    for errors in run_ranks(2, refused):
        assert all("the head's gradient is wrong by 1 of it" in error for error in errors)
