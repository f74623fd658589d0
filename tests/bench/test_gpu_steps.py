"""bench/gpu.py, which is meant for machines that we haven't seen: it ends whatever a step does, and says
what was wrong. With --device cpu all of its steps run here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_kernels
import gpu_training
import pytest
import torch
from gpu_report import of_killed, of_links, of_machine, of_products, of_split, of_training

from ds_vshape.split_backward.kernels import product

# What a user has who has installed torch and deepspeed, and no more, doesn't have.
NOT_NEEDED = ["rich", "hydra", "matplotlib", "numba", "ortools", "transformers", "wandb", "pytest", "hypothesis"]
# Does what its step says, in place of gpu_steps.py: fast, since it imports nothing.
PROGRAM = """
import faulthandler, json, os, signal, sys, time
faulthandler.register(signal.SIGUSR1)
request = json.loads(sys.argv[1])
rank, step = int(os.environ["RANK"]), request["step"]
if step == "raises" and rank == 1:
    raise ValueError("no such kernel")
if step == "hangs" or step == "raises":
    time.sleep(60)
if step == "dies":
    os.kill(os.getpid(), signal.SIGSEGV)
if step == "killed":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit("PeerLost: pipeline rank 1 is lost")
if step != "writes nothing":
    open(request["result"], "w").write(json.dumps([rank, request["device"], request["arguments"]]))
"""


def step(name: str, found: Any = str, **options: Any) -> gpu.Step:
    return gpu.Step(name, name, {"size": 3}, found, "it fails: look", **options)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Run:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(gpu, "AFTER_A_FAILURE", 0.5)
    monkeypatch.setattr(gpu, "LAST_WORDS", 0.5)
    monkeypatch.setattr(gpu, "PATIENCE", {"cpu": 1.0})
    return gpu.Run("cpu", tmp_path, tmp_path / "program.py")


@pytest.mark.slow
def test_the_next_step_follows_whatever_became_of_one(run: gpu.Run, tmp_path: Path) -> None:
    def wrong(results: list[Any]) -> str:
        raise RuntimeError(f"{len(results)} results are wrong")

    run.step(step("works", ranks=2))
    run.step(step("raises", ranks=2))
    run.step(step("hangs", seconds=2))
    run.step(step("dies"))
    run.step(step("writes nothing"))
    run.step(step("is wrong", wrong))
    run.step(step("killed", of_killed, ranks=2, loses_a_rank=True))
    run.minutes = 0
    run.step(step("too late"))
    outcomes = json.loads((tmp_path / "result.json").read_text())
    told = {outcome["name"]: outcome["found"] for outcome in outcomes}
    assert [outcome["state"] for outcome in outcomes] == ["ok"] + 5 * ["failed"] + ["ok", "skipped"]
    assert outcomes[0]["results"] == [[0, "cpu", {"size": 3}], [1, "cpu", {"size": 3}]]
    assert "rank 0 wasn't done within" in told["raises"]
    assert "rank 1 (status 1): ValueError: no such kernel" in told["raises"]
    assert told["hangs"] == "rank 0 wasn't done within 2 s"
    assert "program.py\", line 9 in <module>" in (tmp_path / "hangs.0.log").read_text(), "where it was"
    assert told["dies"] == "rank 0 (status -11): no word"
    assert "writes_nothing.0.json" in told["writes nothing"]
    assert told["is wrong"] == "RuntimeError: 1 results are wrong"
    assert told["killed"] == "rank 1 was killed, and all others ended and said so"
    assert told["too late"] == "no time left: give more --minutes"
    assert [outcome["hint"] for outcome in outcomes] == [""] + 5 * ["it fails: look"] + ["", ""]


@pytest.mark.parametrize("logs, codes, late, told", [
    (["PeerLost: pipeline rank 1 is lost", ""], [1, 1], [], "rank 1 wasn't killed: status 1"),
    (["PeerLost: pipeline rank 1 is lost", ""], [-9, -9], [0], r"ranks \[0\] still ran at the end"),
    (["Watchdog caught collective operation timeout", ""], [-6, -9], [], r"ranks \[0\] don't say that rank 1 is lost"),
])
def test_a_lost_rank_that_isnt_told(logs: list[str], codes: list[int], late: list[int], told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        of_killed([logs, codes, late])


def trained(losses: list[float], **more: Any) -> dict[str, Any]:
    return {"losses": losses, "seconds": [0.3, 0.1, 0.2], "tokens_per_second": 1000.0, "over_simulated": 1.05,
            "predicted_bubble": 0.1, "measured_bubble": 0.12, "predicted_bytes": 2**30, "predicted_total": 2**31,
            **more}


MAIN = """
import sys
from functools import partial
from pathlib import Path
import gpu
gpu.Run = partial(gpu.Run, program=Path(sys.argv.pop(1)))
gpu.main()
"""
# The second step runs until it's killed, with a process of its own.
LASTING = """
import json, os, subprocess, sys, time
request = json.loads(sys.argv[1])
if request["step"] == "machine":
    found = {"torch": "2", "deepspeed": "0", "triton": False, "devices": []}
    open(request["result"], "w").write(json.dumps(found))
