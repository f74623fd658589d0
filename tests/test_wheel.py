"""The wheel: all that the package needs is in it, and works in an environment that has no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from ports import free_port
from user_script import write_job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
MODELS = """
from transformers import LlamaConfig
from ds_vshape.finetuning.composition import compose_settings
from ds_vshape.models.hugging_face import pipeline_layers
layers = pipeline_layers(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                     num_attention_heads=2))
settings, ds_config = compose_settings(["model=here", "output=there", "schedule=v-zb"], {})
print(len(layers), ds_config["pipeline_schedule"]["name"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a copy of the checkout, in which it leaves files."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=NOT_COPIED)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "checkout"))
    made, = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel; all that it depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    pip("--python", str(interpreter), "install", "--no-deps", "--no-index", str(wheel))
    packages, = folder.glob("lib/*/site-packages")
    # The path alone: what makes this checkout importable here are lines in files there, which aren't read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True)


def said(python: Path, folder: Path, *words: str) -> str:
    """What the environment's interpreter says in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    done = subprocess.run([str(python), *words], cwd=folder, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "ds_vshape"
    expected = {str(path.relative_to(ROOT)) for kind in ("*.py", "py.typed", "page.*") for path in package.rglob(kind)}
    expected |= {f"ds_vshape/layouts/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


def test_it_is_what_is_imported(python: Path, tmp_path: Path) -> None:
    file = said(python, tmp_path, "-c", "import ds_vshape; print(ds_vshape.__file__)").strip()
    assert Path(file).is_relative_to(python.parents[1])


def test_plans_and_layouts(python: Path, tmp_path: Path) -> None:
    """The configs of the jobs are in it too."""
    plan = ["plan", "--schedule", "v-half", "--stages", "4", "--micro-batches", "8", "--svg", "plan.svg"]
    assert "v-half" in said(python, tmp_path, "-m", "ds_vshape", *plan)
    assert (tmp_path / "plan.svg").read_text().count("</svg>") == 1
    assert "v-zb" in said(python, tmp_path, "-m", "ds_vshape", "dry-run", "model=tiny", "schedule=v-zb")
    said(python, tmp_path, "-m", "ds_vshape", "layouts", "--ranks", "4", "--batch", "8", "--schedules", "v-half",
         "machine=cpu", "model=tiny", "precision=fp32", "--json", "layouts.json")
    assert json.loads((tmp_path / "layouts.json").read_text())["layouts"]


def test_models_and_settings(python: Path, tmp_path: Path) -> None:
    assert said(python, tmp_path, "-c", MODELS).splitlines()[-1] == "5 v-zb"


@pytest.mark.launcher
def test_a_script_trains_and_leaves_a_trace_page(python: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, pipeline_schedule={"name": "v-half", "trace": {"batches": [2, 2], "path": "traces"}})
    said(python, tmp_path, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port()),
         "--module", "ds_vshape.run", *job)
    for rank in range(2):
        losses, engine, *_ = json.loads((tmp_path / f"out{rank}").read_text())
        assert engine == "ds_vshape.engine.engine" and losses[0] > losses[-1]
    page = (tmp_path / "traces" / "batches_2-2.html").read_text()
    for part in ("page.css", "page.js"):
        assert (ROOT / "ds_vshape" / "measure" / "trace" / part).read_text().strip() in page
    assert '"schedule":"v-half"' in page
