"""Layers that save for their backward in all the ways there are, and their passes with less kept in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ds_vshape.split_backward import SplitFunction

WIDTH = 6


class Views(nn.Module):
    """Saves views of one piece of memory, parts of it with gaps, and the same tensor several times."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return x * x + self.out(weights @ v + v.sin() * v[..., :1].exp())


class InPlace(nn.Module):
    """Changes its input in place, and a result before it's saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.linear(x.mul_(1.5)), inplace=True).sin()


class Random(nn.Module):
    """Random numbers of torch, twice."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.4) + torch.rand_like(x) * x.sin()


class Statistics(nn.Module):
    """Reads its buffers and changes them, as a norm by running means: one in place, another one is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("size", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean((0, 1)))
            self.size = 0.9 * self.size + x.abs().mean((0, 1))
        return self.norm((x - self.mean).transpose(1, 2)).transpose(1, 2).square() + x / self.size


class Tables(nn.Module):
    """Multiplies with a cache of its own, no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.linspace(0.5, 1.5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.cache).cos() * self.cache


class OwnGradient(nn.Module):
    """Computes a gradient inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        force, = torch.autograd.grad(self.energy(x).sin().sum(), x, create_graph=True)
        return x + force


class Kernel(SplitFunction):
    """A user's kernel."""

    weight_arguments = (1,)
    saved_for_weight = (0,)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.saved_tensors[1], None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient * ctx.saved_tensors[0]).flatten(0, -2).sum(0)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.8, 1.2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return Kernel.apply(x, self.weight)


class Checkpointed(nn.Module):
    """Recomputes inside."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = nn.Sequential(Views(), Random()), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def layers() -> list[nn.Module]:
    """All of them; the third product has the weight of the first."""
    torch.manual_seed(0)
    first, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    last.weight = first.weight
    return [first, Views(), Random(), InPlace(), Statistics(), Tables(), OwnGradient(), Scale(), Checkpointed(True),
            Checkpointed(False), last, Random()]
