"""The package as installed: versions, settings, and what may import what."""

from __future__ import annotations

import ast
import configparser
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ds_vshape
from ds_vshape.deepspeed_adapter.versions import (ALLOW_UNTESTED_VARIABLE, TESTED, UntestedVersionWarning, VersionError,
                                       check_versions)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def versions(**installed: str):
    """Replaces importlib.metadata.version as on a machine with these packages."""

    def version_of(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    return version_of


@pytest.fixture(autouse=True)
def strict_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_UNTESTED_VARIABLE, raising=False)


def test_installed_versions_are_the_tested_ones():
    check_versions()


@pytest.mark.parametrize("torch", ["2.13.0", "2.13.0+cpu", "2.13.1+cu130", "2.13.0a0+git1234"])
def test_builds_of_a_tested_version_pass(torch: str):
    check_versions(versions(deepspeed="0.19.8", torch=torch))


@pytest.mark.parametrize("deepspeed, torch, outside", [
    ("0.18.9", "2.13.0+cpu", "deepspeed"),
    ("0.19.7", "2.13.0+cpu", "deepspeed"),
    ("0.20.0", "2.13.0+cpu", "deepspeed"),
    ("0.19.8", "2.12.1", "torch"),
    ("0.19.8", "2.14.1", "torch"),
    ("1.0", "3.0", "deepspeed, torch"),
])
def test_the_error_names_both_versions_and_both_ranges(deepspeed: str, torch: str, outside: str):
    with pytest.raises(VersionError) as caught:
        check_versions(versions(deepspeed=deepspeed, torch=torch))
    message = str(caught.value)
    assert f"deepspeed {deepspeed}, torch {torch}; outside: {outside}." in message
    for name, tested in TESTED.items():
        assert f"{name}{tested}" in message


def test_allowed_untested_versions_warn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ALLOW_UNTESTED_VARIABLE, "1")
    with pytest.warns(UntestedVersionWarning, match="torch 2.14.1"):
        check_versions(versions(deepspeed="0.19.8", torch="2.14.1"))


def test_a_missing_package_is_an_error_even_if_untested_versions_are_allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ALLOW_UNTESTED_VARIABLE, "1")
    with pytest.raises(VersionError, match="deepspeed not installed"):
        check_versions(versions(torch="2.13.0"))


def test_setup_requires_the_tested_ranges(settings: configparser.ConfigParser):
    lines = settings["options"]["install_requires"].split("\n")
    required = {requirement.name: requirement.specifier for requirement in map(Requirement, filter(None, lines))}
    for name, tested in TESTED.items():
        assert required[name] == SpecifierSet(tested)


def test_the_installed_metadata():
    installed = metadata.distribution("ds-vshape")
    assert installed.version == ds_vshape.__version__
    assert {"test", "lint", "kernels", "launch"} <= set(installed.metadata.get_all("Provides-Extra"))
    command, = (entry for entry in installed.entry_points if entry.name == "ds-vshape")
    assert callable(command.load())


def test_the_schedule_layer_is_pure():
    """ds_vshape/schedule imports the standard library, itself and NumPy; pydantic where it reads what others may have
    written, matplotlib where it draws; no torch, no deepspeed."""
    files = sorted((ROOT / "ds_vshape" / "schedule").rglob("*.py"))
    assert files
    foreign = {(file.name, name.split(".")[0]) for file in files for name in imported_names(file)
               if name.split(".")[0] not in sys.stdlib_module_names and not name.startswith("ds_vshape.schedule")}
    reads = {"serial.py", "request.py", "cache.py"}
    assert {name for file, name in foreign if file == "pictures.py"} == {"matplotlib"}
    assert {name for file, name in foreign if file not in {*reads, "pictures.py"}} <= {"numpy"}
    assert {name for file, name in foreign if file in reads} <= {"numpy", "pydantic", "typing_extensions"}


def test_launch_holds_short_programs_and_no_library():
    """Programs are for copying: each fits on a few screens, and neither the package nor bench/ needs any of them."""
    programs = sorted((ROOT / "launch").glob("*.py"))
    assert {file.name: length for file in programs if (length := len(file.read_text().splitlines())) >= 150} == {}
    stems = {file.stem for file in programs}
    users = [file for folder in ("ds_vshape", "bench") for file in (ROOT / folder).rglob("*.py")]
    assert [(file.name, name) for file in users for name in imported_names(file) if name in stems] == []


def test_every_folder_is_installed():
    """setup.cfg finds packages, which are folders with an __init__.py."""
    folders = {file.parent for file in (ROOT / "ds_vshape").rglob("*.py")}
    assert ROOT / "ds_vshape" / "models" in folders
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def imported_names(file: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            names.append(node.module or "")
    return names
