"""The main job's configs: what they compose to, what is refused before anything starts, and what a dry run shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import train
from omegaconf import OmegaConf
from scale import SHAPES

from ds_vshape.cli import main
from ds_vshape.config.compatibility import check_accepted
from ds_vshape.config.section import KEY, ConfigError, load_ds_config, read_section
from ds_vshape.layouts.composition import CONFIGS, compose_config, compose_job, compose_jobs
from ds_vshape.layouts.job_costs import predict_job
from ds_vshape.layouts.rules import legal_keys
from ds_vshape.schedule.named import ADAPTIVE, SCHEDULES

ROOT = CONFIGS.parent
FILES = sorted(CONFIGS.rglob("*.yaml"))


# -- composition


def test_the_ds_config_is_the_written_one() -> None:
    """That of the three_d layout in bf16 with an adaptive schedule, written out."""
    job = compose_job(["schedule=adaptive", "parallel=three_d", "precision=bf16_sums", "data.micro_batches=4",
                       "optimizer.clipping=1.0", "+deepspeed.steps_per_print=5"])
    assert job.ds_config() == {
        "pipeline_schedule": {"name": "adaptive", "times": "profile", "memory_limit": 0.5},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW",
                      "params": {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 5,
    }
    assert (job.ranks, job.replicas, job.micro_batches) == (8, 2, 4)
    assert compose_job([]).ds_config()["pipeline_schedule"] == {"name": "v-half"}
    assert "pipeline_schedule" not in compose_job(["schedule=deepspeed"]).ds_config()


def test_what_is_left_out_follows() -> None:
    assert compose_job(["parallel.ranks=12", "parallel.tensor=1"]).replicas == 3
    assert compose_job(["data.micro_batches=null", "data.batch=24", "parallel.data=2"]).micro_batches == 6
    assert [host.slots for host in compose_job(["parallel.pipe=5", "machine.slots=2"]).hosts] == [2, 2, 1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_file_is_legal_and_gives_its_reasons(file: Path) -> None:
    group = file.parent.name
    words = {"configs": [], "data": [f"data={file.stem}", f"data.text={ROOT}"], "bench": [f"bench={file.stem}"],
             "precision": [f"precision={file.stem}", "machine=a100", "parallel.zero=1"],
             "model": [f"model={file.stem}", "parallel.pipe=2"]}.get(group, [f"{group}={file.stem}"])
    assert compose_jobs(words, multirun=False)
    if group not in ("configs", "bench"):
        assert all("#" in line for line in file.read_text().splitlines())


def test_the_groups_have_every_schedule_and_the_papers_models() -> None:
    assert {file.stem for file in (CONFIGS / "schedule").iterdir()} == {*SCHEDULES, ADAPTIVE, "deepspeed"}
    for name, shape in SHAPES.items():
        model: Any = OmegaConf.load(CONFIGS / "model" / f"{name.lower()}.yaml")
        assert (model.layers, model.heads, model.hidden, model.vocabulary) == (
            shape.layers, shape.heads, shape.hidden, shape.vocabulary)


def test_every_key_can_be_set() -> None:
    """hydra sets only keys that are there: all that a job knows must be in some file."""
    composed = compose_config("train", ["schedule=adaptive"])
    for key in legal_keys():
        section, _, name = key.rpartition(".")
        if section in ("schedule.trace", "machine.teraflops"):
            continue  # given as a whole
        assert name in (composed[section] if section else composed), key


def test_a_sweep_has_every_combination() -> None:
    jobs = compose_jobs(["schedule=v-half,v-zb", "parallel.pipe=2,4", "model=tiny"], multirun=True)
    assert [(each.job.schedule_name, each.job.parallel.pipe) for each in jobs] == list(
        product(["v-half", "v-zb"], [2, 4]))
    assert jobs[0].overrides == ("schedule=v-half", "parallel.pipe=2", "model=tiny")
    layouts = compose_jobs(["bench=layouts"], multirun=False)
    assert [(each.job.schedule_name, each.job.parallel.pipe, each.job.replicas) for each in layouts] == [
        ("1f1b", 2, 2), ("1f1b", 4, 1), ("v-half", 2, 2), ("v-half", 4, 1)]
    assert len({each.job.micro_batches * each.job.replicas for each in layouts}) == 1


def test_a_users_own_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "mine.yaml").write_text("name: v-min\ndeferred: all\n")
    job = compose_job([f"hydra.searchpath=[file://{tmp_path}]", "schedule=mine"])
    assert job.ds_config()["pipeline_schedule"] == {"name": "v-min", "deferred": "all"}
    (tmp_path / "schedule" / "mine.yaml").write_text("name: v-min\ndefered: all\n")
    with pytest.raises(ConfigError, match="unknown key schedule.defered = 'all': did you mean 'deferred'"):
        compose_job([f"hydra.searchpath=[file://{tmp_path}]", "schedule=mine"])


# -- refusal


REFUSED = {
    "parallel.pip=3": "unknown key parallel.pip = '3': did you mean 'pipe'? Legal: pipe, tensor, data, ranks, zero",
    "+schedule.memroy_limit=0.5": "unknown key schedule.memroy_limit = '0.5': did you mean 'memory_limit'?",
    "modle=tiny": "unknown key modle = 'tiny': did you mean 'model'?",
    "schedule=v-haf": "schedule = 'v-haf': did you mean 'v-half'? Legal: 1f1b, 1f1b-v, adaptive,",
    "schedule.name=v_half": "schedule.name = 'v_half': did you mean 'v-half'?",
    "model=huge": "model = 'huge': Legal: 21b, 38.5b, 9.6b, 98.5b, quickstart, tiny",
    "parallel.pipe=0": "parallel.pipe = 0: must be greater than or equal to 1",
    "parallel.pipe=2.5": "parallel.pipe = 2.5: must be a valid integer",
    "parallel.zero=2": "parallel.zero = 2: must be 0 or 1",
    "precision.dtype=fp8": "precision.dtype = 'fp8': must be 'fp32', 'bf16' or 'fp16'",
    "optimizer.lr=-1": "optimizer.lr = -1: must be greater than 0",
    "batches=many": "batches = 'many': must be a valid integer",
    "port=80": "port = 80: must be greater than or equal to 1024",
    "parallel.ranks=6": "parallel.ranks = 6: must be a multiple of parallel.pipe x parallel.tensor = 4 x 1 = 4",
    "parallel.ranks=8 parallel.data=1": "must be parallel.pipe x parallel.tensor x parallel.data = 4 x 1 x 1 = 4",
    "parallel.tensor=3": "parallel.tensor = 3: must divide model.heads = 4; legal: 1, 2, 4",
    "model.hidden=130": "model.hidden = 130: must be a multiple of model.heads = 4",
    "model.layers=5": "schedule v-half on parallel.pipe = 4 has 8 stages, each of which needs a block, the embedding "
                      "or the head; legal: model.layers from 6 on, or parallel.pipe up to 3",
    "schedule=1f1b parallel.pipe=20": "legal: model.layers from 18 on, or parallel.pipe up to 18",
    "data.batch=15": "data.batch = 15: must be data.micro_batch x data.micro_batches x replicas = 2 x 8 x 1 = 16, or",
    "data.batch=15 data.micro_batches=null": "must be a multiple of data.micro_batch x replicas = 2 x 1",
    "data.micro_batches=null": "data.micro_batches = null: must be a number where data.batch is null too",
    "data=folder": "data.text is missing",
    "data.text=/nowhere": "data.text = '/nowhere': must be a folder with .py files",
    "precision=fp16": "parallel.zero = 0 with precision.dtype = 'fp16': must be 1",
    "precision=bf16_sums": "precision.sums = 'fp32': must be null or 'bf16' with parallel.zero = 0",
    "precision=fp16 parallel.zero=1": "precision.dtype = 'fp16': machine.teraflops has fp32, bf16 only",
    "schedule.memory_limit=0.5": "schedule.memory_limit = 0.5: v-half needs 0.75 of 1F1B's peak",
    "schedule.memory_limit=3.5": "schedule.memory_limit = 3.5: must be bytes like \"70GiB\"",
    "schedule.memory_limit={activations:6GiB}": "schedule.memory_limit.activations = 6442450944 bytes: only an",
    "schedule=adaptive schedule.memory_limit=0.1": "schedule.memory_limit = 0.1: the least possible peak on 4 "
                                                  "ranks with 8 micro-batches is 0.25 of 1F1B's",
    "schedule=zb-h1 schedule.times=profile": "schedule.times = 'profile': zb-h1 has the same order for all times",
    "schedule=deepspeed schedule.times=equal": "schedule.times = 'equal': DeepSpeed's own engine has none",
    "schedule.partition=[0,3,20]": "schedule.partition = [0, 3, 20]: must be 9 rising numbers from 0 to 20",
    "schedule.partition=[0,1,4,6,8,10,12,14,20]": "embedding and positions (0, 1) stay together",
    "schedule.partition=profile": "schedule.partition = 'profile': must be a list of the first layer",
    "hostfile=/nowhere": "hostfile = '/nowhere': No such file or directory",
    "+deepspeed.gradient_clipping=2": "deepspeed.gradient_clipping = 2: this key of the ds_config comes from the other",
    "schedule=v-half,v-zb": "To sweep over it, add --multirun",
    "parallel.pipe": "overrides must be like schedule=v-half or parallel.pipe=4",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_run_is_refused(words: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_jobs(words.split(), multirun=False)
    assert REFUSED[words] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hostfile_must_have_a_slot_for_each_rank(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two hosts\nworker-0 slots=2\nworker-1 slots=3   # one too many\n")
    with pytest.raises(ConfigError, match=r"has 5 slots, and the layout .* has 4 ranks; both must be the same"):
        compose_job([f"hostfile={hostfile}"])
    assert [host.name for host in compose_job([f"hostfile={hostfile}", "parallel.pipe=5"]).hosts] == [
        "worker-0", "worker-1"]
    hostfile.write_text("worker-0\n")
    with pytest.raises(ConfigError, match="the line 'worker-0' must be like 'worker-0 slots=4'"):
        compose_job([f"hostfile={hostfile}"])


def test_one_wrong_job_of_a_sweep_stops_all_of_it() -> None:
    with pytest.raises(ConfigError, match=r"model.layers = 16: .* \(in the job parallel.pipe=16\)"):
        compose_jobs(["parallel.pipe=4,16"], multirun=True)


def test_precisions_are_refused_as_the_engine_refuses_them() -> None:
    """ds_vshape/layouts/rules.py has the rules of ds_vshape/config/compatibility.py without its imports."""
    kinds = ["fp32", "bf16", "fp16"]
    for dtype, sums, zero in product(kinds, ["null", *kinds], [0, 1]):
        words = [f"precision.dtype={dtype}", f"precision.sums={sums}", f"parallel.zero={zero}", "machine=a100"]
        ds_config: dict[str, Any] = {"zero_optimization": {"stage": zero}, KEY: "v-half"}
        if dtype != "fp32":
            ds_config[dtype] = {"enabled": True}
        if sums != "null":
            ds_config["data_types"] = {"grad_accum_dtype": sums}
        refused = []
        for check in (lambda: compose_job(words), lambda: check_accepted(ds_config)):
            try:
                check()
                refused.append(False)
            except ConfigError:
                refused.append(True)
        assert refused[0] == refused[1], words


# -- what train.py says


def run_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    status = train.main()
    return status, *capsys.readouterr()


@pytest.mark.parametrize("words", [["parallel.pip=3"], ["--dry-run", "parallel.pip=3"],
                                   ["--multirun", "parallel.pipe=4,16"], ["machine.slots=2"]])
def test_nothing_starts_where_something_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                 words: list[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "start_all", lambda words: pytest.fail("started"))
    status, output, errors = run_train(monkeypatch, capsys, *words)
    assert (status, output) == (2, "") and errors.startswith("train.py: error: ") and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tells_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                             tmp_path: Path) -> None:
    """Of a layout in three dimensions on two hosts: the cells of one rank by hand."""
    monkeypatch.chdir(tmp_path)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("left slots=4\nright slots=4\n")
    words = ["parallel=three_d", "machine=a100", "precision=bf16", f"hostfile={hostfile}"]
    status, output, _ = run_train(monkeypatch, capsys, "--dry-run", *words)
    assert status == 0
    assert "v-half: 8 ranks = 2 pipeline x 2 data x 2 tensor parallel, on 2 hosts" in output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[:5] for row in cells] == [
        ["0", "0-3", "left", "0, 3", "embedding, blocks 0-3; blocks 12-15, head"],
        ["1", "4-7", "right", "1, 2", "blocks 4-7; blocks 8-11"]]
    # Eight blocks of 12 h^2 shared by two ranks, in bf16, as much for gradients; 12 bytes shared by two replicas.
    half = 8 * 12 * 128 ** 2 / 2
    assert cells[1][5:8] == [f"{2 * half / 2 ** 20:.4g} MiB"] * 2 + [f"{12 * half / 2 / 2 ** 20:.4g} MiB"]
    assert re.search(r"predicted step: [\d.e-]+ s, .* \(bubble [\d.]+%\)", output)
    assert output.splitlines()[-1] == (f"deepspeed --hostfile {hostfile} --master_port 29500 --no_local_rank "
                                       f"{ROOT / 'launch' / 'train_rank.py'} {' '.join(words[:-1])}")
    assert list(tmp_path.iterdir()) == [hostfile]


def test_a_dry_run_of_a_sweep_shows_every_job(monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    status, output, _ = run_train(monkeypatch, capsys, "--multirun", "--dry-run", "schedule=1f1b,v-zb")
    assert status == 0
    assert re.findall("^DS_ACCELERATOR.*$", output, re.MULTILINE) == [
        "DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --hostfile /dev/null --num_gpus 4 --master_port 29500 "
        f"--no_local_rank launch/train_rank.py schedule={name}" for name in ("1f1b", "v-zb")]


@pytest.mark.parametrize("program", [
    "sys.argv = ['train.py', '--dry-run']; import train; sys.exit(train.main())",
    "sys.argv = ['ds_vshape', 'dry-run']; runpy.run_module('ds_vshape', run_name='__main__')",
    "sys.argv = ['ds_vshape', 'layouts', 'search.ranks=1']; runpy.run_module('ds_vshape', run_name='__main__')"])
def test_a_prediction_needs_no_torch(program: str) -> None:
    """So no GPU and no process group either: in a Python that can't import it."""
    code = f"import runpy, sys; sys.modules['torch'] = sys.modules['deepspeed'] = None; {program}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "launch", capture_output=True, text=True)
    assert done.returncode in (0, 1) and "predicted" in done.stdout, done.stderr


