"""What the report says: its sentences, and how it prints numbers."""

import math
from collections.abc import Callable, Sequence

from umbif.evaluation.compare import Comparison
from umbif.evaluation.evaluate import FEW, TaskResult
from umbif.evaluation.statistics import Bootstrap, Difference, Estimate

MANY = 3  # models, or differences, that a sentence can still name
DASH = "–"


def summary(results: Sequence[TaskResult], comparisons: Sequence[Comparison]) -> str:
    """What was found, in a sentence or two without symbols."""
    persons = max(result.num_persons for result in results)
    models = list(dict.fromkeys(result.model for result in results))
    said = _by_model(results, models) if len(models) <= MANY else _by_task(results)
    text = f"On held-out exams of up to {persons} persons, " + "; ".join(said) + "."
    return " ".join([text, *_differences(comparisons)])


def methods(results: Sequence[TaskResult], comparisons: Sequence[Comparison]) -> list[str]:
    """Paragraphs to paste into a manuscript."""
    skipped = sum(result.auc_bootstrap.num_skipped for result in results)
    paragraphs = [
        "Every figure is computed on exams marked as test, with one score and one call per exam; several fits of one "
        "model were averaged first. The threshold of each model was chosen on validation exams only, and no person of "
        "a fit's validation exams is among its test exams.",
        "The area under the ROC curve (AUC) is given with a 95% interval by DeLong's method on the logit scale (fast "
        "algorithm of Sun and Xu, IEEE Signal Process Lett 2014;21:1389–93); where DeLong's variance is zero or "
        "undefined, Wilson's interval with the size of the smaller class is used. Beside it stands the percentile "
        f"interval of 2,000 bootstrap resamples of persons ({_skipped(skipped)}). P against chance is the two-sided "
        "Mann–Whitney test, which takes exams as independent, adjusted by Holm's method over all rows of the table. A "
        "model did better (worse) than chance where the adjusted P is below 0.05 and the bootstrap interval, which "
        "takes persons as independent, lies above (below) 0.5.",
        "Accuracy, sensitivity, specificity and predictive values have Wilson intervals, F1 a person bootstrap. "
        "Accuracy is set against always calling the more frequent class (exact one-sided binomial P). Calibration is "
        "the Brier score, the intercept and slope of logistic recalibration, and the expected calibration error in "
        "quantile bins.",
    ]
    if any(result.num_datasets > 1 for result in results):
        paragraphs.append(
            "Where exams come of several data sets whose shares of positive exams differ, a score that does no more "
            "than recognise the data set has an AUC above 0.5. How far above is told by the AUC of a score that knows "
            "the data set alone: its share of positive exams among the validation exams of the fit (the share of all "
            "of these, where it has none), averaged over fits as scores are. The AUC within data sets counts only "
            "pairs of a positive and a negative exam of one data set, with the percentile interval of 2,000 bootstrap "
            f"resamples of persons. Where data sets with both classes have fewer than {FEW} persons of the rarer class "
            "together, that interval reaches at least as far as Wilson's with their number. Better (worse) than chance "
            "then asks that it lies above (below) 0.5, too."
        )
    if comparisons:
        paragraphs.append(
            "Models were compared on the same exams by DeLong's paired test, a person bootstrap of the difference and "
            "McNemar's exact test of the calls. P values of DeLong's test are adjusted by Holm's method over all "
            "comparisons; a difference counts as shown where both intervals exclude 0, the adjusted P is below 0.05 "
            "and both models are means of as many fits. Those of McNemar's test are not adjusted and decide nothing."
        )
    return paragraphs


def _by_model(results: Sequence[TaskResult], models: Sequence[str]) -> list[str]:
    verdicts: dict[str, list[str]] = {}
    for model in models:
        verdicts.setdefault(_verdict([r for r in results if r.model == model]), []).append(model)
    return [f"{_listed(alike)} {verdict}" for verdict, alike in verdicts.items()]


def _by_task(results: Sequence[TaskResult]) -> list[str]:
    return [
        f"{sum(r.against_chance == 'better' for r in part)} of {len(part)} models did better than chance on {task}"
        for task, part in _tasks(results).items()
    ]


def _verdict(results: Sequence[TaskResult]) -> str:
    better, worse, rest = (
        [r.task for r in results if r.against_chance == side] for side in ("better", "worse", "neither")
    )
    parts = [f"did better than chance on {_listed(better)}"] if better else []
    parts += [f"did worse than chance on {_listed(worse)} (are the labels turned round?)"] if worse else []
    parts += [f"did not show more than chance on {_listed(rest)}"] if rest else []
    return " but ".join(parts)


