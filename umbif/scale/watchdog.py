"""Notices that training stands still, says which process is behind, and ends the run.

A process that waits for another waits for ever, or half an hour. Each tells the others that it lives by a file of its
own in the run folder: the one that has stopped is the one whose file does not change any more.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from umbif.errors import Transient
from umbif.progress import say
from umbif.ranges import PositiveFloat
from umbif.scale.ranks import num_ranks, rank

BEATS = 10  # in the time after which one is missed
PATIENCE = 10  # times as long for what may take long: the first step (compilation), saving, validation
LAST_WORDS_S = 10.0
STEP = "a step"


class Watchdog(Callback):
    """Ends a run that makes no progress.

    Args:
        watchdog_s: Seconds without a step after which a run is ended; ten times as many for the first step, for a
            save and for each batch of a validation.
    """

    def __init__(self, watchdog_s: PositiveFloat = 600.0) -> None:
        self.watchdog_s = watchdog_s
        self.watch: Watch | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins, with patience for the first step."""
        self.watch = Watch(Path(trainer.default_root_dir), self.watchdog_s)
        self._next(trainer, "the first step", PATIENCE)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A micro-step has been taken."""
        self._next(trainer, STEP)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has patience."""
        self._next(trainer, "validation", PATIENCE)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A batch of a validation is progress, too."""
        self._next(trainer, "validation", PATIENCE)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As strict as before."""
        self._next(trainer, STEP)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has patience for the last save; later processes end at times of their own."""
        self._next(trainer, "the last save", PATIENCE)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ends with the training: what called it may live on."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends."""
        if self.watch is not None:
            self.watch.end()

    def _next(self, trainer: pl.Trainer, phase: str, patience: int = 1) -> None:
        if self.watch is not None:
            self.watch.moved(trainer.global_step, phase, patience)


@contextmanager
def patience_for(trainer: pl.Trainer, phase: str) -> Iterator[None]:
    """Around what may take long between two steps."""
    watches = [one.watch for one in trainer.callbacks if isinstance(one, Watchdog) and one.watch is not None]
    for watch in watches:
        watch.moved(trainer.global_step, phase, PATIENCE)
    yield
    for watch in watches:
        watch.moved(trainer.global_step, STEP)


class Beat(NamedTuple):
    """What a process says of itself."""

    number: int
    step: int
    phase: str
    host: str


class Watch:
    """Threads that see what the main one is doing, and say so.

    Args:
        folder: Of the run.
        limit_s: Without progress.
    """

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.limit_s = folder / ".alive", limit_s
        self.own = self._file(rank())
        self.step, self.phase, self.until_s = -1, "", float("inf")
        self.ended = threading.Event()
        self._tell(0)  # at once: of a process that stops before its first beat, nobody would know
        for work in (self._beat, self._watch):  # apart, as a disk may keep a beat waiting for ever
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def moved(self, step: int, phase: str, patience: int = 1) -> None:
        """Progress, and what comes next."""
        self.step, self.phase, self.until_s = step, phase, time.monotonic() + patience * self.limit_s

    def end(self) -> None:
        """Nobody is waited for any more."""
        self.ended.set()
        self.own.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self.ended.wait(self.limit_s / BEATS):
            if self._is_late():
                self._give_up()

    def _beat(self) -> None:
        number = 0
        while not self.ended.wait(self.limit_s / BEATS):
            number += 1
            self._tell(number)

    def _tell(self, number: int) -> None:
        beat, aside = Beat(number, self.step, self.phase, socket.gethostname()), self.own.with_suffix(".writing")
        try:
            self.folder.mkdir(exist_ok=True)
            aside.write_text(json.dumps(beat))
            aside.replace(self.own)
        except OSError:  # the disk may be full or gone: that is for others to say
            return

    def _give_up(self) -> None:
        """Whatever the disk does: a run folder may be what everyone waits for."""
        end = threading.Timer(self.limit_s / 2 + LAST_WORDS_S, os._exit, [Transient.exit_code])
        end.start()
        waited = f"Process {rank()} has waited {self.limit_s:.0f} s or more"
        say(f"umbif: {waited} in {self.phase}, after step {self.step}:", sys.stderr)
        faulthandler.dump_traceback(sys.stderr)
        before = self._beats()
        self.ended.wait(2 * self.limit_s / BEATS)
        if self.ended.is_set() or not self._is_late():  # it was slow, or stopped for a while by a person
            end.cancel()
            return
        before.pop(rank(), None)  # this one answers, whatever becomes of its beats
        for line in suspects(before, self._beats()):
            say(f"umbif: {line}", sys.stderr)
        os._exit(Transient.exit_code)

    def _is_late(self) -> bool:
        return time.monotonic() > self.until_s

    def _beats(self) -> dict[int, Beat]:
        found = {}
        for i in range(num_ranks()):
            try:
                found[i] = Beat(*json.loads(self._file(i).read_text()))
            except (OSError, ValueError, TypeError):
                continue
        return found

    def _file(self, i: int) -> Path:
        return self.folder / f"process-{i:05d}.json"


def suspects(before: dict[int, Beat], now: dict[int, Beat]) -> Iterator[str]:
    """Which processes hold the others up, by what they told at two moments."""
    silent = [i for i in before if i not in now or now[i].number == before[i].number]
    for i in silent:
        yield f"Process {i} on {before[i].host} does not answer: it, or its machine, has stopped."
    last = min((beat.step for beat in now.values()), default=0)
    behind = {i: beat for i, beat in now.items() if beat.step == last}
    if not silent and len(behind) < len(now):
        yield from (f"Process {i} on {beat.host} is behind, in {beat.phase}." for i, beat in behind.items())
