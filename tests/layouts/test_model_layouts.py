"""`ds-vshape layouts --model`: what is predicted of Hugging Face models, against engines that train them; what is
ranked, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from ranks import run_ranks
from tiny_model import tiny_config
from transformers import AutoModelForCausalLM

import ds_vshape
from ds_vshape.cli import main
from ds_vshape.layouts.composition import compose_job
from ds_vshape.layouts.hugging_face import ModelFolder
from ds_vshape.layouts.job import Job
from ds_vshape.layouts.prediction import Prediction
from ds_vshape.layouts.rules import read_job
from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.models.hugging_face import TensorParallelLoss, next_token_loss, pipeline_layers
from ds_vshape.models.parallel_layers import tensor_group

LENGTH = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 32},
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# The schedule, and the precision with its stage of ZeRO.
AUTOCAST = "+deepspeed.torch_autocast={enabled: true, dtype: bfloat16}"
WORDS = [["schedule=v-half"], ["schedule=v-zb", "precision=bf16_sums", "parallel.zero=1"],
         ["schedule=1f1b", "parallel.zero=1"], ["schedule=v-zb", "parallel.zero=1", AUTOCAST]]


def config_of(family: str) -> Any:
    return tiny_config(family, layers=6, hidden=64, heads=4, **FAMILIES[family])


def job_of(model: ModelFolder, *words: str) -> Job:
    """Four micro-batches of two sequences on two pipeline ranks."""
    job = compose_job(["machine=cpu", "parallel.pipe=2", "data.micro_batch=2", "data.micro_batches=4", *words])
    return read_job({**job.model_dump(), "model": model.section})


def run(rank: int, folder: Path, jobs: list[tuple[Job, list[int]]]) -> list[tuple[RankMemory, ...]]:
    """What each engine reports that it needs after its third batch."""
    found = []
    for job, partition in jobs:
        ds_config = job.ds_config()
        topology = PipeModelDataParallelTopology(num_pp=job.parallel.pipe, num_dp=1, num_mp=job.parallel.tensor)
        group = tensor_group(topology) if job.parallel.tensor > 1 else None
        module = ds_vshape.PipelineModule(
            pipeline_layers(ModelFolder(folder).config, tensor_group=group), topology=topology,
            loss_fn=TensorParallelLoss(group) if group else next_token_loss, partition_method=partition,
            config=ds_config)
        engine, *_ = ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=ds_config)
        ids = torch.randint(256, (2, LENGTH))
        for _ in range(3):
            engine.train_batch(iter([(ids, ids)] * job.micro_batches))
        found.append(engine.memory_report())
    return found


@pytest.mark.quick_cases("llama")
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_that_of_the_engine(family: str, tmp_path: Path) -> None:
    """Parameters and what belongs to them to 3%, activations to 10%."""
    config_of(family).save_pretrained(tmp_path)
    model = ModelFolder(tmp_path, LENGTH)
    jobs = [job_of(model, *words) for words in WORDS]
    predictions = [model.predict(job) for job in jobs]
    assert_measured(tmp_path, jobs, predictions)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_memory_of_tensor_parallel_ranks_is_that_of_the_engine(family: str, tmp_path: Path) -> None:
    config_of(family).save_pretrained(tmp_path)
    model = ModelFolder(tmp_path, LENGTH)
    jobs = [job_of(model, "parallel.pipe=1", "parallel.tensor=2", *words) for words in WORDS]
    assert_measured(tmp_path, jobs, [model.predict(job) for job in jobs])


def assert_measured(folder: Path, jobs: list[Job], predictions: list[Prediction]) -> None:
    """Two ranks measure what is predicted."""
    measured = run_ranks(2, run, folder, [(job, prediction.training.partition)
                                          for job, prediction in zip(jobs, predictions)], timeout=300)[0]
    for words, prediction, of_ranks in zip(WORDS, predictions, measured, strict=True):
        for ours, theirs in zip(prediction.memory, of_ranks, strict=True):
            told = f"{words}: predicted {ours}, measured {theirs}"
            for part in ("parameters", "gradients", "optimizer"):
                assert getattr(ours, part) == pytest.approx(getattr(theirs, part), rel=0.03), told
            assert ours.activations_peak == pytest.approx(theirs.activations_peak, rel=0.1), told


def test_parameters_are_counted_exactly(tmp_path: Path) -> None:
    """Those of transformers' own model, a tied weight once."""
    for family in FAMILIES:
        config_of(family).save_pretrained(tmp_path / family)
        model = ModelFolder(tmp_path / family, LENGTH)
        prediction = model.predict(job_of(model, "schedule=1f1b", "parallel.pipe=1"))
        expected = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_config(model.config).parameters())
        assert prediction.memory[0].parameters == expected


def search(tmp_path: Path, *words: str) -> dict[str, Any]:
    """What the command writes."""
    file = tmp_path / "layouts.json"
    assert main(["layouts", "--json", str(file), *words]) == 0
    written: dict[str, Any] = json.loads(file.read_text())
    return written


