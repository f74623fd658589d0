"""Llama, Qwen2 and GPT-2 from transformers, cut into pipelines: trained beside transformers' own models in one process.

Batches are padded on both sides, so that masks cross all stages. Losses and weights are equal bit for bit, except where
embedding and head are one weight: its two gradients are then added in another order than autograd's.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from finetune import arguments, finetune, tokens_of
from pipelines import BF16_ZERO1, Job
from ranks import RanksFailed, run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import TOKENS, save_tiny_model, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ds_vshape
from ds_vshape.models import hugging_face_weights
from ds_vshape.models.hugging_face import (CHECKPOINTABLE_LAYERS, FAMILIES, PARTITION_METHOD, AttentionArguments,
                                           DecoderLayer, next_token_loss, pipeline_layers)
from ds_vshape.models.hugging_face_weights import INDEX, check_output, load_weights, named_weights, save_model
from ds_vshape.split_backward import WholeGradients

pytestmark = pytest.mark.slow

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
# Layers alternate between attention over everything and over the last four tokens.
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "pad_token_id": 0},
    "qwen2": SLIDING,
    "qwen2-tied": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": False, **NO_DROPOUT},
    "gpt2-tied": {"tie_word_embeddings": True, **NO_DROPOUT},
}
LAYERS, BATCHES, MICRO_BATCHES, SAMPLES, LENGTH = 8, 3, 4, 2, 12
EVALUATED = 100  # the number of a batch that no training sees
USED_TOKENS = 9  # of 256, which is soon learnt


def model_config(name: str) -> Any:
    return tiny_config(name.partition("-")[0], LAYERS, **CONFIGS[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each kind, as transformers saves it; some in one file, some in many."""
    root = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        shards = {"max_shard_size": "40KB"} if name.startswith("qwen2") else {}
        save_tiny_model(model_config(name), root / name, **shards)
    return {name: root / name for name in CONFIGS}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All of a model's tensors, each of which must stand in one file alone."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        in_file = load_file(path)
        assert not in_file.keys() & tensors.keys()
        tensors.update(in_file)
    return tensors


@dataclass(frozen=True)
class Case:
    """One training run of the model in `folder`."""

    folder: Path
    schedule: Any
    stages: int = 2
    attention: str = "sdpa"
    with_positions: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    checkpointing: int = 0

    @property
    def job(self) -> Job:
        return Job(self.schedule, self.stages, MICRO_BATCHES, self.config)

    def micro_batch(self, batch: int, number: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """((ids, mask and perhaps position ids), next tokens), padded on the left, on the right or not at all."""
        generator = torch.Generator().manual_seed(10007 * batch + 101 * number)
        ids = torch.randint(1, USED_TOKENS, (SAMPLES, LENGTH), generator=generator)
        left, right = torch.randint(4, (2, SAMPLES, 1), generator=generator) * (number % MICRO_BATCHES > 0)
        places = torch.arange(LENGTH)
        mask = ((places >= left) & (places < LENGTH - right)).long()
        ids = ids * mask
        following = torch.nn.functional.pad(torch.where(mask.bool(), ids, -100)[:, 1:], (0, 1), value=-100)
        inputs = (ids, mask, (places - left).clamp(min=0)) if self.with_positions else (ids, mask)
        return inputs, following

    def batch(self, batch: int, count: int = MICRO_BATCHES) -> Iterator[Any]:
        return iter([self.micro_batch(batch, number) for number in range(count)])

    def module(self) -> Any:
        """With the weights of the folder (collective)."""
        config = AutoConfig.from_pretrained(self.folder)
        module = ds_vshape.PipelineModule(pipeline_layers(config, self.attention), num_stages=self.stages,
                                          loss_fn=next_token_loss, partition_method=PARTITION_METHOD,
                                          activation_checkpoint_interval=self.checkpointing,
                                          checkpointable_layers=CHECKPOINTABLE_LAYERS, config=self.job.ds_config())
        assert load_weights(module, self.folder) == []
        return module

    def engine(self) -> Any:
        ds_checkpointing.configure(None, partition_activations=False)
        module = self.module()
        return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=self.job.ds_config())[0]


@dataclass(frozen=True)
class Outcome:
    """What a rank, or the plain model, came to. `in_b`: the parameters whose gradients never came from W; `forwards`:
    how often decoder layers ran."""

    losses: list[float]
    evaluated: float
    weights: dict[str, Tensor]
    in_b: frozenset[str] = frozenset()
    forwards: int = 0


