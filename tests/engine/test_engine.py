"""What the engine does besides training by a schedule: evaluation, data, clipping, shapes, modules, reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.runtime.utils import set_random_seed
from logged import Lines
from pipelines import (BATCHES, BF16_ZERO1_FP32, FP32, FP32_ZERO1, SAMPLES, VOCABULARY, WIDTH, Block, Dropping,
                       FrozenEmbedding, Job, PlainTraining, data, merged, micro_batch, specs, tied_specs, train)
from ranks import RanksFailed, run_ranks
from torch import Tensor, nn
from torch.nn import functional

V_SCHEDULES = ["v-min", "v-half", "v-zb"]


# -- evaluation


def evaluate_between_batches(rank: int, job: Job) -> list[Any]:
    engine = job.engine()
    seen: list[Any] = []
    for batch, count in enumerate((1, 2, 5, 9)):
        seen.append(float(engine.train_batch(data(engine, batch))))
        samples = iter([micro_batch(100 + batch, number, 0) for number in range(count)])
        seen.append(float(engine.eval_batch(samples, num_micro_batches=count)))
    loss, logits = engine.eval_batch(iter([micro_batch(7, 0, 0)]), return_logits=True, num_micro_batches=1)
    return [seen, float(loss), logits if engine.is_last_stage() else None]


@pytest.mark.quick_cases("1f1b", "v-half")
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", *V_SCHEDULES])
def test_evaluation_alternates_with_training(schedule: str) -> None:
    """Any number of micro-batches, fewer or more than in training and than stages; training isn't disturbed."""
    oracle = run_ranks(3, evaluate_between_batches, Job(None, 3, 4))
    ours = run_ranks(3, evaluate_between_batches, Job(schedule, 3, 4))
    assert [rank[0] for rank in ours] == [rank[0] for rank in oracle]
    assert [rank[1] for rank in ours] == [rank[1] for rank in oracle]
    logits, = (rank[2] for rank in oracle if rank[2] is not None)
    our_logits, = (rank[2] for rank in ours if rank[2] is not None)
    assert torch.equal(our_logits, logits)


def evaluate_without_loss(rank: int) -> bool:
    engine = Job("v-half", 2, 2).engine()
    engine.train_batch(data(engine, 0))
    _, logits = engine.eval_batch(iter([micro_batch(7, 0, 0)]), return_logits=True, num_micro_batches=1)
    output = engine.eval_batch(iter([micro_batch(7, 0, 0)]), compute_loss=False, num_micro_batches=1)
    return output is None if rank else torch.equal(output, logits)


def test_evaluation_without_loss() -> None:
    """It gives the outputs; DeepSpeed's own engine adds them to the last batch's loss and fails on their shape."""
    assert run_ranks(2, evaluate_without_loss) == [True, True]


def evaluate_nothing(rank: int) -> str:
    with pytest.raises(PipelineError) as error:
        Job("v-half", 2, 2).engine().eval_batch(iter([]), num_micro_batches=0)
    return str(error.value)


def test_evaluation_of_no_micro_batch_is_refused_on_every_rank() -> None:
    assert run_ranks(2, evaluate_nothing) == ["num_micro_batches = 0: must be at least 1"] * 2


# -- data


