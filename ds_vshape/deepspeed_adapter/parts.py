"""DeepSpeed's private parts that this package overrides or uses, by name.

Checked with DeepSpeed 0.19.8. A method that DeepSpeed renames would be overridden in vain, and nothing would say
so; so all names are looked up before training starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module, metadata
from types import CodeType
from typing import Any

from ds_vshape.deepspeed_adapter.versions import TESTED, VersionError

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_PIPELINE_ENGINE = "deepspeed.runtime.pipe.engine:PipelineEngine"
_MODULE = "deepspeed.runtime.pipe.module:PipelineModule"
_ZERO = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
_SCALER = "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler"

# Private methods and class attributes that subclasses of ours override, outside of this folder.
OVERRIDDEN: Mapping[str, tuple[str, ...]] = {
    _ENGINE: (
        "_backward_epilogue", "_backward_prologue", "_backward_prologue_per_tensor", "_configure_distributed_model",
        "_configure_optimizer", "_copy_recovery_script", "_get_all_zero_checkpoints", "_load_checkpoint",
        "_load_zero_checkpoint", "_save_checkpoint", "_save_moe_checkpoint", "_save_zero_checkpoint"),
    _PIPELINE_ENGINE: (
        "_INSTRUCTION_MAP", "_aggregate_total_loss", "_exec_backward_pass", "_exec_forward_pass",
        "_exec_load_micro_batch", "_exec_optimizer_step", "_exec_reduce_grads", "_exec_reduce_tied_grads",
        "_exec_schedule", "_inference_schedule", "_loss_stage_global_rank", "_next_batch", "_train_schedule"),
    _MODULE: (
        "_build", "_index_tied_modules", "_partition_layers", "_precompute_checkpointable_values",
        "_synchronize_tied_weights"),
}
# What only this folder touches.
USED: Mapping[str, tuple[str, ...]] = {
    _ENGINE: (
        "_compile_kwargs", "_curr_ckpt_path", "_get_ckpt_name", "_get_mp_rank_zero_checkpoint_names",
        "_global_grad_norm", "_is_compiled_autograd_enabled", "_running_engine_backward", "_step_applied",
        "checkpoint_mp_rank", "global_samples", "global_steps", "loaded_checkpoint_dp_world_size",
        "module_forward_post_hook", "module_forward_pre_hook", "skipped_steps"),
    _PIPELINE_ENGINE: ("_compute_loss", "_force_grad_boundary"),
    _MODULE: (
        "_find_layer_type", "_get_frozen_parameter_names", "_grid", "_layer_specs", "_local_start", "_local_stop",
        "_num_layers", "_recursive_getattr", "_set_bounds", "_topo", "forward_funcs", "is_checkpointable_results",
        "is_checkpointable_results_interval"),
    _ZERO: (
        "_global_grad_norm", "_hp_optimizer_states_linked", "_param_slice_mappings", "_release_ipg_buffers",
        "averaged_gradients", "bit16_groups", "fill_grad_accum_attribute", "get_gradient_for_reduction",
        "gradient_accumulation_dtype", "loss_scaler", "micro_step_id", "model_parallel_group", "overflow",
        "overlapping_partition_gradients_reduce_epilogue", "params_already_reduced", "partition_count",
        "partition_gradients", "reduce_independent_p_g_buckets_and_remove_grads", "reduce_ipg_grads",
        "round_robin_bit16_padding", "round_robin_gradients", "scaled_global_norm",
        "set_gradient_accumulation_boundary", "setup_buckets", "single_partition_of_fp32_groups", "update_lp_params",
        "use_grad_accum_attribute"),
    _BF16: (
        "_param_slice_mappings", "bf16_groups", "fp32_groups_flat_partition", "fp32_groups_gradients",
        "fp32_groups_gradients_flat", "fp32_groups_has_gradients", "partition_count"),
    _SCALER: ("raise_error_at_min_scale",),
}


def check_parts(find: Callable[[str], Any] | None = None) -> None:
    """Raise VersionError, with all names that are missing, unless the installed DeepSpeed has all of these parts.

    `find` gives a class by "module:class"; by default DeepSpeed's.
    """
    missing = [*missing_parts(find or found)]
    if missing:
        raise VersionError(
            f"DeepSpeed {_version()} lacks what ds_vshape builds on: {', '.join(missing)}. "
            f"Install a tested version: deepspeed{TESTED['deepspeed']}")


def missing_parts(find: Callable[[str], Any]) -> Iterator[str]:
    """Those that `find` doesn't give, as "class.name" or as "module:class"."""
    for table in (OVERRIDDEN, USED):
        for place, names in table.items():
            try:
                owner = find(place)
            except (ImportError, AttributeError):
                yield place
                continue
            present = _names(owner)
            yield from (f"{owner.__name__}.{name}" for name in names if name not in present)


def found(place: str) -> Any:
    """The class "module:class"; ImportError or AttributeError where it isn't there."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


def _names(owner: type) -> set[str]:
    """What a class has, or its methods set or read: attributes of objects aren't known before there is an object."""
    names = set(dir(owner))
    for base in owner.__mro__[:-1]:
        for member in vars(base).values():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            names |= _of_code(getattr(function, "__code__", None))
    return names


def _of_code(code: CodeType | None) -> set[str]:
    if code is None:
        return set()
    inner: Iterable[Any] = code.co_consts
    return set(code.co_names).union(*(_of_code(part) for part in inner if isinstance(part, CodeType)))


def _version() -> str:
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return "(not installed)"