def train_pipelines(rank: int, cases: list[tuple[Case, Path | None]]) -> list[Outcome]:
    """Trains each case, and saves it where a folder is given."""
    return [train_pipeline(case, folder) for case, folder in cases]


def train_pipeline(case: Case, folder: Path | None) -> Outcome:
    engine = case.engine()
    weights = named_weights(engine.module)
    in_w: set[Any] = set()
    if case.schedule is not None:
        deliver = engine._deliver
        engine._deliver = WholeGradients(lambda parameter, gradient: (in_w.add(parameter),
                                                                      deliver.add(parameter, gradient)))
    forwards = []
    for layer in engine.module.modules():
        if isinstance(layer, DecoderLayer):
            layer.register_forward_pre_hook(lambda *_: forwards.append(1))
    losses = [float(engine.train_batch(case.batch(batch))) for batch in range(BATCHES)]
    evaluated = float(engine.eval_batch(case.batch(EVALUATED, 1), num_micro_batches=1))
    if folder is not None:
        save_model(engine.module, AutoConfig.from_pretrained(case.folder), case.folder, folder)
    return Outcome(losses, evaluated, {name: value.detach().clone() for name, value in weights.items()},
                   frozenset(name for name, parameter in weights.items() if parameter not in in_w), len(forwards))


def pipelines_of(cases: list[tuple[Case, Path | None]], world: int = 2) -> list[Outcome]:
    """The outcomes of the cases; weights on several ranks must agree bit for bit."""
    merged = []
    for of_ranks in zip(*run_ranks(world, train_pipelines, cases, timeout=300)):
        weights: dict[str, Tensor] = {}
        for outcome in of_ranks:
            assert (outcome.losses, outcome.evaluated) == (of_ranks[0].losses, of_ranks[0].evaluated)
            for name, value in outcome.weights.items():
                assert torch.equal(weights.setdefault(name, value), value), name
        merged.append(Outcome(of_ranks[0].losses, of_ranks[0].evaluated, weights,
                              frozenset().union(*(outcome.in_b for outcome in of_ranks)),
                              sum(outcome.forwards for outcome in of_ranks)))
    return merged


def plain_loss(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """transformers' loss, with labels as it wants them: the inputs, shifted inside."""
    ids, mask, *positions = inputs
    loss: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions[0] if positions else None,
                         labels=torch.where(mask.bool(), ids, -100), use_cache=False).loss
    return loss


def evaluate(model: Any, case: Case) -> float:
    with torch.no_grad():
        return float(plain_loss(model.eval(), case.micro_batch(EVALUATED, 0)[0]))