def test_the_ranking_is_that_of_single_predictions(tmp_path: Path) -> None:
    config_of("llama").save_pretrained(tmp_path / "model")
    written = search(tmp_path, "--model", str(tmp_path / "model"), "--ranks", "4", "--batch", "16", "--memory", "1GiB",
                     "--length", str(LENGTH), "--micro-batch", "1,2", "--schedules", "1f1b,v-half", "machine=cpu",
                     "precision=fp32", "search.tensor=[1]")
    assert (written["ranks"], written["batch"], written["memory_gib"], written["too_large"]) == (4, 16, 1, 0)
    assert {(each["stages"], each["micro_batch"]) for each in written["layouts"]} == {
        (pipe, size) for pipe in (1, 2, 4) for size in (1, 2)}
    seconds = [each["metrics"]["step_s"] for each in written["layouts"]]
    assert seconds == sorted(seconds)
    model = ModelFolder(tmp_path / "model", LENGTH)
    for each in written["layouts"]:
        job = job_of(model, f"schedule={each['schedule']}", f"parallel.pipe={each['stages']}",
                     f"parallel.data={each['data']}", f"data.micro_batch={each['micro_batch']}", "parallel.zero=1",
                     f"data.micro_batches={each['micro_batches']}")
        prediction = model.predict(job)
        assert each["metrics"]["step_s"] == prediction.seconds
        assert each["metrics"]["fullest"] == prediction.fullest
        assert each["partition"] == prediction.training.partition
        assert each["partition"][-1] == len(pipeline_layers(model.config))


def test_tensor_parallel_ranks_are_tried_where_the_plan_allows_it(tmp_path: Path) -> None:
    """Llama's does, for as many ranks as there are heads of keys; GPT-2 has none."""
    for family, tensors in (("llama", {1, 2}), ("gpt2", {1})):
        config_of(family).save_pretrained(tmp_path / family)
        written = search(tmp_path, "--model", str(tmp_path / family), "--ranks", "4", "--batch", "8", "--length",
                         str(LENGTH), "--micro-batch", "1", "--schedules", "1f1b", "machine=cpu", "precision=fp32")
        assert {each["tensor"] for each in written["layouts"]} == tensors


def test_a_step_takes_the_flops_of_the_model(tmp_path: Path) -> None:
    """Of one rank, on which nothing waits: three times the products of a forward, of 2 FLOPs a weight and token, and
    3.5 times attention."""
    config = tiny_config("llama", layers=6, hidden=64, heads=4)
    config.save_pretrained(tmp_path)
    model = ModelFolder(tmp_path, LENGTH)
    job = job_of(model, "schedule=1f1b", "parallel.pipe=1")
    tokens = 2 * LENGTH
    weights = sum(parameter.numel() for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters()
                  if parameter.ndim == 2 and "embed" not in name)
    attention = 6 * 4 * tokens * LENGTH * 64
    f, b, w = (0.1e12 * share for share in job.machine.efficiency)
    products = 2 * tokens * weights
    expected = 4 * ((products + attention) / f + (products + 2.5 * attention) / b + products / w)
    assert model.predict(job).timeline.makespan == pytest.approx(expected, rel=1e-9)


def test_where_nothing_is_possible_the_reason_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layouts", "--length", "0", "--ranks", "4"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "no combination is possible; the first: model.length = 0: must be" in said
    assert main(["layouts", "search.pipe=[3]", "--ranks", "4"]) == 1
    assert "is possible; none uses all devices" in " ".join(capsys.readouterr().out.split())


def test_where_nothing_fits_the_least_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of("llama").save_pretrained(tmp_path)
    words = ["layouts", "--model", str(tmp_path), "--ranks", "2", "--batch", "4", "--length", str(LENGTH),
             "machine=cpu", "precision=fp32", "search.tensor=[1]"]
    assert main([*words, "--memory", "3MiB"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    least, told = re.findall(r"Nothing fits into \S+ GiB. The least is ([\d.]+) MiB, with (\S+) on \d pip", said)[0]
    assert told in ("1f1b", "zb-h1", "v-min", "v-half", "v-zb")
    assert re.search(r"most of it, [\d.]+ MiB, is for (activations|optimizer)\.", said)
    assert main([*words, "--memory", f"{float(least) + 0.01}MiB"]) == 0
    assert main([*words, "--memory", f"{float(least) - 0.01}MiB"]) == 1


@pytest.mark.parametrize(("config", "words", "told"), [
    (None, [], "holds no config.json; must be the folder of a Hugging Face model"),
    ("{", [], "--model "),
    ('{"model_type": "nobody"}', [], "nobody"),
    ('{"model_type": "bloom"}', [], "model_type = 'bloom': neither transformers"),
    ('{"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}', [],
     "layouts are those of a training of all weights: must be the folder of the model that was quantized"),
    ('{"model_type": "llama"}', ["--memory", "much"], "--memory 'much': must be bytes with their unit, like 80GiB"),
    ('{"model_type": "llama"}', ["--memory", "80"], "--memory '80': must be bytes with their unit"),
    ('{"model_type": "llama"}', ["--memory=-1GiB"], "--memory '-1GiB': must be bytes"),
    ('{"model_type": "llama"}', ["--ranks", "0"], "search.ranks = 0: must be greater than or equal to 1"),
    ('{"model_type": "llama"}', ["--micro-batch", "two"], "search.micro_batch.0 = 'two'"),
    ('{"model_type": "llama"}', ["--schedules", "v-haf"], "search.schedules = 'v-haf': did you mean 'v-half'?"),
])
def test_wrong_input_is_one_error(config: str | None, words: list[str], told: str, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert main(["layouts", "--model", str(tmp_path), *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("ds-vshape: error: ") and told in said.err
