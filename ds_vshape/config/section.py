"""The "pipeline_schedule" section of ds_config.json, and where it is read from.

    "pipeline_schedule": "v-half"
    "pipeline_schedule": {"name": "adaptive", "memory_limit": 0.6, "times": "profile"}
    "pipeline_schedule": {"name": "v-half", "partition": [0, 3, 5, 8, 10]}

DeepSpeed ignores unknown top-level keys, so with a misspelt key a job would silently train under DeepSpeed's own
schedule; `read_section` therefore refuses keys that look like this one.
"""

from __future__ import annotations

import base64
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Annotated, Any, Literal, LiteralString

import hjson
from pydantic import (BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, StrictBool, StrictFloat, StrictInt,
                      TypeAdapter, ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator,
                      field_validator)
from pydantic_core import PydanticCustomError

from ds_vshape.schedule.named import ADAPTIVE, check_chunks, check_placement, named, placement_of
from ds_vshape.schedule.placement import MOST_CHUNKS, Placement

KEY = "pipeline_schedule"
ENVIRONMENT_VARIABLE = "DS_VSHAPE_CONFIG"
_OPTION = "--deepspeed_config"
# How long torch's collectives over gloo wait by default.
TIMEOUT_SECONDS = 1800.0
# The longest value that an error shows, in characters.
_SHOWN = 300
# DeepSpeed's own keys whose spelling is similar to ours.
_DEEPSPEED_KEYS = {"pipeline", "scheduler"}

DsConfig = str | Mapping[str, Any]
_BYTES = TypeAdapter(ByteSize)


def _text(value: Any) -> str:
    """`value`, which must be a string: a number would be a fraction."""
    if not isinstance(value, str):
        raise ValueError("not a string")
    return value


class ConfigError(ValueError):
    """An illegal config. The message names the key, the value and what would be legal."""


# Strict, because true would be 1.0 otherwise.
Fraction = Annotated[float, Field(gt=0, le=2, allow_inf_nan=False, strict=True)]
# The limit for the memory of one rank: more than any machine has.
MOST_BYTES = 2**50
Bytes = Annotated[ByteSize, BeforeValidator(_text), Field(gt=0, le=MOST_BYTES)]


class ActivationLimit(BaseModel):
    """The highest peak of activations alone that a rank may have, in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    activations: Bytes


def _from_to(low: float, high: float, unit: str) -> WrapValidator:
    """One error for a value that isn't a number from `low` to `high`."""
    legal = f"must be from {low:g} to {high:,.10g} {unit}"

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            number = validate(value)
        except ValidationError as error:
            texts = {"found": error.errors()[0]["msg"], "legal": legal}
            raise PydanticCustomError("range", "{found}; {legal}", texts) from None
        if not low <= number <= high:
            raise PydanticCustomError("range", "{legal}", {"legal": legal})
        return number

    return WrapValidator(check)


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
# Shorter timeouts would end healthy batches; longer ones overflow in the functions that wait.
Timeout = Annotated[_Positive, _from_to(1, 7 * 86400, "seconds")]
PlanningTime = Annotated[_Positive, _from_to(0.001, 86400, "seconds")]
Chunks = Annotated[StrictInt, _from_to(1, MOST_CHUNKS, "stages on a rank")]
Share = Annotated[_Positive, _from_to(0.001, 1000, "of a stage's time")]


class LayerCosts(BaseModel):
    """What each layer costs: one number, or its F, B and W."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    costs: tuple[StrictFloat | tuple[StrictFloat, StrictFloat, StrictFloat], ...]


# The type of a validation error for a well-formed value outside its bounds, which its message states.
_BEYOND = "beyond"


def _one_problem(key: LiteralString, legal: LiteralString) -> WrapValidator:
    """One error for the whole value of `key`, instead of one for each illegal part and each type that it might have."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            bounds = [problem["msg"] for problem in error.errors() if problem["type"] == _BEYOND]
            raise PydanticCustomError(key, "{legal}", {"legal": ": ".join([legal, *bounds])}) from None

    return WrapValidator(check)


