"""LoRA: adapters trained by a pipeline, beside peft's own model in one process; their files, and what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import run_finetune
from hugging_face_models import (EVALUATED, Case, evaluate, model_config, pipelines_of, plain_outputs, tensors_in,
                                 train_plainly)
from lora_models import (PREFIX, SETTINGS, SMALL, AdaptedCase, assert_trained_alike, costs_of_frozen_weights, saved,
                         size_of)
from peft import IA3Config, LoraConfig, PeftModel
from pipelines import BF16_ZERO1, FP32_ZERO1, Job
from ranks import run_ranks
from safetensors.torch import save_file
from tiny_model import save_tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ds_vshape.models.gpt import seed_layer
from ds_vshape.models.hugging_face import pipeline_layers, save_model
from ds_vshape.models.hugging_face.lora import adapters_off
from ds_vshape.models.hugging_face.lora_files import load_adapter, read_config, save_adapter

# A name of transformers' that peft uses.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@dataclass(frozen=True)
class NewCase(Case):
    """New adapters on the model in `folder`."""

    lora: LoraConfig | None = None

    def layers(self) -> list[Any]:
        return pipeline_layers(AutoConfig.from_pretrained(self.folder), self.attention, lora=self.lora)


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("setting", ["plain", "dora", "modules_to_save", "experts"])
def test_with_adapters_off_a_model_is_its_base(setting: str, tmp_path: Path) -> None:
    folder, adapter = saved(setting, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = AdaptedCase(folder, "v-half", adapter=adapter).plain_model()
    trained = [weight.requires_grad for weight in model.parameters()]
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        with adapters_off(model):
            off = model(ids).logits
        assert torch.equal(off, base.train()(ids).logits) and not torch.allclose(off, model(ids).logits)
    assert [weight.requires_grad for weight in model.parameters()] == trained


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.quick_cases("plain")
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_trains_what_peft_trains(setting: str, tmp_path: Path) -> None:
    folder, adapter = saved(setting, tmp_path)
    cases = [AdaptedCase(folder, schedule, adapter=adapter) for schedule in ("v-half", "v-zb")]
    outputs = [tmp_path / str(place) for place in range(len(cases))]
    model = cases[0].plain_model()
    before = {name.removeprefix(PREFIX): value for name, value in model.named_parameters()}
    for case, outcome, output in zip(cases, pipelines_of(list(zip(cases, outputs))), outputs, strict=True):
        trained = assert_trained_alike(outcome, train_plainly(case), before)
        assert all("lora_" in name for name in trained) or setting in ("biases", "lora_only biases", "modules_to_save")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(output))
        loss, logits = evaluate(loaded, case)
        assert loss == outcome.evaluated
        assert torch.equal(logits, outcome.logits)
        assert tensors_in(output).keys() == tensors_in(adapter).keys()


def as_deepspeed_averages(schedule: str) -> dict[str, str]:
    """The section of a schedule whose batches are the mean of micro-batches, as DeepSpeed's own engine has them."""
    return {"name": schedule, "loss_average": "micro_batches"}


@pytest.mark.slow
def test_other_ranks_replicas_and_precisions(tmp_path: Path) -> None:
    """Four ranks in a V, and two replicas of two in bf16 with ZeRO, where DeepSpeed's own engine is the oracle."""
    folder, adapter = saved("plain", tmp_path)
    for case in (AdaptedCase(folder, schedule, stages=4, adapter=adapter) for schedule in ("v-half", "v-zb")):
        outcome, = pipelines_of([(case, None)], world=4)
        before = {name.removeprefix(PREFIX): value for name, value in case.plain_model().named_parameters()}
        assert_trained_alike(outcome, train_plainly(case), before)
    oracle, *others = pipelines_of([(AdaptedCase(folder, schedule, config=BF16_ZERO1, adapter=adapter), None)
                                    for schedule in (None, *map(as_deepspeed_averages, ("v-half", "v-zb")))], world=4)
    for outcome in others:
        assert outcome.losses == oracle.losses
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items())


@pytest.mark.slow
def test_dropout_of_adapters_does_not_depend_on_the_schedule(tmp_path: Path) -> None:
    """Where layers have seeds of their own, as in launch/finetune.py; checkpointed layers draw the same again."""
    folder, adapter = saved("plain", tmp_path, lora_dropout=0.3)
    seeds = {"seed_layers": True, "seed_fn": seed_layer}
    v_half, v_zb = map(as_deepspeed_averages, ("v-half", "v-zb"))
    kinds = [(None, 0), (v_half, 0), (v_zb, 0), (v_half, 1)]
    outcomes = pipelines_of([(AdaptedCase(folder, schedule, adapter=adapter, seeds=seeds, checkpointing=interval), None)
                             for schedule, interval in kinds])
    assert outcomes[0].losses != train_plainly(AdaptedCase(*saved("plain", tmp_path / "without")[:1], None,
                                                           adapter=tmp_path / "without" / "adapter")).losses
    for outcome in outcomes[1:]:
        assert outcome.losses == outcomes[0].losses
        assert all(torch.equal(outcome.weights[name], value) for name, value in outcomes[0].weights.items())


