"""Hugging Face models of random weights, cut into pipelines and trained beside transformers' own models in one process.

Batches are padded on both sides, so that masks cross all stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from internals import note_accumulated
from pipelines import Job
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import tiny_config
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ds_vshape
from ds_vshape.models.hugging_face import (CHECKPOINTABLE_LAYERS, PARTITION_METHOD, load_weights, next_token_loss,
                                           pipeline_layers, save_model)
from ds_vshape.models.hugging_face.layers import DecoderLayer
from ds_vshape.models.hugging_face.weights import named_weights

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
# Layers alternate between attention over everything and over the last four tokens.
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4}
UNTIED = {"tie_word_embeddings": False}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
# By the family, and what is special about the model.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "pad_token_id": 0},
    "qwen2": SLIDING,
    "qwen2-tied": {"tie_word_embeddings": True},
    "gpt2": {**UNTIED, **NO_DROPOUT},
    "gpt2-tied": {"tie_word_embeddings": True, **NO_DROPOUT},
    "mistral": {"sliding_window": 4},
    "qwen3": SLIDING,
    "gemma2": {**UNTIED, "sliding_window": 4, "attn_logit_softcapping": 0.1, "final_logit_softcapping": 2.0},
    "gemma2-tied": {"sliding_window": 4, "final_logit_softcapping": 2.0},
    "gemma3_text": {**UNTIED, "sliding_window": 4},
    "gemma3_text-tied": {"sliding_window": 4},
    "phi3": {"sliding_window": 4, "partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "opt": {**UNTIED, "dropout": 0.0},
    "opt-projected": {**UNTIED, "dropout": 0.0, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [1], **EXPERTS},
    # With a plan in transformers and nothing here that names them.
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "olmo2": {},
}
LAYERS, BATCHES, MICRO_BATCHES, SAMPLES, LENGTH = 8, 3, 4, 2, 12
EVALUATED = 100  # the number of a batch that no training sees
USED_TOKENS = 9  # of 256, which is soon learnt


def is_of_norm(parameter: str) -> bool:
    return "norm" in parameter or ".ln_" in parameter


def model_config(name: str) -> Any:
    return tiny_config(name.partition("-")[0], LAYERS, **CONFIGS[name])


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All of a model's tensors, each of which must be in one file only."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        in_file = load_file(path)
        assert not in_file.keys() & tensors.keys()
        tensors.update(in_file)
    return tensors


class Counted:
    """safetensors' safe_open, which counts the bytes that are read of each tensor."""

    read: ClassVar[dict[str, int]] = {}

    def __init__(self, path: Path, **options: Any) -> None:
        self._file = safe_open(path, **options)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def keys(self) -> Any:
        return self._file.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._count(name, self._file.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        whole, count = self._file.get_slice(name), self._count

        class Slice:
            def get_shape(self) -> Any:
                return whole.get_shape()

            def __getitem__(self, index: Any) -> Tensor:
                return count(name, whole[index])

        return Slice()

    def _count(self, name: str, tensor: Tensor) -> Tensor:
        self.read[name] = self.read.get(name, 0) + tensor.nbytes
        return tensor


@dataclass(frozen=True)
class Case:
    """One training run of the model in `folder`."""

    folder: Path
    schedule: Any
    stages: int = 2
    attention: str | None = None
    experts: str | None = None
    with_positions: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    checkpointing: int = 0
    seeds: dict[str, Any] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        return Job(self.schedule, self.stages, MICRO_BATCHES, self.config)

    @property
    def averages_tokens(self) -> bool:
        """Whether its loss is the mean over tokens: not in DeepSpeed's own engine."""
        section = self.schedule if isinstance(self.schedule, dict) else {}
        return self.schedule is not None and section.get("loss_average") != "micro_batches"

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

    def layers(self) -> list[Any]:
        return pipeline_layers(AutoConfig.from_pretrained(self.folder), self.attention, experts=self.experts)

    def module(self) -> Any:
        """With the weights of the folder (collective)."""
        module = ds_vshape.PipelineModule(self.layers(), num_stages=self.stages,
                                          loss_fn=next_token_loss, partition_method=PARTITION_METHOD,
                                          activation_checkpoint_interval=self.checkpointing,
                                          checkpointable_layers=CHECKPOINTABLE_LAYERS, config=self.job.ds_config(),
                                          **self.seeds)
        assert load_weights(module, self.folder) == []
        return module

    def engine(self) -> Any:
        ds_checkpointing.configure(None, partition_activations=False)
        module = self.module()
        return ds_vshape.initialize(model=module, model_parameters=trained(module), config=self.job.ds_config())[0]

    def save(self, module: Any, folder: Path) -> None:
        """Write what has been trained (collective)."""
        save_model(module, AutoConfig.from_pretrained(self.folder), self.folder, folder)

    def plain_model(self) -> Any:
        """transformers' own, to be trained from the same weights."""
        return AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation=self.attention,
                                                    experts_implementation=self.experts).train()


