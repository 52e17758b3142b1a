"""The cells of `learn.py` that train networks: encoders go on learning from a few labels, the same way for every arm,
and some are taught all that there are."""

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from _cells import Cell, cell, question_of
from _inputs import Shown
from _probes import Question, draws, scored
from _supervised import Course, Taught, teach
from _tasks import TASKS

from umbif.corpus.shards import Corpus
from umbif.encoders.cnn import CNN3D
from umbif.encoders.vit import ViT3D

Array = npt.NDArray[Any]
FINETUNED = tuple(task for task in TASKS if task.name in ("lesion volume", "idh"))
NUM_LABELS, NUM_DRAWS = 64, 3
COURSE = Course(num_steps=60, lr=1e-4)


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
    start = [exams[i] for i in labelled]
    rows, known = np.array([exam.row for exam in start]), targets.iloc[labelled].reset_index(drop=True)
    model = teach(copy.deepcopy(encoder), corpus, rows, known, seed, course, [question.task], start)
    asked = question.exam[question.is_test[question.exam]]
    return model.answers([exams[i] for i in asked])[0]


def taught_cells(model: Taught, exams: Sequence[Shown], targets: pd.DataFrame) -> Iterator[Cell]:
    """What a network says itself of the test exams that was taught all the others; its number of labels stands as 0.

    Args:
        model: The network.
        exams: Of the clinic.
        targets: What is asked about each of them.
    """
    asked = np.flatnonzero(targets["test"])
    for task, answers in zip(model.tasks, model.answers([exams[i] for i in asked]), strict=True):
        question = question_of(task, np.empty((len(targets), 0)), targets, {})
        known = np.isin(asked, question.exam)
        yield cell(task, "taught", 0, scored(question, [answers[known]]))
