"""What scripts do with DeepSpeed's PipelineEngine: functions of their own in its instruction map, subclasses,
optimizers made later, hooks that step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.lr_schedules import WarmupLR
from deepspeed.runtime.pipe import schedule as instructions
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from pipelines import BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, cross_entropy, specs
from scripted import BATCHES, MICRO_BATCHES, NO_KEY, SCHEDULES, UNTOUCHED, ds_config, losses, samples, variants, weights
from torch import nn

WITHOUT = 'train without "pipeline_schedule" in the config, or without that function'


def module_for(**options: Any) -> Any:
    return deepspeed.pipe.PipelineModule(specs(6), num_stages=2, loss_fn=cross_entropy, seed_layers=True,
                                         partition_method="uniform", **options)


def engine_for(config: dict[str, Any], **options: Any) -> Any:
    module = module_for()
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config, **options)[0]


def same(results: dict[Any, list[Any]]) -> None:
    """All variants have DeepSpeed's results on each rank."""
    oracle = results[UNTOUCHED]
    for schedule, of_ranks in results.items():
        assert of_ranks == oracle, schedule


# -- optimizers made after initialize


def decayed(optimizer: Any) -> Any:
    return WarmupLR(optimizer, warmup_min_lr=1e-3, warmup_max_lr=1e-2, warmup_num_steps=4)


@pytest.mark.parametrize("keys", [FP32, BF16_ZERO0], ids=["fp32", "bf16"])
def test_an_optimizer_made_after_initialize(keys: dict[str, Any]) -> None:
    """In the two precisions in which DeepSpeed starts without one; and a scheduler that is set by hand."""

    def script(config: dict[str, Any]) -> Any:
        module = module_for()
        parameters = list(module.parameters())
        engine, optimizer, *_ = deepspeed.initialize(model=module, model_parameters=parameters, config=config)
        engine._configure_optimizer(lambda given: torch.optim.AdamW(given, lr=1e-2), parameters)
        engine.lr_scheduler = decayed(engine.optimizer)
        return losses(engine), engine.get_lr()

    same(variants(script, optimizer=None, **keys))


PRECISIONS = {"fp32, ZeRO-1": FP32_ZERO1, "bf16, ZeRO-1": BF16_ZERO1, "bf16, ZeRO-1, sums in fp32": BF16_ZERO1_FP32}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.quick_cases("bf16, ZeRO-1")
def test_an_optimizer_that_takes_the_place_of_another(precision: str) -> None:
    """Between two batches, with replicas, whose gradients are reduced early by then."""

    def script(config: dict[str, Any]) -> Any:
        engine = engine_for(config)
        found = losses(engine)
        engine._configure_optimizer(lambda given: torch.optim.SGD(given, lr=0.1), list(engine.module.parameters()))
        return found + losses(engine)

    same(variants(script, ranks=4, schedules=(UNTOUCHED, "zb-h1", "v-half"), **PRECISIONS[precision],
                  zero_allow_untested_optimizer=True))


@pytest.mark.parametrize("keys", [FP32_ZERO1, BF16_ZERO1_FP32], ids=["ZeRO-1", "BF16_Optimizer"])
@pytest.mark.quick_cases("ZeRO-1")
def test_an_optimizer_of_the_script_on_tensor_parallel_ranks_of_plain_layers(keys: dict[str, Any]) -> None:
    """Made from all that the module has; what the second tensor parallel rank trains, the first one counts."""

    def script(config: dict[str, Any]) -> Any:
        topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
        module = deepspeed.pipe.PipelineModule(specs(6), topology=topology, loss_fn=cross_entropy, seed_layers=True,
                                               partition_method="uniform")
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        return losses(deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0])

    plain = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
    # DeepSpeed's own engine fails with BF16_Optimizer, on a norm of nothing.
    oracle = UNTOUCHED if keys is FP32_ZERO1 else "1f1b"
    results = variants(script, ranks=4, schedules=(oracle, "zb-h1", "v-half"), optimizer=None, **keys, **plain)
    assert len(results[oracle][0]) == BATCHES and not isinstance(results[oracle][0], str)
    assert results["zb-h1"] == results["v-half"] == results[oracle]


