"""Preference pairs as token ids, as TRL's DPOTrainer has them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat import conversation
from datasets import Dataset
from tiny_model import chat_tokenizer
from trl import DPOConfig, DPOTrainer

from ds_vshape.finetuning.pairs import PairRows, pairs_of, read_pairs

QUESTION, GOOD, BAD = conversation("What is it?", "A cat.")[0], *(conversation("", word)[1] for word in ("A cat.", "?"))
# Shows the prompt otherwise when an answer follows.
THINKING = ("{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}{{ word }}"
            "{% if add_generation_prompt %}assistant:<think>{% endif %}")
FORMATS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
              {"prompt": "So", "chosen": " it ends.<|im_end|>", "rejected": ""}],
    "texts without prompt": [{"chosen": "The sky is blue.", "rejected": "The sky is green."},
                             {"chosen": "ab", "rejected": "abc"}, {"chosen": "same", "rejected": "same"}],
    "conversations": [{"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
                      {"prompt": conversation("a", "b", "c"), "chosen": [BAD], "rejected": [GOOD, QUESTION, BAD]}],
    "conversations without prompt": [{"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
                                     {"chosen": conversation("a", "b", "c", "d"),
                                      "rejected": conversation("a", "b", "c", "e")}],
    "too long": [{"prompt": "x" * 60, "chosen": "a", "rejected": "b"},
                 {"prompt": "x" * 20, "chosen": "a" * 60, "rejected": "b"}],
    "options of the template": [{"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD],
                                 "chat_template_kwargs": {"word": "really"}}],
}
LIMIT = 50


def trl_pairs(rows: Dataset, tokenizer: Any, folder: Path) -> list[list[list[int]]]:
    """Prompt, chosen and rejected tokens; TRL cuts them when it makes batches."""
    args = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, max_length=LIMIT)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    made = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train")
    return [[row["prompt_ids"], *(row[f"{key}_ids"][:LIMIT - len(row["prompt_ids"])] for key in ("chosen", "rejected"))]
            for row in made]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # in TRL
@pytest.mark.parametrize("template", [None, THINKING])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_trl(name: str, template: str | None, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(*filter(None, [template]))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORMATS[name]))
    rows = read_pairs(tmp_path / "pairs.jsonl")
    ours = [[row["prompt"], row["chosen"], row["rejected"]] for row in pairs_of(rows, tokenizer, LIMIT)]
    assert ours == trl_pairs(rows, tokenizer, tmp_path)
    assert len(ours) == len(FORMATS[name]) - (name == "too long")


def test_a_text_as_the_prompt_of_conversations_repeats_them(tmp_path: Path) -> None:
    """As in TRL's maybe_extract_prompt."""
    row = {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}
    with_text = Dataset.from_list([{"prompt": "What is it?", **row}])
    assert (pairs_of(with_text, chat_tokenizer(), LIMIT).to_list() ==
            pairs_of(Dataset.from_list([row]), chat_tokenizer(), LIMIT).to_list())


def test_a_micro_batch_has_the_chosen_answers_first() -> None:
    pairs = Dataset.from_list([{"prompt": [1, 2], "chosen": [3, 4], "rejected": [5]},
                               {"prompt": [6], "chosen": [7], "rejected": [8, 9, 10]}])
    ids, labels = PairRows(pairs, padding=0).micro_batch([1, 0])
    assert ids[:, :3].tolist() == [[6, 0, 0], [1, 2, 3], [6, 8, 9], [1, 2, 0]] and not ids[:, 3:].any()
    assert labels[:, :3].tolist() == [[7, -100, -100], [-100, 3, 4], [8, 9, 10], [-100, 5, -100]]
    reference = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    rows = PairRows(pairs).with_reference(reference)
    assert rows.micro_batch([1, 0])[1][1].tolist() == [-3.0, -1.0, -4.0, -2.0]
    assert [rows.tokens(row) for row in (0, 1)] == [3 + 2, 1 + 3]


@pytest.mark.parametrize("lines, told", [
    (['{"chosen": "a", "rejected": "b"}', "{"], "row 2: isn't JSON .*: must be an object with 'chosen'"),
    (['["a", "b"]'], "row 1: is a list: must be an object"),
    (['{"chosen": "a"}'], "row 1: rejected = None: must be a text, or a list of messages"),
    (['{"prompt": "a", "chosen": "a", "rejected": 3}'], "row 1: rejected = 3: must be a text"),
    (['{"chosen": "a", "rejected": []}'], r"row 1: rejected = \[\]: must be a text"),
    (['{"chosen": ["a"], "rejected": "b"}'], "row 1: chosen holds 'a': must be a text, or a list of messages"),
    (['{"chosen": [{"role": "user"}], "rejected": "b"}'], "row 1: chosen holds {'role': 'user'}: must be"),
    (['{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}'],
     "row 1: rejected is a text: must be as chosen, a list of messages"),
    (['{"prompt": [{"role": "user", "content": "a"}], "chosen": "a", "rejected": "b"}'],
     "row 1: prompt is a list of messages: must be as chosen, a text"),
    (['{"prompt": "a", "chosen": "a", "rejected": "b"}', '{"chosen": "a", "rejected": "b"}'],
     "row 2: prompt = None: must be a text"),
    (['{"chosen": "a", "rejected": "b"}', '{"prompt": "a", "chosen": "a", "rejected": "b"}'],
     "row 2: prompt = 'a': must be absent as in row 1"),
    (['{"chosen": "a", "rejected": "b"}', '{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}'],
     "row 2: chosen is a list of messages: must be as in row 1"),
    (['{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}'],
     "row 1: chosen and rejected start with other messages"),
])
def test_a_row_that_is_no_pair_is_named(lines: list[str], told: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, {told}"):
        read_pairs(path)


def test_lines_are_read_as_those_of_texts(tmp_path: Path) -> None:
    """Empty lines and a byte order mark are passed over."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"chosen": "a", "rejected": "b"}\n\n{"chosen": "c", "rejected": "d"}\n\n', encoding="utf-8-sig")
    assert read_pairs(path)["chosen"] == ["a", "c"]
    path.write_text("")
    with pytest.raises(ValueError, match=r"pairs\.jsonl has no rows: must have at least one"):
        read_pairs(path)
    path.write_text('{"chosen": "a", "rejected": "b"}', encoding="utf-16")
    with pytest.raises(ValueError, match=r"pairs\.jsonl can't be read .*: must be UTF-8"):
        read_pairs(path)


def test_other_files_are_checked_too(tmp_path: Path) -> None:
    Dataset.from_list([{"chosen": "a", "rejected": "b"}, {"chosen": "a"}]).to_parquet(str(tmp_path / "pairs.parquet"))
    with pytest.raises(ValueError, match=r"pairs\.parquet, row 2: rejected = None: must be a text"):
        read_pairs(tmp_path / "pairs.parquet")
    (tmp_path / "pairs.json").write_text('[{"chosen": "a", "rejected": ')
    with pytest.raises(ValueError, match=r"pairs\.json can't be read .*each of its rows must be an object with the"):
        read_pairs(tmp_path / "pairs.json")


def test_prompts_that_fill_all_rows() -> None:
    with pytest.raises(ValueError, match="of 1 pairs none has a prompt of fewer than 4 tokens"):
        pairs_of(Dataset.from_list([{"prompt": "four", "chosen": "a", "rejected": "b"}]), chat_tokenizer(), 4)
