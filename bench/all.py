"""Measures all that README.md shows, one table after another, each into a JSON file of its own.

    python bench/all.py                         # every table: hours, on a machine that does nothing else
    python bench/all.py memory consecutive      # these
    python bench/all.py --quick                 # whether everything works: small sizes, a few minutes
    python bench/all.py --list                  # the tables and their commands

For each table of tables.py the folder --output (runs/bench/DATE) gets NAME.json and NAME.log, what the command printed;
and summary.json is of all. Where a command fails the others follow all the same, and the exit status is 1.
What needs something that isn't here (a GPU, root for two hosts, the file of another scheduler) is skipped. Measured
commands have a process of their own, as on the page; quick ones are forked from a process that has imported torch and
DeepSpeed, which takes longer than most of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import record
from forks import fork
from hosts import missing as missing_for_hosts
from record import ROOT
from rich.console import Console
from rich.table import Table
from tables import RUNS, Run
from tqdm import tqdm

# Runs words, what follows `python`, in this process; the exit status.
Interpreter = Callable[[Sequence[str]], int]
# Seconds after which a command is ended, and that it then has to clean up.
LIMIT, QUICK_LIMIT, LAST_WORDS = 4 * 3600.0, 240.0, 15.0


@dataclass(frozen=True)
class Outcome:
    """What became of a table: ok, failed or skipped; `said` is why, or where its results are."""

    name: str
    state: str
    seconds: float
    said: str


def measure(run: Run, folder: Path) -> Outcome:
    """The command of the page, in a new process."""
    return _run(run, run.words, folder, _new_interpreter, LIMIT)


def measure_quickly(run: Run, folder: Path) -> Outcome:
    """The quick command, in a process forked from this one."""
    return _run(run, run.quick_words, folder, _this_interpreter, QUICK_LIMIT)


def _run(run: Run, words: Sequence[str], folder: Path, interpreter: Interpreter, limit: float) -> Outcome:
    obstacle = missing(words)
    if obstacle is not None:
        return Outcome(run.name, "skipped", 0.0, obstacle)
    file, log = folder / f"{run.name}.json", folder / f"{run.name}.log"
    # Of a run before this one.
    file.unlink(missing_ok=True)
    began = time.monotonic()
    status = _wait(fork(log, partial(_leader, interpreter, [*words, "--json", str(file)])), limit)
    seconds = time.monotonic() - began
    if status != 0:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        why = f"not done after {limit:g} s" if status is None else f"status {status}"
        return Outcome(run.name, "failed", seconds, f"{why}; {log} ends with: {last}")
    if not file.exists():
        return Outcome(run.name, "failed", seconds, f"{shlex.join(words)} wrote no {file}")
    if words[0] == "-m":
        # A command of the package, whose file has its results alone.
        whole = {**record.about(words), "results": json.loads(file.read_text())}
        file.write_text(json.dumps(whole, indent=1) + "\n")
    return Outcome(run.name, "ok", seconds, str(file))


def missing(words: Sequence[str]) -> str | None:
    """What a command needs that this machine hasn't got, if anything."""
    if "bench/cluster.py" in words or "bench/bandwidth.py" in words:
        return missing_for_hosts()
    if "schedules.json" in words and not (ROOT / "schedules.json").exists():
        return f"needs the schedules of another scheduler as {ROOT / 'schedules.json'}"
    if "cuda" in words:
        import torch

        return None if torch.cuda.is_available() else "needs a GPU"
    return None


def _leader(interpreter: Interpreter, words: Sequence[str]) -> int:
    """Run `words` in the checkout, with one thread for each rank, as the leader of a session."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    return interpreter(words)


def _new_interpreter(words: Sequence[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, *words])


def _this_interpreter(words: Sequence[str]) -> int:
    """A module of the package as Python runs it, or a program of bench/ by its main()."""
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            # Not as __main__: where a program starts processes of its own, they find its functions by its name.
            sys.exit(importlib.import_module(Path(words[0]).stem).main())
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code)
        return 1
    return 0


def _wait(pid: int, limit: float) -> int | None:
    """The exit status of a session's leader; None if it had to be ended. Nothing of the session is left."""
    deadline = time.monotonic() + limit
    try:
        while time.monotonic() < deadline:
            if (status := _ended(pid)) is not None:
                return status
            time.sleep(0.02)
        return None
    finally:
        # SIGTERM first: bench/cluster.py takes its hosts away. None of it where the leader has ended.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)
            last = time.monotonic() + LAST_WORDS
            while time.monotonic() < last and _ended(pid) is None:
                time.sleep(0.02)
            os.killpg(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _ended(pid: int) -> int | None:
    """The exit status of a child that has ended; None while it runs."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if ended else None


def import_all() -> None:
    """What programs import, once for all that are forked."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import contenders  # noqa: F401
    import ranks  # noqa: F401


def show(outcomes: Sequence[Outcome]) -> None:
    table = Table(title="tables of bench/README.md")
    for column in ("table", "", "seconds", "results"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.state, f"{outcome.seconds:.1f}", outcome.said)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="NAME", help="as --list shows them; all if none is given")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether everything works")
    parser.add_argument("--list", action="store_true", help="show names and commands, and measure nothing")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/bench/DATE")
    options = parser.parse_args()
    names = [run.name for run in RUNS]
    if unknown := sorted(set(options.tables) - set(names)):
        parser.error(f"there are no tables {', '.join(unknown)}: must be of {', '.join(names)}")
    chosen = [run for run in RUNS if not options.tables or run.name in options.tables]
    if options.list:
        for run in chosen:
            print(f"{run.name}: python {shlex.join(run.quick_words if options.quick else run.words)}")
        return 0
    folder = (options.output or Path("runs") / "bench" / date.today().isoformat()).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {folder}: must be a folder that can be written to: {error}")
    # Whatever ends this ends the command that runs.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if options.quick:
        import_all()
    outcomes: list[Outcome] = []
    try:
        for run in (bar := tqdm(chosen, disable=None)):
            bar.set_description(run.name)
            outcomes.append((measure_quickly if options.quick else measure)(run, folder))
            tqdm.write(f"{run.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.1f} s")
            (folder / "summary.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    finally:
        show(outcomes)
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
