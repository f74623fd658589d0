"""launch/finetune.py on conversations: pipelines train what transformers' model trains in one process."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conversations import conversations
from finetune_runs import run_finetune
from pipelines import Job
from ranks import RanksFailed, run_ranks
from safetensors.torch import load_file
from tiny_model import chat_tokenizer, save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_vshape.finetuning.batches import MicroBatches, PackedRows, PaddedRows, Rows
from ds_vshape.finetuning.data import HELD_OUT, HELD_OUT_SEED
from ds_vshape.finetuning.samples import read_rows, samples_of
from ds_vshape.split_backward.head import IGNORE_INDEX

pytestmark = pytest.mark.slow

LENGTH = 128
SOURCE = """
def one(a, b=2):
    \"\"\"Add {number} to a.

    Not shown.\"\"\"

def _hidden():
    \"\"\"Not asked for.\"\"\"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and 40 conversations of different lengths."""
    folder = tmp_path_factory.mktemp("finetuning")
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    save_tiny_model(tiny_config("llama", vocab_size=len(tokenizer)), folder / "model")
    source = folder / "source"
    source.mkdir()
    for number in range(40):
        (source / f"m{number}.py").write_text(SOURCE.format(number="very " * (number % 7) + str(number)))
    found = list(conversations(source))
    assert found[0] == [{"role": "user", "content": "What does m0.one(a, b=2) do?"},
                        {"role": "assistant", "content": "Add 0 to a."}]
    assert len(found) == 40
    (folder / "data.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in found))
    return folder


def losses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str | None, *words: str,
           ranks: int = 2, micro_batches: int = 4) -> list[float]:
    """Of the batches, and the evaluation's."""
    config = tmp_path / f"{schedule}.json"
    output = tmp_path / f"{schedule}-{ranks}"
    config.write_text(json.dumps({**Job(schedule, 2, micro_batches).ds_config(), "train_micro_batch_size_per_gpu": 1}))
    words = ("--model", str(folder / "model"), "--output", str(output), "--stages", "2",
             "--deepspeed_config", str(config), "--data", str(folder / "data.jsonl"), "--length", str(LENGTH), *words)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    first, *others = run_ranks(ranks, run_finetune, list(words), timeout=200)
    assert all(other == first for other in others)
    return first


def plain_losses(folder: Path, packed: bool, epochs: int, micro_batches: int) -> list[float]:
    """Of batches of `micro_batches` rows, each of which is a mean over all of its tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # the job's "Adam" is AdamW in DeepSpeed
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = read_rows(folder / "data.jsonl").train_test_split(HELD_OUT, seed=HELD_OUT_SEED)["train"]
    samples = samples_of(rows, tokenizer, LENGTH + 1)
    made: Rows = PackedRows(samples, LENGTH) if packed else PaddedRows(samples)
    drawn = MicroBatches(made, 1, 0)
    losses = []
    for _ in range(math.ceil(epochs * len(made) / micro_batches)):
        batch = [next(drawn) for _ in range(micro_batches)]
        tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batch)
        total = 0.0
        for inputs, labels in batch:
            ids, positions = inputs if packed else (inputs, None)
            logits = model(ids, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("words", [(), ("--packed",)])
def test_conversations_train_as_transformers_trains_them(folder: Path, tmp_path: Path, words: tuple[str, ...],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = plain_losses(folder, bool(words), 2, 4)
    for schedule in ("v-half", "v-zb"):
        *ours, _ = losses(folder, tmp_path, monkeypatch, schedule, "--epochs", "2", *words)
        assert ours == pytest.approx(oracle, rel=1e-4)
    assert oracle[0] > oracle[-1]


def test_the_learning_rate_warms_up_from_zero(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first batch nothing changes."""
    before = load_file(folder / "model" / "model.safetensors")
    changed = []
    for number, words in enumerate([(), ("--learning_rate", "cosine", "--warmup", "1")]):
        (tmp_path / str(number)).mkdir()
        losses(folder, tmp_path / str(number), monkeypatch, "v-half", "--batches", "1", *words)
        after = {name: value for file in (tmp_path / str(number)).glob("v-half-2/*.safetensors")
                 for name, value in load_file(file).items()}
        assert after.keys() == before.keys()
        changed.append(not all(torch.equal(after[name], value) for name, value in before.items()))
    assert changed == [True, False]


def test_replicas_share_a_batch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas with two micro-batches each train what one trains with four."""
    alone = losses(folder, tmp_path, monkeypatch, "v-half", "--batches", "4")
    shared = losses(folder, tmp_path, monkeypatch, "v-half", "--batches", "4", ranks=4, micro_batches=2)
    assert shared[:-1] == pytest.approx(alone[:-1], rel=1e-4)


def test_what_is_wrong_with_data_is_told_on_every_rank(folder: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Before weights are looked for, which here aren't there either."""
    shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(RanksFailed) as failed:
        losses(folder, tmp_path, monkeypatch, "v-half", "--data", str(tmp_path / "none.jsonl"), "--model",
               str(tmp_path / "model"))
    assert str(failed.value).count("none.jsonl isn't there: must be a file") >= 2