# -- what a frozen base costs


@pytest.mark.quick_cases("one layer")
@pytest.mark.parametrize("setting", ["plain", "one layer"])
def test_frozen_weights_cost_nothing(setting: str, tmp_path: Path) -> None:
    """No entry for W, no gradient, no optimizer state, and no bytes in checkpoints that leave them out; also where all
    adapters are in one layer, so that a rank, and most stages, train nothing."""
    folder, adapter = saved(setting, tmp_path)
    case = AdaptedCase(folder, "v-half", adapter=adapter)
    for told in run_ranks(2, costs_of_frozen_weights, case, tmp_path):
        assert bool(told["trained"]) or setting == "one layer"
        assert all("lora_" in name for name in told["trained"])
        assert told["deferred"] == told["gradients"] == told["trained"]
        assert told["optimizer"] == told["state"] == (told["trained"] or {"dummy"})
        assert told["losses"][0] == told["losses"][1]
    assert size_of(tmp_path / "True") < 0.5 * size_of(tmp_path / "False")


# -- files


def load_and_save(rank: int, case: AdaptedCase, folder: Path) -> None:
    case.save(case.module(), folder)


@pytest.mark.slow
def test_files_are_those_of_peft(tmp_path: Path) -> None:
    folder, adapter = saved("modules_to_save", tmp_path)
    run_ranks(2, load_and_save, AdaptedCase(folder, "v-half", adapter=adapter), tmp_path / "again")
    before, after = tensors_in(adapter), tensors_in(tmp_path / "again")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"adapter_config.json",
                                                                      "adapter_model.safetensors"}
    config, expected = (LoraConfig.from_pretrained(str(path)).to_dict() for path in (tmp_path / "again", adapter))
    assert config.pop("base_model_name_or_path") == str(folder)
    differing = {name for name, value in config.items() if value != expected[name]}
    assert differing <= {"task_type", "auto_mapping"}, "which say what kind of model it is"


@pytest.mark.slow
def test_new_adapters_change_nothing_yet(tmp_path: Path) -> None:
    """As peft draws them: their second weights are zero, DoRA's magnitudes follow from the base weights."""
    for setting in ("plain", "dora", "embeddings"):
        name, config = SETTINGS[setting]
        folder, _ = saved(setting, tmp_path / setting)
        run_ranks(1, save_new, folder, LoraConfig(**config), tmp_path / setting / "new")
        model = AutoModelForCausalLM.from_pretrained(folder)
        inputs = AdaptedCase(folder, None).micro_batch(EVALUATED, 0)[0]
        with torch.no_grad():
            plain = plain_outputs(model, inputs).logits
            adapted = plain_outputs(PeftModel.from_pretrained(model, str(tmp_path / setting / "new")), inputs).logits
        torch.testing.assert_close(adapted, plain)
        new = tensors_in(tmp_path / setting / "new")
        drawn = {name: bool(value.any()) for name, value in new.items() if "lora_A" in name or "lora_B" in name}
        assert all(value == ("lora_A" in name) for name, value in drawn.items())
        assert len({float(value.sum()) for name, value in new.items() if "lora_A" in name}) == sum(drawn.values())


def save_new(rank: int, folder: Path, config: LoraConfig, output: Path) -> None:
    case = NewCase(folder, "v-half", stages=1, config={}, lora=config)
    module = case.module()
    with pytest.raises(ValueError, match="the model has LoRA adapters: save_adapter"):
        save_model(module, AutoConfig.from_pretrained(folder), folder, output)
    save_adapter(module, folder, output)


# -- the program


@pytest.mark.slow
def test_the_program_trains_new_adapters_and_goes_on_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, settings = tmp_path / "source", tmp_path / "settings"
    save_tiny_model(model_config("llama"), source)
    LoraConfig(**SMALL).save_pretrained(str(settings))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(Job("v-half", 2, 4).ds_config()))
    adapter, losses = settings, []
    for output in (tmp_path / "first", tmp_path / "second"):
        words = ["--model", str(source), "--output", str(output), "--text", str(Path(__file__).parents[1]),
                 "--batches", "4", "--length", "16", "--lora", str(adapter), "--deepspeed_config", str(config)]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
        first, second = run_ranks(2, run_finetune, words)
        assert first == second
        losses.append(first)
        adapter = output
    assert all(later < earlier for earlier, later in zip(*losses, strict=True)), "of the same batches"
    assert tensors_in(tmp_path / "first").keys() == tensors_in(tmp_path / "second").keys()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(adapter))


