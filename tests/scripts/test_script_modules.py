"""What scripts do with DeepSpeed's PipelineModule: subclasses, hooks of their own, layers that share weights."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from logged import Lines
from pipelines import VOCABULARY, WIDTH, Block, cross_entropy, head, specs
from scripted import NO_KEY, SCHEDULES, UNTOUCHED, losses, variants
from torch import nn
from torch.nn import functional

from ds_vshape.module.shared_weights import shared_weights, warning_of

V_SCHEDULES = [schedule for schedule in SCHEDULES if schedule.startswith("v-")]


def train(config: dict[str, Any], layers: list[Any], name: str = "PipelineModule", **options: Any) -> Any:
    """An engine for a module of DeepSpeed's, or of a subclass of it that is made now, with its losses."""
    module_class = getattr(deepspeed.pipe, "PipelineModule")
    if name != "PipelineModule":
        module_class = CLASSES[name](module_class)
    module = module_class(layers, num_stages=2, loss_fn=cross_entropy, seed_layers=True, **options)
    engine = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
    return engine, losses(engine)


# -- a partition of the script's own


def manual(base: Any) -> Any:
    class Manual(base):
        """Divided by the script's bounds, and not by DeepSpeed."""

        def __init__(self, *args: Any, split: list[int], **options: Any) -> None:
            self.split = split
            super().__init__(*args, **options)

        def _partition_layers(self, method: str = "uniform") -> None:
            assert method == "manual" and len(self.split) == self.num_stages - 1
            stage = self._topo.get_coord(self.global_rank).pipe
            self.parts = [0, *self.split, len(self._layer_specs)]
            self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    return Manual


def local(base: Any) -> Any:
    class Local(base):
        """Says what this rank builds, and nothing of the others."""

        def _partition_layers(self, method: str = "uniform") -> None:
            stage = self._topo.get_coord(self.global_rank).pipe
            self._set_bounds(*((0, 2), (2, len(self._layer_specs)))[stage])

    return Local


def shifted(base: Any) -> Any:
    class Shifted(base):
        """DeepSpeed's partition, whatever its number of parts is, with the first boundary moved."""

        def _partition_layers(self, method: str = "uniform") -> None:
            super()._partition_layers(method)
            self.parts[1] += 1
            stage = self._topo.get_coord(self.global_rank).pipe
            self._set_bounds(self.parts[stage], self.parts[stage + 1])

    return Shifted


def torn(base: Any) -> Any:
    class Torn(base):
        """Leaves a layer out."""

        def _partition_layers(self, method: str = "uniform") -> None:
            stage = self._topo.get_coord(self.global_rank).pipe
            self._set_bounds(*((0, 3), (4, len(self._layer_specs)))[stage])

    return Torn


CLASSES = {"manual": manual, "local": local, "shifted": shifted, "torn": torn}
SUBCLASSES: dict[str, dict[str, Any]] = {"manual": {"split": [5], "partition_method": "manual"}, "local": {},
                                         "shifted": {"partition_method": "uniform"}}


@pytest.mark.quick_cases("shifted")
@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_partition_of_a_subclass(name: str) -> None:
    """Without the key it's DeepSpeed's own, with one stage a rank it counts, with two the section must have one."""

    def script(config: dict[str, Any]) -> Any:
        engine, found = train(config, specs(6), name, **SUBCLASSES[name])
        return found, sorted(engine.module.state_dict())

    section = {"name": "v-zb", "partition": [0, 3, 5, 7, 8]}
    results = variants(script, schedules=(UNTOUCHED, NO_KEY, "zb-h1", "v-half", section))
    oracle = results.pop(UNTOUCHED)
    assert results.pop(NO_KEY) == oracle == results.pop("zb-h1")
    of_v_half = results.pop("v-half")
    if name == "shifted":
        assert [found for found, _ in of_v_half] == [found for found, _ in oracle]
    else:
        assert of_v_half[0] == of_v_half[1] and of_v_half[0].startswith("PartitionError")
        assert f"{name.capitalize()}._partition_layers" in of_v_half[0]
        assert 'as "partition": [0, ..., 8] with 5 numbers in the section "pipeline_schedule"' in of_v_half[0]
    (with_bounds,) = results.values()
    assert [found for found, _ in with_bounds] == [found for found, _ in oracle]


def test_local_bounds_that_leave_a_layer_out() -> None:
    def script(config: dict[str, Any]) -> Any:
        return train(config, specs(6), "torn")[1]

    first, second = variants(script, schedules=("zb-h1",))["zb-h1"]
    assert first == second == ("PartitionError: Torn._partition_layers: the stages' layers [[0, 3], [4, 8]] leave a "
                               "gap or overlap")


