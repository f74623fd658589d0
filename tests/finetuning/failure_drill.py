"""Kills a fine-tuning at random moments, starts it again by the same command, and compares what it ends with.

    python tests/finetuning/failure_drill.py --kills 10 runs/drill
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests" / "support")]

import psutil
import torch
from ports import free_port
from safetensors.torch import load_file
from tiny_model import chat_tokenizer, save_tiny_model, tiny_config
from tqdm import tqdm

CONFIG = {
    "pipeline_schedule": "v-half", "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
    "zero_optimization": {"stage": 1}, "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
# A killed rank's launcher needs a moment to end the others.
LAUNCHER_SECONDS = 120


@dataclass(frozen=True)
class Drill:
    """A training of `batches` batches in `folder`."""

    folder: Path
    batches: int = 24

    def prepare(self) -> None:
        """The model, the data and the config."""
        model = self.folder / "model"
        tokenizer = chat_tokenizer()
        tokenizer.save_pretrained(model)
        save_tiny_model(tiny_config("llama", vocab_size=len(tokenizer), attention_dropout=0.1), model)
        (self.folder / "config.json").write_text(json.dumps(CONFIG))
        rows = [[{"role": "user", "content": f"Count to {number}."},
                 {"role": "assistant", "content": " ".join(map(str, range(1, number + 1)))}] for number in range(1, 41)]
        (self.folder / "data.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))

    def start(self, name: str, batches: int | None = None) -> subprocess.Popen[bytes]:
        """The program, by the same command each time but for the port."""
        words = ["--model", "model", "--output", name, "--checkpoints", f"{name}-checkpoints", "--save_every", "2",
                 "--evaluate_every", "5", "--data", "data.jsonl", "--length", "128", "--batches",
                 str(batches or self.batches), "--learning_rate", "cosine", "--warmup", "0.1",
                 "--deepspeed_config", "config.json"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                       "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                       "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()),
                                     str(ROOT / "launch" / "finetune.py"), *words], cwd=self.folder, env=environment,
                                    stdout=log, stderr=subprocess.STDOUT)

    def finish(self, name: str, batches: int | None = None) -> float:
        """Train to the end; returns the seconds that it took."""
        began = time.monotonic()
        status = self.start(name, batches).wait(600)
        if status:
            raise RuntimeError(f"status {status}: {(self.folder / f'{name}.log').read_text()[-3000:]}")
        return time.monotonic() - began

    def _said(self, name: str, words: str) -> int:
        """How often the log has these words."""
        log = self.folder / f"{name}.log"
        return log.read_text(errors="replace").count(words) if log.exists() else 0

    def kill(self, name: str, moment: float, victim: int | None, after_save: bool) -> None:
        """Start, and kill one of the ranks, or all processes for None: so many seconds later, or so many after the next
        checkpoint."""
        saved = self._said(name, "saved as")
        launcher = self.start(name)
        while after_save and launcher.poll() is None and self._said(name, "saved as") == saved:
            time.sleep(0.02)
        time.sleep(moment)
        if launcher.poll() is not None:  # the training has ended
            return
        started = psutil.Process(launcher.pid).children(recursive=True)
        ranks = [child for child in started if "finetune.py" in " ".join(_words(child)[:4]) and _is_rank(child)]
        victims = [launcher, *started] if victim is None or len(ranks) <= victim else [ranks[victim]]
        for each in victims:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        launcher.wait(LAUNCHER_SECONDS)
        gone, alive = psutil.wait_procs(started, LAUNCHER_SECONDS)
        if alive:
            raise RuntimeError(f"still there after {name} was killed: {alive}")

    def run(self, kills: int, seed: int) -> list[str]:
        """The names of the tensors that differ in the end."""
        self.prepare()
        start = self.finish("first", 1)
        whole = self.finish("uninterrupted")
        # Every second one comes in the middle of a training with a checkpoint, the others at any time.
        latest = 2 * max(whole - start, 1.0) / (kills + 1)
        moments = random.Random(seed)
        for number in tqdm(range(kills), desc="kills", disable=None):
            after_save = number % 2 == 0
            self.kill("killed", moments.uniform(0.0, latest if after_save else start + latest),
                      moments.choice([None, 0, 1]), after_save)
        self.finish("killed")
        if not self._said("killed", "continues from"):
            raise RuntimeError("no kill came between a checkpoint and the end: take more batches")
        one, other = (_tensors(self.folder / name) for name in ("uninterrupted", "killed"))
        return sorted(name for name in one.keys() | other.keys()
                      if name not in one or name not in other or not torch.equal(one[name], other[name]))


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _is_rank(process: psutil.Process) -> bool:
    return any(word.startswith("--local_rank") for word in _words(process))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    different = Drill(args.folder.resolve(), args.batches).run(args.kills, args.seed)
    print("equal bit for bit" if not different else f"different: {', '.join(different)}")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