# -- functions in the instruction map


@contextmanager
def restored(*maps: dict[Any, Any]) -> Iterator[None]:
    before = [dict(functions) for functions in maps]
    try:
        yield
    finally:
        for functions, original in zip(maps, before, strict=True):
            functions.clear()
            functions.update(original)


def counting(original: Callable[..., None], calls: list[str], name: str) -> Callable[..., None]:
    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(name)
        original(self, *args, **kwargs)

    return counted


ENDS = (instructions.ReduceTiedGrads, instructions.ReduceGrads, instructions.OptimizerStep)
Patch = Callable[[Any, list[str]], None]


def patch_class(engine: Any, calls: list[str]) -> None:
    functions = PipelineEngine._INSTRUCTION_MAP
    for kind in ENDS:
        functions[kind] = counting(functions[kind], calls, kind.__name__)


def patch_map_of_engine(engine: Any, calls: list[str]) -> None:
    functions = engine._INSTRUCTION_MAP
    for kind in ENDS:
        functions[kind] = counting(functions[kind], calls, kind.__name__)


def patch_engine(engine: Any, calls: list[str]) -> None:
    functions = engine._INSTRUCTION_MAP
    engine._INSTRUCTION_MAP = {**functions, **{kind: counting(functions[kind], calls, kind.__name__) for kind in ENDS}}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [FP32, FP32_ZERO1, BF16_ZERO1_FP32], ids=["ZeRO-0", "ZeRO-1", "BF16_Optimizer"])
def test_functions_at_the_end_of_a_batch(keys: dict[str, Any]) -> None:
    """Put in before initialize, and between batches: on the class, in the engine's map, and as a map of its own."""

    def script(config: dict[str, Any]) -> Any:
        found: list[Any] = []
        for patch in (patch_class, patch_map_of_engine, patch_engine):
            for early in (True, False) if patch is patch_class else (False,):
                calls: list[str] = []
                with restored(PipelineEngine._INSTRUCTION_MAP):
                    if early:
                        patch(None, calls)
                    engine = engine_for(config)
                    with restored(engine._INSTRUCTION_MAP):
                        found.append(losses(engine)[:1])
                        before = len(calls)
                        if not early:
                            patch(engine, calls)
                        found += [losses(engine), calls[before:]]
                        found.append(engine.eval_batch(iter(samples(engine, 9))).item())
        return found

    results = variants(script, ranks=4, schedules=(UNTOUCHED, NO_KEY, "zb-h1", "v-half"), **keys)
    for schedule, of_ranks in results.items():
        assert of_ranks == results[UNTOUCHED], schedule
    assert results[UNTOUCHED][0][2] == ["ReduceTiedGrads", "ReduceGrads", "OptimizerStep"] * BATCHES


def test_methods_that_no_instruction_map_names() -> None:
    """In the place of DeepSpeed's own they change nothing, in DeepSpeed neither."""

    def script(config: dict[str, Any]) -> Any:
        names = ("_exec_reduce_grads", "_exec_optimizer_step", "_exec_reduce_tied_grads", "_exec_forward_pass")
        before = {name: getattr(PipelineEngine, name) for name in names}
        try:
            for name in names:
                setattr(PipelineEngine, name, touch)
            return losses(engine_for(config))
        finally:
            for name, method in before.items():
                setattr(PipelineEngine, name, method)

    same(variants(script, **FP32_ZERO1))


