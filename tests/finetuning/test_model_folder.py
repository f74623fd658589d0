"""What a fine-tuning needs of the folder of its model besides weights is told before they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from tiny_model import chat_tokenizer, tiny_config

from ds_vshape.finetuning.data import check_tokens, open_tokenizer, padding_of
from ds_vshape.models.hugging_face.folder import read_config


@pytest.mark.parametrize("name", ["none", "owner/name"])
def test_a_name_is_no_folder_and_nothing_is_downloaded(name: str) -> None:
    with pytest.raises(ValueError, match=f"^model = '{name}': must be a folder with config.json"):
        read_config(Path(name))


def test_a_config_that_transformers_does_not_know_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ValueError, match="^model = .*: its config.json can't be read .*unheard-of"):
        read_config(tmp_path)


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^model = .*: has no tokenizer that transformers can load"):
        open_tokenizer(tmp_path)


def test_tokens_that_the_model_does_not_have_are_told(tmp_path: Path) -> None:
    """A tokenizer got a token for which the embeddings weren't resized."""
    tiny_config("llama").save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    tokenizer, vocabulary = open_tokenizer(tmp_path)
    assert len(tokenizer) == vocabulary + 2
    check_tokens(Dataset.from_dict({"ids": [[1, 255], []]}), ("ids",), tokenizer, vocabulary)
    with pytest.raises(ValueError, match=r"vocab_size = 256 .*: must be at least 257, for the token '<\|im_end\|>'"):
        check_tokens(Dataset.from_dict({"ids": [[1, 255], [256]]}), ("ids",), tokenizer, vocabulary)
    tokenizer.pad_token = tokenizer.eos_token
    assert (padding_of(tokenizer, vocabulary), padding_of(tokenizer, vocabulary + 1)) == (0, 256)
