"""Each test module stands alone: it imports no other one, and helpers only from its own folder and tests/support."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SUPPORT = TESTS / "support"
# What Python imports by one name: modules beside each other, and packages. All folders are on one path.
MODULES = [path for path in sorted(TESTS.rglob("*.py")) if not (path.parent / "__init__.py").exists()]
PACKAGES = [path.parent for path in sorted(TESTS.rglob("__init__.py"))]
PROGRAMS = [path for folder in ("launch", "bench") for path in sorted((TESTS.parent / folder).glob("*.py"))]
FOLDERS = {path.stem: path.parent for path in [*MODULES, *PACKAGES]}


def imported(text: str) -> Iterator[str]:
    """The modules of tests/ that `text` imports, in scripts that it holds too."""
    for name in re.findall(r"^\s*(?:from|import) (\w+)", text, flags=re.MULTILINE):
        if name in FOLDERS:
            yield name


def strangers(path: Path, text: str) -> list[str]:
    """The imports of `path` that are tests, or that aren't found when it runs alone."""
    return [name for name in imported(text)
            if name.startswith("test_") or FOLDERS[name] not in (path.parent, SUPPORT)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_a_module_stands_alone(path: Path) -> None:
    assert not strangers(path, path.read_text())


def test_what_would_not_stand_alone_is_found() -> None:
    path = TESTS / "engine" / "test_engine.py"
    assert strangers(path, "from test_config import CASES\n") == ["test_config"]
    assert strangers(path, 'SCRIPT = """\nimport test_engine_equivalence\n"""') == ["test_engine_equivalence"]
    assert strangers(path, "def f():\n    from counted_blocks import job\n") == ["counted_blocks"]
    assert not strangers(path, "from pairwise import covering\nfrom ranks import run_ranks\nimport torch\n")


def test_names_are_unique() -> None:
    names = Counter(path.stem for path in [*MODULES, *PACKAGES, *PROGRAMS])
    assert [name for name, count in names.items() if count > 1] == []
