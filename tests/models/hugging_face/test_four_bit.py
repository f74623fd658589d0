"""QLoRA: adapters on a base of 4 bits, beside peft's own model on transformers' own base of 4 bits in one process."""

from __future__ import annotations

import importlib
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from finetune import arguments, finetune
from hugging_face_models import evaluate, model_config, pipelines_of, tensors_in, train_plainly
from lora_models import (PREFIX, SETTINGS, SMALL, AdaptedCase, assert_trained_alike, costs_of_frozen_weights, saved)
from peft import LoraConfig, PeftModel, get_peft_model
from pipelines import BF16_ZERO1, Job
from ranks import run_ranks
from safetensors.torch import save_file
from tiny_model import save_tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from varlen_attention import NAME, register

from ds_vshape.measure.accounting import parameter_bytes
from ds_vshape.models.hugging_face import load_weights, pipeline_layers
from ds_vshape.models.hugging_face.layers import Part
from ds_vshape.models.hugging_face.lora_files import read_config
from ds_vshape.models.hugging_face.weights import Checkpoint, named_weights

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
              pytest.mark.filterwarnings("ignore::UserWarning:peft.*")]

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DOUBLE = {"bnb_4bit_use_double_quant": True}
BF16 = {"bnb_4bit_compute_dtype": "bfloat16"}
# By what is special about it: the adapters (lora_models.py), the quantization, and whether files are of 4 bits already.
QUANTIZATIONS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "nf4": ("plain", NF4, False),
    "fp4, double": ("plain", {"load_in_4bit": True, **DOUBLE}, False),
    "computed in bf16": ("all-linear", {**NF4, **DOUBLE, **BF16}, False),
    "head too": ("plain", {**NF4, "llm_int8_skip_modules": ["model.layers.3.mlp"]}, False),
    "Conv1D": ("lora_bias", NF4, False),
    "biases of the base": ("one layer of qwen2", NF4, False),
    "dora": ("dora", NF4, False),
    "stored dora in bf16": ("dora", {**NF4, **DOUBLE, **BF16}, True),
    "stored": ("plain", NF4, True),
    "stored Conv1D": ("lora_bias", {"load_in_4bit": True}, True),
    "tied": ("tied", {**NF4, **DOUBLE}, False),
    "mixture": ("experts", NF4, False),  # whose experts transformers leaves whole
}
SETTINGS_HERE = {"one layer of qwen2": ("qwen2", {**SMALL, "layers_to_transform": [3]})}


def base(folder: Path, quantization: dict[str, Any] | None, **others: Any) -> Any:
    """transformers' own model. On CPUs with bf16 bitsandbytes computes otherwise in evaluation; here it doesn't."""
    given = {} if quantization is None else {"quantization_config": BitsAndBytesConfig(**quantization)}
    model = AutoModelForCausalLM.from_pretrained(folder, **given, **others)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


@dataclass(frozen=True)
class FourBitCase(AdaptedCase):
    """`quantization`: of the model in `folder`; None if its config.json says it."""

    quantization: dict[str, Any] | None = field(default_factory=lambda: NF4)

    def layers(self) -> list[Any]:
        given = None if self.quantization is None else BitsAndBytesConfig(**self.quantization)
        return pipeline_layers(AutoConfig.from_pretrained(self.folder), self.attention, lora=read_config(self.adapter),
                               quantization_config=given)

    def plain_model(self) -> Any:
        return PeftModel.from_pretrained(base(self.folder, self.quantization, attn_implementation=self.attention),
                                         str(self.adapter), is_trainable=True).train()


