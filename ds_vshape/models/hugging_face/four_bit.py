"""Linear layers of 4 bits by bitsandbytes, put into a model by transformers' own quantizer, so that the same layers are
quantized and the same stay whole as in from_pretrained.

A weight of 4 bits is a Params4bit: [numel / 2, 1] bytes, and a QuantState with what they are decoded by (a scale for
each 64 numbers, itself of 8 bits under double quantization). It is quantized when its tensor has been read, one tensor
at a time, so that no rank ever has its layers whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

try:
    from bitsandbytes.functional import QuantState, quantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
except ImportError as error:
    raise ImportError("quantization_config: load_in_4bit = True needs bitsandbytes: pip install "
                      "'ds-vshape[lora4bit]'") from error


def replace_linears(model: Any, settings: dict[str, Any]) -> None:
    """Put layers of 4 bits into `model`, which is on the meta device, where transformers would.

    Raises:
        ValueError: if the head would have 4 bits and the embedding, whose weight it has, wouldn't.
    """
    kind: Any = BitsAndBytesConfig
    config = kind.from_dict(dict(settings))
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model, dtype=torch.float32, device_map=None)
    quantizer.postprocess_model(model)
    if model.config.tie_word_embeddings and isinstance(model.get_output_embeddings(), Linear4bit):
        raise ValueError(f"quantization_config: llm_int8_skip_modules = {config.llm_int8_skip_modules}: must name the "
                         "head too, which shares the embedding's weight (tie_word_embeddings = True)")


def check_frozen(model: nn.Module) -> None:
    """Raise ValueError if adapters would train anything else in a layer of 4 bits."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and any(parameter.requires_grad for parameter in layer.parameters()):
            raise ValueError(f"LoraConfig: bias, modules_to_save or target_parameters name weights of {name}, a layer "
                             "of 4 bits: must leave them out, it can have adapters alone")


@contextmanager
def decodable(model: nn.Module) -> Iterator[None]:
    """While it lasts, weights of 4 bits on the meta device can be decoded there, as peft does for DoRA."""
    weights: list[Any] = [layer.weight for layer in model.modules() if isinstance(layer, Linear4bit)]
    state: Any = QuantState
    for weight in weights:
        scales, table = (torch.empty(size, device="meta") for size in (-(-weight.numel() // weight.blocksize), 16))
        weight.quant_state = state(scales, weight.shape, table, weight.blocksize, weight.quant_type, torch.float32)
    try:
        yield
    finally:
        for weight in weights:
            weight.quant_state = None


@contextmanager
def by_shapes(model: nn.Module) -> Iterator[None]:
    """While it lasts, layers of 4 bits in `model` run on the meta device."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    for layer in layers:
        layer.forward = lambda x, outputs=layer.out_features: x.new_empty(*x.shape[:-1], outputs)
    try:
        with decodable(model):
            yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def whole_while_drawn(module: nn.Module) -> Iterator[None]:
    """While it lasts, layers of 4 bits in `module` have whole weights, on the meta device at first; then these are
    quantized."""
    layers: list[tuple[Any, Any]] = [(layer, layer.weight) for layer in module.modules()
                                     if isinstance(layer, Linear4bit)]
    for layer, weight in layers:
        layer.weight = nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False)
    yield
    for layer, weight in layers:
        drawn = layer.weight.detach()
        layer.weight = Params4bit(drawn, quant_type=weight.quant_type, quant_storage=weight.quant_storage,
                                  compress_statistics=weight.compress_statistics, blocksize=weight.blocksize,
                                  module=layer)
        _quantize(layer.weight, drawn)
        # In evaluation on such CPUs bitsandbytes packs weights in another way, with scales of 16 bits, and for good:
        # backward then gives their inputs no gradient.
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_plain_tensors)
        layer.register_load_state_dict_pre_hook(_load_state)


def is_four_bit(weight: Tensor) -> bool:
    """Whether it is that of a layer made here."""
    return isinstance(weight, Params4bit)


def shape_of(weight: Any) -> torch.Size:
    """Of the whole weight [out, in]."""
    shape: torch.Size = weight.quant_state.shape
    return shape


def fill(weight: Any, tensor: Tensor, state: Mapping[str, Tensor]) -> None:
    """Set a weight of 4 bits to `tensor`: whole, as a file of the model that isn't quantized has it, or, with the
    tensors of its `state` by their names behind the weight's, of 4 bits already.

    Raises:
        ValueError: for another shape, and for an incomplete state.
    """
    wanted, decoded = shape_of(weight), None
    if state:
        # Copies: what has been read may be a part of the file in memory.
        copies = {key: value.to(weight.device, copy=True) for key, value in state.items()}
        try:
            decoded = QuantState.from_dict(copies, device=weight.device)
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"of 4 bits, and {', '.join(sorted(state))} don't tell how to decode it: "
                             f"{type(error).__name__}: {error}") from None
    elif issubclass(weight.module.source_cls, Conv1D):  # whose weight is [in, out]
        tensor = tensor.T
    found = tensor.shape if decoded is None else decoded.shape
    if found != wanted:
        raise ValueError(f"{list(found)}, its config.json says {list(wanted)}")
    if decoded is None:
        _quantize(weight, tensor)
    else:
        _set(weight, tensor.to(weight.device, copy=True), decoded)


def _quantize(weight: Any, tensor: Tensor) -> None:
    device = tensor.device if weight.quant_state is None else weight.device
    _set(weight, *quantize_4bit(tensor.contiguous().to(device), blocksize=weight.blocksize,
                                compress_statistics=weight.compress_statistics, quant_type=weight.quant_type,
                                quant_storage=weight.quant_storage))


def _set(weight: Any, data: Tensor, state: QuantState) -> None:
    weight.data, weight.quant_state, weight.bnb_quantized = data, state, True
    weight.blocksize, weight.quant_type, weight.compress_statistics = state.blocksize, state.quant_type, state.nested
    weight.module.quant_state = state


def _plain_tensors(layer: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """In what is saved: a checkpoint whose loading executes nothing can't hold classes of bitsandbytes."""
    saved = state_dict[f"{prefix}weight"]
    if saved is not layer.weight:
        with torch._C.DisableTorchFunction():
            state_dict[f"{prefix}weight"] = saved.as_subclass(Tensor)


def _load_state(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """From what Linear4bit saves besides its weight, which it doesn't load itself."""
    start = f"{prefix}weight."
    state = {name.removeprefix(start): state_dict.pop(name) for name in list(state_dict) if name.startswith(start)}
    if state:
        weight = layer.weight
        _set(weight, weight.data, QuantState.from_dict(state, device=weight.device))
