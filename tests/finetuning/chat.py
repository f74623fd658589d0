"""Chat templates and conversations for tests."""

from __future__ import annotations

from typing import Any

# Marks what the assistant says.
MARKED = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
          "{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
          "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Shows what the assistant thought in its last message alone.
CHANGING = ("{% for message in messages %}{{ message.role }}:{% if loop.last %}{{ message.thought }}{% endif %}"
            "{{ message.content }}\n{% endfor %}")


def conversation(*words: str, **others: Any) -> list[dict[str, Any]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": word, **others} for place, word in enumerate(words)]
