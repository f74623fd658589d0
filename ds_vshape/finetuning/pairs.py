"""Preference pairs: a prompt, the answer that was chosen and the one that was rejected, as token ids and micro-batches.

A row of the data has "prompt", "chosen" and "rejected"; or "chosen" and "rejected" alone, which then start with the
prompt. All are texts, or all are conversations for the tokenizer's chat template. These are TRL's formats, and tokens
are those of its DPOTrainer (trl/trainer/dpo_trainer.py, data_utils.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ds_vshape.config.section import shown
from ds_vshape.finetuning.batches import IDS, LEARNED, padded
from ds_vshape.finetuning.data import check_tokens, first_rank_first, open_tokenizer, padding_of, parts
from ds_vshape.finetuning.formats import check_either
from ds_vshape.finetuning.samples import read_file

if TYPE_CHECKING:
    from datasets import Dataset

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"


class PairRows:
    """A pair in each row; inputs are ids [2 x rows, length], the chosen answers of all rows before the rejected ones.

    Labels are the tokens of the answers [2 x rows, length], IGNORE_INDEX elsewhere; with a `reference`, they are
    (these, the reference's log-probabilities [2 x rows]).

    Args:
        pairs: of columns "prompt", "chosen" and "rejected" with token ids.
        reference: log-probabilities [pairs, 2] of the chosen and the rejected answers by the reference model.
    """

    def __init__(self, pairs: Dataset, padding: int = 0, reference: Tensor | None = None) -> None:
        self._pairs = pairs
        self._padding = padding
        self._reference = reference

    def __len__(self) -> int:
        return len(self._pairs)

    def micro_batch(self, rows: Sequence[int]) -> tuple[Tensor, Any]:
        pairs = [self._pairs[row] for row in rows]
        ids, labels = padded([_sample(pair, answer) for answer in (CHOSEN, REJECTED) for pair in pairs], self._padding)
        if self._reference is None:
            return ids, labels
        return ids, (labels, self._reference[list(rows)].T.flatten())

    def tokens(self, row: int) -> int:
        pair = self._pairs[row]
        return sum(len(pair[PROMPT]) + len(pair[answer]) - 1 for answer in (CHOSEN, REJECTED))

    def with_reference(self, reference: Tensor) -> PairRows:
        """The same rows with the log-probabilities of a reference model."""
        return PairRows(self._pairs, self._padding, reference)

    def digest(self) -> str:
        """Of the token ids of all pairs."""
        found = hashlib.sha256()
        for pair in self._pairs:
            found.update(repr([pair[key] for key in (PROMPT, CHOSEN, REJECTED)]).encode())
        return found.hexdigest()


def _sample(pair: dict[str, list[int]], answer: str) -> dict[str, list[Any]]:
    prompt, ids = pair[PROMPT], pair[answer]
    return {IDS: prompt + ids, LEARNED: [False] * len(prompt) + [True] * len(ids)}


def open_pairs(training: Path, validation: Path | None, model: Path, length: int) -> tuple[PairRows, PairRows]:
    """Pairs to train and to evaluate on, whose prompt and answer have at most `length` + 1 tokens, for a row of
    `length`; otherwise as open_rows (data.py).

    Raises:
        ValueError: for files and folders that can't be used, for rows that aren't pairs, and for tokens that the
            model doesn't have.
    """
    with first_rank_first():
        tokenizer, vocabulary = open_tokenizer(model)
        rows = [pairs_of(each, tokenizer, length + 1) for each in parts(training, validation, read_pairs)]
        for part in rows:
            check_tokens(part, (PROMPT, CHOSEN, REJECTED), tokenizer, vocabulary)
    padding = padding_of(tokenizer, vocabulary)
    return PairRows(rows[0], padding), PairRows(rows[1], padding)


def read_pairs(path: Path) -> Dataset:
    """The rows of a file or folder, as read_file says.

    Raises:
        ValueError: as read_file does, and for a row that isn't a pair.
    """
    if path.suffix == ".jsonl" and path.is_file():
        _check(path, _lines(path))  # datasets wouldn't say which row has a value of another type
        return read_file(path)
    rows = read_file(path)
    _check(path, rows)
    return rows


def _lines(path: Path) -> Iterator[Any]:
    """What each line holds; datasets passes over empty ones and a byte order mark too."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} can't be read ({error}): must be UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, row {number}: isn't JSON ({error}): must be an object with {CHOSEN!r}, "
                         f"{REJECTED!r} and perhaps {PROMPT!r}") from None


