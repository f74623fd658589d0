"""Makes preference pairs of what every machine has: questions about Python's standard library with two answers.

    python launch/preferences.py runs/pairs.jsonl

Each line has a "prompt" that asks for a function by its signature, as launch/conversations.py does; "chosen" is the
first paragraph of its docstring, "rejected" that of another function.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversations import conversations


def preferences(root: Path) -> Iterator[dict[str, Any]]:
    """A pair for each public function below `root` that has a docstring; the function before it gives the rejected
    answer."""
    other: dict[str, str] | None = None
    for question, answer in conversations(root):
        if other is not None and other != answer:
            yield {"prompt": [question], "chosen": [answer], "rejected": [other]}
        other = answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .jsonl file to write")
    parser.add_argument("--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]),
                        help="folder with .py files (default: Python's own standard library)")
    args = parser.parse_args()
    args.file.parent.mkdir(parents=True, exist_ok=True)
    with args.file.open("w", encoding="utf-8") as lines:
        for pair in preferences(args.source):
            lines.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main()
