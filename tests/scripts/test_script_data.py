"""Data and losses that DeepSpeed's pipeline takes in other forms than a pair of tensors and a number."""

from __future__ import annotations

import logging
from collections import OrderedDict, namedtuple
from typing import Any

import deepspeed
import pytest
import torch
from logged import Lines
from pipelines import cross_entropy, specs
from scripted import BATCHES, NO_KEY, SCHEDULES, UNTOUCHED, samples, variants
from torch import Tensor

Batch = namedtuple("Batch", ["inputs", "labels", "lengths"])


def engine_for(config: dict[str, Any], **options: Any) -> Any:
    module = deepspeed.pipe.PipelineModule(specs(6), num_stages=2, seed_layers=True, partition_method="uniform",
                                           **{"loss_fn": cross_entropy, **options})
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


# -- members

FORMS: dict[str, Any] = {
    "three": lambda inputs, labels: (inputs, labels, torch.ones(3)),
    "five, not all of them tensors": lambda inputs, labels: [inputs, labels, None, "name", {"a": 1}],
    "a named tuple": lambda inputs, labels: Batch(inputs, labels, 3),
}


def test_labels_of_nothing() -> None:
    """What a loss function that needs none gets, as DeepSpeed gives it."""

    def script(config: dict[str, Any]) -> Any:
        seen: list[Any] = []

        def loss_fn(logits: Tensor, labels: Any) -> Tensor:
            seen.append(labels)
            return logits.float().square().mean()

        engine = engine_for(config, loss_fn=loss_fn)
        found = [engine.train_batch(iter([(inputs, empty) for inputs, _ in samples(engine, batch)])).item()
                 for batch, empty in enumerate(((), None, []))]
        return found, seen if engine.is_last_stage() else []

    results = variants(script, schedules=(UNTOUCHED, NO_KEY, "zb-h1", "v-half"))
    for schedule, of_ranks in results.items():
        assert [found for found, _ in of_ranks] == [found for found, _ in results[UNTOUCHED]], schedule
        assert any([*map(bool, seen)] == [False] * 9 for _, seen in of_ranks), schedule


def test_micro_batches_of_more_members() -> None:
    """The first two are taken, as DeepSpeed does; that is said once, by the rank that loads inputs."""

    def script(config: dict[str, Any]) -> Any:
        engine, found = engine_for(config), []
        with Lines(logging.WARNING) as lines:
            for batch, form in enumerate(FORMS.values()):
                found.append(engine.train_batch(iter([form(*sample) for sample in samples(engine, batch)])).item())
            last = iter([FORMS["three"](*sample) for sample in samples(engine, 9)])
            found.append(engine.eval_batch(last).item())
        return found, [line for line in lines.told if "members" in line]

    results = variants(script)
    oracle = results[UNTOUCHED][0][0]
    for schedule, of_ranks in results.items():
        assert [found for found, _ in of_ranks] == [oracle] * 2
        lines = [line for _, told in of_ranks for line in told]
        assert lines == ([] if schedule in (UNTOUCHED, NO_KEY) else [
            "the data iterator gives 3 members: the first two are used as (inputs, labels), as in DeepSpeed, and "
            "the others are ignored"])


def test_inputs_alone_where_no_loss_is_computed() -> None:
    """DeepSpeed's first rank never looks at the labels."""

    def script(config: dict[str, Any]) -> Any:
        engine, found = engine_for(config), []
        for batch in range(BATCHES):
            cut = [sample if engine.is_last_stage() else sample[:1] for sample in samples(engine, batch)]
            found.append(engine.train_batch(iter(cut)).item())
        return found

    results = variants(script)
    assert all(of_ranks == results[UNTOUCHED] for of_ranks in results.values())


# -- losses of one number


def loss_of_shape(*shape: int) -> Any:
    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels).reshape(shape)

    return loss_fn


def train_and_evaluate(config: dict[str, Any], **options: Any) -> Any:
    """Values, with the shapes of the losses where the last stage is, and those on the first rank that isn't."""
    engine = engine_for(config, **options)
    found, shapes = [], []
    for batch in range(BATCHES):
        loss = engine.train_batch(iter(samples(engine, batch)))
        assert engine.agg_train_loss.shape == loss.shape
        if engine.is_last_stage():
            found.append(engine.total_loss.item())
            assert engine.total_loss.shape == loss.shape
        evaluated = engine.eval_batch(iter(samples(engine, 9)))
        found += [loss.item(), evaluated.item()]
        shapes.append([list(loss.shape), list(evaluated.shape)])
    own = engine.eval_batch(iter(samples(engine, 9)), bcast_loss=False)
    found += [] if own is None else [own.item()]
    return (engine.is_last_stage(), engine.grid.get_data_parallel_rank()), found, shapes


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.quick_cases("shape2")
def test_losses_of_any_shape_of_one_number(shape: tuple[int, ...]) -> None:
    """And with replicas: as DeepSpeed returns them, on the rank with the last stage and elsewhere."""

    def script(config: dict[str, Any]) -> Any:
        return train_and_evaluate(config, loss_fn=loss_of_shape(*shape))

    results = variants(script, ranks=4 if shape == (1,) else 2)
    oracle = {where: (found, shapes) for where, found, shapes in results[UNTOUCHED]}
    assert oracle[True, 0][1][0][0] == list(shape) and oracle[False, 0][1][0][0] == []
    for schedule, of_ranks in results.items():
        for where, found, shapes in of_ranks:
            assert (found, shapes) == oracle[where], schedule


class WithParts:
    """A loss that keeps what it is made of."""

    def __init__(self, shape: tuple[int, ...], of_parts: tuple[int, ...]) -> None:
        self.shape, self.of_parts = shape, of_parts
        self.parts = OrderedDict(half=torch.zeros(of_parts), double=torch.zeros(of_parts))

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits, labels)
        self.parts = OrderedDict(half=(loss / 2).reshape(self.of_parts), double=(2 * loss).reshape(self.of_parts))
        return loss.reshape(self.shape)


@pytest.mark.parametrize("shape, of_parts", [((1,), (1,)), ((1,), ()), ((), (1, 1))])
@pytest.mark.quick_cases("shape2-of_parts2")
def test_additional_losses_of_any_shape_of_one_number(shape: tuple[int, ...], of_parts: tuple[int, ...]) -> None:
    """DeepSpeed stacks them, so that those of one shape alone get through."""

    def script(config: dict[str, Any], shape: Any = shape, of_parts: Any = of_parts) -> Any:
        loss_fn = WithParts(shape, of_parts)
        engine = engine_for(config, loss_fn=loss_fn)
        engine.module.get_additional_losses = lambda: loss_fn.parts
        found = []
        for batch in range(BATCHES):
            found.append(engine.train_batch(iter(samples(engine, batch))).item())
            found += [value.item() for value in engine.get_additional_losses().values()]
        return found

    def oracle(config: dict[str, Any]) -> Any:
        return script(config, (), ())

    expected = variants(oracle, schedules=(UNTOUCHED,))[UNTOUCHED]
    for schedule, found in variants(script, schedules=SCHEDULES).items():
        assert found == expected, schedule
