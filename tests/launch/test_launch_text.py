"""The text of the main job: the same bytes in every process, and two parts that share no file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from text import VALIDATION_STRIDE, load_corpus, micro_batches, source_files

TEXT = torch.arange(200, dtype=torch.uint8)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Fifty files, each of one byte value, and some that don't belong."""
    for place in range(50):
        folder = tmp_path / f"package{place % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{place:02}.py").write_bytes(bytes([place]) * 10)
    for skipped in ("test", "site-packages", "__pycache__"):
        folder = tmp_path / "package0" / skipped
        folder.mkdir()
        (folder / "wrong.py").write_bytes(b"\xff" * 10)
    (tmp_path / "readme.txt").write_bytes(b"\xff" * 10)
    return tmp_path


def test_files_come_in_the_order_of_their_names(sources: Path):
    names = [path.relative_to(sources).as_posix() for path in source_files(sources)]
    assert len(names) == 50
    assert names == sorted(names)


def test_the_parts_share_no_file_and_lose_none(sources: Path):
    corpus = load_corpus(sources)
    training, validation = set(corpus.training.tolist()), set(corpus.validation.tolist())
    assert training | validation == set(range(50))
    assert not training & validation
    assert len(validation) == -(-50 // VALIDATION_STRIDE)
    assert len(corpus.training) + len(corpus.validation) == 500


def test_the_standard_library_is_text_enough():
    first, second = load_corpus(), load_corpus()
    assert len(first.training) > 3_000_000 and len(first.validation) > 30_000
    assert torch.equal(first.training, second.training) and torch.equal(first.validation, second.validation)
    assert b"def " in bytes(first.training[:100_000].tolist())


def test_labels_are_the_next_bytes():
    for inputs, labels in islice(micro_batches(TEXT, size=3, length=8, seed=0), 20):
        assert inputs.shape == labels.shape == (3, 8)
        assert inputs.dtype == labels.dtype == torch.int64
        assert torch.equal(labels, inputs + 1)  # TEXT counts upwards.


def test_draws_depend_on_the_seed_alone():

    def draw(seed: int, global_seed: int) -> torch.Tensor:
        stream = micro_batches(TEXT, size=2, length=8, seed=seed)
        drawn = []
        for inputs, _ in islice(stream, 10):
            torch.manual_seed(global_seed)  # As DeepSpeed's seed_layers does within each forward.
            drawn.append(inputs)
        return torch.stack(drawn)

    assert torch.equal(draw(1, global_seed=0), draw(1, global_seed=7))
    assert not torch.equal(draw(1, global_seed=0), draw(2, global_seed=0))


def test_every_window_can_be_drawn():
    text = torch.arange(10, dtype=torch.uint8)
    starts = {inputs[0, 0].item() for inputs, _ in islice(micro_batches(text, size=1, length=7, seed=0), 100)}
    assert starts == {0, 1, 2}


def test_too_little_text_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="a text of 8 bytes has no window of 8"):
        next(micro_batches(TEXT[:8], size=1, length=8, seed=0))
    (tmp_path / "only.py").write_text("pass")
    with pytest.raises(FileNotFoundError, match="holds 1 .py files"):
        load_corpus(tmp_path)
