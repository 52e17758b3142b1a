"""Supervised training with tokens dropped and views augmented: from scratch, and the fine-tuning of `learn.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from _describe import EXTREME_SHARE
from _inputs import Shown
from _probes import PENALTIES
from _tasks import TASKS, Task
from sklearn.linear_model import RidgeCV
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
BATCH = 8  # exams
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
    budget: int = 512  # tokens of an exam; of a convolutional network, its sequences

    def __str__(self) -> str:
        return f"{self.num_steps} steps of {BATCH} exams"


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
        return self.head(self.features(exams, **view))

    def features(self, exams: Exams, **view: Any) -> Tensor:
        """(B, F) of exams."""
        tokens, valid, _ = self.encoder.forward_features(exams, **view)
        return pooled(tokens, valid, EXTREME_SHARE)

    @torch.no_grad()
    def start_from(self, exams: Sequence[Shown], targets: Tensor) -> None:
        """Lets the last layer, of one task, start from ridge regression on what the encoder gives already.

        One that starts at random spoils what was learnt before (Kumar et al. 2022, arXiv:2202.10054).
        """
        features = torch.cat([self.features(exam.whole) for exam in exams])
        norm = Standardised(features)
        y = 2 * targets - 1 if self.tasks[0].kind == "binary" else (targets - self.center) / self.spread
        ridge = RidgeCV(PENALTIES).fit(norm(features).numpy(), y[:, 0].numpy())
        linear = nn.Linear(features.shape[1], 1)
        linear.weight.copy_(torch.from_numpy(ridge.coef_))
        linear.bias.fill_(float(ridge.intercept_))
        self.head = nn.Sequential(norm, linear)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean of the tasks' losses, each over the exams that have an answer."""
        losses, wanted = [], (targets - self.center) / self.spread
        of_task = outputs.split([num_outputs(task) for task in self.tasks], dim=1)
        for task, found, y in zip(self.tasks, of_task, wanted.unbind(1), strict=True):
            known = y.isfinite()
            if known.any():
                losses.append(loss_of(task, found[known], y[known]))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def answers(self, exams: Sequence[Shown]) -> list[Array]:
        """Of each task, about N exams: (N,) in the task's own units, or (N, classes)."""
        outputs = torch.cat([self(exam.whole) for exam in track(exams, "Asking", len(exams))])
        of_task = outputs.split([num_outputs(task) for task in self.tasks], dim=1)
        in_units = [y[:, 0] * spread + at for y, at, spread in zip(of_task, self.center, self.spread, strict=True)]
        answered = zip(self.tasks, of_task, in_units, strict=True)
        return [(y if task.kind == "classes" else number).numpy() for task, y, number in answered]


class Standardised(nn.Module):
    """Features (N, F) in standard deviations from their mean, and later ones by the same measure."""

    center: Tensor
    spread: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        spread, center = torch.std_mean(features, dim=0)
        self.register_buffer("center", center)
        self.register_buffer("spread", spread.clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F)."""
        return (features - self.center) / self.spread


def teach(
    encoder: ViT3D | CNN3D, corpus: Corpus, rows: Array, targets: pd.DataFrame, seed: int, course: Course,
    tasks: Sequence[Task] = LEARNT, start: Sequence[Shown] = (),
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
        start: `rows` once more, for `Taught.start_from`.
    """
    dataset = WholeBrainDataset(corpus, rows, np.arange(len(rows), dtype=np.float32), seed)
    wanted = torch.from_numpy(targets[[task.target for task in tasks]].to_numpy(dtype=np.float32, copy=True))
    torch.manual_seed(seed)
    model = Taught(encoder, tasks, wanted).train()
    if start:
        model.start_from(start, wanted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.lr, weight_decay=WEIGHT_DECAY, fused=True)
    warmup = min(0.3, WARMUP / course.num_steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, course.lr, course.num_steps, pct_start=warmup)
    for step in track(range(course.num_steps), "Supervised training", course.num_steps):
        slots = range(step * BATCH, (step + 1) * BATCH)
        exams = collate([dataset[slot] for slot in slots], spacing_mm=corpus.spacing_mm, seed=seed)
        scores = uniform(seed, exams.slot, exams.view, DROPPED, encoder.num_patches(exams))
        assert exams.target is not None  # which of `rows` it is
        outputs = model(exams, scores=scores, budget=course.budget, augmentation=AUGMENTATION)
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
