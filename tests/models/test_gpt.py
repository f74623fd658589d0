"""The GPT of the main job against a plain model that is written out by its formulas."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from deepspeed.pipe import TiedLayerSpec
from torch import Tensor, nn

from ds_vshape.models.gpt import TokenEmbedding, GPTConfig, gpt_layers, loss_fn, seed_layer

CONFIG = GPTConfig(layers=3, hidden=24, heads=3, length=10)


def build(config: GPTConfig) -> list[Callable[[Tensor], Tensor]]:
    """All layers in one process, tied ones once, as PipelineModule builds them."""
    tied: dict[str, nn.Module] = {}
    functions: list[Callable[[Tensor], Tensor]] = []
    for place, spec in enumerate(gpt_layers(config)):
        seed_layer(place)
        if not isinstance(spec, TiedLayerSpec):
            functions.append(spec.build())
            continue
        if spec.key not in tied:
            tied[spec.key] = spec.build()
        module = tied[spec.key]
        functions.append(module if spec.forward_fn is None else partial(spec.forward_fn, module))
    return functions


def in_sequence(functions: list[Callable[[Tensor], Tensor]], value: Tensor) -> Tensor:
    for function in functions:
        value = function(value)
    return value


class PlainGPT(nn.Module):
    """The same model, written out: explicit mask and softmax, one head after the other."""

    def __init__(self, functions: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.embedding, self.positions, *self.blocks, self.norm, _ = functions

    def forward(self, inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        hidden = self.embedding.weight[inputs] + self.positions.embedding.weight[:length]
        for block in self.blocks:
            hidden = hidden + self.attention(block, self.normed(block.attention_norm, hidden))
            inner = self.normed(block.mlp_norm, hidden) @ block.mlp_in.weight.T + block.mlp_in.bias
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            hidden = hidden + inner @ block.mlp_out.weight.T + block.mlp_out.bias
        return self.normed(self.norm, hidden) @ self.embedding.weight.T

    @staticmethod
    def normed(norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
        centred = hidden - hidden.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    @staticmethod
    def attention(block: nn.Module, hidden: Tensor) -> Tensor:
        length, width = hidden.shape[1:]
        size = width // block.heads
        mask = torch.triu(torch.full((length, length), float("-inf"), dtype=hidden.dtype), diagonal=1)
        mixed = hidden @ block.query_key_value.weight.T + block.query_key_value.bias
        query, key, value = mixed.split(width, dim=-1)
        heads = []
        for start in range(0, width, size):
            part = slice(start, start + size)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / size**0.5 + mask
            heads.append(scores.softmax(-1) @ value[..., part])
        return torch.cat(heads, -1) @ block.attention_out.weight.T + block.attention_out.bias


@pytest.fixture
def model() -> list[Callable[[Tensor], Tensor]]:
    functions = build(CONFIG)
    for function in functions:
        if isinstance(function, nn.Module):
            function.double()
            # Zero biases and unit scales would hide a missing one.
            for parameter in function.parameters():
                nn.init.normal_(parameter, std=0.3)
    return functions


@pytest.fixture
def inputs() -> Tensor:
    return torch.randint(256, (2, CONFIG.length), generator=torch.Generator().manual_seed(0))


def test_the_layers_in_sequence_are_the_plain_model(model, inputs):
    labels = inputs.roll(-1, 1)
    plain = PlainGPT(model)
    outputs, expected = in_sequence(model, inputs), plain(inputs)
    assert outputs.shape == (2, CONFIG.length, 256)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)

    parameters = list({parameter for function in model if isinstance(function, nn.Module)
                       for parameter in function.parameters()})
    gradients = torch.autograd.grad(loss_fn(outputs, labels), parameters)
    log_probabilities = expected.log_softmax(-1).gather(-1, labels[..., None])
    for gradient, reference in zip(gradients, torch.autograd.grad(-log_probabilities.mean(), parameters), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


def test_embedding_and_head_are_one_weight(model):
    embedding, final = model[0], model[-1]
    assert isinstance(embedding, TokenEmbedding) and final.args[0] is embedding
    torch.testing.assert_close(final(torch.eye(CONFIG.hidden).double()), embedding.weight.T)


def test_no_byte_sees_a_later_one(model, inputs):
    changed = inputs.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 256
    before, after = in_sequence(model, inputs), in_sequence(model, changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(-1).any()


def test_equal_seeds_give_equal_weights():
    first, second = build(CONFIG), build(CONFIG)
    inputs = torch.arange(CONFIG.length)[None]
    assert torch.equal(in_sequence(first, inputs), in_sequence(second, inputs))
    assert not torch.equal(first[2].mlp_in.weight, first[3].mlp_in.weight)


def test_an_untrained_model_knows_nothing():
    logits = in_sequence(build(CONFIG), torch.arange(CONFIG.length)[None])
    loss = loss_fn(logits, torch.arange(1, CONFIG.length + 1)[None])
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), rel=0.02)
    assert torch.equal(loss, F.cross_entropy(logits[0], torch.arange(1, CONFIG.length + 1)))


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="hidden = 10 must be a multiple of heads = 4"):
        GPTConfig(layers=1, hidden=10, heads=4, length=8)
