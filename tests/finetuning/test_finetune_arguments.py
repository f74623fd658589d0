"""The command line of launch/finetune.py."""

from __future__ import annotations

import pytest
from finetune import arguments

WORDS = ["--model", "model", "--output", "output"]


@pytest.mark.parametrize("words, needed, told", [
    (["--save_every", "2"], ["--checkpoints", "folder"], "--save_every 2: must come with --checkpoints"),
    (["--validation", "rows.jsonl"], ["--data", "rows.jsonl"], "--validation rows.jsonl: must come with --data"),
    (["--packed"], ["--data", "rows.jsonl"], "--packed True: must come with --data"),
    (["--warmup", "0.1"], ["--learning_rate", "cosine"], "--warmup 0.1: must come with --learning_rate"),
])
def test_an_option_without_effect_is_an_error(words: list[str], needed: list[str], told: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments([*WORDS, *words])
    assert told in capsys.readouterr().err
    assert arguments([*WORDS, *words, *needed])
