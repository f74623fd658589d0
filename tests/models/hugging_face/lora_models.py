"""LoRA adapters on Hugging Face models of random weights, to be trained beside peft's own model in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hugging_face_models import Case, Outcome, model_config
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_model import save_tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ds_vshape.models.hugging_face import pipeline_layers
from ds_vshape.models.hugging_face.lora_files import load_adapter, read_config, save_adapter
from ds_vshape.models.hugging_face.weights import named_weights
from ds_vshape.split_backward.store import Entry, WeightGradientStore
from ds_vshape.split_backward.weights import parameter_of

PREFIX = "base_model.model."
SMALL = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
# By what is special about it: the model and the settings of its adapters.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", SMALL),
    "all-linear": ("llama", {"r": 4, "target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "regex": ("qwen3", {"r": 4, "target_modules": r".*\.[1-6]\.self_attn\.(q|v)_proj"}),
    "patterns": ("llama", {**SMALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3},
                           "layers_to_transform": [0, 3, 7]}),
    "rslora": ("llama", {**SMALL, "use_rslora": True}),
    "dora": ("llama", {**SMALL, "use_dora": True}),
    "lora_bias": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "biases": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "lora_only biases": ("qwen2", {**SMALL, "bias": "lora_only"}),
    "modules_to_save": ("llama", {**SMALL, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "embeddings": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied": ("gemma2-tied", SMALL),
    "one layer": ("llama", {**SMALL, "layers_to_transform": [3]}),
    "experts": ("mixtral", {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
}


@dataclass(frozen=True)
class AdaptedCase(Case):
    """Trains the adapters in `adapter` on the model in `folder`."""

    adapter: Path = Path()

    def layers(self) -> list[Any]:
        return pipeline_layers(AutoConfig.from_pretrained(self.folder), self.attention, lora=read_config(self.adapter))

    def module(self) -> Any:
        module = super().module()
        load_adapter(module, self.adapter)
        return module

    def save(self, module: Any, folder: Path) -> None:
        save_adapter(module, self.folder, folder)

    def plain_model(self) -> Any:
        return PeftModel.from_pretrained(super().plain_model(), str(self.adapter), is_trainable=True).train()


def saved(setting: str, root: Path, **others: Any) -> tuple[Path, Path]:
    """A random model, and random adapters for it as peft saves them: none of their weights are zero."""
    name, config = SETTINGS[setting]
    folder, adapter = root / "model", root / "adapter"
    save_tiny_model(model_config(name), folder)
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder),
                           LoraConfig(**config, init_lora_weights=False, **others))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    return folder, adapter


def assert_trained_alike(outcome: Outcome, oracle: Outcome, before: dict[str, Tensor]) -> set[str]:
    """Returns the names of what has been trained."""
    expected = {name.removeprefix(PREFIX): value for name, value in oracle.weights.items()}
    assert outcome.losses == oracle.losses
    assert outcome.weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(outcome.weights[name], value), name
    changed = {name for name, value in before.items() if not torch.equal(value, outcome.weights[name])}
    trained = {name.removeprefix(PREFIX) for name, value in oracle.weights.items() if value.requires_grad}
    assert changed == trained
    return trained


def costs_of_frozen_weights(rank: int, case: AdaptedCase, root: Path) -> dict[str, Any]:
    """Trains two batches and saves the engine's checkpoint; a new engine continues from there."""
    deferred: set[nn.Parameter] = set()
    add = WeightGradientStore.add

    def record(store: WeightGradientStore, entry: Entry) -> None:
        deferred.update(parameter_of(target) for target in entry.targets if target is not None)
        add(store, entry)

    WeightGradientStore.add = record  # type: ignore[method-assign]
    engine = case.engine()
    stored = engine._accumulator
    gradients: set[str] = set()
    weights = named_weights(engine.module)
    step = engine._take_model_step

    def look(*args: Any, **kwargs: Any) -> Any:
        gradients.update(name for name, weight in weights.items() if weight.grad is not None)
        return step(*args, **kwargs)

    engine._take_model_step = look
    for batch in range(2):
        engine.train_batch(case.batch(batch))
    assert stored is engine._accumulator
    for exclude in (False, True):
        engine.save_checkpoint(str(root / str(exclude)), tag="two", exclude_frozen_parameters=exclude)
    third = float(engine.train_batch(case.batch(2)))
    again = case.engine()
    again.load_checkpoint(str(root / "True"), tag="two", load_module_strict=False)
    names = {id(weight): name for name, weight in weights.items()}
    return {
        "deferred": {names[id(weight)] for weight in deferred},
        "gradients": gradients,
        "optimizer": {names.get(id(weight), "dummy") for group in engine.optimizer.param_groups
                      for weight in group["params"]},
        "state": {names.get(id(weight), "dummy") for weight in engine.optimizer.state},
        "trained": {name for name, weight in weights.items() if weight.requires_grad},
        "losses": (third, float(again.train_batch(case.batch(2)))),
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("layer_*"))
