"""`ds-vshape layouts`: the search against a plain one over the same jobs, its JSON, and what is refused."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ds_vshape.cli import main
from ds_vshape.layouts.composition import CONFIGS, compose_job
from ds_vshape.layouts.job_costs import predict_job
from ds_vshape.layouts.report import GIB
from ds_vshape.schedule.named import SCHEDULES

WORDS = ["search.ranks=4", "search.batch=16", "search.schedules=[1f1b,v-half]", "search.micro_batch=[1,3,2]",
         "model.layers=14"]


def search(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command writes."""
    file = tmp_path / "layouts.json"
    assert main(["layouts", "--json", str(file), *arguments]) == 0
    written: dict[str, Any] = json.loads(file.read_text())
    return written


def test_the_ranking_is_that_of_single_predictions(tmp_path: Path) -> None:
    """Every layout of 4 ranks, composed word by word as for a single job."""
    written = search(tmp_path, *WORDS, "search.memory=30")
    expected = {}
    for pipe, tensor, micro, name in product((1, 2, 4), (1, 2, 4), (1, 3, 2), ("1f1b", "v-half")):
        if 4 % (pipe * tensor) or 16 % (micro * 4 // (pipe * tensor)):
            continue
        words = ["model=9.6b", "model.layers=14", "machine=a100", "precision=bf16_sums", "parallel.zero=1",
                 f"schedule={name}", f"parallel.pipe={pipe}", f"parallel.tensor={tensor}", "parallel.ranks=4",
                 f"data.micro_batch={micro}", "data.micro_batches=null", "data.batch=16"]
        prediction = predict_job(compose_job(words))
        if prediction.fullest <= 30 * GIB:
            expected[name, pipe, tensor, micro] = {
                "step_s": prediction.seconds, "bubble": prediction.bubble, "mfu": prediction.mfu,
                "samples_per_second": prediction.samples_per_second, "fullest": prediction.fullest}
    assert set(written) == {"ranks", "batch", "memory_gib", "impossible", "too_large", "layouts"}
    assert (written["ranks"], written["batch"], written["memory_gib"]) == (4, 16, 30)
    assert written["impossible"] > 0 and written["too_large"] > 0
    # Three ways to share 4 ranks by two, and the three with all on one axis; 3 sizes of micro-batch, 2 schedules.
    assert len(written["layouts"]) + written["impossible"] + written["too_large"] == 6 * 3 * 2
    keys = [(each["schedule"], each["stages"], each["tensor"], each["micro_batch"]) for each in written["layouts"]]
    assert dict(zip(keys, (each["metrics"] for each in written["layouts"]), strict=True)) == expected
    seconds = [each["metrics"]["step_s"] for each in written["layouts"]]
    assert seconds == sorted(seconds)
    assert all(each["stages"] * each["tensor"] * each["data"] == 4
               and each["data"] * each["micro_batch"] * each["micro_batches"] == 16 for each in written["layouts"])


def test_less_memory_leaves_less(capsys: pytest.CaptureFixture[str]) -> None:
    """The table ranks what fits: where 1F1B doesn't any more, a schedule that keeps less does."""
    def rows(memory: float) -> list[list[str]]:
        words = [*WORDS, "search.tensor=[1]", "search.data=[1]", f"search.memory={memory}", "search.show=50"]
        assert main(["layouts", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]

    roomy = rows(80)
    assert [row[0] for row in roomy] == [str(place) for place in range(1, len(roomy) + 1)]
    assert max(float(row[11]) for row in roomy if row[1] == "1f1b") == 1.0
    need = {(row[1], row[5]): float(row[7]) for row in roomy}
    tight = rows((need["1f1b", "2"] + need["v-half", "2"]) / 2)
    assert ("v-half", "2") in {(row[1], row[5]) for row in tight}
    assert ("1f1b", "2") not in {(row[1], row[5]) for row in tight}


def test_keys_for_all_schedules_hold_for_those_that_can_have_them(tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """A search with them is the two searches, of the schedules that can have them and of the others, put together."""
    words = ["search.ranks=4", "search.batch=16", "search.micro_batch=[1]", "search.pipe=[2,4]", "model.layers=14"]
    written = search(tmp_path, *words, "search.schedules=[1f1b,v-half,v-zb,interleaved-zb]", "schedule.chunks=4")
    assert ("schedule.chunks = 4 holds for v-zb, interleaved-zb; 1f1b, v-half can't have it"
            in capsys.readouterr().out)
    can = search(tmp_path, *words, "search.schedules=[v-zb,interleaved-zb]", "schedule.chunks=4")
    others = search(tmp_path, *words, "search.schedules=[1f1b,v-half]")
    assert can["layouts"] and others["layouts"]
    expected = sorted(can["layouts"] + others["layouts"], key=lambda each: each["metrics"]["step_s"])
    assert written["layouts"] == expected


def test_a_key_may_need_another_one(tmp_path: Path) -> None:
    words = ["search.ranks=2", "search.batch=4", "search.micro_batch=[1]", "search.pipe=[2]", "model.layers=14",
             "search.schedules=[1f1b,adaptive]", "schedule.recompute=true", "schedule.times=profile",
             "schedule.planning_seconds=0.2", "schedule.memory_limit=0.75"]
    assert {each["schedule"] for each in search(tmp_path, *words)["layouts"]} >= {"adaptive"}


@pytest.mark.parametrize("word, message", [
    ("schedule.chunks=3", "schedule.chunks = 3: 1f1b has 1 stage on a rank; schedule.chunks = 3: v-zb has"),
    ("schedule.recompute=true", "schedule.recompute = true: must be false without"),
    ("schedule.placement=interleaved", "schedule.placement = 'interleaved': 1f1b has the placement linear"),
])
def test_a_key_that_no_schedule_can_have_is_refused(word: str, message: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layouts", *WORDS[:2], "search.schedules=[1f1b,v-zb]", word]) == 2
    assert message in capsys.readouterr().err


def test_options_may_be_anywhere_among_overrides(tmp_path: Path) -> None:
    words = [*WORDS, "search.pipe=[4]", "search.memory=60"]
    first = search(tmp_path, *words)
    file = tmp_path / "between.json"
    assert main(["layouts", *words[:2], "--json", str(file), *words[2:]]) == 0
    assert json.loads(file.read_text()) == first and first["layouts"]


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["layouts", "--jsn", "file"], ["layouts", *WORDS, "--jsn", "file"], ["plan", "a.json", "b.json"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_where_nothing_fits_the_status_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layouts", *WORDS, "search.memory=0.1"]) == 1
    assert "above 0.1 GiB, 0 ranked" in capsys.readouterr().out


def test_a_schedules_file_is_tried_with_the_keys_of_all(tmp_path: Path) -> None:
    """A limit that v-half doesn't keep on four ranks leaves the other schedule."""
    words = [*WORDS, "search.pipe=[4]", "schedule.memory_limit=0.5", "search.schedules=[v-min,v-half]"]
    assert {each["schedule"] for each in search(tmp_path, *words)["layouts"]} == {"v-min"}


@pytest.mark.parametrize(("arguments", "told"), [
    (["search.rank=8"], "unknown key search.rank = '8': did you mean 'ranks'? Legal: ranks, batch, pipe,"),
    (["search.schedules=[v-haf]"], "search.schedules = 'v-haf': did you mean 'v-half'?"),
    (["search.tensor=[two]"], "search.tensor.0 = 'two': must be a valid integer"),
    (["search.micro_batch=[]"], "search.micro_batch = []"),
    (["search.ranks=0"], "search.ranks = 0: must be greater than or equal to 1"),
    (["model=nobody"], "model = 'nobody': Legal: 21b"),
    (["model"], "overrides must be like schedule=v-half or parallel.pipe=4"),
    (["--configs", "/nowhere"], "--configs /nowhere: has no layouts.yaml; must be a folder of configs"),
    (["--json", "/nowhere/layouts.json"], "--json /nowhere/layouts.json: No such file or directory"),
])
def test_wrong_input_is_one_error(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    assert main(["layouts", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("ds-vshape: error: ") and told in said.err


def test_other_configs_are_found(tmp_path: Path) -> None:
    """A copy of the checkout's, in which the search has another default."""
    for file in CONFIGS.rglob("*.yaml"):
        copy = tmp_path / "configs" / file.relative_to(CONFIGS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text().replace("ranks: 16 ", "ranks: 4 "))
    written = search(tmp_path, "--configs", str(tmp_path / "configs"), "search.schedules=[1f1b]")
    assert written["ranks"] == 4 and written["layouts"]


@pytest.mark.parametrize("command", ["layouts", "dry-run"])
def test_help_says_what_the_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in ("KEY=VALUE", "--configs FOLDER", "--json FILE", "schedule=v-half" if command == "dry-run" else
                 "search.ranks=24"):
        assert word in said


@pytest.mark.parametrize("command", ["layouts", "dry-run"])
def test_without_hydra_the_error_names_the_extra(command: str, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert main([command]) == 2
    assert "hydra, which is not installed: pip install 'ds-vshape[launch]'" in capsys.readouterr().err


def test_every_default_schedule_of_the_search_is_one(tmp_path: Path) -> None:
    written = search(tmp_path, "search.ranks=2", "search.batch=8", "model.layers=6", "search.micro_batch=[1]")
    assert {each["schedule"] for each in written["layouts"]} <= set(SCHEDULES)