def _differences(comparisons: Sequence[Comparison]) -> list[str]:
    alike = [c for c in comparisons if c.alike]
    said = [f"{c.task}: {c.words}" for c in alike if c.shown]
    if len(said) > MANY:
        said = [f"{len(said)} of {len(alike)} comparisons between models showed a difference."]
    if alike and not said:
        said = ["No difference between models was shown."]
    if unlike := len(comparisons) - len(alike):
        of = f"{unlike} of {len(comparisons)} comparisons"
        said.append(f"Nothing is said of {of}: their models are means of unlike numbers of fits.")
    return said


def limits(results: Sequence[TaskResult]) -> list[str]:
    """What a reader must know before the results, a sentence or two each."""
    said = [
        f"{r.model} on {r.task} is an ensemble: each score is the mean of {r.num_fits} fits. "
        f"Each alone, these have AUCs from {number(r.lowest_fit_auc)} to {number(r.highest_fit_auc)}."
        for r in results if r.num_fits > 1
    ]  # fmt: skip
    several = _tasks([r for r in results if r.num_datasets > 1])
    said += [f"{task}: {_of_datasets(part)}" for task, part in several.items()]
    if few := list(dict.fromkeys(r.task for r in results if r.few)):
        said.append(
            f"{_listed(few)}: fewer than {FEW} test persons in one class. Such intervals are too narrow more often "
            "than their 95% says."
        )
    if pooled := list(dict.fromkeys(r.task for r in results if r.pooled)):
        said.append(
            f"{_listed(pooled)}: scores of several cross-validation folds are pooled. Folds share training exams, so "
            "intervals are too narrow and P values too small; a held-out test set is needed for a claim."
        )
    if repeated := list(dict.fromkeys(r.task for r in results if r.num_persons < r.num_exams)):
        said.append(
            f"{_listed(repeated)}: some persons have several test exams. Prefer the person bootstrap there: the other "
            "intervals and the P values take exams as independent."
        )
    return said


def _of_datasets(results: Sequence[TaskResult]) -> str:
    """What one task's data sets alone would give, and what the models have within them."""
    prevalence = [r.lowest_prevalence for r in results] + [r.highest_prevalence for r in results]
    exams = f"exams of {max(r.num_datasets for r in results)} data sets, {_range(prevalence, percent)} positive."
    alone = [r.auc_of_dataset for r in results if math.isfinite(r.auc_of_dataset)]
    shortcut = (
        f"Knowing only the data set gives AUC {_range(alone, lambda area: number(area, 2))}"
        if alone
        else "What knowing only the data set gives cannot be told without validation exams of two of them"
    )
    defined = [r for r in results if math.isfinite(r.auc_within.value)]
    if not defined:
        return f"{exams} {shortcut}. No data set has both classes, so nothing is said to be better than chance."
    each = [f"{r.model} has {number(r.auc_within.value, 2)} ({interval(r.auc_within, 2)})" for r in defined]
    within = (
        f"within data sets {_listed(each)}" if len(each) <= MANY else "the table has what is found within data sets"
    )
    others = "; differences between models are of all exams" if len(results) > 1 else ""
    return f"{exams} {shortcut}; {within}. Better than chance is said only of what holds within data sets{others}."


def _range(values: Sequence[float], words: Callable[[float], str]) -> str:
    low, high = words(min(values)), words(max(values))
    return low if low == high else f"{low} to {high}"


def _tasks(results: Sequence[TaskResult]) -> dict[str, list[TaskResult]]:
    return {task: [r for r in results if r.task == task] for task in dict.fromkeys(r.task for r in results)}


def _skipped(count: int) -> str:
    return "every resample had both classes" if count == 0 else f"{count:,} resamples in all lacked a class, left out"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- numbers ---


def number(value: float, digits: int = 3) -> str:
    """`0.815`; an undefined value is a dash."""
    return DASH if not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """`+0.042`, for differences."""
    return DASH if not math.isfinite(value) else f"{value:+.{digits}f}".replace("-", "−")


def interval(estimate: Estimate | Bootstrap | Difference, digits: int = 3) -> str:
    """`0.740–0.885`, or `−0.02 to 0.11` where a minus sign would meet the dash."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return DASH
    joint = " to " if estimate.low < 0 else "–"
    return f"{number(estimate.low, digits)}{joint}{number(estimate.high, digits)}"


def percent(share: float) -> str:
    """`14%`."""
    return DASH if not math.isfinite(share) else f"{100 * share:.0f}%"


def p_value(p: float) -> str:
    """Two digits above 0.1, three below, and never zero."""
    if not math.isfinite(p):
        return DASH
    if p < 0.001:
        return "<0.001"
    return f"{p:.2f}" if p >= 0.0995 else f"{p:.3f}"