def _check(path: Path, rows: Iterable[Any]) -> None:
    """Raise ValueError for the first row that isn't a pair in the form of the first one."""
    form: dict[str, bool] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: is a {type(row).__name__}: must be an object with {CHOSEN!r}, {REJECTED!r} and "
                             f"perhaps {PROMPT!r}")
        form = form or {key: isinstance(row.get(key), list) for key in (PROMPT, CHOSEN, REJECTED)
                        if key != PROMPT or key in row}
        for key, is_conversation in form.items():
            check_either(where, key, row.get(key))
            if isinstance(row[key], list) is not is_conversation:
                raise ValueError(f"{where}: {key} is {_kind(row[key])}: must be as in row 1")
        if PROMPT not in form and row.get(PROMPT) is not None:
            raise ValueError(f"{where}: {PROMPT} = {shown(row[PROMPT])}: must be absent as in row 1")
        if form[CHOSEN] is not form[REJECTED] or form[CHOSEN] < form.get(PROMPT, False):
            key = REJECTED if form[CHOSEN] is not form[REJECTED] else PROMPT
            raise ValueError(f"{where}: {key} is {_kind(row[key])}: must be as {CHOSEN}, {_kind(row[CHOSEN])}")
        if form[CHOSEN] and not _with_prompt(row)[PROMPT]:
            raise ValueError(f"{where}: {CHOSEN} and {REJECTED} start with other messages: must start with the same "
                             f"ones, or have them in {PROMPT!r}")


def _kind(value: Any) -> str:
    return "a list of messages" if isinstance(value, list) else "a text"


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a prompt of its own. As in TRL, a text as the prompt of conversations repeats what they start with,
    and a space before the first difference belongs to the answers."""
    chosen, rejected = row[CHOSEN], row[REJECTED]
    if PROMPT in row and isinstance(row[PROMPT], list) is isinstance(chosen, list):
        return row
    if isinstance(chosen, str):
        common = len(os.path.commonprefix([chosen, rejected]))
    else:
        common = next((place for place, (one, other) in enumerate(zip(chosen, rejected)) if one != other),
                      min(len(chosen), len(rejected)))
    # An answer has something of its own.
    common = min(common, len(chosen) - 1, len(rejected) - 1)
    if common > 0 and chosen[common - 1] == " ":
        common -= 1
    return {**row, PROMPT: chosen[:common], CHOSEN: chosen[common:], REJECTED: rejected[common:]}


def pairs_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
    """Token ids of the pairs in their order: prompt and answer are cut after `limit` tokens, and pairs whose prompt has
    as many are left out.

    Raises:
        ValueError: if no pair is left.
    """
    pairs = rows.map(partial(_tokens, tokenizer=tokenizer, limit=limit), remove_columns=rows.column_names, desc="pairs")
    pairs = pairs.filter(lambda prompt: len(prompt) < limit, input_columns=[PROMPT], desc="pairs")
    if not len(pairs):
        raise ValueError(f"of {len(rows)} pairs none has a prompt of fewer than {limit} tokens")
    return pairs


def _tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[int]]:
    row = _with_prompt(row)
    encoded = (_conversations if isinstance(row[CHOSEN], list) else _texts)(row, tokenizer)
    prompt, *answers = encoded
    # A chat template may show the prompt otherwise when an answer follows.
    common = min(len(os.path.commonprefix([prompt, answer])) for answer in answers)
    chosen, rejected = (answer[common:max(common, limit)] for answer in answers)
    return {PROMPT: prompt[:common], CHOSEN: chosen, REJECTED: rejected}


def _texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompt, and the prompt with each answer and the end of a text."""
    end = tokenizer.eos_token or ""
    answers = [answer if answer.endswith(end) else answer + end for answer in (row[CHOSEN], row[REJECTED])]
    return [list(tokenizer(row[PROMPT] + answer)["input_ids"]) for answer in ("", *answers)]


def _conversations(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    tools = row.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools,
               **(row.get("chat_template_kwargs") or {})}

    def ids(messages: list[Any], **others: Any) -> list[int]:
        shown: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **others, **options)
        return list(shown["input_ids"])

    return [ids(row[PROMPT], add_generation_prompt=True), *(ids(row[PROMPT] + row[key]) for key in (CHOSEN, REJECTED))]
