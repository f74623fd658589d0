"""Small pipelines for tests of the engine: models, data, and training on ranks or in one process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime import utils as ds_utils
from torch import Tensor, nn
from torch.nn import functional

import ds_vshape

VOCABULARY, WIDTH, LENGTH, SAMPLES = 13, 8, 3, 2
BATCHES = range(4)
BASE_SEED = 1234

FP32: dict[str, Any] = {}
FP32_ZERO1: dict[str, Any] = {"zero_optimization": {"stage": 1}}
BF16_ZERO1: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
BF16_ZERO1_FP32: dict[str, Any] = {**BF16_ZERO1, "data_types": {"grad_accum_dtype": "fp32"}}
BF16_ZERO0: dict[str, Any] = {"bf16": {"enabled": True}}


class Block(nn.Module):
    """A residual block with all kinds of parameters: a norm, a biased and an unbiased product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class FrozenBlock(Block):
    """A block that isn't trained."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class FrozenEmbedding(nn.Embedding):
    """An embedding that isn't trained."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)
        self.requires_grad_(False)


class Dropping(Block):
    """A block with dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.3, self.training)


class Pair(nn.Module):
    """Two linear layers; what is computed with them is up to subclasses and tests."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class Fatal(Block):
    """A block that sends its process a signal in the middle of a batch, once armed."""

    signal = 0
    forwards_left = -1

    def forward(self, x: Tensor) -> Tensor:
        Fatal.forwards_left -= 1
        if Fatal.forwards_left == 0:
            os.kill(os.getpid(), Fatal.signal)
        return super().forward(x)


def head(embedding: nn.Module, x: Tensor) -> Tensor:
    """Logits by the embedding's weight."""
    return functional.linear(x, embedding.weight)  # type: ignore[arg-type]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def specs(blocks: int, block: type[nn.Module] = Block) -> list[LayerSpec]:
    """An embedding, blocks, a head of its own."""
    return [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(block) for _ in range(blocks)),
            LayerSpec(nn.Linear, WIDTH, VOCABULARY)]


def tied_specs(blocks: int) -> list[LayerSpec]:
    """An embedding, blocks, and the embedding again as head."""
    return [TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(Block) for _ in range(blocks)),
            TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH, forward_fn=head)]