def test_forward_and_backward_of_the_script() -> None:
    """In the place of DeepSpeedEngine's: they are run, in each pass."""

    def script(config: dict[str, Any]) -> Any:
        forward, backward = DeepSpeedEngine.forward, DeepSpeedEngine.backward

        def half_backward(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
            return backward(self, loss / 2, *args, **kwargs)

        def counted_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.module.training)
            return forward(self, *args, **kwargs)

        calls: list[bool] = []
        DeepSpeedEngine.forward, DeepSpeedEngine.backward = counted_forward, half_backward
        try:
            found = losses(engine_for({**config, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}))
        finally:
            DeepSpeedEngine.forward, DeepSpeedEngine.backward = forward, backward
        assert len(calls) >= BATCHES * MICRO_BATCHES and all(calls)
        return found

    results = variants(script, **FP32_ZERO1, zero_allow_untested_optimizer=True)
    assert not isinstance(results[UNTOUCHED][0], str), results[UNTOUCHED]
    same(results)


def test_reductions_left_out() -> None:
    """As gradient release does with one replica: the script's function is run, and nothing in its place."""

    def script(config: dict[str, Any]) -> Any:
        with restored(PipelineEngine._INSTRUCTION_MAP):
            PipelineEngine._INSTRUCTION_MAP[instructions.ReduceGrads] = lambda self: None
            engine = engine_for(config)
            return losses(engine), weights(engine)["0.weight"].sum().item() if engine.stage_id == 0 else 0.0

    same(variants(script, ranks=4, schedules=(UNTOUCHED, NO_KEY, "zb-h1", "v-half")))


class ReferenceForward(instructions.BufferOpInstruction):
    """A pass of the script's own."""


def touch(self: Any, buffer_id: int) -> None:
    raise AssertionError("never run")


PASSES = {"ForwardPass": instructions.ForwardPass, "LoadMicroBatch": instructions.LoadMicroBatch,
          "BackwardPass": instructions.BackwardPass, "SendGrad": instructions.SendGrad,
          "ReferenceForward": ReferenceForward}


def told_by(action: Callable[[], Any]) -> str:
    try:
        return f"nothing: {action()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_functions_for_passes_are_refused() -> None:
    """On every rank, before and after initialize, in training and in evaluation; without them training continues."""

    def script(config: dict[str, Any]) -> Any:
        told = {}
        for name, kind in PASSES.items():
            with restored(PipelineEngine._INSTRUCTION_MAP):
                PipelineEngine._INSTRUCTION_MAP[kind] = touch
                told[name] = [told_by(lambda: engine_for(config))]
        engine = engine_for(config)
        found = losses(engine)[:2]
        for name, kind in PASSES.items():
            with restored(PipelineEngine._INSTRUCTION_MAP):
                PipelineEngine._INSTRUCTION_MAP[kind] = touch
                told[name].append(told_by(lambda: engine.train_batch(iter(samples(engine, 0)))))
                told[name].append(told_by(lambda: engine.eval_batch(iter(samples(engine, 0)))))
        # On one rank alone.
        with restored(PipelineEngine._INSTRUCTION_MAP):
            if engine.stage_id == 1:
                PipelineEngine._INSTRUCTION_MAP[instructions.ForwardPass] = touch
            told["one rank"] = [told_by(lambda: engine.train_batch(iter(samples(engine, 0))))]
        found.append(engine.train_batch(iter(samples(engine, 2))).item())
        return told, found

    oracle = variants(losses_alone, schedules=(UNTOUCHED,))[UNTOUCHED][0]
    for schedule, of_ranks in variants(script, schedules=SCHEDULES).items():
        for told, found in of_ranks:
            assert found[:2] == oracle[:2]
            for name, (early, *late) in told.items():
                refused = "ForwardPass" if name == "one rank" else name
                expected = (f"PipelineEngine._INSTRUCTION_MAP has functions of the script's own for {refused}, which "
                            f"no schedule of ds_vshape runs: {WITHOUT}")
                assert all(expected in text for text in (early, *late)), (schedule, name, early, late)


def losses_alone(config: dict[str, Any]) -> list[float]:
    return losses(engine_for(config))


