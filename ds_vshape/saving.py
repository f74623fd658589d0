"""Checkpoints: whole or not at all, for one placement, and nothing in them is executed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.pipe import engine as stock

from ds_vshape.checkpoints import Layout, check_layout, save_layout
from ds_vshape.commit import Draft, latest, name_latest, whole
from ds_vshape.failures import Agreement, Failure
from ds_vshape.weights_only import weights_only


class SavingEngine(stock.PipelineEngine):  # type: ignore[misc]
    """DeepSpeed's engine with checkpoints of ours; files and their contents are DeepSpeed's."""

    _agreement: Agreement
    # Why this rank couldn't write its part of the checkpoint that is being saved.
    _unsaved: Failure | None = None

    def save_checkpoint(self, save_dir: str, tag: Any = None, client_state: dict[str, Any] | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:
        """Save the training's state, as DeepSpeed's `save_checkpoint`; to be called on every rank.

        Whenever a rank dies, the checkpoint before stays what is loaded. An error on one rank is raised on all (where
        it happened the error itself, elsewhere PipelineError with its text), and training can go on.
        """
        client_state = {} if client_state is None else client_state
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        if not save_dir or self.checkpoint_engine.is_decoupled():
            # The second writes in the background, and has its own way to say when all is there.
            return bool(super().save_checkpoint(save_dir, tag, client_state, save_latest, exclude_frozen_parameters))
        draft = Draft(save_dir, tag)
        keeps_folders = (self.local_rank if self.use_node_local_storage() else self.global_rank) == 0
        if keeps_folders:
            draft.clear()
        super().save_checkpoint(save_dir, draft.name, client_state, False, exclude_frozen_parameters)
        unsaved, self._unsaved = self._unsaved, None
        self._agreement.reach(unsaved, "checkpoint")
        if keeps_folders:
            draft.commit()
        dist.barrier()
        if save_latest and self.global_rank == 0:
            name_latest(save_dir, tag)
        dist.barrier()
        if keeps_folders:
            draft.forget_replaced()
        return True

    def _save_checkpoint(self, save_dir: str, tag: str, *args: Any, **kwargs: Any) -> None:
        def save() -> None:
            if self.local_rank <= 0:
                save_layout(os.path.join(save_dir, tag), Layout.of(self.module), self.global_rank)
            super(SavingEngine, self)._save_checkpoint(save_dir, tag, *args, **kwargs)

        self._attempt_to_save(save)

    def _save_zero_checkpoint(self, save_path: str, tag: str) -> None:
        self._attempt_to_save(lambda: super(SavingEngine, self)._save_zero_checkpoint(save_path, tag))

    def _attempt_to_save(self, save: Callable[[], None]) -> None:
        """The others wait for this rank at the end of their part, so an error of it is kept until then."""
        try:
            save()
        except Exception as error:
            self._unsaved = self._unsaved or self._agreement.failure(error, "save_checkpoint")

    def load_checkpoint(self, load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Load a training's state, as DeepSpeed's `load_checkpoint`; to be called on every rank.

        Raises CheckpointError for optimizer states of another placement, and for files that hold what could be
        executed.
        """
        if tag is None and not self.load_universal_checkpoint():
            tag = latest(load_dir)
        if tag is not None:
            tag = whole(load_dir, str(tag))
        with weights_only():
            path, client_state = super().load_checkpoint(load_dir, tag, *args, **kwargs)
        return path, client_state

    def _load_checkpoint(self, load_dir: str, tag: str, load_optimizer_states: bool = True,
                         load_module_only: bool = False, **kwargs: Any) -> Any:
        if load_optimizer_states and not load_module_only and not self.load_universal_checkpoint():
            check_layout(os.path.join(load_dir, str(tag)), Layout.of(self.module))
        return super()._load_checkpoint(load_dir, tag, load_optimizer_states=load_optimizer_states,
                                        load_module_only=load_module_only, **kwargs)
