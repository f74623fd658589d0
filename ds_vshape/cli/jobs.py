"""`ds-vshape layouts` and `ds-vshape dry-run`: predictions for jobs, before anything is launched."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from ds_vshape.cli.extras import check_installed
from ds_vshape.cli.files import check_writable, write_json
from ds_vshape.cli.progress import progress_bar
from ds_vshape.cli.report import console

GIB = 1024 ** 3

_DRY_RUN = """Shows what a job would do: each pipeline rank with its global ranks, hosts, layers and bytes, and the
predicted step. Overrides choose a file of a group (schedule=v-half) or set a key (parallel.pipe=4)."""
_LAYOUTS = """Ranks layouts, micro-batch sizes and schedules for a number of devices by the predicted step; what doesn't
fit into memory is left out. The section search says what to try (search.ranks=24 search.batch=96); other overrides
are those of dry-run. The model is a GPT of the package, or with --model a Hugging Face model, whose layers are measured
on the meta device."""


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `layouts` and `dry-run` to the command line."""
    layouts = commands.add_parser("layouts", help="rank the layouts of a number of devices", description=_LAYOUTS)
    layouts.set_defaults(run=run_layouts)
    layouts.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face model: a folder with config.json")
    layouts.add_argument("--ranks", type=int, metavar="N", help="devices that every layout must use")
    layouts.add_argument("--memory", metavar="BYTES", help="memory of a device, like 80GiB (default: the machine's)")
    layouts.add_argument("--batch", type=int, metavar="N", help="sequences that every layout must train in a step")
    layouts.add_argument("--length", type=int, metavar="N", help="tokens in a sequence")
    layouts.add_argument("--micro-batch", metavar="N,N", help="sizes of micro-batches to try, like 1,2,4")
    layouts.add_argument("--schedules", metavar="NAME,NAME", help="schedules to try, like 1f1b,v-half")
    dry_run = commands.add_parser("dry-run", help="show what a job would do", description=_DRY_RUN)
    dry_run.add_argument("--multirun", action="store_true",
                         help="a job for each combination of values (parallel.pipe=2,4)")
    dry_run.set_defaults(run=run_dry)
    for parser in (layouts, dry_run):
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what differs from the configs")
        parser.add_argument("--configs", type=Path, metavar="FOLDER",
                            help="where train.yaml, layouts.yaml and their groups are (default: those of the package)")
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")


def run_layouts(arguments: argparse.Namespace) -> int:
    """Search, print the table, and write the file asked for; 1 if nothing fits. Raises ValueError on bad input."""
    _check(arguments)
    if arguments.model is not None:
        check_installed("transformers", "models of Hugging Face need transformers", "models")
    from ds_vshape.layouts.composition import CONFIGS, compose_search, left_out
    from ds_vshape.layouts.job_costs import predict_job
    from ds_vshape.layouts.search import rank_layouts

    search, config, schedules = compose_search([*arguments.overrides, *_overrides(arguments)],
                                               arguments.configs or CONFIGS)
    predict = predict_job
    if arguments.model is not None:
        from ds_vshape.layouts.hugging_face import ModelFolder  # needs torch and transformers

        model = ModelFolder(arguments.model, arguments.length)
        model.costs(search.micro_batch[0], config["precision"]["dtype"], 1)  # one error, instead of one for each layout
        config, predict = {**config, "model": model.section}, model.predict
    with progress_bar("predicting") as progress:
        ranking = rank_layouts(search, config, schedules, progress, predict)
    if arguments.json is not None:
        write_json("--json", arguments.json, ranking.to_json())
    out = console()
    out.print(ranking.table())
    for line in left_out(config["schedule"], schedules):
        out.print(line, highlight=False)
    out.print(f"{ranking.tried} combinations: {ranking.impossible} impossible, {ranking.too_large} above "
              f"{ranking.memory:g} GiB, {len(ranking.found)} ranked.", highlight=False)
    if not ranking.found:
        out.print(ranking.why_nothing(), highlight=False)
    return 0 if ranking.found else 1


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The options of `layouts` as overrides."""
    numbers = {key: getattr(arguments, key) for key in ("ranks", "batch")}
    lists = {key: getattr(arguments, key) for key in ("micro_batch", "schedules")}
    overrides = [f"search.{key}={value}" for key, value in numbers.items() if value is not None]
    overrides += [f"search.{key}=[{value}]" for key, value in lists.items() if value]
    if arguments.memory is not None:
        overrides.append(f"search.memory={_gibibytes(arguments.memory)}")
    if arguments.length is not None:
        overrides.append(f"model.length={arguments.length}")
    return overrides


def _gibibytes(text: str) -> float:
    """"80GiB" or "80 GB" as GiB; ValueError for anything else."""
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = ByteSize(0)
    if size <= 0 or not text.strip()[-1:].isalpha():
        raise ValueError(f"--memory {text!r}: must be bytes with their unit, like 80GiB or 80GB")
    return size / GIB


def run_dry(arguments: argparse.Namespace) -> int:
    """Predict and print each job, and write the file asked for. Raises ValueError on bad input."""
    _check(arguments)
    from ds_vshape.layouts.composition import CONFIGS, compose_jobs
    from ds_vshape.layouts.job_costs import predict_job
    from ds_vshape.layouts.report import job_to_json, print_job

    jobs = [composed.job for composed in compose_jobs(arguments.overrides, arguments.multirun,
                                                      arguments.configs or CONFIGS)]
    predicted = [(job, predict_job(job)) for job in jobs]
    if arguments.json is not None:
        write_json("--json", arguments.json, [job_to_json(job, prediction) for job, prediction in predicted])
    for job, prediction in predicted:
        print_job(job, prediction, console())
    return 0


def _check(arguments: argparse.Namespace) -> None:
    check_installed("hydra", "jobs are composed by hydra", "launch")
    if arguments.json is not None:
        check_writable({"--json": arguments.json}, [])
