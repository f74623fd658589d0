"""DeepSpeed's private parts are touched in ds_vshape/deepspeed_adapter alone, and checked by name at the start."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from packaging.specifiers import SpecifierSet

from ds_vshape.deepspeed_adapter import parts
from ds_vshape.deepspeed_adapter.versions import TESTED, VersionError

PACKAGE = Path(parts.__file__).parents[1]
ADAPTER = Path(parts.__file__).parent

# What other files may import of DeepSpeed: the module, and the names where not all of it is meant.
IMPORTS: dict[str, tuple[str, ...]] = {
    "deepspeed": (),
    "deepspeed.accelerator": (),
    "deepspeed.comm": (),
    "deepspeed.pipe": (),
    "deepspeed.utils": ("logger",),
    # The error that DeepSpeed's users catch; deepspeed.pipe doesn't have it.
    "deepspeed.runtime.pipe.module": ("PipelineError", "LayerSpec", "TiedLayerSpec"),
    # Documented, and what users make for 3D parallelism.
    "deepspeed.runtime.pipe.topology": ("PipeDataParallelTopology", "PipeModelDataParallelTopology"),
    # Instructions, documented for those who write schedules.
    "deepspeed.runtime.pipe": ("schedule",),
    "deepspeed.runtime.pipe.schedule": (
        "BackwardPass", "BufferOpInstruction", "ForwardPass", "LoadMicroBatch", "OptimizerStep", "PipeInstruction",
        "RecvActivation", "RecvGrad", "ReduceGrads", "ReduceTiedGrads", "SendActivation", "SendGrad"),
    # Tensor parallel layers that users write, and what DeepSpeed builds them from.
    "deepspeed.module_inject": ("set_autotp_mode",),
    "deepspeed.module_inject.layers": (
        "GatherFromTensorParallelRegion", "LinearAllreduce", "LinearAllreduceWithReplicatedInput", "LinearLayer",
        "RowParallel", "SubParamLinearLayer", "VocabParallelEmbedding", "VocabParallelLinear"),
    "deepspeed.sequence.cross_entropy": ("vocab_parallel_cross_entropy",),
}
# Where scripts find DeepSpeed's public classes, which run.py replaces.
WHOLE_MODULES = {"run.py": {"deepspeed", "deepspeed.pipe", "deepspeed.runtime.pipe", "deepspeed.runtime.pipe.module"},
                 "plugin.py": {"deepspeed"}}
# Of DeepSpeed's optimizers; public by their names only.
OPTIMIZER_INTERNALS = {name for place, names in parts.USED.items() if "ptimizer" in place for name in names} - {
    # Our own reports of a step have one too.
    "overflow"} | {"load_hp_checkpoint_state", "grad_accum", "compute_grad_norm", "raise_error_at_min_scale"}
# Names that are our own in these files.
ELSEWHERE: dict[str, set[str]] = {
    # A method of the profiler, which builds single layers.
    "module/layer_times.py": {"_build"},
}


def private_names() -> set[str]:
    """All names with an underscore that DeepSpeed's classes and modules of the parts define."""
    owners = [parts.found(place) for place in (*parts.OVERRIDDEN, *parts.USED)]
    owners += [ZeROOptimizer, FP16_Optimizer, FP16_UnfusedOptimizer]
    sources = {inspect.getsourcefile(owner) for owner in owners}
    sources |= {checkpointing.__file__, str(Path(checkpointing.__file__).parents[2] / "utils" / "tensor_fragment.py")}
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(Path(str(source)).read_text())):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - {"_"}


PRIVATE = private_names()
OVERRIDES = {name for names in parts.OVERRIDDEN.values() for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if ADAPTER not in path.parents)
# The classes that DeepSpeed's engine and module are inherited through.
INHERITING = {"StockEngine", "StockModule", "SavingEngine", "PipelineEngine", "PipelineModule", "PostValidatingEngine",
              "StagePasses", "Keeping", "Messaging", "BatchEnd", "Rehearsal"}


