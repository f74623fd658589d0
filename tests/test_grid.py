"""The search of launch/grid.py against a plain one over the same jobs."""

from __future__ import annotations

import sys
from itertools import product

import grid
import pytest
from composed import compose_config, compose_job
from grid import GIB, Search, find
from job_costs import predict_job
from job_rules import section_of

WORDS = ["search.ranks=4", "search.batch=16", "search.schedules=[1f1b,v-half]", "search.micro_batch=[1,3,2]",
         "model.layers=14"]


def test_the_ranking_is_that_of_single_predictions() -> None:
    """Every layout of 4 ranks, composed word by word as for train.py."""
    config = compose_config("grid", [*WORDS, "search.memory=30"])
    search = section_of(Search, config.pop("search"))
    found, counts = find(search, config)
    expected = {}
    for pipe, tensor, micro, name in product((1, 2, 4), (1, 2, 4), (1, 3, 2), ("1f1b", "v-half")):
        if 4 % (pipe * tensor) or 16 % (micro * 4 // (pipe * tensor)):
            continue
        words = ["model=9.6b", "model.layers=14", "machine=a100", "precision=bf16_sums", "parallel.zero=1",
                 f"schedule={name}", f"parallel.pipe={pipe}", f"parallel.tensor={tensor}", "parallel.ranks=4",
                 f"data.micro_batch={micro}", "data.micro_batches=null", "data.batch=16"]
        prediction = predict_job(compose_job(words))
        if prediction.fullest <= 30 * GIB:
            expected[name, pipe, tensor, micro] = prediction.seconds
    assert counts["impossible"] > 0 and counts["too large"] > 0
    assert counts["tried"] == counts["impossible"] + counts["too large"] + len(found)
    keys = [(each.job.schedule_name, each.job.parallel.pipe, each.job.parallel.tensor, each.job.data.micro_batch)
            for each in found]
    assert dict(zip(keys, (each.prediction.seconds for each in found), strict=True)) == expected
    assert [each.prediction.seconds for each in found] == sorted(expected.values())


def test_less_memory_leaves_less(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table ranks what fits: where 1F1B doesn't any more, a schedule that keeps less does."""
    def rows(memory: float) -> list[list[str]]:
        words = [*WORDS, "search.tensor=[1]", "search.data=[1]", f"search.memory={memory}", "search.show=50"]
        monkeypatch.setattr(sys, "argv", ["grid.py", *words])
        assert grid.main() == 0
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]

    roomy = rows(80)
    assert [row[0] for row in roomy] == [str(place) for place in range(1, len(roomy) + 1)]
    assert max(float(row[11]) for row in roomy if row[1] == "1f1b") == 1.0
    need = {(row[1], row[5]): float(row[7]) for row in roomy}
    tight = rows((need["1f1b", "2"] + need["v-half", "2"]) / 2)
    assert ("v-half", "2") in {(row[1], row[5]) for row in tight}
    assert ("1f1b", "2") not in {(row[1], row[5]) for row in tight}


@pytest.mark.parametrize(("word", "told"), [
    ("search.rank=8", "unknown key search.rank = '8': did you mean 'ranks'? Legal: ranks, batch, pipe,"),
    ("search.schedules=[v-haf]", "search.schedules = 'v-haf': did you mean 'v-half'?"),
    ("search.tensor=[two]", "search.tensor.0 = 'two': must be a valid integer"),
    ("search.micro_batch=[]", "search.micro_batch = []"),
    ("model=nobody", "model = 'nobody': Legal: 21b"),
])
def test_wrong_words_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str,
                                 told: str) -> None:
    monkeypatch.setattr(sys, "argv", ["grid.py", word])
    assert grid.main() == 2
    assert capsys.readouterr().err.startswith(f"grid.py: error: {told}")
