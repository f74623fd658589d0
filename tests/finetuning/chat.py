"""A tokenizer and conversations for tests."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

START, END = "<|im_start|>", "<|im_end|>"
# Qwen's, without and with marks around what the assistant says.
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MARKED = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
          "{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
          "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Shows what the assistant thought in its last message alone.
CHANGING = ("{% for message in messages %}{{ message.role }}:{% if loop.last %}{{ message.thought }}{% endif %}"
            "{{ message.content }}\n{% endfor %}")


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token for every byte, and one each for the start and the end of a message."""
    vocabulary = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=[START])
    made.chat_template = template
    return made


def conversation(*words: str, **others: Any) -> list[dict[str, Any]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": word, **others} for place, word in enumerate(words)]
