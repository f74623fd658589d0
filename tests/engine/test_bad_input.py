"""Bad input: one clear error, the same on every rank, nothing hangs, and after bad data training continues.

What is the same on all ranks and wrong; ranks that differ are in test_preflight.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from pipelines import VOCABULARY, WIDTH, Block, Job, PlainTraining, cross_entropy, data, head, micro_batch, specs, train
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

import ds_vshape
from ds_vshape.schedule.named import build

# -- configs, layouts and modules that can't be trained

STOCK = Job(None, 2, 2).ds_config()
V_HALF = {**STOCK, "pipeline_schedule": "v-half"}
V_ZB = {**STOCK, "pipeline_schedule": "v-zb"}
ONE_F_ONE_B = {**STOCK, "pipeline_schedule": "1f1b"}

# Builds something, and what is told.
Case = tuple[Callable[[], Any], str]


def module_of(config: Any, module_class: Any = ds_vshape.PipelineModule, **options: Any) -> Any:
    return module_class(**{"layers": specs(4), "num_stages": 2, "loss_fn": cross_entropy, "partition_method": "uniform",
                           **({} if config is None else {"config": config}), **options})


def initialized(module: Any, config: Any, **options: Any) -> Any:
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=config, **options)


def key(message: str, **keys: Any) -> Case:
    """A ds_config with other keys besides a good schedule."""
    config = {**V_HALF, **keys}
    return lambda: initialized(module_of(config), config), f"ConfigError: {message}"


OF_CONFIG, OF_MODULE = "PartitionError: pipeline_schedule.partition: ", "PartitionError: partition_method: "


def section(message: str, name: str = "v-half", **fields: Any) -> Case:
    """A section with other fields."""
    return Job({"name": name, **fields}, 2, 2).engine, message


def field(told: str, **fields: Any) -> Case:
    """A section with one wrong field, which the error names with its value."""
    (name, value), = fields.items()
    return section(f"ConfigError: pipeline_schedule.{name} = {value!r}: {told}", **fields)


def options(message: str, config: Any = V_HALF, **arguments: Any) -> Case:
    """A PipelineModule with other arguments."""
    return lambda: module_of(config, **arguments), message


def layers(message: str, *changed: tuple[int, Any], config: Any = V_HALF) -> Case:
    """A PipelineModule with other layers at some places."""
    chosen = specs(4)
    for place, spec in changed:
        chosen[place] = spec
    return options(message, config, layers=chosen)


class Unbuildable(nn.Module):
    """A layer that no rank can make."""

    def __init__(self) -> None:
        super().__init__()
        raise FileNotFoundError("no weights for this layer")


def of_tokens(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Never called."""
    raise AssertionError


def tied(width: int, module_class: type[nn.Module] = nn.Embedding, **of_spec: Any) -> TiedLayerSpec:
    return TiedLayerSpec("word", module_class, VOCABULARY, width, **of_spec)


TRACE = ('must be {"batches": [first, last], "path": a folder}, where batches count from 1 and the last may be the '
         "first")