def micro_batch(batch: int, number: int, replica: int) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens after them."""
    generator = torch.Generator().manual_seed(10007 * batch + 101 * number + replica)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def profiled(name: str, **more: Any) -> dict[str, Any]:
    """A section that asks for measured times."""
    return {"name": name, "times": "profile", "planning_seconds": 0.5, **more}


@dataclass(frozen=True)
class Job:
    """One training run; `schedule` (the config's section) None is DeepSpeed's own 1F1B engine.

    Gradients are summed up as DeepSpeed does unless the section says something else, so that results are equal to its
    bit for bit.
    """

    schedule: Any
    stages: int
    micro_batches: int
    config: dict[str, Any] = field(default_factory=dict)
    layers: tuple[Any, ...] | None = None

    def ds_config(self) -> dict[str, Any]:
        config = {
            "train_micro_batch_size_per_gpu": SAMPLES,
            "gradient_accumulation_steps": self.micro_batches,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            **self.config,
        }
        if self.schedule is None:
            return config
        section = {"name": self.schedule} if isinstance(self.schedule, str) else self.schedule
        if isinstance(section, dict):
            section = {"gradient_accumulation_fusion": False, **section}
        return {**config, "pipeline_schedule": section}

    def specs(self) -> list[Any]:
        return specs(2 * self.stages - 1) if self.layers is None else list(self.layers)

    def module(self, **module_options: Any) -> Any:
        """The PipelineModule on this rank (collective)."""
        options = {"loss_fn": cross_entropy, "partition_method": "uniform", "seed_layers": True, "base_seed": BASE_SEED,
                   **module_options}
        if self.schedule is None:
            return deepspeed.pipe.PipelineModule(self.specs(), num_stages=self.stages, **options)
        return ds_vshape.PipelineModule(self.specs(), num_stages=self.stages, config=self.ds_config(), **options)

    def engine(self, module: Any = None, **module_options: Any) -> Any:
        """The engine on this rank (collective), of `module` or else of a new one."""
        if module is None:
            module = self.module(**module_options)
        trained = [p for p in module.parameters() if p.requires_grad]
        return ds_vshape.initialize(model=module, model_parameters=trained, config=self.ds_config())[0]


def post_validated(job: Job) -> Job:
    """`job`, named by its schedule alone, with steps that are validated afterwards."""
    return replace(job, schedule={"name": job.schedule, "optimizer_post_validation": True})


@dataclass(frozen=True)
class Outcome:
    """The losses of all batches, and this rank's weights by layer."""

    losses: list[float]
    weights: dict[str, Tensor]


def data(engine: Any, batch: int) -> Any:
    """The micro-batches of a batch, for this rank's data parallel replica."""
    replica = engine.grid.get_data_parallel_rank()
    return iter([micro_batch(batch, number, replica) for number in range(engine.micro_batches)])


def train(engine: Any, batches: range) -> Outcome:
    losses = [float(engine.train_batch(data(engine, batch))) for batch in batches]
    return Outcome(losses, {name: value.clone() for name, value in engine.module.state_dict().items()})


# The batches before a checkpoint, and those after it.
BEFORE, AFTER = range(3), range(3, 6)


def train_and_save(rank: int, job: Job, folder: str) -> Outcome:
    """Of the batches after the checkpoint in `folder`."""
    engine = job.engine()
    train(engine, BEFORE)
    engine.save_checkpoint(folder)
    return train(engine, AFTER)


def merged(outcomes: list[Outcome]) -> Outcome:
    """One outcome of all ranks; replicas and losses must agree bit for bit."""
    weights: dict[str, Tensor] = {}
    for outcome in outcomes:
        assert outcome.losses == outcomes[0].losses
        for name, value in outcome.weights.items():
            assert torch.equal(weights.setdefault(name, value), value), f"replicas of {name} differ"
    return Outcome(outcomes[0].losses, weights)


def assert_equal(outcome: Outcome, oracle: Outcome) -> None:
    """The same losses and weights, bit for bit."""
    assert outcome.losses == oracle.losses
    assert outcome.weights.keys() == oracle.weights.keys()
    assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items())


class PlainModel(nn.Module):
    """The same layers in one process, with the names and seeds that DeepSpeed's PipelineModule gives them."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.functions: list[Any] = []
        self.tied_modules = nn.ModuleDict()
        for place, spec in enumerate(layers):
            ds_utils.set_random_seed(BASE_SEED + place)
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = spec.build()
                module = self.tied_modules[spec.key]
                self.functions.append(module if spec.forward_fn is None else
                                      lambda x, module=module, call=spec.forward_fn: call(module, x))
            elif not isinstance(spec, LayerSpec):
                self.functions.append(spec)
            else:
                module = spec.build()
                self.add_module(str(place), module)
                self.functions.append(module)

    def forward(self, x: Any) -> Any:
        for function in self.functions:
            x = function(x)
        return x


class PlainTraining:
    """What `job` should give, in fp32 and one process: the gradients of all micro-batches of all replicas averaged,
    then a step of AdamW."""

    def __init__(self, job: Job, replicas: int = 1, clip: float | None = None) -> None:
        self.model = PlainModel(job.specs())
        # DeepSpeed takes "Adam" for AdamW.
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self._replicas, self._clip = replicas, clip

    def train(self, batches: range, micro_batches: int) -> Outcome:
        losses = [self._batch(batch, micro_batches) for batch in batches]
        return Outcome(losses, {name: value.clone() for name, value in self.model.state_dict().items()})

    def _batch(self, batch: int, micro_batches: int) -> float:
        losses, grads = [], []
        for replica in range(self._replicas):
            total = torch.zeros(())
            for number in range(micro_batches):
                tokens, labels = micro_batch(batch, number, replica)
                loss = cross_entropy(self.model(tokens), labels)
                (loss / micro_batches).backward()
                total = total + loss.detach()
            losses.append(total / micro_batches)
            grads.append([p.grad for p in self.model.parameters()])
            self._optimizer.zero_grad()
        for p, *of_replicas in zip(self.model.parameters(), *grads, strict=True):
            p.grad = None if of_replicas[0] is None else sum(of_replicas[1:], of_replicas[0]) / self._replicas
        if self._clip is not None:
            self.last_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._clip))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(sum(losses[1:], losses[0]) / self._replicas)
