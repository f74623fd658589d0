"""Hugging Face models on tensor parallel ranks against transformers' own models in one process, and against pipelines
without tensor parallel ranks.

Sums over ranks round otherwise than those in one product, so losses and weights are equal up to rounding.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from finetune_runs import run_finetune
from hugging_face_models import (BATCHES, CONFIGS, EVALUATED, MICRO_BATCHES, Case, Counted, evaluate, model_config,
                                 tensors_in, train_plainly)
from internals import wrap_accumulator
from pipelines import BF16_ZERO1, FP32_ZERO1, Job
from ranks import RanksFailed, run_ranks
from safetensors.torch import save_file
from tiny_model import save_tiny_model, tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ds_vshape
from ds_vshape.checkpoint.errors import CheckpointError
from ds_vshape.models.hugging_face import (CHECKPOINTABLE_LAYERS, PARTITION_METHOD, TensorParallelLoss, load_weights,
                                           next_token_loss, pipeline_layers, save_model)
from ds_vshape.models.hugging_face import weights as weight_files
from ds_vshape.models.hugging_face.weights import named_weights
from ds_vshape.models.parallel_layers import tensor_group

RATE = 0.1
# Unlike Adam's, its steps show the size of a gradient.
SGD = {**FP32_ZERO1, "optimizer": {"type": "SGD", "params": {"lr": RATE}}, "zero_allow_untested_optimizer": True}


@dataclass(frozen=True)
class Layout(Case):
    """A training run on stages x tensor x replicas ranks."""

    tensor: int = 2
    replicas: int = 1

    @property
    def world(self) -> int:
        return self.stages * self.tensor * self.replicas

    def module(self) -> Any:
        config = AutoConfig.from_pretrained(self.folder)
        topology = PipeModelDataParallelTopology(num_pp=self.stages, num_mp=self.tensor, num_dp=self.replicas)
        group = tensor_group(topology)
        module = ds_vshape.PipelineModule(
            pipeline_layers(config, self.attention, experts=self.experts, tensor_group=group), topology=topology,
            loss_fn=TensorParallelLoss(group) if self.tensor > 1 else next_token_loss,
            partition_method=PARTITION_METHOD, activation_checkpoint_interval=self.checkpointing,
            checkpointable_layers=CHECKPOINTABLE_LAYERS, config=self.job.ds_config())
        assert load_weights(module, self.folder) == []
        return module


@dataclass(frozen=True)
class Trained:
    """What a rank came to; `in_w`: the names of the weights whose gradients came from W."""

    losses: list[float]
    norm: float
    evaluated: float
    logits: Tensor
    in_w: frozenset[str]


def train(rank: int, layout: Layout, output: Path) -> Trained:
    engine = layout.engine()
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    in_w: set[str] = set()
    wrap_accumulator(engine, lambda parameter, gradient, add: (in_w.add(names[parameter]), add(parameter, gradient)))
    replica = engine.grid.get_data_parallel_rank()

    def batch(number: int) -> Any:
        return iter([layout.micro_batch(number, place + replica * MICRO_BATCHES) for place in range(MICRO_BATCHES)])

    losses = [float(engine.train_batch(batch(number))) for number in range(BATCHES)]
    norm = float(engine.get_global_grad_norm())
    evaluated, outputs = engine.eval_batch(layout.batch(EVALUATED, 1), num_micro_batches=1, return_logits=True)
    logits = torch.empty(0) if outputs is None else (outputs[0] if isinstance(outputs, tuple) else outputs)
    save_model(engine.module, AutoConfig.from_pretrained(layout.folder), layout.folder, output)
    return Trained(losses, norm, float(evaluated), logits, frozenset(in_w))


def trained(layout: Layout, output: Path) -> Trained:
    """On all ranks, which must agree; the logits put together."""
    ranks = run_ranks(layout.world, train, layout, output, timeout=300)
    first = ranks[0]
    assert all((rank.losses, rank.norm, rank.evaluated) == (first.losses, first.norm, first.evaluated)
               for rank in ranks)
    with_logits = [rank.logits for rank in ranks if rank.logits.numel()]
    whole = torch.cat(with_logits[:layout.tensor], -1)
    assert {logits.shape[-1] for logits in with_logits} == {whole.shape[-1] // layout.tensor}, "never the whole logits"
    return Trained(ranks[0].losses, ranks[0].norm, ranks[0].evaluated, whole,
                   frozenset().union(*(rank.in_w for rank in ranks)))


def assert_alike(weights: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    assert weights.keys() == oracle.keys()
    for name, value in oracle.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=2e-6, msg=lambda text: f"{name}: {text}")


NAMES = ("llama", "llama-tied", "qwen3", "mixtral", "gemma2-tied", "phi3")
ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
DENSE = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
# The scales of norms get their gradients in B, as without tensor parallel ranks.
IN_W = {"mixtral": {*ATTENTION, "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
        "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}}


@pytest.mark.quick_cases("llama-tied")
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_what_transformers_trains(name: str, tmp_path: Path) -> None:
    folder, output = tmp_path / "source", tmp_path / "output"
    save_tiny_model(model_config(name), folder)
    layout = Layout(folder, "v-half", stages=1, config=SGD)
    ours, oracle = trained(layout, output), train_plainly(layout, partial(torch.optim.SGD, lr=RATE))
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert oracle.losses[0] > oracle.losses[-1]
    assert ours.losses == pytest.approx(oracle.losses, rel=1e-5)
    assert_alike(dict(loaded.named_parameters()), oracle.weights)
    loss, logits = evaluate(loaded, layout)
    assert loss == pytest.approx(ours.evaluated, rel=1e-5)
    torch.testing.assert_close(ours.logits, logits, rtol=1e-4, atol=1e-5)
    assert tensors_in(output).keys() == tensors_in(folder).keys()
    of_layer = IN_W.get(name, ATTENTION | DENSE)
    in_w = {key.rpartition("module.")[2].removesuffix(".weight") for key in ours.in_w}
    assert in_w == {"weight", *of_layer}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen2-tied"])
def test_pipeline_data_and_tensor_parallel_ranks(name: str, tmp_path: Path) -> None:
    """Eight ranks, ZeRO-1, and a clip that acts: against the same without tensor parallel ranks."""
    folder = tmp_path / "source"
    save_tiny_model(model_config(name), folder)
    config = {**SGD, "gradient_clipping": 0.1}
    ours, oracle = (trained(Layout(folder, "v-zb", stages=2, replicas=2, tensor=tensor, config=config),
                            tmp_path / f"{tensor}") for tensor in (2, 1))
    assert oracle.norm > 0.1
    assert ours.norm == pytest.approx(oracle.norm, rel=1e-4)
    assert oracle.losses[0] > oracle.losses[-1]
    assert ours.losses == pytest.approx(oracle.losses, rel=1e-5)
    assert ours.evaluated == pytest.approx(oracle.evaluated, rel=1e-5)
    assert_alike(tensors_in(tmp_path / "2"), tensors_in(tmp_path / "1"))


def refused(rank: int, config: Any) -> str:
    group = tensor_group(PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1))
    with pytest.raises(ValueError) as told:
        pipeline_layers(config, tensor_group=group)
    return str(told.value)


@pytest.mark.slow
def test_a_plan_of_the_users_own() -> None:
    """One that names the norms of queries and keys, which transformers' leaves out, and leaves the MLP whole."""
    def body(rank: int) -> set[str]:
        config = tiny_config("cohere", use_qk_norm=True)
        config.base_model_tp_plan = {f"layers.*.self_attn.{name}": style for name, style in {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise"), "o_proj": "rowwise",
            **dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")}.items()}
        group = tensor_group(PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1))
        layer = pipeline_layers(config, tensor_group=group)[1].build()
        return {name for name in named_weights(layer) if layer.shared.cut_of(name)}

    cut = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert run_ranks(2, body) == [cut, cut]


@pytest.mark.slow
@pytest.mark.parametrize("config, message", [
    (tiny_config("gpt2"), r"model_type = 'gpt2': transformers has no plan .*base_model_tp_plan.* must be a model with "
                          "one, or have 1 tensor parallel rank instead of 2"),
    (tiny_config("doge", is_moe=True), r"model_type = 'doge': its plan .* wants 'embedding_rowwise' for "
                                       r"model.layers.0.mlp.\w+, .* isn't done; must be colwise, .* for a Linear"),
    (tiny_config("deepseek_v2", num_key_value_heads=4), "wants 'mla_kv_a_proj' for .*; must be colwise"),
    (tiny_config("llama", num_key_value_heads=1), "num_key_value_heads = 1: must be a multiple of the 2 tensor"),
    (tiny_config("llama", heads=3, hidden=24, num_key_value_heads=1), "num_attention_heads = 3: must be a multiple"),
    (tiny_config("llama", intermediate_size=65), r"65 in the shape \[65, 32\] of model.layers.0.mlp.gate_proj.weight "
                                                 "must be a multiple of the 2 tensor parallel ranks"),
    (tiny_config("cohere", use_qk_norm=True), r"model_type = 'cohere': its plan .* cuts model.layers.0.self_attn and "
                                              r"doesn't say what becomes of model.layers.0.self_attn.k_norm; must have "
                                              r"1 tensor parallel rank, or a plan that names it"),
    (tiny_config("llama", vocab_size=257), "vocab_size = 257: must be a multiple of the 2 tensor parallel ranks"),
])
def test_models_that_the_ranks_cannot_share_are_refused(config: Any, message: str) -> None:
    """On every rank."""
    for told in run_ranks(2, refused, config):
        assert re.search(message, told), told


# -- weights


def load_counted(rank: int, layout: Layout, output: Path) -> dict[str, int]:
    weight_files.safe_open = Counted  # type: ignore[misc]
    save_model(layout.module(), AutoConfig.from_pretrained(layout.folder), layout.folder, output)
    return Counted.read


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "phi3"])
def test_each_rank_reads_its_share_alone(name: str, tmp_path: Path) -> None:
    """Of rows, of columns, of experts that lie in files one by one; and what is written is what was read."""
    folder, output = tmp_path / "source", tmp_path / "output"
    save_tiny_model(model_config(name), folder)
    before = tensors_in(folder)
    for read in run_ranks(2, load_counted, Layout(folder, "v-half", stages=1), output):
        assert read.keys() == before.keys()
        for tensor, size in read.items():
            whole = "norm" in tensor or ".gate." in tensor
            assert size == before[tensor].nbytes // (1 if whole else 2), tensor
    after = tensors_in(output)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[tensor], value) for tensor, value in before.items())