REFUSED: dict[str, Case] = {
    # The section.
    "an unknown schedule": section("ConfigError: pipeline_schedule.name = 'v-haf': there is no schedule 'v-haf'; did "
                                   "you mean 'v-half'?", "v-haf"),
    "an unknown key": section("ConfigError: unknown key pipeline_schedule.memory_limt = 0.5: did you mean "
                              "'memory_limit'?", memory_limt=0.5),
    "a misspelt section": (lambda: module_of({**STOCK, "pipeline_shedule": "v-half"}),
                           "ConfigError: unknown key 'pipeline_shedule' in the DeepSpeed config: did you mean "
                           "'pipeline_schedule'?"),
    "no name": (Job({"memory_limit": 0.5}, 2, 2).engine, "ConfigError: pipeline_schedule.name is missing"),
    "a name of another type": section("ConfigError: pipeline_schedule.name = True: Input should be a valid string",
                                      True),  # type: ignore[arg-type]
    "a section of another type": (Job(["v-half"], 2, 2).engine,
                                  "ConfigError: pipeline_schedule = ['v-half']: must be a schedule's name"),
    "a memory limit of zero": field('must be bytes like "70GiB", for all that a rank needs', memory_limit=0),
    "a memory limit in percent": field('must be bytes like "70GiB", for all that a rank needs', memory_limit=50),
    "a memory limit that the schedule breaks": section(
        "MemoryLimitError: pipeline_schedule.memory_limit = 0.5: v-zb needs 1 of 1F1B's", "v-zb", memory_limit=0.5),
    "a memory limit that nothing can meet": section(
        "MemoryLimitError: pipeline_schedule.memory_limit = 0.1: the least possible peak on 2 ranks with 2 "
        "micro-batches is 0.5 of 1F1B's", "adaptive", memory_limit=0.1),
    "a memory limit below a stage's": section(
        "MemoryLimitError: pipeline_schedule.memory_limit = 0.2: the least possible peak on 2 ranks with 2 "
        "micro-batches is 0.25 of 1F1B's", "adaptive", memory_limit=0.2, times="profile", recompute=True, offload=True),
    "bytes of activations for a schedule that measures none": section(
        "ConfigError: pipeline_schedule.memory_limit.activations = 1073741824 bytes: only an adaptive schedule",
        memory_limit={"activations": "1GiB"}),
    "bytes for a plan that measures none": section(
        "ConfigError: pipeline_schedule.memory_limit = 1073741824 bytes: an adaptive schedule is planned for them only "
        "with \"times\" \"profile\"", "adaptive", memory_limit="1GiB"),
    "an unknown choice": field("Input should be 'matrices' or 'all'", deferred="biases"),
    "unknown times": field("Input should be 'equal' or 'profile'", times="measured"),
    "times for an order that knows none": section("ConfigError: pipeline_schedule.times = 'profile': 1f1b has the same "
                                                  "order for all times; legal for adaptive", "1f1b", times="profile"),
    "a time-out that overflows": field("must be from 1 to 604,800 seconds", timeout_seconds=1e17),
    "a time-out that no batch meets": field("must be from 1 to 604,800 seconds", timeout_seconds=1e-9),
    "a planning time of years": field("must be from 0.001 to 86,400 seconds", planning_seconds=1e308),
    "a drift that never comes": field("must be from 0.001 to 1,000 of a stage's time", drift=1e308),
    "bytes that no machine has": field('must be bytes like "70GiB", at most 1PiB, for all that a rank needs',
                                       memory_limit="1EiB"),
    "a trace of too much": field(TRACE, trace={"batches": [1, 10**18]}),
    "a trace that has no path": field(TRACE, trace={"batches": [1, 2], "path": "a\0b"}),
    "a trace that can't be written": section(
        "PreflightError: not all ranks can go on: ConfigError: pipeline_schedule.trace.path = '/dev/null/traces': must "
        "be a folder that rank 0 can write into: [Errno 20] Not a directory: '/dev/null/traces' on rank 0",
        trace={"batches": [1, 2], "path": "/dev/null/traces"}),
    "negative bounds": field("must be a method's name, a list of the first layer", partition=[0, -1, 2, 4, 5]),
    "bounds beyond any model": field("must be a method's name, a list of the first layer",
                                     partition=[0, 1, 2, 4, 10**30]),
    "a cost beyond all others": section(f"{OF_CONFIG}the partition's cost of layer 2 is 1e+308: must be a number "
                                        "from 0 on, up to 1e+100", partition={"costs": [1.0, 2.0, 1e308, 1.0, 1.0]}),
    "no time to plan": field("Input should be greater than 0", planning_seconds=0),
    "a time as text": field("Input should be a valid number", planning_seconds="10"),
    "a time-out below zero": field("Input should be greater than 0", timeout_seconds=-1),
    "a time-out that is a switch": field("Input should be a valid number", timeout_seconds=True),
    "no drift": field("Input should be greater than 0", drift=0),
    "a switch as text": field("Input should be a valid boolean", detect_anomaly="yes"),
    "a switch as number": field("Input should be a valid boolean", gradient_accumulation_fusion=1),
    "a trace of nothing": field(TRACE, trace={}),
    "a trace of batch 0": field(TRACE, trace={"batches": [0, 2]}),
    "a trace that ends before it starts": field(TRACE, trace={"batches": [3, 2]}),
    "a trace with an unknown key": field(TRACE, trace={"batches": [1, 2], "folder": "traces"}),
    # The partition.
    "too few bounds": section(f"{OF_CONFIG}the partition has 3 bounds: 4 stages need 5", partition=[0, 3, 5]),
    "bounds that leave out layers": section(f"{OF_CONFIG}the partition goes from 1 to 5: it must go from 0 to 5",
                                            partition=[1, 2, 3, 4, 5]),
    "a stage without a layer": section(f"{OF_CONFIG}the partition's bounds 2, 2 leave stage 1 without a layer",
                                       partition=[0, 2, 2, 4, 5]),
    "bounds that are no numbers of layers": field("must be a method's name, a list of the first layer",
                                                  partition=[0, 1.5, 2, 4, 5]),
    "too few costs": section(f"{OF_CONFIG}the partition has costs of 2 layers: the model has 5",
                             partition={"costs": [1.0, 2.0]}),
    "a cost that is no number": section(f"{OF_CONFIG}the partition's cost of layer 2 is nan: must be",
                                        partition={"costs": [1.0, 2.0, float("nan"), 1.0, 1.0]}),
    "an unknown method": section(f"{OF_CONFIG}the partition's method 'unifrom' isn't known: must be uniform, "
                                 "parameters, profile, or type:", partition="unifrom"),
    "a method's name that is a number": options("PartitionError: partition_method = 7: must be a method's name",
                                                partition_method=7),
    "a broken regular expression": options(f"{OF_MODULE}the partition's method 'type:(' isn't a valid regular "
                                           "expression",
                                           partition_method="type:("),
    "a type that no layer has": options(f"{OF_MODULE}the partition's method 'type:Attention' matches no layer",
                                        partition_method="type:Attention"),
    "a profile of nothing": section(f"{OF_CONFIG}the partition 'profile' can't be measured: it needs an example",
                                    partition="profile"),
    # The mean of the losses.
    "an unknown mean": field("Input should be 'tokens' or 'micro_batches'", loss_average="token"),
    "an unknown mean of the module": options("ConfigError: loss_average = 'token': must be 'tokens' or "
                                             "'micro_batches', or None", loss_average="token"),
    "a mean over tokens that the loss function doesn't know": section(
        "ConfigError: pipeline_schedule.loss_average = 'tokens': loss_fn = cross_entropy must be a function of "
        "(outputs, labels, num_items_in_batch)", loss_average="tokens"),
    "such a mean by argument": options("ConfigError: PipelineModule's loss_average = 'tokens': loss_fn = cross_entropy",
                                       loss_average="tokens"),
    "a mean that only tokens have": options(
        "ConfigError: PipelineModule's loss_average = 'micro_batches': must be 'tokens', or loss_fn = of_tokens must "
        "have a default", loss_fn=of_tokens, loss_average="micro_batches"),
    "a mean for DeepSpeed's own engine": options("ConfigError: loss_average = 'tokens': must be None without "
                                                 "'pipeline_schedule' in the config", STOCK, loss_average="tokens"),
    # The rest of the config.
    "a report of nothing": key("steps_per_print = 0: must be a number of batches from 1 on, or missing",
                               steps_per_print=0),
    "a report of text": key("steps_per_print = '10': must be a number of batches", steps_per_print="10"),
    "times that are never reported": (
        lambda: module_of({**{name: value for name, value in V_HALF.items() if name != "steps_per_print"},
                           "wall_clock_breakdown": True}),
        "ConfigError: wall_clock_breakdown = true: must be false without steps_per_print"),
    "a monitor that isn't installed": key("comet.enabled = true: comet_ml isn't installed: pip install comet_ml",
                                          comet={"enabled": True}),
    "a monitor that can't write": (
        lambda: initialized(module_of(V_HALF), {**V_HALF, "csv_monitor": {"enabled": True,
                                                                          "output_path": "/dev/null/csv"}}),
        "PreflightError: not all ranks can go on: ConfigError: csv_monitor.output_path = '/dev/null/csv': must be a "
        "folder that rank 0 can write into: [Errno 20] Not a directory: '/dev/null/csv' on rank 0"),
    "ZeRO-2": key("zero_optimization.stage = 2: must be 0 or 1", zero_optimization={"stage": 2}),
    "ZeRO-3": key("zero_optimization.stage = 3: must be 0 or 1", zero_optimization={"stage": 3}),
    "ZeRO as text": key("zero_optimization.stage = '1': must be 0 or 1", zero_optimization={"stage": "1"}),
    "fp16 without ZeRO": key("zero_optimization.stage = 0 with fp16: must be 1", fp16={"enabled": True}),
    "two precisions": key("bf16.enabled and fp16.enabled = true: must be one of them", fp16={"enabled": True},
                          bf16={"enabled": True}),
    "a precision that is a switch": key("bf16 = True: must be an object", bf16=True),
    "unknown sums": key("data_types.grad_accum_dtype = 'fp8': must be 'fp32', 'bf16', 'fp16'",
                        data_types={"grad_accum_dtype": "fp8"}),
    "sums in another precision without ZeRO": key("data_types.grad_accum_dtype = 'bf16' with fp32",
                                                  data_types={"grad_accum_dtype": "bf16"}),
    "deepcompile": key("compile.deepcompile = true: must be false", compile={"deepcompile": True}),
    "no micro-batches": key("gradient_accumulation_steps = 0: must be a whole number", gradient_accumulation_steps=0),
    "more micro-batches than can be put in order": key(
        "gradient_accumulation_steps = 10000000: must be at most 131072 on 2 pipeline ranks",
        gradient_accumulation_steps=10**7),
    "a number as text": key("gradient_accumulation_steps = 'auto': must be a whole number",
                            gradient_accumulation_steps="auto"),
    "sizes that don't fit": (lambda: initialized(module_of({**V_HALF, "train_batch_size": 7}),
                                                 {**V_HALF, "train_batch_size": 7}),
                             "AssertionError: Check batch related parameters. train_batch_size is not equal to"),
    "an unknown optimizer": (lambda: initialized(module_of({**V_HALF, "optimizer": {"type": "Adamm"}}),
                                                 {**V_HALF, "optimizer": {"type": "Adamm"}}),
                             "AssertionError: Adamm is not a supported DeepSpeed Optimizer"),
    "no such file": (lambda: module_of("nowhere.json"), "ConfigError: DeepSpeed config 'nowhere.json': no such file"),
    "a config that is no config": (lambda: module_of([V_HALF]),
                                   "ConfigError: DeepSpeed config [{'train_micro_batch_size_per_gpu': 2"),
    # The module and the layout.
    "another schedule at initialize": (lambda: initialized(module_of(V_HALF), V_ZB),
                                       "ConfigError: pipeline_schedule: the PipelineModule was built for {'name': "
                                       "'v-half'}, initialize's config says {'name': 'v-zb'}"),
    "a schedule only in the module": (lambda: initialized(module_of(V_HALF), STOCK),
                                      "ConfigError: pipeline_schedule: the PipelineModule was built for {'name': "
                                      "'v-half'}, initialize's config says no schedule"),
    "a schedule only at initialize": (lambda: initialized(module_of(None), V_HALF),
                                      "ConfigError: pipeline_schedule: the PipelineModule was built for no schedule"),
    "DeepSpeed's own module": (lambda: initialized(module_of(None, deepspeed.pipe.PipelineModule), V_HALF),
                               "ConfigError: pipeline_schedule = 'v-half': the model is a PipelineModule of "
                               "DeepSpeed's; build it as a ds_vshape.PipelineModule"),
    "no pipeline at all": (lambda: initialized(nn.Linear(2, 2), V_HALF),
                           "ConfigError: pipeline_schedule = 'v-half': the model is a Linear"),
    "an mpu": (lambda: initialized(module_of(V_HALF), V_HALF, mpu=object()),
               "AssertionError: mpu must be None with pipeline parallelism"),
    "an unknown argument": options("TypeError: got an unexpected keyword argument 'num_stage'", num_stage=2),
    "three stages on two ranks": options("PipelineError: num_stages = 3: must be a number of pipeline ranks that "
                                         "divides the job's 2", num_stages=3),
    "no stages": options("PipelineError: num_stages = 0: must be", num_stages=0),
    "a number of stages as text": options("PipelineError: num_stages = '2': must be", num_stages="2"),
    "neither stages nor topology": options("PipelineError: num_stages = None: must be", num_stages=None),
    "a topology of more ranks": options(
        "PipelineError: topology = {'pipe': 2, 'data': 2} has 4 ranks: the job has 2", num_stages=None,
        topology=PipeDataParallelTopology(num_pp=2, num_dp=2)),
    "fewer layers than stages": options("PipelineError: 3 layers can't fill 4 stages: v-half on 2 pipeline ranks",
                                        layers=specs(1)),
    "a module that has no layers": options("PipelineError: layers = Linear(in_features=2, out_features=2, bias=True): "
                                           "must be a list of layers", layers=nn.Linear(2, 2)),
    "no layers": options("PipelineError: layers = None: must be a list of layers", layers=None),
    "a layer that is none": layers("PipelineError: layer 3 is 7: must be a LayerSpec, an nn.Module or a function",
                                   (3, 7)),
    "a layer that one rank can't build": layers("PreflightError: not all ranks can go on: FileNotFoundError: no "
                                                "weights for this layer on rank 1", (2, LayerSpec(Unbuildable))),
    "a loss that is none": options("PipelineError: loss_fn = 'mse': must be a function", loss_fn="mse"),
    "a negative interval": options("PipelineError: activation_checkpoint_interval = -1: must be",
                                   activation_checkpoint_interval=-1),
    "tied weights of other shapes on one rank": layers(
        f"PreflightError: not all ranks can go on: PipelineError: tied layers 'word': layer 0 is Embedding(13, {WIDTH})"
        f", and layer 5 on the same rank Embedding(13, {WIDTH + 1}); they must be equal",
        (0, tied(WIDTH)), (5, tied(WIDTH + 1, forward_fn=head))),
    "tied weights of other shapes on two ranks": layers(
        f"PipelineError: tied weight word.weight has different shapes: [13, {WIDTH}] on rank 0, [13, {WIDTH + 1}] on "
        "rank 1", (0, tied(WIDTH)), (5, tied(WIDTH + 1, forward_fn=head)), config=ONE_F_ONE_B),
    "tied layers of two classes on one rank": layers(
        f"PreflightError: not all ranks can go on: PipelineError: tied layers 'word': layer 0 is Embedding(13, {WIDTH})"
        f", and layer 5 on the same rank Linear(13, {WIDTH})", (0, tied(WIDTH)), (5, tied(WIDTH, nn.Linear))),
    "a tied weight that isn't there": layers(
        "PreflightError: not all ranks can go on: PipelineError: tied layers 'word': tied_weight_attr = 'wight', but "
        "Embedding has weight on rank 0", (0, tied(WIDTH, tied_weight_attr="wight")),
        (5, tied(WIDTH, tied_weight_attr="wight", forward_fn=head))),
}


