"""What is learned of texts and conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat import CHANGING, MARKED, conversation
from datasets import Dataset, DatasetDict
from tiny_model import CHAT_TEMPLATE, chat_tokenizer

from ds_vshape.finetuning.samples import read_rows, samples_of

ROWS = [{"text": "one"}, {"text": "two"}]


def learned_text(sample: dict[str, Any], tokenizer: Any) -> str:
    kept = [token for token, learned in zip(sample["ids"], sample["learned"]) if learned]
    return str(tokenizer.decode(kept))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_the_assistants_tokens_are_learned(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    rows = Dataset.from_list([{"messages": conversation("Hi <b>", "Höi!", "And?", "So.")}])
    sample, = samples_of(rows, tokenizer, 1000)
    assert tokenizer.decode(sample["ids"]) == tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert learned_text(sample, tokenizer) == "Höi!<|im_end|>\nSo.<|im_end|>\n"


def test_a_text_is_learned_with_its_end() -> None:
    tokenizer = chat_tokenizer()
    samples = samples_of(Dataset.from_list([{"text": "abc"}, {"text": "d<|im_end|>"}]), tokenizer, 1000)
    assert [learned_text(sample, tokenizer) for sample in samples] == ["abc<|im_end|>", "d<|im_end|>"]


def test_long_samples_are_cut_and_those_without_anything_to_learn_left_out() -> None:
    tokenizer = chat_tokenizer()
    rows = Dataset.from_list([{"messages": conversation("x" * 50, "late")},
                              {"messages": conversation("x", "abcdefgh" * 5)}])
    sample, = samples_of(rows, tokenizer, 40)
    assert len(sample["ids"]) == 40
    with pytest.raises(ValueError, match="of 2 rows none has a token to learn among the first 8"):
        samples_of(rows, tokenizer, 8)


def test_a_template_that_changes_what_was_said_is_refused() -> None:
    rows = Dataset.from_list([{"messages": conversation("a", "b", "c", "d", thought="hm")}])
    with pytest.raises(ValueError, match="message 1 otherwise when others follow"):
        samples_of(rows, chat_tokenizer(CHANGING), 100)


def test_files_of_every_kind(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.save_to_disk(str(tmp_path / "rows"))
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows"):
        assert read_rows(tmp_path / name).to_list() == ROWS


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\none\n")
    (tmp_path / "cut.jsonl").write_text('{"text": "one"}\n{"text": ')
    (tmp_path / "others.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "several"))
    for name, words in [("missing.jsonl", "isn't there: must be a file"),
                        ("rows.csv", "must be a file"),
                        (".", "a folder that datasets hasn't saved"),
                        ("several", "several datasets: name one of its folders, train, test"),
                        ("cut.jsonl", "cut.jsonl can't be read .*: each of its rows must be an object"),
                        ("others.jsonl", "has the columns question, answer: must have 'text' or 'messages'")]:
        with pytest.raises(ValueError, match=words):
            read_rows(tmp_path / name)


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize("rows, told", [
    ([], "rows.jsonl has no rows: must have at least one"),
    ([{"text": "a"}, {"text": None}], "rows.jsonl, row 2: text = None: must be a text"),
    ([{"text": "a"}, {"txt": "b"}], "row 2: text = None: must be a text"),
    ([{"text": 5}], "row 1: text = 5: must be a text"),
    ([{"messages": [USER]}, {"messages": []}], r"row 2: messages = \[\]: must be a list of messages"),
    ([{"messages": [USER]}, {"text": "a"}], "row 2: messages = None: must be a list of messages"),
    ([{"messages": "a"}], "row 1: messages = 'a': must be a list of messages"),
    ([{"messages": [{"from": "human", "value": "a"}]}], "row 1: messages holds {'from': .*}: must be a list"),
    ([{"messages": [USER, {"role": "assistant"}]}], "row 1: messages holds {'role': 'assistant'.*}: must be a list"),
])
def test_a_row_without_what_it_needs_is_told(rows: list[dict[str, Any]], told: str, tmp_path: Path) -> None:
    """Before anything is tokenized, with the row's number in its file."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=told):
        read_rows(tmp_path / "rows.jsonl")


def test_an_assistant_may_call_tools_without_words(tmp_path: Path) -> None:
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert len(read_rows(tmp_path / "rows.json")) == 1