def test_functions_for_whole_passes_of_this_engine() -> None:
    """Where a schedule splits, nothing would call them; elsewhere they run."""

    def script(config: dict[str, Any]) -> Any:
        engine, calls = engine_for(config), []  # type: ignore[var-annotated]
        functions = engine._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {**functions, instructions.ForwardPass: counting(
            functions[instructions.ForwardPass], calls, "F")}
        return told_by(lambda: losses(engine)), len(calls)

    for schedule, of_ranks in variants(script, schedules=("1f1b", "v-half")).items():
        for told, calls in of_ranks:
            assert told.startswith("nothing: [") == (schedule == "1f1b") and bool(calls) == (schedule == "1f1b")
            assert schedule == "1f1b" or "splits the backward and runs SplitForwardPass" in told


# -- subclasses that the script makes


class Custom(PipelineEngine):
    """With an argument, a state and a step of its own."""

    def __init__(self, *args: Any, run_name: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_name, self.seen = run_name, []  # type: ignore[var-annotated]

    def train_batch(self, data_iter: Any = None) -> Any:
        self.reset_activation_shape()
        loss = super().train_batch(data_iter)
        self.seen.append(loss.item())
        return loss


class OwnSchedule(Custom):
    """Runs instructions of its own."""

    def train_batch(self, data_iter: Any = None) -> Any:
        self.set_dataiterator(data_iter)
        self.module.train()
        self.total_loss = self.total_additional_losses = None
        self._compute_loss = True
        self._exec_schedule(instructions.TrainSchedule(micro_batches=self.micro_batches, stages=self.num_stages,
                                                       stage_id=self.stage_id))
        return self._aggregate_total_loss()


class OwnMap(Custom):
    """With a forward of its own in its own map."""

    _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP,
                        instructions.ForwardPass: lambda self, buffer_id: self._exec_forward_pass(buffer_id)}


class OwnMethods(Custom):
    """With a schedule of its own."""

    def _train_schedule(self) -> Any:
        return instructions.TrainSchedule(micro_batches=self.micro_batches, stages=self.num_stages,
                                          stage_id=self.stage_id)


def construct(engine_class: Any, config: dict[str, Any], **options: Any) -> Any:
    """As deepspeed.initialize does."""
    module = module_for()
    return engine_class(args=None, model=module, model_parameters=list(module.parameters()), mpu=module.mpu(),
                        config=config, config_class=DeepSpeedConfig(config, module.mpu()), run_name="run", **options)


@pytest.mark.parametrize("keys", [FP32, {**FP32_ZERO1, "gradient_clipping": 1.0}], ids=["ZeRO-0", "ZeRO-1"])
@pytest.mark.quick_cases("ZeRO-0")
def test_a_subclass_that_the_script_constructs(keys: dict[str, Any]) -> None:
    """Its methods are run, and batches are the schedule's."""

    def script(config: dict[str, Any]) -> Any:
        engine = construct(Custom, config)
        found = losses(engine)
        evaluated = engine.eval_batch(iter(samples(engine, 9))).item()
        assert isinstance(engine, Custom) and type(engine).__name__ == "Custom" and engine.seen == found
        return found, evaluated, engine.run_name, engine.schedule().name if hasattr(engine, "schedule") else None

    results = variants(script, **keys)
    for schedule, of_ranks in results.items():
        assert [result[:3] for result in of_ranks] == [result[:3] for result in results[UNTOUCHED]], schedule
        assert [name for *_, name in of_ranks] == [schedule if schedule in SCHEDULES else None] * 2


def test_a_subclass_in_the_place_of_deepspeeds() -> None:
    """deepspeed.initialize makes what deepspeed.PipelineEngine names."""

    class Named(PipelineEngine):
        def greet(self) -> str:
            return "hello"

    def script(config: dict[str, Any]) -> Any:
        before, deepspeed.PipelineEngine = deepspeed.PipelineEngine, Named
        try:
            engine = engine_for(config)
        finally:
            deepspeed.PipelineEngine = before
        return losses(engine), engine.greet()

    same(variants(script))


