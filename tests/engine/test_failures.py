"""A batch that fails on one rank fails on all of them, hangs none, and leaves the engine as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from pipelines import (BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, Block, Dropping, Job, cross_entropy, data,
                       micro_batch, specs)
from ranks import run_ranks
from torch import Tensor

from ds_vshape.comm import channels
from ds_vshape.comm.payload import TensorSignature

BATCHES = range(3)
# One before any message was announced, and one after.
FAILING = (0, 1)
CONFIGS = {"fp32": FP32, "fp32 ZeRO-1": FP32_ZERO1, "bf16": BF16_ZERO1, "bf16 accumulating fp32": BF16_ZERO1_FP32}


class Faulty(Block):
    """A block that raises in one of its passes, once armed."""

    forwards_left = backwards_left = -1

    def forward(self, x: Tensor) -> Tensor:
        Faulty.forwards_left -= 1
        if Faulty.forwards_left == 0:
            raise ZeroDivisionError("a layer had enough")
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(self._backward)
        return y

    def _backward(self, gradient: Tensor) -> None:
        Faulty.backwards_left -= 1
        if Faulty.backwards_left == 0:
            raise FloatingPointError("a gradient had enough")


class ElsewhereOnce(Block):
    """A block that gives a tensor on another device, once armed."""

    forwards_left = -1

    def forward(self, x: Tensor) -> Tensor:
        ElsewhereOnce.forwards_left -= 1
        y = super().forward(x)
        return y.to("meta") if ElsewhereOnce.forwards_left == 0 else y


class FaultyLoss:
    """A loss that raises once armed."""

    calls_left = -1

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        FaultyLoss.calls_left -= 1
        if FaultyLoss.calls_left == 0:
            raise KeyError("no loss today")
        return cross_entropy(logits, labels)


def layers(stages: int, faulty: int | None = None) -> tuple[Any, ...]:
    """An embedding, a block with dropout for each stage, a head; the block at a place may be faulty."""
    chosen = specs(2 * stages, Dropping)
    if faulty is not None:
        chosen[faulty] = LayerSpec(Faulty)
    return tuple(chosen)


def too_short(engine: Any, batch: int) -> Iterator[Any]:
    return islice(data(engine, batch), 2)


def shorter_on_replica_1(engine: Any, batch: int) -> Iterator[Any]:
    return islice(data(engine, batch), 4 - engine.grid.get_data_parallel_rank())


def forward_raises(engine: Any, batch: int) -> Iterator[Any]:
    Faulty.forwards_left = 3
    return data(engine, batch)


def backward_raises(engine: Any, batch: int) -> Iterator[Any]:
    Faulty.backwards_left = 2
    return data(engine, batch)


def not_here(engine: Any, batch: int) -> Iterator[Any]:
    ElsewhereOnce.forwards_left = 2
    return data(engine, batch)


def no_memory_for_a_message(engine: Any, batch: int) -> Iterator[Any]:
    """On one rank in the middle."""
    if engine.stage_id == 1:
        failing_once(TensorSignature, "empty", torch.OutOfMemoryError("no memory for a message"))
    return data(engine, batch)


def message_cannot_start(engine: Any, batch: int) -> Iterator[Any]:
    """On one rank, of a message of two tensors the second."""
    if engine.stage_id == 1:
        failing_once(channels, "settled", RuntimeError("no message today"), call=2)
    return data(engine, batch)


def failing_once(place: Any, name: str, error: Exception, call: int = 1) -> None:
    """Let call number `call` of a function from now on raise."""
    function, calls = getattr(place, name), count(1)

    def failing(*args: Any) -> Any:
        if next(calls) == call:
            setattr(place, name, function)
            raise error
        return function(*args)

    setattr(place, name, failing)


def loss_raises(engine: Any, batch: int) -> Iterator[Any]:
    FaultyLoss.calls_left = 2
    return data(engine, batch)


def train_through(rank: int, job: Job,
                  corrupt: Callable[[Any, int], Any]) -> tuple[list[float], list[float], list[str]]:
    """The losses without failures and with, and the errors: `FAILING` are first tried with corrupt data."""
    engine = job.engine(loss_fn=FaultyLoss())
    oracle = [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]
    engine = job.engine(loss_fn=FaultyLoss())
    losses, errors = [], []
    for batch in BATCHES:
        if batch in FAILING:
            with pytest.raises(Exception) as error:
                engine.train_batch(corrupt(engine, batch))
            notes = getattr(error.value, "__notes__", [])
            errors.append("; ".join([f"{type(error.value).__name__}: {error.value}", *notes]))
        losses.append(float(engine.train_batch(data(engine, batch))))
    return oracle, losses, errors


@pytest.mark.quick_cases("1f1b-fp32", "v-min-bf16", "v-half-fp32 ZeRO-1")
@pytest.mark.parametrize(["schedule", "config"], [("1f1b", "fp32"), ("interleaved-1f1b", "fp32 ZeRO-1"),
                                                  ("v-min", "bf16"), ("v-half", "bf16 accumulating fp32"),
                                                  ("v-zb", "fp32"), ("v-half", "fp32 ZeRO-1")])
def test_data_that_end_within_a_batch(schedule: str, config: str) -> None:
    """StopIteration on every rank; with new data the training is bit for bit that which never failed."""
    for oracle, losses, errors in run_ranks(3, train_through, Job(schedule, 3, 4, CONFIGS[config], layers(3)),
                                            too_short):
        assert losses == oracle
        for error in errors:
            assert error.startswith("StopIteration")
            assert "LoadMicroBatch, micro-batch 2 on pipeline rank" in error


def test_data_that_end_on_one_replica() -> None:
    """The others, whose data are complete, don't step either."""
    results = run_ranks(4, train_through, Job("v-half", 2, 4, FP32_ZERO1, layers(2)), shorter_on_replica_1)
    for oracle, losses, errors in results:
        assert losses == oracle
        assert all(error.startswith("StopIteration") for error in errors)


