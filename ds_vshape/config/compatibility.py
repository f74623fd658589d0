"""Checks combinations of keys, in the "pipeline_schedule" section and in the rest of a ds_config.

Only precisions and ZeRO stages that train correctly in a pipeline are accepted, and on a GPU nothing that makes the
host wait for it in the middle of a batch.

    precision   ZeRO-0, sums in            ZeRO-1, sums in
    fp32        fp32                       fp32, bf16, fp16
    bf16        bf16                       bf16, fp32, fp16
    fp16        refused                    fp16, fp32, bf16

Sums: "data_types": {"grad_accum_dtype": ...}, by default the precision itself. DeepSpeed refuses some of the other
combinations without naming a key (_do_optimizer_sanity_check in runtime/engine.py), and trains incorrectly with others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from ds_vshape.config.folders import check_folder
from ds_vshape.config.section import KEY, ActivationLimit, ConfigError, ScheduleConfig, shown
from ds_vshape.schedule.named import ADAPTIVE, TIMED, most_micro_batches
from ds_vshape.schedule.placement import Placement

_SUMS = ("fp32", "bf16", "fp16")
# Keys that make DeepSpeed wait for the whole device: around checkpointed layers, and after each of its collectives.
_WAITING = (("activation_checkpointing", "synchronize_checkpoint_boundary"), ("comms_logger", "enabled"))
# Connections over which a host submits work to a GPU: CUDA's default, and the number of streams of a middle rank of a
# V. A wait in one stream holds up everything that is submitted later over the same connection.
_LEAST_CONNECTIONS = 8
# Environment variables: which values let passes run while messages wait, and how an error states them.
_ENVIRONMENT: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("CUDA_LAUNCH_BLOCKING", lambda value: value in ("", "0"), "0, or unset,"),
    # Any value counts. The memory of each tensor is then freed at once, for which the device must be idle.
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", lambda value: False, "unset"),
    ("CUDA_DEVICE_MAX_CONNECTIONS", lambda value: value.isdecimal() and int(value) >= _LEAST_CONNECTIONS,
     f"at least {_LEAST_CONNECTIONS}, or unset,"),
)
# Monitors with their package and what installs it; rank 0 alone imports it, and the others would wait.
_MONITORS = {"tensorboard": ("tensorboard", "'ds-vshape[tensorboard]'"), "wandb": ("wandb", "'ds-vshape[launch]'"),
             "comet": ("comet_ml", "comet_ml")}
_COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check_demands(config: ScheduleConfig) -> None:
    """Raise ConfigError for keys that the named schedule doesn't support."""
    limit, measures = config.memory_limit, config.name == ADAPTIVE and config.times == "profile"
    if isinstance(limit, ActivationLimit) and not measures:
        raise ConfigError(f"{KEY}.memory_limit.activations = {limit.activations} bytes: only an adaptive schedule with "
                          "\"times\" \"profile\" takes them; give a fraction of 1F1B's peak, or bytes for all that a "
                          "rank needs")
    if isinstance(limit, int) and config.name == ADAPTIVE and not measures:
        raise ConfigError(f"{KEY}.memory_limit = {limit} bytes: an adaptive schedule is planned for them only with "
                          "\"times\" \"profile\"; give that, or a fraction of 1F1B's peak activations")
    for key in ("recompute", "offload"):
        if getattr(config, key) and not measures:
            raise ConfigError(f"{KEY}.{key} = true: must be false without \"name\": \"{ADAPTIVE}\" and \"times\": "
                              "\"profile\", by which its costs are measured and it's planned where it pays")
    if config.times == "profile" and config.name not in (ADAPTIVE, *TIMED):
        raise ConfigError(f"{KEY}.times = 'profile': {config.name} has the same order for all times; legal for "
                          f"{', '.join([ADAPTIVE, *TIMED])}")


def check_micro_batches(micro_batches: int, placement: Placement, name: str,
                        key: str = "gradient_accumulation_steps") -> None:
    """Raise ConfigError for more micro-batches than the schedule `name` on `placement` may have."""
    most = most_micro_batches(placement.ranks, placement.chunks_each, name)
    if micro_batches > most:
        raise ConfigError(f"{key} = {micro_batches}: must be at most {most} on {placement.ranks} pipeline ranks: "
                          "ordering more of them takes minutes")


