"""What a PipelineModule may be made of: tied, frozen, seeded, compiled layers and functions, in any place.

The oracle is the plain model in one process, or DeepSpeed's own engine.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from internals import note_sends
from logged import Lines
from pipelines import (BATCHES, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, VOCABULARY, WIDTH, Block, Dropping,
                       FrozenBlock, FrozenEmbedding, Job, Outcome, PlainTraining, cross_entropy, data, merged, specs,
                       train)
from ranks import RanksFailed, run_ranks
from torch import Tensor, nn
from torch.nn import functional

import ds_vshape
from ds_vshape.module.fast_setattr import FastSetattr
from ds_vshape.schedule.lowering import Content
from ds_vshape.split_backward import WeightGradientStore

SCHEDULES = ["1f1b", "zb-h1", "v-half", "v-zb"]
EMBEDDING = LayerSpec(nn.Embedding, VOCABULARY, WIDTH)
BLOCK = LayerSpec(Block)
HEAD = LayerSpec(nn.Linear, WIDTH, VOCABULARY)


def train_each(rank: int, jobs: list[Job], options: dict[str, Any]) -> list[Outcome]:
    return [train(job.engine(**options), BATCHES) for job in jobs]


def outcomes_of(jobs: list[Job], ranks: int = 2, **options: Any) -> list[Outcome]:
    """What each of `jobs` trains, one after the other on the same ranks."""
    return [merged(list(of_ranks)) for of_ranks in zip(*run_ranks(ranks, train_each, jobs, options))]


def plain(job: Job) -> Outcome:
    return PlainTraining(job).train(BATCHES, job.micro_batches)


# -- tied layers


class Mixing(nn.Module):
    """A layer of weights that others can tie to, and one that they can't."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def forwards(mixing: Any, x: Tensor) -> Tensor:
    return mixing(x) * 0.5  # type: ignore[no-any-return]


def backwards(mixing: Any, x: Tensor) -> Tensor:
    """The transposed weight; the bias isn't used."""
    return functional.linear(x, mixing.inner.weight.t())


class FrozenMixing(Mixing):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


def tied(forward_fn: Any = None, kind: type[nn.Module] = Mixing) -> TiedLayerSpec:
    return TiedLayerSpec("mixing", kind, forward_fn=forward_fn, tied_weight_attr=["inner.weight", "inner.bias"])


# With the uniform partition of a V, layers 0 1 6 7 are on rank 0 and 2 3 4 5 on rank 1; of 1F1B, 0 1 2 3 and 4 5 6 7.
TIES: dict[str, list[Any]] = {
    "the later one on the lower rank": [EMBEDDING, BLOCK, tied(), BLOCK, BLOCK, BLOCK, tied(backwards), HEAD],
    "a function of the module comes first": [EMBEDDING, BLOCK, tied(backwards), BLOCK, BLOCK, BLOCK, tied(), HEAD],
    "functions of the module alone": [EMBEDDING, BLOCK, tied(forwards), BLOCK, BLOCK, BLOCK, tied(backwards), HEAD],
    "two chunks of a rank": [EMBEDDING, BLOCK, tied(), BLOCK, tied(backwards), BLOCK, BLOCK, HEAD],
    "three layers": [EMBEDDING, tied(), BLOCK, tied(backwards), tied(), BLOCK, BLOCK, HEAD],
    "one chunk": [EMBEDDING, BLOCK, BLOCK, BLOCK, tied(), tied(), BLOCK, HEAD],
    "frozen": [EMBEDDING, BLOCK, tied(kind=FrozenMixing), BLOCK, BLOCK, BLOCK, tied(backwards, FrozenMixing), HEAD],
}
TIED_JOBS = [("1f1b", FP32), ("1f1b", BF16_ZERO1_FP32), ("zb-h1", FP32_ZERO1), ("v-half", FP32),
             ("v-half", BF16_ZERO1), ("v-zb", FP32_ZERO1), ("v-zb", BF16_ZERO1_FP32)]


