"""What a row of data may hold, texts and conversations; errors name the row, the key, its value and what is legal."""

from __future__ import annotations

from typing import Any

from ds_vshape.config.section import shown

MESSAGES_FORM = 'a list of messages {"role": ..., "content": ...}'
EITHER_FORM = f"a text, or {MESSAGES_FORM}"


def check_text(where: str, key: str, value: Any, legal: str = "a text") -> None:
    """ValueError unless `value` is a text."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} = {shown(value)}: must be {legal}")


def check_messages(where: str, key: str, value: Any, legal: str = MESSAGES_FORM) -> None:
    """ValueError unless `value` is a conversation, whose messages say something: an assistant may call tools without
    "content"."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key} = {shown(value)}: must be {legal}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or all(
                said is None for name, said in message.items() if name != "role"):
            raise ValueError(f"{where}: {key} holds {shown(message)}: must be {legal}")


def check_either(where: str, key: str, value: Any) -> None:
    """ValueError unless `value` is a text or a conversation."""
    (check_messages if isinstance(value, list) else check_text)(where, key, value, EITHER_FORM)
