"""How encoders are trained: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with warm-up and cosine by steps."""

import logging
import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

log = logging.getLogger("umbif")


def adamw(
    module: pl.LightningModule,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    warmup_steps: int,
    max_steps: int,
    lr_factor: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Fused AdamW with its schedule, as Lightning takes it.

    Args:
        module: Whose parameters are trained, those that require a gradient.
        lr: Learning rate at the end of the warm-up.
        weight_decay: Of matrices: not of norms, biases, and what a part names in `no_weight_decay`.
        betas: Of AdamW.
        warmup_steps: Linear.
        max_steps: End of the cosine. Given, and not asked of the Trainer: Lightning would drop the data's position.
        lr_factor: Factor of `lr` by parameter name, where it is not 1.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    spared = spared_from_decay(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim < 2 or name in spared else weight_decay
            groups.setdefault((decay, (lr_factor or {}).get(name, 1.0)), []).append(parameter)
    options = [{"params": p, "weight_decay": decay, "lr": lr * factor} for (decay, factor), p in groups.items()]
    optimizer = torch.optim.AdamW(options, lr=lr, betas=betas, fused=True)
    if warmup_steps > max_steps > 0:
        log.warning("model.warmup_steps=%d is not over in %d steps: the rate only rises", warmup_steps, max_steps)
    # A partial leaves nothing in a checkpoint: a run that is made longer follows the longer cosine.
    factor = partial(warmup_cosine, warmup_steps=warmup_steps, max_steps=max_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def spared_from_decay(module: nn.Module) -> set[str]:
    """Full names of the parameters that the parts of a module name in `no_weight_decay`."""
    return {
        f"{prefix}.{name}"
        for prefix, part in module.named_modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()
    }


def exams_per_step(module: pl.LightningModule, global_batch_size: int) -> int:
    """Exams that one optimiser step has seen: micro-steps accumulate."""
    trainer = module._trainer
    return global_batch_size * (trainer.accumulate_grad_batches if trainer is not None else 1)


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """Factor of the learning rate: a line up to 1 over `warmup_steps`, then half a cosine down to 0 at `max_steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
