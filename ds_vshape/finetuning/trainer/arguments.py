"""Which arguments of a Trainer a pipeline can't follow; each is refused before a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_vshape.config.section import shown

# Of TrainingArguments and its subclasses: the values that are legal, the first being the one to set, and why no others.
_WHY_LOSS = "evaluation gives the loss alone; what needs logits or generates is done with the saved model"
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "fsdp": (("", None, False, []), "the pipeline divides the model"),
    "parallelism_config": ((None,), "the argument `stages` says how ranks are divided"),
    "auto_find_batch_size": ((False,), "a pipeline's micro-batches are part of its schedule"),
    "torch_compile": ((False,), "engine.compile() compiles the layers"),
    "use_liger_kernel": ((False,), "it replaces the forward of the whole model"),
    "neftune_noise_alpha": ((None,), "it replaces the forward of an embedding outside of the pipeline"),
    "torch_empty_cache_steps": ((None,), "passes of several micro-batches share the memory"),
    "average_tokens_across_devices": ((True,), "the loss is the mean over the tokens of all ranks"),
    "train_sampling_strategy": (("random", "sequential"), "all ranks of a pipeline draw the same rows"),
    "label_names": ((None, ["labels"]), "a causal language model has one kind of labels"),
    "save_on_each_node": ((False,), "each rank writes its layers, into a folder that all see"),
    "push_to_hub": ((False,), "upload the saved folder when training is done"),
    "enable_jit_checkpoint": ((False,), "ranks would save between different batches"),
    "debug": (([], ""), "it hooks into the forward of the whole model"),
    "predict_with_generate": ((False,), _WHY_LOSS),
    "fp16_full_eval": ((False,), "the engine evaluates in the precision of training"),
    "bf16_full_eval": ((False,), "the engine evaluates in the precision of training"),
    "batch_eval_metrics": ((False,), _WHY_LOSS),
    "include_for_metrics": (([], ["loss"]), _WHY_LOSS),
    "optim_target_modules": ((None,), "such optimizers replace modules of the whole model"),
    # Of TRL's SFTConfig.
    "loss_type": (("nll",), "the loss of a pipeline is the cross-entropy of the next token"),
    "activation_offloading": ((False,), "a pipeline's schedule keeps memory low"),
    "model_init_kwargs": ((None,), "each rank reads its own layers of the folder"),
}
_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Of args.accelerator_config.
_ACCELERATOR: dict[str, tuple[tuple[Any, ...], str]] = {
    "dispatch_batches": ((None, False), "each rank draws the rows of its pipeline"),
    "even_batches": ((True,), "all pipelines have as many micro-batches"),
    "split_batches": ((False,), "a micro-batch belongs to one pipeline, with per_device_train_batch_size rows"),
    "use_seedable_sampler": ((True,), "all ranks of a pipeline draw the same rows"),
}
# Of the constructor.
_OBJECTS: dict[str, str] = {
    "model_init": "give `model`",
    "compute_metrics": _WHY_LOSS,
    "preprocess_logits_for_metrics": _WHY_LOSS,
    "compute_loss_func": "label_smoothing_factor is what the loss can be changed by",
    "peft_config": "launch/finetune.py --lora trains adapters",
    "quantization_config": "launch/finetune.py --lora trains adapters on a quantized model",
}
_OPTIMIZERS = ("lomo", "adalomo", "schedule_free", "galore", "apollo", "layerwise")
# Of args.activation_checkpointing_kwargs.
_RECOMPUTING = ("every_n_layers", "use_reentrant")
# Methods of a Trainer that a subclass may override, and that are never called here.
_UNUSED = ("compute_loss", "prediction_step")


def check_arguments(args: Any, others: Mapping[str, Any]) -> None:
    """ValueError for what a pipeline can't follow among `args`, TrainingArguments, and the `others` of a Trainer's
    constructor; it names the argument, its value and what is legal."""
    if not getattr(args, "deepspeed", None):
        raise ValueError(f"args.deepspeed = {shown(getattr(args, 'deepspeed', None))}: must be a DeepSpeed config with "
                         '"pipeline_schedule"; without a pipeline, use the Trainer of transformers')
    for name, (legal, why) in _ARGUMENTS.items():
        value = getattr(args, name, legal[0])
        if value not in legal:
            raise ValueError(f"args.{name} = {shown(value)}: must be {' or '.join(map(repr, legal[:2]))}; {why}")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(word in optimizer for word in _OPTIMIZERS):
        raise ValueError(f"args.optim = {optimizer!r}: must be one that steps by gradients alone, for example "
                         "'adamw_torch'")
    for name, (legal, why) in _ACCELERATOR.items():
        value = getattr(args.accelerator_config, name)
        if value not in legal:
            raise ValueError(f"args.accelerator_config.{name} = {shown(value)}: must be "
                             f"{' or '.join(map(repr, legal))}; {why}")
    for name in _COUNTS:
        if getattr(args, name) < 1:
            raise ValueError(f"args.{name} = {shown(getattr(args, name))}: must be at least 1")
    recomputed_layers(args)
    for name, instead in _OBJECTS.items():
        if others.get(name) is not None:
            raise ValueError(f"{name} = {shown(others[name])}: must be None; {instead}")
    if any(part is not None for part in others.get("optimizers", ())):
        raise ValueError(f"optimizers = {shown(others['optimizers'])}: must be (None, None), since each rank has "
                         "weights of its own; args.optim, optimizer_cls_and_kwargs or the DeepSpeed config name one")


def check_methods(kind: type, base: type) -> None:
    """TypeError if a class between `kind` and `base` overrides a method that a pipeline never calls."""
    for below in kind.__mro__[:kind.__mro__.index(base)]:
        for name in _UNUSED:
            if name in vars(below):
                raise TypeError(f"{below.__name__}.{name} is never called: the loss of a pipeline is computed by its "
                                "last stage; label_smoothing_factor is what it can be changed by")


def recomputed_layers(args: Any) -> int:
    """After how many decoder layers activations are kept, 0 for all of them, by args.activation_checkpointing."""
    options = args.activation_checkpointing_kwargs or {}
    unknown = {name: value for name, value in options.items() if value and name not in _RECOMPUTING}
    if unknown:
        raise ValueError(f"args.activation_checkpointing_kwargs = {shown(options)}: must have none of "
                         f"{', '.join(unknown)}; legal is every_n_layers")
    return options.get("every_n_layers", 1) if args.activation_checkpointing else 0
