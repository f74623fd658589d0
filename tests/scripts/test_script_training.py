"""What scripts do around DeepSpeed's train_batch: data, groups and settings of their own, and what they read and set.

Each is run on DeepSpeed alone and, as it is, under our schedules; losses are equal bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import RepeatingLoader
from pipelines import BF16_ZERO1, FP32, FP32_ZERO1, SAMPLES, VOCABULARY, cross_entropy, specs
from ports import free_port
from scripted import BATCHES, MICRO_BATCHES, NO_KEY, UNTOUCHED, ds_config, losses, samples, variants
from torch.utils.checkpoint import checkpoint

V_SCHEDULES = ("v-half", "v-zb")


def engine_for(config: dict[str, Any], layers: list[Any] | None = None, compiles: bool = False, **options: Any) -> Any:
    module = deepspeed.pipe.PipelineModule(specs(6) if layers is None else layers, num_stages=2, loss_fn=cross_entropy,
                                           seed_layers=True, partition_method="uniform", **options)
    if compiles:
        module.compile(dynamic=True)
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)[0]


def same(results: dict[Any, list[Any]]) -> None:
    """All variants have DeepSpeed's results on each rank."""
    for schedule, of_ranks in results.items():
        assert of_ranks == results[UNTOUCHED], schedule


# -- data


def tokens(batch: int, count: int = MICRO_BATCHES, length: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(batch)
    drawn = torch.randint(VOCABULARY, (count, SAMPLES, length + 1), generator=generator)
    return [(sample[:, :-1], sample[:, 1:]) for sample in drawn]


def test_micro_batches_drawn_ahead() -> None:
    """Into a list, on the ranks that load something; their lengths change with each batch."""

    def script(config: dict[str, Any]) -> Any:
        engine, found, drawn = engine_for(config, dynamic_shape=True), [], 0
        for batch, length in enumerate((3, 5, 2)):
            engine.reset_activation_shape()
            iterator = None
            if engine.is_first_stage() or engine.is_last_stage():
                items = tokens(batch, length=length)
                drawn += len(items)
                iterator = iter(items)
            found.append(engine.train_batch(iterator).item())
            found.append(engine.eval_batch(None if iterator is None else iter(tokens(7, length=4))).item())
        return found, drawn

    results = variants(script)
    for schedule, of_ranks in results.items():
        assert [found for found, _ in of_ranks] == [found for found, _ in results[UNTOUCHED]], schedule
        assert [drawn for _, drawn in of_ranks] == ([9, 0] if schedule in V_SCHEDULES else [9, 9])


def doubled(batch: Any) -> Any:
    return batch[0], torch.flip(batch[1], [0])


def test_loaders_and_iterators_that_are_set_by_hand() -> None:
    def script(config: dict[str, Any]) -> Any:
        engine = engine_for(config)
        engine.set_dataloader(RepeatingLoader(tokens(0, 5)))
        found = [engine.train_batch().item() for _ in range(BATCHES)]
        engine.data_iterator = iter(tokens(1))
        found.append(engine.train_batch().item())
        engine.set_dataiterator(iter(tokens(2)))
        engine.set_batch_fn(doubled)
        found.append(engine.train_batch().item())
        # What is evaluated is apart from what is trained on.
        engine.data_iterator = iter(tokens(3))
        found.append(engine.eval_batch(iter(tokens(4))).item())
        found.append(engine.train_batch().item())
        engine.set_batch_fn(None)
        return found

    same(variants(script))


# -- groups of the script's own


def test_a_group_of_the_first_and_the_last_rank() -> None:
    """Made after the engine; what its ranks send each other between batches doesn't disturb these."""

    def script(config: dict[str, Any]) -> Any:
        engine = engine_for(config)
        ends = [engine.grid.pp_group[0], engine.grid.pp_group[-1]]
        group, found = dist.new_group(ranks=ends), []
        for batch in range(BATCHES):
            noise = torch.full((2,), float(batch + 10 * engine.global_rank))
            if engine.global_rank in ends:
                dist.broadcast(noise, src=ends[0], group=group)
            found += [noise.tolist(), engine.train_batch(iter(tokens(batch))).item()]
        return found

    same(variants(script))


def test_targets_that_are_sent_from_the_first_to_the_last_stage() -> None:
    """With one stage a rank as it is. Where one rank holds both ends, a script has to look whether they are apart."""

    def script(config: dict[str, Any]) -> Any:
        engine = engine_for(config)
        ends = [engine.grid.pp_group[0], engine.grid.pp_group[-1]]
        group, found = dist.new_group(ranks=ends), []
        for batch in range(BATCHES):
            items = []
            if engine.is_first_stage() or engine.is_last_stage():
                for inputs, labels in tokens(batch):
                    # What is sent must lie in one piece.
                    target = labels.contiguous() if engine.is_first_stage() else torch.zeros_like(labels.contiguous())
                    if not (engine.is_first_stage() and engine.is_last_stage()):
                        dist.broadcast(target, src=ends[0], group=group)
                    items.append((inputs, target))
            found.append(engine.train_batch(iter(items)).item())
        return found

    same(variants(script))


def test_targets_that_nobody_receives() -> None:
    """A script that doesn't check: its first rank waits forever, and all ranks raise an error that says why."""

    def script(config: dict[str, Any]) -> Any:
        engine = engine_for(config)
        ends = [engine.grid.pp_group[0], engine.grid.pp_group[-1]]
        group = dist.new_group(ranks=ends)
        if engine.is_first_stage() or engine.is_last_stage():
            dist.broadcast(torch.zeros(2), src=ends[0], group=group)
        return engine.train_batch(iter(tokens(0))).item()

    waiting, told = variants(script, schedules=({"name": "v-half", "timeout_seconds": 3},)).popitem()[1]
    assert waiting.startswith(("RuntimeError", "PeerLost")), waiting
    assert told.startswith("PeerLost") and "rank 0 in its script" in told
    assert "pipeline rank 0 holds the first and the last stage, and a script must send nothing from the one's" in told


# -- settings


@pytest.mark.quick_cases("True")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_function_by_partial(reentrant: bool) -> None:
    def script(config: dict[str, Any]) -> Any:
        return losses(engine_for(config, activation_checkpoint_interval=1, checkpointable_layers=["Block"],
                                 activation_checkpoint_func=partial(checkpoint, use_reentrant=reentrant)))

    same(variants(script, **FP32_ZERO1))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [FP32, FP32_ZERO1, BF16_ZERO1], ids=["ZeRO-0", "ZeRO-1", "bf16, ZeRO-1"])
