"""The fine-tuned cells of `learn.py`: encoders go on learning from a few labelled exams, the same way for every arm."""

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from _cells import Cell, cell, question_of
from _inputs import Shown
from _probes import Question, draws, scored
from _supervised import Course, Taught, teach
from _tasks import TASKS

from umbif.corpus.shards import Corpus
from umbif.encoders.cnn import CNN3D
from umbif.encoders.vit import ViT3D
from umbif.progress import track

Array = npt.NDArray[Any]
FINETUNED = tuple(task for task in TASKS if task.name in ("lesion volume", "idh"))
NUM_LABELS, NUM_DRAWS = 64, 3
COURSE = Course(num_steps=100, lr=3e-4)


def finetuned_cells(
    encoder: ViT3D | CNN3D, corpus: Corpus, exams: Sequence[Shown], targets: pd.DataFrame, seed: int,
    course: Course = COURSE,
) -> Iterator[Cell]:  # fmt: skip
    """Of one encoder, which stays as it is.

    Args:
        encoder: Pretrained or not.
        corpus: The clinic.
        exams: Of it.
        targets: What is asked about each of `exams`.
        seed: Of the encoder.
        course: How it is fine-tuned.
    """
    for task in FINETUNED:
        question = question_of(task, np.empty((len(targets), 0)), targets, {})  # no features: exams are shown again
        answers = [
            finetuned(encoder, corpus, exams, targets, question, labelled, 100 * seed + draw, course)
            for draw, labelled in enumerate(islice(draws(question, NUM_LABELS), NUM_DRAWS))
        ]
        yield cell(task, "finetuned", NUM_LABELS, scored(question, answers))


def finetuned(
    encoder: ViT3D | CNN3D, corpus: Corpus, exams: Sequence[Shown], targets: pd.DataFrame, question: Question,
    labelled: Array, seed: int, course: Course,
) -> Array:  # fmt: skip
    """What an encoder says of the test exams that has gone on learning from the labelled ones."""
    rows = np.array([exams[i].row for i in labelled])
    known = targets.iloc[labelled].reset_index(drop=True)
    model = teach(copy.deepcopy(encoder), corpus, rows, known, seed, course, [question.task])
    asked = question.exam[question.is_test[question.exam]]
    return answers_of(model, [exams[i] for i in asked])


@torch.no_grad()
def answers_of(model: Taught, exams: Sequence[Shown]) -> Array:
    """Of a model with one task, for each exam."""
    outputs = torch.stack([model(exam.whole)[0, 0] for exam in track(exams, "Asking", len(exams))])
    return (outputs * model.spread[0] + model.center[0]).numpy()
