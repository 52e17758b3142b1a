"""What a task asks, and of whom: labels as their authors spelled them → 0, 1 or missing; splits by person."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from umbif.corpus.labels import join_labels
from umbif.corpus.shards import Corpus
from umbif.encoders.probing import persons_of_rarest
from umbif.errors import Problem, UsageError
from umbif.ranges import Spellings

MISSING = -1
MEANINGS = ("positive", "negative", "missing")
MOST_FOLDS = 20  # of which some are held out for the threshold


def labelled(corpus: Corpus, labels: str | None) -> pd.DataFrame:
    """The corpus' exams with their labels, joined with a further table where one is given."""
    if labels is None:
        return corpus.exams
    return join_labels(corpus.exams, Path(labels), fills=("person", "site"))  # who is tested is settled


@dataclass(frozen=True, kw_only=True)
class BinaryLabel:
    """How a binary label is written in the tables of several data sets. Case and outer blanks do not matter.

    Args:
        columns: Names that its column may have; the first that is filled counts.
        positive: Spellings of the class that scores speak for; the first is its name in tables.
        negative: Spellings of the other class.
        missing: Spellings of not known. An empty cell is always missing.
    """

    columns: Spellings
    positive: Spellings
    negative: Spellings
    missing: list[str] = field(default_factory=list)

    def meaning(self) -> dict[str, int]:
        """Spelling to 1, 0 or MISSING."""
        classes = ((1, self.positive), (0, self.negative), (MISSING, [*self.missing, ""]))
        return {spelling.strip().casefold(): value for value, spellings in classes for spelling in spellings}


def targets(exams: pd.DataFrame, label: BinaryLabel) -> npt.NDArray[np.int64]:
    """0, 1 or MISSING for each row of `exams`.

    Raises:
        UsageError: No such column, or spellings that the label does not know, or knows twice: a silent "missing" would
            bias the task.
    """
    _check_spellings(label)
    present = [column for column in label.columns if column in exams]
    if not present:
        raise UsageError(
            Problem(
                f"the corpus has no label column named {' or '.join(label.columns)}",
                f"columns {', '.join(map(str, exams.columns))}",
                "Join a table with data.labels=TABLE, or name its column in data.label.columns",
            )
        )
    meaning = label.meaning()
    text = exams[present].fillna("").astype(str).apply(lambda column: column.str.strip().str.casefold())
    first = text.apply(lambda row: next((value for value in row if value), ""), axis=1)
    unknown = first[~first.isin(list(meaning))]
    if len(unknown):
        raise UsageError(
            Problem(
                f"spellings in {' or '.join(present)} that the task does not know",
                ", ".join(f"{spelling!r} ({n} exams)" for spelling, n in unknown.value_counts().items()),
                "Add each to data.label.positive, data.label.negative or data.label.missing",
            )
        )
    return first.map(meaning).to_numpy(dtype=np.int64)


def _check_spellings(label: BinaryLabel) -> None:
    """A spelling with two meanings, often one that a recipe's part already names, would be decided in silence."""
    named = {name: {spelling.strip().casefold() for spelling in getattr(label, name)} for name in MEANINGS}
    num = Counter(spelling for spellings in named.values() for spelling in spellings)
    problems = [
        Problem(
            f"the spelling {spelling!r} has two meanings",
            " and ".join(f"data.label.{name}" for name in MEANINGS if spelling in named[name]),
            "Keep it in one: each list is replaced as a whole",
        )
        for spelling in sorted(num)
        if num[spelling] > 1
    ]
    if problems:
        raise UsageError(problems)


def split_rows(
    exams: pd.DataFrame, y: npt.NDArray[np.int64], *, val_fraction: float, seed: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of the labelled exams in `train`, `val` and `test`: the test people are those of the manifest.

    Raises:
        UsageError: A part would hold one class only, or a person stands on both sides.
    """
    have = y != MISSING
    in_test = (exams["split"] == "test").to_numpy()
    pool, test = np.flatnonzero(have & ~in_test), np.flatnonzero(have & in_test)
    _check_persons(exams["person"].to_numpy(), pool, test)
    _check_classes(y, {"training": pool, "test": test})
    person = exams["person"].to_numpy()[pool]
    num_folds, num_val = folds_for(val_fraction, persons_of_rarest(y[pool], person))
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed).split(pool, y[pool], person)
    val = np.sort(np.concatenate([held for _, held in islice(folds, num_val)]))
    parts = {"train": np.delete(pool, val), "val": pool[val], "test": test}
    _check_classes(y, {"training": parts["train"], "validation": parts["val"]})
    return parts


def folds_for(share: float, most: int) -> tuple[int, int]:
    """How many folds there are, at most `most`, and how many of them hold `share` of the exams, as nearly as they can.

    Raises:
        UsageError: One person alone has a class: nothing is left to choose a threshold on.
    """
    if most < 2:
        raise UsageError(Problem("a class needs two persons of the training part, one to learn from", f"{most}"))
    near = Fraction(share).limit_denominator(min(most, MOST_FOLDS))
    if 0 < near < 1:
        return near.denominator, near.numerator
    return (num := min(most, MOST_FOLDS)), 1 if near == 0 else num - 1


def _check_persons(person: npt.NDArray[Any], pool: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> None:
    """A table of labels may tell that subjects of both sides are one person: the manifest's split did not know."""
    both = len({*person[pool]} & {*person[test]})
    if both:
        cure = "Index again with that table (umbif index --labels), so that the split knows who is one person"
        raise UsageError(Problem("persons of the training part are test people too", f"{both} of them", cure))


def _check_classes(y: npt.NDArray[np.int64], parts: Mapping[str, npt.NDArray[np.int64]]) -> None:
    problems = [
        Problem(
            f"the {name} part of this task needs exams of both classes",
            f"{int((y[rows] == 1).sum())} positive, {int((y[rows] == 0).sum())} negative",
            "Label more exams",
        )
        for name, rows in parts.items()
        if len(np.unique(y[rows])) < 2
    ]
    if problems:
        raise UsageError(problems)
