"""Two saves under one tag: one comes between any two file operations of the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_vshape.checkpoint.commit import Draft, latest, name_latest, new_id
from ds_vshape.checkpoint.errors import CheckpointError, replace_text

TAG, OVERTAKEN = "step", "another job has saved it meanwhile"
OPERATIONS = ("mkdir", "open", "rename", "replace", "unlink")


def save(folder: Path, text: str) -> None:
    """A save as checkpointing.py does it, of the files "layout" and "states.pt" that both hold `text`."""
    draft = Draft(str(folder), TAG, new_id())
    try:
        draft.start()
        own = folder / draft.name
        with draft.writing():
            own.mkdir(exist_ok=True)
            replace_text(own / "layout_states.pt", text, own / "layout_states.pt.draft")
        error: Exception | None = None
        try:
            (own / "states.pt").write_text(text)
        except OSError as failed:
            error = failed
        draft.check()
        if error is not None:
            raise error
        draft.commit()
        name_latest(str(folder), TAG)
    except Exception:
        draft.discard()
        raise
    draft.forget_replaced()


def before_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> Callable[[], int]:
    """Run `act` before the file operation `number`; returns a function that counts the operations."""
    seen = 0

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen - 1 == number:
                act()
            return operation(*args, **kwargs)
        return call

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    return lambda: seen


def how_it_ends(folder: Path, text: str) -> str:
    try:
        save(folder, text)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("there_before", [False, True])
def test_another_save_between_any_two_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 there_before: bool) -> None:
    number, operations, overtaken = 0, 1, 0
    while number < operations:
        folder = tmp_path / str(number)
        folder.mkdir()
        if there_before:
            save(folder, "before")
        others: list[str] = []
        with monkeypatch.context() as patched:
            count = before_call(patched, number, lambda: others.append(how_it_ends(folder, "other")))
            mine = how_it_ends(folder, "mine")
            operations = count() if number else max(count(), 2)
        ends = [mine, *others]
        assert all(not end or OVERTAKEN in end for end in ends), ends
        assert "" in ends
        assert latest(str(folder)) == TAG
        assert {path.read_text() for path in (folder / TAG).iterdir()} in ({"mine"}, {"other"})
        overtaken += bool(mine)
        number += 1
    assert number > 5 and overtaken > 2
