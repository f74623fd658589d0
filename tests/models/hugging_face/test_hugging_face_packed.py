"""Several samples in a row: transformers' losses of the same rows, and of the samples alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import reads_of_batch
from hugging_face_models import BATCHES, MICRO_BATCHES, Case, model_config, pipelines_of
from ranks import RanksFailed, run_ranks
from tiny_model import save_tiny_model, tiny_config
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from varlen_attention import NAME, register, with_flash_attention

import ds_vshape
from ds_vshape.models.hugging_face import PARTITION_METHOD, load_weights, next_token_loss, pipeline_layers
from ds_vshape.models.hugging_face.packed import cu_seqlens

SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
# Of the samples of each row; all rows have 16 tokens.
LENGTHS = ((16,), (4, 12), (1, 8, 7))
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Packed(Case):
    """Rows of several samples."""

    # One more than there are.
    samples_per_row: int | None = 4

    def micro_batch(self, batch: int, number: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """((ids, position ids), next tokens), of which the last of each sample has none."""
        generator = torch.Generator().manual_seed(1009 * batch + number)
        ids = torch.randint(1, 9, (len(LENGTHS), 16), generator=generator)
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1))
        labels[torch.nn.functional.pad(POSITIONS[:, 1:], (0, 1)) == 0] = -100
        return (ids, POSITIONS.clone()), labels

    def module(self) -> Any:
        layers = pipeline_layers(AutoConfig.from_pretrained(self.folder), self.attention, packed=True,
                                 samples_per_row=self.samples_per_row)
        module = ds_vshape.PipelineModule(layers, num_stages=self.stages, loss_fn=next_token_loss,
                                          partition_method=PARTITION_METHOD, config=self.job.ds_config())
        assert load_weights(module, self.folder) == []
        return module


def samples_of(inputs: tuple[Tensor, ...], labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of each sample [1, length]."""
    return [(ids[None], following[None])
            for row, lengths in enumerate(LENGTHS)
            for ids, following in zip(inputs[0][row].split(lengths), labels[row].split(lengths), strict=True)]


def train_alone(case: Case, attention: str | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of transformers' model, which sees each sample by itself."""
    model = AutoModelForCausalLM.from_pretrained(case.folder, attn_implementation=attention).train()
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
        losses, weights = train_alone(case, case.attention)
        assert outcome.losses == pytest.approx(losses, rel=1e-5)
        for name, value in outcome.weights.items():
            assert torch.allclose(value, weights[name], atol=1e-4), (case, name)


@pytest.mark.slow_cases("gemma2", "qwen2", "gpt2")
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "gpt2"])
def test_cu_seqlens_train_what_masks_train(tmp_path: Path, name: str) -> None:
    """Through transformers' own code for flash attention, and through an attention of a name of its own. Gemma and Qwen
    have windows, Gemma caps scores; the code for flash attention takes GPT-2 in 16 bits alone."""
    save_tiny_model(model_config(name), tmp_path)
    masked = "eager" if name == "gemma2" else "sdpa"
    register()
    cases = [Packed(tmp_path, "v-half", attention=attention, config=SGD) for attention in (masked, NAME, FLASH)
             if name != "gpt2" or attention != FLASH]
    with with_flash_attention():
        reference, *others = pipelines_of([(case, None) for case in cases])
    losses, weights = train_alone(cases[0], masked)
    for outcome in others:
        assert outcome.losses == pytest.approx(losses, rel=1e-5)
        assert outcome.losses == pytest.approx(reference.losses, rel=1e-6)
        for key, value in outcome.weights.items():
            assert torch.allclose(value, weights[key], atol=1e-4), key
            assert torch.allclose(value, reference.weights[key], atol=1e-6), key


def reads(rank: int, case: Packed) -> dict[str, int]:
    return reads_of_batch(case.engine(), case.batch)


def test_cu_seqlens_are_not_read_on_the_host(tmp_path: Path) -> None:
    save_tiny_model(model_config("llama"), tmp_path)
    with with_flash_attention():
        for found in run_ranks(2, reads, Packed(tmp_path, "v-half", attention=FLASH)):
            assert set(found) <= {"AgreeOnBatch", "OptimizerStep"}, found


@pytest.mark.parametrize("samples", [3, 4, 16])
def test_cu_seqlens_are_those_of_transformers(samples: int) -> None:
    """With the end again, as often as there are fewer samples than there may be."""
    (expected, _), _ = prepare_fa_kwargs_from_position_ids(POSITIONS)
    found = cu_seqlens(POSITIONS, samples)
    assert found.dtype == expected.dtype and found.shape == (len(LENGTHS) * samples + 1,)
    assert found.tolist() == expected.tolist() + [POSITIONS.numel()] * (len(found) - len(expected))


def test_more_samples_than_said_are_refused(tmp_path: Path) -> None:
    save_tiny_model(model_config("llama"), tmp_path)
    with with_flash_attention(), pytest.raises(RanksFailed, match="samples_per_row = 2: a row has more samples"):
        run_ranks(2, reads, Packed(tmp_path, "v-half", attention=FLASH, samples_per_row=2))


def mixing_config() -> Any:
    """The state of a linear attention is carried from token to token."""
    return tiny_config("qwen3_next", num_experts=4, moe_intermediate_size=16, linear_num_key_heads=2,
                       linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)


def ignoring(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
    """An attention that knows nothing of samples."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


@pytest.mark.parametrize("attention", ["sdpa", FLASH, NAME])
def test_a_model_that_would_mix_samples_is_refused(attention: str) -> None:
    register()
    with with_flash_attention(), pytest.raises(ValueError, match=f"'qwen3_next' with attention = '{attention}' doesn't "
                                               "keep the samples of a row apart in decoder layer 0; must be False"):
        pipeline_layers(mixing_config(), attention, packed=True, samples_per_row=4)


def test_an_attention_that_would_mix_samples_is_refused() -> None:
    AttentionInterface.register("ignoring", ignoring)
    with pytest.raises(ValueError, match="'ignoring' doesn't keep the samples of a row apart in decoder layer 0"):
        pipeline_layers(model_config("llama"), "ignoring", packed=True, samples_per_row=4)


def test_how_many_samples_a_row_has_must_be_said() -> None:
    with with_flash_attention():
        with pytest.raises(ValueError, match=f"attention = '{FLASH}': must come with samples_per_row"):
            pipeline_layers(model_config("llama"), FLASH, packed=True)
        with pytest.raises(ValueError, match="samples_per_row = 0: must be at least 1"):
            pipeline_layers(model_config("llama"), FLASH, packed=True, samples_per_row=0)


def test_chunks_that_masks_alone_make_are_refused() -> None:
    """As Llama 4 has them."""
    with with_flash_attention(), pytest.raises(ValueError, match="attention_chunk_size = 8 with attention = 'flash"):
        pipeline_layers(tiny_config("llama", attention_chunk_size=8), FLASH, packed=True, samples_per_row=4)