@pytest.mark.quick_cases("two chunks of a rank")
@pytest.mark.parametrize("layers", TIES)
def test_tied_layers_anywhere(layers: str) -> None:
    """Weights, all of their copies, are the plain model's. Each rank adds up its own uses first, so that the sum over
    ranks may round differently."""
    jobs = [Job(schedule, 2, 3, precision, tuple(TIES[layers])) for schedule, precision in TIED_JOBS]
    oracle = plain(jobs[0])
    for job, outcome in zip(jobs, outcomes_of(jobs), strict=True):
        if "bf16" in job.config:
            assert outcome.losses == pytest.approx(oracle.losses, rel=0.01), job
            continue
        assert outcome.losses == pytest.approx(oracle.losses, rel=1e-5), job
        for name, value in oracle.weights.items():
            torch.testing.assert_close(outcome.weights[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}, {job}")


def train_save_train(rank: int, jobs: list[Job], folder: str) -> list[tuple[Outcome, Outcome]]:
    """The weights that were saved, and the losses after them."""
    outcomes = []
    for number, job in enumerate(jobs):
        engine = job.engine()
        saved = train(engine, range(2))
        engine.save_checkpoint(f"{folder}/{number}")
        outcomes.append((saved, train(engine, range(2, 4))))
    return outcomes


def load_train(rank: int, jobs: list[tuple[Job, str]], weights_alone: bool) -> list[tuple[Outcome, Outcome]]:
    outcomes = []
    for job, folder in jobs:
        # Weights of other seeds, all of which loading must replace.
        engine = job.engine(base_seed=7)
        engine.load_checkpoint(folder, load_module_only=weights_alone)
        loaded = train(engine, range(0))
        outcomes.append((loaded, loaded if weights_alone else train(engine, range(2, 4))))
    return outcomes


@pytest.mark.slow
def test_checkpoints_have_tied_weights(tmp_path: Path) -> None:
    """Under the same schedule training continues bit for bit; under another the weights are right on all ranks."""
    ties = list(TIES)[:4]
    jobs = [Job(schedule, 2, 3, FP32_ZERO1, tuple(TIES[layers])) for layers in ties for schedule in ("1f1b", "v-half")]
    saved = list(zip(*run_ranks(2, train_save_train, jobs, str(tmp_path))))
    folders = [str(tmp_path / str(number)) for number in range(len(jobs))]
    loaded = list(zip(*run_ranks(2, load_train, list(zip(jobs, folders)), False)))
    others = [jobs[number ^ 1] for number in range(len(jobs))]
    elsewhere = list(zip(*run_ranks(2, load_train, list(zip(others, folders)), True)))
    for number, job in enumerate(jobs):
        (before, after), (there, then), (other, _) = (
            [merged(list(of_ranks)) for of_ranks in zip(*outcomes[number])] for outcomes in (saved, loaded, elsewhere))
        assert then.losses == after.losses, job
        for found in (there, other):
            assert found.weights.keys() == before.weights.keys(), job
            assert all(torch.equal(found.weights[name], value) for name, value in before.weights.items()), job


def save(rank: int, job: Job, folder: str) -> None:
    job.engine().save_checkpoint(folder)


def test_weights_that_deepspeed_did_not_save_are_missed(tmp_path: Path) -> None:
    layers = tuple(TIES["functions of the module alone"])
    run_ranks(2, save, Job(None, 2, 3, layers=layers), str(tmp_path))
    with pytest.raises(RanksFailed, match=r"no weights of the tied layers 'mixing' \(layer 2\)"):
        run_ranks(2, load_train, [(Job("v-half", 2, 3, layers=layers), str(tmp_path))], True)


def partly_tied(rank: int, schedule: str) -> tuple[dict[str, bool], list[str]]:
    """Which parameters of the tied module another rank counts, and the warning about it."""
    mixing = TiedLayerSpec("mixing", Mixing, tied_weight_attr="inner.weight")
    layers = (EMBEDDING, BLOCK, mixing, BLOCK, BLOCK, BLOCK, mixing, HEAD)
    with Lines() as lines:
        module = Job(schedule, 2, 3, layers=layers).engine().module
    counted = {name: p.ds_pipe_replicated for name, p in module.tied_modules["mixing"].named_parameters()}
    return counted, lines.with_word("tied layers")


def test_a_parameter_that_is_not_tied_is_named_and_counts_on_each_rank() -> None:
    line = ("tied layers 'mixing' (2, 6): tied_weight_attr doesn't name inner.bias, which layers on one rank share and "
            "others don't")
    for schedule, first in (("1f1b", 0), ("v-half", 1)):
        results = run_ranks(2, partly_tied, schedule)
        assert results[0][0] == {"inner.weight": False, "inner.bias": False}
        assert results[1][0] == {"inner.weight": True, "inner.bias": False}
        assert [lines for _, lines in results] == [[line], []] if first == 0 else [[], [line]]


# -- frozen layers, LoRA


class FrozenHead(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY)
        self.requires_grad_(False)


class LoraLinear(nn.Module):
    """A frozen product and a trained one of low rank beside it, in the structure of peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))  # type: ignore[no-any-return]


class LoraBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.up, self.down = LoraLinear(self.up), LoraLinear(self.down)  # type: ignore[assignment]


FROZEN, FROZEN_HEAD, LORA = LayerSpec(FrozenBlock), LayerSpec(FrozenHead), LayerSpec(LoraBlock)
FROZEN_EMBEDDING = LayerSpec(FrozenEmbedding)
PARTLY_FROZEN: dict[str, list[Any]] = {
    "LoRA": [FROZEN_EMBEDDING, LORA, LORA, LORA, LORA, LORA, LORA, FROZEN_HEAD],
    "a first stage": [FROZEN_EMBEDDING, FROZEN, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, HEAD],
    "the first half": [FROZEN_EMBEDDING, FROZEN, FROZEN, FROZEN, BLOCK, BLOCK, BLOCK, HEAD],
    "both ends": [FROZEN_EMBEDDING, FROZEN, BLOCK, BLOCK, BLOCK, BLOCK, FROZEN, FROZEN_HEAD],
    "the middle": [EMBEDDING, BLOCK, FROZEN, FROZEN, FROZEN, FROZEN, BLOCK, HEAD],
    "all but one layer": [FROZEN_EMBEDDING, FROZEN, FROZEN, BLOCK, FROZEN, FROZEN, FROZEN, FROZEN_HEAD],
}
CLIPPED = {**FP32, "gradient_clipping": 0.01}


@pytest.mark.quick_cases("LoRA-kept")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("frozen", PARTLY_FROZEN)
def test_frozen_layers(frozen: str, checkpointed: bool) -> None:
    """Whatever isn't trained, a whole rank included, and with DeepSpeed's reentrant checkpointing."""
    layers = tuple(PARTLY_FROZEN[frozen])
    jobs = [Job(schedule, 2, 3, precision, layers) for schedule, precision in
            zip(SCHEDULES, (FP32, FP32_ZERO1, FP32_ZERO1, FP32), strict=True)]
    oracle = plain(jobs[0])
    options = {"activation_checkpoint_interval": 1} if checkpointed else {}
    outcomes = outcomes_of(jobs + [Job("v-half", 2, 3, config, layers) for config in (CLIPPED, BF16_ZERO1_FP32)],
                           **options)
    for job, outcome in zip(jobs, outcomes):
        assert outcome.losses == oracle.losses, job
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), job
    clipped = PlainTraining(jobs[0], clip=0.01).train(BATCHES, 3)
    assert outcomes[-2].losses == pytest.approx(clipped.losses, rel=1e-5) != oracle.losses
    assert outcomes[-1].losses == pytest.approx(oracle.losses, rel=0.01)


def count_work(rank: int, job: Job) -> tuple[int, int]:
    """In a batch whose messages are known: how many weight gradients came late, and how many gradients were sent."""
    engine = job.engine()
    engine.train_batch(data(engine, 0))
    late: list[Any] = []
    sent: list[Any] = []
    run_next = WeightGradientStore.run_next
    WeightGradientStore.run_next = lambda *of: (late.append(of), run_next(*of))[1]  # type: ignore[method-assign]
    note_sends(lambda *of: sent.append(of))
    engine.train_batch(data(engine, 1))
    return len(late), sum(len(tensors) for message, tensors in sent
                          if message.channel.content is Content.GRADIENT)


def test_nothing_is_done_for_what_is_not_trained() -> None:
    """Of a V on two ranks, in a batch of 3: stages 0 and 3 are on rank 0, 1 and 2 on rank 1. A trained block has two
    products, a head one. Of the gradients between stages, that of 2 by 3 goes to rank 1, that of 0 by 1 to rank 0. The
    last W of stage 0 comes with its B."""
    def work(layers: str) -> list[tuple[int, int]]:
        return run_ranks(2, count_work, Job("v-half", 2, 3, layers=tuple(PARTLY_FROZEN[layers])))

    assert work("the first half") == [(3 * (2 + 1), 3), (3 * (2 + 2), 0)]
    assert work("a first stage") == [(3 * (2 + 1), 3), (3 * 4 * 2, 0)]
    assert work("the middle") == [(2 * (1 + 2) + 3 * (2 + 1), 3), (0, 3)]
    assert work("LoRA") == [(2 * 4 + 3 * 4, 3), (3 * 4 * 4, 3)]


# -- functions, containers, subclasses, uneven partitions


def double(x: Tensor) -> Tensor:
    return x * 2


FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "a stage of functions alone": ([EMBEDDING, BLOCK, double, torch.tanh, BLOCK, lambda x: x - 1, BLOCK, HEAD],
                                   [0, 2, 4, 6, 8]),
    "a rank of functions alone": ([EMBEDDING, BLOCK, double, torch.tanh, torch.relu, torch.sigmoid, BLOCK, HEAD],
                                  "uniform"),
    "containers": ([EMBEDDING, LayerSpec(nn.Sequential, nn.Linear(WIDTH, WIDTH), nn.Tanh(), Block()), double, BLOCK,
                    nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), BLOCK, nn.Identity(), HEAD], "parameters"),
}


@pytest.mark.parametrize("case", FUNCTIONS)
@pytest.mark.quick_cases("a rank of functions alone")
def test_functions_and_containers(case: str) -> None:
    """Some of the layers are modules that exist already, and are trained: each job gets its own by a fork."""
    layers, method = FUNCTIONS[case]
    oracle, = outcomes_of([Job(None, 1, 3, FP32_ZERO1, tuple(layers))], 1)
    for schedule, of_schedule in [("1f1b", "uniform"), ("v-half", method), ("v-zb", method)]:
        outcome, = outcomes_of([Job(schedule, 2, 3, FP32_ZERO1, tuple(layers))], partition_method=of_schedule)
        assert outcome.losses == oracle.losses, schedule
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), schedule


@pytest.mark.parametrize("method", ["uniform", "parameters", "type:Block"])
@pytest.mark.quick_cases("type:Block")
def test_layers_that_divide_unevenly(method: str) -> None:
    """11 layers on 4 ranks, which are 8 stages of a V."""
    layers = (EMBEDDING, BLOCK, double, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, double, HEAD)
    jobs = [Job(schedule, 4, 5, FP32, layers) for schedule in SCHEDULES]
    oracle = plain(jobs[0])
    for job, outcome in zip(jobs, outcomes_of(jobs, 4, partition_method=method), strict=True):
        assert outcome.losses == oracle.losses, job
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), job


class Watching:
    """A user's module with hooks on itself and on its layers, and a forward of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: Counter[str] = Counter()
        self.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1,))
        self.register_forward_hook(lambda module, inputs, outputs: outputs * 1)
        for layer in self.modules():
            if isinstance(layer, Block):
                layer.register_forward_hook(self._see)

    def _see(self, layer: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
        self.seen["layer"] += 1
        return outputs * 2

    def forward(self, forward_input: Any) -> Any:
        self.seen["module"] += 1
        return super().forward(forward_input) + 1


class StockWatching(Watching, deepspeed.pipe.PipelineModule):
    pass


class OurWatching(Watching, ds_vshape.PipelineModule):
    pass


def train_watching(rank: int, job: Job, kind: type[Any]) -> tuple[Outcome, Counter[str]]:
    options = {} if job.schedule is None else {"config": job.ds_config()}
    module = kind(job.specs(), num_stages=job.stages, loss_fn=cross_entropy, partition_method="uniform",
                  seed_layers=True, **options)
    engine = ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=job.ds_config())[0]
    return train(engine, BATCHES), module.seen