def told_by(build_or_call: Callable[[], Any]) -> str:
    try:
        build_or_call()
    except Exception as error:
        return "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    return "no error"


def build_all(rank: int) -> dict[str, str]:
    told = {name: told_by(build_it) for name, (build_it, _) in REFUSED.items()}
    # Whatever was refused, the ranks still understand each other.
    engine = Job("v-half", 2, 2).engine()
    assert float(engine.train_batch(data(engine, 0))) > 0
    return told


@pytest.fixture(scope="module")
def refusals() -> list[dict[str, str]]:
    return run_ranks(2, build_all)


@pytest.mark.parametrize("name", REFUSED)
def test_one_clear_error_on_every_rank(name: str, refusals: list[dict[str, str]]) -> None:
    first, second = (of_rank[name] for of_rank in refusals)
    assert first == second
    assert first.startswith(REFUSED[name][1])
    assert "\n" not in first


# -- data, losses and outputs that end a batch


class Turned(nn.Module):
    """The last layer of the chosen stage; while a flag is set it does something else to its input."""

    turn: Callable[[Any], Any] | None = None

    def __init__(self, is_chosen: bool) -> None:
        super().__init__()
        self.is_chosen = is_chosen

    def forward(self, x: Any) -> Any:
        return Turned.turn(x) if self.is_chosen and Turned.turn is not None else x


