"""Checkpoints: complete or absent, the same on all ranks, for one placement, and nothing in them is executed.

In DeepSpeed's save_checkpoint and load_checkpoint (runtime/engine.py) ranks wait for each other: when folders are
created and when everything is written; when tied weights are synchronized and when a universal checkpoint's weights are
gathered. If a rank fails before, the others wait forever. So an error is kept until all ranks have reached the same
point, and before each wait all ranks agree to continue.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pickle import UnpicklingError
from typing import Any

from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.utils import logger

from ds_vshape.checkpoint.client_state import ClientState, check_client_state
from ds_vshape.checkpoint.commit import (LATEST, LATEST_UNIVERSAL, Draft, latest, name_latest, new_id, not_found,
                                         resolve_tag)
from ds_vshape.checkpoint.errors import CheckpointError, in_one_line, missing
from ds_vshape.checkpoint.files import Reading, Writing
from ds_vshape.checkpoint.layout import SavedLayout, check_layout, save_layout
from ds_vshape.checkpoint.replicas import OPTIMIZER_STATE, redistribute
from ds_vshape.checkpoint.tags import check_tag
from ds_vshape.checkpoint.training_state import TrainingState
from ds_vshape.checkpoint.universal import check_universal, damaged, parameter_groups
from ds_vshape.checkpoint.weights_only import weights_only
from ds_vshape.comm.channels import PeerLost
from ds_vshape.deepspeed_adapter.engine import StockEngine
from ds_vshape.deepspeed_adapter.optimizers import flat_groups, is_bf16
from ds_vshape.health.failures import Agreement
from ds_vshape.health.meeting import Meeting
from ds_vshape.health.preflight import Facts
from ds_vshape.health.watch import Watch, in_phase

_CHECKPOINT = "checkpoint"
# What DeepSpeed copies into the save_dir for a checkpoint with ZeRO.
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
_SAVE, _LOAD = "save_checkpoint", "load_checkpoint"


class SavingEngine(StockEngine):
    """DeepSpeed's engine with safe checkpoints; the files and their contents are DeepSpeed's."""

    # How many micro-batches have run forward, in training and evaluation.
    _forwards_before: int
    _client_state: ClientState
    _agreement: Agreement
    _watch: Watch
    # Whether any rank has an MoE layer.
    _has_experts: bool
    checkpoint_engine: Any
    # Why this rank couldn't write its part of the checkpoint that is being saved.
    _unsaved: Exception | None = None
    # The tag under which it's written.
    _written: str
    # While a checkpoint is loaded.
    _loading: Meeting | None = None
    _reading: Reading
    _saved_replicas: int

    @in_phase
    def save_checkpoint(self, save_dir: str, tag: Any = None, client_state: dict[str, Any] | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:
        """Save the state of the training, as DeepSpeed's `save_checkpoint`; to be called on every rank.

        If a rank dies or fails at any point, the previous checkpoint remains the latest one. An error on one rank is
        raised on all (on that rank the error itself, on the others PipelineError with its text), and training can
        continue. Raises CheckpointError for a tag that can't name a folder or a client_state that isn't a dictionary,
        and PreflightError if the arguments differ between ranks.

        A member of client_state with a name that DeepSpeed uses doesn't replace the engine's state; load_checkpoint
        returns it.
        """
        if self._has_experts and is_bf16(self.optimizer) and not self.zero_optimization():
            raise CheckpointError("MoE layers with bf16 and without ZeRO: zero_optimization.stage must be 1, DeepSpeed "
                                  "can't load the optimizer states that it would save")
        client_state = {} if client_state is None else client_state
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)

        def facts() -> Facts:
            _check_path("save_dir", save_dir)
            check_client_state(client_state)
            # Hosts may keep their own folders under other names.
            place = None if self.use_node_local_storage() else os.path.realpath(save_dir) if save_dir else save_dir
            return {"save_dir": place and str(place), "tag": tag, "save_latest": bool(save_latest),
                    "exclude_frozen_parameters": bool(exclude_frozen_parameters)}

        self.module.preflight.compare(facts)
        if not save_dir:
            return bool(super().save_checkpoint(save_dir, tag, client_state, save_latest, exclude_frozen_parameters))
        check_tag(tag, (LATEST, LATEST_UNIVERSAL) if save_latest else ())
        if self.checkpoint_engine.is_decoupled():
            # It writes in the background, and has its own way to say when all is there.
            self._on_keepers(partial(self._keep_layout, save_dir, tag))
            self._reach(self._write(save_dir, tag, client_state, save_latest, exclude_frozen_parameters))
            return True
        draft = Draft(str(save_dir), tag, self.module.preflight.gather({"id": new_id()})[0]["id"])
        try:
            self._on_keepers(draft.start)
            self._on_keepers(draft.writing()(partial(self._keep_layout, save_dir, draft.name)))
            error = self._write(save_dir, draft.name, client_state, False, exclude_frozen_parameters)
            self._on_keepers(draft.check)
            self._reach(error)
            self._on_keepers(draft.commit)
            if save_latest:
                self._agreement.run(partial(self._name_latest, str(save_dir), tag), _SAVE)
        except PeerLost:
            raise
        except Exception:
            if self._keeps_folders():
                draft.discard()
            raise
        if self._keeps_folders():
            draft.forget_replaced()
        return True

    def _keeps_folders(self) -> bool:
        return bool((self.local_rank if self.use_node_local_storage() else self.global_rank) == 0)

    def _on_keepers(self, work: Callable[[], None]) -> None:
        """Do `work` on the ranks that keep the folders; collective, and an error is raised on all ranks."""
        self._agreement.run(work if self._keeps_folders() else lambda: None, _SAVE)

    def _keep_layout(self, save_dir: str, tag: str) -> None:
        folder = os.path.join(save_dir, tag)
        os.makedirs(folder, exist_ok=True)
        save_layout(folder, SavedLayout.of(self.module), self.global_rank)

    def _name_latest(self, save_dir: str, tag: str) -> None:
        if self.global_rank == 0:
            name_latest(save_dir, tag)

    def _reach(self, error: Exception | None) -> None:
        self._agreement.reach(None if error is None else self._agreement.failure(error, _SAVE), _CHECKPOINT)

    def _write(self, save_dir: str, tag: str, *args: Any) -> Exception | None:
        """DeepSpeed's save, whose end all ranks reach; returns the error of this rank's part, or None."""
        writing = Writing(self.checkpoint_engine)
        self.checkpoint_engine, self._unsaved, self._written = writing, None, tag
        try:
            super().save_checkpoint(save_dir, tag, *args)
        except Exception as error:
            self._unsaved = self._unsaved or error
        finally:
            self.checkpoint_engine = writing.engine
        return writing.error or self._unsaved

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._attempt_to_save(partial(self._with_client_state, super()._save_checkpoint, *args, **kwargs))

    def _save_moe_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._attempt_to_save(partial(self._with_client_state, super()._save_moe_checkpoint, *args, **kwargs))

    def _with_client_state(self, save: Callable[..., None], *args: Any, client_state: dict[str, Any],
                           **kwargs: Any) -> None:
        save(*args, client_state=self._client_state.to_save(client_state, self._forwards_before), **kwargs)

    def _save_zero_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._attempt_to_save(partial(super()._save_zero_checkpoint, *args, **kwargs))

    def _copy_recovery_script(self, save_path: str) -> None:
        # Copied in place, one that is there already would be cut where the disk is full.
        folder = os.path.join(save_path, self._written)
        super()._copy_recovery_script(folder)
        for script in _SCRIPTS:
            os.replace(os.path.join(folder, script), os.path.join(save_path, script))

    def _attempt_to_save(self, save: Callable[[], None]) -> None:
        """The others wait for this rank at the end of their part, so an error of it is kept until then."""
        try:
            save()
        except Exception as error:
            self._unsaved = self._unsaved or error

    @in_phase
    def load_checkpoint(self, load_dir: str, tag: Any = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None) -> tuple[Any, Any]:
        """Load a training's state, as DeepSpeed's `load_checkpoint`; to be called on every rank.

        All ranks load the checkpoint that rank 0 finds. An error on one rank is raised on all, as CheckpointError, and
        the training's state is then what it was before on all of them. Among the errors are files that are missing, cut
        or of another model, optimizer states of another placement, and files that hold what could be executed.

        As with DeepSpeed, the client_state that is returned also has members of the engine's state; here without the
        optimizer's.
        """
        options = {"load_module_strict": load_module_strict, "load_optimizer_states": load_optimizer_states,
                   "load_lr_scheduler_states": load_lr_scheduler_states, "load_module_only": load_module_only}
        try:
            found = self._find_checkpoint(load_dir, tag, options)
            if found is None:
                logger.warning(f"there is no file {os.path.join(load_dir, LATEST)}, so no checkpoint is loaded: save "
                               "one, or name it by its tag")
                return None, None
            # What all ranks see before one reads, and still see when all have read, is one checkpoint.
            self._reading = self._agreement.run(
                lambda: Reading(self.checkpoint_engine, os.path.join(load_dir, found)), _LOAD)
            with closing(self._reading):
                with Meeting(self._agreement, _LOAD, self._explained):
                    kept = TrainingState(self)
                try:
                    return self._load(load_dir, found, {**options, "custom_load_fn": custom_load_fn})
                except BaseException:
                    kept.restore()
                    raise
        except (CheckpointError, PeerLost):
            raise
        except PipelineError as error:
            # Scripts that catch an error must catch it on all ranks.
            raise CheckpointError(str(error)) from error

    def _find_checkpoint(self, load_dir: str, tag: Any, options: dict[str, Any]) -> str | None:
        """The tag under which all ranks find the checkpoint to load; None if none is asked for and there is none."""
        file = LATEST_UNIVERSAL if self.load_universal_checkpoint() else LATEST
        asked = None if tag is None else str(tag)

        def facts() -> Facts:
            _check_path("load_dir", load_dir)
            return {"tag": asked, **{name: bool(on) for name, on in options.items()}}

        self.module.preflight.compare(facts)
        named = self._agreement.run(lambda: latest(load_dir, file) if asked is None else asked, _LOAD)
        every = [of_rank["tag"] for of_rank in self.module.preflight.gather({"tag": named})]
        first: str | None = every[0]
        if first is None:
            if self.load_universal_checkpoint() or any(every):
                raise CheckpointError(f"rank 0 finds no file {os.path.join(load_dir, file)}" + "".join(
                    f"; on rank {rank} it names {other!r}" for rank, other in enumerate(every) if other is not None))
            return None
        own = self._agreement.run(lambda: resolve_tag(load_dir, first), _LOAD)
        places: list[list[str]] = [of_rank["places"] for of_rank in self.module.preflight.gather({"places": own})]
        lacking = [rank for rank, found in enumerate(places) if not found]
        if lacking:
            raise not_found(load_dir, first, lacking if len(lacking) < len(places) else ())
        for place in places[0]:
            if all(place in found for found in places):
                return place
        raise CheckpointError(f"not all ranks find the checkpoint {first!r} under one name: " + "; ".join(
            f"{' and '.join(found)} on rank {rank}" for rank, found in enumerate(places)))

    def _load(self, load_dir: str, tag: str, options: dict[str, Any]) -> tuple[Any, Any]:
        self.checkpoint_engine = self._reading
        self._loading = Meeting(self._agreement, _LOAD, self._explained)
        try:
            with self._loading, weights_only():
                path, loaded = super().load_checkpoint(load_dir, tag, **options)
                self._reading.check_folder()
                client_state, forwards = self._client_state.from_loaded(loaded, path)
            if forwards is not None and not options["load_module_only"]:
                self._forwards_before = forwards
            # Where ranks have folders of their own, one may be older.
            steps = loaded.get("global_steps", self.global_steps)
            self.module.preflight.compare(lambda: {f"global_steps of {tag}": steps})
        finally:
            self.checkpoint_engine, self._loading = self._reading.engine, None
        return path, client_state

    def _explained(self, error: Exception) -> Exception:
        """What is raised for an error while a checkpoint is loaded."""
        try:
            self._reading.check_folder()
        except CheckpointError as replaced:
            return replaced
        if isinstance(error, CheckpointError):
            return error
        return CheckpointError(f"{self._reading.path} can't be loaded: {in_one_line(error)}")

    def _load_checkpoint(self, load_dir: str, tag: str, load_optimizer_states: bool = True,
                         load_module_only: bool = False, **kwargs: Any) -> Any:
        if load_optimizer_states and not load_module_only and not self.load_universal_checkpoint():
            check_layout(os.path.join(load_dir, tag), SavedLayout.of(self.module))
        try:
            return super()._load_checkpoint(load_dir, tag, load_optimizer_states=load_optimizer_states,
                                            load_module_only=load_module_only, **kwargs)
        except AssertionError as error:
            absent = self._missing_state(load_dir, tag)
            if absent is None:
                raise
            raise absent from error

    def _missing_state(self, load_dir: str, tag: str) -> CheckpointError | None:
        """The error for a file of the ranks' states that isn't there: DeepSpeed only counts them."""
        for number in range(self.mp_world_size):
            path = self.state_file(load_dir, tag, number)
            if not os.path.exists(path):
                return missing(path)
        return None

    def load_module_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As DeepSpeed's; ranks agree before they synchronize tied weights."""
        if self._loading is None:
            super().load_module_state_dict(*args, **kwargs)
            return
        module, state_file = self.module, self._reading.path
        with _without_ties(module):
            try:
                super().load_module_state_dict(*args, **kwargs)
            except CheckpointError:
                raise
            except Exception as error:
                absent = self._missing_layer() if isinstance(error, AssertionError) else None
                cause = absent or self._other_shares(error)
                if cause is None:
                    raise
                raise cause from error
        self._reading.path = state_file
        self._meet()
        module._synchronize_tied_weights()

    def _missing_layer(self) -> CheckpointError | None:
        """The error for a layer's file that isn't there, which DeepSpeed doesn't name."""
        folder = self.folder_of_layers
        for number, layer in enumerate(self.module.forward_funcs):
            if hasattr(layer, "load_state_dict") and not self.module.ckpt_layer_path_list(folder, number):
                return missing(self.module.ckpt_layer_path(folder, number))
        return None

    def _other_shares(self, error: Exception) -> CheckpointError | None:
        """What is raised for a layer that can't be loaded, where another number of tensor parallel ranks saved it:
        DeepSpeed joins and divides the layers of Megatron's GPT alone."""
        folder, now = self.folder_of_layers, self.grid.get_slice_parallel_world_size()
        for number, layer in enumerate(self.module.forward_funcs):
            saved = len(self.module.ckpt_layer_path_list(folder, number))
            if hasattr(layer, "load_state_dict") and saved not in (0, now):
                return CheckpointError(f"{folder} was saved with {saved} tensor parallel ranks, now there are {now}: "
                                       f"must be {saved}, or training must start from weights that were saved whole "
                                       f"({in_one_line(error)})")
        return None

    def _get_all_zero_checkpoints(self, load_dir: str, tag: str) -> Any:
        states = self._of_other_replicas(load_dir, tag) or super()._get_all_zero_checkpoints(load_dir, tag)
        # The optimizer may exchange them with other replicas, where parameters were aligned otherwise.
        self._meet()
        return states

    def _of_other_replicas(self, load_dir: str, tag: str) -> list[Any] | None:
        """The optimizer's state by replica, of this one alone, where another number of replicas has saved; else None.
        """
        now, replica = self.grid.get_data_parallel_world_size(), self.grid.get_data_parallel_rank()
        groups = flat_groups(self.optimizer, now)
        if self._saved_replicas == now or groups is None:
            return None
        files = self.optimizer_files(load_dir, tag, self._saved_replicas)
        parts = [self.checkpoint_engine.load(file, map_location="cpu")[OPTIMIZER_STATE] for file in files]
        own = redistribute(parts, groups, replica)
        return [own if number == replica else None for number in range(now)]

    def _load_zero_checkpoint(self, load_dir: str, tag: str, **kwargs: Any) -> Any:
        if self.load_universal_checkpoint():
            loaded = self._load_universal(load_dir, tag, **kwargs)
        else:
            self._saved_replicas, now = self.replicas_of_checkpoint, self.grid.get_data_parallel_world_size()
            if flat_groups(self.optimizer, now) is not None:
                # DeepSpeed would refuse any other number.
                self.replicas_of_checkpoint = now
            loaded = super()._load_zero_checkpoint(load_dir, tag, **kwargs)
        # The weights of a universal checkpoint are gathered from other replicas.
        self._meet()
        return loaded

    def _load_universal(self, load_dir: str, tag: str, **kwargs: Any) -> Any:
        self._reading.path = folder = os.path.join(load_dir, tag)
        groups = parameter_groups(self.optimizer, self.param_names)
        check_universal(folder, groups)
        try:
            return super()._load_zero_checkpoint(load_dir, tag, **kwargs)
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            culprit = damaged(folder, groups)
            if culprit is None:
                raise
            raise culprit from error

    def _meet(self) -> None:
        if self._loading is not None:
            self._loading.meet()


@contextmanager
def _without_ties(module: Any) -> Iterator[None]:
    """Meanwhile no weight of `module` counts as tied to another rank's."""
    ties, module.tied_comms = module.tied_comms, {}
    try:
        yield
    finally:
        module.tied_comms = ties


def _check_path(name: str, folder: Any) -> None:
    """Raise CheckpointError for an argument `name` that names no folder."""
    if not isinstance(folder, (str, os.PathLike)):
        raise CheckpointError(f"{name} = {folder!r}: must be the path of the checkpoints' folder")