MOST_LAYERS = 10**6
_Layer = Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)]
Partition = Annotated[
    str | tuple[_Layer, ...] | LayerCosts,
    _one_problem("partition", "must be a method's name, a list of the first layer of each stage with the end (from 0 "
                 'to 1000000), or {"costs": [a number, or F, B and W, for each layer]}')]

# A trace keeps all its batches in memory, and writes its files again after each.
MOST_TRACED, LAST_TRACED = 1000, 10**9


class TraceConfig(BaseModel):
    """Which training batches are traced, and where the files are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batches: tuple[StrictInt, StrictInt]
    """The first and the last traced batch, by DeepSpeed's steps, which count from 1."""

    path: str = Field(default="traces", min_length=1)
    """The folder of the files. `~` is expanded."""

    @field_validator("batches")
    @classmethod
    def _in_order(cls, batches: tuple[int, int]) -> tuple[int, int]:
        first, last = batches
        if not 1 <= first <= last:
            raise ValueError("out of order")
        if last > LAST_TRACED or last - first >= MOST_TRACED:
            raise PydanticCustomError(_BEYOND, "at most {most} batches, up to number {last}",
                                      {"most": MOST_TRACED, "last": LAST_TRACED})
        return batches

    @field_validator("path")
    @classmethod
    def _a_folder(cls, path: str) -> str:
        """The path with ~ expanded."""
        folder = os.path.expanduser(path)
        if folder.startswith("~"):
            raise PydanticCustomError(_BEYOND, "there is no user with the home {path}", {"path": path})
        if "\0" not in folder:
            return folder
        raise PydanticCustomError(_BEYOND, "no file can have this name")


Trace = Annotated[
    TraceConfig,
    _one_problem("trace", 'must be {"batches": [first, last], "path": a folder}, where batches count from 1 and the '
                 "last may be the first")]


@contextmanager
def _beyond() -> Iterator[None]:
    """Turn a ValueError into one of a well-formed value that isn't legal, with the same message."""
    try:
        yield
    except ValueError as error:
        raise PydanticCustomError(_BEYOND, "{error}", {"error": str(error)}) from None