def saved_four_bit(setting: str, quantization: dict[str, Any], is_stored: bool, root: Path) -> FourBitCase:
    folder, adapter = saved(setting, root)
    if not is_stored:
        return FourBitCase(folder, "v-half", adapter=adapter, quantization=quantization)
    base(folder, quantization).save_pretrained(root / "stored")
    return FourBitCase(root / "stored", "v-half", adapter=adapter, quantization=None)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_need_no_masks(name: str, dora: bool) -> None:
    """Attention that takes cu_seqlens gets them from layers of 4 bits too."""
    register()
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    lora = LoraConfig(r=2, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
    given: dict[str, Any] = {"packed": True, "samples_per_row": 3, "lora": lora, "quantization_config": NF4}
    layers = pipeline_layers(model_config(name), NAME, **given)
    assert len(layers) == len(pipeline_layers(model_config(name), "sdpa", **given))


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(QUANTIZATIONS))
def test_trains_what_peft_trains(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, setting in SETTINGS_HERE.items():
        monkeypatch.setitem(SETTINGS, name, setting)
    first = saved_four_bit(*QUANTIZATIONS[kind], tmp_path)
    cases = [first, replace(first, schedule="v-zb")]
    outputs = [tmp_path / str(place) for place in range(len(cases))]
    model = first.plain_model()
    before = {name.removeprefix(PREFIX): value for name, value in model.named_parameters()}
    assert sum(isinstance(value, Params4bit) for value in before.values()) > 20
    oracle = train_plainly(first)
    for case, outcome, output in zip(cases, pipelines_of(list(zip(cases, outputs))), outputs, strict=True):
        assert all("lora_" in name for name in assert_trained_alike(outcome, oracle, before))
        loss, logits = evaluate(PeftModel.from_pretrained(base(case.folder, case.quantization), str(output)), case)
        assert loss == outcome.evaluated
        assert torch.equal(logits, outcome.logits)
        assert tensors_in(output).keys() == tensors_in(case.adapter).keys()


@pytest.mark.slow
def test_layers_that_run_again(tmp_path: Path) -> None:
    """Under activation checkpointing, on four ranks in a V."""
    first = saved_four_bit("all-linear", {**NF4, **DOUBLE}, False, tmp_path)
    oracle = train_plainly(first)
    before = {name.removeprefix(PREFIX): value for name, value in first.plain_model().named_parameters()}
    cases = [replace(first, schedule=schedule, stages=4, checkpointing=1) for schedule in ("v-half", "v-zb")]
    for outcome in pipelines_of([(case, None) for case in cases], world=4):
        assert_trained_alike(outcome, oracle, before)


@pytest.mark.slow
def test_engine_in_bf16(tmp_path: Path) -> None:
    """With two replicas and ZeRO, where DeepSpeed's own engine is the oracle of training, and transformers that of the
    model: files of bf16 are quantized as they are."""
    first = saved_four_bit("plain", NF4, False, tmp_path)
    folder = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(first.folder, dtype=torch.bfloat16).save_pretrained(folder)
    schedules: list[Any] = [None, *({"name": name, "loss_average": "micro_batches"} for name in ("v-half", "v-zb"))]
    cases = [FourBitCase(folder, schedule, config=BF16_ZERO1, adapter=first.adapter,
                         quantization={**NF4, **DOUBLE, **BF16}) for schedule in schedules]
    oracle, *others = pipelines_of([(case, tmp_path / str(place)) for place, case in enumerate(cases)], world=4)
    for place, outcome in enumerate(others, 1):
        assert outcome.losses == oracle.losses
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items())
        model = PeftModel.from_pretrained(base(folder, cases[0].quantization), str(tmp_path / str(place)),
                                          autocast_adapter_dtype=False)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16, torch.uint8}
        loss, logits = evaluate(model, cases[place])
        assert loss == outcome.evaluated
        assert torch.equal(logits, outcome.logits)


# -- what a frozen base costs


def sizes(rank: int, case: FourBitCase) -> tuple[int, int, int, int]:
    """The rank's layers of 4 bits, their bytes, those of their weights alone, and how many numbers these stand for."""
    layers = [layer for layer in case.engine().module.modules() if isinstance(layer, Linear4bit)]
    return (len(layers), parameter_bytes(nn.ModuleList(layers)), sum(layer.weight.nbytes for layer in layers),
            sum(layer.in_features * layer.out_features for layer in layers))


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_base_stays_in_4_bits(double: bool, tmp_path: Path) -> None:
    """On each rank, after initialize."""
    folder, adapter = saved("plain", tmp_path)
    case = FourBitCase(folder, "v-half", adapter=adapter, quantization={**NF4, "bnb_4bit_use_double_quant": double})
    for layers, total, weights, numbers in run_ranks(2, sizes, case):
        assert layers == 4 * 7
        assert weights == numbers / 2
        # A scale for each 64 numbers, of 32 bits or of 8, and tables of 16 and 256 numbers of 32 bits; of scales of 8
        # bits there are fewer than 256 in each of these layers, with one scale and one mean.
        assert total == weights + (numbers / 64 + layers * (64 + 1024 + 8) if double else numbers / 16 + layers * 64)


