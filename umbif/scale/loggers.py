"""Where curves go, so that a disk that is full or gone costs curves and no training."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from umbif.errors import UsageError, one_line

log = logging.getLogger("umbif")
PAUSE_S = 60.0


class Spared:
    """Before a Lightning logger: what it cannot write is said once, and left out until it can again."""

    called = ""
    failures: tuple[type[Exception], ...] = (OSError, UsageError)  # the latter of a file that was damaged
    pause_s = PAUSE_S  # after a failure, in which nothing is tried
    is_failing = False
    next_try_s = 0.0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Of one step."""
        self.spare(super().log_metrics, metrics, step)  # type: ignore[misc]

    def save(self) -> None:
        """Brings to the disk what waits."""
        if not self.is_failing:
            self.spare(super().save)  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        """Ends."""
        if not self.is_failing:
            self.spare(super().finalize, status)  # type: ignore[misc]

    def begin_again(self) -> None:
        """What a writer that has failed needs before it can go on."""

    def spare(self, write: Callable[..., Any], *args: Any) -> None:
        """Writes, if that can be done."""
        if time.monotonic() < self.next_try_s:
            return
        try:
            write(*args)
            self.is_failing = False
        except self.failures as error:
            cause = error.__cause__ or error
            if not self.is_failing:
                said = getattr(cause, "strerror", None) or one_line(cause)
                log.warning("%s cannot be written: %s. Training goes on without it", self.called, said)
            self.is_failing, self.next_try_s = True, time.monotonic() + self.pause_s
            self.begin_again()


class TensorBoard(Spared, TensorBoardLogger):
    """A folder that `tensorboard --logdir` reads."""

    called, failures = "TensorBoard", (OSError, ValueError)  # which Lightning makes of the former

    def begin_again(self) -> None:
        """With a file of its own: the thread that wrote has ended."""
        self._experiment = None
        for path in Path(self.log_dir).glob("events.out.tfevents.*"):
            if path.stat().st_size == 0:
                path.unlink(missing_ok=True)

    def add_pictures(self, pictures: Mapping[str, Any], step: int) -> None:
        """(height, width, 3), by their names."""
        for name, picture in pictures.items():
            self.spare(lambda *of: self.experiment.add_image(*of, dataformats="HWC"), name, picture, step)
