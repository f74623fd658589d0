"""launch/dpo.py on pairs: pipelines train what TRL's DPOTrainer trains in one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import run_dpo
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from pipelines import Job
from preferences import preferences
from ranks import RanksFailed, run_ranks
from safetensors.torch import load_file
from tiny_model import chat_tokenizer, save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from ds_vshape.finetuning.batches import MicroBatches
from ds_vshape.finetuning.data import parts
from ds_vshape.finetuning.dpo import METRICS
from ds_vshape.finetuning.pairs import read_pairs
from ds_vshape.finetuning.training import Result

# peft and TRL use names that transformers has deprecated.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

LENGTH, PAIRS, MICRO_BATCHES, BATCHES, BETA = 95, 2, 4, 10, 0.5
OPTIMIZER = {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.0, "torch_adam": True}}
ADAPTERS = {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, pairs of different lengths, and settings of adapters."""
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    save_tiny_model(tiny_config("llama", layers=4, vocab_size=len(tokenizer)), folder / "model")
    (folder / "source").mkdir()
    for number in range(41):
        (folder / "source" / f"m{number}.py").write_text(
            f'def f(a):\n    """Add {"very " * (number % 7)}{number} to a."""\n')
    pairs = list(preferences(folder / "source"))
    assert len(pairs) == 40
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # Adapters that compute something from the start: the reference is told apart.
    LoraConfig(**ADAPTERS, init_lora_weights=False).save_pretrained(str(folder / "new"))
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"),
                             LoraConfig(**ADAPTERS, init_lora_weights=False))
    adapted.save_pretrained(str(folder / "adapter"))
    return folder


@dataclass(frozen=True)
class Run:
    """Of launch/dpo.py in `folder`, as its options and its config say."""

    folder: Path
    tmp_path: Path
    monkeypatch: pytest.MonkeyPatch

    def results(self, name: str, *words: str, schedule: str | None = "v-half", ranks: int = 2,
                micro_batches: int = MICRO_BATCHES, config: dict[str, Any] | None = None) -> list[Result]:
        """Of all ranks."""
        file = self.tmp_path / f"{name}.json"
        file.write_text(json.dumps({**Job(schedule, 2, micro_batches).ds_config(), "optimizer": OPTIMIZER,
                                    "train_micro_batch_size_per_gpu": PAIRS, **(config or {})}))
        words = ("--model", str(self.folder / "model"), "--output", str(self.tmp_path / name), "--stages", "2",
                 "--deepspeed_config", str(file), "--data", str(self.folder / "pairs.jsonl"), "--length",
                 str(LENGTH), "--batches", str(BATCHES), "--beta", str(BETA), *words)
        self.monkeypatch.setattr(sys, "argv", ["dpo.py", *words])
        return run_ranks(ranks, run_dpo, list(words), timeout=200)

    def result(self, name: str, *words: str, **options: Any) -> Result:
        first, *others = self.results(name, *words, **options)
        assert all((other.losses, other.evaluations, other.metrics) ==
                   (first.losses, first.evaluations, first.metrics) for other in others)
        return first


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(folder, tmp_path, monkeypatch)


class Places:
    """Rows that are nothing but their places."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def micro_batch(self, rows: Any) -> tuple[list[int], Any]:
        return list(rows), None

    def tokens(self, row: int) -> int:
        return 0


class Recording(DPOTrainer):
    """Keeps the loss of each micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def trl_run(folder: Path, tmp_path: Path, model: Any, peft_config: Any = None,
            prepare: Callable[[Any], Any] = lambda model: None) -> Result:
    """Losses and metrics of the batches by TRL, in the order in which the pipeline has the pairs."""
    rows, _ = parts(folder / "pairs.jsonl", None, read_pairs)
    drawn = islice(MicroBatches(Places(len(rows)), PAIRS, 0), BATCHES * MICRO_BATCHES)
    args = DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
                     per_device_train_batch_size=PAIRS, gradient_accumulation_steps=MICRO_BATCHES, max_steps=BATCHES,
                     learning_rate=OPTIMIZER["params"]["lr"], lr_scheduler_type="constant", max_grad_norm=0.0,
                     train_sampling_strategy="sequential", max_length=LENGTH + 1, logging_steps=1, report_to="none",
                     save_strategy="no", disable_tqdm=True, beta=BETA)
    trainer = Recording(model=model, args=args, peft_config=peft_config,
                        train_dataset=rows.select([place for places, _ in drawn for place in places]),
                        processing_class=AutoTokenizer.from_pretrained(folder / "model"))
    prepare(trainer.model)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if METRICS[0] in entry]
    return Result([sum(trainer.losses[start:start + MICRO_BATCHES]) / MICRO_BATCHES
                   for start in range(0, BATCHES * MICRO_BATCHES, MICRO_BATCHES)],
                  metrics={entry["step"]: {name: entry[name] for name in METRICS} for entry in logged})


