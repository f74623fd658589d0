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

from ds_vshape.config.compatibility import check_demands
from ds_vshape.config.section import KEY, ConfigError, nearest, read_section
from ds_vshape.layouts.job import OWN_ENGINE, Job, in_terms_of_jobs
from ds_vshape.layouts.rules import legal_keys, read_job, section_of, unknown_key
from ds_vshape.layouts.search import SearchSpace

# A link to the checkout's folder; an installed package has a copy of it.
CONFIGS = (Path(__file__).parent / "configs").resolve()
# Keys below these belong to hydra and to DeepSpeed, which check them.
_OPEN = ("hydra", "deepspeed")
# Groups that aren't a section.
_GROUPS = ("bench", "monitor")
# Keys of a schedule that others can't have; set for a whole search, they hold for those that can.
_OF_SOME = ("placement", "chunks", "times", "recompute", "offload")


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
    return search, config, _schedules(search.schedules, config["schedule"], configs)


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


def _schedules(names: Sequence[str], given: Mapping[str, Any], configs: Path) -> list[dict[str, Any]]:
    """The file of each of the schedules `names`, with those of the keys `given` on the command line that it can have;
    ConfigError for a key that none of them can have."""
    asked = {key: value for key, value in given.items() if value is not None and key != "name"}
    of_some = {key: value for key, value in asked.items() if key in _OF_SOME}
    chosen = [_chosen(name, configs) for name in names]
    adopted = [_adopted(schedule, of_some) for schedule in chosen]
    for key in of_some:
        if not any(key in keys for keys, _ in adopted):
            raise ConfigError("; ".join(dict.fromkeys(refused[key] for _, refused in adopted)))
    for_all = {key: value for key, value in asked.items() if key not in of_some}
    return [{**schedule, **for_all, **keys} for schedule, (keys, _) in zip(chosen, adopted)]


def _chosen(name: str, configs: Path) -> dict[str, Any]:
    """The file of the schedule `name`; ConfigError if there is none."""
    file = configs / "schedule" / f"{name}.yaml"
    if not file.exists():
        legal = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise ConfigError(f"search.schedules = {name!r}: {nearest(name, legal)}")
    chosen: Any = OmegaConf.to_container(OmegaConf.load(file))
    return dict(chosen)


def _adopted(schedule: Mapping[str, Any], keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Those of `keys` that `schedule` can have, and why it can't have the others."""
    found: dict[str, Any] = {}
    refused = dict.fromkeys(keys, f"schedule={OWN_ENGINE} has no such keys")
    if schedule["name"] == OWN_ENGINE:
        return found, refused
    own = {key: value for key, value in schedule.items() if key in ("name", *_OF_SOME)}
    # Some keys need others.
    for key in (*keys, *keys):
        try:
            with in_terms_of_jobs():
                section = read_section({KEY: {**own, **found, key: keys[key]}})
                assert section is not None
                check_demands(section)
            found[key] = keys[key]
        except ConfigError as error:
            refused[key] = str(error)
    return found, refused


def left_out(given: Mapping[str, Any], schedules: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each key that is `given` for a whole search and that not all of `schedules` can have, a line that says which
    have it."""
    lines = []
    for key in _OF_SOME:
        having = [schedule["name"] for schedule in schedules if schedule.get(key) == given.get(key)]
        if given.get(key) is not None and len(having) < len(schedules):
            others = [schedule["name"] for schedule in schedules if schedule["name"] not in having]
            lines.append(f"schedule.{key} = {given[key]!r} holds for {', '.join(having)}; {', '.join(others)} can't "
                         "have it")
    return lines


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
