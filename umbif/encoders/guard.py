"""Keeps a broken step from the weights: clips the gradient, and drops the one that is not finite or far too large.

One NaN would otherwise leave no finite weight, and one huge gradient undoes days (Chowdhery et al. 2022,
arXiv:2204.02311, section 5.1, skip the batches around a spike as well).
"""

import logging
import math
from collections import deque
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from umbif.encoders.gather import distributed
from umbif.errors import UmbifError
from umbif.stream.exams import Exams

log = logging.getLogger("umbif")
NUM_NORMS = 64  # gradient norms that say what is usual
NUM_BEFORE_SPIKES = 16  # the first steps have no usual yet
LIMIT_STEPS = 1000  # over which skipped steps are counted
MOST_NAMED = 8


class Gradients:
    """What the backward has left, where every process has all of it, or its rows of it.

    An optimiser that keeps gradients elsewhere brings an object of its own that does the same, as `gradients`.
    """

    def __init__(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = [p for p in module.parameters() if p.grad is not None]
        self.optimizer = optimizer

    def norm(self) -> Tensor:
        """Of all of it, the same on all ranks."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Shrinks it to that norm."""
        nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)

    def drop(self) -> None:
        """Leaves the optimiser nothing to step on."""
        self.optimizer.zero_grad(set_to_none=True)


class Guard:
    """Decides about every step, with the same answer on all ranks.

    Args:
        max_norm: Of the gradient, clipped to it.
        spike_factor: A gradient this many times the median of the last ones is dropped; None lets it pass.
        max_skipped: More than this many skipped steps of the last 1000 end the run.
    """

    def __init__(self, max_norm: float, spike_factor: float | None = 20.0, max_skipped: int = 20) -> None:
        self.max_norm, self.spike_factor, self.max_skipped = max_norm, spike_factor, max_skipped
        self.norms: deque[float] = deque(maxlen=NUM_NORMS)
        self.skipped: list[int] = []
        self.accepted = True
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(self, losses: Tensor, exams: Exams) -> None:
        """Remembers what each exam of a micro-batch (B,) added, to name it if the step breaks."""
        self.batches.append((losses.detach(), exams.slot, exams.exam))

    def clip_or_drop(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clips, or drops the gradient so that the optimiser has nothing to step on; returns the norm.

        Raises:
            UmbifError: Too many steps were dropped.
        """
        gradients = getattr(optimizer, "gradients", None) or Gradients(module, optimizer)
        norm = gradients.norm()
        size = float(norm)
        reason = self._reason(size)
        self.accepted = not _on_any_rank(reason != "", next(module.parameters()).device)
        batches, self.batches = self.batches, []
        if math.isfinite(size):
            self.norms.append(size)  # also of a spike: what lasts is usual after a while
        if self.accepted and size > self.max_norm:
            gradients.clip(self.max_norm, norm)
        elif not self.accepted:
            gradients.drop()
            self._tell(module.global_step, reason or "another rank found it broken", batches)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What decides about later steps: a resumed run must decide alike."""
        return {"norms": [*self.norms], "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.norms.extend(state["norms"])
        self.skipped = [*state["skipped"]]

    def _reason(self, norm: float) -> str:
        if not all(bool(losses.isfinite().all()) for losses, _, _ in self.batches):
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if self.spike_factor is None or len(self.norms) < NUM_BEFORE_SPIKES:
            return ""
        usual = median(self.norms)
        return f"the gradient is {norm:.3g}, usual is {usual:.3g}" if norm > self.spike_factor * usual else ""

    def _tell(self, step: int, reason: str, batches: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.skipped = [s for s in self.skipped if s > step - LIMIT_STEPS] + [step]
        message = f"Step {step}: {reason}; the step was skipped. {_names(batches)}"
        log.warning(message)
        if len(self.skipped) > self.max_skipped:
            count = f"{len(self.skipped)} of the last {LIMIT_STEPS} steps were skipped"
            raise UmbifError(f"{count}, the last one for this reason:\n{message}")


def _on_any_rank(broken: bool, device: torch.device) -> bool:
    if not distributed():
        return broken
    flag = torch.tensor(float(broken), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _names(batches: list[tuple[Tensor, Tensor, Tensor]]) -> str:
    """The samples that broke, of all ranks, by their rows: identifiers of people stay out of logs."""
    rows = _of_all_ranks([
        (float(loss), int(slot), int(exam)) for batch in batches for loss, slot, exam in zip(*batch, strict=True)
    ])
    bad = [row for row in rows if not math.isfinite(row[0])]
    what = "Not finite" if bad else "Largest loss"
    largest = max((loss for loss, _, _ in rows), default=0.0)
    named = sorted({row[1:] for row in bad or rows if bad or row[0] == largest})
    return f"{what}: " + ", ".join(f"exam {exam} of the corpus (slot {slot})" for slot, exam in named[:MOST_NAMED])


def _of_all_ranks(own: list[Any]) -> list[Any]:
    if not distributed():
        return own
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return [row for rows in everywhere for row in rows]
