"""What launch/finetune.py is told, and programs like it: options, overrides like `schedule=v-zb`, a config in YAML.

All three have the same keys: those of ds_vshape/finetuning/settings.py, which configs/finetune.yaml lists.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds_vshape.config.section import ConfigError
from ds_vshape.finetuning.settings import Settings, read_settings

DESCRIPTION = ("Trains a Hugging Face model with a pipeline of all ranks: safetensors in, safetensors out. "
               "configs/finetune.yaml has all keys.")
# Settings that other programs replace by their own.
_OF_TEXT = ("text", "data", "packed")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, or of `words`: the settings, and `ds_config`; SystemExit if they are wrong."""
    parser = argparse.ArgumentParser(prog="finetune.py", description=DESCRIPTION, allow_abbrev=False)
    add_options(parser)
    _add(parser, _OF_TEXT)
    return parsed(parser, words)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a program that trains by ds_vshape.finetuning."""
    _add(parser, [name for name in Settings.model_fields if name not in _OF_TEXT])
    parser.add_argument("--config", type=Path, help="a YAML file of your own that extends configs/finetune.yaml")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="keys of configs/finetune.yaml: schedule=v-zb")
    # The launcher's, which says the same by LOCAL_RANK.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)


def parsed(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The settings in `words`, with what the parser has in addition, and `ds_config` as deepspeed.initialize takes it;
    SystemExit for what is wrong."""
    given = vars(parser.parse_intermixed_args(words))
    options = {key: given.pop(key) for key in Settings.model_fields if key in given}
    overrides, config, _ = given.pop("words"), given.pop("config"), given.pop("local_rank")
    try:
        if "deepspeed_config" in options and not overrides and config is None:
            settings, ds_config = read_settings(options), options["deepspeed_config"]
        else:
            # hydra is an extra of its own
            from ds_vshape.finetuning.composition import compose_settings
            settings, ds_config = compose_settings(overrides, options, config)
    except ConfigError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"overrides, a config and what is composed without --deepspeed_config need hydra ({error}): "
                     "pip install 'ds-vshape[launch]'")
    return argparse.Namespace(**dict(settings), ds_config=ds_config, **given)


def _add(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    for name in names:
        field = Settings.model_fields[name]
        switch: dict[str, Any] = {"action": "store_true"} if field.annotation is bool else {}
        parser.add_argument(f"--{name}", help=field.description, default=argparse.SUPPRESS, **switch)
