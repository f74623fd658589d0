"""Makes a small random model in the format of Hugging Face, to try launch/finetune.py with: bytes are its tokens.

    python launch/tiny_model.py llama runs/tiny-llama
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = 256


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="as transformers calls it: llama, qwen3, gpt2, ...")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    args = parser.parse_args()
    save_tiny_model(tiny_config(args.family, args.layers, args.hidden, args.heads), args.folder)


if __name__ == "__main__":
    main()
