"""The cells of `learn.py`: one arm, seed, task, probe and number of labels each, a line of JSON in the results file."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from _controls import controls
from _evidence import PRIMARY_LABELS, PRIMARY_PROBE
from _probes import NUM_DRAWS, PROBES, Question, Scored, probed, resamples, retrieved, scored
from _tasks import TASKS, Task, score
from sklearn.neighbors import KNeighborsRegressor

Array = npt.NDArray[Any]
Cell = dict[str, Any]
NUM_LABELS = (16, 64, 256)
NUM_SECONDARY = 40  # resamples
NUM_NEIGHBOURS = 16  # whose mean is what a place looks like, whatever the exam


def read_cells(path: Path) -> list[Cell]:
    """All that have been finished."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, cells: Iterable[Cell]) -> None:
    """Adds lines in one write, so that several processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(cell, separators=(",", ":")) + "\n" for cell in cells)
    with path.open("ab", buffering=0) as file:
        file.write(lines.encode())


def frozen_cells(
    features: dict[str, Array], targets: pd.DataFrame, places: dict[str, Array], seed: int,
    num_labels: Iterable[int] = NUM_LABELS,
) -> Iterator[Cell]:  # fmt: skip
    """Every task that these features can answer, under every probe, and its control."""
    for task in TASKS:
        if task.features == "halves" and "half_a" in features:
            yield from retrieval(task, features, targets)
        elif task.features in features:
            question = question_of(task, features[task.features], targets, places)
            for num in num_labels:
                yield from (cell_of(question, probe, num) for probe in PROBES)
            if task.kind == "binary" and task.features == "whole":
                yield from controls(question, seed)


def counts(features: dict[str, Array], targets: pd.DataFrame, places: dict[str, Array]) -> Iterator[Cell]:
    """How many rows of each task may be labelled and how many are tested; of yes and no, how many tested are yes."""
    for task in TASKS:
        if task.features == "halves":
            known = np.isfinite(features["half_a"]).all(1) & targets["test"].to_numpy()
            yield {"task": task.name, "labelled": 0, "tested": int(known.sum())}
            continue
        question = question_of(task, features[task.features], targets, places)
        tested = question.is_test[question.exam]
        found = {"task": task.name, "labelled": int((~tested).sum()), "tested": int(tested.sum())}
        yield {**found, "positive": int(question.y[tested].sum())} if task.kind == "binary" else found


def question_of(task: Task, x: Array, targets: pd.DataFrame, places: dict[str, Array]) -> Question:
    """The rows of a task that have an answer."""
    person, is_test = targets["person"].to_numpy(), targets["test"].to_numpy()
    if x.ndim == 2:
        y = targets[task.target].to_numpy()
        known = np.isfinite(y) & np.isfinite(x).all(1)
        return Question(task, x[known], y[known], np.flatnonzero(known), person, is_test)
    known = np.isfinite(x).all((1, 2)) & (targets["ill"].to_numpy() == 1)
    exam = np.flatnonzero(known).repeat(x.shape[1])
    y = places[task.target][known].reshape(len(exam), -1)
    is_number = task.kind == "number"
    y = y - usual(y, places["position_mm"][known].reshape(-1, 3), ~is_test[exam]) if is_number else y[:, 0]
    return Question(task, x[known].reshape(len(exam), -1), y, exam, person, is_test)


def usual(y: Array, position_mm: Array, train: Array) -> Array:
    """The mean of other exams at the same place: what is known without a look at the exam."""
    model = KNeighborsRegressor(NUM_NEIGHBOURS).fit(position_mm[train], y[train])
    return np.asarray(model.predict(position_mm))


def cell_of(question: Question, probe: str, num_labels: int) -> Cell:
    """A probe with so many labels. What is in no primary comparison has fewer resamples: the file is long enough."""
    found = cell(question.task, probe, num_labels, scored(question, probed(question, probe, num_labels)))
    is_primary = (probe, num_labels) == (PRIMARY_PROBE, PRIMARY_LABELS)
    return found if is_primary else {**found, "resamples": found["resamples"][:NUM_SECONDARY]}


def cell(task: Task, probe: str, num_labels: int, found: Scored) -> Cell:
    """A line of the file."""
    return {
        "task": task.name, "probe": probe, "labels": num_labels, "score": rounded(found.draws.mean()),
        "draws": rounded(found.draws), "resamples": rounded(found.resamples, 3),
    }  # fmt: skip


def retrieval(task: Task, features: dict[str, Array], targets: pd.DataFrame) -> Iterator[Cell]:
    """Which exam of the test people the other half of the sequences belongs to."""
    known = np.isfinite(features["half_a"]).all(1) & targets["test"].to_numpy()
    person, is_test = targets["person"].to_numpy(), targets["test"].to_numpy()
    question = Question(task, features["half_a"], np.zeros(len(person)), np.arange(len(person)), person, is_test)
    similarity = retrieved(features["half_a"][known], features["half_b"][known], person[known])
    weights = np.vstack([np.ones((1, len(person))), resamples(question)])[:, known]
    values = score(task.kind, np.arange(len(similarity)), similarity, weights)
    yield {
        "task": task.name, "probe": "cosine", "labels": 0, "score": rounded(values[0]),
        "draws": [rounded(values[0])] * NUM_DRAWS, "resamples": rounded(values[1:], 3),
    }  # fmt: skip


def rounded(values: Any, digits: int = 4) -> Any:
    """Further digits are noise."""
    return np.round(np.asarray(values, dtype=float), digits).tolist()
