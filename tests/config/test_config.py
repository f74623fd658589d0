"""The "pipeline_schedule" section: what is legal, the text of errors, and where the config is read from."""

from __future__ import annotations

import base64
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ds_vshape.config.section import (ENVIRONMENT_VARIABLE, ActivationLimit, ConfigError, ScheduleConfig, find_section,
                                      load_ds_config, read_section)


@pytest.mark.parametrize("section, expected", [
    ("v-half", ScheduleConfig(name="v-half")),
    ({"name": "v-half"}, ScheduleConfig(name="v-half")),
    ({"name": "v-min", "memory_limit": 0.5}, ScheduleConfig(name="v-min", memory_limit=0.5)),
    ({"name": "v-min", "memory_limit": 1}, ScheduleConfig(name="v-min", memory_limit=1.0)),
    ({"name": "v-min", "memory_limit": 2}, ScheduleConfig(name="v-min", memory_limit=2.0)),
    ({"name": "v-min", "memory_limit": None}, ScheduleConfig(name="v-min")),
    ({"name": "v-min", "gradient_accumulation_fusion": True}, ScheduleConfig(name="v-min")),
    ({"name": "v-min", "gradient_accumulation_fusion": False},
     ScheduleConfig(name="v-min", gradient_accumulation_fusion=False)),
    ({"name": "adaptive", "placement": "interleaved", "chunks": 3},
     ScheduleConfig(name="adaptive", placement="interleaved", chunks=3)),
    ({"name": "v-zb", "placement": "v", "chunks": 4}, ScheduleConfig(name="v-zb", placement="v", chunks=4)),
    # Which names exist isn't known here.
    ("adaptive", ScheduleConfig(name="adaptive")),
    (None, None),
])
def test_legal_sections(section: Any, expected: ScheduleConfig | None) -> None:
    assert read_section({"train_batch_size": 8, "pipeline_schedule": section}) == expected


def test_a_config_without_the_key_has_no_section() -> None:
    assert read_section({}) is None
    assert read_section({"pipeline": {"activation_checkpoint_interval": 1}, "scheduler": {"type": "WarmupLR"}}) is None


def test_a_section_cannot_change_later() -> None:
    section = ScheduleConfig(name="v-half")
    with pytest.raises(ValidationError, match="frozen"):
        section.name = "v-min"  # type: ignore[misc]


