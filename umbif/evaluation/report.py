"""The report: one HTML page for clinicians and reviewers, from `predictions.parquet` alone, and its tables as CSV."""

import hashlib
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from umbif.errors import Problem, UsageError
from umbif.evaluation.compare import Comparison, compare_all
from umbif.evaluation.evaluate import COLUMNS, evaluate
from umbif.evaluation.figures import STYLES, task_figure
from umbif.evaluation.published import CITATION, PUBLISHED, Published, arithmetic, published_task
from umbif.evaluation.statistics import Bootstrap, Difference, Estimate, TaskResult
from umbif.files import no_folder, read_mapping, read_parquet
from umbif.pages.page import data_uri, render, svg, write_page

LEVEL = 0.05
MANY = 3  # models, or differences, that a sentence can still name
MEASURES = ("accuracy", "sensitivity", "specificity", "ppv", "npv", "f1")
PACKAGES = ("umbif", "numpy", "scipy", "statsmodels", "scikit-learn", "pandas", "matplotlib")
DASH = "–"
NO_PART_OF_A_MODEL = ("data.seed", "data.num_workers", "data.cache_gib")  # of a recipe's model and data


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "Held-out evaluation",
    notes: Sequence[str] = (),
    figures: Sequence[tuple[str, Path]] = (),
    cohort: Mapping[str, Any] | None = None,
) -> Path:
    """Evaluates the predictions of several runs on one page.

    Args:
        runs: Run folders, each with `predictions.parquet`.
        out: The page (`*.html`), or a folder to put `report.html` in. Tables go beside it, to `report_tables/`
            or whatever the page is called.
        title: Heading of the page.
        notes: Limits a reader must know first, such as "These exams are synthetic."
        figures: Captions and picture files, shown after the results.
        cohort: Any of `volumes`, `exams`, `persons` (int), `quarantined` (reason → int), `split` (name → int).

    Returns:
        Path of the page.

    Raises:
        UsageError: A run has no predictions, they cannot be evaluated honestly, or `out` is a file of another origin.
    """
    predictions = _read(runs)
    results, comparisons = evaluate(predictions), compare_all(predictions)
    models = list(dict.fromkeys(result.model for result in results))
    by_task = {task: [r for r in results if r.task == task] for task in dict.fromkeys(r.task for r in results)}
    page = out if out.suffix.lower() in (".html", ".htm") else out / "report.html"
    tables = page.with_name(f"{page.stem}_tables")
    html = render(
        "report.html.j2",
        tables=tables.name,
        title=title,
        summary=summary(results, comparisons),
        notes=[*notes, *_limits(results)],
        by_task=by_task,
        comparisons=comparisons,
        charts={task: _charts(task, part, models) for task, part in by_task.items()},
        pictures=[(caption, data_uri(Path(path))) for caption, path in figures],
        published=_published_rows(results),
        arithmetic=arithmetic(),
        citation=CITATION,
        cohort=dict(cohort or {}),
        methods=methods(results, comparisons),
        provenance=_provenance(runs),
        measures=MEASURES,
        nan=math.nan,
        number=number, interval=interval, p_value=p_value, signed=signed, percent=percent,
    )  # fmt: skip
    write_page(page, html)
    _write_tables(tables, results, comparisons)
    return page


# --- words ---


