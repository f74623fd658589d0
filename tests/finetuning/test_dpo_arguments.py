"""The command line of launch/dpo.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from dpo import arguments

WORDS = ["--model", "model", "--output", "output", "--data", "pairs.jsonl"]


def test_settings_of_finetune_and_of_the_loss() -> None:
    args = arguments([*WORDS, "--beta", "0.3", "--loss_type", "robust", "--label_smoothing", "0.1", "length=9"])
    assert (args.data, args.length, args.packed) == (Path("pairs.jsonl"), 9, False)
    assert (args.beta, args.loss_type, args.label_smoothing) == (0.3, "robust", 0.1)


@pytest.mark.parametrize("words, told", [
    (["packed=true"], "packed = True: must be left out with pairs"),
    (["--chunked_head"], "chunked_head = True: must be left out with pairs"),
    (["--beta", "-1"], "beta = -1.0: must be greater than 0"),
    (["--loss_type", "ipo", "--label_smoothing", "0.1"], "label_smoothing = 0.1: must be 0 with loss_type = 'ipo'"),
])
def test_what_is_wrong_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments([*WORDS, *words])
    assert told in capsys.readouterr().err


def test_pairs_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(WORDS[:4])
    assert "data = None: must be a file or folder of pairs" in capsys.readouterr().err