class ScheduleConfig(BaseModel):
    """The "pipeline_schedule" section of ds_config.json. A name alone stands for a section with that name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=100)
    """The schedule; `adaptive` plans one for the memory limit, and for measured times with `"times": "profile"`."""

    @field_validator("name")
    @classmethod
    def _a_schedule(cls, name: str) -> str:
        with _beyond():
            if name != ADAPTIVE:
                named(name)
        return name

    memory_limit: Fraction | Bytes | ActivationLimit | None = None
    """What a rank may need at most. Bytes like `"70GiB"` are for all of it: parameters, gradients, optimizer,
    activations, what passes need while they run, and the process itself. A number is for activations alone, a fraction
    of 1F1B's peak on as many ranks; `{"activations": "6GiB"}` is that in bytes. An adaptive schedule is planned within
    the limit (for bytes with `"times": "profile"`); any other is refused if it needs more."""

    placement: Literal["v", "interleaved"] | None = None
    """Where the stages of an adaptive schedule are: down the ranks and back up, again and again (`v`, the default), or
    always down (`interleaved`), where the last rank hands over to rank 0. Other schedules have their own placement."""

    @field_validator("placement")
    @classmethod
    def _one_that_the_schedule_has(cls, placement: str | None, others: ValidationInfo) -> str | None:
        with _beyond():
            if "name" in others.data:
                check_placement(others.data["name"], placement)
        return placement

    chunks: Chunks | None = None
    """How many stages each rank holds, where the schedule can have several numbers of them: `interleaved-1f1b` and
    `interleaved-zb` from 2 on, `v-zb` and `adaptive` an even number, `adaptive` with the placement
    `interleaved` any from 2 on. By default the least."""

    @field_validator("chunks")
    @classmethod
    def _as_many_as_the_schedule_has(cls, chunks: int | None, others: ValidationInfo) -> int | None:
        with _beyond():
            if {"name", "placement"} <= others.data.keys():
                check_chunks(others.data["name"], chunks, others.data["placement"])
        return chunks

    def placement_on(self, ranks: int) -> Placement:
        """Where the stages are on `ranks` ranks."""
        return placement_of(self.name, ranks, self.chunks, self.placement)

    deferred: Literal["matrices", "all"] = "matrices"
    """The weight gradients that a split backward leaves to W: those of matrix products, convolutions and embeddings,
    or also those of norms, which costs more memory than it saves time."""

    gradient_accumulation_fusion: StrictBool = True
    """W adds each weight gradient to its sum over the micro-batches in place, without a tensor of its own. Sums are
    then equal to DeepSpeed's up to rounding; without it they are equal bit for bit."""

    partition: Partition | None = None
    """How the layers are divided into stages; overrides the module's `partition_method`, and takes the same values.
    With `adaptive`, costs and `"profile"` plan the partition together with the order."""

    loss_average: Literal["tokens", "micro_batches"] | None = None
    """Whether a batch's loss and gradient are the mean over the tokens of all micro-batches and replicas, or that of
    the micro-batches' losses; overrides the module's `loss_average`. By default the loss function decides: over tokens
    if it takes `num_items_in_batch`, which `"tokens"` needs."""

    recompute: StrictBool = False
    """Whether an adaptive schedule may run forwards a second time, of all layers of a stage or of its first ones, and
    keep nothing of them meanwhile. Needs `"times": "profile"`."""

    offload: StrictBool = False
    """Whether an adaptive schedule may move what forwards leave to the host's memory and back. Needs
    `"times": "profile"`."""

    times: Literal["equal", "profile"] = "equal"
    """Plan for passes that all take equally long, or for the times that are measured in the first batches. Where the
    partition is planned too, by costs or a profile of layers, `"equal"` stands for the times of these."""

    planning_seconds: PlanningTime = 10.0
    """The longest time that planning takes. With `"times": "profile"` training continues meanwhile, and planning uses
    the cores that this host's ranks leave free, at least one."""

    micro_batch_order: Literal["data", "length"] = "data"
    """The order in which a batch's micro-batches are trained: that of the data, or, where they are of different
    lengths, the one in which ranks wait least. Gradients and losses are then sums in another order, so equal up to
    rounding."""

    detect_anomaly: StrictBool = False
    """End a batch at the first NaN or infinity in a stage's output or in the loss; the error names the stage and the
    micro-batch."""

    optimizer_post_validation: StrictBool = False
    """Step without waiting for other pipeline ranks, and validate the step during the start of the next batch."""

    verify_gradients: StrictBool = False
    """Run one early batch a second time with whole backwards, and end the job if losses or gradients differ."""

    timeout_seconds: Timeout = TIMEOUT_SECONDS
    """A rank counts as lost, and all ranks end, if it gives no sign of life for so long, or builds its PipelineModule
    later than others by so much; all ranks also end if they have waited for each other for so long. A rank whose
    process has ended is noticed at once, and one that is busy is waited for, however long that takes."""

    trace: Trace | None = None
    """Batches of which timelines are written."""

    drift: Share = 0.2
    """With `"times": "profile"`: measure and plan again when the time of a stage, or of a hop next to it, has changed
    by more than this share of the stage's time."""


def nearest(word: str, legal: Sequence[str]) -> str:
    """The end of an error message: the legal word that is closest to `word`, and the list of all legal words."""
    close = difflib.get_close_matches(word, legal, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Legal: {', '.join(legal)}"


def read_section(ds_config: Mapping[str, Any]) -> ScheduleConfig | None:
    """The section of a ds_config, or None if it has none.

    Raises ConfigError for a misspelt key (at the top level or in the section) and for an illegal value.
    """
    for key in ds_config:
        if isinstance(key, str) and key != KEY and key not in _DEEPSPEED_KEYS and _resembles(key):
            raise ConfigError(f"unknown key {key!r} in the DeepSpeed config: did you mean {KEY!r}?")
    section = ds_config.get(KEY)
    if section is None:
        return None
    if isinstance(section, str):
        section = {"name": section}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{KEY} = {shown(section)}: must be a schedule's name or a section like "
                          "{\"name\": \"v-half\"}")
    try:
        return ScheduleConfig.model_validate(dict(section))
    except ValidationError as error:
        # A field with several types has an error for each of them.
        told = dict.fromkeys(_explain(problem, section) for problem in error.errors())
        raise ConfigError("; ".join(told)) from None


