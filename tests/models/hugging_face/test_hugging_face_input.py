"""What users give that no Hugging Face model can be trained on: each is one error that says what is legal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import tensors_in
from ranks import run_ranks
from safetensors.torch import save_file
from tiny_model import TOKENS, save_tiny_model, tiny_config
from transformers import AutoConfig

import ds_vshape
from ds_vshape.models.hugging_face import PARTITION_METHOD, load_weights, pipeline_layers
from ds_vshape.models.hugging_face.weights import INDEX, SINGLE_FILE

IDS, ONES = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
POSITIONS = torch.arange(6).expand(2, 6)


def embedding(packed: bool) -> Any:
    return pipeline_layers(tiny_config("llama", 2), packed=packed)[0].build()


# -- the numbers of a micro-batch


@pytest.mark.parametrize("inputs, message", [
    (IDS[0], r"the shapes \[6\]: must be ids, ids and attention mask, or these two and position ids, each \[batch"),
    (IDS[:, :0], r"have the shapes \[2, 0\]: must be"),
    ((IDS, ONES[:, 1:]), r"have the shapes \[2, 6\], \[2, 5\]: must be"),
    ((IDS, torch.zeros(2, 1, 6, 6)), r"have the shapes \[2, 6\], \[2, 1, 6, 6\]: must be"),
    ((IDS, ONES, POSITIONS, POSITIONS), r"\[2, 6\], \[2, 6\], \[2, 6\], \[2, 6\]: must be"),
    ((IDS, POSITIONS), "an attention mask must hold 1 for tokens that count and 0 for others"),
    (IDS + TOKENS, r"the ids of a micro-batch must be tokens, from 0 to 255 \(vocab_size = 256\)"),
    (IDS - 2, "must be tokens, from 0 to 255"),
])
def test_inputs_of_another_form_are_refused(inputs: Any, message: str) -> None:
    layer = embedding(packed=False)
    assert layer(IDS).shape == (2, 6, 32)
    assert len(layer((IDS, ONES.float(), POSITIONS))) == 3
    with pytest.raises((ValueError, RuntimeError), match=message):
        layer(inputs)


@pytest.mark.parametrize("inputs, message", [
    (IDS, r"have the shapes \[2, 6\]: must be ids and position ids \(packed = True\)"),
    ((IDS, ONES, POSITIONS), r"\[2, 6\], \[2, 6\], \[2, 6\]: must be ids and position ids"),
    ((IDS, ONES), "packed = True: position ids must start at 0 in each row"),
])
def test_packed_rows_of_another_form_are_refused(inputs: Any, message: str) -> None:
    layer = embedding(packed=True)
    assert len(layer((IDS, POSITIONS))) == 2
    with pytest.raises((ValueError, RuntimeError), match=message):
        layer(inputs)


# -- files


def load(rank: int, folders: list[Path]) -> list[str]:
    """What is said of each."""
    told = []
    for folder in folders:
        module = ds_vshape.PipelineModule(pipeline_layers(AutoConfig.from_pretrained(folder)), num_stages=2,
                                          partition_method=PARTITION_METHOD)
        try:
            told.append(str(load_weights(module, folder)))
        except (OSError, ValueError) as error:
            told.append(str(error))
    return told


def last_shard(folder: Path) -> Path:
    return max(folder.glob("model-*.safetensors"))


def test_files_that_cannot_be_read_are_named_on_every_rank(tmp_path: Path) -> None:
    damages: list[tuple[Callable[[Path], Any], str]] = [
        (lambda folder: last_shard(folder).unlink(), "-of-00008.safetensors is missing, in which"),
        (lambda folder: last_shard(folder).write_bytes(last_shard(folder).read_bytes()[:100]),
         "-of-00008.safetensors can't be read: SafetensorError"),
        (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} can't be read: JSONDecodeError"),
        (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX} can't be read: KeyError: 'weight_map'"),
    ]
    folders = [tmp_path / f"{place}" for place in range(len(damages))]
    for (damage, _), folder in zip(damages, folders, strict=True):
        save_tiny_model(tiny_config("llama", 4), folder, max_shard_size="40KB")
        damage(folder)
    for told in run_ranks(2, load, folders):
        for (_, message), error, folder in zip(damages, told, folders, strict=True):
            assert message in error and str(folder) in error


def load_where_one_rank_has_no_files(rank: int, folder: Path, empty: Path) -> str:
    module = ds_vshape.PipelineModule(pipeline_layers(tiny_config("llama", 2)), num_stages=2,
                                      partition_method=PARTITION_METHOD)
    with pytest.raises((OSError, ValueError)) as error:
        load_weights(module, empty if rank else folder)
    return str(error.value)


def test_a_rank_without_files_ends_all(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama", 2), tmp_path / "whole")
    for told in run_ranks(2, load_where_one_rank_has_no_files, tmp_path / "whole", tmp_path / "empty", timeout=60):
        assert "holds neither model.safetensors nor" in told


def test_a_head_in_files_beside_the_embedding_that_it_is_tied_to(tmp_path: Path) -> None:
    """transformers trains another head for itself; the same one is no tensor that nobody knows."""
    save_tiny_model(tiny_config("llama", 2, tie_word_embeddings=True), tmp_path)
    tensors = tensors_in(tmp_path)
    head = tensors["model.embed_tokens.weight"].clone()
    for change, expected in ((0, "[]"), (1, "lm_head.weight in .* isn't model.embed_tokens.weight, and config.json "
                                            "says tie_word_embeddings = True: must be False there")):
        save_file({**tensors, "lm_head.weight": head + change}, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
        for told, in run_ranks(2, load, [tmp_path]):
            assert re.search(expected, told) if change else told == expected