def assert_equal(ours: Result, oracle: Result) -> None:
    assert len(oracle.losses) == BATCHES and max(oracle.losses) - min(oracle.losses) > 0.01
    assert ours.losses == pytest.approx(oracle.losses, rel=1e-5)
    for batch, values in oracle.metrics.items():
        measured = ours.metrics[batch]
        assert {name: measured[name] for name in METRICS} == pytest.approx(values, rel=1e-3, abs=1e-5)


def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def test_trains_what_trl_trains(folder: Path, tmp_path: Path, run: Run) -> None:
    oracle = trl_run(folder, tmp_path, plain_model(folder))
    ours = {"v-half": run.result("v-half"),
            "1F1B of DeepSpeed": run.result("1f1b", schedule=None),
            "replicas": run.result("replicas", ranks=4, micro_batches=MICRO_BATCHES // 2),
            "tensor parallel": run.result("tensor", "--tensor_parallel", "2", ranks=4)}
    for result in ours.values():
        assert_equal(result, oracle)
        assert result.evaluations == pytest.approx(ours["v-half"].evaluations, rel=1e-5)
    assert ours["1F1B of DeepSpeed"].losses == ours["v-half"].losses


def test_new_adapters_have_the_base_as_reference(folder: Path, tmp_path: Path, run: Run) -> None:
    """As TRL's peft_config."""
    # In the first batch nothing changes.
    run.result("start", "--lora", str(folder / "new"), "--batches", "1", "--learning_rate", "cosine", "--warmup", "1")
    first = load_file(tmp_path / "start" / "adapter_model.safetensors")
    oracle = trl_run(folder, tmp_path, plain_model(folder), LoraConfig.from_pretrained(str(folder / "new")),
                     lambda model: set_peft_model_state_dict(model, first))
    assert_equal(run.result("lora", "--lora", str(folder / "new")), oracle)


def test_adapters_that_are_there_are_the_reference(folder: Path, tmp_path: Path, run: Run) -> None:
    """As TRL has it for a PeftModel."""
    model = PeftModel.from_pretrained(plain_model(folder), str(folder / "adapter"), is_trainable=True)
    oracle = trl_run(folder, tmp_path, model)
    assert_equal(run.result("lora", "--lora", str(folder / "adapter")), oracle)


def test_goes_on_from_a_checkpoint_bit_for_bit(folder: Path, run: Run, tmp_path: Path) -> None:
    """The reference is still the model that the whole training started from; it isn't computed again."""
    words = ["--save_every", "2", "--evaluate_every", "2"]
    whole = run.result("whole", "--checkpoints", str(tmp_path / "whole-checkpoints"), *words)
    kept = tmp_path / "parts" / "reference.safetensors"
    words += ["--checkpoints", str(kept.parent)]
    first = run.result("first", *words, "--batches", "4")
    made = kept.stat().st_mtime_ns
    second = run.result("second", *words)
    assert kept.stat().st_mtime_ns == made
    assert first.losses + second.losses == whole.losses
    assert {**first.metrics, **second.metrics} == whole.metrics
    assert {**first.evaluations, **second.evaluations} == whole.evaluations
    assert {"rewards/margins", "eval_rewards/margins"} <= whole.metrics[BATCHES].keys()
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "others.jsonl").write_text("".join(lines[::-1]))
    run.result("others", *words, "--data", str(tmp_path / "others.jsonl"))
    assert kept.stat().st_mtime_ns > made


def test_monitors_get_rewards_and_the_losses_of_pairs_alone(run: Run, tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "dpo"}
    result = run.result("monitored", "--batches", "3", config={"csv_monitor": monitor})

    def written(name: str) -> list[float]:
        lines = (tmp_path / "csv" / "dpo" / f"Train_Samples_{name}.csv").read_text().splitlines()[1:]
        return [float(line.split(",")[1]) for line in lines]

    assert written("eval_loss") == pytest.approx(list(result.evaluations.values()))
    assert written("rewards_margins") == [result.metrics[batch]["rewards/margins"] for batch in (1, 2, 3)]
    assert written("eval_rewards_margins") == [result.metrics[3]["eval_rewards/margins"]]


def test_what_is_wrong_with_a_pair_is_told_on_every_rank(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"chosen": "ab", "rejected": "ac"}\n{"chosen": "ab"}\n')
    with pytest.raises(RanksFailed) as failed:
        run.results("bad", "--data", str(tmp_path / "bad.jsonl"))
    assert str(failed.value).count("bad.jsonl, row 2: rejected = None: must be a text, or a list of messages") >= 2
