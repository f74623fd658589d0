"""The Trainer of transformers in a pipeline, compared with itself in one process."""

from __future__ import annotations

import importlib
import math
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat import MARKED, conversation
from ranks import run_ranks
from tiny_model import chat_tokenizer, save_tiny_model, tiny_config
from torch import Tensor, nn
from trainers import CONFIG, STEPS, arguments, collate, measured, rows, train_in_pipelines, train_plainly
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening, TrainerCallback
from varlen_attention import NAME, register

from ds_vshape.finetuning import PipelineTrainer
from ds_vshape.finetuning.trainer.micro_batches import most_samples

# An optimizer and a scheduler of the engine's own, as configs for the Trainer have them.
OF_ENGINE = {**CONFIG, "zero_optimization": {"stage": 1}, "train_batch_size": "auto", "gradient_clipping": "auto",
             "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto",
                                                       "weight_decay": "auto", "torch_adam": True}}}
SCHEDULED = {**CONFIG, "scheduler": {"type": "WarmupDecayLR", "params": {
    "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(tiny_config("llama", layers=4), folder)
    return folder


def assert_alike(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Logs with the same entries, equal to 1e-5; norms of gradients are sums in another order."""
    assert [entry.keys() for entry in found] == [entry.keys() for entry in wanted]
    assert sum("eval_loss" in entry for entry in found) == STEPS // 5
    for entry, other in zip(found, wanted):
        for name, value in other.items():
            assert entry[name] == pytest.approx(value, rel=1e-4 if name == "grad_norm" else 1e-5), (name, entry, other)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()  # type: ignore[no-any-return]


def test_trains_what_the_trainer_trains(tiny: Path, tmp_path: Path) -> None:
    """Epochs end in batches with fewer micro-batches, and these in fewer rows."""
    data = rows(67), rows(11, seed=1)
    others = {"gradient_accumulation_steps": 4}
    (wanted, weights), = run_ranks(1, train_plainly, tiny, tmp_path / "plain", *data, others)
    for log in run_ranks(2, train_in_pipelines, tiny, tmp_path, *data, 2, others):
        assert_alike(log, wanted)
    assert wanted[-1]["epoch"] > 2
    for name, weight in weights_of(tmp_path / "final").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config, others", [(CONFIG, {"label_smoothing_factor": 0.1, "activation_checkpointing": True}),
                                            (OF_ENGINE, {"weight_decay": 0.0})],
                         ids=["label smoothing", "the config's optimizer"])
def test_on_two_pipelines(config: dict[str, Any], others: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    data = rows(64), rows(12, seed=1)
    (wanted, weights), = run_ranks(1, train_plainly, tiny, tmp_path / "plain", *data,
                                   {**others, "gradient_accumulation_steps": 8})
    logs = run_ranks(4, train_in_pipelines, tiny, tmp_path, *data, 2,
                     {**others, "gradient_accumulation_steps": 4, "deepspeed": config})
    for log in logs:
        assert_alike(log, wanted)
    for name, weight in weights_of(tmp_path / "final").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=2e-5)


class Recorder(TrainerCallback):
    """Keeps which events came."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            self.events.append(name)
        return super().__getattribute__(name)


def resume(rank: int, model: Path, folder: Path, config: dict[str, Any]) -> tuple[Any, ...]:
    """The logs of a whole training, and of one that starts from its checkpoint; the evaluation before, at the best
    step, and after the best model has been loaded; the events."""
    saving = {"deepspeed": config, "gradient_accumulation_steps": 4, "save_strategy": "steps", "save_steps": 5,
              "save_total_limit": 2, "load_best_model_at_end": True,
              "learning_rate": 3e-2}  # so high that the best model isn't the last one

    def trainer(output: Path, **others: Any) -> Any:
        return PipelineTrainer(AutoModelForCausalLM.from_pretrained(model), arguments(output, **saving, **others),
                               data_collator=collate, train_dataset=rows(48), eval_dataset=rows(12, seed=1),
                               callbacks=[recorder])

    recorder = Recorder()
    whole = trainer(folder)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    events = recorder.events.copy()
    best = (whole.state.best_global_step, whole.state.best_metric, whole.evaluate()["eval_loss"])
    resumed = trainer(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{whole.state.best_global_step}"))
    return measured(whole), measured(resumed), before, best, events


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, SCHEDULED], ids=["", "the config's scheduler"])
def test_goes_on_from_a_checkpoint_bit_for_bit(config: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    for whole, resumed, before, (step, metric, after), events in run_ranks(2, resume, tiny, tmp_path, config):
        assert 5 <= step < STEPS and after == metric < whole[-3]["eval_loss"]
        assert whole[-4]["learning_rate"] < 3e-3  # of 3e-2, after so many steps as are planned
        # Besides the evaluation after the training, and the summary, a mean from the checkpoint on.
        assert whole[:-2] == resumed[:-1]
        assert before == pytest.approx(math.log(256), rel=0.01)  # the weights are random
        assert events.count("on_step_end") == STEPS and events.count("on_substep_end") == 3 * STEPS
        assert events.count("on_save") == events.count("on_evaluate") - 1 == STEPS // 5
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}", f"checkpoint-{STEPS}"}
    saved = weights_of(tmp_path / f"checkpoint-{step}")
    assert not torch.equal(saved["lm_head.weight"], weights_of(tmp_path / f"checkpoint-{STEPS}")["lm_head.weight"])


def flatten(rank: int, model: Path, output: Path, attention: str) -> list[dict[str, Any]]:
    """Of rows that hold all samples of their micro-batch; in evaluation those are more."""
    args = arguments(output, deepspeed=CONFIG, max_steps=2, eval_steps=2, gradient_accumulation_steps=2,
                     per_device_eval_batch_size=3)
    trainer = PipelineTrainer(AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention), args,
                              data_collator=DataCollatorWithFlattening(), train_dataset=rows(12),
                              eval_dataset=rows(6, seed=1))
    assert trainer.model.config._attn_implementation == attention
    trainer.train()
    return measured(trainer)


def test_rows_of_many_samples_need_no_masks(tiny: Path, tmp_path: Path) -> None:
    register()
    masked, apart = (run_ranks(2, flatten, tiny, tmp_path / attention, attention)[0] for attention in ("sdpa", NAME))
    assert len(masked) == 2 + 1 + 1
    for entry, other in zip(apart, masked, strict=True):
        assert entry == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("lengths, multiple, most", [(None, None, 3), ([[4, 2], [1, 2, 3]], None, 9), (None, 8, 10)])
def test_how_many_samples_a_row_may_have(lengths: list[list[int]] | None, multiple: int | None, most: int) -> None:
    from datasets import Dataset
    data = Dataset.from_list([{"input_ids": [1] * 6, **({"seq_lengths": of_row} if lengths else {})}
                              for of_row in lengths or [[6], [6]]])
    collator = SimpleNamespace(pad_to_multiple_of=multiple)
    assert most_samples(collator, [data, None, rows(2)], 3) == most


# -- TRL


def conversations() -> Any:
    from datasets import Dataset
    return Dataset.from_list([{"messages": conversation(f"What is {number}?", f"{number}, I say. " * (number % 3 + 1),
                                                        "Sure?", "Yes.")} for number in range(40)])


def supervise(rank: int, model: Path, output: Path, pipeline: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    from trl import SFTConfig, SFTTrainer

    warnings.simplefilter("ignore")  # TRL uses what transformers calls deprecated
    from ds_vshape.finetuning import PipelineSFTTrainer
    tokenizer = chat_tokenizer(MARKED)
    args = arguments(output, SFTConfig, **{"bf16": False, "gradient_accumulation_steps": 2, "max_steps": 6,
                                           "eval_steps": 3, "assistant_only_loss": True, **options},
                     **({"deepspeed": CONFIG} if pipeline else {}))
    kind: Any = PipelineSFTTrainer if pipeline else SFTTrainer
    trainer = kind(str(model), args, train_dataset=conversations(), eval_dataset=conversations().select(range(7)),
                   processing_class=tokenizer)
    trainer.train()
    if pipeline:
        trainer.save_model(str(output / "final"))
    return measured(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 128, "per_device_train_batch_size": 1,
                                          "per_device_eval_batch_size": 1}], ids=["padded", "packed"])
def test_trains_what_trl_trains(options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(MARKED)
    save_tiny_model(tiny_config("llama", layers=4, vocab_size=len(tokenizer)), tmp_path / "tiny")
    wanted, = run_ranks(1, supervise, tmp_path / "tiny", tmp_path / "plain", False, options)
    for log in run_ranks(2, supervise, tmp_path / "tiny", tmp_path / "piped", True, options):
        assert len(log) == len(wanted) == 6 + 2 + 1
        for entry, other in zip(log, wanted):
            for name in ("loss", "eval_loss", "learning_rate", "train_loss"):
                assert (name in entry) is (name in other)
                assert entry.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "piped" / "final").pad_token_id == tokenizer.eos_token_id


# -- what is refused

# What is wrong, and what the error says of it.
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no config": ({"deepspeed": None}, {}, "args.deepspeed = None: must be a DeepSpeed config with"),
    "no schedule": ({"deepspeed": {"zero_optimization": {"stage": 0}}}, {}, "pipeline_schedule is missing"),
    "batch size": ({"deepspeed": {**CONFIG, "train_batch_size": 7}}, {}, "train_batch_size = 7: must be 2, which is"),
    "ZeRO": ({"deepspeed": {**CONFIG, "zero_optimization": {"stage": 3}}}, {}, "zero_optimization.stage = 3: must be"),
    "clipping": ({"deepspeed": {**CONFIG, "gradient_clipping": 3.0}}, {}, "ds gradient_clipping=3.0 vs hf"),
    "batch finder": ({"auto_find_batch_size": True}, {}, "args.auto_find_batch_size = True: must be False"),
    "hub": ({"push_to_hub": True}, {}, "args.push_to_hub = True: must be False; upload the saved folder"),
    "noise": ({"neftune_noise_alpha": 5.0}, {}, "args.neftune_noise_alpha = 5.0: must be None"),
    "compile": ({"torch_compile": True}, {}, "args.torch_compile = True: must be False"),
    "lengths": ({"train_sampling_strategy": "group_by_length"}, {}, "must be 'random' or 'sequential'"),
    "evaluation": ({"bf16_full_eval": True}, {}, "args.bf16_full_eval = True: must be False"),
    "optimizer": ({"optim": "lomo"}, {}, "args.optim = 'lomo': must be one that steps by gradients alone"),
    "recomputation": ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}, {},
                      "args.activation_checkpointing_kwargs = {'offload': True}: must have none of offload"),
    "dispatching": ({"accelerator_config": {"dispatch_batches": True}}, {}, "dispatch_batches = True: must be None"),
    "uneven": ({"accelerator_config": {"even_batches": False}}, {}, "even_batches = False: must be True; all"),
    "splitting": ({"accelerator_config": {"split_batches": True}}, {}, "split_batches = True: must be False; a micro-"),
    "no rows": ({"per_device_train_batch_size": 0}, {}, "args.per_device_train_batch_size = 0: must be at least 1"),
    "no steps": ({"gradient_accumulation_steps": 0}, {}, "args.gradient_accumulation_steps = 0: must be at least 1"),
    "metrics": ({}, {"compute_metrics": print}, "compute_metrics = <built-in function print>: must be None"),
    "loss": ({}, {"compute_loss_func": print}, "compute_loss_func = .*: must be None; label_smoothing_factor"),
    "optimizers": ({}, {"optimizers": (1, None)}, r"optimizers = \(1, None\): must be \(None, None\)"),
    "stages": ({}, {"stages": 3}, "stages = 3: must divide the 1 ranks, or be 0"),
    "model": ({}, {"model": nn.Linear(2, 2)}, "model = a Linear: must be a folder, or a config or a model"),
    "name": ({}, {"model": "no/folder"}, "model = 'no/folder': must be a folder with config.json"),
}