def summary(results: Sequence[TaskResult], comparisons: Sequence[Comparison]) -> str:
    """What was found, in a sentence or two without symbols."""
    persons = max(result.num_persons for result in results)
    models = list(dict.fromkeys(result.model for result in results))
    said = _by_model(results, models) if len(models) <= MANY else _by_task(results)
    text = f"On held-out exams of up to {persons} persons, " + "; ".join(said) + "."
    shown = [f"{comparison.task}: {comparison.words}" for comparison in comparisons if comparison.shown]
    if len(shown) > MANY:
        shown = [f"{len(shown)} of {len(comparisons)} comparisons between models showed a difference."]
    if comparisons and not shown:
        shown = ["No difference between models was shown."]
    return " ".join([text, *shown])


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
        "Mann–Whitney test, which takes exams as independent, adjusted by Holm's method over all rows of the table.",
        "Accuracy, sensitivity, specificity and predictive values have Wilson intervals, F1 a person bootstrap. "
        "Accuracy is set against always calling the more frequent class (exact one-sided binomial P). Calibration is "
        "the Brier score, the intercept and slope of logistic recalibration, and the expected calibration error in "
        "quantile bins.",
    ]
    if comparisons:
        paragraphs.append(
            "Models were compared on the same exams by DeLong's paired test, a person bootstrap of the difference and "
            "McNemar's exact test of the calls. P values of the comparisons are adjusted by Holm's "
            "method; a difference counts as shown where both intervals exclude 0 and the adjusted P is below 0.05."
        )
    return paragraphs


def _by_model(results: Sequence[TaskResult], models: Sequence[str]) -> list[str]:
    verdicts: dict[str, list[str]] = {}
    for model in models:
        verdicts.setdefault(_verdict([r for r in results if r.model == model]), []).append(model)
    return [f"{_listed(alike)} {verdict}" for verdict, alike in verdicts.items()]


def _by_task(results: Sequence[TaskResult]) -> list[str]:
    tasks = {task: [r for r in results if r.task == task] for task in dict.fromkeys(r.task for r in results)}
    better = {task: sum(r.p_holm < LEVEL and r.auc.value > 0.5 for r in part) for task, part in tasks.items()}
    return [f"{better[task]} of {len(part)} models did better than chance on {task}" for task, part in tasks.items()]


def _verdict(results: Sequence[TaskResult]) -> str:
    beyond = [r.task for r in results if r.p_holm < LEVEL and r.auc.value > 0.5]
    below = [r.task for r in results if r.p_holm < LEVEL and r.auc.value < 0.5]
    rest = [r.task for r in results if r.task not in (*beyond, *below)]
    parts = [f"did better than chance on {_listed(beyond)}"] if beyond else []
    parts += [f"did worse than chance on {_listed(below)} (are the labels turned round?)"] if below else []
    parts += [f"did not show more than chance on {_listed(rest)}"] if rest else []
    return " but ".join(parts)


def _limits(results: Sequence[TaskResult]) -> list[str]:
    limits = [
        f"{r.model} on {r.task} is an ensemble: each score is the mean of {r.num_fits} fits."
        for r in results if r.num_fits > 1
    ]  # fmt: skip
    if few := list(dict.fromkeys(r.task for r in results if r.few)):
        limits.append(
            f"{_listed(few)}: fewer than 10 test exams in one class. Such intervals are too narrow more often than "
            "their 95% says."
        )
    if pooled := list(dict.fromkeys(r.task for r in results if r.pooled)):
        limits.append(
            f"{_listed(pooled)}: scores of several cross-validation folds are pooled. Folds share training exams, so "
            "intervals are too narrow and P values too small; a held-out test set is needed for a claim."
        )
    if repeated := list(dict.fromkeys(r.task for r in results if r.num_persons < r.num_exams)):
        limits.append(
            f"{_listed(repeated)}: some persons have several test exams. Prefer the person bootstrap there: the other "
            "intervals and the P values take exams as independent."
        )
    return limits


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


# --- tables ---


def _published_rows(results: Sequence[TaskResult]) -> list[tuple[str, list[Published], list[TaskResult]]]:
    """Published task, its printed rows, and our results on a task of that name."""
    tasks = dict.fromkeys(row.task for row in PUBLISHED)
    return [
        (task, [p for p in PUBLISHED if p.task == task], [r for r in results if published_task(r.task) == task])
        for task in tasks
    ]


