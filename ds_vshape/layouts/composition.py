"""Jobs from overrides like "schedule=v-half parallel.pipe=4": hydra composes them from a folder of configs.

The folder has train.yaml for a job, layouts.yaml for a search, finetune.yaml for a fine-tuning, and a folder for each
group that they choose from. hydra comes with the extra `launch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ds_vshape.config.section import ConfigError, nearest
from ds_vshape.layouts.job import Job
from ds_vshape.layouts.rules import legal_keys, read_job, section_of, unknown_key
from ds_vshape.layouts.search import SearchSpace

# A link to the checkout's folder; an installed package has a copy of it.
CONFIGS = (Path(__file__).parent / "configs").resolve()
# Keys below these belong to hydra and to DeepSpeed, which check them.
_OPEN = ("hydra", "deepspeed")
# Groups that aren't a section.
_GROUPS = ("bench", "monitor")


@dataclass(frozen=True)
class Composed:
    """A job, and the overrides that choose it."""

    overrides: tuple[str, ...]
    job: Job


def compose_job(overrides: Sequence[str], configs: Path = CONFIGS) -> Job:
    """The one job of `overrides`; ConfigError for illegal overrides."""
    check_keys(overrides, legal_keys())
    return read_job(compose_config("train", overrides, configs))


def compose_jobs(overrides: Sequence[str], multirun: bool, configs: Path = CONFIGS) -> list[Composed]:
    """The job of `overrides`; with `multirun`, or where the chosen bench asks for a sweep, one for each combination of
    all values. ConfigError if any of them can't run.
    """
    check_keys(overrides, legal_keys())
    single = [each.input_line or "" for each in parse_overrides(overrides) if not each.is_sweep_override()]
    hydras = _hydra_section(single, configs)
    if not multirun and hydras.mode != RunMode.MULTIRUN:
        return [Composed(tuple(overrides), compose_job(overrides, configs))]
    parsed = parse_overrides([*(f"{key}={value}" for key, value in (hydras.sweeper.params or {}).items()), *overrides])
    found = []
    for each in chain.from_iterable(BasicSweeper.split_arguments(parsed, None)):
        try:
            found.append(Composed(tuple(each), compose_job(each, configs)))
        except ConfigError as error:
            raise ConfigError(f"{error} (in the job {' '.join(each)})") from None
    return found


def compose_search(overrides: Sequence[str],
                   configs: Path = CONFIGS) -> tuple[SearchSpace, dict[str, Any], list[dict[str, Any]]]:
    """What to search, the job's config, and the section of each schedule to try; ConfigError for illegal overrides."""
    check_keys(overrides, [*legal_keys(), "search", *(f"search.{key}" for key in SearchSpace.model_fields)])
    config = compose_config("layouts", overrides, configs)
    search = section_of(SearchSpace, config.pop("search"), "search")
    return search, config, [_schedule(name, config["schedule"], configs) for name in search.schedules]


def compose_config(name: str, overrides: Sequence[str], configs: Path = CONFIGS,
                   values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`name`.yaml in `configs` with `overrides`, then with `values` by key, as plain values; ConfigError for what hydra
    refuses.
    """
    with _refusals(), _folder(configs, name):
        composed = compose(name, list(overrides))
        for key, value in (values or {}).items():
            OmegaConf.update(composed, key, value)
        config: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        return dict(config)


def check_keys(overrides: Sequence[str], legal: Sequence[str]) -> None:
    """Raises ConfigError for an override whose key is neither in `legal` nor hydra's nor DeepSpeed's."""
    for override in parse_overrides(overrides):
        key = override.key_or_group
        if key not in (*legal, *_GROUPS) and key.partition(".")[0].partition("/")[0] not in _OPEN:
            raise unknown_key(key, override.get_value_element_as_str(), legal)


def _schedule(name: str, given: dict[str, Any], configs: Path) -> dict[str, Any]:
    """The schedule's file, with the keys that the command line sets for all schedules."""
    file = configs / "schedule" / f"{name}.yaml"
    if not file.exists():
        legal = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise ConfigError(f"search.schedules = {name!r}: {nearest(name, legal)}")
    chosen: Any = OmegaConf.to_container(OmegaConf.load(file))
    return {**chosen, **{key: value for key, value in given.items() if value is not None and key != "name"}}


def _hydra_section(overrides: Sequence[str], configs: Path) -> Any:
    """hydra's own settings, with those of the overrides."""
    with _refusals(), _folder(configs, "train"):
        return compose("train", list(overrides), return_hydra_config=True).hydra


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Raises ConfigError for overrides that hydra can't read."""
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
        return parsed
    except HydraException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}: overrides must be like schedule=v-half or "
                          "parallel.pipe=4") from None


@contextmanager
def _folder(configs: Path, name: str) -> Iterator[None]:
    """Let hydra compose from `configs`; ConfigError if `name`.yaml isn't there."""
    if not (configs / f"{name}.yaml").is_file():
        raise ConfigError(f"--configs {configs}: has no {name}.yaml; must be a folder of configs, such as configs/ of "
                          "the ds_vshape checkout")
    with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
        yield


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn an error of hydra into a ConfigError of one line."""
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
