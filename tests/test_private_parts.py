"""Tests use private parts of what they test only through tests/support/internals.py; the exceptions are listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_vshape.deepspeed_adapter import parts

TESTS = Path(__file__).parent
PROGRAMS = [path for folder in ("ds_vshape", "bench", "launch")
            for path in sorted((TESTS.parent / folder).rglob("*.py"))]
FILES = [path for path in sorted(TESTS.rglob("*.py")) if path not in (Path(__file__), TESTS / "support/internals.py")]

# DeepSpeed's own names, which scripts use and override too.
OF_SCRIPTS = {name for names in parts.OVERRIDDEN.values() for name in names}
# Faults that are planted in the package, and functions whose calls are counted where nothing else shows them.
PLANTED = {
    "checkpoint/test_load_faults.py": {"_find_checkpoint"},
    "split_backward/test_split_programs.py": {"_finish_use", "_only_adds", "_partial_sums"},
    "split_backward/test_split_backward_autograd.py": {"_left_gradient"},
    "schedule/adaptive/test_adaptive_cache.py": {"_search"},
    "models/hugging_face/lora_models.py": {"_accumulator"},  # that it isn't replaced
}
# Parts of other libraries whose names the package has too.
OF_OTHERS = {
    "checkpoint/test_load_faults.py": {"_hp_mapping"},  # DeepSpeed's
    "docs/wandb_figure.py": {"_step"},  # wandb's
    "finetuning/test_progress.py": {"_step"},  # wandb's
    "measure/test_monitor.py": {"_step"},  # wandb's
    "schedule/adaptive/memory_optimum.py": {"_replace"},  # namedtuple's
    "schedule/proofs/test_deadlock.py": {"_replace"},  # namedtuple's, which is public there
    "split_backward/split_programs/run.py": {"_version"},  # torch's
    "split_backward/test_kernels.py": {"_replace"},  # namedtuple's
    "split_backward/test_head.py": {"_seen"},  # its own
    "support/simulated_gpu/communicator.py": {"_done", "_timeout"},  # its own, and torch's
    "support/simulated_gpu/device.py": {"_time"},  # its own
    "deepspeed_adapter/test_touches.py": {"_build"},  # names of private parts are what it's about
}


def defined(tree: ast.AST) -> set[str]:
    """The private names that a text defines: functions, classes, attributes and variables."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__") and name != "_"}


PRIVATE = {name for path in PROGRAMS for name in defined(ast.parse(path.read_text()))}


def touches(text: str) -> Iterator[str]:
    """The private names of the programs that `text` uses: as attributes, except for its own, in imports, and in
    strings, by which monkeypatch finds them."""
    tree = ast.parse(text)
    own = defined(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own
            names = [] if of_itself else [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names = [node.value]
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("ds_vshape"):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name in PRIVATE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_private_parts_are_left_alone(path: Path) -> None:
    name = str(path.relative_to(TESTS))
    allowed = OF_SCRIPTS | PLANTED.get(name, set()) | OF_OTHERS.get(name, set())
    assert set(touches(path.read_text())) <= allowed


def test_what_is_allowed_is_there() -> None:
    for allowed in (PLANTED, OF_OTHERS):
        for name, names in allowed.items():
            assert names <= set(touches((TESTS / name).read_text())), name


@pytest.mark.parametrize("text, found", [
    ("engine._observer.batches", ["_observer"]),
    ("engine._observer = None", ["_observer"]),
    ("monkeypatch.setattr(planner, '_search', never)", ["_search"]),
    ("from ds_vshape.schedule.adaptive.planner import _search", ["_search"]),
    ("class Ours(Channels):\n    def f(self):\n        return self._start_sends()", ["_start_sends"]),
    ("class Ours:\n    def _search(self):\n        return self._search()", []),
    ("engine.observer.batches, tensor._is_view(), os._exit(1)", []),
])
def test_touches_are_found(text: str, found: list[str]) -> None:
    assert list(touches(text)) == found
