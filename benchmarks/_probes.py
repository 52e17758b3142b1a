"""Probes of frozen features, and the scores of their answers on held-out people.

Shapes: n labelled rows, t test rows, F features, B resamples of the test people.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
from _tasks import Task, score
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

Array = npt.NDArray[Any]
PENALTIES = np.logspace(-1, 6, 15)
PROBES = ("linear", "knn")
NUM_DRAWS, NUM_RESAMPLES = 10, 200
DRAWN, RESAMPLED, SHUFFLED = range(3)  # what random numbers are for


@dataclass(frozen=True)
class Question:
    """A task on one set of features: rows with an answer, in the order of exams."""

    task: Task
    x: Array  # (rows, F)
    y: Array  # (rows,) or (rows, k)
    exam: Array  # (rows,) which exam of the clinic
    person: Array  # of each exam
    is_test: Array  # of each exam


@dataclass(frozen=True)
class Scored:
    """Of one probe with one number of labels."""

    draws: Array  # (draws,)
    resamples: Array  # (NUM_RESAMPLES,), means over the draws


def answer(probe: str, kind: str, x: Array, y: Array, asked: Array) -> Array:
    """Trains a probe and asks it.

    Ridge regression, its penalty chosen by leave-one-out, on numbers and on classes as ±1: with few labels it is as
    good as logistic regression, and it needs no folds. Neighbours by cosine.
    """
    wanted = one_hot(y) if kind == "classes" else (2 * y - 1 if kind == "binary" else y)
    if probe == "linear":
        model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    else:
        neighbours = max(1, round(len(x) ** 0.5))
        model = make_pipeline(StandardScaler(), Normalizer(), KNeighborsRegressor(neighbours, weights="distance"))
    return model.fit(x, wanted).predict(asked)


def one_hot(y: Array) -> Array:
    """(n,) of classes 0, 1, … to (n, classes)."""
    return np.eye(int(y.max()) + 1)[y.astype(int)]


def probed(question: Question, probe: str, num_labels: int) -> Iterator[Array]:
    """What a probe says of the test rows that has seen `num_labels` labelled exams, for each draw of them."""
    test = question.is_test[question.exam]
    return (answered(question, probe, exams, test) for exams in draws(question, num_labels))


def scored(question: Question, answers: Iterable[Array]) -> Scored:
    """Scores of answers about the test rows, one for each draw of the labelled exams."""
    weights = np.vstack([np.ones((1, len(question.is_test))), resamples(question)])
    test = question.is_test[question.exam]
    truth, weights = question.y[test], weights[:, question.exam[test]]
    rows = [score(question.task.kind, truth, found, weights) for found in answers]
    return Scored(np.array([row[0] for row in rows]), np.mean([row[1:] for row in rows], axis=0))


def answered(question: Question, probe: str, exams: Array, test: Array) -> Array:
    """What a probe says of the test rows that was trained on some exams."""
    train = np.isin(question.exam, exams)
    return answer(probe, question.task.kind, question.x[train], question.y[train], question.x[test])


def draws(question: Question, num_labels: int) -> Iterator[Array]:
    """Which exams are labelled, for each draw: of as many people, the same for every arm."""
    pool = np.unique(question.exam[~question.is_test[question.exam]])
    if not has_all_classes(question, pool):
        raise ValueError(f"{question.task.name}: a class has fewer than two exams to be labelled")
    for draw in range(NUM_DRAWS):
        rng = np.random.default_rng((DRAWN, num_labels, draw))
        while True:
            order = rng.permutation(pool)
            _, first = np.unique(question.person[order], return_index=True)
            exams = order[np.sort(first)[:num_labels]]
            if has_all_classes(question, exams):
                yield exams
                break


def has_all_classes(question: Question, exams: Array) -> bool:
    """Whether every class is there twice."""
    if question.task.kind == "number":
        return True
    seen = question.y[np.isin(question.exam, exams)].astype(int)
    every = np.unique(question.y).astype(int)
    return bool((np.bincount(seen, minlength=every.max() + 1)[every] >= 2).all())


def resamples(question: Question) -> Array:
    """(B, exams): how often each exam counts when test people are drawn with replacement; the same for every arm."""
    people = np.unique(question.person[question.is_test])
    rng = np.random.default_rng((RESAMPLED, 0))
    counts = rng.multinomial(len(people), np.full(len(people), 1 / len(people)), NUM_RESAMPLES)
    at = np.searchsorted(people, question.person)
    return np.where(question.is_test, counts[:, np.minimum(at, len(people) - 1)], 0)


def shuffled(question: Question, seed: int) -> Question:
    """The answers dealt to other exams, of the test people too: nothing is left that could be learnt."""
    # Arms and tasks that shared an order would miss one half together.
    own = (crc32(question.task.name.encode()), crc32(question.x.tobytes()))
    order = np.random.default_rng((SHUFFLED, seed, *own)).permutation(len(question.y))
    return Question(question.task, question.x, question.y[order], question.exam, question.person, question.is_test)


def retrieved(a: Array, b: Array, person: Array) -> Array:
    """Cosines (t, t) of one half of each exam with the other half of each; other exams of a person do not compete."""
    one, other = (StandardScaler().fit_transform(half) for half in (a, b))
    one, other = (half / np.linalg.norm(half, axis=1, keepdims=True) for half in (one, other))
    same = (person[:, None] == person) & ~np.eye(len(person), dtype=bool)
    return np.where(same, -np.inf, one @ other.T)
