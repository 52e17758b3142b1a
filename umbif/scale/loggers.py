"""Where curves go, so that a disk that is full or gone costs curves and no training."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from umbif.errors import one_line

log = logging.getLogger("umbif")


class Spared:
    """Before a Lightning logger: what it cannot write is said once, and left out until it can again."""

    called = "TensorBoard"
    failures: tuple[type[Exception], ...] = (OSError,)
    failing: frozenset[str] = frozenset()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Of one step."""
        self.spare(super().log_metrics, metrics, step)  # type: ignore[misc]

    def save(self) -> None:
        """Brings to the disk what waits."""
        self.spare(super().save)  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        """Ends."""
        self.spare(super().finalize, status)  # type: ignore[misc]

    def begin_again(self) -> None:
        """What a writer that has failed needs before it can go on."""

    def spare(self, write: Callable[..., None], *args: Any) -> None:
        """Writes, if that can be done."""
        name = write.__name__
        try:
            write(*args)
            self.failing -= {name}
        except self.failures as error:
            cause = error.__cause__ or error
            if name not in self.failing:
                said = getattr(cause, "strerror", None) or one_line(cause)
                log.warning("%s cannot be written: %s. Training goes on without it", self.called, said)
            self.failing |= {name}
            self.begin_again()


class TensorBoard(Spared, TensorBoardLogger):
    """A folder that `tensorboard --logdir` reads."""

    failures = (OSError, ValueError)  # which Lightning makes of the former

    def begin_again(self) -> None:
        """With a file of its own: the thread that wrote has ended."""
        self._experiment = None