def test_a_communication_dtype_set_after_the_start(keys: dict[str, Any]) -> None:
    """Of gradients that replicas add up, where DeepSpeed asks the engine for it; and a scheduler some batches later."""

    def script(config: dict[str, Any]) -> Any:
        engine = engine_for(config)
        engine.communication_data_type = torch.bfloat16
        found = losses(engine)
        basic = engine.basic_optimizer
        engine.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(basic, lambda step: 0.5 ** step)
        found += losses(engine)
        for group in engine.optimizer.param_groups:
            group["lr"] *= 0.1
        return found + losses(engine), engine.get_lr(), str(engine.communication_data_type)

    results = variants(script, ranks=4, schedules=(UNTOUCHED, NO_KEY, "zb-h1", "v-half"), **keys)
    same(results)
    plain = variants(lambda config: losses(engine_for(config)), ranks=4, schedules=(UNTOUCHED,), **keys)[UNTOUCHED]
    assert (results[UNTOUCHED][0][0][:BATCHES] != plain[0]) == (keys is FP32), "the dtype matters where it is asked for"


@pytest.mark.slow
def test_a_module_that_is_compiled() -> None:
    """By inductor, layer by layer, before initialize, with shapes that may change."""

    def script(config: dict[str, Any]) -> Any:
        return losses(engine_for(config, compiles=True))

    results = variants(script, schedules=(UNTOUCHED, NO_KEY, "zb-h1", "v-half"))
    for schedule, of_ranks in results.items():
        for found in of_ranks:
            assert found == pytest.approx(results[UNTOUCHED][0], rel=1e-5), schedule


# -- what is read, and called, beside