def train_plainly(case: Case) -> Outcome:
    model = AutoModelForCausalLM.from_pretrained(case.folder, attn_implementation=case.attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # DeepSpeed takes "Adam" for AdamW.
    losses = []
    for batch in range(BATCHES):
        total = torch.zeros(())
        for inputs, _ in case.batch(batch):
            loss = plain_loss(model, inputs)
            (loss / MICRO_BATCHES).backward()
            total = total + loss.detach()
        losses.append(float(total / MICRO_BATCHES))
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(losses, evaluate(model, case), dict(model.named_parameters()))


# -- training


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_what_transformers_trains(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[name]
    cases = [Case(folder, None), Case(folder, "v-half"), Case(folder, "v-zb", attention="eager", with_positions=True)]
    saved = [tmp_path / str(place) for place in range(len(cases))]
    for case, outcome, output in zip(cases, pipelines_of(list(zip(cases, saved))), saved, strict=True):
        oracle = train_plainly(case)
        assert oracle.losses[0] > oracle.losses[-1]
        assert outcome.weights.keys() == oracle.weights.keys()
        if name.endswith("-tied"):
            assert outcome.losses == pytest.approx(oracle.losses, rel=1e-5)
            for parameter, value in oracle.weights.items():
                torch.testing.assert_close(outcome.weights[parameter], value, rtol=1e-3, atol=1e-4)
        else:
            assert outcome.losses == oracle.losses
            for parameter, value in oracle.weights.items():
                assert torch.equal(outcome.weights[parameter], value), parameter
        if case.schedule is not None:
            # The scales and shifts of norms stay in B, all else is split: GPT-2's Conv1D and both embeddings too.
            norms = {parameter for parameter in oracle.weights if "norm" in parameter or ".ln_" in parameter}
            assert outcome.in_b == norms

        loaded = AutoModelForCausalLM.from_pretrained(output, attn_implementation=case.attention)
        assert evaluate(loaded, case) == outcome.evaluated
        assert tensors_in(output).keys() == outcome.weights.keys(), "a tied weight is saved once"
        for parameter, value in tensors_in(output).items():
            assert torch.equal(value, outcome.weights[parameter])


def test_four_ranks(folders: dict[str, Path]) -> None:
    """With V, the eight stages have a decoder layer each; a micro-batch crosses six boundaries between ranks."""
    oracle, *ours = pipelines_of([(Case(folders["qwen2"], schedule, stages=4), None)
                                  for schedule in (None, "v-half", "v-zb")], world=4)
    assert oracle.losses == train_plainly(Case(folders["qwen2"], None)).losses
    for outcome in ours:
        assert outcome.losses == oracle.losses


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
    cases = [(Case(folders["llama"], schedule, config=BF16_ZERO1), tmp_path / str(schedule))
             for schedule in (None, "v-half")]
    oracle, ours = pipelines_of(cases, world=4)
    assert ours.losses == oracle.losses
    for case, folder in cases:
        assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
        assert {tensor.dtype for tensor in tensors_in(folder).values()} == {torch.bfloat16}
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert evaluate(loaded, case) == ours.evaluated


def test_masks_and_rotations_are_made_once_for_a_stage() -> None:
    config = model_config("qwen2")
    config._attn_implementation = "sdpa"
    shared = AttentionArguments(FAMILIES["qwen2"], config)
    hidden, mask = torch.rand(SAMPLES, LENGTH, 32), torch.ones(SAMPLES, LENGTH, dtype=torch.bool)
    mask[:, -1] = False
    first = shared((hidden, mask), "full_attention")
    assert shared((hidden + 1, mask), "full_attention")["attention_mask"] is first["attention_mask"]
    window = shared((hidden, mask), "sliding_attention")
    assert window["position_embeddings"] is first["position_embeddings"]
    assert not torch.equal(window["attention_mask"], first["attention_mask"])
    other_mask = torch.ones_like(mask)
    other_mask[:, 0] = False  # written to as often, and another object
    other = shared((hidden, other_mask), "full_attention")
    assert not torch.equal(other["attention_mask"], first["attention_mask"])
    again = shared((hidden, mask), "full_attention")
    mask[:, -2] = False  # the same object, written to
    changed = shared((hidden, mask), "full_attention")
    assert torch.equal(again["attention_mask"], first["attention_mask"])
    assert not torch.equal(changed["attention_mask"], again["attention_mask"])


# -- weights


def load_and_save(rank: int, models: dict[str, Path], output: Path) -> list[tuple[set[str], set[str]]]:
    """For each model: this rank's weights by name, and the tensors that it read from the files."""
    seen = []
    for name, folder in models.items():
        read: set[str] = set()

        class Recording:
            def __init__(self, path: Path, **options: Any) -> None:
                self._file = safe_open(path, **options)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                pass

            def keys(self) -> Any:
                return self._file.keys()

            def get_tensor(self, name: str) -> Tensor:
                read.add(name)
                return self._file.get_tensor(name)

        hugging_face_weights.safe_open = Recording
        module = Case(folder, "v-half").module()
        save_model(module, AutoConfig.from_pretrained(folder), folder, output / name)
        seen.append((set(named_weights(module)), read))
    return seen


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
        assert first | second == before.keys() and not first & second
        assert (read_by_first, read_by_second) == (first, second), "each rank reads its own tensors alone"
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


# -- models


@pytest.mark.parametrize("config, message", [
    (AutoConfig.for_model("bert"), "model_type = 'bert': must be one of gpt2, llama, qwen2"),
    (tiny_config("gpt2", add_cross_attention=True), "add_cross_attention"),
    (tiny_config("llama", quantization_config={"quant_method": "gptq", "bits": 4}), "quantized weights"),
])
def test_models_that_cannot_be_cut_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_layers(config)


@pytest.mark.parametrize("package, module", [("transformers", "hugging_face"),
                                             ("safetensors", "hugging_face_weights")])
def test_a_missing_package_names_the_extra(package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"ds_vshape.models.{module}")
    with pytest.raises(ImportError, match=r"pip install 'ds-vshape\[models\]'"):
        importlib.import_module(f"ds_vshape.models.{module}")


# -- the program


def run_finetune(rank: int, words: list[str]) -> list[float]:
    result = finetune(arguments(words))
    return [*result.losses, result.validation_loss]


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
