"""SIGTERM ends a training in order: its processes agree after a step, save it together, and leave together.

Lightning's own handler talks to the others from within the signal, and each process leaves where it is: others may then
wait for it (Lightning's issue 20806). Here a signal is only noted, by whichever process it reaches.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from umbif.scale.ranks import any_true_later


class Preemption(Callback):
    """Sets `trainer.received_sigterm` after the same step in all processes; Lightning ends the training there.

    Each step asks, and the next one hears the answer, so that no step waits for it. Where that one validates, the
    training ends a step later: Lightning would end the validation, and not take it up again.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False
        self.step = 0
        self.answer: Callable[[], bool] = lambda: False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before Lightning sets up its handler. Only a training has something to save."""
        trainer._signal_connector._sigterm_notifier_fn = self._note if stage == "fit" else _leave

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From which step it counts."""
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Asks after each step, and not within an accumulation, of which nothing could be saved."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        agreed, self.answer = self.answer(), any_true_later(self.asked)
        loop = trainer.fit_loop
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        trainer._signal_connector.received_sigterm = agreed and (self.agreed or not validates)
        self.agreed = agreed

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves to Lightning what comes after."""
        trainer._signal_connector.__dict__.pop("_sigterm_notifier_fn", None)

    def leave_if_asked(self) -> None:
        """After a training: a signal during its last steps.

        Raises:
            SIGTERMException: It came, to whichever process.
        """
        if any_true_later(self.asked)():
            raise SIGTERMException

    def _note(self, *_: Any) -> None:
        self.asked = True


def _leave(*_: Any) -> None:
    raise SIGTERMException