def _resembles(key: str) -> bool:
    canonical = key.lower().replace("-", "_").replace(" ", "_")
    return difflib.SequenceMatcher(None, canonical, KEY).ratio() > 0.85


def _explain(problem: Any, section: Mapping[str, Any]) -> str:
    path = ".".join([KEY, *map(str, problem["loc"])])
    if problem["loc"][0] == "memory_limit":
        limit = section.get("memory_limit")
        most = ", at most 1PiB" if _are_bytes(limit.get("activations") if isinstance(limit, dict) else limit) else ""
        return (f"{KEY}.memory_limit = {shown(limit)}: must be bytes like \"70GiB\"{most}, for all that a rank needs; "
                "or for its activations alone a number above 0 and at most 2, a fraction of 1F1B's peak, or "
                "{\"activations\": bytes}")
    if problem["type"] == "extra_forbidden":
        hint = nearest(str(problem["loc"][-1])[:_SHOWN], _fields())
        return f"unknown key {shown(path)[1:-1]} = {shown(problem['input'])}: {hint}"
    if problem["type"] == "missing":
        return f"{path} is missing: the section needs a schedule's name"
    return f"{path} = {shown(problem['input'])}: {problem['msg']}"


def _are_bytes(value: Any) -> bool:
    try:
        return isinstance(value, str) and _BYTES.validate_python(value) > 0
    except (ValidationError, OverflowError):
        return False


def shown(value: Any) -> str:
    """A value as shown in errors: its repr, truncated if it is very long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # numbers of thousands of digits, lists that contain themselves
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _fields() -> list[str]:
    return list(ScheduleConfig.model_fields)


def load_ds_config(config: DsConfig) -> Mapping[str, Any]:
    """A ds_config as a mapping. As for `deepspeed.initialize`, `config` is a dictionary, the path of a (H)JSON file, or
    the text of one in URL-safe base64.
    """
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(f"DeepSpeed config {shown(config)}: must be a dictionary, a file's path or base64 text")
    config = os.fspath(config)
    if os.path.isfile(config):
        try:
            with open(config, encoding="utf-8") as file:
                text = file.read()
        except (OSError, ValueError) as error:
            raise ConfigError(f"DeepSpeed config {config!r} can't be read: {error}") from None
    else:
        try:
            # Without `validate`, illegal characters are skipped, and the path of a missing file may decode as base64.
            text = base64.b64decode(config, altchars="-_", validate=True).decode("utf-8")
        except ValueError:
            raise ConfigError(f"DeepSpeed config {shown(config)}: no such file, nor base64 text") from None
    try:
        loaded = hjson.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and a thousand levels
        raise ConfigError(f"DeepSpeed config {shown(config)} isn't valid JSON: {error}") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"DeepSpeed config {shown(config)} holds a {type(loaded).__name__}: must be an object")
    return loaded


def find_section(config: DsConfig | None, arguments: Sequence[str]) -> ScheduleConfig | None:
    """The section of the first config given: `config` itself, the file that the environment variable DS_VSHAPE_CONFIG
    names, or the file after --deepspeed_config in `arguments`. None if none is given.
    """
    found = find_ds_config(config, arguments)
    return None if found is None else read_section(found)


def find_ds_config(config: DsConfig | None, arguments: Sequence[str]) -> Mapping[str, Any] | None:
    """The ds_config from the first of these that is given; None if none is."""
    if config is None:
        config = os.environ.get(ENVIRONMENT_VARIABLE) or _from_arguments(arguments)
    return None if config is None else load_ds_config(config)


def _from_arguments(arguments: Sequence[str]) -> str | None:
    """The option's value; if it is repeated, the last one counts, as with argparse."""
    found = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == _OPTION:
            found = following
        elif argument.startswith(_OPTION + "="):
            found = argument.removeprefix(_OPTION + "=")
    return found or None
