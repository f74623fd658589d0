"""Every command in the code blocks of the READMEs and the pages, and what of it a test changes, with the reason.

Code blocks are fenced and name their language; the lines of those in bash are commands.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tables import RUNS

ROOT = Path(__file__).parents[2]
_FOLDERS = ("launch", "configs", "bench", "ds_vshape", "tests")
FILES = ["README.md", "CONTRIBUTING.md",
         *sorted(str(path.relative_to(ROOT)) for folder in _FOLDERS for path in (ROOT / folder).rglob("*.md"))]
_PROGRAMS = {"python", "bash", "deepspeed", "pip", "sbatch", "export", "cp", "mkdir", "echo", "env", "tar"}
_LANGUAGES = {"bash", "json", "python", "text"}

TINY = "model=tiny batches=2"
# Of the tables of bench/README.md; tests/bench/test_all.py runs them, as bench/tables.py shortens them.
OF_TABLES = {shlex.join(["python", *run.words]) for run in RUNS}


@dataclass(frozen=True)
class Change:
    """Of commands that match `pattern`: what is replaced, and added at the end; "" adds nothing."""

    pattern: str
    reason: str
    add: str = ""
    replace: tuple[tuple[str, str], ...] = ()


# The first that matches counts; a command that none matches runs as it stands.
CHANGES = [
    Change("^pip install", "what is to be installed is there: pip looks whether it could",
           "--dry-run --quiet --no-deps --no-build-isolation --disable-pip-version-check"),
    Change("^bash launch/quickstart.sh", "40 batches of 4 runs take minutes", replace=(("bash", "BATCHES=1 bash"),)),
    Change("^bash tests/run.sh -m slow", "all slow tests would contain this one", "tests/schedule/test_passes.py",
           (("-m slow", "-m 'not slow'"),)),
    Change("^bash tests/run.sh -m drill", "these tests take long", "--co -q tests/schedule/test_steady_state.py"),
    Change("^bash tests/run.sh -m hypothesis", "all such tests take minutes", "tests/schedule/test_passes.py"),
    Change("^bash tests/run.sh$", "all tests would contain this one", "tests/schedule/test_passes.py"),
    Change("^bash tests/run.sh -n 0 -k lowering", "collecting all tests takes long",
           "--co -q tests/schedule/test_lowering.py"),
    Change("^bash tests/run.sh.* tests/schedule/test_(schedules|drawing).py", "these tests run by themselves too",
           "--co -q"),
    Change("^bash tests/run.sh.* tests/engine/test_engine_equivalence.py", "these tests run by themselves too",
           "--co -q"),
    Change("^bash tests/run.sh.* tests/runtime/test_instructions.py", "these tests run by themselves too", "--co -q"),
    Change("^bash .ci/run", "all tests would contain this one", replace=(("bash", "bash -n"),)),
    Change("^python -m mypy", "all types take a minute", "ds_vshape/schedule/passes.py"),
    Change("--svg ds_vshape/docs/", "the figure stays as it is; test_readme.py makes it again",
           replace=(("ds_vshape/docs/", ""),)),
    Change("^python tests/docs/api_page.py", "the page stays as it is; test_api_page.py makes it again", "> api.md",
           (("--write", ""),)),
    Change("^deepspeed .*--module ds_vshape.run", "the script of tests/scripts/test_run.py wants two pipeline ranks",
           "--out out", (("--num_gpus 4", "--num_gpus 2 --master_port PORT"),)),
    Change(r"launch/cluster/deepspeed.sh --module", "the script of tests/scripts/test_run.py", "--out out"),
    Change("dpo.py", "the reference of all pairs, and an epoch, take minutes", "--epochs 0.1",
           (("deepspeed", "head -n 40 runs/pairs.jsonl > runs/few.jsonl && deepspeed --master_port PORT"),
            ("--data runs/pairs.jsonl", "--data runs/few.jsonl"))),
    Change("deepspeed.sh launch/finetune.py", "an epoch takes minutes", "epochs=0.001 length=64"),
    Change("finetune.py --config", "an epoch takes minutes", "epochs=0.001 length=64",
           (("deepspeed", "deepspeed --master_port PORT"),)),
    Change("finetune.py .*--data", "an epoch takes minutes", "--epochs 0.001",
           (("deepspeed", "deepspeed --master_port PORT"),)),
    Change("finetune.py", "30 batches take half a minute", "--batches 1 --length 16",
           (("deepspeed", "deepspeed --master_port PORT"),)),
    Change("launch/trainer.py", "20 batches take a minute, and GPUs aren't there",
           "--use_cpu --max_steps 2 --per_device_train_batch_size 1 --report_to none",
           (("deepspeed --num", "deepspeed --master_port PORT --num"),)),
    Change("--multirun|bench=schedules", "test_launch.py trains a sweep, whose jobs take as long as a command here",
           "--dry-run"),
    Change("schedule=v-zb data.micro_batches=16", "the same program trains in launch/README.md", "--dry-run"),
    Change("three_d$", "eight ranks are slow on a small machine", f"parallel.data=1 {TINY} port=PORT"),
    Change("csv_monitor", "four ranks are slower than two", f"parallel.pipe=2 {TINY} port=PORT"),
    Change("launch/train.py hostfile", "two hosts of a test have two slots each, and no GPUs", TINY,
           (("parallel.pipe=8", "parallel.pipe=4"), ("machine=a100", "machine=cpu"))),
    Change("openmpi.sh", "two hosts of a test have two slots each, and the model is small", TINY,
           (("parallel.pipe=8", "parallel.pipe=4"),)),
    Change("slurm.sh", "the stand-in for Slurm starts four tasks", TINY,
           (("parallel.pipe=8", "parallel.pipe=4"),)),
    Change("plan .*--(recompute|offload)", "a plan of eight ranks takes ten seconds", "--time-limit 0.2"),
    Change("ds_vshape layouts --model", "other sizes take as long", "search.micro_batch=[1]"),
    Change("ds_vshape layouts", "all layouts take a quarter of a minute", "search.micro_batch=[4] search.tensor=[2]"),
    Change("launch/train.py (?!.*(--dry-run|--cfg))", "30 batches of the larger model take half a minute",
           f"{TINY} port=PORT"),
    Change("bench/all.py --quick$", "test_all.py measures every table quickly", "split"),
    Change("bench/all.py", "tables take minutes to hours", "--list"),
    Change("bench/figures.py", "the figures stay as they are; test_figures.py draws them again", "--output ."),
    Change("bench/gpu.py --only", "GPUs aren't there", "--device cpu --ranks 2", (("on 8", "on 2"),)),
    Change("bench/gpu.py --device cpu", "test_gpu_steps.py runs all steps, which take minutes", "--only links"),
    Change("bench/gpu.py", "measurements take minutes, and GPUs aren't there",
           "--device cpu --ranks 1 --only products"),
    Change("split_programs", "20,000 programs take minutes", "--programs 20"),
]


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """The language of each fenced code block of a Markdown text, and its lines, blank ones left out; the language of a
    block that is only indented, or names none, is "".
    """
    language: str | None = None
    block: list[str] = []
    indent = before = ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            if language is None:
                indent, language = line.split("```")
            else:
                yield language, block
                language, block = None, []
        elif language is not None:
            block += [line.removeprefix(indent)] if line.strip() else []
        elif line.startswith("    ") and not before:
            yield "", [line.strip()]
        before = line.strip()


def commands(file: str) -> list[str]:
    """The commands of a README in their order, each in one line.

    Raises:
        ValueError: for a block that names no known language, and for a command of an unknown program.
    """
    found: list[str] = []
    for language, block in blocks((ROOT / file).read_text()):
        if language not in _LANGUAGES:
            raise ValueError(f"{file}: the code block {block[:1]} must be fenced, with one of {sorted(_LANGUAGES)}")
        if language != "bash":
            continue
        whole = "\n".join(block).replace("\\\n", " ").splitlines()
        for line in whole:
            words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
            if not words or words[0] not in _PROGRAMS:
                raise ValueError(f"{file}: {line!r} starts with no program that is known here: {sorted(_PROGRAMS)}")
        found += [re.sub(r"\s+#.*", "", re.sub(r"\s+", " ", line)) for line in whole]
    return found


def runs_here(command: str) -> bool:
    """Whether test_readme_commands.py runs it, and not test_all.py."""
    return shlex.join(shlex.split(command)) not in OF_TABLES


def change_for(command: str) -> Change | None:
    """The first change that matches."""
    return next((change for change in CHANGES if re.search(change.pattern, command)), None)


def changed(command: str, port: int) -> str:
    """What runs instead of `command`, with a free port of this machine."""
    change = change_for(command)
    if change is not None:
        for old, new in change.replace:
            if old not in command:
                raise ValueError(f"{command!r} has no {old!r} that {change.pattern!r} could replace")
            command = command.replace(old, new, 1)
        command = f"{command} {change.add}".strip()
    return command.replace("PORT", str(port))
