"""AUC by the fast DeLong algorithm (Sun and Xu 2014, doi 10.1109/LSP.2014.2337313), intervals, tests and calibration.

Everything here is meant for a held-out test set split by person, with one score and one call per exam: on pooled
out-of-fold scores these intervals cover too rarely. Proportions that have no exams (0/0) are NaN, never 0.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import expit, logit
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Floats = NDArray[np.float64]
Weights = NDArray[np.int64]
NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; NaN where it is undefined."""

    value: float
    low: float = NAN
    high: float = NAN


@dataclass(frozen=True)
class Bootstrap:
    """Percentile interval over `num_used` resamples; `num_skipped` had no defined value (one class was missing)."""

    low: float
    high: float
    num_used: int
    num_skipped: int


@dataclass(frozen=True)
class Difference:
    """AUC of a minus AUC of b on the same exams."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Measures:
    """What a table of calls says: Wilson intervals, a person bootstrap for F1."""

    accuracy: Estimate
    sensitivity: Estimate
    specificity: Estimate
    ppv: Estimate
    npv: Estimate
    f1: Estimate
    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int


@dataclass(frozen=True)
class Calibration:
    """How far scores can be read as probabilities. Perfect: intercept 0, slope 1, `ece` 0.

    `brier_prevalence` is the Brier score of giving every exam the prevalence: a useful score lies below it.
    """

    brier: float
    brier_prevalence: float
    intercept: Estimate
    slope: Estimate
    ece: float


# --- AUC ---


def auc(y: ArrayLike, score: ArrayLike) -> float:
    """Chance that a positive exam scores above a negative one, ties counting half; NaN if a class is missing."""
    v10, _ = _placements(np.asarray(y), np.atleast_2d(np.asarray(score, dtype=float)))
    return float(v10.mean()) if v10.size else NAN


def delong_covariance(y: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """AUCs and their covariance by DeLong's structural components, from midranks in O(n log n).

    Args:
        y: 0/1 labels, shape (n,).
        scores: One row per model, shape (k, n).

    Returns:
        AUCs (k,) and covariance (k, k); the covariance is NaN where a class has fewer than two exams.
    """
    v10, v01 = _placements(np.asarray(y), np.atleast_2d(np.asarray(scores, dtype=float)))
    k, m, n = len(v10), v10.shape[1], v01.shape[1]
    if min(m, n) == 0:
        return np.full(k, NAN), np.full((k, k), NAN)
    if min(m, n) == 1:
        return v10.mean(axis=1), np.full((k, k), NAN)
    return v10.mean(axis=1), np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n


def auc_interval(y: ArrayLike, score: ArrayLike, level: float = 0.95) -> Estimate:
    """AUC with the DeLong interval on the logit scale, which stays in (0, 1) and covers better in small samples.

    Where DeLong's variance is 0 or undefined (perfect separation, all scores equal, one exam of a class) it would claim
    certainty. There the interval is Wilson's, for a proportion of as many trials as the smaller class has exams.
    That is wide on purpose: the exams of the larger class are taken to add no information.
    """
    labels = np.asarray(y)
    areas, covariance = delong_covariance(labels, score)
    value, variance = float(areas[0]), float(covariance[0, 0])
    if math.isnan(value):
        return Estimate(NAN)
    if not variance > 0 or value in (0.0, 1.0):
        smaller = min(labels.sum(), len(labels) - labels.sum())
        return Estimate(value, *_wilson(value * smaller, smaller, level))
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(variance) / (value * (1 - value))
    return Estimate(value, float(expit(logit(value) - half)), float(expit(logit(value) + half)))


def auc_p_against_chance(y: ArrayLike, score: ArrayLike) -> float:
    """Two-sided P of the Mann-Whitney test, whose statistic is the AUC.

    Its variance holds under the null hypothesis itself (exact in small samples without ties). DeLong's variance is
    that of the observed AUC: it shrinks to 0 near perfect separation and then rejects too often.
    """
    labels, values = np.asarray(y).astype(bool), np.asarray(score, dtype=float)
    if labels.all() or not labels.any():
        return NAN
    if np.ptp(values) == 0:
        return 1.0
    return float(stats.mannwhitneyu(values[labels], values[~labels], alternative="two-sided").pvalue)


def paired_delong(y: ArrayLike, a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Difference:
    """AUC of `a` minus AUC of `b` on the same exams, with DeLong's interval and two-sided P.

    Scores that rank all exams alike give P = 1. A difference without variance has no interval and no P (NaN).
    """
    areas, covariance = delong_covariance(y, np.stack([np.asarray(a, dtype=float), np.asarray(b, dtype=float)]))
    value = float(areas[0] - areas[1])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if math.isnan(variance):
        return Difference(value, NAN, NAN, NAN)
    if variance < 1e-15:  # rounding of a variance that is 0
        return Difference(0.0, 0.0, 0.0, 1.0) if abs(value) < 1e-12 else Difference(value, NAN, NAN, NAN)
    error = math.sqrt(variance)
    half = float(stats.norm.ppf((1 + level) / 2)) * error
    p = float(2 * stats.norm.sf(abs(value) / error))
    return Difference(value, max(value - half, -1.0), min(value + half, 1.0), p)


def _placements(y: NDArray, scores: Floats) -> tuple[Floats, Floats]:
    """Share of negatives below each positive (k, m), and of positives above each negative (k, n)."""
    positive, negative = scores[:, y == 1], scores[:, y == 0]
    m, n = positive.shape[1], negative.shape[1]
    if min(m, n) == 0:
        return positive[:, :0], negative[:, :0]
    together = stats.rankdata(np.hstack([positive, negative]), axis=1)
    v10 = (together[:, :m] - stats.rankdata(positive, axis=1)) / n
    v01 = 1 - (together[:, m:] - stats.rankdata(negative, axis=1)) / m
    return v10, v01


# --- bootstrap over persons ---

Statistic = Callable[[pd.DataFrame, Weights], Floats]


def person_bootstrap(frame: pd.DataFrame, statistic: Statistic, num: int = 2000, seed: int = 0) -> Bootstrap:
    """Percentile interval of a statistic when persons, with all of their exams, are drawn with replacement.

    Args:
        frame: One row per exam, with a column `person`.
        statistic: Takes the frame and how often each row was drawn, shape (num, n), and returns (num,) values, NaN
            where a resample leaves it undefined.
        num: Number of resamples.
        seed: Of the draws.
    """
    codes, persons = pd.factorize(frame["person"])
    draws = np.random.default_rng(seed).multinomial(len(persons), np.full(len(persons), 1 / len(persons)), size=num)
    values = np.asarray(statistic(frame, draws[:, codes]), dtype=float)
    used = values[np.isfinite(values)]
    low, high = np.percentile(used, [2.5, 97.5]) if used.size else (NAN, NAN)
    return Bootstrap(float(low), float(high), int(used.size), int(num - used.size))


def weighted_auc(frame: pd.DataFrame, weights: Weights, score: str = "score") -> Floats:
    """AUC of column `score` against `y` in every resample at once, shape (num,)."""
    return _share(*_wins_and_pairs(frame, weights, score))


def within_auc(frame: pd.DataFrame, weights: Weights) -> Floats:
    """`weighted_auc` of the pairs of one `dataset` alone: knowing which data set an exam is of wins none of them.

    Each data set weighs what it has of such pairs; one with a single class has none.
    """
    datasets = frame["dataset"].to_numpy()
    parts = [np.flatnonzero(datasets == name) for name in np.unique(datasets)]
    each = [_wins_and_pairs(frame.iloc[part], weights[:, part], "score") for part in parts]
    return _share(*np.sum(each, axis=0))


def _wins_and_pairs(frame: pd.DataFrame, weights: Weights, score: str) -> tuple[Floats, Weights]:
    """Pairs of a positive and a negative exam, and those of them that are in order, ties counting half; (num,) each."""
    values = frame[score].to_numpy(float)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)  # tied scores form one group
    positive = frame["y"].to_numpy()[order] == 1
    drawn = weights[:, order]
    above = np.add.reduceat(drawn * positive, starts, axis=1)
    below = np.add.reduceat(drawn * ~positive, starts, axis=1)
    wins = (above * (below.cumsum(axis=1) - below / 2)).sum(axis=1)
    return wins, above.sum(axis=1) * below.sum(axis=1)


def _share(part: Floats, whole: NDArray) -> Floats:
    return np.divide(part, whole, out=np.full(len(whole), NAN), where=whole > 0)


def weighted_f1(frame: pd.DataFrame, weights: Weights) -> Floats:
    """F1 of column `call` against `y` in every resample at once, shape (num,)."""
    y, call = frame["y"].to_numpy() == 1, frame["call"].to_numpy() == 1
    return _share(2 * (weights @ (y & call)), weights @ (y.astype(int) + call.astype(int)))


# --- calls at a threshold ---


def proportion(count: float, total: float) -> Estimate:
    """`count / total` with Wilson's interval; NaN for 0/0."""
    return Estimate(count / total, *_wilson(count, total)) if total else Estimate(NAN)


