"""DeepSpeed's PipelineEngine, and the DeepSpeedEngine under it.

Checked with DeepSpeed 0.19.8 (runtime/pipe/engine.py, runtime/engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.compiler import compiled_autograd
from deepspeed.runtime.engine import DeepSpeedEngine, EngineTimers
from deepspeed.runtime.pipe import engine as _stock
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ds_vshape.deepspeed_adapter.checkpointing import non_reentrant_checkpoint

__all__ = ["METHODS_OF_SCHEDULES", "PipelineEngine", "StockEngine", "instructions_of", "is_stock_code",
           "own_instructions", "set_instructions", "step_state"]

Instructions = dict[Any, Callable[..., None]]

# Methods that decide what a batch consists of.
METHODS_OF_SCHEDULES = ("_exec_schedule", "_train_schedule", "_inference_schedule")
_MAP = "_INSTRUCTION_MAP"
_FOLDER = Path(deepspeed.__file__).parent
# What a step changes.
_OF_STEP = ("global_steps", "global_samples", "skipped_steps", "_global_grad_norm", "_step_applied")


class StockEngine(PipelineEngine):  # type: ignore[misc]
    """DeepSpeed's engine, with names for those of its private parts that our subclasses use.

    What they override of it keeps DeepSpeed's names (parts.py).
    """

    # Of the present batch, by the dtype and the shape of a loss.
    _first_gradients: dict[tuple[torch.dtype, torch.Size], Tensor]
    # The answer to `surrounds_backwards` within a batch, None between batches.
    _surrounds_backwards: bool | None = None

    def stock_forward(self, inputs: Any) -> Any:
        """The module's forward, and hooks on its outputs for what DeepSpeed does before a backward.

        DeepSpeedEngine.forward without what is legal in no pipeline, and asked for in each pass; with it where a script
        has put a function of its own there.
        """
        if not _is_deepspeeds(DeepSpeedEngine.forward):
            return DeepSpeedEngine.forward(self, inputs)
        if isinstance(self.optimizer, ZeROOptimizer):
            self.optimizer.clear_backward_seen_flag()
        outputs = self.run_module(inputs)
        self.hook_outputs(outputs)
        return outputs

    def hook_outputs(self, outputs: Any) -> None:
        """Let a backward start by DeepSpeed's prologue where it reaches `outputs`, by one function for all of them
        (register_output_backward_hooks in runtime/utils.py)."""
        started = False

        def start(gradient: Tensor) -> Tensor:
            nonlocal started
            if not started:
                started = True
                self._backward_prologue()
            return self._backward_prologue_per_tensor(gradient)  # type: ignore[no-any-return]

        for tensor in _tensors_in(outputs):
            if tensor.grad_fn is not None:
                tensor.register_hook(start)  # type: ignore[no-untyped-call]

    @property
    def surrounds_backwards(self) -> bool:
        """Whether DeepSpeed, or a script in its place, does anything before and after a backward that the engine runs.
        DeepSpeed's own checks of that take several microseconds in each backward, so the answer holds for a batch."""
        if self._surrounds_backwards is not None:
            return self._surrounds_backwards
        return (isinstance(self.optimizer, ZeROOptimizer) or bool(self.memory_breakdown())
                or not (_is_deepspeeds(DeepSpeedEngine._backward_prologue)
                        and _is_deepspeeds(DeepSpeedEngine._backward_epilogue)))

    def _backward_prologue(self) -> None:
        if self.surrounds_backwards or not self._running_engine_backward:
            super()._backward_prologue()

    def _backward_epilogue(self) -> None:
        if self.surrounds_backwards:
            super()._backward_epilogue()

    def run_module(self, inputs: Any) -> Any:
        """The module's forward alone, under the autocast that the config asks for."""
        with self.autocast():
            return self.module(inputs)

    def autocast(self) -> AbstractContextManager[None]:
        """What layers run in: the autocast that the config asks for, or none."""
        if not (self.torch_autocast_enabled() or torch.is_autocast_enabled()):
            return nullcontext()
        return autocast_if_enabled(self)  # type: ignore[no-any-return]

    def stock_backward(self, loss: Tensor, splitting: AbstractContextManager[Any]) -> None:
        """The backward from a loss, scaled and divided as in DeepSpeedEngine.backward, or what a script has put there;
        `splitting` is around it."""
        if not _is_deepspeeds(DeepSpeedEngine.backward):
            with splitting:
                DeepSpeedEngine.backward(self, loss)
            return
        compiled = nullcontext()
        if self._is_compiled_autograd_enabled:
            compiled = compiled_autograd(True, self._compile_kwargs)
        gradient = self._first_gradient(loss)
        with compiled:
            self.run_backward((get_gradient_edge(loss),), (gradient,), splitting)
            self._backward_epilogue()

    def _first_gradient(self, loss: Tensor) -> Tensor:
        """The gradient of `loss` in `stock_backward`: the same numbers for all losses of a batch, in new memory, which
        may become a parameter's `.grad`."""
        key = loss.dtype, loss.shape
        if key not in self._first_gradients:
            self._first_gradients[key] = self._gradient_of(torch.ones_like(loss, requires_grad=True))
        return self._first_gradients[key].clone()

    def run_backward(self, roots: tuple[GradientEdge, ...], gradients: tuple[Tensor, ...],
                     splitting: AbstractContextManager[Any]) -> None:
        """Run autograd from these roots, whose gradients have their shapes and dtypes: DeepSpeed's hooks refuse a
        backward that the engine doesn't run."""
        if self.optimizer is None:
            # In the words of DeepSpeedEngine.backward.
            raise PipelineError("must provide optimizer during init in order to use backward: give \"optimizer\" in "
                                "the config, or initialize() an optimizer")
        self._running_engine_backward = True
        try:
            with splitting:
                self.run_autograd(roots, gradients)
        finally:
            self._running_engine_backward = False

    def run_autograd(self, roots: tuple[GradientEdge, ...], gradients: tuple[Tensor, ...]) -> None:
        """What `run_backward` runs."""
        raise NotImplementedError

    def gradient_of_loss(self) -> Tensor:
        """The derivative of what DeepSpeedEngine.backward starts from by the loss."""
        return self._gradient_of(torch.ones((), device=self.device, requires_grad=True))

    def _gradient_of(self, loss: Tensor) -> Tensor:
        with torch.enable_grad():
            root = self._root_of(loss)
        return torch.autograd.grad(root, loss, torch.ones_like(root))[0]

    def _root_of(self, loss: Tensor) -> Tensor:
        root: Tensor = loss / self.gradient_accumulation_steps()
        if isinstance(self.optimizer, ZeROOptimizer):
            return self.optimizer.scale_if_loss(root)  # type: ignore[no-any-return]
        if self.torch_autocast_z0_gradscaler:
            return self.torch_autocast_z0_gradscaler.scale(root)  # type: ignore[no-any-return]
        return root

    def divide_gradient(self, grad: Tensor) -> Tensor:
        """A gradient of the loss, divided by the number of micro-batches where DeepSpeed wants that: in a backward
        that the engine doesn't run."""
        if self._running_engine_backward:
            return grad
        return DeepSpeedEngine._backward_prologue_per_tensor(self, grad)  # type: ignore[no-any-return]

    def run_stock(self, instruction: Any, *args: Any, **kwargs: Any) -> None:
        """Execute an instruction as DeepSpeed's engine does, or as a script has its engine do."""
        stock_execute(instruction)(self, *args, **kwargs)

    @property
    def computes_loss(self) -> bool:
        """Whether the present batch asks for the loss."""
        return bool(self._compute_loss)

    def recomputes_reentrantly(self) -> bool:
        """Whether activations are checkpointed by a function that trains nothing unless an input wants a gradient."""
        module = self.module
        return (module.activation_checkpoint_interval > 0
                and module.activation_checkpoint_func is not non_reentrant_checkpoint)

    def set_grad_norm(self, norm: Any) -> None:
        """What get_global_grad_norm() returns."""
        self._global_grad_norm = norm

    def leave_step(self) -> None:
        """To be called where DeepSpeed's step has raised."""
        self._force_grad_boundary = False

    def start_no_timers(self) -> None:
        """Let DeepSpeed's hooks of a forward and a backward start no timers."""
        self.engine_timers = EngineTimers(enable_micro_timers=False, enable_global_timers=False)

    def drop_idle_hooks(self) -> None:
        """Take DeepSpeed's hooks away from the module where they do nothing before and after its forward: profiles,
        timers and ZeRO's stage 3 aside, which no forward here has, three keys ask for something."""
        if not (self.fp16_auto_cast() or self.random_ltd_enabled() or self.memory_breakdown()):
            self.module_forward_pre_hook.remove()
            self.module_forward_post_hook.remove()

    @contextmanager
    def resetting_timer(self) -> Iterator[None]:
        """Around a training batch. If it raises, DeepSpeed's timer of the batch is reset: it would still run, and the
        next batch couldn't start it."""
        try:
            yield
        except BaseException:
            self.timers(TRAIN_BATCH_TIMER).reset()
            raise

    def state_file(self, folder: str, tag: str, number: int) -> str:
        """The path of the state of the model parallel rank `number` in a checkpoint."""
        return self._get_ckpt_name(folder, tag, mp_placeholder=f"{number:02d}")  # type: ignore[no-any-return]

    @property
    def folder_of_layers(self) -> str:
        """Of the checkpoint that is loaded."""
        return self._curr_ckpt_path  # type: ignore[no-any-return]

    @property
    def replicas_of_checkpoint(self) -> int:
        """How many data parallel ranks saved the checkpoint that is loaded."""
        return self.loaded_checkpoint_dp_world_size

    @replicas_of_checkpoint.setter
    def replicas_of_checkpoint(self, replicas: int) -> None:
        self.loaded_checkpoint_dp_world_size = replicas

    def optimizer_files(self, folder: str, tag: str, replicas: int) -> list[str]:
        """The paths of the optimizer states that so many replicas have saved of this rank's layers."""
        return self._get_mp_rank_zero_checkpoint_names(  # type: ignore[no-any-return]
            folder, tag, self.checkpoint_mp_rank, replicas, self.bfloat16_enabled())

    def execute_plan(self, plan: Any) -> None:
        """Run a batch by what `_train_schedule` or `_inference_schedule` has given."""
        raise NotImplementedError

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        # A step may have changed the loss's scale.
        self._first_gradients = {}
        self._surrounds_backwards = self.surrounds_backwards
        try:
            self.execute_plan(pipe_schedule)
        finally:
            self._surrounds_backwards = None