@pytest.mark.parametrize(["schedule", "config", "corrupt", "error", "place"], [
    ("1f1b", "fp32", forward_raises, "ZeroDivisionError: a layer had enough", "ForwardPass of stage 1, micro-batch 2"),
    ("v-half", "bf16", forward_raises, "ZeroDivisionError: a layer had enough",
     "SplitForwardPass of stage 1, micro-batch 2"),
    ("zb-h1", "fp32 ZeRO-1", backward_raises, "FloatingPointError: a gradient had enough",
     "InputGradPass of stage 1, micro-batch 1"),
    ("v-zb", "bf16 accumulating fp32", backward_raises, "FloatingPointError: a gradient had enough",
     "InputGradPass of stage 1, micro-batch 1"),
    ("v-zb", "fp32 ZeRO-1", loss_raises, "KeyError: 'no loss today'", "SplitForwardPass of stage 5, micro-batch 1"),
])
def test_a_pass_that_raises(schedule: str, config: str, corrupt: Any, error: str, place: str) -> None:
    """The error itself where it happened, elsewhere PipelineError with its text and its place."""
    results = run_ranks(3, train_through, Job(schedule, 3, 4, CONFIGS[config], layers(3, 3 if "1" in schedule else 2)),
                        corrupt)
    for oracle, losses, errors in results:
        assert losses == oracle
        for told in errors:
            assert error in told and place in told
            assert told.startswith(error) or told.startswith("PipelineError")
    assert sum(told.startswith(error) for _, _, errors in results for told in errors) == len(FAILING)


@pytest.mark.parametrize(["schedule", "corrupt", "error", "place"], [
    ("v-half", no_memory_for_a_message, "OutOfMemoryError: no memory for a message", "Activation of stage"),
    ("zb-h1", no_memory_for_a_message, "OutOfMemoryError: no memory for a message", "Activation of stage"),
    ("v-zb", message_cannot_start, "RuntimeError: no message today", "Send"),
    ("1f1b", message_cannot_start, "RuntimeError: no message today", "Send"),
    ("v-half", not_here, "PipelineError: a stage's output holds a float32 tensor of shape [2, 3, 8] on meta",
     "ForwardPass of stage"),
])
def test_a_message_that_fails_for_its_contents(schedule: str, corrupt: Any, error: str, place: str) -> None:
    """Not as the connection would: the batch fails with its cause, and what was on its way is taken in."""
    chosen = list(layers(3))
    chosen[3] = LayerSpec(ElsewhereOnce)
    job = Job(schedule, 3, 4, FP32, tuple(chosen))
    for oracle, losses, errors in run_ranks(3, train_through, job, corrupt):
        assert losses == oracle
        assert all(error in told and place in told for told in errors)