def call_measures(frame: pd.DataFrame) -> Measures:
    """Confusion-matrix measures of `call` against `y`; the column `person` is what F1's bootstrap draws."""
    y, call = frame["y"].to_numpy() == 1, frame["call"].to_numpy() == 1
    tp, fp, fn, tn = (int(x.sum()) for x in (y & call, ~y & call, y & ~call, ~y & ~call))
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else NAN
    spread = person_bootstrap(frame, weighted_f1)
    return Measures(
        accuracy=proportion(tp + tn, len(y)),
        sensitivity=proportion(tp, tp + fn),
        specificity=proportion(tn, tn + fp),
        ppv=proportion(tp, tp + fp),
        npv=proportion(tn, tn + fn),
        f1=Estimate(f1) if math.isnan(f1) else Estimate(f1, spread.low, spread.high),
        true_positive=tp,
        false_positive=fp,
        false_negative=fn,
        true_negative=tn,
    )


def majority_baseline(y: ArrayLike) -> float:
    """Accuracy of always calling the more frequent class."""
    share = float(np.mean(np.asarray(y)))
    return max(share, 1 - share)


def p_against_baseline(num_right: int, num_exams: int, baseline: float) -> float:
    """Exact one-sided binomial P that so many right calls arise where the true accuracy is only the baseline."""
    return float(stats.binomtest(num_right, num_exams, baseline, alternative="greater").pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted P values; NaN is left out of the family and stays NaN."""
    values = np.asarray(p, dtype=float)
    known = np.isfinite(values)
    adjusted = np.full(len(values), NAN)
    if known.any():
        adjusted[known] = multipletests(values[known], method="holm")[1]
    return [float(value) for value in adjusted]


def _wilson(count: float, total: float, level: float = 0.95) -> tuple[float, float]:
    low, high = proportion_confint(count, total, alpha=1 - level, method="wilson")
    return float(low), float(high)


# --- calibration ---


def calibration(y: ArrayLike, score: ArrayLike) -> Calibration:
    """Brier score, logistic recalibration (Van Calster et al. 2019, doi 10.1186/s12916-019-1466-7) and ECE.

    The intercept is calibration-in-the-large (slope held at 1); the slope is that of the recalibrated model. Both are
    NaN where logistic regression has no solution: one class only, equal scores, or perfect separation.
    """
    labels, values = np.asarray(y, dtype=float), np.asarray(score, dtype=float)
    share = labels.mean()
    curve = calibration_curve(labels, values)
    return Calibration(
        brier=float(np.mean((values - labels) ** 2)),
        brier_prevalence=float(share * (1 - share)),
        intercept=_recalibrate(labels, values, fixed_slope=True),
        slope=_recalibrate(labels, values, fixed_slope=False),
        ece=float((curve["num"] * (curve["observed"] - curve["predicted"]).abs()).sum() / len(labels)),
    )


def calibration_curve(y: ArrayLike, score: ArrayLike) -> pd.DataFrame:
    """Mean score against observed share in quantile bins of about twenty exams, two to ten bins.

    Returns:
        One row per bin: predicted, observed, low, high (Wilson) and num.
    """
    labels, values = np.asarray(y, dtype=float), np.asarray(score, dtype=float)
    bins = pd.qcut(values, min(max(len(values) // 20, 2), 10), labels=False, duplicates="drop")
    # Equal scores have no quantile bins: pandas answers NaN for all, and they form one bin.
    groups = pd.DataFrame({"predicted": values, "observed": labels, "bin": np.nan_to_num(bins.astype(float))})
    binned = groups.groupby("bin")
    table = binned.agg(predicted=("predicted", "mean"), observed=("observed", "mean"), num=("bin", "size"))
    low, high = proportion_confint(binned["observed"].sum(), table["num"], method="wilson")
    return table.assign(low=low, high=high).reset_index(drop=True)


def _recalibrate(y: Floats, score: Floats, fixed_slope: bool) -> Estimate:
    if np.ptp(y) == 0 or np.ptp(score) == 0 or auc(y, score) in (0.0, 1.0):
        return Estimate(NAN)
    line = logit(np.clip(score, 1e-6, 1 - 1e-6))
    design, offset = (np.ones_like(line), line) if fixed_slope else (np.column_stack([np.ones_like(line), line]), None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that fails to converge is answered below
        fit = GLM(y, design, family=Binomial(), offset=offset).fit()
    if not fit.converged:
        return Estimate(NAN)
    low, high = fit.conf_int()[-1]
    return Estimate(float(fit.params[-1]), float(low), float(high))
