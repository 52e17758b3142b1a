"""What a person sees while training runs."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from umbif.progress import LOG_EVERY_S, console, duration, say


class TrainingProgress(Callback):
    """One line that moves on a terminal; in a log file, a line every few seconds."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.start_s = self.said_s = 0.0
        self.start_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From which step it counts."""
        self.start_s = 0.0
        self.start_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Begins with the first batch: a method may have work of its own to do, and to show, before it."""
        if self.start_s:
            return
        self.start_s = self.said_s = time.monotonic()
        if trainer.is_global_zero and sys.stdout.isatty():
            done = BarColumn(bar_width=32), MofNCompleteColumn()
            said, left = TextColumn("{task.fields[said]}"), (TextColumn("left"), TimeRemainingColumn())
            self.bar = Progress(TextColumn("{task.description}"), *done, said, *left, console=console)
            self.bar.start()
            step, total = trainer.global_step, trainer.max_steps
            self.task = self.bar.add_task("Training", total=total, completed=step, said="")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Tells the step, the loss and the time left."""
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        if self.bar is not None and self.task is not None:
            said = self._said(trainer)
            self.bar.update(self.task, completed=trainer.global_step, said=said)
        elif now - self.said_s >= LOG_EVERY_S and trainer.global_step < trainer.max_steps:
            self.said_s = now
            done = max(1, trainer.global_step - self.start_step)
            left = (now - self.start_s) / done * (trainer.max_steps - trainer.global_step)
            step = f"step {trainer.global_step}/{trainer.max_steps}"
            say(f"Training  {step}  {self._said(trainer)}  about {duration(left)} left")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends with the time it took."""
        if self.bar is not None:
            self.bar.stop()
        if trainer.is_global_zero and self.bar is None and self.start_s:
            took, step = duration(time.monotonic() - self.start_s), f"step {trainer.global_step}/{trainer.max_steps}"
            say(f"Training  {step}  {self._said(trainer)}  {took}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the terminal clean."""
        if self.bar is not None:
            self.bar.stop()

    def _said(self, trainer: pl.Trainer) -> str:
        loss = trainer.callback_metrics.get("train/loss")
        return "" if loss is None else f"loss {float(loss):.3f}"