def without_memory(rank: int) -> list[str]:
    """A rank that has no memory for any message can't follow; the others find out within the time."""
    engine = Job({"name": "v-half", "timeout_seconds": 2.0}, 2, 2).engine()
    if rank == 1:
        failing_once(TensorSignature, "empty", torch.OutOfMemoryError("no memory for a message"))
        failing_once(TensorSignature, "empty", torch.OutOfMemoryError("no memory for a message"))
    errors = []
    for batch in range(2):
        with pytest.raises(Exception) as error:
            engine.train_batch(data(engine, batch))
        errors.append(f"{type(error.value).__name__}: {error.value}")
    return errors


def test_a_rank_that_cannot_take_in_a_message_says_why() -> None:
    (waiting, _), (told, again) = run_ranks(2, without_memory)
    assert told.startswith("PeerLost: ") and told.count("no memory for a message") == 2
    assert "couldn't do what the others wait for: WaitActivation of stage 1" in told
    assert waiting.startswith("PeerLost: ") and "timer" not in again


VALIDATED_LATER = {"optimizer_post_validation": True}


@pytest.mark.parametrize(["schedule", "corrupt", "error"], [("v-zb", too_short, "StopIteration"),
                                                          ("1f1b", forward_raises, "a layer had enough")])
def test_forwards_that_fail_where_steps_are_validated_later(schedule: str, corrupt: Any, error: str) -> None:
    """The batch itself fails, on all ranks."""
    job = Job({"name": schedule, **VALIDATED_LATER}, 3, 4, FP32_ZERO1, layers(3, 2))
    for oracle, losses, errors in run_ranks(3, train_through, job, corrupt):
        assert losses == oracle
        assert len(errors) == len(FAILING) and all(error in told for told in errors)


def train_through_late_failures(rank: int, job: Job) -> tuple[list[float], list[float], list[str]]:
    """The losses without failures and with, and the errors. The last backward of the first replica fails in the first
    batch, which is validated at its end, and in two others, of which training and evaluation find out."""
    engine = job.engine()
    oracle = [float(engine.train_batch(data(engine, batch))) for batch in range(4)]
    engine = job.engine()
    losses, errors = [], []

    def failing(act: Callable[[], Any]) -> None:
        with pytest.raises(Exception) as error:
            act()
        notes = getattr(error.value, "__notes__", [])
        errors.append("; ".join([f"{type(error.value).__name__}: {error.value}", *notes]))

    def arm() -> None:
        if engine.grid.get_data_parallel_rank() == 0:
            Faulty.backwards_left = job.micro_batches

    arm()
    failing(lambda: engine.train_batch(data(engine, 0)))
    losses += [float(engine.train_batch(data(engine, batch))) for batch in (0, 1)]
    for batch, find_out in ((2, engine.train_batch), (3, engine.eval_batch)):
        arm()
        assert float(engine.train_batch(data(engine, batch))) == oracle[batch]
        failing(lambda: find_out(data(engine, 9)))
        assert engine.global_steps == batch
        losses.append(float(engine.train_batch(data(engine, batch))))
    return oracle, losses, errors


@pytest.mark.parametrize(["schedule", "stages"], [("v-zb", 2), ("1f1b", 4)])
def test_backwards_that_fail_where_steps_are_validated_later(schedule: str, stages: int) -> None:
    """All ranks raise together, and neither that batch nor the one in which they do counts."""
    job = Job({"name": schedule, **VALIDATED_LATER}, stages, 4, FP32_ZERO1, layers(stages, 2))
    for oracle, losses, errors in run_ranks(4, train_through_late_failures, job):
        assert losses == oracle
        assert ["a gradient had enough" in told and "micro-batch 3" in told for told in errors] == [True] * 3
        assert ["while the batch before was validated" in told for told in errors] == [False, True, True]


class Sampling:
    """What a data set does with each sample; raises once armed."""

    samples_left = -1

    def __call__(self, sample: Any) -> Any:
        Sampling.samples_left -= 1
        if Sampling.samples_left == 0:
            raise OSError("a file had enough")
        return sample


def sample_raises(engine: Any, batch: int) -> None:
    """On the first rank alone."""
    Sampling.samples_left = 2 if engine.stage_id == 0 else -1


def last_backward_raises(engine: Any, batch: int) -> None:
    Faulty.backwards_left = engine.micro_batches


