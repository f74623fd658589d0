"""Makes conversations of what every machine has: questions about Python's standard library, answered by its docstrings.

    python launch/conversations.py runs/library.jsonl

Each line has "messages": the user asks for a function by its signature, the assistant answers with the first paragraph
of its docstring.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from text import source_files
from tqdm import tqdm


def conversations(root: Path) -> Iterator[list[dict[str, str]]]:
    """One for each public function below `root` that has a docstring."""
    for path in tqdm(source_files(root), desc="conversations", unit="file"):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # of another version of Python, as some files of lib2to3 are
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
                answer = str(ast.get_docstring(node)).split("\n\n")[0].replace("\n", " ")
                yield [{"role": "user", "content": f"What does {module}.{node.name}({ast.unparse(node.args)}) do?"},
                       {"role": "assistant", "content": answer}]


def write_rows(rows_of: Callable[[Path], Iterable[dict[str, Any]]], description: str | None) -> None:
    """What `rows_of` makes of a folder of sources, in the file that the command line names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .jsonl file to write")
    parser.add_argument("--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]),
                        help="folder with .py files (default: Python's own standard library)")
    args = parser.parse_args()
    args.file.parent.mkdir(parents=True, exist_ok=True)
    with args.file.open("w", encoding="utf-8") as lines:
        for row in rows_of(args.source):
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    write_rows(lambda root: ({"messages": messages} for messages in conversations(root)), __doc__)
