"""ds_vshape/docs/api.md is what its command generates, and nothing public is missing."""

from __future__ import annotations

from api_page import ENGINE_METHODS, PAGE, page
from deepspeed.runtime.pipe.engine import PipelineEngine as StockPipelineEngine

from ds_vshape.config.section import ScheduleConfig
from ds_vshape.engine import PostValidatingEngine

# Called by the engine's own parts.
INTERNAL = {"check_measured", "draw_ahead", "gradient_so_far", "look_at_shapes", "peek", "planned_times", "preflight",
            "refuse_again", "rehearsed", "rollback_bytes", "room"}


def test_the_page_is_what_its_command_generates() -> None:
    assert PAGE.read_text() == page(), "run python tests/docs/api_page.py --write"


def test_the_page_has_every_key() -> None:
    rows = [line.split("|")[1].strip(" `") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows[:len(ScheduleConfig.model_fields)] == list(ScheduleConfig.model_fields)


def test_the_page_has_every_method_that_deepspeeds_engine_has_not() -> None:
    added = {name for name in dir(PostValidatingEngine) if not name.startswith("_")} - set(dir(StockPipelineEngine))
    # What the adapter calls by names of its own is for the engine alone.
    adapted = {name for one in PostValidatingEngine.__mro__ if "deepspeed_adapter" in one.__module__
               for name in vars(one)}
    assert {method.__name__ for method in ENGINE_METHODS} == added - INTERNAL - adapted
