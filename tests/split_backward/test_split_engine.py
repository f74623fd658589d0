"""Stages that do more than compute forward, on the engine against the plain model: other runs of autograd, hooks, and
unusual calls of the split operators, under three schedules that split, with and without sums in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec
from pipelines import BATCHES, FP32_ZERO1, VOCABULARY, WIDTH, Job, Pair, PlainTraining, merged, train
from ranks import run_ranks
from torch import Tensor, nn
from torch.autograd import forward_ad

from ds_vshape.split_backward import active_store

SCHEDULES = ("v-half", "v-zb", "zb-h1")


class Adversarial(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            probe = x.detach().requires_grad_()
            value = self.b(torch.tanh(self.a(probe))).pow(2).sum()
            (gradient,) = torch.autograd.grad(value, probe)
        return x + self.b(torch.tanh(self.a(x + 0.1 * gradient.sign())))


class OfWeights(Pair):
    """A loss weight by a gradient of a weight, and by one of its transpose."""

    def forward(self, x: Tensor) -> Tensor:
        value = torch.tanh(self.a(x)) @ self.b.weight.t()
        weights = [self.a.weight, self.a.bias, self.b.weight]
        norms = [part.norm() for part in torch.autograd.grad(value.mean(), weights, retain_graph=True)]
        return x + value / (1 + sum(norms))


class Penalty(Pair):
    def forward(self, x: Tensor) -> Tensor:
        probe = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.tanh(self.a(probe)).sum(), probe, create_graph=True)
        return x + self.b(x) + gradient.pow(2).mean()


class InPlaceHook(Pair):
    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.a(x))
        if skip.requires_grad:
            skip.register_hook(lambda gradient: gradient.mul_(0.1))
        return self.b(x) + skip


class NodeHook(Pair):
    """A hook on the node that adds to the gradient, as Horovod's or Apex's: it halves what has been added."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.nodes and torch.is_grad_enabled():
            self.nodes.append(self.a.weight.expand_as(self.a.weight).grad_fn.next_functions[0][0])
            self.nodes[0].register_hook(self.hook)
        return x + self.b(torch.tanh(self.a(x)))

    def hook(self, *_: Any) -> None:
        with torch.no_grad():
            self.a.weight.grad.mul_(0.5)


class UnusualCalls(Pair):
    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.matmul(torch.eye(WIDTH), torch.eye(WIDTH), out=torch.empty(WIDTH, WIDTH))[0]
        x = x + torch.addmm(1, self.a.bias, 1, x.flatten(0, 1), self.a.weight).view_as(x)
        x = x + self.b(x.flatten()[:3 * WIDTH:3])
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
            x = x + forward_ad.unpack_dual(self.b(dual)).tangent.detach()
        return x * F.linear(x, self.b.weight).detach_().mean()


class Seeing(Pair):
    """Notes in which of its forwards the weight gradients are left to W."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(active_store() is not None)
        return x + self.b(torch.tanh(self.a(x)))


LAYERS = [Adversarial, OfWeights, Penalty, InPlaceHook, NodeHook, UnusualCalls]


def specs(layer: type[nn.Module]) -> tuple[LayerSpec, ...]:
    return (LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *(LayerSpec(layer) for _ in range(4)),
            LayerSpec(nn.Linear, WIDTH, VOCABULARY))


def outcomes(schedule: str, fusion: bool, cases: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
    def body(rank: int) -> list[Any]:
        return [train(Job({"name": schedule, "gradient_accumulation_fusion": fusion}, 2, 4, config, layers).engine(),
                      BATCHES[:3]) for layers, config in cases]
    return [merged(list(of_ranks)) for of_ranks in zip(*run_ranks(2, body), strict=True)]


@pytest.mark.quick_cases("v-half-True")
@pytest.mark.filterwarnings("ignore:This overload of addmm is deprecated")
@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_train_as_the_plain_model(schedule: str, fusion: bool) -> None:
    cases = [(specs(layer), FP32_ZERO1 if layer in (Adversarial, OfWeights) else {}) for layer in LAYERS]
    for layer, outcome, (layers, config) in zip(LAYERS, outcomes(schedule, fusion, cases), cases, strict=True):
        plain = PlainTraining(Job(None, 1, 4, config, layers)).train(BATCHES[:3], 4)
        assert outcome.losses == pytest.approx(plain.losses, rel=1e-5), layer.__name__
        for name, weight in plain.weights.items():
            torch.testing.assert_close(outcome.weights[name], weight, rtol=1e-3, atol=1e-3, msg=f"{layer} {name}")


def where_it_splits(rank: int) -> tuple[list[bool], list[bool], list[bool]]:
    engine = Job("v-half", 2, 4, layers=specs(Seeing)).engine()
    in_hooks: list[bool] = []
    for register in (engine.module.register_forward_pre_hook, engine.module.register_forward_hook):
        register(lambda *_: in_hooks.append(active_store() is not None))
    train(engine, BATCHES[:1])
    layers = [layer for layer in engine.module.modules() if isinstance(layer, Seeing)]
    in_passes = [seen for layer in layers for seen in layer.seen]
    for layer in layers:
        layer.seen.clear()
    for stage in engine.placement.chunks[rank]:
        engine.module.activate_stage(stage)
        engine.module(torch.randn(2, 3, WIDTH) if stage else torch.zeros(2, 3, dtype=torch.int64))
    return in_hooks, in_passes, [seen for layer in layers for seen in layer.seen]


def test_only_the_layers_of_a_pass_are_split() -> None:
    """Not the hooks of a script on the module, nor its own forward between batches."""
    for in_hooks, in_passes, by_script in run_ranks(2, where_it_splits):
        assert in_passes.count(True) > len(in_passes) / 2
        assert in_hooks and not any(in_hooks)
        assert by_script and not any(by_script)
