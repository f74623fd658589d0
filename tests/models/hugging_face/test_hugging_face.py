"""What all families of Hugging Face models have in common: masks made once, checkpointing, precisions, files, errors,
the program. test_hugging_face_families.py trains each family."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import run_finetune
from hugging_face_models import (BATCHES, LAYERS, LENGTH, MICRO_BATCHES, SAMPLES, Case, Counted, evaluate,
                                 model_config, pipelines_of, tensors_in)
from pipelines import BF16_ZERO1, Job
from ranks import RanksFailed, run_ranks
from safetensors.torch import save_file
from text import tokens_of
from tiny_model import TOKENS, save_tiny_model, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ds_vshape
from ds_vshape.models.hugging_face import (PARTITION_METHOD, check_output, load_weights, pipeline_layers, save_model)
from ds_vshape.models.hugging_face import weights as weight_files
from ds_vshape.models.hugging_face.plan import PlannedModel
from ds_vshape.models.hugging_face.shared import Shared
from ds_vshape.models.hugging_face.weights import INDEX, named_weights

pytestmark = pytest.mark.slow

MODELS = ("llama", "llama-tied", "qwen2", "qwen2-tied", "gpt2", "gpt2-tied", "qwen3_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each kind, as transformers saves it; some in one file, some in many."""
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        shards = {"max_shard_size": "40KB"} if name.startswith("qwen2") else {}
        save_tiny_model(model_config(name), root / name, **shards)
    return {name: root / name for name in MODELS}


# -- training


def test_activation_checkpointing_changes_nothing(folders: dict[str, Path]) -> None:
    for name in ("llama", "gpt2-tied"):
        kinds = [("v-half", 0, {}), ("v-half", 1, {}), ("v-half", 1, {"pipeline": {"use_reentrant": False}}),
                 ("v-zb", 0, {}), ("v-zb", 1, {})]
        outcomes = pipelines_of([(Case(folders[name], schedule, checkpointing=interval, config=config), None)
                                 for schedule, interval, config in kinds])
        for (schedule, interval, _), outcome in zip(kinds, outcomes, strict=True):
            if not interval:
                without = outcome
                continue
            assert outcome.forwards == without.forwards + LAYERS * MICRO_BATCHES * BATCHES, "each layer runs again"
            assert outcome.losses == without.losses
            assert outcome.in_b == without.in_b
            assert all(torch.equal(outcome.weights[parameter], value) for parameter, value in without.weights.items())


def test_bf16_with_replicas(folders: dict[str, Path], tmp_path: Path) -> None:
    """What transformers loads in bf16 is what the pipeline evaluated in bf16, rotary frequencies in fp32 included."""
    cases = [(Case(folders["llama"], schedule, config=BF16_ZERO1), tmp_path / str(schedule is None))
             for schedule in (None, {"name": "v-half", "loss_average": "micro_batches"})]
    oracle, ours = pipelines_of(cases, world=4)
    assert ours.losses == oracle.losses
    for case, folder in cases:
        assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
        assert {tensor.dtype for tensor in tensors_in(folder).values()} == {torch.bfloat16}
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert evaluate(loaded, case)[0] == ours.evaluated


def test_masks_and_rotations_are_made_once_for_a_stage() -> None:
    shared = Shared(PlannedModel(model_config("qwen2"), "sdpa"))
    whole, window = 0, 5  # the layer that attends to everything, and one that doesn't
    hidden, mask = torch.rand(SAMPLES, LENGTH, 32), torch.ones(SAMPLES, LENGTH, dtype=torch.bool)
    mask[:, -1] = False

    def made(layer: int, hidden: Tensor, mask: Tensor) -> dict[str, Any]:
        return shared.arguments(layer, hidden, mask, None).kwargs

    first = made(whole, hidden, mask)
    assert made(whole, hidden + 1, mask)["attention_mask"] is first["attention_mask"]
    in_window = made(window, hidden, mask)
    assert in_window["position_embeddings"] is first["position_embeddings"]
    assert not torch.equal(in_window["attention_mask"], first["attention_mask"])
    other_mask = torch.ones_like(mask)
    other_mask[:, 0] = False  # written to as often, and another object
    assert not torch.equal(made(whole, hidden, other_mask)["attention_mask"], first["attention_mask"])
    again = made(whole, hidden, mask)
    mask[:, -2] = False  # the same object, written to
    changed = made(whole, hidden, mask)
    assert torch.equal(again["attention_mask"], first["attention_mask"])
    assert not torch.equal(changed["attention_mask"], again["attention_mask"])