def test_what_scripts_ask_an_engine() -> None:
    def script(config: dict[str, Any]) -> Any:
        engine = engine_for(config)
        grid = engine.grid
        found = [engine.is_pipe_parallel, engine.is_data_parallel, engine.num_stages, engine.stage_id,
                 engine.micro_batches, engine.micro_batch_size, engine.train_batch_size(),
                 engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps(),
                 engine.steps_per_print(), engine.get_lr(), engine.get_global_grad_norm(), engine.zero_grad(),
                 engine.get_pipeline_parallel_rank(), engine.mpu is grid, engine.module.mpu() is grid,
                 grid.get_stage_id(), grid.get_pipe_parallel_rank(), grid.get_pipe_parallel_world_size(),
                 grid.get_data_parallel_rank(), grid.get_data_parallel_world_size(), grid.get_global_rank(),
                 grid.stage_to_global(engine.num_stages - 1), grid.pp_group, grid.get_slice_parallel_rank(),
                 engine.module.num_pipeline_stages(), engine.module.topology().get_dim("pipe"),
                 engine.module.num_stages, engine.tput_timer.avg_samples_per_sec(),
                 engine.batch_timer.avg_samples_per_sec(), engine.training, engine.module.training]
        engine.module.eval()
        found.append(engine.train_batch(iter(samples(engine, 0))).item())
        found.append(engine.module.training)
        found.append(engine.eval_batch(iter(samples(engine, 1))).item())
        found.append(engine.module.training)
        engine.module.train()
        engine.monitor.write_events([("Train/own", 1.0, engine.global_samples)])
        engine.set_train_batch_size(2 * 2 * SAMPLES)
        found.append(engine.train_batch(iter(samples(engine, 2, 2 * MICRO_BATCHES))).item())
        found += [engine.global_steps, engine.global_samples, engine.skipped_steps, engine.micro_steps,
                  engine.agg_train_loss.item(), engine.get_additional_losses(), engine.micro_batches,
                  engine.was_step_applied(), engine.loss_scale() if hasattr(engine, "loss_scale") else None]
        return found

    same(variants(script))


def test_evaluations_of_all_kinds() -> None:
    """What is given where the last stage is, and elsewhere."""

    def script(config: dict[str, Any]) -> Any:
        engine, found = engine_for(config), []
        # DeepSpeed can't do this one after a training batch.
        outputs = engine.eval_batch(iter(samples(engine, 0)), compute_loss=False)
        found.append(None if outputs is None else outputs.tolist())
        found += losses(engine)
        loss, logits = engine.eval_batch(iter(samples(engine, 5)), return_logits=True)
        found += [loss.item(), None if logits is None else logits.tolist()]
        loss = engine.eval_batch(iter(samples(engine, 6)), bcast_loss=False)
        found.append(None if loss is None else loss.item())
        parts = engine.eval_batch(iter(samples(engine, 6)), reduce_output=None, bcast_loss=False)
        found.append(None if parts is None else [part.item() for part in parts])
        found.append(engine.eval_batch(iter(samples(engine, 7, 5)), num_micro_batches=5).item())
        return engine.is_last_stage(), found

    results = variants(script)
    oracle = dict(results[UNTOUCHED])
    for schedule, of_ranks in results.items():
        for last, found in of_ranks:
            assert found == oracle[last], schedule


def test_checkpoints_with_a_state_of_the_script() -> None:
    def script(config: dict[str, Any]) -> Any:
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        engine = engine_for(config)
        found = losses(engine)[:1]
        state = {"epoch": 3, "loader": {"position": [1, 2]}, "name": "run"}
        engine.save_checkpoint(folder[0], tag="own", client_state=state, exclude_frozen_parameters=True)
        after = engine.train_batch(iter(samples(engine, 5))).item()
        engine = engine_for(config)
        path, loaded = engine.load_checkpoint(folder[0], tag="own", load_lr_scheduler_states=True)
        again = engine.train_batch(iter(samples(engine, 5))).item()
        return found, after, again, {name: loaded[name] for name in state}, os.path.basename(os.path.dirname(path))

    results = variants(script)
    same(results)
    assert results[UNTOUCHED][0][1] == results[UNTOUCHED][0][2]


def test_a_client_state_with_names_of_deepspeeds_is_saved_again() -> None:
    def script(config: dict[str, Any]) -> Any:
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        engine = engine_for(config)
        losses(engine)
        engine.save_checkpoint(folder[0], tag="own", client_state={"epoch": 3, "global_samples": -1})
        samples_before, engine = engine.global_samples, engine_for(config)
        _, state = engine.load_checkpoint(folder[0], tag="own")
        assert state["epoch"] == 3 and state["global_samples"] == -1
        try:
            saved = engine.save_checkpoint(folder[0], tag="again", client_state=state)
        except KeyError as error:
            saved = str(error)
        return engine.global_samples == samples_before, saved

    for schedule, of_ranks in variants(script).items():
        for counts, saved in of_ranks:
            if schedule in (UNTOUCHED, NO_KEY):
                assert not counts and "reserved checkpoint key" in saved
            else:
                assert counts and saved is True