def train_on_one_iterator(rank: int, job: Job, arm: Callable[[Any, int], Any],
                          lost: int) -> tuple[list[float], list[float]]:
    """The losses without failures, and of one iterator for the whole training, in which `lost` batches fail now and
    then."""
    engine = job.engine(loss_fn=FaultyLoss())
    oracle = [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]
    engine = job.engine(loss_fn=FaultyLoss())
    order = [0, *[8] * lost, 1, *[9] * lost, 2]
    samples = map(Sampling(), chain.from_iterable(data(engine, batch) for batch in order))
    losses = [float(engine.train_batch(samples))]
    for _ in BATCHES[1:]:
        arm(engine, 0)
        with pytest.raises(Exception, match="had enough|no loss today"):
            for _ in range(lost):
                engine.train_batch(samples)
        losses.append(float(engine.train_batch(samples)))
    return oracle, losses


@pytest.mark.parametrize(["schedule", "arm", "lost"], [
    ("1f1b", sample_raises, 1), ("1f1b", loss_raises, 1), ("zb-h1", backward_raises, 1),
    ("interleaved-1f1b", forward_raises, 1), ({"name": "1f1b", **VALIDATED_LATER}, forward_raises, 1),
    ({"name": "1f1b", **VALIDATED_LATER}, last_backward_raises, 2),
    ({"name": "1f1b", "micro_batch_order": "length"}, sample_raises, 1),
    ({"name": "1f1b", "micro_batch_order": "length"}, forward_raises, 1)])
def test_data_continue_after_a_batch_that_failed(schedule: Any, arm: Any, lost: int) -> None:
    """All ranks have drawn all data of the failed batch, whoever loads them: inputs and labels stay together."""
    job = Job(schedule, 3, 4, FP32_ZERO1, layers(3, 2))
    for oracle, losses in run_ranks(3, train_on_one_iterator, job, arm, lost):
        assert losses == oracle


def train_within_a_limit(rank: int, job: Job) -> tuple[list[float], list[float]]:
    """With a limit in bytes, for which the first sample is looked at before its batch: it raises on the first rank."""
    engine = job.engine()
    oracle = [float(engine.train_batch(data(engine, batch))) for batch in range(2)]
    engine = job.engine()
    Sampling.samples_left = 1 if engine.stage_id == 0 else -1
    samples = map(Sampling(), chain(data(engine, 9), data(engine, 0)))
    with pytest.raises(Exception, match="a file had enough"):
        engine.train_batch(samples)
    losses = [float(engine.train_batch(samples))]
    engine.set_dataiterator(data(engine, 9))
    if engine.is_first_stage():
        engine.peek()
    return oracle, [*losses, float(engine.train_batch(data(engine, 1)))]


def test_a_sample_that_was_looked_at_is_trained_once() -> None:
    job = Job({"name": "1f1b", "memory_limit": "100GiB"}, 2, 2)
    for oracle, losses in run_ranks(2, train_within_a_limit, job):
        assert losses == oracle


def evaluate_through(rank: int, job: Job) -> tuple[list[float], list[str]]:
    engine = job.engine()
    values: list[float] = []
    errors: list[str] = []
    held = data(engine, 0)
    engine.set_dataiterator(held)
    for batch in range(2):
        with pytest.raises(StopIteration) as error:
            engine.eval_batch(iter([micro_batch(9, 0, 0)]), num_micro_batches=3)
        errors.append(str(error.value))
        values.append(float(engine.eval_batch(iter([micro_batch(9, 0, 0)]), num_micro_batches=1)))
        engine.set_dataiterator(data(engine, batch))
        values.append(float(engine.train_batch()))
    return values, errors


@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_data_that_end_within_an_evaluation(schedule: str) -> None:
    def without_failures(rank: int) -> list[float]:
        engine = Job(schedule, 2, 4).engine()
        values = []
        for batch in range(2):
            values.append(float(engine.eval_batch(iter([micro_batch(9, 0, 0)]), num_micro_batches=1)))
            values.append(float(engine.train_batch(data(engine, batch))))
        return values

    oracle = run_ranks(2, without_failures)[0]
    for values, _ in run_ranks(2, evaluate_through, Job(schedule, 2, 4)):
        assert values == oracle


