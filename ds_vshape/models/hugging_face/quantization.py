"""Which quantization a Hugging Face model is to have, by its config.json or an argument, and what can be trained.

That is 4 bits by bitsandbytes under LoRA adapters (QLoRA, Dettmers et al., 2023, https://arxiv.org/abs/2305.14314);
four_bit.py makes the layers. Nothing here needs bitsandbytes.
"""

from __future__ import annotations

from typing import Any

# What transformers says where a key isn't there (BitsAndBytesConfig), and what is legal.
_LEGAL: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "load_in_8bit": (False, (False,)),
    "load_in_4bit": (False, (True,)),
    "bnb_4bit_quant_type": ("fp4", ("nf4", "fp4")),
    "bnb_4bit_use_double_quant": (False, (True, False)),
    "bnb_4bit_compute_dtype": ("float32", ("float32", "bfloat16", "float16")),
    # The others are floating-point numbers for torch: DeepSpeed would cast them with the model.
    "bnb_4bit_quant_storage": ("uint8", ("uint8",)),
}


def quantization_of(config: Any, given: Any, lora: Any, tensor_parallel_ranks: int) -> dict[str, Any] | None:
    """The settings, those of transformers' BitsAndBytesConfig; None for a model that isn't to be quantized.

    Args:
        config: of the model.
        given: instead of config.json's, a BitsAndBytesConfig or a dictionary of its settings; None if there is none.
        lora: peft's LoraConfig, or None.

    Raises:
        ValueError: for quantization that can't be trained.
    """
    stored = getattr(config, "quantization_config", None)
    if stored and given is not None:
        raise ValueError(f"quantization_config = {_settings(given)}: must be None, the model's config has one already")
    settings = _settings(stored or given)
    if not settings:
        return None
    method = settings.get("quant_method", "bitsandbytes")
    method = getattr(method, "value", method)
    if method != "bitsandbytes":
        raise ValueError(f"quantization_config: quant_method = {method!r}: must be 'bitsandbytes', with load_in_4bit = "
                         "True; other quantized weights can't be trained in a pipeline, nor can adapters of theirs")
    for key, (default, legal) in _LEGAL.items():
        value = settings.get(key)
        value = default if value is None else value
        value = str(value).removeprefix("torch.") if key.endswith(("dtype", "storage")) else value
        if value not in legal:
            raise ValueError(f"quantization_config: {key} = {value!r}: must be {' or '.join(map(repr, legal))} in a "
                             "pipeline, which knows bitsandbytes' 4 bits")
    if tensor_parallel_ranks > 1:
        raise ValueError(f"quantization_config: load_in_4bit = True with {tensor_parallel_ranks} tensor parallel "
                         "ranks: must have 1, weights of 4 bits aren't cut")
    if lora is None:
        raise ValueError("quantization_config: load_in_4bit = True with lora = None: must be a LoraConfig, weights of "
                         "4 bits can't be trained themselves")
    return settings


def _settings(given: Any) -> dict[str, Any]:
    if not given or isinstance(given, dict):
        return dict(given or {})
    if not hasattr(given, "to_dict"):
        raise ValueError(f"quantization_config = {given!r}: must be a transformers.BitsAndBytesConfig")
    return dict(given.to_dict())