class OwnLoss(PipelineTrainer):
    """With a loss that no pipeline computes."""

    def compute_loss(self, *_: Any, **__: Any) -> Any:
        raise AssertionError


def errors(rank: int, model: Path, output: Path) -> dict[str, str]:
    """What each wrong constructor says, or else the first evaluation."""
    found = {}
    for name, (of_arguments, others, _) in WRONG.items():
        try:
            args = arguments(output, **{"deepspeed": CONFIG, **of_arguments})
            PipelineTrainer(**{"model": model, "args": args, "data_collator": collate, "eval_dataset": rows(2),
                               **others}).evaluate()
        except (ValueError, TypeError) as error:
            found[name] = str(error)
    right = {"model": model, "args": arguments(output, deepspeed=CONFIG, eval_strategy="no"), "data_collator": collate}
    for name, attempt in {"method": lambda: OwnLoss(**right),
                          "prediction": lambda: PipelineTrainer(**right).predict(rows(2))}.items():
        try:
            attempt()
        except (TypeError, NotImplementedError) as error:
            found[name] = str(error)
    return found


def test_what_a_pipeline_cannot_do_is_refused(tiny: Path, tmp_path: Path) -> None:
    found, = run_ranks(1, errors, tiny, tmp_path)
    for name, (_, _, message) in WRONG.items():
        assert re.search(message, found.get(name, "")), (name, found.get(name))
    assert found["method"].startswith("OwnLoss.compute_loss is never called")
    assert found["prediction"].startswith("predict needs logits")


@pytest.mark.parametrize("missing, extra, name", [("accelerate", "finetuning", "PipelineTrainer"),
                                                  ("trl", "sft", "PipelineSFTTrainer")])
def test_a_missing_package_names_the_extra(missing: str, extra: str, name: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.startswith((f"{missing}.", "ds_vshape.finetuning."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"pip install 'ds-vshape\[{extra}\]'"):
        getattr(importlib.import_module("ds_vshape.finetuning"), name)