else:
    child = subprocess.Popen(["sleep", "600"])
    open(request["result"] + ".draft", "w").write(f"{os.getpid()} {child.pid}")
    os.rename(request["result"] + ".draft", request["result"] + ".started")
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_ends_it_no_rank_is_left(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "lasting.py").write_text(LASTING)
    out = tmp_path / "runs" / "gpu"
    command = [sys.executable, "-c", MAIN, str(tmp_path / "lasting.py"), "--device", "cpu", "--out", str(out)]
    started = out / "products.0.json.started"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        try:
            deadline = time.monotonic() + 60
            while not started.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 1 and errors == "interrupted: what is in the table was done before\n"
    assert "machine  ok" in output.split("\nstep ")[1]
    assert not any(_runs(int(pid)) for pid in started.read_text().split())


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(["options", "told"], [
    (["--ranks", "0"], "--ranks 0: must be at least 1"),
    (["--minutes", "-1"], "--minutes -1.0: must be more than 0"),
    (["--hidden", "1000"], "--hidden 1000: must be a multiple of 64, the width of a head"),
    (["--out", "/dev/null/gpu"], "--out /dev/null/gpu: must be a folder that can be written to: [Errno 20]"),
])
def test_illegal_options(options: list[str], told: str, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as raised:
        gpu.main()
    assert raised.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("run", [gpu_training.first_run, partial(gpu_training.same_again, first={})])
def test_runs_that_must_be_equal_use_no_operator_that_adds_in_any_order(
        run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the backward of torch's fused attention does, unless it's told not to."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def engine_of(*given: Any, **keys: Any) -> Any:
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise InterruptedError("that's all")

    monkeypatch.setattr(gpu_training, "engine_of", engine_of)
    gpt = gpu.Sizes.on("cpu", 1, 64).small
    try:
        with pytest.raises(InterruptedError, match="that's all"):
            run("v-half", gpt, 6, "checkpoint")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_peak_that_could_not_be_predicted() -> None:
    told = of_training(None)([trained([5.0], peak_bytes=2**30, peak_total=2**31, waits={}, predicted_bytes=0)])
    assert "peak over predicted unknown; at most 2.0 GiB" in told


def test_what_trainings_show() -> None:
    on_gpus = [trained([5.0, 4.0], peak_bytes=2**30 * share, peak_total=2**31, waits={"stage_1_and_2.py:7": count})
               for share, count in ((1, 1), (1.5, 2))]
    assert of_training([5.0, 4.0])(on_gpus) == (
        "200.0 ms a batch, 1.050 of the simulated, 1000 tokens/s; bubble 0.120 (0.100 predicted); peak over predicted "
        "1.00, 1.50; at most 2.0 GiB; the host waits 2 times a batch ['stage_1_and_2.py:7']; losses as on one rank, "
        "bit for bit")
    assert of_training([5.0, 4.001])([trained([5.0, 4.0])]).endswith("losses as on one rank, to 2.5e-04")
    for others in ([5.0, 3.0], [5.0, float("nan")]):
        with pytest.raises(RuntimeError, match="losses"):
            of_training([5.0, 4.0])([trained(others)])
    with pytest.raises(RuntimeError, match="losses of the ranks"):
        of_training(None)([trained([5.0, 4.0]), trained([5.0, 3.0])])


def test_what_measurements_show() -> None:
    ways = {"product, then sum": 2.0, "cuBLAS in place": 1.0, "Triton in place": 1.5,
            "Triton in place, 128 x 256": 1.5, "Triton in place, 64 x 64": 1.2}
    assert of_products([[{"size": "9 x 9, 4 tokens", "way": way, "ms": ms} for way, ms in ways.items()]]) == (
        "9 x 9, 4 tokens: 2.00 ms, cuBLAS in place 0.50, Triton in place 0.75, best tiling 64 x 64")
    assert of_split([[{"hidden": 4096, "contender": name, "over_unsplit": ratio}
                      for name, ratio in (("unsplit", 1.0), ("ours", 1.01))]]) == "hidden 4096: ours 1.010"
    links = [{"large_bytes": 10**9, "seconds": {"0 to 1, small": small, "0 to 1, large": 0.1}}
             for small in (1e-5, 2e-5)]
    assert of_links(links) == "a message takes 20 to 20 us, 10.0 to 10.0 GB/s"


# -- what runs on a GPU alone, with stand-ins for what only a GPU answers


def test_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0,
                                 multi_processor_count=132)
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_properties", properties)):
        assert callable(getattr(torch.cuda, name))
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    told = of_machine([json.loads(json.dumps(gpu_kernels.machine("cuda")))])
    assert told.startswith("2 x NVIDIA H100 (80 GiB); torch ") and "NCCL 2.27.5" in told


def test_every_way_to_add_a_product_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: launched.append((options["ROWS"], options["COLUMNS"]))

    monkeypatch.setattr(product, "with_even", Kernel())
    sums, left, right = (torch.empty(size, device="meta", dtype=dtype) for size, dtype in (
        ((4096, 4096), torch.float32), ((4096, 64), torch.bfloat16), ((64, 4096), torch.bfloat16)))
    for name, add in gpu_kernels.ways_to_add("cuda").items():
        if name != "product, then sum":
            add(sums, left, right)
    assert launched == [(128, 256), *((tiling.rows, tiling.columns) for tiling in product.TILINGS)]


def test_waits_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Engine:
        def train_batch(self, data: Any) -> None:
            for _ in data:
                warnings.warn("called a synchronizing CUDA operation (function warn)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    line = Engine.train_batch.__code__.co_firstlineno + 2
    assert gpu_training.waits(Engine(), [1, 2, 3]) == {f"test_gpu_steps.py:{line}": 3}
    assert modes == ["warn", "default"]


@pytest.mark.slow
def test_all_steps_on_a_cpu_with_torch_and_deepspeed_alone(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for name in NOT_NEEDED:
        (missing / name).mkdir(parents=True)
        (missing / name / "__init__.py").write_text(f"raise ImportError('{name} is not installed')\n")
    out = tmp_path / "runs" / "gpu"
    environment = {**os.environ, "PYTHONPATH": str(missing), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(gpu.ROOT / "bench" / "gpu.py"), "--device", "cpu", "--ranks", "2"],
                          cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)
    outcomes = json.loads((out / "result.json").read_text())
    assert done.returncode == 0, [outcome for outcome in outcomes if outcome["state"] != "ok"]
    assert [outcome["name"] for outcome in outcomes] == [
        "machine", "products", "split", "1f1b on 1", "v-half on 1", "v-zb on 1", "first run", "same again", "links",
        "v-half on 2", "v-zb on 2", "killed rank"]
    assert {outcome["state"] for outcome in outcomes} == {"ok"}
    table = done.stdout.split("\nstep ")[1]
    assert "losses as on one rank, bit for bit" in " ".join(table.split()) and str(out / "result.json") in table
    assert not (out / "checkpoint").exists()


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(gpu.ROOT / "bench" / "gpu.py"), "--out", str(tmp_path)],
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300)
    outcome, = json.loads((tmp_path / "result.json").read_text())
    assert done.returncode == 1 and outcome["state"] == "failed"
    assert ": RuntimeError: torch finds no GPU: " in outcome["found"], "and why"
    assert "no GPU is found: nvidia-smi, CUDA_VISIBLE_DEVICES" in " ".join(done.stdout.split())