# -- what `ds-vshape dry-run` says


def test_a_dry_run_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is written is what is printed: of each job of a sweep, its ranks and the step that was predicted for it."""
    file = tmp_path / "jobs.json"
    words = ["parallel=three_d", "machine=a100", "precision=bf16", "schedule=1f1b,v-half"]
    assert main(["dry-run", "--multirun", "--json", str(file), *words]) == 0
    output = capsys.readouterr().out
    one_f_one_b, v_half = json.loads(file.read_text())
    job = compose_job([*words[:-1], "schedule=v-half"])
    prediction = predict_job(job)
    assert one_f_one_b["schedule"] == "1f1b" and v_half["schedule"] == "v-half"
    assert v_half["ds_config"] == json.loads(json.dumps(job.ds_config()))
    assert [v_half[key] for key in ("stages", "tensor", "data", "micro_batch", "micro_batches")] == [2, 2, 2, 2, 8]
    assert [(rank["ranks"], rank["hosts"], rank["stages"], rank["layers"]) for rank in v_half["ranks"]] == [
        ([0, 1, 2, 3], ["host 0"], [0, 3], [[0, 6], [14, 20]]), ([4, 5, 6, 7], ["host 0"], [1, 2], [[6, 10], [10, 14]])]
    for rank, memory in zip(v_half["ranks"], prediction.memory, strict=True):
        assert rank["memory"] == {**asdict(memory), "total": memory.total}
    assert v_half["metrics"] == {
        "step_s": prediction.seconds, "makespan": prediction.timeline.makespan, "bubble": prediction.bubble,
        "samples_per_second": prediction.samples_per_second, "mfu": prediction.mfu, "fullest": prediction.fullest,
        "fits": True}
    for each in (one_f_one_b, v_half):
        assert f"predicted step: {each['metrics']['step_s']:.4g} s" in output
        assert all(f"{rank['busy']:.1%}" in output for rank in each["ranks"])


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "jobs.json"
    assert main(["dry-run", "machine.memory=0.001", "--json", str(file)]) == 0
    job, = json.loads(file.read_text())
    assert not job["metrics"]["fits"] and "It doesn't fit: " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["parallel.pip=3"], ["--multirun", "parallel.pipe=4,16"], ["schedule=v-haf"],
                                       ["--configs", "/nowhere"], ["--json", "/nowhere/jobs.json"]])
def test_a_dry_run_of_wrong_input_is_one_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["dry-run", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("ds-vshape: error: ")


def test_the_files_of_other_programs_are_legal() -> None:
    for file in ("finetune.json", "trainer.json"):
        section = read_section(load_ds_config(str(CONFIGS / file)))
        assert section is not None and section.name in SCHEDULES
