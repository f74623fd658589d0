"""bench/all.py: every table of bench/README.md is measured by its command, whatever becomes of the others."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import all as program
import figures
import pytest
import record
from tables import RUNS, Run

ROOT = Path(__file__).parents[2]
WORKS = "-c 'import json, sys; json.dump(3, open(sys.argv[2], \"w\")); print(\"done\")'"
FAILS = "-c 'raise ValueError(\"no such kernel\")'"


def test_the_page_and_the_list_have_the_same_commands_in_the_same_order() -> None:
    page = (ROOT / "bench" / "README.md").read_text().replace("\\\n", " ")
    found = [shlex.split(command, comments=True) for command in re.findall(r"^ *python (.*)$", page, re.MULTILINE)]
    assert [words for words in found if words[0] not in ("bench/all.py", "bench/figures.py")] == [
        run.words for run in RUNS]


def test_names_are_of_files_and_of_one_table() -> None:
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["all.py", *arguments])
    return program.main()


def test_the_others_follow_where_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    runs = [Run("works", WORKS, ""), Run("fails", FAILS, ""), Run("silent", "-c pass", ""), Run("last", WORKS, ""),
            Run("needs", "bench/compare_reference.py schedules.json", "")]
    monkeypatch.setattr(program, "RUNS", runs)
    monkeypatch.setattr(program, "ROOT", tmp_path)
    assert called(monkeypatch, "--output", str(tmp_path)) == 1
    summary = {each["name"]: each for each in json.loads((tmp_path / "summary.json").read_text())}
    assert {name: each["state"] for name, each in summary.items()} == {
        "works": "ok", "fails": "failed", "silent": "failed", "last": "ok", "needs": "skipped"}
    assert summary["fails"]["said"] == f"status 1; {tmp_path}/fails.log ends with: ValueError: no such kernel"
    assert "silent.json" in summary["silent"]["said"] and "schedules.json" in summary["needs"]["said"]
    assert (tmp_path / "works.log").read_text() == "done\n" and (tmp_path / "last.json").read_text() == "3"
    shown = capsys.readouterr().out
    assert all(f"│ {run.name} " in shown for run in runs)
    assert called(monkeypatch, "--output", str(tmp_path), "works", "last", "needs") == 0


def test_a_program_is_forked_as_it_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forked_program.py").write_text("""
import os, sys
def main():
    print(os.getcwd(), os.environ["OMP_NUM_THREADS"])
    if "--fail" in sys.argv:
        sys.exit("no times: losses differ")
    open(sys.argv[-1], "w").write("{}")
    return int("--one" in sys.argv)
""")
    monkeypatch.syspath_prepend(tmp_path)
    outcomes = [program.measure_quickly(Run("forked", "bench/forked_program.py", quick), tmp_path)
                for quick in ("", "--fail", "--one")]
    assert [outcome.state for outcome in outcomes] == ["ok", "failed", "failed"]
    assert outcomes[1].said.startswith("status 1") and outcomes[1].said.endswith("no times: losses differ")
    assert (tmp_path / "forked.log").read_text() == f"{ROOT} 1\n" and "forked_program" not in sys.modules


@pytest.mark.slow
def test_a_program_of_the_package_says_where_its_results_come_from(tmp_path: Path) -> None:
    run = next(run for run in RUNS if run.name == "hops")
    assert program.measure_quickly(run, tmp_path).state == "ok"
    written = json.loads((tmp_path / "hops.json").read_text())
    assert written["command"] == shlex.join(["python", *run.quick_words])
    assert [each["schedule"] for each in written["results"]] == ["v-half", "1f1b", "zb-h1"]


def test_what_takes_too_long_ends_with_all_that_it_has_started(tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "lasting.py"
    script.write_text("import os, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
                      "print(os.getpid(), child.pid, flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(program, "LIMIT", 2.0)
    outcome = program.measure(Run("lasting", str(script), ""), tmp_path)
    assert outcome.state == "failed" and outcome.said.startswith("not done after 2 s")
    deadline = time.monotonic() + 10
    processes = list(map(int, (tmp_path / "lasting.log").read_text().split()))
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(processes) == 2 and not any(map(_runs, processes))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_unknown_tables_and_folders_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in ((["sleping"], "there are no tables sleping: must be of sleeping, "),
                            (["--output", "/dev/null/all"], "--output /dev/null/all: must be a folder")):
        with pytest.raises(SystemExit) as raised:
            called(monkeypatch, *arguments)
        assert raised.value.code == 2 and told in capsys.readouterr().err


def test_the_list_shows_what_would_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "--list", "--quick", "split-gpu", "reference") == 0
    reference, split = capsys.readouterr().out.splitlines()
    assert reference == "reference: python bench/compare_reference.py tests/data/reference.json"
    assert split.startswith("split-gpu: python bench/split_cost.py --device cpu") and "cuda" not in split


def test_what_a_file_says_besides_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    record.add_json_option(parser)
    file = parser.parse_args(["--json", str(tmp_path / "run.json")]).json
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench" / "run.py"), "--json", str(file), "--rounds", "3"])
    record.write(file, [1, 2])
    written = json.loads(file.read_text())
    assert written["command"] == "python bench/run.py --rounds 3" and written["results"] == [1, 2]
    assert written["machine"]["cores"] == len(os.sched_getaffinity(0)) and written["machine"]["cpu"]
    assert written["versions"].keys() == {"python", "torch", "deepspeed", "ds-vshape"}
    assert all(written["versions"].values()) and written["date"].endswith("+00:00")
    record.write(None, [1, 2])


@pytest.mark.parametrize("file", ["/nowhere/run.json", "/tmp"])
def test_a_file_that_could_not_be_written_is_told_before_measuring(file: str,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    record.add_json_option(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", file])
    assert f"{file}: must be a file in a folder that exists" in capsys.readouterr().err


# -- every table, quickly


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program.import_all()
    return tmp_path_factory.mktemp("tables")


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_table_is_measured(run: Run, folder: Path) -> None:
    if run.command.startswith("bench/cluster.py") and "DS_VSHAPE_REQUIRE_CLUSTER" not in os.environ:
        if obstacle := program.missing(run.quick_words):
            pytest.skip(obstacle)
    if "--plans" in run.words:  # the page's folder is one of the checkout
        run = replace(run, quick=f"{run.quick} --plans {folder / 'plans'}")
    outcome = program.measure_quickly(run, folder)
    log = folder / f"{run.name}.log"
    assert outcome.state == "ok", f"{outcome.said}\n{log.read_text() if log.exists() else ''}"
    written: dict[str, Any] = json.loads((folder / f"{run.name}.json").read_text())
    assert written["command"] == shlex.join(["python", *run.quick_words]) and written["results"]


@pytest.mark.slow
def test_figures_are_drawn_from_what_was_measured(folder: Path) -> None:
    if not (folder / "sleeping.json").exists():
        pytest.skip("the tables were not measured before")
    assert [file.name for file in figures.draw_all(folder, folder)] == list(figures.FIGURES)