def of_each_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses, of which there are many."""
    return cross_entropy(logits, labels) + logits.sum(-1)


def evaluate_oddly(rank: int, schedule: str) -> list[str]:
    """What comes of evaluations whose results can't be added up, or sent; a good one comes after each."""
    engine = Job(schedule, 2, 2).engine(loss_fn=of_each_token)
    tokens, labels = micro_batch(0, 0, 0)
    errors = []
    for samples, options in (([(tokens, labels), (tokens[:, 1:], labels[:, 1:])], {"compute_loss": False}),
                             ([(tokens, labels)] * 2, {})):
        with pytest.raises(Exception) as error:
            engine.eval_batch(iter(samples), **options)
        errors.append("; ".join([str(error.value), *getattr(error.value, "__notes__", [])]))
        losses = engine.eval_batch(iter([(tokens, labels)] * 2), bcast_loss=False)
        assert not engine.is_last_stage() or losses.shape == labels.shape
    return errors


@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_an_evaluation_that_fails_on_the_rank_of_the_loss(schedule: str) -> None:
    for uneven, many in run_ranks(2, evaluate_oddly, schedule, timeout=60):
        assert "must match the size of tensor" in uneven and "eval_batch on pipeline rank" in uneven
        assert "the loss has the shape [2, 3]: must be one number" in many and "ForwardPass of stage" in many


def train_badly(rank: int) -> list[str]:
    """One engine that is given all kinds of data that can't be trained on, then good ones."""
    engine = Job("v-half", 2, 2).engine()
    tokens = torch.zeros(2, 3, dtype=torch.long)
    bad: list[Any] = [None, iter([tokens] * 2), iter([(tokens,)] * 2), iter([{"tokens": tokens}] * 2),
                      iter([((), tokens)] * 2), iter([("text", tokens)] * 2), iter([(tokens, tokens[:1])] * 2)]
    errors = []
    for samples in bad:
        with pytest.raises(Exception) as error:
            engine.train_batch(samples)
        errors.append(str(error.value))
    assert float(engine.train_batch(data(engine, 0))) > 0
    return errors


def test_data_of_a_wrong_form() -> None:
    first, second = run_ranks(2, train_badly)
    for told, elsewhere, expected in zip(first, second, [
            "there is no data: this rank needs an iterator that gives (inputs, labels)",
            "the data iterator gave a Tensor: must be a pair (inputs, labels)",
            "the data iterator gave 1 member: must be a pair (inputs, labels)",
            "the data iterator gave a dict: must be a pair (inputs, labels)",
            "the inputs of a micro-batch are empty: must be a tensor or a tuple of tensors",
            "the inputs of a micro-batch are str: must be a tensor or a tuple of tensors",
            "Expected input batch_size (6) to match target batch_size (3)"], strict=True):
        assert expected in told and expected in elsewhere
        assert "on pipeline rank 0" in elsewhere


class Spoiling(Block):
    """A block that gives NaN in one forward pass, once armed."""

    forwards_left = -1

    def forward(self, x: Tensor) -> Tensor:
        Spoiling.forwards_left -= 1
        return super().forward(x) * (float("nan") if Spoiling.forwards_left == 0 else 1.0)


def train_on_corrupt_data(rank: int, job: Job) -> tuple[list[float], str]:
    engine = job.engine()
    losses = [float(engine.train_batch(data(engine, 0)))]
    Spoiling.forwards_left = 3
    with pytest.raises(Exception) as error:
        engine.train_batch(data(engine, 1))
    losses.append(float(engine.train_batch(data(engine, 1))))
    return losses, str(error.value)


def train_twice(rank: int, job: Job) -> list[float]:
    engine = job.engine()
    return [float(engine.train_batch(data(engine, batch))) for batch in range(2)]


@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
def test_detect_anomaly_names_stage_and_micro_batch(schedule: str) -> None:
    chosen = specs(4)
    chosen[3] = LayerSpec(Spoiling)
    section = {"name": schedule, "detect_anomaly": True}
    results = run_ranks(2, train_on_corrupt_data, Job(section, 2, 4, layers=tuple(chosen)))
    plain = run_ranks(2, train_twice, Job(schedule, 2, 4, layers=tuple(chosen)))
    for (losses, told), expected in zip(results, plain, strict=True):
        assert losses == expected
        assert "of stage 1 are NaN or infinite" in told
    assert any("micro-batch 2" in told for _, told in results)