def trained(module: Any) -> list[Any]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class Outcome:
    """What a rank, or the plain model, came to. `logits`: of the evaluated micro-batch; `in_b`: the parameters whose
    gradients never came from W; `forwards`: how often decoder layers ran."""

    losses: list[float]
    evaluated: float
    weights: dict[str, Tensor]
    logits: Tensor
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
        note_accumulated(engine, in_w)
    forwards = []
    for layer in engine.module.modules():
        if isinstance(layer, DecoderLayer):
            layer.register_forward_pre_hook(lambda *_: forwards.append(1))
    losses = [float(engine.train_batch(case.batch(batch))) for batch in range(BATCHES)]
    evaluated, outputs = engine.eval_batch(case.batch(EVALUATED, 1), num_micro_batches=1, return_logits=True)
    logits = torch.empty(0) if outputs is None else (outputs[0] if isinstance(outputs, tuple) else outputs)
    if folder is not None:
        case.save(engine.module, folder)
    return Outcome(losses, float(evaluated), {name: value.detach().clone() for name, value in weights.items()},
                   logits,
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
                              max((outcome.logits for outcome in of_ranks), key=Tensor.numel),
                              frozenset().union(*(outcome.in_b for outcome in of_ranks)),
                              sum(outcome.forwards for outcome in of_ranks)))
    return merged


def plain_outputs(model: Any, inputs: tuple[Tensor, ...], tokens: int | None = None) -> Any:
    """transformers' loss and logits, with labels as it wants them: the inputs, shifted inside. The loss is a mean, or
    the sum divided by `tokens`."""
    ids, mask, *positions = inputs
    return model(input_ids=ids, attention_mask=mask, position_ids=positions[0] if positions else None,
                 labels=torch.where(mask.bool(), ids, -100), use_cache=False, num_items_in_batch=tokens)


def evaluate(model: Any, case: Case) -> tuple[float, Tensor]:
    """The loss of the evaluated micro-batch, and its logits. Divided by the number of tokens or as a mean, one and the
    same number is rounded in two ways."""
    inputs, labels = case.micro_batch(EVALUATED, 0)
    tokens = int((labels != -100).sum()) if case.averages_tokens else None
    with torch.no_grad():
        outputs = plain_outputs(model.eval(), inputs, tokens)
    return float(outputs.loss), outputs.logits


def batch_loss(model: Any, case: Case, inputs: tuple[Tensor, ...], tokens: int) -> Tensor:
    """A micro-batch's loss, of which a batch's is the mean: over tokens, where the case asks for that. Router losses
    are averaged over micro-batches in any case."""
    if not case.averages_tokens:
        return plain_outputs(model, inputs).loss  # type: ignore[no-any-return]
    outputs = plain_outputs(model, inputs, tokens)
    routers = getattr(outputs, "aux_loss", None)
    if routers is None:
        return MICRO_BATCHES * outputs.loss  # type: ignore[no-any-return]
    routers = model.config.router_aux_loss_coef * routers
    return MICRO_BATCHES * next_token_loss(outputs.logits, shifted(inputs), tokens) + routers  # type: ignore


def shifted(inputs: tuple[Tensor, ...]) -> Tensor:
    """The labels that transformers makes of its own."""
    labels = torch.where(inputs[1].bool(), inputs[0], -100)
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()


def train_plainly(case: Case, optimizer_of: Callable[[Iterator[Any]], torch.optim.Optimizer] | None = None) -> Outcome:
    """With DeepSpeed's "Adam" or another optimizer."""
    model = case.plain_model()
    optimizer_of = optimizer_of or partial(torch.optim.AdamW, lr=1e-2)  # DeepSpeed takes "Adam" for AdamW.
    optimizer = optimizer_of(iter(trained(model)))
    losses = []
    for batch in range(BATCHES):
        total = torch.zeros(())
        tokens = sum(int((labels != -100).sum()) for _, labels in case.batch(batch))
        for inputs, _ in case.batch(batch):
            loss = batch_loss(model, case, inputs, tokens)
            (loss / MICRO_BATCHES).backward()
            total = total + loss.detach()
        losses.append(float(total / MICRO_BATCHES))
        optimizer.step()
        optimizer.zero_grad()
    evaluated, logits = evaluate(model, case)
    return Outcome(losses, evaluated, dict(model.named_parameters()), logits)
