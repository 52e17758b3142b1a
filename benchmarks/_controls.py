"""The controls of `learn.py`: answers dealt anew, which nothing can learn, and people that are labelled and tested."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from _probes import PROBES, Question, answered, draws, shuffled

from umbif.evaluation.statistics import auc_interval

Array = npt.NDArray[Any]
NUM_LABELS = 64
CONTROLS = ("null", "seen", "unseen")


def controls(question: Question, seed: int) -> Iterator[dict[str, Any]]:
    """Of a binary task, in the form of cells.

    The interval of `null` should hold one half. `seen` and `unseen` ask about the same exams, of everyone who has two:
    after the other exam of each was labelled, and after as many of other people were. What `seen` has more is what a
    split that ignores people would add to scores.
    """
    null = shuffled(question, seed)
    yield control(null, CONTROLS[0], next(iter(draws(null, NUM_LABELS))), null.is_test[null.exam])
    first, second = pairs(question)
    others = np.setdiff1d(question.exam, question.exam[np.isin(question.person[question.exam], question.person[first])])
    unseen = np.random.default_rng(seed).permutation(others)[: len(first)]
    asked = np.isin(question.exam, second)
    yield control(question, CONTROLS[1], first, asked)
    yield control(question, CONTROLS[2], unseen, asked)


def control(question: Question, name: str, labelled: Array, asked: Array) -> dict[str, Any]:
    """The area that a linear probe reaches on the asked rows."""
    area = auc_interval(question.y[asked], answered(question, PROBES[0], labelled, asked))
    return {
        "task": question.task.name, "probe": name, "labels": len(labelled), "score": round(area.value, 4),
        "interval": [round(area.low, 4), round(area.high, 4)],
    }  # fmt: skip


def pairs(question: Question) -> tuple[Array, Array]:
    """The first and the second exam of everyone with several."""
    exams = np.unique(question.exam)
    exams = exams[np.argsort(question.person[exams], kind="stable")]
    _, first, count = np.unique(question.person[exams], return_index=True, return_counts=True)
    return exams[first[count > 1]], exams[first[count > 1] + 1]
