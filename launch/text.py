"""Real text that every machine has: the sources of Python's own standard library, as bytes.

Files are taken in the order of their names and cut into a training and a validation part; micro-batches are drawn
from a seed, so that runs on one machine see the same bytes whatever the schedule.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BYTES = 256

# One file in so many is kept for validation.
VALIDATION_STRIDE = 20
# Not part of the library proper; whether they are there depends on how Python was installed.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The two parts, each one long tensor of bytes (uint8)."""

    training: Tensor
    validation: Tensor


def source_files(root: Path) -> list[Path]:
    """All .py files below `root` but those in SKIPPED_FOLDERS, in the order of their relative names."""
    files = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def load_corpus(root: Path | None = None) -> Corpus:
    """The sources below `root`, or the standard library's."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = source_files(root)
    if len(files) < 2:
        raise FileNotFoundError(f"{root} holds {len(files)} .py files: at least one for each part is needed")
    validation = files[::VALIDATION_STRIDE]
    training = [path for place, path in enumerate(files) if place % VALIDATION_STRIDE]
    return Corpus(_read(training), _read(validation))


def tokens_of(text: Tensor, model: Path, vocabulary: int) -> Tensor:
    """Bytes as the tokens of the tokenizer in `model`; as they are where it has none.

    Raises:
        ValueError: if there is no tokenizer and the vocabulary has no place for every byte.
    """
    if (model / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer  # an extra, which bytes do without
        decoded = bytes(text.tolist()).decode(errors="replace")
        return torch.tensor(AutoTokenizer.from_pretrained(model)(decoded, add_special_tokens=False)["input_ids"])
    if vocabulary < BYTES:
        raise ValueError(f"{model} has no tokenizer and vocab_size = {vocabulary}: must be at least {BYTES} for bytes")
    return text


def _read(files: list[Path]) -> Tensor:
    text = b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def micro_batches(text: Tensor, size: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, labels), each int64 [size, length]; labels are the inputs moved on by one byte.

    The draws come from a generator of their own: DeepSpeed's seed_layers sets the global one again in each forward.
    """
    if len(text) <= length:
        raise ValueError(f"a text of {len(text)} bytes has no window of {length} + 1")
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (size, 1), generator=generator)
        windows = text[starts + torch.arange(length + 1)].long()
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
