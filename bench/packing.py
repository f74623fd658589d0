"""Measures samples of long-tailed lengths in packed rows beside the same samples in padded ones.

    python bench/packing.py
    python bench/packing.py --lengths conversations

A small Llama of transformers on ranks of one thread each, by launch/finetune.py's layers and rows. Contenders take
turns, with as many rows in a micro-batch: padded to a fixed length, padded to the longest row of the micro-batch, and
several samples in each row. Padding doesn't count as tokens. That losses of packed rows are those of the samples alone
is shown by tests/models/hugging_face/test_hugging_face_packed.py.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import record
import torch
import torch.distributed as dist
from datasets import Dataset
from ranks import run_ranks
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig

import ds_vshape
from ds_vshape.finetuning.batches import IDS, LEARNED, MicroBatches, PackedRows, PaddedRows, Rows
from ds_vshape.models.hugging_face import PARTITION_METHOD, next_token_loss, pipeline_layers
from ds_vshape.split_backward.head import IGNORE_INDEX

FIXED, LONGEST, PACKED = "padded to a fixed length", "padded to the longest", "packed"
_SAMPLES = 4000
TOKENS = 256
# What a chat template writes around a question and its answer.
_MARKS = 66


class FixedRows(PaddedRows):
    """A sample in each row of `length` tokens."""

    def __init__(self, samples: Dataset, length: int) -> None:
        super().__init__(samples)
        self._length = length

    def micro_batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids, labels = super().micro_batch(rows)
        room = (0, self._length - ids.size(1))
        return torch.nn.functional.pad(ids, room), torch.nn.functional.pad(labels, room, value=IGNORE_INDEX)


def lengths_of(kind: str, longest: int) -> list[int]:
    """The lengths of samples in tokens, cut at `longest`."""
    dice = random.Random(0)
    if kind == "lognormal":
        return [min(longest, max(2, round(dice.lognormvariate(4, 1)))) for _ in range(_SAMPLES)]
    found = list(lengths_of_docstrings(Path(sysconfig.get_paths()["stdlib"])))
    return [min(longest, length) for length in dice.sample(found, min(_SAMPLES, len(found)))]


def lengths_of_docstrings(root: Path) -> Iterator[int]:
    """Bytes of a question about each public function below `root` and of its docstring's first paragraph."""
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # of another version of Python
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
                answer = str(ast.get_docstring(node)).split("\n\n")[0]
                question = f"What does {path.stem}.{node.name}({ast.unparse(node.args)}) do?"
                yield _MARKS + len((question + answer).encode())


def engine_of(packed: bool, dynamic: bool, options: argparse.Namespace) -> Any:
    """The engine of one contender; collective."""
    config = {"train_micro_batch_size_per_gpu": options.rows, "gradient_accumulation_steps": options.micro_batches,
              "optimizer": {"type": "SGD", "params": {"lr": 0.01}}, "steps_per_print": 10**9,
              "disable_python_gc": True, "pipeline_schedule": options.schedule}
    model = AutoConfig.for_model("llama", vocab_size=TOKENS, num_hidden_layers=options.layers,
                                 hidden_size=options.hidden, intermediate_size=3 * options.hidden,
                                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=options.length,
                                 bos_token_id=None, eos_token_id=None, pad_token_id=None)
    module = ds_vshape.PipelineModule(pipeline_layers(model, packed=packed), num_stages=options.ranks, config=config,
                                      loss_fn=next_token_loss, partition_method=PARTITION_METHOD, dynamic_shape=dynamic)
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


def measure(rank: int, lengths: list[int], options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of each contender in each round, after one to warm up."""
    dice = random.Random(1)
    ids = [[dice.randrange(TOKENS) for _ in range(length + 1)] for length in lengths]
    samples = Dataset.from_dict({IDS: ids, LEARNED: [[True] * len(each) for each in ids]})
    rows: dict[str, Rows] = {FIXED: FixedRows(samples, options.length), LONGEST: PaddedRows(samples),
                             PACKED: PackedRows(samples, options.length)}
    engines = {name: engine_of(name == PACKED, name == LONGEST, options) for name in rows}
    data = {name: MicroBatches(of_name, options.rows, seed=0) for name, of_name in rows.items()}
    found: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(options.rounds + 1):
        for name, engine in engines.items():
            batch = []
            before = data[name].tokens
            for _ in range(options.batches * options.micro_batches):
                batch.append(next(data[name]))
            dist.barrier()
            start = time.perf_counter()
            for first in range(0, len(batch), options.micro_batches):
                engine.train_batch(iter(batch[first:first + options.micro_batches]))
            dist.barrier()
            if number:
                found[name].append((data[name].tokens - before) / (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--schedule", default="v-half")
    parser.add_argument("--lengths", choices=("lognormal", "conversations"), default="lognormal",
                         help="with the parameters 4 and 1, or those of Python's functions and docstrings in bytes")
    parser.add_argument("--length", type=int, default=512, help="of a row, and the longest of a sample")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batches", type=int, default=2, help="of a contender's turn")
    parser.add_argument("--rounds", type=int, default=5)
    record.add_json_option(parser)
    options = parser.parse_args()
    lengths = lengths_of(options.lengths, options.length)
    found = run_ranks(options.ranks, measure, lengths, options, timeout=3600)[0]
    table = Table(title=f"{options.schedule}, {options.ranks} ranks, micro-batches of {options.rows} rows, "
                        f"{options.lengths} lengths: mean {statistics.mean(lengths):.0f}, median "
                        f"{statistics.median(lengths):.0f}, up to {options.length}; {options.rounds} rounds")
    for column in ("rows", "tokens/s", "least", "most", "packed over it"):
        table.add_column(column, justify="left" if column == "rows" else "right")
    for name, speeds in found.items():
        ratio = statistics.median(packed / speed for packed, speed in zip(found[PACKED], speeds))
        table.add_row(name, *(f"{speed:.0f}" for speed in (statistics.median(speeds), min(speeds), max(speeds))),
                      f"{ratio:.2f}")
    Console(width=130).print(table)
    record.write(options.json, found)


if __name__ == "__main__":
    main()
