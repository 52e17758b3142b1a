"""Checkpoints that are complete or absent.

Everything is written aside in the folder where it will stay (a rename from another file system is a copy that can be
cut off), brought to the disk, and renamed. A manifest of checksums, written last, is what makes one complete.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from umbif.errors import UmbifError
from umbif.files import to_disk
from umbif.ranges import PositiveInt

STATE, MANIFEST = "state.ckpt", "complete.json"
NAME = re.compile(r"step=\d+")
log = logging.getLogger("umbif")


class AtomicCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders for the Trainer."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the folder `path`, whole or not at all.

        Raises:
            UmbifError: The disk has no room or cannot be written; earlier checkpoints stay as they are.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.writing")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            torch.save(checkpoint, aside / STATE)
            to_disk(aside / STATE)
            manifest = {"step": checkpoint["global_step"], "files": {STATE: _fingerprint(aside / STATE)}}
            (aside / MANIFEST).write_text(json.dumps(manifest))
            to_disk(aside / MANIFEST)
            to_disk(aside)
            _put_in_place(aside, path)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when the disk is full
            shutil.rmtree(aside, ignore_errors=True)
            message = f"The checkpoint {path} could not be written: {error}. Earlier ones are intact."
            raise UmbifError(message) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Reads tensors and plain values only, never code."""
        return torch.load(Path(path) / STATE, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint folder."""
        shutil.rmtree(path, ignore_errors=True)


class Checkpoints(Checkpoint):
    """Saves every few steps and at the end, and keeps the newest.

    Args:
        every_n_steps: Optimiser steps between two checkpoints.
        keep: How many to keep; two at least, so that a damaged one has a predecessor.
    """

    def __init__(self, every_n_steps: PositiveInt = 500, keep: PositiveInt = 2) -> None:
        self.every_n_steps, self.keep = every_n_steps, max(2, keep)
        self.folder: Path | None = None
        self.saved_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the run's folder."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run does not save again the step that it resumed from."""
        self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Saves at optimiser steps only: in the middle of an accumulation half of a gradient would be lost."""
        step = trainer.global_step
        if step and step % self.every_n_steps == 0 and step != self.saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step."""
        if trainer.global_step != self.saved_step:
            loop = trainer.fit_loop.epoch_loop
            if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
                loop._batches_that_stepped -= 1  # going on, Lightning validates first, and counts that as a step
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Writes a checkpoint of this step and deletes those that are no longer kept."""
        assert self.folder is not None
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step:06d}")
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            for old in checkpoints(self.folder)[self.keep :]:
                _remove(old)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete or not."""
    found = [path for path in folder.glob("step=*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step=")), reverse=True)


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; damaged ones are named and passed over."""
    for path in checkpoints(folder):
        problem = _problem(path)
        if problem is None:
            return path
        log.warning("Passed over the checkpoint %s: %s", path.name, problem)
    return None


def _remove(old: Path) -> None:
    """A network file system keeps a folder while a file of it is open; no training ends for that."""
    try:
        shutil.rmtree(old)
    except OSError as error:
        log.warning("The old checkpoint %s could not be deleted: %s", old.name, error.strerror)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed save left aside. Only the holder of the run's lock may call it."""
    for leftover in folder.glob(".*.writing"):
        shutil.rmtree(leftover, ignore_errors=True)


def _put_in_place(aside: Path, path: Path) -> None:
    """Renames; a checkpoint that stands there already goes only when the new one has its name."""
    old = path.with_name(f".{path.name}.old.writing")
    if path.exists():
        path.rename(old)
    try:
        aside.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _problem(path: Path) -> str | None:
    try:
        files: Mapping[str, Any] = json.loads((path / MANIFEST).read_text())["files"]
    except (FileNotFoundError, ValueError, KeyError):
        return "it is not complete"
    for name, expected in files.items():
        if not (path / name).is_file() or _fingerprint(path / name) != expected:
            return f"{name} is damaged"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
