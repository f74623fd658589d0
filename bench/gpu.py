"""All that a machine with GPUs can show, in one command: what runs, what is as fast as predicted, and what isn't.

    python bench/gpu.py                         # takes the GPUs it finds, eight at most
    python bench/gpu.py --device cpu --ranks 2  # the same steps at toy sizes on a CPU, to see whether they start

Needs torch, deepspeed and this checkout; nothing is installed. Each step has processes of its own and a time limit, and
the next one follows whatever became of it. Writes result.json and a log for each process into the folder --out, prints
a table, and exits with 1 if a step has failed. ds_vshape/docs/gpu.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_report import of_killed, of_links, of_machine, of_products, of_repeat, of_split, of_training, table

ROOT = Path(__file__).resolve().parent.parent
STEPS = ROOT / "bench" / "gpu_steps.py"
# Between SIGUSR1, which makes a process say where it is, and its end; and for others when one rank has failed.
LAST_WORDS, AFTER_A_FAILURE = 3.0, 20.0
# Of the step that imports torch and deepspeed for the first time, perhaps from a slow disk.
_FIRST = 240.0
# How long a process may take to end that was killed.
_DYING = 10.0
# Of a step's seconds: a CPU has others to work for.
PATIENCE = {"cuda": 1.0, "cpu": 4.0}
_OUT_OF_MEMORY = "memory ran out: a smaller --hidden"
_TRAINING = f"{_OUT_OF_MEMORY}. If ranks hung: their logs end with where each thread was"


@dataclass(frozen=True)
class Step:
    """What gpu_steps.py runs on `ranks` processes, within `seconds`."""

    name: str
    step: str
    arguments: dict[str, Any]
    # One line of what the ranks' results show; RuntimeError where they are wrong.
    found: Callable[[list[Any]], str]
    hint: str
    ranks: int = 1
    seconds: float = 60.0
    # The last rank is to be killed, and all others are to say so.
    loses_a_rank: bool = False


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    state: str
    seconds: float = 0.0
    found: str = ""
    hint: str = ""
    results: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    """How large what runs is."""

    products: list[list[int]]
    tokens: int
    rounds: int
    split: list[int]
    gpt: dict[str, int]
    small: dict[str, int]
    message: int

    @classmethod
    def on(cls, device: str, ranks: int, hidden: int) -> Sizes:
        layers = max(8, 2 * ranks)
        if device == "cpu":
            tiny = {"layers": 2 * ranks, "micro_batches": 2 * ranks, "hidden": 64, "length": 16, "samples": 1}
            return cls([[64, 64]], 64, 2, [64], tiny, tiny, 4096)
        return cls([[4096, 4096], [16384, 4096], [5120, 5120], [20480, 5120]], 4096, 10, [4096, 5120],
                   {"layers": layers, "micro_batches": max(8, 2 * ranks), "hidden": hidden, "length": 1024,
                    "samples": 4},
                   {"layers": 4, "micro_batches": 4, "hidden": 512, "length": 512, "samples": 2}, 1 << 26)


class Run:
    """The steps that one call has started, and their results so far."""

    def __init__(self, device: str, folder: Path, program: Path = STEPS) -> None:
        self.outcomes: list[Outcome] = []
        # Of all steps together, counted from now.
        self.minutes = 30.0
        self._device, self._folder, self._program, self._start = device, folder, program, time.monotonic()

    def step(self, step: Step) -> Outcome:
        """Run it, print a line, and keep the result in the file."""
        left = self._start + 60 * self.minutes - time.monotonic()
        if left < 10:
            outcome = Outcome(step.name, "skipped", found="no time left: give more --minutes")
        else:
            print(f"{step.name} ...", flush=True)
            outcome = self._run(step, min(step.seconds * PATIENCE[self._device], left))
        self.outcomes.append(outcome)
        print(f"{step.name}: {outcome.state}, {outcome.seconds:.0f} s. {outcome.found}", flush=True)
        (self._folder / "result.json").write_text(json.dumps([asdict(one) for one in self.outcomes], indent=1))
        return outcome

    def _run(self, step: Step, limit: float) -> Outcome:
        start = time.monotonic()
        files = [self._folder / f"{step.name.replace(' ', '_')}.{rank}" for rank in range(step.ranks)]
        for file in files:
            # Of a run before this one.
            Path(f"{file}.json").unlink(missing_ok=True)
        late, codes = self._processes(step, files, limit)
        outcome = Outcome(step.name, "failed", time.monotonic() - start, hint=step.hint)
        logs = [Path(f"{file}.log").read_text(errors="replace") for file in files]
        try:
            if step.loses_a_rank:
                outcome.found = step.found([logs, codes, late])
            elif late or any(codes):
                outcome.found = _why(logs, codes, late, limit)
                return outcome
            else:
                outcome.results = [json.loads(Path(f"{file}.json").read_text()) for file in files]
                outcome.found = step.found(outcome.results)
        except Exception as error:
            outcome.found = f"{type(error).__name__}: {error}"
            return outcome
        outcome.state, outcome.hint = "ok", ""
        return outcome

    def _processes(self, step: Step, files: list[Path], limit: float) -> tuple[list[int], list[int]]:
        """Start the ranks and wait for them; those that were still running at the end, and all exit codes."""
        environment = {**os.environ, "DS_ACCELERATOR": self._device, "WORLD_SIZE": str(step.ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "PYTHONUNBUFFERED": "1"}
        folders = [ROOT, ROOT / "bench", ROOT / "tests" / "support"]
        environment["PYTHONPATH"] = os.pathsep.join(
            [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, file in enumerate(files):
                request = {"step": step.step, "device": self._device, "arguments": step.arguments,
                           "result": f"{file}.json"}
                with open(f"{file}.log", "w") as log:
                    processes.append(subprocess.Popen(
                        [sys.executable, str(self._program), json.dumps(request)],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.DEVNULL,
                        stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
            late = _wait(processes, limit, patient=step.loses_a_rank)
        finally:
            for process in processes:
                # Also what a rank has started itself.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for process in processes:
                # One that waits for a broken driver can't even be killed.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_DYING)
        return late, [-signal.SIGKILL if process.returncode is None else process.returncode for process in processes]


def _wait(processes: list[subprocess.Popen[bytes]], limit: float, patient: bool) -> list[int]:
    """Wait until all have ended, or for `limit` seconds, and unless `patient` not much longer than for the first that
    fails. The numbers of those that haven't ended."""
    deadline, failed = time.monotonic() + limit, False
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return []
        if any(codes) and not failed and not patient:
            failed, deadline = True, min(deadline, time.monotonic() + AFTER_A_FAILURE)
        time.sleep(0.05)
    late = [number for number, process in enumerate(processes) if process.poll() is None]
    for number in late:
        processes[number].send_signal(signal.SIGUSR1)
    if late:
        time.sleep(LAST_WORDS)
    return late


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _why(logs: list[str], codes: list[int], late: list[int], limit: float) -> str:
    """What the ranks of a failed step say, in one line."""
    told = [f"rank {rank} wasn't done within {limit:.0f} s" for rank in late]
    for rank, (log, code) in enumerate(zip(logs, codes)):
        if rank not in late and code:
            lines = [line for line in log.splitlines() if line.strip()]
            error = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no word")
            told.append(f"rank {rank} (status {code}): {error}")
    return "; ".join(dict.fromkeys(told))