class Counted:
    """An iterator that knows how often it was asked."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples, self.asked = iter(samples), 0

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> Any:
        self.asked += 1
        return next(self.samples)


def count_loads(rank: int, schedule: str) -> int:
    engine = Job(schedule, 3, 4).engine()
    samples = Counted([micro_batch(0, number, 0) for number in range(4)])
    engine.train_batch(samples)
    return samples.asked


@pytest.mark.parametrize(["schedule", "loads"],
                         [("v-half", [4, 0, 0]), ("1f1b", [4, 0, 4]), ("interleaved-1f1b", [4, 0, 4])])
def test_data_is_loaded_where_it_is_needed(schedule: str, loads: list[int]) -> None:
    assert run_ranks(3, count_loads, schedule) == loads


def train_without_data_elsewhere(rank: int) -> float:
    """Ranks that load nothing may pass no iterator at all."""
    engine = Job("v-zb", 2, 3).engine()
    return float(engine.train_batch(data(engine, 0) if rank == 0 else None))


def test_v_needs_data_on_rank_0_only() -> None:
    first, second = run_ranks(2, train_without_data_elsewhere)
    assert first == second


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: int) -> Any:
        inputs, labels = micro_batch(place, 0, 0)
        return inputs[0], labels[0]


def train_on_training_data(rank: int, job: Job) -> tuple[list[float], bool]:
    from ds_vshape import initialize
    module = job.engine().module
    engine = initialize(model=module, model_parameters=module.parameters(), config=job.ds_config(),
                        training_data=Samples())[0]
    return [float(engine.train_batch()) for _ in range(3)], engine.data_iterator is not None


@pytest.mark.quick_cases("v-half")
@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_training_data(schedule: str) -> None:
    oracle = run_ranks(3, train_on_training_data, Job(None, 3, 2))
    ours = run_ranks(3, train_on_training_data, Job(schedule, 3, 2))
    assert [losses for losses, _ in ours] == [losses for losses, _ in oracle]
    assert [loads for _, loads in ours] == ([True, False, False] if schedule == "v-half" else [True, False, True])


# -- gradients


def norm_and_outcome(rank: int, job: Job) -> Any:
    engine = job.engine()
    return train(engine, BATCHES), float(engine.get_global_grad_norm())


@pytest.mark.quick_cases("v-zb-zero0", "v-half-zero1", "1f1b-zero0")
@pytest.mark.parametrize("config", [FP32, FP32_ZERO1], ids=["zero0", "zero1"])
@pytest.mark.parametrize("schedule", ["1f1b", "v-half", "v-zb"])
def test_clipping_counts_all_of_the_model(schedule: str, config: dict[str, Any]) -> None:
    """A norm adds up squares in another order than the plain model: equal to rounding."""
    job = Job(schedule, 2, 3, {**config, "gradient_clipping": 0.5})
    results = run_ranks(2, norm_and_outcome, job)
    outcome = merged([result[0] for result in results])
    plain = PlainTraining(job, clip=0.5)
    oracle = plain.train(BATCHES, 3)
    assert outcome.losses == pytest.approx(oracle.losses, rel=1e-5)
    for name, value in oracle.weights.items():
        torch.testing.assert_close(outcome.weights[name], value, rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1]) == pytest.approx(plain.last_norm, rel=1e-5)
    assert plain.last_norm > 0.5, "a clip that never acts proves nothing"


def train_tied(rank: int, job: Job) -> tuple[Any, list[str], int]:
    engine = job.engine()
    tied = [name for name, _ in engine.module.named_parameters() if name.startswith("tied_modules")]
    return train(engine, BATCHES), tied, len(engine.module.tied_comms)


@pytest.mark.quick_cases("v-half-zero1", "v-zb-zero0", "zb-h1-zero1", "1f1b-zero0")
@pytest.mark.parametrize("config", [FP32, FP32_ZERO1], ids=["zero0", "zero1"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", *V_SCHEDULES])
def test_tied_layers(schedule: str, config: dict[str, Any]) -> None:
    """With V the embedding and the head are one module on rank 0. Its gradient then adds up both uses as they come,
    where 1F1B adds them up apart and sums the two: equal to rounding."""
    job = Job(schedule, 2, 4, config, tuple(tied_specs(4)))
    results = run_ranks(2, train_tied, job)
    outcome = merged([result[0] for result in results])
    oracle = PlainTraining(job).train(BATCHES, 4)
    assert outcome.losses == pytest.approx(oracle.losses, rel=1e-5)
    for name, value in oracle.weights.items():
        torch.testing.assert_close(outcome.weights[name], value, rtol=1e-4, atol=1e-5)
    where, groups = [result[1] for result in results], [result[2] for result in results]
    name = "tied_modules.embedding.weight"
    assert (where, groups) == (([[name], []], [0, 0]) if schedule in V_SCHEDULES else ([[name], [name]], [1, 1]))


# -- modules


def seed(number: int) -> None:
    """DeepSpeed seeds with what its partition gives, which for most methods are NumPy's integers: those it refuses."""
    set_random_seed(int(number))