def load(rank: int, layout: Layout) -> None:
    layout.module()


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused_on_every_rank(tmp_path: Path) -> None:
    """A first rank's tensor that is missing; and on both ranks those that have other shapes."""
    save_tiny_model(model_config("llama"), tmp_path / "source")
    tensors = tensors_in(tmp_path / "source")
    up, name = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    for case, stages, tensor, content, messages in (
            ("missing", 2, 1, {key: value for key, value in tensors.items() if key != name},
             [f"ValueError: .* lacks 1 tensors, {name} among", f"rank 0 couldn't load its weights: .*{name}"]),
            ("smaller", 1, 2, {**tensors, up: torch.ones(94, 32)},
             [rf"{up} is \[94, 32\] in .*smaller, its config.json says \[96, 32\]"] * 2),
            ("odd", 1, 2, {**tensors, up: torch.ones(95, 32)},
             [rf"{up} in .*odd: 95 in \[95, 32\] must be a multiple of the 2 tensor parallel ranks"] * 2)):
        AutoConfig.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / case)
        save_file(content, tmp_path / case / "model.safetensors")
        with pytest.raises(RanksFailed) as failed:
            run_ranks(2, load, Layout(tmp_path / case, "1f1b", stages=stages, tensor=tensor), timeout=60)
        first, second = str(failed.value).split("rank 1:\n")
        assert re.search(messages[0], first) and re.search(messages[1], second), failed.value