# -- weights


def load_and_save(rank: int, models: dict[str, Path], output: Path) -> list[tuple[set[str], set[str]]]:
    """For each model: this rank's weights by name, and the tensors that it read from the files."""
    seen = []
    for name, folder in models.items():
        weight_files.safe_open, Counted.read = Counted, {}
        module = Case(folder, "v-half").module()
        save_model(module, AutoConfig.from_pretrained(folder), folder, output / name)
        seen.append((set(named_weights(module)), set(Counted.read)))
    return seen


def as_trained(name: str) -> str:
    """The weight of which a tensor in a file is a part: experts' lie there one by one."""
    name = re.sub(r"experts\.\d+\.(gate|up)_proj\.weight", "experts.gate_up_proj", name)
    return re.sub(r"experts\.\d+\.down_proj\.weight", "experts.down_proj", name)


def test_round_trip_without_training(folders: dict[str, Path], tmp_path: Path) -> None:
    in_bf16 = tmp_path / "in-bf16"
    AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16).save_pretrained(in_bf16)
    models = {**folders, "bf16": in_bf16}
    seen = run_ranks(2, load_and_save, models, tmp_path)
    for place, (name, folder) in enumerate(models.items()):
        before, after = tensors_in(folder), tensors_in(tmp_path / name)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[parameter], value.float()) for parameter, value in before.items())
        (first, read_by_first), (second, read_by_second) = (of_rank[place] for of_rank in seen)
        assert read_by_first | read_by_second == before.keys() and not first & second
        assert ([{as_trained(read) for read in of_rank} for of_rank in (read_by_first, read_by_second)]
                == [first, second]), "each rank reads its own tensors alone"
        config, source = (json.loads((path / "config.json").read_text()) for path in (tmp_path / name, folder))
        assert config == {**source, "dtype": "float32"}
        index = json.loads((tmp_path / name / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())


def save_untrained_in_bf16(rank: int, folder: Path, output: Path) -> None:
    engine = Case(folder, "v-half", config=BF16_ZERO1).engine()
    save_model(engine.module, AutoConfig.from_pretrained(folder), folder, output)


def test_bf16_comes_back_as_bf16(folders: dict[str, Path], tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    AutoModelForCausalLM.from_pretrained(folders["gpt2"], dtype=torch.bfloat16).save_pretrained(source)
    run_ranks(2, save_untrained_in_bf16, source, output)
    before, after = tensors_in(source), tensors_in(output)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def load(rank: int, folder: Path) -> tuple[list[str], dict[str, Tensor]]:
    config = AutoConfig.from_pretrained(folder)
    module = ds_vshape.PipelineModule(pipeline_layers(config), num_stages=1, partition_method=PARTITION_METHOD)
    unknown = load_weights(module, folder)
    return unknown, {name: parameter.detach() for name, parameter in named_weights(module).items()}


def changed_copy(source: Path, folder: Path, tensors: dict[str, Tensor]) -> Path:
    AutoConfig.from_pretrained(source).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_checkpoints_of_the_base_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """As the published GPT-2: names without the base model's, and masks that transformers computes by now."""
    tensors = tensors_in(folders["gpt2-tied"])
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    folder = changed_copy(folders["gpt2-tied"], tmp_path, {
        **bare, "h.0.attn.bias": torch.ones(4, 4), "h.9.attn.c_attn.bias": torch.ones(4)})
    (unknown, loaded), = run_ranks(1, load, folder)
    assert unknown == ["h.9.attn.c_attn.bias"]
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_weights_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = tensors_in(folders["llama"])
    wrong = {**tensors, "model.norm.weight": torch.ones(31)}
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.layers.3.mlp.up_proj.weight"}
    for name, content, message in (
            ("wrong", wrong, r"model.norm.weight is \[31\] in .*, its config.json says \[32\]"),
            ("missing", missing, "lacks 1 tensors, model.layers.3.mlp.up_proj.weight among them")):
        with pytest.raises(RanksFailed, match=message):
            run_ranks(1, load, changed_copy(folders["llama"], tmp_path / name, content))
    AutoConfig.from_pretrained(folders["llama"]).save_pretrained(tmp_path / "empty")
    with pytest.raises(RanksFailed, match="empty holds neither model.safetensors nor model.safetensors.index.json"):
        run_ranks(1, load, tmp_path / "empty")


def test_a_folder_with_a_model_is_no_output(folders: dict[str, Path], tmp_path: Path) -> None:
    check_output(tmp_path)
    check_output(tmp_path / "new")
    for name in ("llama", "qwen2"):
        with pytest.raises(FileExistsError, match="must be a new folder"):
            check_output(folders[name])


def save_over(rank: int, source: Path, output: Path) -> None:
    case = Case(source, "v-half")
    save_model(case.module(), AutoConfig.from_pretrained(source), source, output)


def save_on_the_first(rank: int, source: Path, output: Path) -> None:
    module = Case(source, {"name": "v-half", "timeout_seconds": 5}).module()
    if rank == 0:
        save_model(module, AutoConfig.from_pretrained(source), source, output)


@pytest.mark.slow
def test_saving_on_one_rank_alone_names_the_others(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="waits in save_model: .* rank 0 in save_model; rank 1 in its script"):
        run_ranks(2, save_on_the_first, folders["llama"], tmp_path, timeout=60)


def test_a_rank_that_cannot_write_ends_all(folders: dict[str, Path], tmp_path: Path) -> None:
    """What has been written is no model, and the next one takes its place."""
    blocked = tmp_path / "model-00002-of-00002.safetensors"
    blocked.mkdir()
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, save_over, folders["llama"], tmp_path)
    assert "ValueError: rank 1 couldn't write its weights" in str(failed.value)
    blocked.rmdir()
    assert (tmp_path / "model-00001-of-00002.safetensors").exists() and not (tmp_path / INDEX).exists()
    check_output(tmp_path)
    run_ranks(2, save_over, folders["llama"], tmp_path)
    assert tensors_in(tmp_path).keys() == tensors_in(folders["llama"]).keys()
    with pytest.raises(FileExistsError, match="must be a new folder"):
        check_output(tmp_path)


# -- models


@pytest.mark.parametrize("config, message", [
    (AutoConfig.for_model("bert"), r"model_type = 'bert': neither transformers .* nor ds_vshape has a plan .* give "
                                   r"pipeline_layers\(config, plan=...\) .*'layers': \(\['hidden_states'"),
    (tiny_config("opt", layerdrop=0.1), "layerdrop = 0.1: must be 0"),
    (tiny_config("gemma4_text", hidden_size_per_layer_input=8), "its plan leaves out model.embed_tokens_per_layer"),
    (tiny_config("gpt2", add_cross_attention=True), "add_cross_attention"),
    (tiny_config("llama", quantization_config={"quant_method": "gptq", "bits": 4}), "quantized weights"),
])
def test_models_that_cannot_be_cut_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_layers(config)


LAYERS_OF_BLOOM = (["hidden_states", "attention_mask"], ["hidden_states"])


@pytest.mark.parametrize("plan, message", [
    ({"embeddings": (["input_ids"], ["inputs_embeds"])}, "BloomModel has no embeddings; its plan must name modules"),
    ({"word_embeddings": (["input_ids"], ["inputs_embeds"])}, "must name one list of layers, it names 0"),
    ({"word_embeddings": (["input_ids"], ["inputs_embeds"]), "h": LAYERS_OF_BLOOM},
     "its plan leaves out transformer.word_embeddings_layernorm.weight"),
])
def test_plans_that_do_not_fit_are_refused(plan: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_layers(AutoConfig.for_model("bloom", n_layer=2, hidden_size=32, n_head=4), "eager", plan)


def test_a_plan_of_the_users_own() -> None:
    """BLOOM's, which transformers lacks: the layers compute what the model computes."""
    config = AutoConfig.for_model("bloom", n_layer=2, hidden_size=32, n_head=4, vocab_size=TOKENS,
                                  tie_word_embeddings=False)
    hidden = (["hidden_states"], ["hidden_states"])
    layers = [spec.build() for spec in pipeline_layers(config, "eager", {
        "word_embeddings": (["input_ids"], ["inputs_embeds"]), "word_embeddings_layernorm": hidden,
        "h": LAYERS_OF_BLOOM, "ln_f": hidden})]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    weights = model.state_dict()
    ids = torch.randint(TOKENS, (SAMPLES, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    flow: Any = (ids, mask)
    with torch.no_grad():
        for layer in layers:
            for name, value in named_weights(layer).items():
                value.copy_(weights[name])
            flow = layer.eval()(flow)
        assert torch.equal(flow, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


@pytest.mark.parametrize("package, module", [("transformers", "hugging_face"),
                                             ("safetensors", "hugging_face.weights")])
def test_a_missing_package_names_the_extra(package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = [name for name in sys.modules if name.startswith((f"{package}.", "ds_vshape.models."))]
    for name in sorted(imported, reverse=True):  # a folder's modules before the folder
        if name.startswith("ds_vshape"):  # the import sets it again
            monkeypatch.delattr(name)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'ds-vshape\[models\]'"):
        importlib.import_module(f"ds_vshape.models.{module}")


# -- the program


def test_the_program_trains_the_same_under_every_schedule(folders: dict[str, Path], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 with its usual dropout; the config comes by the command line, and V leaves all data on rank 0."""
    source = tmp_path / "source"
    save_tiny_model(tiny_config("gpt2", tie_word_embeddings=False), source)
    losses, saved = [], []
    for schedule in (None, "v-half"):
        config, output = tmp_path / f"{schedule}.json", tmp_path / str(schedule)
        config.write_text(json.dumps(Job(schedule, 2, MICRO_BATCHES).ds_config()))
        words = ["--model", str(source), "--output", str(output), "--text", str(Path(__file__).parents[1]),
                 "--batches", "4", "--length", "16", "--deepspeed_config", str(config)]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
        first, second = run_ranks(2, run_finetune, words)
        assert first == second
        losses.append(first)
        saved.append(tensors_in(output))
    assert losses[0] == losses[1]
    assert losses[0][0] > losses[0][-1]
    before = tensors_in(source)
    for name, value in saved[0].items():
        assert torch.equal(saved[1][name], value) and not torch.equal(before[name], value), name


def test_text_becomes_tokens(tmp_path: Path) -> None:
    text = torch.frombuffer(bytearray(b"one two two"), dtype=torch.uint8)
    assert torch.equal(tokens_of(text, tmp_path, TOKENS), text)
    with pytest.raises(ValueError, match="no tokenizer and vocab_size = 255: must be at least 256"):
        tokens_of(text, tmp_path, TOKENS - 1)
    words = Tokenizer(models.WordLevel({"?": 0, "one": 1, "two": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert tokens_of(text, tmp_path, 3).tolist() == [1, 2, 2]
    assert AutoTokenizer.from_pretrained(tmp_path).decode([2]) == "two"
