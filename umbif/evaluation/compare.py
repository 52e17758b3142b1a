"""Two models on the same exams: DeLong's paired test (Sun and Xu 2014), a person bootstrap and McNemar's test."""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from statsmodels.stats.contingency_tables import mcnemar

from umbif.errors import Problem, UsageError, nearest
from umbif.evaluation.evaluate import LEVEL, held_out
from umbif.evaluation.statistics import (
    Bootstrap,
    Difference,
    Floats,
    Weights,
    holm,
    paired_delong,
    person_bootstrap,
    weighted_auc,
)


@dataclass(frozen=True)
class Comparison:
    """AUC of model `a` minus that of model `b`, and the exams that only one of them called right.

    `num_left_out` counts exams that only one of the models scored, `fits_a` the fits whose mean `a` is: a mean is
    mostly better than one of its fits, whatever the model.
    """

    task: str
    a: str
    b: str
    fits_a: int
    fits_b: int
    num_exams: int
    num_left_out: int
    auc_a: float
    auc_b: float
    difference: Difference
    bootstrap: Bootstrap
    only_a_right: int
    only_b_right: int
    p_mcnemar: float
    p_holm: float = float("nan")

    @property
    def alike(self) -> bool:
        """Whether both are the mean of as many fits."""
        return self.fits_a == self.fits_b

    @property
    def shown(self) -> bool:
        """Whether both are alike, both intervals exclude 0 and Holm's P, where there is one, is below 0.05."""
        if not self.alike or self.p_holm >= LEVEL:
            return False
        lows, highs = (self.difference.low, self.bootstrap.low), (self.difference.high, self.bootstrap.high)
        return all(low > 0 for low in lows) or all(high < 0 for high in highs)  # NaN shows nothing

    @property
    def words(self) -> str:
        """The finding as one sentence."""
        if not self.alike:
            (more, several), (fewer, few) = sorted([(self.a, self.fits_a), (self.b, self.fits_b)], key=lambda x: -x[1])
            return f"{more} is the mean of {several} fits, {fewer} of {few}: not alike, so no difference is shown."
        if not self.shown:
            return f"No difference in AUC between {self.a} and {self.b} was shown."
        better, worse = (self.a, self.b) if self.difference.value > 0 else (self.b, self.a)
        return f"The AUC of {better} was higher than that of {worse}, by {abs(self.difference.value):.3f}."


def compare_models(predictions: pd.DataFrame, task: str, a: str, b: str) -> Comparison:
    """Compares two models on the test exams that both of them scored.

    Raises:
        UsageError: The task or a model is not in the predictions, or no exam was scored by both.
    """
    return _compare(held_out(predictions), task, a, b)


def compare_all(predictions: pd.DataFrame) -> list[Comparison]:
    """Every pair of models of every task, with Holm's adjustment over all pairs."""
    exams = held_out(predictions)
    found = [
        _compare(exams, str(task), a, b)
        for task, part in exams.groupby("task", sort=False)
        for a, b in combinations(part["model"].unique(), 2)
    ]
    adjusted = holm([comparison.difference.p for comparison in found])
    return [replace(comparison, p_holm=p) for comparison, p in zip(found, adjusted, strict=True)]


def _compare(exams: pd.DataFrame, task: str, a: str, b: str) -> Comparison:
    rows_a, rows_b = _of(exams, task, a), _of(exams, task, b)
    both = rows_a.merge(rows_b[["exam", "score", "call", "num_fits"]], on="exam", suffixes=("_a", "_b"))
    if both.empty:
        raise UsageError(Problem(f"No test exam of {task} was scored by both {a} and {b}"))
    y = both["y"].to_numpy()
    right_a, right_b = both["call_a"].to_numpy() == y, both["call_b"].to_numpy() == y
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    ones = np.ones((1, len(both)), dtype=int)
    return Comparison(
        task=task,
        a=a,
        b=b,
        fits_a=int(both["num_fits_a"].max()),
        fits_b=int(both["num_fits_b"].max()),
        num_exams=len(both),
        num_left_out=len(rows_a) + len(rows_b) - 2 * len(both),
        auc_a=float(weighted_auc(both, ones, "score_a")[0]),
        auc_b=float(weighted_auc(both, ones, "score_b")[0]),
        difference=paired_delong(y, both["score_a"], both["score_b"]),
        bootstrap=person_bootstrap(both, _auc_difference),
        only_a_right=only_a,
        only_b_right=only_b,
        p_mcnemar=float(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue) if only_a + only_b else 1.0,
    )


def _of(exams: pd.DataFrame, task: str, model: str) -> pd.DataFrame:
    if task not in set(exams["task"]):
        raise UsageError(Problem("Unknown task", task, nearest(task, exams["task"].unique())))
    of_task = exams[exams["task"] == task]
    if model not in set(of_task["model"]):
        raise UsageError(Problem(f"Unknown model of {task}", model, nearest(model, of_task["model"].unique())))
    return of_task[of_task["model"] == model]


def _auc_difference(frame: pd.DataFrame, weights: Weights) -> Floats:
    return weighted_auc(frame, weights, "score_a") - weighted_auc(frame, weights, "score_b")