REFUSED: dict[Any, str] = {
    OwnSchedule: "the script runs a TrainSchedule of its own, but the schedule decides what a batch consists of",
    OwnMap: "OwnMap._INSTRUCTION_MAP has functions of the script's own for ForwardPass",
    OwnMethods: "the script has a _train_schedule of its own, but the schedule decides what a batch consists of",
}


def test_subclasses_with_batches_of_their_own_are_refused() -> None:
    def script(config: dict[str, Any]) -> Any:
        return {engine_class.__name__: told_by(lambda: losses(construct(engine_class, config)))
                for engine_class in REFUSED}

    results = variants(script)
    for schedule, of_ranks in results.items():
        for told in of_ranks:
            for engine_class, expected in REFUSED.items():
                text = told[engine_class.__name__]
                assert text.startswith("nothing: [") if schedule not in SCHEDULES else expected in text, text
        assert of_ranks[0] == of_ranks[1]
    assert results[NO_KEY] == results[UNTOUCHED]


def test_a_subclass_whose_config_has_the_key_alone() -> None:
    """The module was built without it: the engine's construction raises."""

    def script(config: dict[str, Any]) -> Any:
        module = module_for(config=ds_config())
        whole = {**config, "pipeline_schedule": "v-half"}
        return told_by(lambda: Custom(args=None, model=module, model_parameters=list(module.parameters()),
                                      mpu=module.mpu(), config=whole, run_name="",
                                      config_class=DeepSpeedConfig(whole, module.mpu())))

    for told in variants(script, schedules=("v-half",))["v-half"]:
        assert "ConfigError: pipeline_schedule: the PipelineModule was built for no schedule" in told


# -- gradient release


class Released(torch.optim.SGD):
    """An optimizer of DeepSpeed's kind that does nothing itself."""

    def step(self, closure: Any = None) -> Any:
        return None


def release_gradients(parameters: list[nn.Parameter]) -> None:
    """Each weight steps as soon as its gradient is there, unseen by autograd, which would refuse other micro-batches'
    backwards."""
    for parameter in parameters:
        weight = nn.Parameter(parameter.data)
        optimizer = torch.optim.AdamW([weight], lr=1e-2, foreach=False)

        def step(parameter: Any, weight: nn.Parameter = weight, optimizer: Any = optimizer) -> None:
            weight.data, weight.grad, parameter.grad = parameter.data, parameter.grad, None
            optimizer.step()

        parameter.register_post_accumulate_grad_hook(step)


def train_with_release(config: dict[str, Any]) -> Any:
    with restored(PipelineEngine._INSTRUCTION_MAP):
        PipelineEngine._INSTRUCTION_MAP[instructions.ReduceGrads] = lambda self: None
        module = module_for()
        parameters = list(module.parameters())
        release_gradients(parameters)
        engine, *_ = deepspeed.initialize(model=module, optimizer=Released(parameters, lr=1e-2), config=config)
        count = engine.gradient_accumulation_steps()
        return [told_by(lambda: engine.train_batch(iter(samples(engine, batch, count))).item())
                for batch in range(BATCHES)]


def test_gradient_release_with_one_micro_batch() -> None:
    results = variants(train_with_release, gradient_accumulation_steps=1)
    same(results)
    found = results[UNTOUCHED][0]
    assert len(set(found)) == BATCHES and all(told.startswith("nothing: ") for told in found)


def test_gradient_release_with_several_is_refused() -> None:
    """DeepSpeed's losses depend on its schedule too; here it's said."""
    for schedule, of_ranks in variants(train_with_release, schedules=SCHEDULES).items():
        for found in of_ranks:
            assert "a hook of the script's own changes the weight" in found[0], (schedule, found)
            assert "gradient_accumulation_steps = 1" in found[0] and "of 3 micro-batches" in found[0]


def test_hooks_that_only_look_are_no_release() -> None:
    def script(config: dict[str, Any]) -> Any:
        engine, seen = engine_for(config), []  # type: ignore[var-annotated]
        for parameter in engine.module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.shape))
        return losses(engine), len(seen) > 0

    same(variants(script))
