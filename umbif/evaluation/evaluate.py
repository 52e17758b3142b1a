"""From predictions to one result per task and model: held-out exams only, one score and one call per exam."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from umbif.errors import Problem, UsageError
from umbif.evaluation.statistics import (
    NAN,
    Bootstrap,
    Calibration,
    Estimate,
    Floats,
    Measures,
    auc,
    auc_interval,
    auc_p_against_chance,
    calibration,
    call_measures,
    holm,
    majority_baseline,
    p_against_baseline,
    person_bootstrap,
    proportion,
    weighted_auc,
    within_auc,
)

COLUMNS = ("exam", "person", "task", "model", "repeat", "fold", "seed", "split", "class", "y", "score", "threshold")
FIT = ["task", "model", "repeat", "fold", "seed"]  # what names one fitted model
LEVEL = 0.05
FEW = 10  # persons of a class


@dataclass(frozen=True)
class TaskResult:
    """All that a table or figure needs about one model on one task."""

    task: str
    model: str
    positive: str
    num_exams: int
    num_persons: int
    num_positive: int
    prevalence: float
    threshold: float
    auc: Estimate
    auc_bootstrap: Bootstrap
    p_chance: float
    p_holm: float
    num_datasets: int
    lowest_prevalence: float  # of a data set
    highest_prevalence: float
    auc_of_dataset: float  # of a score that knows the data set of an exam and nothing else
    auc_within: Estimate  # of pairs of one data set; NaN of a single data set, and where none has both classes
    measures: Measures
    baseline: float
    p_baseline: float
    calibration: Calibration
    few: bool
    pooled: bool
    num_fits: int  # whose scores of an exam are averaged
    lowest_fit_auc: float  # of these fits, each alone; NaN of one fit
    highest_fit_auc: float
    y: NDArray[np.int64] = field(repr=False, compare=False)
    score: Floats = field(repr=False, compare=False)

    @property
    def against_chance(self) -> Literal["better", "worse", "neither"]:
        """What may be said: Holm's P is below 0.05, and the intervals that draw persons lie on one side of 0.5.

        With several data sets the interval within them counts too. What is NaN shows nothing.
        """
        intervals: list[Bootstrap | Estimate] = [self.auc_bootstrap]
        intervals += [self.auc_within] if self.num_datasets > 1 else []
        if self.p_holm < LEVEL and all(interval.low > 0.5 for interval in intervals):
            return "better"
        return "worse" if self.p_holm < LEVEL and all(interval.high < 0.5 for interval in intervals) else "neither"


def evaluate(predictions: pd.DataFrame) -> list[TaskResult]:
    """One result per task and model, in the order of the table; Holm adjusts over all of them.

    Raises:
        UsageError: The table cannot be evaluated honestly (see `held_out`).
    """
    rows = _test_rows(predictions)
    of_fits = dict(list(rows.groupby(["task", "model"])))
    results = [_result(exams, of_fits[name]) for name, exams in _averaged(rows).groupby(["task", "model"], sort=False)]
    adjusted = holm([result.p_chance for result in results])
    return [replace(result, p_holm=p) for result, p in zip(results, adjusted, strict=True)]


def held_out(predictions: pd.DataFrame) -> pd.DataFrame:
    """The test rows, one per task, model and exam, with a column `call`.

    Several fits of one model (seeds, repeats) are averaged, scores and thresholds alike: an ensemble that makes one
    call. `num_fits` counts them. `pooled` marks exams of which each was scored by some folds only, as in
    cross-validation. `dataset` is empty where the predictions have none.

    Raises:
        UsageError: Columns or test rows are missing, labels are not 0/1, scores are not in [0, 1], an exam was scored
            twice by one fit, or a person is in both validation and test of one fit.
    """
    return _averaged(_test_rows(predictions))


def _test_rows(predictions: pd.DataFrame) -> pd.DataFrame:
    """What each fit says of its test exams, and what it would say if it knew of each its data set alone."""
    _demand(predictions)
    dataset = predictions["dataset"].astype(object).fillna("").astype(str) if "dataset" in predictions else ""
    named = predictions.assign(dataset=dataset)
    several = named.groupby("task")["class"].transform("nunique") > 1
    if several.any():  # one-vs-rest: every class is a question of its own
        named["task"] = named["task"].mask(several, named["task"] + ": " + named["class"].astype(str))
    rows = named[named["split"] == "test"]
    _demand_one_row_per_fit(rows)
    return _with_share_of_dataset(rows, named[named["split"] == "val"])


def _with_share_of_dataset(rows: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    """Adds `share_of_dataset`: the positive share of the exam's data set among the validation exams of the fit.

    Of a data set without such exams (`dataset_known` is False) whoever knows the data set alone knows nothing: it gets
    the share of all. Test exams have no part in it: their own shares would order them by what is to be found out.
    """
    of_all = val.groupby(FIT, dropna=False)["y"].mean().rename("of_all").reset_index()
    of_one = val.groupby([*FIT, "dataset"], dropna=False)["y"].mean().rename("of_one").reset_index()
    rows = rows.merge(of_all, how="left", on=FIT).merge(of_one, how="left", on=[*FIT, "dataset"])
    share = rows["of_one"].fillna(rows["of_all"])
    return rows.assign(share_of_dataset=share, dataset_known=rows["of_one"].notna()).drop(columns=["of_one", "of_all"])


def _averaged(rows: pd.DataFrame) -> pd.DataFrame:
    keys = ["task", "model", "exam"]
    exams = rows.groupby(keys, sort=False, as_index=False).agg(
        person=("person", "first"), dataset=("dataset", "first"), y=("y", "first"), positive=("class", "first"),
        score=("score", "mean"), threshold=("threshold", "mean"), num_fits=("score", "size"),
        num_folds=("fold", "nunique"), share_of_dataset=("share_of_dataset", "mean"),
        dataset_known=("dataset_known", "any"),
    )  # fmt: skip
    folds = rows.groupby(["task", "model"])["fold"].nunique().rename("all_folds")
    exams = exams.join(folds, on=["task", "model"])
    exams["y"] = exams["y"].astype(int)
    return exams.assign(
        call=(exams["score"] >= exams["threshold"]).astype(int), pooled=exams["num_folds"] < exams["all_folds"]
    ).drop(columns=["num_folds", "all_folds"])


def _result(exams: pd.DataFrame, rows: pd.DataFrame) -> TaskResult:
    y, score = exams["y"].to_numpy(), exams["score"].to_numpy(float)
    measures, baseline, first = call_measures(exams), majority_baseline(y), exams.iloc[0]
    num_right = measures.true_positive + measures.true_negative
    prevalence = exams.groupby("dataset")["y"].mean()
    num_fits, pooled = int(exams["num_fits"].max()), bool(exams["pooled"].any())
    of_fits = _aucs_of_fits(rows, pooled) if num_fits > 1 else []
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
        p_holm=NAN,
        num_datasets=len(prevalence),
        lowest_prevalence=float(prevalence.min()),
        highest_prevalence=float(prevalence.max()),
        auc_of_dataset=_auc_of_dataset(exams),
        auc_within=_auc_within(exams) if len(prevalence) > 1 else Estimate(NAN),
        measures=measures,
        baseline=baseline,
        p_baseline=p_against_baseline(num_right, len(y), baseline),
        calibration=calibration(y, score),
        few=_persons_of_rarer(exams) < FEW,
        pooled=pooled,
        num_fits=num_fits,
        lowest_fit_auc=min(of_fits, default=NAN),
        highest_fit_auc=max(of_fits, default=NAN),
        y=y,
        score=score,
    )


def _auc_of_dataset(exams: pd.DataFrame) -> float:
    """NaN where validation knows fewer than two of the data sets: there is nothing to tell them apart by."""
    if exams.loc[exams["dataset_known"], "dataset"].nunique() < 2:
        return NAN
    return auc(exams["y"], exams["share_of_dataset"].round(12))  # equal shares stay equal whatever the order of fits


def _auc_within(exams: pd.DataFrame) -> Estimate:
    """AUC within data sets and its bootstrap over persons.

    A handful of persons is in every resample, and two that happen to stand in order would always do. Where a class has
    few in the data sets that have both, the interval is Wilson's for that many trials, if that reaches further.
    """
    value = float(within_auc(exams, np.ones((1, len(exams)), dtype=int))[0])
    drawn = person_bootstrap(exams, within_auc)
    rarer = sum(_persons_of_rarer(part) for _, part in exams.groupby("dataset"))
    if rarer >= FEW or math.isnan(value):
        return Estimate(value, drawn.low, drawn.high)
    wide = proportion(value * rarer, rarer)
    return Estimate(value, min(drawn.low, wide.low), max(drawn.high, wide.high))


def _persons_of_rarer(exams: pd.DataFrame) -> int:
    """Persons with a positive exam, or with a negative one: whoever are fewer."""
    return int(min(exams.loc[exams["y"] == label, "person"].nunique() for label in (0, 1)))


def _aucs_of_fits(rows: pd.DataFrame, pooled: bool) -> list[float]:
    """AUC of each fit alone. Folds that have the exams divided among them are one fit together."""
    fit = ["repeat", "seed"] if pooled else ["repeat", "fold", "seed"]
    areas = [auc(part["y"], part["score"]) for _, part in rows.groupby(fit, dropna=False)]
    return [area for area in areas if math.isfinite(area)]


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