class TurnedLoss:
    """A loss function that does something else while a flag is set."""

    turn: Callable[[Tensor, Any], Any] | None = None

    def __call__(self, logits: Tensor, labels: Any) -> Any:
        return cross_entropy(logits, labels) if TurnedLoss.turn is None else TurnedLoss.turn(logits, labels)


TOKENS, LABELS = micro_batch(0, 0, 0)
GOOD = TOKENS, LABELS
LONGER = torch.zeros(2, 4, dtype=torch.long)


def given(*micro_batches: Any) -> Callable[[Any], Any]:
    return lambda engine: iter(micro_batches)


def loss(turn: Callable[[Tensor, Any], Any]) -> Callable[[Any], Any]:
    def corrupt(engine: Any) -> Any:
        TurnedLoss.turn = staticmethod(turn)
        return data(engine, 0)

    return corrupt


def output(turn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def corrupt(engine: Any) -> Any:
        Turned.turn = staticmethod(turn)
        return data(engine, 0)

    return corrupt


def no_data(engine: Any) -> None:
    engine.set_dataiterator(None)


def failing_disk(engine: Any) -> Iterator[Any]:
    yield GOOD
    raise OSError("the disk is gone")


def on_other_ranks(engine: Any) -> Any:
    """Data only on ranks that don't need them."""
    engine.set_dataiterator(None)
    return None if engine.is_first_stage() else data(engine, 0)


LOAD, FORWARD, LAST, CROSSING = "LoadMicroBatch, micro-batch ", "ForwardPass of stage ", "LAST", "SendActivation of "
IN_PAIRS = "must be a pair (inputs, labels)"
OF_TENSORS = "must be a tensor or a tuple of tensors"
DENSE = "only dense tensors on cpu and tuples of them can cross to another stage"
# What the data become, what is told, and in which instruction.
CORRUPTED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "no iterator": (no_data, "there is no data: this rank needs an iterator", LOAD + "0"),
    "data on the wrong rank": (on_other_ranks, "there is no data: this rank needs an iterator", LOAD + "0"),
    "a list": (lambda engine: [GOOD, GOOD], "'list' object is not an iterator", LOAD + "0"),
    "an empty iterator": (given(), "StopIteration", LOAD + "0"),
    "an iterator that is too short": (given(GOOD), "StopIteration", LOAD + "1"),
    "an iterator that raises": (failing_disk, "OSError: the disk is gone", LOAD + "1"),
    "None for a micro-batch": (given(GOOD, None), "there is no data: this rank needs an iterator", LOAD + "1"),
    "inputs alone": (given(TOKENS, TOKENS), f"the data iterator gave a Tensor: {IN_PAIRS}", LOAD + "0"),
    "one member": (given((TOKENS,)), f"the data iterator gave 1 member: {IN_PAIRS}", LOAD + "0"),
    "a dictionary": (given({"tokens": TOKENS}), f"the data iterator gave a dict: {IN_PAIRS}", LOAD + "0"),
    "no inputs": (given(((), LABELS)), f"the inputs of a micro-batch are empty: {OF_TENSORS}", LOAD + "0"),
    "inputs of None": (given((None, LABELS)), f"the inputs of a micro-batch are NoneType: {OF_TENSORS}", LOAD + "0"),
    "inputs of text": (given(("text", LABELS)), f"the inputs of a micro-batch are str: {OF_TENSORS}", LOAD + "0"),
    "inputs of NumPy": (given((TOKENS.numpy(), LABELS)), f"the inputs of a micro-batch are ndarray: {OF_TENSORS}",
                        LOAD + "0"),
    "labels that hold text": (given((TOKENS, (LABELS, "x"))), f"the labels of a micro-batch are tuple: {OF_TENSORS}",
                              LOAD + "0"),
    "no labels": (given((TOKENS, None), (TOKENS, None)), "the data iterator gave None for labels, which the loss "
                  "function needs: AttributeError: 'NoneType' object has no attribute 'flatten'", LAST),
    "fewer labels": (given((TOKENS, LABELS[:1]), GOOD), "Expected input batch_size (6) to match target batch_size (3)",
                     LAST),
    "labels beyond the vocabulary": (given((TOKENS, LABELS + 100), GOOD), "is out of bounds", LAST),
    "tokens beyond the vocabulary": (given((TOKENS + 100, LABELS), GOOD), "index out of range in self",
                                     FORWARD + "0, micro-batch 0"),
    "tokens of floats": (given((TOKENS.float(), LABELS), GOOD), "got torch.FloatTensor instead",
                         FORWARD + "0, micro-batch 0"),
    "two inputs for a layer of one": (given(((TOKENS, TOKENS), LABELS), GOOD), "must be Tensor, not tuple",
                                      FORWARD + "0, micro-batch 0"),
    "one longer micro-batch": (given(GOOD, (LONGER, LONGER)), "the activation for stage 1 changed: [[2, 3, 8] float32 "
                               "with gradient] in an earlier batch, [[2, 4, 8] float32 with gradient] in micro-batch 1 "
                               "now. Set dynamic_shape=True", CROSSING),
    "one micro-batch of more samples": (given((TOKENS.repeat(2, 1), LABELS.repeat(2, 1)), GOOD), "[[4, 3, 8] float32 "
                                        "with gradient] in micro-batch 0 now. Set dynamic_shape=True", CROSSING),
    "a loss without gradient": (loss(lambda logits, labels: cross_entropy(logits, labels).detach()),
                                "the loss has no gradient: it is detached, or depends on nothing that is trained",
                                LAST),
    "a loss of many numbers": (loss(lambda logits, labels: functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none")),
        "the loss has the shape [6]: must be one number, such as a mean or a sum", LAST),
    "a loss that is a float": (loss(lambda logits, labels: 1.0), "the loss is a float: must be a tensor of one number",
                               LAST),
    "no loss": (loss(lambda logits, labels: None), "the loss is a NoneType: must be a tensor of one number", LAST),
    "two losses": (loss(lambda logits, labels: (logits.sum(), logits.sum())),
                   "the loss is a tuple: must be a tensor of one number", LAST),
    "losses by name": (loss(lambda logits, labels: {"loss": logits.sum()}),
                       "the loss is a dict: must be a tensor of one number", LAST),
    "an output that is a dictionary": (output(lambda x: {"x": x}), f"a stage's output holds dict: {DENSE}", FORWARD),
    "an output of nothing": (output(lambda x: ()), "a stage's output is an empty tuple: nothing would cross", FORWARD),
    "an output that holds a number": (output(lambda x: (x, 3)), f"a stage's output holds int (member 1 of 2): {DENSE}",
                                      FORWARD),
    "an output that is a list": (output(lambda x: [x]), f"a stage's output holds list: {DENSE}", FORWARD),
    "a sparse output": (output(lambda x: x.to_sparse()), f"a stage's output holds a sparse_coo tensor: {DENSE}",
                        FORWARD),
}


def turnable(schedule: str, stages: int, chosen: int) -> Job:
    """One layer a stage, then one that may be turned."""
    layers: list[Any] = []
    for stage, spec in enumerate(specs(stages - 2)):
        layers += [spec, LayerSpec(Turned, stage == chosen)]
    bounds = [*range(0, 2 * stages, 2), 2 * stages - 1]
    return Job({"name": schedule, "partition": bounds}, 2, 2, layers=tuple(layers[:-1]))


# The outputs of one cross to another rank, those of the other stay on theirs.
TURNABLE = {"1f1b": turnable("1f1b", 2, chosen=0), "v-half": turnable("v-half", 4, chosen=1)}


def train_through_all(rank: int, job: Job) -> tuple[list[float], list[float], dict[str, str]]:
    """The losses without bad batches, and with one before each good one; and the errors."""
    engine = job.engine(loss_fn=TurnedLoss())
    count = len(CORRUPTED) + 1
    oracle = [float(engine.train_batch(data(engine, batch))) for batch in range(count)]
    engine = job.engine(loss_fn=TurnedLoss())
    losses, told = [float(engine.train_batch(data(engine, 0)))], {}
    for batch, (name, (corrupt, _, _)) in enumerate(CORRUPTED.items(), 1):
        told[name] = told_by(lambda: engine.train_batch(corrupt(engine)))
        Turned.turn = TurnedLoss.turn = None
        losses.append(float(engine.train_batch(data(engine, batch))))
    return oracle, losses, told


@pytest.fixture(scope="module")
def trainings() -> dict[str, list[tuple[list[float], list[float], dict[str, str]]]]:
    return {schedule: run_ranks(2, train_through_all, job) for schedule, job in TURNABLE.items()}


@pytest.mark.parametrize("name", CORRUPTED)
@pytest.mark.parametrize("schedule", TURNABLE)
def test_a_batch_that_cannot_be_trained_on(schedule: str, name: str, trainings: Any) -> None:
    """Told on both ranks, with the instruction and the rank where it was."""
    _, message, place = CORRUPTED[name]
    where = {LAST: f"ForwardPass of stage {3 if schedule == 'v-half' else 1}, micro-batch 0"}.get(place, place)
    for _, _, told in trainings[schedule]:
        assert message in told[name]
        assert where in told[name] and " on pipeline rank " in told[name]


@pytest.mark.parametrize("schedule", TURNABLE)
def test_training_goes_on_as_if_nothing_had_been(schedule: str, trainings: Any) -> None:
    for oracle, losses, _ in trainings[schedule]:
        assert losses == oracle


# -- calls that an engine refuses


def without_gradients(engine: Any) -> None:
    with torch.no_grad():
        engine.train_batch(data(engine, 0))


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward": (lambda engine: engine(TOKENS), "PipelineError: Only train_batch() is accessible in pipeline mode."),
    "backward": (lambda engine: engine.backward(TOKENS), "PipelineError: Only train_batch() is accessible"),
    "step": (lambda engine: engine.step(), "PipelineError: Only train_batch() is accessible"),
    "training without gradients": (without_gradients, "RuntimeError: train_batch() requires gradients enabled"),
    "an evaluation of nothing": (lambda engine: engine.eval_batch(data(engine, 0), num_micro_batches=0),
                                 "PipelineError: num_micro_batches = 0: must be at least 1"),
    "an evaluation of too much": (lambda engine: engine.eval_batch(data(engine, 0), num_micro_batches=10**7),
                                  "ConfigError: num_micro_batches = 10000000: must be at most 131072 on 2 pipeline"),
    "an evaluation of a text": (lambda engine: engine.eval_batch(data(engine, 0), num_micro_batches="4"),
                                "PipelineError: num_micro_batches = '4': must be a whole number, or None"),
    "an evaluation that ranks see differently": (
        lambda engine: engine.eval_batch(data(engine, 0), num_micro_batches=1 + engine.global_rank),
        "PreflightError: the ranks must have the same: num_micro_batches = 1 on rank 0 ("),
    "a loss for one rank": (
        lambda engine: engine.eval_batch(data(engine, 0), bcast_loss=engine.global_rank == 0),
        "PreflightError: the ranks must have the same: bcast_loss = true on rank 0 ("),
    "a reduction of another type": (lambda engine: engine.eval_batch(data(engine, 0), reduce_output=5),
                                    "PipelineError: reduce_output = 5: must be 'avg' or None"),
    "an unknown reduction": (lambda engine: engine.eval_batch(data(engine, 0), reduce_output="sum"),
                             "PipelineError: reduce_output = 'sum': must be 'avg' or None"),
    "a reduction that gives too much": (lambda engine: engine.eval_batch(data(engine, 0), reduce_output=None),
                                        "PipelineError: reduce_output = None: must be 'avg' with bcast_loss"),
    "a batch size that doesn't fit": (lambda engine: engine.set_train_batch_size(3),
                                      "ValueError: train_batch_size = 3: must be a multiple of 2, a micro-batch of 2"),
    "a batch size that is a float": (lambda engine: engine.set_train_batch_size(4.0),
                                     "ValueError: train_batch_size = 4.0: must be a positive integer"),
    "no batch size": (lambda engine: engine.set_train_batch_size(0), "ValueError: train_batch_size = 0: must be a"),
    "a schedule's name": (lambda engine: engine.use_schedule("v-zb"),
                          "PipelineError: use_schedule('v-zb'): must be a Schedule, as build() of"),
    "a schedule of another placement": (lambda engine: engine.use_schedule(build("1f1b", 2, 2)),
                                        "PipelineError: 1f1b places its stages as ((0,), (1,)), but the model has"),
    "a checkpoint of nothing": (lambda engine: engine.load_checkpoint(None),
                                "CheckpointError: load_dir = None: must be the path of the checkpoints' folder"),
    "a checkpoint into a number": (lambda engine: engine.save_checkpoint(5),
                                   "CheckpointError: save_dir = 5: must be the path of the checkpoints' folder"),
    "a checkpoint whose name is too long": (lambda engine: engine.load_checkpoint("/tmp", tag=300 * "a"),
                                            f"CheckpointError: /tmp/{300 * 'a'} can't be read: "),
    "a checkpoint without a place": (lambda engine: engine.save_checkpoint(""),
                                     "ValueError: save_dir must be a non-empty string"),
}