@pytest.mark.slow
def test_frozen_base_costs_nothing(tmp_path: Path) -> None:
    """No entry for W, no gradient, no optimizer state, no bytes in checkpoints that leave it out."""
    case = saved_four_bit("plain", {**NF4, **DOUBLE}, False, tmp_path)
    for told in run_ranks(2, costs_of_frozen_weights, case, tmp_path):
        assert told["trained"]
        assert all("lora_" in name for name in told["trained"])
        assert told["deferred"] == told["gradients"] == told["optimizer"] == told["state"] == told["trained"]
        assert told["losses"][0] == told["losses"][1]
    names = {name for path in (tmp_path / "True").rglob("layer_*") for name in torch.load(path)}
    assert names
    assert all("lora_" in name for name in names)


def go_on_from_whole(rank: int, case: FourBitCase, root: Path) -> tuple[float, float]:
    engine = case.engine()
    engine.train_batch(case.batch(0))
    engine.save_checkpoint(str(root), tag="one")
    engine.eval_batch(case.batch(7))
    expected = float(engine.train_batch(case.batch(1)))
    torch.manual_seed(5)
    again = case.engine()
    for layer in again.module.modules():
        if isinstance(layer, Linear4bit):
            layer.weight.data.zero_()
            layer.weight.quant_state.absmax.zero_()
    again.load_checkpoint(str(root), tag="one")
    return expected, float(again.train_batch(case.batch(1)))


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_whole_checkpoints_hold_the_base(double: bool, tmp_path: Path) -> None:
    """And an evaluation between batches changes nothing."""
    case = saved_four_bit("plain", {**NF4, "bnb_4bit_use_double_quant": double}, False, tmp_path)
    for expected, found in run_ranks(2, go_on_from_whole, case, tmp_path / "checkpoint"):
        assert found == expected


# -- files


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # of experts, in peft
@pytest.mark.parametrize("name", ["opt-projected", "gpt_neox", "phi3", "gemma3_text-tied", "qwen3_moe"])
def test_layers_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same are quantized, to the same bits; read from whole files, and from those of 4 bits."""
    monkeypatch.setattr("ds_vshape.models.hugging_face.weights.on_all_ranks", lambda action, name: [action()])
    save_tiny_model(model_config(name), tmp_path)
    model = base(tmp_path, {**NF4, **DOUBLE})
    model.save_pretrained(tmp_path / "stored")
    expected = model.state_dict()
    assert sum(name.endswith("nested_absmax") for name in expected) > 10
    for folder, given in ((tmp_path, BitsAndBytesConfig(**NF4, **DOUBLE)), (tmp_path / "stored", None)):
        layers = nn.ModuleList(spec.build() for spec in pipeline_layers(
            AutoConfig.from_pretrained(folder), quantization_config=given,
            lora=LoraConfig(target_modules="all-linear")))
        load_weights(layers, folder)
        found = {f"{part.name}.{name}".replace(".base_layer", ""): tensor
                 for part in layers.modules() if isinstance(part, Part)
                 for name, tensor in part.module.state_dict().items() if "lora_" not in name}
        if model.config.tie_word_embeddings:
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("is_stored", [False, True])
def test_weights_are_read_one_by_one(is_stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank reads those of its layers alone. Two are in memory at once, or what decodes two weights and the first."""
    case = saved_four_bit("plain", NF4, is_stored, tmp_path)
    layers = nn.ModuleList(spec.build() for spec in case.layers()[:3])
    read, tensors, names = Checkpoint.read, list[weakref.ref[Tensor]](), list[str]()

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        alive = sum(tensor() is not None and "layers" in name for tensor, name in zip(tensors, names, strict=True))
        assert alive <= (7 if is_stored else 1), names[-5:]
        tensor = read(*args, **kwargs)
        tensors.append(weakref.ref(tensor))
        names.append(args[1])
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    monkeypatch.setattr("ds_vshape.models.hugging_face.weights.on_all_ranks", lambda action, name: [action()])
    unknown = load_weights(layers, case.folder)
    assert len(names) == len(set(names)) == 1 + 2 * (2 + 7 * (4 if is_stored else 1))
    assert {name.split(".")[2] for name in unknown if "layers" in name} == {"2", "3", "4", "5", "6", "7"}


