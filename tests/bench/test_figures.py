"""The figures of bench/README.md are what bench/figures.py draws from bench/measured, which has the page's numbers."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import figures
import pytest
from unequal import TORCHS

BENCH = Path(__file__).parents[2] / "bench"
MEASURED = BENCH / "measured"
# The page's names of contenders of the bench programs.
NAMES = {"deepspeed 1f1b": "DeepSpeed 1F1B", "deepspeed dualpipev": "DeepSpeed DualPipeV",
         "torch zbvzerobubble": "torch ZBVZeroBubble", "deepspeed zero-1": "DeepSpeed ZeRO-1",
         "deepspeed zero-3": "DeepSpeed ZeRO-3", "deepspeed zero-3:2": "DeepSpeed ZeRO-3, two micro-batches at a time"}

# Those of torch's schedules beside each other.
TORCHS_NAMES = dict(zip(TORCHS, ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"),
                        strict=True))


def results(table: str) -> Any:
    return json.loads((MEASURED / f"{table}.json").read_text())["results"]


def page_has(row: list[str]) -> bool:
    return f"\n| {' | '.join(row)} |\n" in (BENCH / "README.md").read_text()


def name_of(contender: str) -> str:
    return NAMES.get(contender, f"`{contender}`")


@pytest.mark.parametrize("figure", figures.FIGURES)
def test_a_figure_is_what_is_drawn_from_the_tables(figure: str, tmp_path: Path) -> None:
    """If this fails after a change of the drawing, run `python bench/figures.py bench/measured`, and look at it."""
    figures.draw_all(MEASURED, tmp_path)
    assert (tmp_path / figure).read_text() == (MEASURED / figure).read_text()
    assert f"](measured/{figure})" in (BENCH / "README.md").read_text()


@pytest.mark.parametrize("table", ["sleeping", "sleeping-20ms"])
def test_the_page_has_the_speeds_of_the_files(table: str) -> None:
    runs = results(table)
    assert [run["micro_batches"] for run in runs] == [8, 16, 32]
    for contender in runs[0]["summary"]:
        row = [name_of(contender)]
        for found in (run["summary"][contender] for run in runs):
            over = found["over_simulated"]
            row += [f"{found['seconds']:.3f}", f"{found['speed']:.2f}", "-" if over is None else f"{over:.3f}"]
        peak = runs[0]["summary"][contender].get("peak")
        assert page_has(row + (["-" if peak is None else f"{peak:g}"] if table == "sleeping" else [])), row


def test_the_page_has_the_memory_of_the_file() -> None:
    cells: dict[str, list[str]] = {}
    for found in results("memory"):
        ranks = found["ranks"]
        row = cells.setdefault(found["contender"], [])
        row.append(", ".join(f"{rank['peak'] / figures.MIB:.0f}" for rank in ranks))
        row.append(", ".join(f"{rank['predicted'] / figures.MIB:.0f}" for rank in ranks if "predicted" in rank) or "-")
    rows = [line.strip("| ").split(" | ") for line in (BENCH / "README.md").read_text().splitlines()]
    for contender, row in cells.items():
        # Ratios are of bytes, which the page hasn't.
        without_ratios = [[line[place] for place in (1, 2, 4, 5) if line[place] != "-" or place == 2]
                          for line in rows if line[0] == name_of(contender) and len(line) == 7]
        assert row in without_ratios, contender


def test_the_page_has_the_bandwidths_of_the_file() -> None:
    found = results("bandwidth")
    jobs = found["jobs"]
    for contender, first in jobs[0]["results"].items():
        row = [name_of(contender), f"{found['memory'][contender] / figures.MIB:.0f}",
               f"{first['sent'] / figures.MIB:.1f}", *(f"{job['results'][contender]['median']:.3f}" for job in jobs)]
        assert page_has(row), row
    for contender in jobs[0]["hidden"]:
        row = [f"{name_of(contender)}, all messages hidden", "-", "-",
               *(f"{job['hidden'][contender]:.3f}" for job in jobs)]
        assert page_has(row), row


def of_run(run: dict[str, float] | None) -> str:
    return "-" if run is None else f"{run['makespan']:.0f}, {run['peak']:g}"


def test_the_page_has_the_cells_of_the_file() -> None:
    for cell in results("unequal"):
        runs = cell["simulated"]
        best, least = runs[cell["best"]], runs["adaptive, least memory"]
        row = [cell["case"], str(cell["ranks"]), str(cell["micro_batches"]),
               *(of_run(runs.get(name)) for name in TORCHS)]
        for run in (runs["adaptive, same memory"], least):
            row += [of_run(run), f"{run['makespan'] / best['makespan']:.3f}"]
        row.append(f"{least['peak'] / best['peak']:.2f}")
        assert page_has(row), row


def test_the_page_has_the_cells_that_were_run() -> None:
    for cell in results("unequal-sleeping"):
        found = cell["measured"]
        medians = {name: statistics.median(each["seconds"]) for name, each in found.items()}
        best = min((name for name in found if name in TORCHS), key=medians.__getitem__)
        row = [cell["case"], str(cell["ranks"]), str(cell["micro_batches"]), TORCHS_NAMES[best],
               f"{medians[best]:.3f}", f"{found[best]['rise'] / figures.MIB:.0f}"]
        for name in ("adaptive, same memory", "adaptive, least memory"):
            row += [f"{medians[name]:.3f}", f"{medians[name] / medians[best]:.3f}",
                    f"{found[name]['rise'] / figures.MIB:.0f}"]
        assert page_has(row), row


def test_a_figure_says_what_was_measured(tmp_path: Path) -> None:
    """A dot for each contender but the first, table and number of micro-batches, where its speed is."""
    text = (MEASURED / "speed.svg").read_text()
    for words in ("8 micro-batches", "speed over deepspeed 1f1b", "adaptive@0.75", "16 layers of 20/20/20 ms"):
        assert words in text
    changed = results("sleeping")
    changed[0]["summary"]["v-zb"]["speed"] += 0.05
    figures.save(figures.FIGURES["speed.svg"], {"sleeping": changed, "sleeping-20ms": results("sleeping-20ms")},
                 tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").read_text() != text


def test_a_folder_without_tables_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (([str(tmp_path)], "has the tables of no figure: speed.svg takes sleeping.json"),
                            ([str(MEASURED), "--output", str(tmp_path / "none")], "must be a folder that exists")):
        monkeypatch.setattr(sys, "argv", ["figures.py", *arguments])
        with pytest.raises(SystemExit):
            figures.main()
        assert told in capsys.readouterr().err


def test_without_matplotlib() -> None:
    script = f"import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, {str(BENCH)!r}); import figures"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and 'pip install "ds-vshape[plots]"' in done.stderr
