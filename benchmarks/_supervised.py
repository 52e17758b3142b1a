"""Supervised training with tokens dropped and views augmented: the upper bound and the fine-tuning of `learn.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from _describe import EXTREME_SHARE
from _tasks import TASKS, Task
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from umbif.corpus.shards import Corpus
from umbif.encoders.cnn import CNN3D
from umbif.encoders.pooling import pooled
from umbif.encoders.vit import ViT3D
from umbif.progress import track
from umbif.stream.augment import Augmentation
from umbif.stream.exams import Exams, WholeBrainDataset, collate
from umbif.stream.philox import uniform

Array = npt.NDArray[Any]
BATCH, BUDGET = 8, 512  # exams, tokens of an exam
WARMUP, WEIGHT_DECAY = 30, 0.05
AUGMENTATION = Augmentation(curve=0.2, bias=0.05, scale=0.05)
DROPPED = 40  # purpose of the draws of tokens
NUM_SITES = 3
LEARNT = tuple(task for task in TASKS if task.features == "whole")


@dataclass(frozen=True)
class Course:
    """How an encoder is taught."""

    num_steps: int  # of BATCH exams
    lr: float


UPPER_BOUND = Course(num_steps=600, lr=1e-3)


class Taught(nn.Module):
    """An encoder with one linear layer for all that it is taught.

    Args:
        encoder: With its first weights.
        tasks: In the order of outputs.
        targets: (N, tasks) of the exams to learn from. Outputs of numbers are standard deviations from their mean.
    """

    def __init__(self, encoder: ViT3D | CNN3D, tasks: Sequence[Task], targets: Tensor) -> None:
        super().__init__()
        self.encoder, self.tasks = encoder.requires_grad_(True), tasks
        numbers = torch.tensor([task.kind == "number" for task in tasks])
        known = [column[column.isfinite()] for column in targets.unbind(1)]
        self.center = torch.stack([column.mean() for column in known]).where(numbers, 0.0)
        self.spread = torch.stack([column.std() for column in known]).where(numbers, 1.0)
        width = 3 * encoder.embed_dim
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(map(num_outputs, tasks))))

    def forward(self, exams: Exams, **view: Any) -> Tensor:
        """(B, outputs) of exams; `view` is for `forward_features`."""
        tokens, valid, _ = self.encoder.forward_features(exams, **view)
        return self.head(pooled(tokens, valid, EXTREME_SHARE))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean of the tasks' losses, each over the exams that have an answer."""
        losses, wanted = [], (targets - self.center) / self.spread
        of_task = outputs.split([num_outputs(task) for task in self.tasks], dim=1)
        for task, found, y in zip(self.tasks, of_task, wanted.unbind(1), strict=True):
            known = y.isfinite()
            if known.any():
                losses.append(loss_of(task, found[known], y[known]))
        return torch.stack(losses).mean()


def teach(
    encoder: ViT3D | CNN3D, corpus: Corpus, rows: Array, targets: pd.DataFrame, seed: int, course: Course,
    tasks: Sequence[Task] = LEARNT,
) -> Taught:  # fmt: skip
    """Trains an encoder in place.

    Args:
        encoder: With its first weights.
        corpus: The clinic.
        rows: Of the exams to learn from, in the corpus.
        targets: What is asked about each of `rows`.
        seed: Of order, views and the last layer.
        course: How.
        tasks: What is asked.
    """
    dataset = WholeBrainDataset(corpus, rows, np.arange(len(rows), dtype=np.float32), seed)
    wanted = torch.from_numpy(targets[[task.target for task in tasks]].to_numpy(dtype=np.float32, copy=True))
    torch.manual_seed(seed)
    model = Taught(encoder, tasks, wanted).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.lr, weight_decay=WEIGHT_DECAY, fused=True)
    warmup = min(0.3, WARMUP / course.num_steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.lr, course.num_steps, pct_start=warmup)
    for step in track(range(course.num_steps), "Supervised training", course.num_steps):
        slots = range(step * BATCH, (step + 1) * BATCH)
        exams = collate([dataset[slot] for slot in slots], spacing_mm=corpus.spacing_mm, seed=seed)
        scores = uniform(seed, exams.slot, exams.view, DROPPED, encoder.num_patches(exams))
        assert exams.target is not None  # which of `rows` it is
        outputs = model(exams, scores=scores, budget=BUDGET, augmentation=AUGMENTATION)
        model.loss(outputs, wanted[exams.target.long()]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def num_outputs(task: Task) -> int:
    """Of the last layer, for one task."""
    return NUM_SITES if task.kind == "classes" else 1


def loss_of(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """Of the outputs (n, outputs) of one task."""
    if task.kind == "classes":
        return cross_entropy(outputs, y.long())
    return (binary_cross_entropy_with_logits if task.kind == "binary" else mse_loss)(outputs[:, 0], y)
