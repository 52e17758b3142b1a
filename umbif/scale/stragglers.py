"""Which process holds the others up: all wait for the slowest one at every step, and nothing else tells which it is."""

import logging
import socket
import time
from statistics import median_low
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from umbif.ranges import PositiveFloat
from umbif.scale.ranks import all_gather, num_ranks

log = logging.getLogger("umbif")


class Stragglers(Callback):
    """Logs `throughput/slowest`: the encoder's forward on the slowest process over the median of all.

    The forward waits for nobody, where each process has all weights; where they lie in parts, nothing is measured.

    Args:
        factor: From which on a process is named, with its machine.
    """

    def __init__(self, factor: PositiveFloat = 1.5) -> None:
        self.factor = factor
        self.compared_step = 0
        self.clock: ForwardClock | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to measure."""
        if num_ranks() > 1 and not getattr(trainer.strategy, "in_shards", True):
            self.clock = ForwardClock(pl_module.encoder)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Compares at the Trainer's interval."""
        step = trainer.global_step
        if self.clock is None or not self.clock.spans or step == self.compared_step or step % trainer.log_every_n_steps:
            return
        self.compared_step = step
        means_s, hosts = zip(*all_gather((self.clock.mean_s(), socket.gethostname())), strict=True)
        usual_s = median_low(means_s)
        slowest = max(range(len(means_s)), key=means_s.__getitem__)
        pl_module.log("throughput/slowest", means_s[slowest] / usual_s)
        if trainer.is_global_zero and means_s[slowest] > self.factor * usual_s:
            times = means_s[slowest] / usual_s
            log.warning("Process %d on %s is slow: %.1f times the median", slowest, hosts[slowest], times)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves no hook behind."""
        if self.clock is not None:
            self.clock.end()


class ForwardClock:
    """Measures a network's forwards in training; on a GPU by events, for which nothing waits before they are asked.

    Args:
        network: Whose forward is called as a whole.
    """

    def __init__(self, network: nn.Module) -> None:
        self.spans: list[tuple[Any, Any]] = []
        self.begun: Any = None
        self.hooks = [network.register_forward_pre_hook(self._begin), network.register_forward_hook(self._finish)]

    def mean_s(self) -> float:
        """Of those since the last time."""
        spans, self.spans = self.spans, []
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return sum(begun.elapsed_time(ended) for begun, ended in spans) / len(spans) / 1000
        return sum(ended - begun for begun, ended in spans) / len(spans)

    def end(self) -> None:
        """Takes the hooks away."""
        for hook in self.hooks:
            hook.remove()

    def _begin(self, network: nn.Module, *_: Any) -> None:
        self.begun = _now() if network.training else None

    def _finish(self, *_: Any) -> None:
        if self.begun is not None:
            self.spans.append((self.begun, _now()))


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