def steps(sizes: Sizes, ranks: int, folder: Path) -> Generator[Step, list[Any], None]:
    """The steps for `ranks` GPUs; each is answered by its results, none where it has failed or wasn't run."""
    yield Step("products", "products", {"sizes": sizes.products, "tokens": sizes.tokens, "rounds": sizes.rounds},
               of_products, "sums are wrong: \"gradient_accumulation_fusion\": false trains without these calls",
               seconds=100)
    yield Step("split", "split", {"hidden": sizes.split, "length": sizes.tokens, "rounds": sizes.rounds}, of_split,
               _OUT_OF_MEMORY, seconds=80)
    on_one: dict[str, list[float]] = {}
    for schedule in ("1f1b", "v-half", "v-zb"):
        results = yield _training(schedule, 1, sizes, None)
        if results:
            on_one[schedule] = results[0]["losses"]
    checkpoint = folder / "checkpoint"
    small = {"schedule": "v-half", "gpt": sizes.small, "batches": 6, "folder": str(checkpoint)}
    first = yield Step("first run", "first_run", small, lambda results: f"losses {results[0]['losses']}", _TRAINING)
    if first:
        yield Step("same again", "same_again", {**small, "first": first[0]}, of_repeat,
                   "runs differ: something depends on timing, or on what was in memory", seconds=80)
    shutil.rmtree(checkpoint, ignore_errors=True)
    if ranks < 2:
        return
    yield Step("links", "links", {"size": sizes.message, "times": 10}, of_links,
               "it hung: NCCL_DEBUG=INFO says where; then NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1", ranks)
    for some in (2, 4, 8):
        for schedule in ("v-half", "v-zb"):
            if some <= ranks:
                yield _training(schedule, some, sizes, on_one.get(schedule))
    some = min(ranks, 4)
    gpt = sizes.small | {"layers": 2 * some, "micro_batches": 2 * some}
    yield Step("killed rank", "killed", {"schedule": "v-half", "gpt": gpt, "timeout_seconds": 40.0}, of_killed,
               "ranks went on waiting: their logs end with where each thread was", some, 150, loses_a_rank=True)