def count_all(self: Any) -> list[int]:
    """In place of DeepSpeed's: the first layers are heavy."""
    return [100 if number < 3 else 1 for number in range(len(self._layer_specs))]


def test_layers_that_are_counted_by_the_script() -> None:
    def script(config: dict[str, Any]) -> Any:
        module_class = deepspeed.pipe.PipelineModule
        before, module_class._count_layer_params = module_class._count_layer_params, count_all
        try:
            engine, found = train(config, specs(6), partition_method="parameters")
        finally:
            module_class._count_layer_params = before
        return found, [int(bound) for bound in engine.module.parts]

    # DeepSpeed's own seeding refuses bounds of NumPy's, which are what its method gives.
    results = variants(script, schedules=(NO_KEY, *SCHEDULES))
    oracle = results.pop(NO_KEY)
    assert oracle[0][1] == [0, 2, 8]
    for schedule, of_ranks in results.items():
        assert of_ranks == [(oracle[0][0], [0, 2, 8] if schedule == "zb-h1" else [0, 1, 2, 3, 8])] * 2


# -- weights that layers share


class Holder(nn.Module):
    """A layer made of what it is given."""

    def __init__(self, module: nn.Module | None = None, weight: Any = None) -> None:
        super().__init__()
        self.module, self.weight = module, weight

    def forward(self, x: Any) -> Any:
        return functional.linear(x, self.weight) if self.module is None else self.module(x)


def shared_layers() -> dict[str, list[Any]]:
    block, embedding, weight = Block(), nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.ones(WIDTH, WIDTH))
    holder = nn.Linear(WIDTH, WIDTH, bias=False)
    holder.weight = weight
    other = nn.Linear(WIDTH, WIDTH, bias=False)
    other.weight = weight
    return {
        "one object twice": [block, nn.Identity(), block],
        "modules with one parameter": [holder, nn.Identity(), other],
        "a LayerSpec of a module that is a layer": [block, nn.Identity(), LayerSpec(Holder, block)],
        "LayerSpecs of one module": [LayerSpec(Holder, block), nn.Identity(), LayerSpec(Holder, module=block)],
        "LayerSpecs of one parameter": [LayerSpec(Holder, weight=weight), nn.Identity(),
                                        LayerSpec(Holder, None, weight)],
        "a module in a list of arguments": [block, nn.Identity(), LayerSpec(nn.Sequential, *[nn.Identity(), block])],
        "a partial": [embedding, nn.Identity(), partial(head, embedding)],
        "a function that closes over it": [embedding, nn.Identity(),
                                           lambda x: functional.linear(x, embedding.weight)],
        "a method": [embedding, nn.Identity(), embedding.forward],
        "a tied layer and one that isn't": [TiedLayerSpec("e", Holder, block), TiedLayerSpec("e", Holder, block),
                                            LayerSpec(Holder, block)],
    }


@pytest.mark.parametrize("name", shared_layers())
def test_what_layers_share_is_seen(name: str) -> None:
    shared, *others = shared_weights(shared_layers()[name])
    assert not others
    assert shared.layers == ((0, 1, 2) if name.startswith("a tied") else (0, 2))
    told = warning_of([shared])
    assert "TiedLayerSpec" in told and f"layers {'0, 1' if name.startswith('a tied') else '0'} and 2 share" in told
    assert shared.names and shared.names[0] in told


def test_what_layers_may_share() -> None:
    block, frozen = Block(), Block().requires_grad_(False)
    tied = TiedLayerSpec("e", Holder, block)
    assert shared_weights([tied, nn.Identity(), TiedLayerSpec("e", Holder, block, forward_fn=head)]) == []
    assert shared_weights([frozen, frozen, LayerSpec(Holder, frozen)]) == []
    assert shared_weights([LayerSpec(nn.Linear, 2, 2)] * 3 + [torch.relu, torch.relu, functional.gelu]) == []


def test_shared_layers_are_told_once_on_every_rank() -> None:
    """And trained as in DeepSpeed where they are on other ranks: as copies."""

    def script(config: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        block = Block()
        layers = [*specs(2)[:3], block, Block(), nn.Linear(WIDTH, WIDTH), block, specs(0)[-1]]
        with Lines(logging.WARNING) as lines:
            found = train(config, layers, partition_method="uniform")[1]
        return found, [line for line in lines.told if "TiedLayerSpec" in line]

    results = variants(script)
    for name in (UNTOUCHED, NO_KEY):
        assert [told for _, told in results[name]] == [[], []]
    for schedule in SCHEDULES:
        (_, first), (_, second) = results[schedule]
        assert first == second and len(first) == 1
        assert "layers 3 and 6 share Block.norm.weight" in first[0] and "TiedLayerSpec" in first[0]
    assert results["zb-h1"][0][0] == results[UNTOUCHED][0][0] == results[NO_KEY][0][0]
