"""The upper bound: an encoder that is taught all of the clinic's training labels together, from its first weights."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from _tasks import TASKS
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from umbif.corpus.shards import Corpus
from umbif.downstream.heads import ExtremesHead
from umbif.encoders.cnn import CNN3D
from umbif.encoders.vit import ViT3D
from umbif.progress import track
from umbif.stream.augment import Augmentation
from umbif.stream.exams import WholeBrainDataset, collate
from umbif.stream.philox import uniform

Array = npt.NDArray[Any]
BATCH, BUDGET, NUM_STEPS = 8, 512, 600  # exams, tokens of an exam, steps
LR, WARMUP, WEIGHT_DECAY = 1e-3, 30, 0.05
AUGMENTATION = Augmentation(curve=0.2, bias=0.05, scale=0.05)
DROPPED = 40  # purpose of the draws of tokens
NUM_SITES = 3
LEARNT = [task for task in TASKS if task.features == "whole"]


def teach(
    encoder: ViT3D | CNN3D, corpus: Corpus, rows: Array, targets: pd.DataFrame, seed: int, num_steps: int = NUM_STEPS
) -> None:
    """Trains an encoder in place.

    Args:
        encoder: With its first weights.
        corpus: The clinic.
        rows: Of the corpus' exams, ascending.
        targets: What is asked about each of `rows`; test exams are left out.
        seed: Of order and views.
        num_steps: Of `BATCH` exams.
    """
    taught = np.flatnonzero(~targets["test"].to_numpy())
    dataset = WholeBrainDataset(corpus, rows[taught], taught.astype(np.float32), seed)
    wanted = standardised(targets, taught)
    pool = ExtremesHead(encoder.embed_dim)
    head = nn.Sequential(nn.LayerNorm(3 * encoder.embed_dim), nn.Linear(3 * encoder.embed_dim, width()))
    encoder.train().requires_grad_(True)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, num_steps, pct_start=min(0.3, WARMUP / num_steps))
    for step in track(range(num_steps), "Supervised training", num_steps):
        slots = range(step * BATCH, (step + 1) * BATCH)
        exams = collate([dataset[slot] for slot in slots], spacing_mm=corpus.spacing_mm, seed=seed)
        scores = uniform(seed, exams.slot, exams.view, DROPPED, encoder.num_patches(exams))
        tokens = encoder.forward_features(exams, scores=scores, budget=BUDGET, augmentation=AUGMENTATION)
        assert exams.target is not None  # which of `rows` it is
        loss_of(head(pool.features(*tokens[:2])), wanted[exams.target.long()]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def width() -> int:
    """Outputs of all tasks together."""
    return sum(NUM_SITES if task.kind == "classes" else 1 for task in LEARNT)


def standardised(targets: pd.DataFrame, taught: Array) -> Tensor:
    """(N, tasks); numbers in standard deviations of the exams that are taught."""
    table = targets[[task.target for task in LEARNT]].to_numpy(dtype=np.float32, copy=True)
    for i, task in enumerate(LEARNT):
        if task.kind == "number":
            table[:, i] = (table[:, i] - np.nanmean(table[taught, i])) / np.nanstd(table[taught, i])
    return torch.from_numpy(table)


def loss_of(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The mean of the tasks' losses, each over the exams that have an answer."""
    losses, at = [], 0
    for i, task in enumerate(LEARNT):
        size = NUM_SITES if task.kind == "classes" else 1
        known = wanted[:, i].isfinite()
        found, y = outputs[known, at : at + size], wanted[known, i]
        at += size
        if not len(y):
            continue
        if task.kind == "classes":
            losses.append(cross_entropy(found, y.long()))
        else:
            loss = binary_cross_entropy_with_logits if task.kind == "binary" else mse_loss
            losses.append(loss(found[:, 0], y))
    return torch.stack(losses).mean()
