"""A piece of work that raises on one rank raises on all of them."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology
from ranks import run_ranks

from ds_vshape.health.failures import Agreement
from ds_vshape.health.names import rank_names


def agree(rank: int, failing: list[set[int]]) -> list[str]:
    """What each piece of work returns or raises on this rank; each fails on a set of ranks."""
    names = rank_names(["here", "there"], PipeDataParallelTopology(num_pp=2, num_dp=1))
    agreement = Agreement(names[rank])
    outcomes = []
    for ranks in failing:
        def work(ranks: set[int] = ranks) -> str:
            if rank in ranks:
                raise OSError(28, f"No space left on {rank}")
            return f"done on {rank}"

        try:
            outcomes.append(agreement.run(work, "load"))
        except Exception as error:
            outcomes.append("; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
    return outcomes


def test_an_error_of_one_is_an_error_of_all() -> None:
    first, second = run_ranks(2, agree, [set(), {1}, {0, 1}, set()])
    assert (first[0], second[0]) == (first[3], second[3]) == ("done on 0", "done on 1")
    there = "load on pipeline rank 1, replica 0 (global rank 1 on there)"
    told = f"{there}: OSError: [Errno 28] No space left on 1"
    assert first[1] == f"PipelineError: {told}"
    assert second[1] == f"OSError: [Errno 28] No space left on 1; in the {there}; no rank counts this load"
    assert first[2].startswith("OSError: [Errno 28] No space left on 0; in the load on pipeline rank 0, ")
    assert first[2].endswith(f"; and in the {told}")


def test_names_with_tensor_parallel_ranks() -> None:
    topology: Any = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    names = rank_names([f"host-{rank // 4}" for rank in range(8)], topology)
    assert str(names[7]) == "pipeline rank 1, replica 1, tensor parallel rank 1 (global rank 7 on host-1)"
    assert len(set(names)) == 8
