"""The placement stored with a checkpoint: optimizer state is loaded where it belongs, or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_vshape.checkpoint.layout import CheckpointError, SavedLayout, check_layout, save_layout
from ds_vshape.schedule.placement import Placement, interleaved, linear, v


def layout(placement: Placement, bounds: list[int]) -> SavedLayout:
    return SavedLayout.of(SimpleNamespace(placement=placement, parts=bounds))  # type: ignore[arg-type]


V = layout(v(2), [0, 2, 4, 6, 8])


def test_the_layout_is_that_of_the_module() -> None:
    assert V == SavedLayout([[0, 3], [1, 2]], [0, 2, 4, 6, 8])


def test_an_equal_layout_is_loaded(tmp_path: Path) -> None:
    save_layout(str(tmp_path), V, writer=0)
    check_layout(str(tmp_path), layout(v(2), [0, 2, 4, 6, 8]))


@pytest.mark.parametrize("other", [
    layout(interleaved(2), [0, 2, 4, 6, 8]), layout(linear(2), [0, 4, 8]), layout(linear(4), [0, 2, 4, 6, 8]),
    layout(v(2), [0, 1, 4, 6, 8]), layout(v(2), [0, 2, 4, 6, 9]), layout(v(1), [0, 4, 8])])
def test_another_layout_is_refused(other: SavedLayout, tmp_path: Path) -> None:
    for saved, now in ((V, other), (other, V)):
        save_layout(str(tmp_path), saved, writer=0)
        with pytest.raises(CheckpointError) as caught:
            check_layout(str(tmp_path), now)
        message = str(caught.value)
        for part in (str(tmp_path), str(saved.chunks), str(saved.bounds), str(now.chunks), str(now.bounds)):
            assert part in message
        for way_out in ("ds_to_universal.py", "load_universal", "load_module_only=True"):
            assert way_out in message


def test_a_checkpoint_of_deepspeeds_own_fits_one_stage_a_rank_alone(tmp_path: Path) -> None:
    check_layout(str(tmp_path), layout(linear(4), [0, 2, 4, 6, 8]))
    for other in (V, layout(interleaved(2), [0, 2, 4, 6, 8])):
        with pytest.raises(CheckpointError, match=r"stages \[\[0\], \[1\]\] on the ranks and stage bounds unknown"):
            check_layout(str(tmp_path), other)


def test_a_later_save_replaces_the_layout(tmp_path: Path) -> None:
    save_layout(str(tmp_path), V, writer=0)
    now = layout(linear(2), [0, 4, 8])
    save_layout(str(tmp_path), now, writer=0)
    check_layout(str(tmp_path), now)


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    # Long enough that a file written in place would be seen half full.
    wide = layout(v(2000), list(range(4001)))
    writers = 4
    start, failures = threading.Barrier(writers + 1), []

    def write(writer: int) -> None:
        start.wait()
        for _ in range(20):
            save_layout(str(tmp_path), wide, writer)

    def read() -> None:
        for _ in range(100):
            if any(name.suffix == ".json" for name in tmp_path.iterdir()):
                try:
                    check_layout(str(tmp_path), wide)
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(writers)]
    for thread in threads:
        thread.start()
    start.wait()
    read()
    for thread in threads:
        thread.join()
    assert not failures
    check_layout(str(tmp_path), wide)
    file, = os.listdir(tmp_path)
    assert json.loads((tmp_path / file).read_text())["bounds"] == wide.bounds