@pytest.mark.parametrize("section, message", [
    ({"name": "v-half", "memory_limits": 0.5},
     "unknown key pipeline_schedule.memory_limits = 0.5: did you mean 'memory_limit'? Legal: name, memory_limit"),
    ({"name": "v-half", "zzz": None}, "unknown key pipeline_schedule.zzz = None: Legal: name, memory_limit"),
    ({"name": "v-zb", "chunks": 3},
     "pipeline_schedule.chunks = 3: v-zb has 2, 4, 6, 8, 10, 12, 14 or 16 stages on a rank"),
    ({"name": "adaptive", "chunks": 3},
     "pipeline_schedule.chunks = 3: adaptive has 2, 4, 6, 8, 10, 12, 14 or 16 stages on a rank with the placement"),
    ({"name": "adaptive", "placement": "linear"},
     "pipeline_schedule.placement = 'linear': Input should be 'v' or 'interleaved'"),
    ({"name": "v-half", "placement": "interleaved"},
     "pipeline_schedule.placement = 'interleaved': v-half has the placement v"),
    ({"name": "v-zb", "chunks": "4"},
     "pipeline_schedule.chunks = '4': Input should be a valid integer; must be from 1 to 16 stages on a rank"),
    ({}, "pipeline_schedule.name is missing: the section needs a schedule's name"),
    ({"memory_limit": 0.5}, "pipeline_schedule.name is missing: the section needs a schedule's name"),
    ("", "pipeline_schedule.name = ''"),
    ({"name": 7}, "pipeline_schedule.name = 7: Input should be a valid string"),
    (7, "pipeline_schedule = 7: must be a schedule's name or a section like {\"name\": \"v-half\"}"),
    (["v-half"], "pipeline_schedule = ['v-half']: must be a schedule's name"),
    (True, "pipeline_schedule = True: must be a schedule's name"),
    ({"name": "v-half", "gradient_accumulation_fusion": 1},
     "pipeline_schedule.gradient_accumulation_fusion = 1: Input should be a valid boolean"),
    ({"Name": "x"}, "pipeline_schedule.name is missing: the section needs a schedule's name; "
                    "unknown key pipeline_schedule.Name = 'x': did you mean 'name'?"),
])
def test_illegal_sections(section: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_section({"pipeline_schedule": section})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("limit", [0, -0.1, 2.01, float("nan"), float("inf"), "0.5", "half", True, [0.5], {},
                                   {"rank": "1GiB"}, {"activations": 0.5}, {"more": "1GiB"}])
def test_a_memory_limit_out_of_range(limit: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_section({"pipeline_schedule": {"name": "v-half", "memory_limit": limit}})
    assert str(caught.value) == (f"pipeline_schedule.memory_limit = {limit!r}: must be bytes like \"70GiB\", for all "
                                 "that a rank needs; or for its activations alone a number above 0 and at most 2, a "
                                 "fraction of 1F1B's peak, or {\"activations\": bytes}")


@pytest.mark.parametrize("key", ["pipeline_schedules", "pipeline-schedule", "Pipeline_Schedule", "pipline_schedule",
                                 "pipeline_scheduler", "pipelineschedule", "pipeline schedule", "pipe_schedule"])
def test_a_misspelt_key_does_not_train_without_us(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_section({"train_batch_size": 8, key: "v-half"})
    assert str(caught.value) == f"unknown key {key!r} in the DeepSpeed config: did you mean 'pipeline_schedule'?"
    with pytest.raises(ConfigError, match="did you mean"):
        read_section({"pipeline_schedule": "v-half", key: "v-half"})


def test_no_key_of_deepspeed_is_taken_for_a_misspelling() -> None:
    names = {value for name, value in inspect.getmembers(constants) if name.isupper() and isinstance(value, str)}
    names |= {name for _, model in inspect.getmembers(deepspeed_config, inspect.isclass)
              for name in getattr(model, "model_fields", {})}
    assert {"train_batch_size", "gradient_clipping", "scheduler"} <= names
    assert read_section(dict.fromkeys(names, 1)) is None


# -- reading a whole config

HJSON = """
{
    # why this size: it fits
    train_batch_size: 8
    "pipeline_schedule": {name: "v-half", memory_limit: 0.6,},  // our key
    /* nothing else */
}
"""


def test_a_dictionary_is_taken_as_it_is() -> None:
    config = {"train_batch_size": 8}
    assert load_ds_config(config) is config


def test_a_file_may_hold_comments(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(HJSON)
    section = {"name": "v-half", "memory_limit": 0.6}
    assert load_ds_config(str(path)) == {"train_batch_size": 8, "pipeline_schedule": section}
    assert find_section(str(path), []) == ScheduleConfig(name="v-half", memory_limit=0.6)


def test_base64_text_as_the_deepspeed_launcher_makes_it() -> None:
    # Long, and with characters whose code needs - and _ of the URL-safe alphabet.
    config = {"pipeline_schedule": "v-min", "note": "??>>~~ÿ" * 700}
    text = base64.urlsafe_b64encode(json.dumps(config, ensure_ascii=False).encode()).decode()
    assert "-" in text or "_" in text
    assert load_ds_config(text) == config


@pytest.mark.parametrize("path", ["/nowhere/ds_config.json", "ds_config.json", "missing", "config/dir", "abcd"])
def test_a_missing_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_ds_config(path)
    assert str(caught.value) == f"DeepSpeed config {path!r}: no such file, nor base64 text"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_ds_config(str(tmp_path / "."))


@pytest.mark.parametrize("text, message", [("{\"a\": ", "isn't valid JSON: "),
                                           ("[1, 2]", "holds a list: must be an object"),
                                           ("3", "holds a int: must be an object")])
def test_a_file_that_is_no_object(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_ds_config(str(path))
    assert repr(str(path)) in str(caught.value)


# -- where it is looked for


SOURCES = {"explicit": "gpipe", "environment": "zb-h1", "arguments": "v-half", "other": "v-min"}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A config file for each source, each with another schedule; the environment names none yet."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    paths = {}
    for name, schedule in SOURCES.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"pipeline_schedule": schedule}))
        paths[name] = str(path)
    return paths


def test_the_sources_in_their_order(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def found(config: Any, arguments: list[str]) -> str | None:
        section = find_section(config, arguments)
        return section and section.name

    arguments = ["train.py", "--deepspeed_config", files["arguments"], "--lr", "0.1"]
    assert found(None, []) is None
    assert found(None, arguments) == SOURCES["arguments"]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, files["environment"])
    assert found(None, arguments) == SOURCES["environment"]
    assert found(None, []) == SOURCES["environment"]
    assert found(files["explicit"], arguments) == SOURCES["explicit"]
    assert found({"pipeline_schedule": "v-zb"}, arguments) == "v-zb"
    # An explicit config counts even where it hasn't the key: it is the one that will train.
    assert found({}, arguments) is None
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert found(None, arguments) == SOURCES["arguments"]


@pytest.mark.parametrize("arguments, expected", [
    (["--deepspeed_config", "{arguments}"], "arguments"),
    (["--deepspeed_config={arguments}"], "arguments"),
    (["--deepspeed", "--local_rank=0", "--deepspeed_config={arguments}", "--x"], "arguments"),
    (["--deepspeed_config={other}", "--deepspeed_config", "{arguments}"], "arguments"),
    (["--deepspeed_config", "{other}", "--deepspeed_config={arguments}"], "arguments"),
    (["--deepspeed_config_file", "{other}"], None),
    (["--deepspeed_config"], None),
    (["--deepspeed_config="], None),
    ([], None),
])
def test_the_command_line(arguments: list[str], expected: str | None, files: dict[str, str]) -> None:
    section = find_section(None, [argument.format(**files) for argument in arguments])
    assert (section and section.name) == SOURCES.get(expected or "")


def test_a_missing_file_of_the_environment_is_an_error(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "/nowhere/ds.json")
    with pytest.raises(ConfigError, match="'/nowhere/ds.json': no such file"):
        find_section(None, ["--deepspeed_config", files["arguments"]])


def test_a_memory_limit_in_bytes() -> None:
    section = read_section({"pipeline_schedule": {"name": "v-half", "memory_limit": "1.5GiB"}})
    assert section is not None and section.memory_limit == 3 * 2**29 and isinstance(section.memory_limit, int)
    section = read_section({"pipeline_schedule": {"name": "v-half", "memory_limit": {"activations": "1.5GiB"}}})
    assert section is not None and section.memory_limit == ActivationLimit(activations="1.5GiB")


# -- bounds of every number

# Legal at both, and not beyond.
BOUNDS = {"planning_seconds": (0.001, 86400), "timeout_seconds": (1, 604800), "drift": (0.001, 1000)}


def refused(section: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read_section({"pipeline_schedule": {"name": "v-half", **section}})
    message = str(caught.value)
    assert len(message) < 1000 and "\n" not in message
    return message


@pytest.mark.parametrize("key", BOUNDS)
def test_numbers_at_their_bounds_and_just_beyond(key: str) -> None:
    low, high = BOUNDS[key]
    for legal in (low, high, math.nextafter(high, 0), math.nextafter(low, high)):
        assert getattr(read_section({"pipeline_schedule": {"name": "v-half", key: legal}}), key) == legal
    for illegal in (math.nextafter(low, 0), math.nextafter(high, math.inf), 0, -1, -0.0, 1e-320, 1e-9 * low, 1e17,
                    1e308, 10**400, math.inf, math.nan):
        message = refused({key: illegal})
        assert message.startswith(f"pipeline_schedule.{key} = ") and f"must be from {low:g} to {high:,}" in message


@given(st.sampled_from(sorted(BOUNDS)), st.floats() | st.integers() | st.booleans() | st.text() | st.none())
@settings(max_examples=200)
def test_any_number_is_legal_or_refused(key: str, value: Any) -> None:
    low, high = BOUNDS[key]
    if type(value) in (int, float) and low <= value <= high:
        assert read_section({"pipeline_schedule": {"name": "v-half", key: value}}) is not None
    else:
        assert f"pipeline_schedule.{key} = " in refused({key: value})


@pytest.mark.parametrize("text, expected", [("1B", 1), ("1PiB", 2**50), ("1024TiB", 2**50)])
def test_legal_bytes(text: str, expected: int) -> None:
    section = read_section({"pipeline_schedule": {"name": "v-half", "memory_limit": text}})
    assert section is not None and section.memory_limit == expected


@pytest.mark.parametrize("text", ["1.01PiB", "2PiB", "1EB", "1000000000000000000000PiB"])
def test_more_bytes_than_any_machine_has(text: str) -> None:
    for limit in (text, {"activations": text}):
        assert 'must be bytes like "70GiB", at most 1PiB, for all' in refused({"memory_limit": limit})


@pytest.mark.parametrize("text", ["0B", "0.1B", "-6GiB", "1e308GiB", "NaN", "infB", "9" * 5000, "6 GiBs", "", "GiB"])
def test_no_number_of_bytes(text: str) -> None:
    assert refused({"memory_limit": text}).startswith("pipeline_schedule.memory_limit = ")


@pytest.mark.parametrize("batches", [[1, 1], [1, 1000], [10**9, 10**9], [10**9 - 999, 10**9]])
def test_legal_traces(batches: list[int]) -> None:
    section = read_section({"pipeline_schedule": {"name": "v-half", "trace": {"batches": batches}}})
    assert section is not None and section.trace is not None and list(section.trace.batches) == batches


@pytest.mark.parametrize("trace, told", [
    *(({"batches": batches}, "first: at most 1000 batches, up to number 1000000000")
      for batches in ([1, 1001], [10**9, 10**9 + 1], [1, 10**18], [10**400, 10**400])),
    *(({"batches": batches}, "the last may be the first")
      for batches in ([0, 1], [2, 1], [-5, 3], [1], [1, 2, 3], [1.0, 2.0], [True, 2], ["1", "2"], None)),
    *(({"batches": [1, 2], "path": path}, "the last may be the first") for path in ("", 7, None, "\ud800")),
    ({"batches": [1, 2], "path": "a\0b"}, "no file can have this name"),
    ({"batches": [1, 2], "path": "~nobody-of-this-name/x"}, "there is no user with the home ~nobody-of-this-name/x"),
])
def test_no_trace(trace: Any, told: str) -> None:
    message = refused({"trace": trace})
    assert message.startswith("pipeline_schedule.trace = ") and message.endswith(told)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    section = read_section({"pipeline_schedule": {"name": "v-half", "trace": {"batches": [1, 2], "path": "~/t"}}})
    assert section is not None and section.trace is not None and section.trace.path == "/home/of/mine/t"


@pytest.mark.parametrize("partition", [[0, -1, 5], [0, 10**6 + 1], [0, 10**30], [0, 10**5000], [0, 1.0], [0, True],
                                       [0, "1"], {"costs": [10**400]}, {"costs": ["1"]}, {"costs": [[1, 2]]}, {}, 7])
def test_no_partition(partition: Any) -> None:
    assert refused({"partition": partition}).startswith("pipeline_schedule.partition = ")


@pytest.mark.parametrize("section", [{"name": "x" * 10**5}, {"x" * 10**5: 1}, {"line\nbreak": 1}, {3: 4},
                                     {"memory_limit": 10**5000}, {"partition": [[0] * 10**5]}])
def test_odd_names_and_long_values_make_short_errors(section: Any) -> None:
    assert refused(section).startswith(("pipeline_schedule.", "unknown key pipeline_schedule."))


def test_keys_that_are_no_texts_are_not_ours() -> None:
    assert read_section({1: 2, None: 3}) is None  # type: ignore[dict-item]


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[" * 10**5, b'{"a": ' * 10**4, b'{"a": ' + b"9" * 5000 + b"}"])
def test_files_that_cannot_be_understood(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_bytes(content)
    refusal = r"^DeepSpeed config '.*ds_config.json' (isn't valid JSON|can't be read): "
    with pytest.raises(ConfigError, match=refusal) as told:
        load_ds_config(str(path))
    assert len(str(told.value)) < 1000


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "ds_config.json"
    path.write_text("{}")
    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(ConfigError, match="can't be read: .*Permission denied"):
        load_ds_config(str(path))