def test_config_json_may_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the files are whole, they are quantized as for an argument."""
    monkeypatch.setattr("ds_vshape.models.hugging_face.weights.on_all_ranks", lambda action, name: [action()])
    case = saved_four_bit("plain", {**NF4, **DOUBLE}, False, tmp_path)
    found = []
    for each in (case, replace(case, quantization=None)):
        if each.quantization is None:
            config = AutoConfig.from_pretrained(case.folder)
            config.quantization_config = case.quantization
            config.save_pretrained(case.folder)
        layers = nn.ModuleList(spec.build() for spec in each.layers()[:3])
        load_weights(layers, case.folder)
        found.append({name: tensor for name, tensor in layers.state_dict().items() if "lora_" not in name})
    assert found[0].keys() == found[1].keys()
    assert len([name for name in found[0] if name.endswith("nested_absmax")]) == 2 * 7
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def test_new_magnitudes_are_those_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's, which follow from weights of 4 bits."""
    monkeypatch.setattr("ds_vshape.models.hugging_face.weights.on_all_ranks", lambda action, name: [action()])
    case, lora = saved_four_bit("plain", NF4, False, tmp_path), LoraConfig(**SMALL, use_dora=True)
    model = get_peft_model(base(case.folder, NF4), lora)
    expected = {name: weight for name, weight in model.named_parameters() if "magnitude" in name}
    layers = nn.ModuleList(spec.build() for spec in pipeline_layers(
        AutoConfig.from_pretrained(case.folder), lora=lora, quantization_config=BitsAndBytesConfig(**NF4)))
    load_weights(layers, case.folder)
    found = {PREFIX + name: weight for name, weight in named_weights(layers).items() if "magnitude" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def narrower(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:, :31].contiguous()


def of_another_layer(tensors: dict[str, Tensor], name: str) -> None:
    other = name.replace("self_attn.q_proj", "mlp.up_proj")
    tensors |= {key.replace(other, name): value for key, value in tensors.items() if key.startswith(other)}


def without_scales(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}.absmax"]


def without_a_state(tensors: dict[str, Tensor], name: str) -> None:
    for key in [key for key in tensors if key.startswith(f"{name}.")]:
        del tensors[key]


@pytest.mark.parametrize("spoil, is_stored, message", [
    (narrower, False, r"is \[32, 31\], its config.json says \[32, 32\]"),
    (of_another_layer, True, r"is \[96, 32\], its config.json says \[32, 32\]"),
    (without_scales, True, "is of 4 bits, and quant_map, quant_state.bitsandbytes__nf4 don't tell how to decode it"),
    (without_a_state, True, r"is \[512, 1\], its config.json says \[32, 32\]"),
])
def test_files_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Tensor], str], None], is_stored: bool,
                                           message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_vshape.models.hugging_face.weights.on_all_ranks", lambda action, name: [action()])
    case = saved_four_bit("plain", NF4, is_stored, tmp_path)
    tensors, name = tensors_in(case.folder), "model.layers.1.self_attn.q_proj.weight"
    spoil(tensors, name)
    save_file({key: value.clone() for key, value in tensors.items()}, case.folder / "model.safetensors",
              metadata={"format": "pt"})
    layers = nn.ModuleList(spec.build() for spec in case.layers()[:3])
    with pytest.raises(ValueError, match=f"{name} in .* {message}"):
        load_weights(layers, case.folder)


# -- the program