def call_all(rank: int) -> dict[str, str]:
    engine = Job("v-half", 2, 2).engine()
    told = {name: told_by(lambda: call(engine)) for name, (call, _) in CALLS.items()}
    # Without post-validation there is nothing to settle.
    engine.settle()
    assert float(engine.eval_batch(data(engine, 0))) > 0
    assert float(engine.train_batch(data(engine, 0))) > 0
    idle = {key: value for key, value in V_HALF.items() if key != "optimizer"}
    engine = ds_vshape.initialize(model=module_of(idle), config=idle)[0]
    assert float(engine.eval_batch(data(engine, 0))) > 0
    told["no optimizer"] = told_by(lambda: engine.train_batch(data(engine, 0)))
    return told


def test_calls_that_an_engine_refuses() -> None:
    first, second = run_ranks(2, call_all)
    for told in (first, second):
        assert "must provide optimizer during init in order to use backward" in told.pop("no optimizer")
    # A note says on which rank it was.
    assert {name: text.split("; in the ")[0] for name, text in first.items()} == {
        name: text.split("; in the ")[0] for name, text in second.items()}
    for name, (_, message) in CALLS.items():
        assert first[name].startswith(message), name


# -- odd, but right


class Doubled(Block):
    """A block for inputs that are floats, of half its width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x], -1))


def train_oddly(rank: int, job: Job) -> tuple[list[float], float, float]:
    losses = train(job.engine(), range(2)).losses
    floats = Job("v-half", 2, 2, layers=(LayerSpec(Doubled), *specs(4)[1:]))
    of_floats = []
    for wanted in (False, True):
        engine = floats.engine()
        inputs = [torch.ones(2, 3, WIDTH // 2, requires_grad=wanted) for _ in range(2)]
        of_floats.append(float(engine.train_batch(iter([[x, LABELS] for x in inputs]))))
        assert all(x.grad is None for x in inputs), "the data are the caller's"
    return losses, *of_floats


def test_odd_data_that_are_right() -> None:
    """Integers cross two stages before the embedding; inputs want gradients; a pair is a list."""
    layers = (nn.Identity(), lambda x: x, LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *specs(2)[1:])
    job = Job("v-half", 2, 2, layers=layers)
    oracle = PlainTraining(job).train(range(2), 2).losses
    for losses, plain, wanting in run_ranks(2, train_oddly, job):
        assert losses == oracle
        assert plain == wanting