def test_a_subclass_with_hooks_and_a_forward() -> None:
    """A rank's forward runs once for each of its stages: two ranks of a V do what four of DeepSpeed's do."""
    layers = tuple([EMBEDDING, *[BLOCK] * 6, HEAD])
    stock = run_ranks(4, train_watching, Job(None, 4, 3, layers=layers), StockWatching)
    oracle = merged([outcome for outcome, _ in stock])
    for schedule in ("v-half", "v-zb"):
        results = run_ranks(2, train_watching, Job(schedule, 2, 3, layers=layers), OurWatching)
        outcome = merged([outcome for outcome, _ in results])
        assert outcome.losses == oracle.losses, schedule
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), schedule
        seen = [stock[first][1] + stock[second][1] for first, second in ((0, 3), (1, 2))]
        assert [counts for _, counts in results] == seen, schedule


# -- dropout and seeds


SEEDED: list[tuple[str, Any, int, bool]] = [
    # schedule, partition, layers between checkpoints, reentrant
    ("1f1b", "uniform", 0, True), ("1f1b", [0, 3, 8], 1, False), ("zb-h1", [0, 5, 8], 2, True),
    ("v-min", [0, 1, 4, 6, 8], 3, True), ("v-half", "uniform", 0, True), ("v-half", [0, 1, 4, 6, 8], 2, False),
    ("v-zb", [0, 3, 4, 6, 8], 1, True), ("v-zb", "uniform", 4, False), ("interleaved-1f1b", [0, 2, 5, 7, 8], 2, True),
]


