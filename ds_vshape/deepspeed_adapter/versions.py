"""The versions of DeepSpeed and torch that this package is tested with, and the check of what is installed.

The engine replaces private parts of DeepSpeed, so with another version it might train incorrectly without an error.
Outside the tested ranges one error names the installed and the required versions.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib import metadata

from packaging.specifiers import SpecifierSet

# setup.cfg requires the same ranges.
TESTED = {"deepspeed": ">=0.19.8,<0.20", "torch": "==2.13.*"}
ALLOW_UNTESTED_VARIABLE = "DS_VSHAPE_ALLOW_UNTESTED_VERSIONS"


class VersionError(ImportError):
    """DeepSpeed or torch is missing, or its version is outside the tested range."""


class UntestedVersionWarning(UserWarning):
    """Replaces VersionError if the user has allowed untested versions."""


def check_versions(version_of: Callable[[str], str] = metadata.version) -> None:
    """Raise VersionError unless all packages of TESTED are installed in tested versions; imports none of them.

    With DS_VSHAPE_ALLOW_UNTESTED_VERSIONS=1 in the environment an untested version gives a warning instead; a missing
    package stays an error. `version_of` maps a package's name to its version, as importlib.metadata.version does.
    """
    installed = {name: _version(name, version_of) for name in TESTED}
    untested = [name for name, version in installed.items() if version is None or not _is_tested(name, version)]
    if not untested:
        return
    have = ", ".join(f"{name} {version or 'not installed'}" for name, version in installed.items())
    need = ", ".join(f"{name}{tested}" for name, tested in TESTED.items())
    message = f"ds_vshape is tested with {need}; installed: {have}; outside: {', '.join(untested)}"
    if None not in installed.values() and os.environ.get(ALLOW_UNTESTED_VARIABLE) == "1":
        warnings.warn(message, UntestedVersionWarning, stacklevel=2)
        return
    raise VersionError(f"{message}. Install the tested versions, or set {ALLOW_UNTESTED_VARIABLE}=1 "
                       "to try with the installed ones.")


def _version(name: str, version_of: Callable[[str], str]) -> str | None:
    try:
        return version_of(name)
    except metadata.PackageNotFoundError:
        return None


def _is_tested(name: str, version: str) -> bool:
    return SpecifierSet(TESTED[name]).contains(version, prereleases=True)
