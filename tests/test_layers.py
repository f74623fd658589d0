"""The package's folders lie in layers: imports go down only, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ds_vshape"

# From the top. A folder imports from itself and from those below its line; those in one line don't know each other.
LAYERS = (
    ("__main__", "run"),
    ("cli",),
    ("finetuning",),
    ("layouts", "plugin"),
    ("models", "engine"),
    ("checkpoint",),
    ("module",),
    ("measure",),
    ("runtime",),
    ("health",),
    ("comm",),
    ("config", "split_backward"),
    ("deepspeed_adapter", "schedule"),
)
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, text: str, everywhere: bool = True) -> Iterator[str]:
    """The package's modules that `text`, the module `name`, imports; without `everywhere` only those at its top."""
    tree = ast.parse(text)
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from [found for found in (full, node.module) if found in MODULES][:1]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def folder_of(name: str) -> str:
    return (name.split(".") + [""])[1]


def upward(name: str, text: str) -> list[str]:
    """The imports of `name` that don't go down. The package itself holds names for users and imports when asked."""
    own = folder_of(name)
    return [other for other in imports(name, text) if folder_of(other) not in ("", own)
            and LEVEL[folder_of(other)] <= LEVEL[own]]


def circle(graph: dict[str, list[str]]) -> list[str]:
    """Some circle of `graph`, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name):] + [name]
        if name in done:
            return []
        for other in graph.get(name, ()):
            if found := visit(other, way + [name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_every_folder_has_its_layer() -> None:
    assert {folder_of(name) for name in MODULES} - {""} == set(LEVEL)


@pytest.mark.parametrize("name", [name for name in MODULES if folder_of(name)])
def test_imports_go_down(name: str) -> None:
    assert not upward(name, MODULES[name].read_text())


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A module of a package is known before the package's own text has run to its end.
    graph = {name: [other for other in imports(name, path.read_text(), everywhere=False)
                    if not name.startswith(f"{other}.")] for name, path in MODULES.items()}
    assert not circle(graph)


def test_what_goes_up_or_round_is_found() -> None:
    assert upward("ds_vshape.comm.groups", "from ds_vshape.engine.engine import PipelineEngine")
    inside = "def f():\n    from ds_vshape.health import watch"
    assert upward("ds_vshape.comm.groups", inside) == ["ds_vshape.health.watch"]
    assert not upward("ds_vshape.comm.groups", "from ds_vshape.schedule.passes import Pass\nimport ds_vshape")
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert not circle({"a": ["b", "c"], "b": ["c"], "c": []})


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_a_folder_says_what_it_holds(folder: str) -> None:
    """In a first sentence, and then by the names of its files."""
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    assert text.split("\n")[0].endswith(".")
    missing = [path.name for path in (PACKAGE / folder).glob("*.py") if path.name not in ("__init__.py",)
               and path.name not in text]
    assert not missing


def test_the_architecture_page_has_these_layers() -> None:
    picture = (PACKAGE / "docs" / "architecture.md").read_text().split("```text\n")[1].split("```")[0]
    assert tuple(tuple(line[:26].split()) for line in picture.splitlines()) == LAYERS