def _write_tables(folder: Path, results: Sequence[TaskResult], comparisons: Sequence[Comparison]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pd.json_normalize([_plain(result) for result in results], sep="_").to_csv(folder / "results.csv", index=False)
    if comparisons:
        rows = [{**asdict(c), "shown": c.shown} for c in comparisons]
        pd.json_normalize(rows, sep="_").to_csv(folder / "comparisons.csv", index=False)
    printed = [{"task": p.task, "model": p.model, **p.figures, "inconsistent": p.inconsistent,
                **dict(zip(("auc", "auc_low", "auc_high"), p.auc or (), strict=False))} for p in PUBLISHED]  # fmt: skip
    pd.DataFrame(printed).to_csv(folder / "published.csv", index=False)


def _charts(task: str, results: Sequence[TaskResult], models: Sequence[str]) -> list[str]:
    """One figure for every six models: as many as can be told apart."""
    label = f"ROC curve, calibration and scores: {task}"
    parts = [results[start : start + len(STYLES)] for start in range(0, len(results), len(STYLES))]
    return [svg(task_figure(part, models), label) for part in parts]


def _plain(result: TaskResult) -> dict[str, Any]:
    return {name: value for name, value in asdict(result).items() if name not in ("y", "score")}


# --- files ---


def _read(runs: Sequence[Path]) -> pd.DataFrame:
    paths = [Path(run) / "predictions.parquet" for run in runs]
    problems = [Problem("No run was named", cure="Name run folders, such as runs/finetune_idh.")] if not runs else []
    problems += [_no_predictions(path) for path in paths if not path.is_file()]
    if problems:
        raise UsageError(problems)
    cure = "Copy it again, or fine-tune again into another run.dir"
    tables = [read_parquet(path, cure, COLUMNS) for path in paths]
    _demand_one_recipe(dict(zip(runs, tables, strict=True)))
    return pd.concat(tables, ignore_index=True)


def _demand_one_recipe(tables: Mapping[Path, pd.DataFrame]) -> None:
    """Fits that differ in more than their seed are several models: their mean would be nobody's."""
    fits: dict[tuple[str, str], list[Path]] = {}
    for run, rows in tables.items():
        table = rows.drop_duplicates(["task", "model"])
        for task, model in zip(table["task"], table["model"], strict=True):
            fits.setdefault((task, model), []).append(run)
    problems = [
        Problem(
            f"fits of {model} on {task} differ in {', '.join(differ[:MANY])}",
            ", ".join(Path(run).name for run in runs),
            "Give each its own model.model_name, or report them apart",
        )
        for (task, model), runs in fits.items()
        if (differ := _differences(runs))
    ]
    if problems:
        raise UsageError(problems)


def _differences(runs: Sequence[Path]) -> list[str]:
    """Keys of the recipes, where they are kept, that have several values."""
    settings = [_settings(run) for run in runs if (Path(run) / "recipe.yaml").is_file()]
    return [key for key in sorted({*chain(*settings)}) if len({str(one.get(key)) for one in settings}) > 1]


def _settings(run: Path) -> dict[str, Any]:
    """What of a run's recipe makes its model, by dotted key."""
    tree = read_mapping(Path(run) / "recipe.yaml", "Copy it again, or move it away", yaml.safe_load)
    (flat,) = pd.json_normalize({name: tree.get(name) for name in ("model", "data")}).to_dict("records")
    return {str(key): value for key, value in flat.items() if key not in NO_PART_OF_A_MODEL}


def _no_predictions(path: Path) -> Problem:
    if not path.parent.exists():
        return no_folder(path.parent)
    if not path.parent.is_dir():
        return Problem("A run is a folder, and this is a file", str(path.parent), "Name what umbif fit made.")
    cure = "`umbif fit` with a fine-tuning recipe writes it."
    return Problem("The run has no predictions.parquet", str(path.parent), cure)


def _provenance(runs: Sequence[Path]) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"Python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "runs": [_run_facts(Path(run)) for run in runs],
    }


def _run_facts(run: Path) -> dict[str, str]:
    recipe = run / "recipe.yaml"
    return {
        "name": run.resolve().name,
        "sha256": hashlib.sha256((run / "predictions.parquet").read_bytes()).hexdigest()[:16],
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
    }
