"""Makes preference pairs of what every machine has: questions about Python's standard library with two answers.

    python launch/preferences.py runs/pairs.jsonl

Each line has a "prompt" that asks for a function by its signature, as launch/conversations.py does; "chosen" is the
first paragraph of its docstring, "rejected" that of another function.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversations import conversations, write_rows


def preferences(root: Path) -> Iterator[dict[str, Any]]:
    """A pair for each public function below `root` that has a docstring; the function before it gives the rejected
    answer."""
    other: dict[str, str] | None = None
    for question, answer in conversations(root):
        if other is not None and other != answer:
            yield {"prompt": [question], "chosen": [answer], "rejected": [other]}
        other = answer


if __name__ == "__main__":
    write_rows(preferences, __doc__)
