"""What DeepSpeed's constructor makes for an engine: the groups of experts, and the optimizer; and what compiles its
layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.config.section import ConfigError
from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.deepspeed_adapter.experts import expert_parallel_sizes, make_expert_groups
from ds_vshape.deepspeed_adapter.optimizers import core_of, is_bf16
from ds_vshape.module.dummy_parameter import add_dummy, keep_from_universal, with_dummy
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule


class Construction(StockEngine):
    """The steps of the constructor that differ from DeepSpeed's."""

    # Whether any rank has a layer of experts.
    _has_experts: bool
    schedule: Callable[[], Schedule]

    def _configure_distributed_model(self, model: Any) -> None:
        # DeepSpeed would make them on the ranks with such layers alone, and every rank must take part.
        of_ranks = model.preflight.gather({"sizes": expert_parallel_sizes(model)})
        for size in sorted(set(chain.from_iterable(facts["sizes"] for facts in of_ranks))):
            replicas = self.mpu.get_data_parallel_world_size()
            if replicas % size:
                raise ConfigError(f"an MoE layer has ep_size = {size}: must divide the {replicas} data parallel ranks "
                                  "of a stage, among which its experts are divided")
            make_expert_groups(self, size)
        self._has_experts = any(facts["sizes"] for facts in of_ranks)
        super()._configure_distributed_model(model)

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        # Scripts call it too, to make an optimizer from what `initialize` has given them.
        if hasattr(client_optimizer, "param_groups"):
            add_dummy(client_optimizer, self.module)
        else:
            model_parameters = with_dummy(self.module, model_parameters)
        self.param_names |= {parameter: name for name, parameter in self.module.named_parameters()}
        super()._configure_optimizer(client_optimizer, model_parameters)
        if self._has_experts and (self.zero_optimization() or is_bf16(self.optimizer)):
            self._check_parameter_groups()
        keep_from_universal(self.module)

    def _check_parameter_groups(self) -> None:
        """Collective; DeepSpeed sums the gradients' norm over pipeline ranks, one parameter group after another
        (scaled_global_norm in runtime/zero/stage_1_and_2.py), and would wait forever for a group that only some have.
        """
        facts = self.module.preflight.gather({"groups": len(core_of(self.optimizer).param_groups),
                                              "rank": self.module.stage_id})
        counts = {of_rank["rank"]: of_rank["groups"] for of_rank in facts}
        if len(set(counts.values())) > 1:
            counted = ", ".join(f"{count} on pipeline rank {rank}" for rank, count in sorted(counts.items()))
            raise ConfigError(
                "MoE layers with ZeRO or bf16: each pipeline rank must have the same number of parameter groups, "
                f"but there are {counted}. Give every pipeline rank an MoE layer")

    def compile(self, *args: Any, compiled_autograd_enabled: bool = False, **kwargs: Any) -> None:
        """DeepSpeed's `compile`, by layer; the weight gradients of a compiled layer come in B.

        Raises PipelineError for `compiled_autograd_enabled` with a schedule that has W: that isn't a whole backward.
        """
        schedule = self.schedule()
        if compiled_autograd_enabled and any(action.kind is Kind.W for order in schedule.orders for action in order):
            raise PipelineError(f"compiled_autograd_enabled = True: must be False with {schedule.name}, which splits "
                                "the backward; its layers can still be compiled")
        super().compile(*args, compiled_autograd_enabled=compiled_autograd_enabled, **kwargs)