def _training(schedule: str, ranks: int, sizes: Sizes, on_one: list[float] | None) -> Step:
    return Step(f"{schedule} on {ranks}", "train", {"schedule": schedule, "gpt": sizes.gpt, "batches": 8},
                of_training(on_one), _TRAINING, ranks, 100 if ranks == 1 else 150)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _run_all(run: Run, options: argparse.Namespace, out: Path) -> None:
    """Run the steps that `options` ask for on this machine."""
    machine = run.step(Step("machine", "machine", {}, of_machine,
                            "no GPU is found: nvidia-smi, CUDA_VISIBLE_DEVICES; a CPU build of torch finds none",
                            seconds=_FIRST))
    if machine.state != "ok":
        return
    found = len(machine.results[0]["devices"]) or 2
    ranks = min(options.ranks or 8, found if options.device == "cuda" else options.ranks or found, 8)
    run.minutes = options.minutes or (8 if ranks == 1 else 30)
    every, results = steps(Sizes.on(options.device, ranks, options.hidden), ranks, out), None
    with suppress(StopIteration):
        while True:
            step = every.send(results)  # type: ignore[arg-type]  # None starts it
            results = run.step(step).results if options.only is None or step.name in options.only else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="at most that many; all GPUs, and eight at most, if not given")
    parser.add_argument("--hidden", type=int, default=2048, help="of the GPT that is trained")
    parser.add_argument("--minutes", type=float, help="for all steps; 8 on one GPU, 30 on several if not given")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run the steps with these names alone")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    for name, value, legal in (("ranks", options.ranks, "at least 1"), ("minutes", options.minutes, "more than 0")):
        if value is not None and value <= 0:
            parser.error(f"--{name} {value}: must be {legal}")
    if options.hidden < 64 or options.hidden % 64:
        parser.error(f"--hidden {options.hidden}: must be a multiple of 64, the width of a head")
    out = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text("[]")
    except OSError as error:
        parser.error(f"--out {options.out}: must be a folder that can be written to: {error}")
    # A session that ends, and a batch system whose time is over: no rank is left behind on a GPU.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    run = Run(options.device, out)
    try:
        _run_all(run, options, out)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    if not run.outcomes:
        sys.exit("interrupted before the first step was done")
    print(f"\n{table([asdict(outcome) for outcome in run.outcomes])}\nall of it: {out / 'result.json'}")
    if interrupted:
        sys.exit("interrupted: what is in the table was done before")
    missing = set(options.only or ()) - {outcome.name for outcome in run.outcomes}
    if missing:
        sys.exit(f"there were no steps {sorted(missing)}: --only takes names as in the table, of steps for these GPUs")
    sys.exit(any(outcome.state == "failed" for outcome in run.outcomes))


if __name__ == "__main__":
    main()
