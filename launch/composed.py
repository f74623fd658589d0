"""Jobs from words like "schedule=v-half parallel.pipe=4", composed by hydra from configs/, all of them checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from job import Job
from job_rules import legal_keys, read_job, unknown_key
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ds_vshape.config import ConfigError, nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Keys below these are somebody else's.
_OPEN = ("hydra", "deepspeed")


@dataclass(frozen=True)
class Composed:
    """A job, and the words that make it."""

    words: tuple[str, ...]
    job: Job


def compose_job(words: Sequence[str]) -> Job:
    """The one job of `words`; ConfigError for words that can't be used."""
    check_keys(words, legal_keys())
    return read_job(compose_config("train", words))


def compose_jobs(words: Sequence[str], multirun: bool) -> list[Composed]:
    """The job of `words`; with `multirun`, or where the chosen bench asks for a sweep, one for each combination of all
    values. ConfigError if any of them can't be run.
    """
    check_keys(words, legal_keys())
    settled = [word.input_line for word in _parsed(words) if not word.is_sweep_override()]
    own = _hydras_own(settled)
    if not multirun and own.mode != RunMode.MULTIRUN:
        return [Composed(tuple(words), compose_job(words))]
    overrides = _parsed([*(f"{key}={value}" for key, value in (own.sweeper.params or {}).items()), *words])
    found = []
    for each in chain.from_iterable(BasicSweeper.split_arguments(overrides, None)):
        try:
            found.append(Composed(tuple(each), compose_job(each)))
        except ConfigError as error:
            raise ConfigError(f"{error} (in the job {' '.join(each)})") from None
    return found


def compose_config(name: str, words: Sequence[str]) -> dict[str, Any]:
    """configs/`name`.yaml with `words`, as plain values; ConfigError for what hydra refuses."""
    with _refusals(), initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(name, list(words)), resolve=True, throw_on_missing=True)
        return dict(config)


def check_keys(words: Sequence[str], legal: Sequence[str]) -> None:
    """Raises ConfigError for a word whose key is neither in `legal` nor hydra's nor DeepSpeed's."""
    for override in _parsed(words):
        key = override.key_or_group
        if key not in (*legal, "bench") and key.partition(".")[0].partition("/")[0] not in _OPEN:
            raise unknown_key(key, override.get_value_element_as_str(), legal)


def _hydras_own(words: Sequence[str]) -> Any:
    """What the words say to hydra itself."""
    with _refusals(), initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(words), return_hydra_config=True).hydra


def _parsed(words: Sequence[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(words))
        return parsed
    except HydraException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}: words must be like schedule=v-half or "
                          "parallel.pipe=4") from None


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what hydra refuses into a ConfigError of one line."""
    try:
        yield
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        legal = f"{group} = {choice!r}: {nearest(choice, error.options)}" if error.options else str(error)
        raise ConfigError(legal) from None
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is missing: the chosen config has no value for it") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from None
