"""What launch/finetune.py is told: options, words and configs in YAML say the same by the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune import arguments

from ds_vshape.config.section import load_ds_config
from ds_vshape.finetuning.composition import NAME, legal_keys
from ds_vshape.finetuning.settings import Settings
from ds_vshape.layouts.composition import CONFIGS, compose_config

WORDS = ["--model", "model", "--output", "output"]
FILE = str(CONFIGS / "finetune.json")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that is told."""
    with pytest.raises(SystemExit):
        arguments(list(words))
    last: str = capsys.readouterr().err.splitlines()[-1]
    return last.removeprefix("finetune.py: error: ")


@pytest.mark.parametrize("words, needed, told", [
    (["--save_every", "2"], ["--checkpoints", "folder"], "save_every = 2: must come with checkpoints"),
    (["--validation", "rows.jsonl"], ["--data", "rows.jsonl"], "validation = rows.jsonl: must come with data"),
    (["--packed"], ["--data", "rows.jsonl"], "packed = True: must come with data"),
    (["warmup=0.1"], ["learning_rate=cosine"], "warmup = 0.1: must come with learning_rate"),
])
def test_an_option_without_effect_is_an_error(words: list[str], needed: list[str], told: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *WORDS, *words) == told
    assert arguments([*WORDS, *words, *needed])


def test_the_config_has_every_setting_with_its_default() -> None:
    composed = compose_config(NAME, [], values={"model": "model", "output": "output"})
    settings = {key: composed[key] for key in Settings.model_fields}
    assert Settings.model_validate(settings) == Settings(model=Path("model"), output=Path("output"))
    for key in legal_keys():
        section, _, name = key.rpartition(".")
        if section != "schedule.trace":  # given as a whole
            assert name in (composed[section] if section else composed), key


def test_the_groups_make_the_ds_config_that_is_written_out_in_json() -> None:
    ds_config: Any = arguments(WORDS).ds_config
    assert ds_config.pop("pipeline_schedule") == {"name": "v-half"}
    assert ds_config.pop("zero_optimization") == {"stage": 0}
    ds_config["optimizer"]["params"]["betas"] = list(ds_config["optimizer"]["params"]["betas"])
    assert {**ds_config, "pipeline_schedule": "v-half"} == load_ds_config(FILE)
    given = arguments([*WORDS, "--deepspeed_config", FILE])
    assert given.ds_config == FILE and given.deepspeed_config == Path(FILE)


def test_options_words_and_configs_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("""
defaults: [finetune, _self_, {override /schedule: v-zb}, {override /monitor: both}]
model: model
output: output
checkpoints: ${output}-checkpoints
packed: true
data: rows.jsonl
optimizer: {lr: 2.0e-5}
""")
    of_config = arguments(["--config", str(tmp_path / "mine.yaml"), "--local_rank=0", "--batches", "7"])
    groups = ["schedule=v-zb", "monitor=both", "optimizer.lr=2e-5"]
    words = ["model=model", "output=output", "checkpoints=output-checkpoints", "packed=true", "data=rows.jsonl",
             "batches=7"]
    options = ["--checkpoints", "output-checkpoints", "--packed", "--data", "rows.jsonl", "--batches", "7"]
    assert of_config == arguments([*words, *groups]) == arguments([*WORDS, *options, *groups])
    config = of_config.ds_config
    assert isinstance(config, dict) and config["pipeline_schedule"] == {"name": "v-zb"}
    assert config["wandb"]["enabled"] and config["tensorboard"]["enabled"]
    changed = arguments(["--config", str(tmp_path / "mine.yaml"), "output=other", "schedule=deepspeed"])
    assert changed.checkpoints == Path("other-checkpoints")
    assert "pipeline_schedule" not in changed.ds_config
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "own.yaml").write_text("name: v-min\n")
    owned: Any = arguments(["--config", str(tmp_path / "mine.yaml"), "schedule=own"]).ds_config
    assert owned["pipeline_schedule"] == {"name": "v-min"}


def test_the_example_is_legal() -> None:
    example: Any = arguments(["--config", str(CONFIGS / "finetune-chat.yaml")])
    assert example.checkpoints == Path(f"{example.output}-checkpoints")
    assert example.ds_config["wandb"]["enabled"] and example.ds_config["zero_optimization"] == {"stage": 1}


@pytest.mark.parametrize("words, told", [
    (["bathces=3"], "unknown key bathces = '3': did you mean 'batches'? Legal: model, output, "),
    (["batch.micro=3"], "unknown key batch.micro = '3': did you mean 'micro_batch'? Legal: micro_batch, micro_batches"),
    (["batches=0"], "batches = 0: must be greater than or equal to 1"),
    (["--batches", "3.5"], "batches = '3.5': must be a valid integer"),
    (["--epochs", "inf"], "epochs = 'inf': must be a finite number"),
    (["--epochs", "2", "batches=3"], "epochs = 2.0 and batches = 3: legal is one of the two"),
    (["--learning_rate", "1e-4"], "learning_rate = '1e-4': must be 'linear', 'cosine', "),
    (["learning_rate=reduce_lr_on_plateau"], "learning_rate = 'reduce_lr_on_plateau': must be 'linear', "),
    (["--attention", "flash"],
     "attention = 'flash': must be 'sdpa', 'eager', 'flash_attention_2' or 'flash_attention_3'"),
    (["schedule=v-haf"], "schedule = 'v-haf': did you mean 'v-half'? Legal: "),
    (["schedule.name=v_half"], "schedule.name = 'v_half': there is no schedule 'v_half'; did you mean 'v-half'?"),
    (["monitor=tensorbord"], "monitor = 'tensorbord': did you mean 'tensorboard'? Legal: both, none, "),
    (["optimizer.lr=-1"], "optimizer.lr = -1: must be greater than 0"),
    (["model=other"], "model is given twice: as --model and as model=other"),
    (["--deepspeed_config", FILE, "schedule=v-zb"], f"schedule=v-zb: with deepspeed_config = {FILE} that file says it"),
    (["--config", "mine.yml"], "--config mine.yml: must be a file *.yaml"),
    (["length"], "Error parsing override 'length': overrides must be like"),
])
def test_what_is_wrong_is_told_in_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *WORDS, *words).startswith(told)


def test_what_is_wrong_in_a_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [finetune, _self_]\nmodle: folder\n")
    told = refused(capsys, "--config", str(mine), *WORDS)
    assert told.startswith("unknown key modle = 'folder': did you mean 'model'?")
    mine.write_text("defaults: [finetune, _self_]\noutput: folder\n")
    assert refused(capsys, "--config", str(mine)) == "model is missing: the chosen config has no value for it"
    assert refused(capsys, "--deepspeed_config", FILE, "--output", "output") == "model is missing"