def stock_execute(instruction: Any) -> Callable[..., None]:
    """The function of DeepSpeed's engine for an instruction."""
    return PipelineEngine._INSTRUCTION_MAP[instruction]  # type: ignore[no-any-return]


def instructions_of(owner: Any) -> Instructions:
    """The functions by which an engine, or a class of engines, executes instructions."""
    return owner._INSTRUCTION_MAP  # type: ignore[no-any-return]


def own_instructions(owner: Any) -> Instructions | None:
    """Those that it has itself and not from its class or its bases; None if it has none."""
    functions: Instructions | None = vars(owner).get(_MAP)
    return functions


def set_instructions(engine: Any, functions: Mapping[Any, Callable[..., None]]) -> None:
    """Let an engine execute instructions by `functions`; the class keeps its own."""
    engine._INSTRUCTION_MAP = functions


def class_with_instructions(name: str, bases: tuple[type, ...], functions: Mapping[Any, Callable[..., None]],
                            members: Mapping[str, Any]) -> Any:
    """A class of engines that executes instructions by `functions`."""
    return type(name, bases, {**members, _MAP: functions})


def _tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors in a stage's outputs: one, or tuples, lists and dictionaries of them."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (tuple, list, dict)):
        for member in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors_in(member)


@cache
def _is_deepspeeds(function: Any) -> bool:
    """Whether it, and what it's wrapped around, is code of DeepSpeed's."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not Path(code.co_filename).is_relative_to(_FOLDER):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def is_stock_code(filename: str) -> bool:
    """Whether code of this file is that of DeepSpeed's PipelineEngine."""
    return bool(filename == _stock.__file__)


def step_state(engine: Any) -> dict[str, Any]:
    """The engine's attributes that a step changes; `vars(engine).update` puts them back."""
    return {name: getattr(engine, name) for name in _OF_STEP}
