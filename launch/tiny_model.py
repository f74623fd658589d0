"""Makes a small random model in the format of Hugging Face, to try launch/finetune.py with: bytes are its tokens.

    python launch/tiny_model.py llama runs/tiny-llama
    python launch/tiny_model.py llama runs/tiny-chat --chat      with a tokenizer that has a chat template
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TOKENS = 256
START, END = "<|im_start|>", "<|im_end|>"
# As Qwen's.
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_config(family: str, layers: int = 8, hidden: int = 32, heads: int = 4, **others: Any) -> Any:
    """A config of `family` for bytes; `others` are options of the family's own config class."""
    if family == "opt":
        others = {"ffn_dim": 3 * hidden, "word_embed_proj_dim": hidden, **others}
    elif family != "gpt2":  # whose config has other names for these, and a fixed width
        others = {"intermediate_size": 3 * hidden, "num_key_value_heads": max(1, heads // 2),
                  "head_dim": hidden // heads, **others}
    return AutoConfig.for_model(family, **{
        "vocab_size": TOKENS, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **others})


def save_tiny_model(config: Any, folder: Path, seed: int = 0, **options: Any) -> None:
    """Random weights for `config`; `options` go to transformers' save_pretrained."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)


def chat_tokenizer(template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A token for every byte, and one each for the end and the start of a message."""
    bytes_in_order = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: token for token, byte in enumerate(bytes_in_order)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=[START])
    made.chat_template = template
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="as transformers calls it: llama, qwen3, gpt2, ...")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--chat", action="store_true", help="add a tokenizer with a chat template")
    args = parser.parse_args()
    others = {}
    if args.chat:
        tokenizer = chat_tokenizer()
        tokenizer.save_pretrained(args.folder)
        others = {"vocab_size": len(tokenizer)}
    save_tiny_model(tiny_config(args.family, args.layers, args.hidden, args.heads, **others), args.folder)


if __name__ == "__main__":
    main()
