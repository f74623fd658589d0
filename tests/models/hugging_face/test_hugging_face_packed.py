"""Several samples in a row: transformers' losses of the same rows, and of the samples alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import BATCHES, MICRO_BATCHES, Case, model_config, pipelines_of
from tiny_model import save_tiny_model, tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ds_vshape
from ds_vshape.models.hugging_face import PARTITION_METHOD, load_weights, next_token_loss, pipeline_layers

SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
# Of the samples of each row; all rows have 16 tokens.
LENGTHS = ((16,), (4, 12), (1, 8, 7))


@dataclass(frozen=True)
class Packed(Case):
    """Rows of several samples."""

    def micro_batch(self, batch: int, number: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """((ids, position ids), next tokens), of which the last of each sample has none."""
        generator = torch.Generator().manual_seed(1009 * batch + number)
        ids = torch.randint(1, 9, (len(LENGTHS), 16), generator=generator)
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1))
        positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
        labels[torch.nn.functional.pad(positions[:, 1:], (0, 1)) == 0] = -100
        return (ids, positions), labels

    def module(self) -> Any:
        layers = pipeline_layers(AutoConfig.from_pretrained(self.folder), self.attention, packed=True)
        module = ds_vshape.PipelineModule(layers, num_stages=self.stages, loss_fn=next_token_loss,
                                          partition_method=PARTITION_METHOD, config=self.job.ds_config())
        assert load_weights(module, self.folder) == []
        return module


def samples_of(inputs: tuple[Tensor, ...], labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of each sample [1, length]."""
    return [(ids[None], following[None])
            for row, lengths in enumerate(LENGTHS)
            for ids, following in zip(inputs[0][row].split(lengths), labels[row].split(lengths), strict=True)]


def train_alone(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of transformers' model, which sees each sample by itself."""
    model = AutoModelForCausalLM.from_pretrained(case.folder, attn_implementation=case.attention).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in range(BATCHES):
        total = 0.0
        for inputs, labels in case.batch(batch):
            count = (labels != -100).sum()
            for ids, following in samples_of(inputs, labels):
                loss = torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits[0], following[0],
                                                         reduction="sum") / count / MICRO_BATCHES
                loss.backward()
                total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters())


@pytest.mark.slow
def test_rows_train_as_their_samples_alone(tmp_path: Path) -> None:
    """By SGD: Adam's steps are of full size where a gradient is zero but for rounding."""
    cases = []
    for name in ("llama", "gemma2", "qwen3-tied"):
        config = tiny_config("qwen3", tie_word_embeddings=True) if name == "qwen3-tied" else model_config(name)
        save_tiny_model(config, tmp_path / name)
        attention = "eager" if name == "gemma2" else "sdpa"
        cases += [Packed(tmp_path / name, schedule, attention=attention, config=SGD) for schedule in ("v-half", "v-zb")]
    outcomes = pipelines_of([(case, None) for case in cases])
    for case, outcome in zip(cases, outcomes, strict=True):
        losses, weights = train_alone(case)
        assert outcome.losses == pytest.approx(losses, rel=1e-5)
        for name, value in outcome.weights.items():
            assert torch.allclose(value, weights[name], atol=1e-4), (case, name)


def test_a_model_that_would_mix_samples_is_refused() -> None:
    """The state of a linear attention is carried from token to token."""
    config = tiny_config("qwen3_next", num_experts=4, moe_intermediate_size=16, linear_num_key_heads=2,
                         linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    with pytest.raises(ValueError, match="'qwen3_next' doesn't keep the samples of a row apart in decoder layer 0"):
        pipeline_layers(config, packed=True)