# -- all of it, through the launcher

SCRIPT = '''
import argparse, json, os
import torch
import torch.distributed as torch_dist
import deepspeed
from deepspeed import comm as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule

class Manual(PipelineModule):
    def __init__(self, *args, split=None, **options):
        self.split = split
        super().__init__(*args, **options)

    def _partition_layers(self, method="uniform"):
        if method != "manual":
            return super()._partition_layers(method)
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = [0, *self.split, len(self._layer_specs)]
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

class Engine(PipelineEngine):
    def train_batch(self, items):
        self.reset_activation_shape()
        return super().train_batch(iter(items) if items is not None else None)

parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--local_rank", type=int)
parser.add_argument("--out")
args = parser.parse_args()
deepspeed.init_distributed("gloo")
deepspeed.runtime.pipe.module.PipelineModule._count_layer_params = lambda self: [1] * len(self._layer_specs)
layers = [LayerSpec(torch.nn.Linear, 6, 6) for _ in range(8)]
net = Manual(layers, num_stages=2, split=[4], partition_method=os.environ["METHOD"], seed_layers=True,
             loss_fn=torch.nn.functional.mse_loss)
calls = []
reduce_gradients = PipelineEngine._INSTRUCTION_MAP[schedule.ReduceGrads]
def counted(self):
    calls.append(1)
    reduce_gradients(self)
PipelineEngine._INSTRUCTION_MAP[schedule.ReduceGrads] = counted
config = json.load(open(args.deepspeed_config))
engine = Engine(args=None, model=net, model_parameters=None, mpu=net.mpu(), config=config,
                config_class=deepspeed.DeepSpeedConfig(config, net.mpu()))
parameters = list(net.parameters())
engine._configure_optimizer(lambda given: torch.optim.SGD(given, lr=0.1), parameters)
engine.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer, 0.5)
group = dist.new_group(ranks=[engine.grid.pp_group[0], engine.grid.pp_group[-1]])
generator = torch.Generator().manual_seed(0)
losses = []
for _ in range(3):
    items = [(torch.randn(2, 6, generator=generator), torch.randn(2, 6, generator=generator), "left out")
             for _ in range(4)]
    if not (engine.is_first_stage() or engine.is_last_stage()):
        items = None
    losses.append(engine.train_batch(items).item())
    seen = torch.tensor([losses[-1]])
    dist.broadcast(seen, src=engine.grid.pp_group[0], group=group)
    assert seen.item() == losses[-1]
with open(args.out + str(torch_dist.get_rank()), "w") as out:
    json.dump([losses, len(calls), type(engine).__name__], out)
'''


def launched(folder: Path, schedule: str | None, *, plainly: bool = False, method: str = "manual") -> list[Any]:
    """The script's output on its two ranks, started as a user starts it."""
    folder.mkdir()
    script, config = folder / "train.py", folder / "ds_config.json"
    script.write_text(SCRIPT)
    config.write_text(json.dumps(ds_config(schedule, optimizer=None, gradient_accumulation_steps=4)))
    command = ["deepspeed", "--num_gpus", "2", f"--master_port={free_port()}",
               *(() if plainly else ("--module", "ds_vshape.run")), str(script), "--deepspeed_config", str(config),
               "--out", str(folder / "out")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "METHOD": method}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output[-4000:]
    return [json.loads((folder / f"out{rank}").read_text()) for rank in range(2)]


@pytest.mark.launcher
@pytest.mark.slow
def test_a_script_with_many_of_these_through_the_launcher(tmp_path: Path) -> None:
    oracle = launched(tmp_path / "plain", None, plainly=True)
    assert oracle[0][1:] == [3, "Engine"]
    for schedule, method in ((None, "manual"), ("zb-h1", "manual"), ("v-half", "parameters")):
        assert launched(tmp_path / str(schedule), schedule, method=method) == oracle, schedule
