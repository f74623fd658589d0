"""Samples to fine-tune on: token ids, and which of them the model learns to produce.

A row of the data has "text", all of whose tokens are learned, or "messages", a conversation in the form that chat
templates take, of which the assistant's tokens are learned. The work is done by datasets and by the model's tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ds_vshape.finetuning.batches import IDS, LEARNED
from ds_vshape.finetuning.formats import check_messages, check_text

try:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError
except ImportError as error:
    raise ImportError("data to fine-tune on need datasets: pip install 'ds-vshape[finetuning]'") from error

TEXT, MESSAGES = "text", "messages"
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Where a chat template marks what the assistant says, as transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_rows(path: Path) -> Dataset:
    """The rows of a file or folder, as read_file says.

    Raises:
        ValueError: as read_file does, and for the first row that has no text, or no messages where it needs them.
    """
    rows = read_file(path)
    if not {TEXT, MESSAGES} & set(rows.column_names):
        raise ValueError(f"{path} has the columns {', '.join(rows.column_names)}: must have {TEXT!r} or {MESSAGES!r}")
    key, check = (MESSAGES, check_messages) if MESSAGES in rows.column_names else (TEXT, check_text)
    for number, row in enumerate(rows.select_columns([key]), 1):
        check(f"{path}, row {number}", key, row[key])
    return rows


def read_file(path: Path) -> Dataset:
    """The rows of a file, or of a folder that Dataset.save_to_disk has written.

    Raises:
        ValueError: for a path that holds neither, and for a file that can't be read.
    """
    if not path.exists():
        raise ValueError(f"{path} isn't there: must be {_LEGAL}")
    if path.is_dir():
        try:
            rows = load_from_disk(str(path))
        except FileNotFoundError:
            raise ValueError(f"{path} is a folder that datasets hasn't saved: must be {_LEGAL}") from None
        if isinstance(rows, DatasetDict):
            raise ValueError(f"{path} holds several datasets: name one of its folders, {', '.join(rows)}")
    elif path.suffix in _READERS:
        try:
            rows = load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        except DatasetGenerationError as error:
            raise ValueError(f"{path} can't be read ({error.__cause__ or error}): each of its rows must be an object "
                             "with the same keys, and with values of the same types") from None
        except (StopIteration, ValueError):  # what datasets raises for a file without rows
            raise ValueError(f"{path} has no rows: must have at least one") from None
    else:
        raise ValueError(f"{path}: must be {_LEGAL}")
    return rows


_LEGAL = f"a file {', '.join(f'*{suffix}' for suffix in _READERS)}, or a folder of Dataset.save_to_disk"


def samples_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
    """The samples of `rows` in their order, cut after `limit` tokens; those of which nothing is learned are left out.

    Raises:
        ValueError: for a conversation that the tokenizer can't show, and if no sample is left.
    """
    encode = partial(_conversation if MESSAGES in rows.column_names else _text, tokenizer=tokenizer, limit=limit)
    samples = rows.map(encode, remove_columns=rows.column_names, desc="tokens")
    # The first token is never a label.
    samples = samples.filter(lambda learned: any(learned[1:]), input_columns=[LEARNED], desc="samples")
    if not len(samples):
        raise ValueError(f"of {len(rows)} rows none has a token to learn among the first {limit}")
    return samples


def _text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[Any]]:
    ids = list(tokenizer(row[TEXT])["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return {IDS: ids[:limit], LEARNED: [True] * len(ids[:limit])}


def _conversation(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[Any]]:
    if _GENERATION.search(tokenizer.get_chat_template()):
        shown: Any = tokenizer.apply_chat_template(row[MESSAGES], return_dict=True, return_assistant_tokens_mask=True)
        ids, learned = shown["input_ids"], [bool(mask) for mask in shown["assistant_masks"]]
    else:
        ids, learned = _by_place(row[MESSAGES], tokenizer)
    return {IDS: ids[:limit], LEARNED: learned[:limit]}


def _by_place(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokens by the characters that they stand for, where the template doesn't say which are the assistant's."""
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer doesn't tell where its tokens are in the text, and its chat template has no "
                         "{% generation %}: one of the two must be")
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    shown = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = list(_assistants(messages, text, tokenizer))
    learned = [any(start <= first < stop for start, stop in spans) for first, _ in shown["offset_mapping"]]
    return shown["input_ids"], learned


def _assistants(messages: list[dict[str, str]], text: str,
                tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Where in `text` the assistant speaks: from behind the prompt for its message to the end of the message."""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = str(tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True))
        spoken = str(tokenizer.apply_chat_template(messages[:place + 1], tokenize=False))
        if not (text.startswith(spoken) and spoken.startswith(prompt)):
            raise ValueError(f"the chat template shows message {place} otherwise when others follow it: mark what the "
                             "assistant says by {% generation %} in the template")
        yield len(prompt), len(spoken)
