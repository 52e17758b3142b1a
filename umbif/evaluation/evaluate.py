"""From predictions to one result per task and model: held-out exams only, one score and one call per exam."""

from dataclasses import replace

import numpy as np
import pandas as pd

from umbif.errors import Problem, UsageError
from umbif.evaluation.statistics import (
    TaskResult,
    auc_interval,
    auc_p_against_chance,
    calibration,
    call_measures,
    holm,
    majority_baseline,
    p_against_baseline,
    person_bootstrap,
    weighted_auc,
)

COLUMNS = ("exam", "person", "task", "model", "repeat", "fold", "seed", "split", "class", "y", "score", "threshold")
FIT = ["task", "model", "repeat", "fold", "seed"]  # what names one fitted model
FEW = 10


def evaluate(predictions: pd.DataFrame) -> list[TaskResult]:
    """One result per task and model, in the order of the table; Holm adjusts over all of them.

    Raises:
        UsageError: The table cannot be evaluated honestly (see `held_out`).
    """
    exams = held_out(predictions)
    results = [_result(part) for _, part in exams.groupby(["task", "model"], sort=False)]
    adjusted = holm([result.p_chance for result in results])
    return [replace(result, p_holm=p) for result, p in zip(results, adjusted, strict=True)]


def held_out(predictions: pd.DataFrame) -> pd.DataFrame:
    """The test rows, one per task, model and exam, with a column `call`.

    Several fits of one model (seeds, repeats) are averaged, scores and thresholds alike: an ensemble that makes one
    call. `num_fits` counts them. `pooled` marks exams of which each was scored by some folds only, as in
    cross-validation.

    Raises:
        UsageError: Columns or test rows are missing, labels are not 0/1, scores are not in [0, 1], an exam was scored
            twice by one fit, or a person is in both validation and test of one fit.
    """
    _demand(predictions)
    rows = predictions[predictions["split"] == "test"].copy()
    if rows.groupby("task")["class"].nunique().max() > 1:  # one-vs-rest: every class is a question of its own
        several = rows.groupby("task")["class"].transform("nunique") > 1
        rows.loc[several, "task"] = rows["task"] + ": " + rows["class"].astype(str)
    _demand_one_row_per_fit(rows)
    keys = ["task", "model", "exam"]
    exams = rows.groupby(keys, sort=False, as_index=False).agg(
        person=("person", "first"), y=("y", "first"), positive=("class", "first"),
        score=("score", "mean"), threshold=("threshold", "mean"), num_fits=("score", "size"),
        num_folds=("fold", "nunique"),
    )  # fmt: skip
    folds = rows.groupby(["task", "model"])["fold"].nunique().rename("all_folds")
    exams = exams.join(folds, on=["task", "model"])
    exams["y"] = exams["y"].astype(int)
    return exams.assign(
        call=(exams["score"] >= exams["threshold"]).astype(int), pooled=exams["num_folds"] < exams["all_folds"]
    ).drop(columns=["num_folds", "all_folds"])


def _result(exams: pd.DataFrame) -> TaskResult:
    y, score = exams["y"].to_numpy(), exams["score"].to_numpy(float)
    measures, baseline, first = call_measures(exams), majority_baseline(y), exams.iloc[0]
    num_right = measures.true_positive + measures.true_negative
    return TaskResult(
        task=str(first["task"]),
        model=str(first["model"]),
        positive=str(first["positive"]),
        num_exams=len(y),
        num_persons=exams["person"].nunique(),
        num_positive=int(y.sum()),
        prevalence=float(y.mean()),
        threshold=float(exams["threshold"].mean()),
        auc=auc_interval(y, score),
        auc_bootstrap=person_bootstrap(exams, weighted_auc),
        p_chance=auc_p_against_chance(y, score),
        p_holm=float("nan"),
        measures=measures,
        baseline=baseline,
        p_baseline=p_against_baseline(num_right, len(y), baseline),
        calibration=calibration(y, score),
        few=int(min(y.sum(), len(y) - y.sum())) < FEW,
        pooled=bool(exams["pooled"].any()),
        num_fits=int(exams["num_fits"].max()),
        y=y,
        score=score,
    )


def _demand(predictions: pd.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in predictions.columns]
    if missing:
        cure = "`umbif fit` with a fine-tuning recipe writes them all."
        raise UsageError(Problem("The predictions lack columns", ", ".join(missing), cure))
    test = predictions[predictions["split"] == "test"]
    if test.empty:
        raise UsageError(
            Problem("The predictions have no row of split `test`", cure="Intervals need exams that were held out.")
        )
    checks: dict[str, pd.Series] = {
        "labels other than 0 and 1": ~test["y"].isin([0, 1]),
        "scores outside of 0 to 1": ~test["score"].between(0, 1),
        "no threshold": ~test["threshold"].between(-np.inf, np.inf, inclusive="neither"),
        "no person": test["person"].isna(),
    }
    problems = [
        Problem(f"Test rows with {what}", f"{int(bad.sum())} in {', '.join(sorted(set(test.loc[bad, 'task'])))}")
        for what, bad in checks.items()
        if bad.any()
    ]
    problems += _leaks(predictions)
    if problems:
        raise UsageError(problems, where="the predictions")


def _leaks(predictions: pd.DataFrame) -> list[Problem]:
    """Persons whom one fit saw in validation, where thresholds are chosen, and again in test."""
    splits = predictions.groupby([*FIT, "person"], dropna=False)["split"].nunique()
    both = splits[splits > 1].reset_index()
    cure = "Split by person: the test figures of these fits cannot be trusted."
    return [
        Problem(f"Persons in both validation and test of {task}, {model}", f"{part['person'].nunique()}", cure)
        for (task, model), part in both.groupby(["task", "model"])
    ]


def _demand_one_row_per_fit(rows: pd.DataFrame) -> None:
    twice = rows.duplicated([*FIT, "exam"])
    if twice.any():
        names = ", ".join(sorted(set(rows.loc[twice, "model"].astype(str))))
        cure = "One run was named twice, or two give their models one name: set model.model_name in their recipes"
        raise UsageError(Problem("Exams scored more than once by one fit", f"{int(twice.sum())} by {names}", cure))
    labels = rows.groupby(["task", "exam"])["y"].nunique()
    if (labels > 1).any():
        raise UsageError(Problem("Exams with two labels for one task", str(int((labels > 1).sum()))))