def drawn(rank: int, config: Any, tensor: int, folder: Path) -> None:
    topology = PipeModelDataParallelTopology(num_pp=1, num_mp=tensor, num_dp=1)
    torch.manual_seed(rank)  # the first rank's numbers count
    layers = pipeline_layers(config, tensor_group=tensor_group(topology))
    module = ds_vshape.PipelineModule(layers, topology=topology, partition_method=PARTITION_METHOD,
                                      config=Job("v-half", 1, 1).ds_config())
    config.save_pretrained(folder.parent)
    save_model(module, config, folder.parent, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_drawn_weights_do_not_depend_on_tensor_parallel_ranks(name: str, tmp_path: Path) -> None:
    for ranks in (1, 2):
        run_ranks(ranks, drawn, model_config(name), ranks, tmp_path / f"{ranks}")
    one, two = (tensors_in(tmp_path / f"{ranks}") for ranks in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[weight], value) for weight, value in one.items())


# -- other runs


@pytest.mark.slow
def test_recomputed_layers_in_bf16_equal_whole_ones(tmp_path: Path) -> None:
    """Bit for bit: a layer that runs again sums over the ranks again."""
    folder = tmp_path / "source"
    save_tiny_model(model_config("qwen3"), folder)
    once, again = (trained(Layout(folder, "v-half", stages=2, checkpointing=interval, config=BF16_ZERO1),
                           tmp_path / f"{interval}") for interval in (0, 1))
    assert again.losses == once.losses
    before, after = tensors_in(tmp_path / "0"), tensors_in(tmp_path / "1")
    assert all(value.dtype == torch.bfloat16 and torch.equal(after[name], value) for name, value in before.items())