@pytest.mark.parametrize("method", ["uniform", "parameters", "type:Block"])
def test_seeded_weights_and_names_are_those_of_deepspeed(method: str) -> None:
    def weights(schedule: str | None) -> dict[str, Tensor]:
        job = Job(schedule, 2, 2)
        options = {} if schedule else {"seed_fn": seed}
        ranks = run_ranks(2, lambda rank: job.engine(partition_method=method, **options).module.state_dict())
        assert not ranks[0].keys() & ranks[1].keys()
        return {**ranks[0], **ranks[1]}

    oracle = weights(None)
    for schedule in ("1f1b", "v-half", "interleaved-1f1b"):
        ours = weights(schedule)
        assert ours.keys() == oracle.keys()
        assert all(torch.equal(ours[name], value) for name, value in oracle.items())


def test_dropout_does_not_depend_on_the_schedule() -> None:
    def losses(schedule: str | None) -> list[float]:
        job = Job(schedule, 3, 5, layers=tuple(specs(6, Dropping)))
        return run_ranks(3, lambda rank: train(job.engine(), BATCHES).losses)[0]

    oracle = losses(None)
    plain = PlainTraining(Job(None, 3, 5, layers=tuple(specs(6, Dropping)))).train(BATCHES, 5).losses
    assert oracle != pytest.approx(plain, rel=1e-3), "dropout must act"
    for schedule in ("zb-h1", *V_SCHEDULES):
        assert losses(schedule) == oracle


class WithMask(nn.Module):
    """Passes on (x, a boolean mask, an integer, a float that wants no gradient)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = functional.one_hot(tokens, VOCABULARY).float()
        return x, tokens > 5, tokens.sum(), torch.full((2, 1), 0.5)


class Masked(nn.Module):
    def __init__(self, width: int = VOCABULARY) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, mask, total, scale = inputs
        assert mask.dtype is torch.bool and total.dtype is torch.int64 and not scale.requires_grad
        return x + scale.mean() * self.linear(x).masked_fill(mask[..., None], 0.0) * (total % 3), mask, total, scale


class Unmask(nn.Module):
    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0]


class InPlace(nn.Module):
    """Changes its input, which is a stage's input when it stands first in one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(0.5).relu_())


