"""How encoders are trained: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), warm-up and cosine, and a guard.

The guard is the one place where gradients are clipped. A step whose gradient is not finite is not taken, the samples
are named, and too many of them end the run: one NaN would otherwise leave no finite weight.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from umbif.errors import UmbifError
from umbif.stream.exams import Exams

log = logging.getLogger("umbif")


def adamw(
    named: Sequence[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    warmup_steps: int,
    max_steps: int,
    without: set[str],
    lr_factor: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Fused AdamW with its schedule, as Lightning takes it.

    Args:
        named: Parameters.
        lr: Learning rate at the end of the warm-up.
        weight_decay: Of matrices: not of norms, biases, and the names in `without`.
        betas: Of AdamW.
        warmup_steps: Linear.
        max_steps: End of the cosine. Given, and not asked of the Trainer: Lightning would drop the data's position.
        without: Ends of names that are spared from weight decay.
        lr_factor: Factor of `lr` by parameter name, where it is not 1.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or any(name.endswith(end) for end in without)
            factor = (lr_factor or {}).get(name, 1.0)
            groups.setdefault((0.0 if spared else weight_decay, factor), []).append(parameter)
    options = [{"params": p, "weight_decay": decay, "lr": lr * factor} for (decay, factor), p in groups.items()]
    optimizer = torch.optim.AdamW(options, lr=lr, betas=betas, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(warmup_steps, max_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class WarmupCosine:
    """Factor of the learning rate: a line up to 1 over `warmup_steps`, then half a cosine down to 0 at `max_steps`."""

    def __init__(self, warmup_steps: int, max_steps: int) -> None:
        self.warmup_steps, self.max_steps = warmup_steps, max_steps

    def __call__(self, step: int) -> float:
        """Called by LambdaLR."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Guard:
    """Clips the gradient, and keeps a broken one from the weights.

    Under data-parallel training the gradient is the same on every rank, so all ranks skip the same step unasked.

    Args:
        max_norm: Of the gradient.
        max_skipped: Skipped steps that end the run.
    """

    def __init__(self, max_norm: float, max_skipped: int = 20) -> None:
        self.max_norm, self.max_skipped = max_norm, max_skipped
        self.num_skipped = 0
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(self, losses: Tensor, exams: Exams) -> None:
        """Remembers what each exam of a micro-batch (B,) added, to name it if the step breaks."""
        self.batches.append((losses.detach(), exams.slot, exams.exam))

    def __call__(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clips, or drops the gradient so that the optimiser has nothing to step on; returns the norm.

        Raises:
            UmbifError: More than `max_skipped` steps were dropped.
        """
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.max_norm)
        batches, self.batches = self.batches, []
        if bool(norm.isfinite()):
            return norm
        optimizer.zero_grad(set_to_none=True)
        self.num_skipped += 1
        message = f"Step {module.global_step}: the gradient is not finite; the step was skipped. {_names(batches)}"
        log.warning(message)
        if self.num_skipped > self.max_skipped:
            raise UmbifError(f"{self.num_skipped} steps were skipped, the last one for this reason:\n{message}")
        return norm


def _names(batches: list[tuple[Tensor, Tensor, Tensor]]) -> str:
    """The samples that broke, by their rows: identifiers of people stay out of logs."""
    losses, slots, exams = (torch.cat(column) for column in zip(*batches, strict=True))
    bad = ~losses.isfinite()
    if not bool(bad.any()):
        bad = losses == losses.max()
    named = sorted({(int(s), int(e)) for s, e in zip(slots[bad], exams[bad], strict=True)})
    what = "Not finite" if not bool(losses.isfinite().all()) else "Largest loss"
    return f"{what}: " + ", ".join(f"exam {exam} of the corpus (slot {slot})" for slot, exam in named[:8])
