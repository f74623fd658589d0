"""What the README and the pages say: the tests and files they name exist, the code they show is valid, and the figure
is what its command draws."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from readme_commands import FILES, ROOT, blocks, commands

import ds_vshape
from ds_vshape.cli import main
from ds_vshape.config.section import read_section
from ds_vshape.schedule.lowering import lower
from ds_vshape.schedule.proofs import deadlock
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.schedule import check as check_schedule
from ds_vshape.schedule.timeline import Times, simulate

TESTS = ROOT / "tests"
DOCS = ROOT / "ds_vshape" / "docs"
MOST_LINES = 150


def table(page: str) -> list[list[str]]:
    """The cells of each row of the table in a page of ds_vshape/docs, without its head and its headings."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (DOCS / page).read_text().splitlines()
            if line.startswith("|")]
    return [row for row in rows[2:] if not row[0].startswith("**")]


def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_each_feature_names_tests_that_exist() -> None:
    rows = table("features.md")
    assert len(rows) > 40
    for row in rows:
        feature, first, second, ours = row
        assert feature and first and second, row
        named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(\w+)`", ours)
        assert named, f"{feature} names no test"
        assert ours.count(".py") == len(named), f"{feature} names something else"
        for file, test in named:
            assert (TESTS / file).exists() and test in names_in(file), f"{feature}: there is no {file}::{test}"


def test_each_idiom_of_scripts_names_tests_that_exist() -> None:
    rows = table("scripts.md")
    assert len(rows) > 20
    for idiom, outcome, tests in rows:
        named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(\w+)`", tests)
        assert idiom and outcome and named and tests.count(".py") == len(named), idiom
        for file, test in named:
            assert test in names_in(file), f"{idiom}: there is no {file}::{test}"


@pytest.mark.parametrize("file", FILES)
def test_files_that_a_page_names_exist(file: str) -> None:
    text = (ROOT / file).read_text()
    for name in re.findall(r"`((?:launch|bench|configs|tests|ds_vshape)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / file).parent.joinpath(link).exists(), link


def headings(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.M)}


@pytest.mark.parametrize("file", FILES)
def test_headings_that_a_page_links_to_exist(file: str) -> None:
    page = ROOT / file
    for path, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        assert heading in headings(page.parent / path if path else page), f"{path}#{heading}"


@pytest.mark.parametrize("file", FILES)
def test_code_on_a_page_is_valid(file: str) -> None:
    """JSON can be read, and its section is accepted; Python compiles."""
    for language, block in blocks((ROOT / file).read_text()):
        if language == "json":
            read_section(json.loads("\n".join(block)))
        elif language == "python":
            compile("\n".join(block), file, "exec")


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= MOST_LINES
    for page in DOCS.glob("*.md"):
        assert f"](ds_vshape/docs/{page.name})" in readme, page.name


def test_the_way_of_a_batch_is_short() -> None:
    """One file in each step, so that there are no more files than steps."""
    steps = re.findall(r"^(\d+)\. (.*(?:\n    .*)*)", (DOCS / "architecture.md").read_text(), re.M)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1)) and 20 < len(steps) <= 25
    assert all(len(re.findall(r"\w+\.py", text)) == 1 and text.startswith("`ds_vshape/") for _, text in steps)
    assert len((ROOT / "ds_vshape" / "engine" / "engine.py").read_text().splitlines()) < 400


def test_the_example_of_a_new_schedule_runs() -> None:
    """CONTRIBUTING.md's builder gives what its docstring says, and programs that can't hang."""
    text, = ("\n".join(block) for language, block in blocks((ROOT / "CONTRIBUTING.md").read_text())
             if language == "python")
    found: dict[str, Any] = {}
    exec(compile(text, "CONTRIBUTING.md", "exec"), found)
    for ranks, micro_batches in ((1, 1), (3, 5)):
        schedule: Schedule = found["gpipe_split"](ranks, micro_batches)
        check_schedule(schedule)
        times = Times.uniform(ranks)
        assert simulate(schedule, times).makespan == 3 * micro_batches + 2 * (ranks - 1)
        deadlock.check(lower(schedule, times), schedule.placement)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == ds_vshape.__version__
    titles = [reference["title"] for reference in citation["references"]]
    assert titles == ["Pipeline Parallelism with Controllable Memory", "Zero Bubble Pipeline Parallelism"]


def test_the_figure_is_what_its_command_draws(tmp_path: Path) -> None:
    """If this fails after a change of schedules or pictures, run the command, and look at the figure."""
    command, = (each for file in FILES for each in commands(file) if "ds_vshape/docs/schedules.svg" in each)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "ds_vshape"]
    figure = tmp_path / "schedules.svg"
    assert main([str(figure) if word.endswith(".svg") else word for word in words[3:]]) == 0
    assert figure.read_text() == (DOCS / "schedules.svg").read_text(), command
