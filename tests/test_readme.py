"""What the README says of the tests: they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text()
SECTION = "## What works, beside DeepSpeed's own engines"


def table() -> list[list[str]]:
    """The cells of each row of the section's table, without its head and its headings."""
    section = README.split(SECTION)[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
            if line.startswith("|")]
    return [row for row in rows[2:] if not row[0].startswith("**")]


def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_each_feature_names_tests_that_exist() -> None:
    rows = table()
    assert len(rows) > 40
    for row in rows:
        feature, first, second, ours = row
        assert feature and first and second, row
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", ours)
        assert named, f"{feature} names no test"
        assert ours.count("`test_") == len(named), f"{feature} names something else"
        for file, test in named:
            assert (TESTS / file).exists() and test in names_in(file), f"{feature}: there is no {file}::{test}"


def test_each_idiom_of_scripts_names_tests_that_exist() -> None:
    page = (TESTS.parent / "ds_vshape/docs/scripts.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    rows = [row for row in rows[2:] if not row[0].startswith("**")]
    assert len(rows) > 20
    for idiom, outcome, tests in rows:
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", tests)
        assert idiom and outcome and named and tests.count("`test_") == len(named), idiom
        for file, test in named:
            assert test in names_in(file), f"{idiom}: there is no {file}::{test}"


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:launch|bench|configs|tests)/[\w./]+)`", README):
        assert (TESTS.parent / name).exists(), name