@pytest.mark.slow
def test_adapters_continue_on_another_number_of_replicas(tmp_path: Path) -> None:
    """With ZeRO-1, two batches on two replicas and two on one are four on one, but for the order of a sum."""
    source, settings = tmp_path / "source", tmp_path / "settings"
    save_tiny_model(model_config("llama"), source)
    LoraConfig(**SMALL).save_pretrained(str(settings))

    def words(replicas: int, batches: int, name: str, checkpoints: str) -> list[str]:
        config = tmp_path / f"{replicas}.json"
        config.write_text(json.dumps(Job("v-half", 2, 4 // replicas, FP32_ZERO1).ds_config()))
        return ["--model", str(source), "--output", str(tmp_path / name), "--text", str(Path(__file__).parents[1]),
                "--batches", str(batches), "--length", "16", "--stages", "2", "--lora", str(settings),
                "--deepspeed_config", str(config), "--checkpoints", str(tmp_path / checkpoints), "--save_every", "2"]

    whole = run_ranks(2, run_finetune, words(1, 4, "whole", "of whole"))[0]
    run_ranks(4, run_finetune, words(2, 2, "begun", "of parts"))
    resumed = run_ranks(2, run_finetune, words(1, 4, "resumed", "of parts"))[0]
    assert resumed == pytest.approx(whole[2:], rel=1e-5)
    for name, weight in tensors_in(tmp_path / "whole").items():
        torch.testing.assert_close(tensors_in(tmp_path / "resumed")[name], weight, rtol=1e-4, atol=1e-5)


# -- what is refused


@pytest.mark.parametrize("name, config, message", [
    ("llama", {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': must be one of True, False, 'gaussian'"),
    ("llama", {"trainable_token_indices": [1]}, r"trainable_token_indices = \[1\]: must be None in a pipeline"),
    ("llama", {"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ("llama", {"inference_mode": True}, "inference_mode = True: must be False for training"),
    ("llama", {"target_modules": ["queries"]}, "queries"),  # peft's own words
    ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}, "name embedding or head, which share a weight"),
    ("llama-tied", {"modules_to_save": ["embed_tokens"]}, "name embedding or head, which share a weight"),
])
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_what_a_pipeline_cannot_adapt_is_refused(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_layers(model_config(name), lora=LoraConfig(**{**SMALL, **config}))


def test_tensor_parallel_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with pytest.raises(ValueError, match="lora with 2 tensor parallel ranks: must have 1"):
        pipeline_layers(model_config("llama"), tensor_group=object(), lora=LoraConfig(**SMALL))


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora = IA3Config: must be a peft.LoraConfig"):
        pipeline_layers(model_config("llama"), lora=IA3Config())  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        read_config(tmp_path)
    IA3Config().save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="peft_type = .*IA3: must be LORA"):
        read_config(tmp_path)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder, adapter = saved("plain", tmp_path)
    layers = nn.ModuleList(spec.build() for spec in pipeline_layers(AutoConfig.from_pretrained(folder),
                                                                    lora=LoraConfig(**SMALL)))
    load_adapter(layers, adapter)
    tensors = tensors_in(adapter)
    name = min(tensors)
    for stored, message in (({**tensors, "more": torch.ones(1)}, "holds besides the model's 1 tensors, more among"),
                            ({key: tensors[key] for key in tensors if key != name}, f"lacks 1 tensors, {name} among"),
                            ({**tensors, name: torch.ones(2, 3)}, rf"{name} is \[2, 3\] in")):
        save_file(stored, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_adapter(layers, adapter)
    with pytest.raises(FileNotFoundError, match="holds no adapter_model.safetensors"):
        load_adapter(layers, folder)
    plain = nn.ModuleList(spec.build() for spec in pipeline_layers(AutoConfig.from_pretrained(folder)))
    with pytest.raises(ValueError, match=r"the model has no adapters: must be made by pipeline_layers\(config, lora="):
        load_adapter(plain, adapter)


@pytest.mark.parametrize("module", ["lora", "lora_files"])
def test_a_missing_peft_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"ds_vshape.models.hugging_face.{module}")
    with pytest.raises(ImportError, match=r"pip install 'ds-vshape\[lora\]'"):
        importlib.import_module(f"ds_vshape.models.hugging_face.{module}")