def train_seeded(rank: int, cases: list[tuple[Any, Any, int, bool]], base_seed: int) -> list[Outcome]:
    ds_checkpointing.configure(None, partition_activations=False)
    return [train(Job(schedule, 2, 5, {"pipeline": {"use_reentrant": reentrant}}, tuple(specs(6, Dropping))).engine(
        partition_method=partition, activation_checkpoint_interval=interval, base_seed=base_seed), BATCHES)
        for schedule, partition, interval, reentrant in cases]


@pytest.mark.slow
def test_dropout_depends_on_seeds_alone() -> None:
    """Whatever the schedule, the partition and the checkpoints: DeepSpeed's own losses without checkpoints."""
    oracles = {}
    for base_seed, cases in ((1234, SEEDED), (77, SEEDED[3::4])):
        (oracle,), *_ = run_ranks(2, train_seeded, [(None, "uniform", 0, True)], base_seed)
        oracles[base_seed] = oracle.losses
        for case, *outcome in zip(cases, *run_ranks(2, train_seeded, cases, base_seed), strict=True):
            assert merged(outcome).losses == oracle.losses, (base_seed, case)
    assert oracles[1234] != oracles[77]
    assert oracles[1234] != plain(Job(None, 2, 5, layers=tuple(specs(6)))).losses, "dropout must act"


# -- attributes


def test_attributes_are_registered_as_in_any_module() -> None:
    class Fast(FastSetattr, nn.Module):
        pass

    fast, value = Fast(), torch.ones(2)
    fast.plain = fast.weight = fast.layer = None
    for _ in range(2):
        fast.plain, fast.buffer = value, nn.Buffer(value)
        fast.weight, fast.layer = nn.Parameter(value), nn.Linear(1, 1, bias=False)
    assert fast.plain is value
    assert list(fast.state_dict()) == ["weight", "buffer", "layer.weight"]
    with pytest.raises(KeyError, match="attribute 'plain' already exists"):
        fast.plain = nn.Buffer(value)
