"""One training in three loops: what `umbif fit` runs, a bare Lightning Trainer, and a bare loop over batches.

Weights, batches, losses, clipping and optimiser are the same, and so is the last loss: what differs is what watches.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from umbif.fit import make_trainer
from umbif.pretrain.umbif import UMBIF
from umbif.recipe.build import Built, build
from umbif.recipe.compose import Recipe
from umbif.stream.modules import SlotBatches, data_loader

CLIP = 1.0


class Timed(NamedTuple):
    """A loop that has ended.

    Args:
        step_s: Of this process for a step, from its batch to the next one; the first step is left out.
        wall_s: The same of the clock, with what is waited for, such as a disk.
        num_steps: That these are means of.
        last_loss: Of the last step.
    """

    step_s: float
    wall_s: float
    num_steps: int
    last_loss: float


class Saved(NamedTuple):
    """A loop that has saved.

    Args:
        timed: With what its saves cost.
        stall_s: That training has waited, for each of them.
        num_bytes: Of one.
    """

    timed: Timed
    stall_s: float
    num_bytes: int


class Clock(pl.Callback):
    """Times of all steps, as the last callback sees them."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.loss = torch.zeros(())

    def tick(self) -> None:
        """A batch has come."""
        self.times.append((time.process_time(), time.perf_counter()))

    def on_train_batch_start(self, *_: Any) -> None:
        """See `tick`."""
        self.tick()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keeps the loss, and asks nothing of it."""
        self.loss = loss.detach()

    def timed(self) -> Timed:
        """Means over steps."""
        (cpu_s, wall_s), (cpu_end_s, wall_end_s), num = self.times[1], self.times[-1], len(self.times) - 2
        return Timed((cpu_end_s - cpu_s) / num, (wall_end_s - wall_s) / num, num, float(self.loss))


class Bare(pl.LightningModule):
    """What a tutorial would write around the same losses."""

    def __init__(self, module: UMBIF) -> None:
        super().__init__()
        self.module = module
        module.guard.watch = lambda *_: None  # type: ignore[method-assign]

    def training_step(self, exams: Any, batch_idx: int) -> Tensor:
        """The loss."""
        return self.module.losses(exams).total.mean()

    def configure_optimizers(self) -> Any:
        """Those of the recipe."""
        return self.module.configure_optimizers()


def in_umbif(recipe: Recipe, folder: Path) -> Timed:
    """What `umbif fit` does."""
    built, clock = _built(recipe), Clock()
    make_trainer(built.trainer_args, [*built.callbacks.values(), clock], folder, {}).fit(built.model, built.data)
    return clock.timed()


def in_lightning(recipe: Recipe, folder: Path) -> Timed:
    """A Trainer without anything."""
    built, clock = _built(recipe), Clock()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=recipe.tree["trainer"]["max_steps"], max_epochs=-1,
        gradient_clip_val=CLIP, callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder),
    )  # fmt: skip
    trainer.fit(Bare(built.model), _batches(built, recipe))
    return clock.timed()


def in_torch(recipe: Recipe, folder: Path) -> Timed:
    """A loop of ten lines."""
    built, clock = _built(recipe), Clock()
    module = Bare(built.model).train()
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for exams in _batches(built, recipe):
        clock.tick()
        loss = module.training_step(exams, 0)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
    clock.loss = loss.detach()
    return clock.timed()


LOOPS: dict[str, Callable[[Recipe, Path], Timed]] = {
    "umbif fit": in_umbif, "bare Lightning": in_lightning, "bare PyTorch": in_torch,
}  # fmt: skip


def saving(recipe: Recipe, folder: Path, asynchronous: bool) -> Saved:
    """What `umbif fit` does, with checkpoints that are written beside training or at once."""
    built, clock = _built(recipe), Clock()
    checkpoint: Any = built.callbacks["checkpoint"]
    checkpoint.saver.asynchronous = asynchronous
    trainer = make_trainer(built.trainer_args, [*built.callbacks.values(), clock], folder, {})
    trainer.fit(built.model, built.data)
    newest = max((folder / "checkpoints").glob("step=*"))
    num_saves = max(1, trainer.global_step // checkpoint.every_n_steps)
    num_bytes = sum(path.stat().st_size for path in newest.iterdir())
    return Saved(clock.timed(), checkpoint.stall_s / num_saves, num_bytes)


def _batches(built: Built, recipe: Recipe) -> DataLoader[Any]:
    """Those that the recipe's own data would give."""
    slots = SlotBatches(0, built.data.global_batch_size, num_batches=recipe.tree["trainer"]["max_steps"])
    return data_loader(built.data.dataset("train"), slots, num_workers=0)


def _built(recipe: Recipe) -> Built:
    torch.manual_seed(0)
    return build(recipe)