def resumed(rank: int, layout: Layout, folder: Path) -> tuple[list[float], list[float]]:
    """The losses of batches 1 and 2, without and with a checkpoint before them."""
    engine = layout.engine()
    engine.train_batch(layout.batch(0))
    engine.save_checkpoint(str(folder))
    whole = [float(engine.train_batch(layout.batch(number))) for number in (1, 2)]
    engine = layout.engine()
    assert engine.load_checkpoint(str(folder))[0]
    return whole, [float(engine.train_batch(layout.batch(number))) for number in (1, 2)]


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    save_tiny_model(model_config("mixtral"), folder)
    for whole, later in run_ranks(4, resumed, Layout(folder, "v-half", config=FP32_ZERO1), tmp_path / "checkpoint"):
        assert later == whole


def save_training(rank: int, layout: Layout, folder: Path) -> None:
    layout.engine().save_checkpoint(str(folder))


def refused_checkpoint(rank: int, layout: Layout, folder: Path) -> list[str]:
    engine, errors = layout.engine(), []
    for module_alone in (False, True):
        with pytest.raises(CheckpointError) as error:
            engine.load_checkpoint(str(folder), load_module_only=module_alone)
        errors.append(str(error.value))
    return errors


def test_a_checkpoint_of_other_tensor_parallel_ranks_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("llama", 2), tmp_path / "source")
    for saved, now in ((1, 2), (2, 1)):
        layouts = [Layout(tmp_path / "source", "v-half", stages=1, tensor=tensor) for tensor in (saved, now)]
        folder = tmp_path / f"{saved}"
        run_ranks(saved, save_training, layouts[0], folder)
        for errors in run_ranks(now, refused_checkpoint, layouts[1], folder):
            for error in errors:
                assert f"was saved with {saved} tensor parallel ranks, now there are {now}: must be {saved}" in error


# -- loss functions that don't go with the head


def refused_losses(rank: int) -> list[str]:
    """What training says of each loss with the other's logits, whole of an untied head and in chunks of a tied one."""
    topology = PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1)
    group = tensor_group(topology)
    errors = []
    for (name, chunked), is_cut in product((("llama", False), ("llama-tied", True)), (False, True)):
        job = Job("v-half", 1, 1)
        layers = pipeline_layers(tiny_config("llama", 2, **CONFIGS[name]), tensor_group=group if is_cut else None,
                                 chunked_head=chunked)
        module = ds_vshape.PipelineModule(layers, topology=topology, partition_method=PARTITION_METHOD,
                                          loss_fn=next_token_loss if is_cut else TensorParallelLoss(group),
                                          config=job.ds_config())
        engine = ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=job.ds_config())[0]
        # Labels of the first half of the vocabulary: on rank 0 a cross-entropy would find all of them.
        tokens = torch.ones(1, 4, dtype=torch.long)
        with pytest.raises(Exception) as error:
            engine.train_batch(iter([(tokens, tokens)]))
        errors.append(str(error.value))
    return errors


def test_a_loss_that_does_not_go_with_the_head_is_refused() -> None:
    for errors in run_ranks(2, refused_losses):
        assert len(errors) == 4
        for whole, cut in zip(errors[::2], errors[1::2], strict=True):
            assert "loss_fn = TensorParallelLoss over 2 tensor parallel ranks" in whole and "next_token_loss" in whole
            assert "loss_fn = next_token_loss" in cut and "must be TensorParallelLoss(tensor_group)" in cut


# -- the program


@pytest.mark.slow
def test_the_program_trains_on_tensor_parallel_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = tmp_path / "source", tmp_path / "config.json"
    save_tiny_model(model_config("qwen3"), source)
    config.write_text(json.dumps(Job("v-half", 2, MICRO_BATCHES, SGD).ds_config()))
    words = ["--model", str(source), "--text", str(Path(__file__).parents[1]), "--batches", "3", "--length", "16",
             "--deepspeed_config", str(config)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    of_one, of_two = (run_ranks(2 * tensor, run_finetune, [
        *words, "--output", str(tmp_path / f"{tensor}"), "--tensor_parallel", str(tensor)]) for tensor in (1, 2))
    for losses in of_two:
        assert losses == pytest.approx(of_one[0], rel=1e-5)
    assert_alike(tensors_in(tmp_path / "2"), tensors_in(tmp_path / "1"))
    with pytest.raises(RanksFailed, match="--stages 1 --tensor_parallel 3: their product must divide the 2 ranks"):
        run_ranks(2, run_finetune, [*words, "--output", str(tmp_path / "3"), "--stages", "1", "--tensor_parallel", "3"])