class Twice(nn.Module):
    """Two outputs that both want gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        left, right = x if isinstance(x, tuple) else (x, x)
        return left + self.linear(right), right * 2


class Join(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0] + x[1]


HEAD = LayerSpec(nn.Linear, WIDTH, VOCABULARY)
EMBEDDING = LayerSpec(nn.Embedding, VOCABULARY, WIDTH)
MODULES: dict[str, list[Any]] = {
    "masks and integers": [LayerSpec(WithMask), *(LayerSpec(Masked) for _ in range(4)), LayerSpec(Unmask)],
    "inputs changed in place": [EMBEDDING, *(LayerSpec(InPlace) for _ in range(4)), HEAD],
    "two gradients": [EMBEDDING, *(LayerSpec(Twice) for _ in range(4)), LayerSpec(Join), HEAD],
    "a frozen first stage": [LayerSpec(FrozenEmbedding), *(LayerSpec(Block) for _ in range(4)), HEAD],
    "functions": [EMBEDDING, torch.tanh, LayerSpec(Block), torch.relu, LayerSpec(Block), HEAD, lambda x: x * 2],
}


@pytest.mark.quick_cases("two gradients-v-zb",
                         "inputs changed in place-v-min",
                         "masks and integers-1f1b",
                         "a frozen first stage-zb-h1",
                         "a frozen first stage-v-zb")
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "v-min", "v-zb"])
@pytest.mark.parametrize("layers", MODULES)
def test_what_crosses_stages(layers: str, schedule: str) -> None:
    """Bit for bit what the plain model does; where a tensor is used twice, the sum may round differently."""
    job = Job(schedule, 2, 3, layers=tuple(MODULES[layers]))
    outcome = merged(run_ranks(2, lambda rank: train(job.engine(), BATCHES)))
    oracle = PlainTraining(job).train(BATCHES, 3)
    assert outcome.losses == (pytest.approx(oracle.losses, rel=1e-5) if layers == "two gradients" else oracle.losses)


@pytest.mark.parametrize("config", [FP32, BF16_ZERO1_FP32], ids=["fp32", "bf16"])
def test_norms_deferred_too(config: dict[str, Any]) -> None:
    oracle, ours = (merged(run_ranks(2, lambda rank: train(Job(section, 2, 3, config).engine(), BATCHES)))
                    for section in (None, {"name": "v-half", "deferred": "all"}))
    assert ours.losses == oracle.losses
    assert all(torch.equal(ours.weights[name], value) for name, value in oracle.weights.items())


# -- shapes


def batch_of_length(length: int, count: int) -> Any:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(VOCABULARY, (count, SAMPLES, length + 1), generator=generator)
    return iter([(sample[:, :-1], sample[:, 1:]) for sample in tokens])


def train_lengths(rank: int, job: Job, dynamic: bool) -> list[float]:
    engine = job.engine(dynamic_shape=dynamic)
    losses = []
    for length in (3, 5, 2, 5):
        if not dynamic:
            engine.reset_activation_shape()
        losses.append(float(engine.train_batch(batch_of_length(length, engine.micro_batches))))
    return losses


@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_changing_lengths(schedule: str) -> None:
    dynamic = run_ranks(2, train_lengths, Job(schedule, 2, 3), True)
    reset = run_ranks(2, train_lengths, Job(schedule, 2, 3), False)
    oracle = run_ranks(1, train_lengths, Job(None, 1, 3, layers=tuple(specs(3))), True)
    assert dynamic == reset == oracle * 2


def train_unannounced_length(rank: int) -> None:
    engine = Job("v-half", 2, 3).engine()
    engine.train_batch(batch_of_length(3, 3))
    engine.train_batch(batch_of_length(4, 3))


def test_an_unannounced_length_is_one_clear_error() -> None:
    with pytest.raises(RanksFailed, match=r"activation for stage 1 changed: (?s:.*)dynamic_shape=True"):
        run_ranks(2, train_unannounced_length, timeout=60)


# -- reports


def report(rank: int, job: Job) -> tuple[dict[str, Any], list[str]]:
    with Lines() as lines:
        engine = job.engine()
        train(engine, BATCHES)
    return engine.pipeline_report(), lines.with_word("have their gradients in W")


def test_with_norms_deferred_nothing_is_left_in_b() -> None:
    for _, lines in run_ranks(2, report, Job({"name": "v-half", "deferred": "all"}, 2, 4)):
        line, = lines
        assert line.endswith("100.0% of the parameters have their gradients in W")


def test_report() -> None:
    results = run_ranks(2, report, Job("v-half", 2, 4))
    first, lines = results[0]
    assert all(other == first for other, _ in results)
    assert first["schedule"] == "v-half" and first["peak_activations"] == [4, 4]
    assert 0 < first["predicted_bubble"] < 1 and 0 < first["measured_bubble"] < 1
    # 2 blocks with norms of 16 of their 288 numbers, an embedding and a head; said once, not once a batch.
    line, = lines
    assert "in B: 1.norm.weight, 1.norm.bias" in line and "down.weight" not in line