def run_finetune(rank: int, words: list[str]) -> list[float]:
    return finetune(arguments(words)).losses


@pytest.mark.slow
def test_the_program_trains_on_a_base_of_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where config.json says so; with an evaluation and a checkpoint between batches."""
    case = saved_four_bit("plain", {**NF4, **DOUBLE}, True, tmp_path)
    config, output = tmp_path / "config.json", tmp_path / "output"
    config.write_text(json.dumps(Job("v-half", 2, 4).ds_config()))
    words = ["--model", str(case.folder), "--text", str(Path(__file__).parents[1]), "--length", "16", "--lora",
             str(case.adapter), "--deepspeed_config", str(config), "--save_every", "2", "--evaluate_every", "2",
             "--batches", "4", "--checkpoints", str(tmp_path / "checkpoints"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    first, second = run_ranks(2, run_finetune, words)
    assert first == second
    assert first[-1] < first[0]
    PeftModel.from_pretrained(base(case.folder, None), str(output))


# -- what is refused


@pytest.mark.parametrize("quantization, lora, message", [
    (NF4, None, "load_in_4bit = True with lora = None: must be a LoraConfig"),
    ({"load_in_8bit": True}, SMALL, "load_in_8bit = True: must be False in a pipeline"),
    ({"load_in_8bit": False}, SMALL, "load_in_4bit = False: must be True in a pipeline"),
    ({"quant_method": "gptq", "bits": 4}, SMALL, "quant_method = 'gptq': must be 'bitsandbytes'"),
    ({"quant_method": "awq", "bits": 4}, None, "quant_method = 'awq': must be 'bitsandbytes'"),
    ({**NF4, "bnb_4bit_quant_type": "int4"}, SMALL, "bnb_4bit_quant_type = 'int4': must be 'nf4' or 'fp4'"),
    ({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, SMALL, "bnb_4bit_quant_storage = 'bfloat16': must be 'uint8'"),
    ({**NF4, "bnb_4bit_compute_dtype": torch.int8}, SMALL, "bnb_4bit_compute_dtype = 'int8': must be 'float32' or"),
    (NF4, {**SMALL, "modules_to_save": ["up_proj"]}, r"name weights of .*up_proj.*, a layer of 4 bits"),
])
@pytest.mark.parametrize("is_given", [True, False])
def test_what_cannot_be_trained_is_refused(quantization: dict[str, Any], lora: dict[str, Any] | None, message: str,
                                           is_given: bool) -> None:
    config, adapters = model_config("llama"), lora and LoraConfig(**lora)
    if not is_given:
        config.quantization_config = quantization
    with pytest.raises(ValueError, match=message):
        pipeline_layers(config, lora=adapters,
                        quantization_config=quantization if is_given else None)


def test_two_quantizations_are_refused() -> None:
    config = model_config("llama")
    config.quantization_config = NF4
    with pytest.raises(ValueError, match="quantization_config = .*fp4.*: must be None, the model's config has one"):
        pipeline_layers(config, lora=LoraConfig(**SMALL), quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match="quantization_config = 4: must be a transformers.BitsAndBytesConfig"):
        pipeline_layers(model_config("llama"), quantization_config=4)  # type: ignore[arg-type]


def test_a_quantized_head_cannot_share_its_weight() -> None:
    with pytest.raises(ValueError, match="llm_int8_skip_modules = .*: must name the head too"):
        pipeline_layers(model_config("llama-tied"), lora=LoraConfig(**SMALL), quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, llm_int8_skip_modules=["model.layers.3.mlp"]))


def test_tensor_parallel_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with pytest.raises(ValueError, match="load_in_4bit = True with 2 tensor parallel ranks: must have 1"):
        pipeline_layers(model_config("llama"), tensor_group=object(), lora=LoraConfig(**SMALL),
                        quantization_config=BitsAndBytesConfig(**NF4))


def test_a_missing_bitsandbytes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "bitsandbytes" or name.startswith("bitsandbytes.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ds_vshape.models.hugging_face.four_bit", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'ds-vshape\[lora4bit\]'"):
        importlib.import_module("ds_vshape.models.hugging_face.four_bit")