def touched(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of attributes, methods and strings that look like one, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value, node.lineno


def own_names(tree: ast.AST) -> set[str]:
    """What a text's classes have: methods, attributes that they set, and declare."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and (
                isinstance(node.value, ast.Name) and node.value.id == "self"):
            own.add(node.attr)
    return own


def inherits(tree: ast.AST) -> bool:
    """Whether a class in it is derived from DeepSpeed's engine or module."""
    return any(isinstance(base, ast.Name) and base.id in INHERITING
               for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases)


OWN = set().union(*(own_names(tree) for path in FILES if not inherits(tree := ast.parse(path.read_text()))))


def strays(text: str, name: str = "") -> list[str]:
    """The touches in a text outside of the adapter; `name` is its path in the package."""
    tree = ast.parse(text)
    allowed = (OVERRIDES if inherits(tree) else OWN - OVERRIDES) | ELSEWHERE.get(name, set())
    found = {f"{touch}, line {line}" for touch, line in touched(tree)
             if touch in PRIVATE and touch not in allowed or touch in OPTIMIZER_INTERNALS}
    return sorted(found) + [f"import {what}" for what in imported(tree, name)]


def imported(tree: ast.AST, name: str) -> Iterable[str]:
    """What is imported of DeepSpeed and isn't in the lists."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            names = IMPORTS.get(str(node.module), ("nothing",))
            yield from (f"{node.module}.{alias.name}" for alias in node.names if names and alias.name not in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "deepspeed"
                        and alias.name not in WHOLE_MODULES.get(name, {"deepspeed"}))


@pytest.mark.parametrize("path", [str(path.relative_to(PACKAGE)) for path in FILES])
def test_private_parts_are_touched_in_the_adapter_alone(path: str) -> None:
    assert strays((PACKAGE / path).read_text(), path) == []


@pytest.mark.parametrize("text, found", [
    ("from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer",
     ["import deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"]),
    ("import deepspeed.runtime.utils", ["import deepspeed.runtime.utils"]),
    ("engine._running_engine_backward = True", ["_running_engine_backward, line 1"]),
    ("norm = getattr(engine, '_global_grad_norm')", ["_global_grad_norm, line 1"]),
    ("optimizer.averaged_gradients.clear()", ["averaged_gradients, line 1"]),
    ("functions = engine._INSTRUCTION_MAP", ["_INSTRUCTION_MAP, line 1"]),
    # An attribute of our own engine by a name that DeepSpeed's has.
    ("class Parts(StockEngine):\n    def start(self):\n        self._config = None", ["_config, line 3"]),
    ("class Parts(StockEngine):\n    def _next_batch(self):\n        return super()._next_batch()", []),
    ("import deepspeed\nfrom deepspeed.utils import logger\nengine._held", []),
])
def test_touches_are_found(text: str, found: list[str]) -> None:
    assert strays(text) == found


@pytest.mark.parametrize("path", [path for path in sorted(ADAPTER.glob("*.py"))
                                  if path.name not in ("__init__.py", "versions.py")], ids=lambda path: path.name)
def test_each_file_says_with_which_version_it_was_checked(path: Path) -> None:
    told = re.search(r"hecked with DeepSpeed ([\d.]+\d)", ast.get_docstring(ast.parse(path.read_text())) or "")
    assert told and told[1] in SpecifierSet(TESTED["deepspeed"])


def test_the_installed_deepspeed_has_all_parts() -> None:
    parts.check_parts()


@pytest.mark.parametrize("table, place, name", [
    (table, place, names[0]) for table in ("OVERRIDDEN", "USED") for place, names in getattr(parts, table).items()])
def test_a_missing_part_is_named(table: str, place: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = getattr(parts, table) | {place: (name, f"{name}_of_another_version")}
    monkeypatch.setattr(parts, table, renamed)
    with pytest.raises(VersionError, match=f"lacks what ds_vshape builds on: {place.split(':')[1]}."
                                           f"{name}_of_another_version. Install a tested version"):
        parts.check_parts()


def test_a_missing_class_is_named() -> None:
    def find(place: str) -> Any:
        return parts.found(place.replace("PipelineEngine", "Engine"))

    with pytest.raises(VersionError, match="builds on: deepspeed.runtime.pipe.engine:PipelineEngine, "):
        parts.check_parts(find)


def test_methods_are_overridden_that_deepspeed_has() -> None:
    """Every private method that our classes override of DeepSpeed's is in the list."""
    from ds_vshape.engine.post_validation import PostValidatingEngine
    from ds_vshape.module.pipeline_module import PipelineModule

    for ours, places in ((PostValidatingEngine, parts.OVERRIDDEN), (PipelineModule, parts.OVERRIDDEN)):
        bases = [base for base in ours.__mro__ if base.__module__.startswith("deepspeed.")]
        of_deepspeed = {name for base in bases for name in vars(base) if name.startswith("_") and name[:2] != "__"}
        overridden = {name for base in ours.__mro__ if base.__module__.startswith("ds_vshape.")
                      and not base.__module__.startswith("ds_vshape.deepspeed_adapter.")
                      for name in vars(base) if name in of_deepspeed}
        assert overridden <= {name for names in places.values() for name in names} | OVERRIDES