def check_accepted(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that no schedule supports; it names the key, its value and what is legal."""
    for key in _COUNTS:
        count = ds_config.get(key)
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ConfigError(f"{key} = {count!r}: must be a whole number of at least 1")
    _check_reports(ds_config)
    stage = _zero_stage(ds_config)
    if _section(ds_config, "compile").get("deepcompile", False):
        # Its passes reduce gradients over replicas in each micro-batch's compiled backward.
        raise ConfigError("compile.deepcompile = true: must be false with pipeline parallelism; engine.compile() "
                          "without it compiles each layer")
    precision = _precision(ds_config)
    sums = _sums(ds_config)
    if stage == 0 and precision == "fp16":
        # FP16_UnfusedOptimizer divides by a loss scale that DeepSpeedEngine.backward never multiplied with.
        raise ConfigError("zero_optimization.stage = 0 with fp16: must be 1, because DeepSpeed's optimizer without "
                          "ZeRO unscales gradients of a loss that was never scaled")
    if stage == 0 and sums not in (None, precision):
        raise ConfigError(f"data_types.grad_accum_dtype = {sums!r} with {precision} and zero_optimization.stage = 0: "
                          f"must be {precision!r}, or zero_optimization.stage 1")


def _check_reports(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError for an interval of DeepSpeed's reports by which it couldn't divide after a step."""
    every = ds_config.get("steps_per_print")
    if every is None:
        if ds_config.get("wall_clock_breakdown"):
            raise ConfigError("wall_clock_breakdown = true: must be false without steps_per_print, the number of "
                              "batches from one report of the times to the next")
    # A float too: accelerate sets it to infinity.
    elif isinstance(every, bool) or not isinstance(every, (int, float)) or not every >= 1:
        raise ConfigError(f"steps_per_print = {every!r}: must be a number of batches from 1 on, or missing")


def check_monitors(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a monitor whose package isn't installed."""
    for monitor, (package, install) in _MONITORS.items():
        if _section(ds_config, monitor).get("enabled") and find_spec(package) is None:
            raise ConfigError(f"{monitor}.enabled = true: {package} isn't installed: pip install {install}")


def check_monitor_folders(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a monitor's folder into which this rank, which is 0, can't write."""
    for monitor in ("csv_monitor", "tensorboard"):
        section = _section(ds_config, monitor)
        if section.get("enabled"):
            check_folder(f"{monitor}.output_path", section.get("output_path") or ".")


def check_asynchronous(ds_config: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Raise ConfigError, with the key, its value and what is legal, for settings that make the host wait for the
    device, or the device for messages, in each pass.

    A rank posts receives before other ranks have run the passes whose results it receives. So if two ranks waited for
    each other's messages, neither would ever start its next pass. `overlap_comm` isn't refused, because DeepSpeed
    switches it off for pipelines; nor are its timers, which record events that are read after the batch.
    """
    why = "must be {} on a GPU, where it would wait within a pass for messages that other ranks have yet to send"
    for section, key in _WAITING:
        value = _section(ds_config, section).get(key, False)
        if value:
            raise ConfigError(f"{section}.{key} = {shown(value)}: {why.format('false')}")
    for name, is_legal, legal in _ENVIRONMENT:
        if name in environment and not is_legal(environment[name]):
            raise ConfigError(f"{name} = {shown(environment[name])} in the environment: {why.format(legal)}")


def check_post_validation(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the key, its value and what is legal, unless the optimizer is a DeepSpeedZeroOptimizer on
    the device: only its step can be rolled back (ds_vshape/engine/rollback.py)."""
    key = f"{KEY}.optimizer_post_validation = true"
    if _zero_stage(ds_config) != 1:
        raise ConfigError(f"{key} with zero_optimization.stage = 0: must be 1, or the key false")
    if _precision(ds_config) == "bf16" and _sums(ds_config) == "fp32":
        raise ConfigError(f"{key} with bf16 and data_types.grad_accum_dtype = 'fp32': must be 'bf16', or the key false")
    zero = ds_config["zero_optimization"]
    offload = None if isinstance(zero, bool) else zero.get("offload_optimizer")
    if offload is not None and not isinstance(offload, Mapping):
        raise ConfigError(f"zero_optimization.offload_optimizer = {offload!r}: must be an object")
    if offload and offload.get("device", "none") != "none":
        raise ConfigError(f"{key} with zero_optimization.offload_optimizer.device = {offload['device']!r}: must be "
                          "'none', or the key false")
    if autocast_dtype(ds_config) == "fp16":
        raise ConfigError(f"{key} with torch_autocast.dtype = {ds_config['torch_autocast']['dtype']!r}: must be "
                          "'bfloat16', or the key false")


def autocast_dtype(ds_config: Mapping[str, Any]) -> str | None:
    """The dtype of the torch.autocast that passes run in, by DeepSpeed's main name; None where there is none."""
    autocast = _section(ds_config, "torch_autocast")
    return _dtype_name(autocast.get("dtype", "bfloat16")) if autocast.get("enabled", False) else None


def _section(ds_config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = ds_config.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{key} = {section!r}: must be an object")
    return section


def _zero_stage(ds_config: Mapping[str, Any]) -> int:
    # The old form of the key.
    if isinstance(ds_config.get("zero_optimization"), bool):
        return int(ds_config["zero_optimization"])
    stage = _section(ds_config, "zero_optimization").get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1):
        raise ConfigError(f"zero_optimization.stage = {stage!r}: must be 0 or 1 with pipeline parallelism")
    return int(stage)


def _precision(ds_config: Mapping[str, Any]) -> str:
    bf16, fp16 = (_section(ds_config, key).get("enabled", False) for key in ("bf16", "fp16"))
    if bf16 and fp16:
        raise ConfigError("bf16.enabled and fp16.enabled = true: must be one of them")
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"


def _sums(ds_config: Mapping[str, Any]) -> str | None:
    """The dtype in which gradients accumulate, by DeepSpeed's main name; None if the config has none."""
    asked = _section(ds_config, "data_types").get("grad_accum_dtype")
    if asked is None:
        return None
    name = _dtype_name(asked)
    if name not in _SUMS:
        raise ConfigError(f"data_types.grad_accum_dtype = {asked!r}: must be {', '.join(map(repr, _SUMS))}")
    return name


def _dtype_name(asked: Any) -> str | None:
    """DeepSpeed's main name of a dtype, given any of its names; None for others."""
    # Imported here because the commands check sections without torch.
    from ds_vshape.deepspeed_adapter.utils import dtype_name
    return dtype_name(asked)
