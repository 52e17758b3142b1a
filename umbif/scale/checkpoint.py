"""When training saves, and what it keeps."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from umbif.ranges import PositiveInt
from umbif.scale import checkpoint_folder as folders
from umbif.scale.ranks import rank
from umbif.scale.saver import Saver
from umbif.scale.watchdog import patience_for

log = logging.getLogger("umbif")


class Checkpoints(Checkpoint):
    """Saves every few steps and at the end, and keeps the newest.

    Args:
        every_n_steps: Optimiser steps between two checkpoints.
        keep: How many to keep; two at least, so that a damaged one has a predecessor.
        keep_every_n_steps: Those of every so many steps are kept for good; null keeps none.
        asynchronous: Write while training goes on, from a copy in the memory of this machine.
        stop_on_failure: End the run where one cannot be written; false goes on, and tries again at the next.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt = 500,
        keep: PositiveInt = 2,
        keep_every_n_steps: PositiveInt | None = None,
        asynchronous: bool = True,
        stop_on_failure: bool = False,
    ) -> None:
        self.every_n_steps, self.keep, self.keep_every_n_steps = every_n_steps, max(2, keep), keep_every_n_steps
        self.saver = Saver(asynchronous, stop_on_failure)
        self.folder: Path | None = None
        self.saved_step = -1
        self.stall_s = 0.0  # that training has waited

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the run's folder."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        trainer.strategy.saver = self.saver
        self.saver.num_siblings = trainer.num_devices

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run does not save again the step that it resumed from."""
        self.saved_step = trainer.global_step
        if trainer.world_size > 1 and trainer.strategy.one_copy:
            log.info("not compared between processes, as each has a part of them: %s", trainer.strategy.one_copy)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Saves at optimiser steps only: in the middle of an accumulation half of a gradient would be lost."""
        start, step = time.perf_counter(), trainer.global_step
        self.saver.poll()
        is_due = step % self.every_n_steps == 0 or trainer.received_sigterm
        if step and is_due and step != self.saved_step:
            self.save(trainer)
        self.stall_s += time.perf_counter() - start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step."""
        if trainer.global_step != self.saved_step:
            loop = trainer.fit_loop.epoch_loop
            if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
                loop._batches_that_stepped -= 1  # going on, Lightning validates first, and counts that as a step
            self.save(trainer)
        with patience_for(trainer, "the last save"):
            self.saver.finish()
        self.prune()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Completes the checkpoint on its way where all processes have agreed to end; else some may be gone."""
        if isinstance(exception, SIGTERMException):
            self.saver.finish()

    def save(self, trainer: pl.Trainer) -> None:
        """Begins a checkpoint of this step, and deletes those that are no longer kept."""
        assert self.folder is not None
        with patience_for(trainer, "a save"):
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step:06d}")
        self.saved_step = trainer.global_step
        self.prune()

    def prune(self) -> None:
        """Deletes what is not kept; one on its way does not count yet."""
        assert self.folder is not None
        if rank() == 0:
            folders.prune(self.folder, self.keep, self.keep_every_n_steps)
