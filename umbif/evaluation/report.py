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
from umbif.evaluation.evaluate import COLUMNS, TaskResult, evaluate
from umbif.evaluation.figures import STYLES, task_figure
from umbif.evaluation.published import CITATION, PUBLISHED, Published, arithmetic, published_task
from umbif.evaluation.words import MANY, interval, limits, methods, number, p_value, percent, signed, summary
from umbif.files import no_folder, read_mapping, read_parquet
from umbif.pages.page import data_uri, render, svg, write_page

MEASURES = ("accuracy", "sensitivity", "specificity", "ppv", "npv", "f1")
PACKAGES = ("umbif", "numpy", "scipy", "statsmodels", "scikit-learn", "pandas", "matplotlib")
# Of a recipe's model and data: what changes no score, and what is asked of the runs themselves. The corpus says what it
# is, as each run may have copied it to a disk of its own, and tables say what they call a model.
NO_PART_OF_A_MODEL = (
    "model.model_name", "model.encoder.activation_checkpointing", "data.corpus", "data.seed", "data.num_workers",
    "data.cache_gib",
)  # fmt: skip


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
        notes=[*notes, *limits(results)],
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
    compared = folder / "comparisons.csv"
    compared.unlink(missing_ok=True)  # of the page that this one replaces
    if comparisons:
        rows = [{**asdict(c), "shown": c.shown} for c in comparisons]
        pd.json_normalize(rows, sep="_").to_csv(compared, index=False)
    printed = [{"task": p.task, "model": p.model, **p.figures, "inconsistent": p.inconsistent,
                **dict(zip(("auc", "auc_low", "auc_high"), p.auc or (), strict=False))} for p in PUBLISHED]  # fmt: skip
    pd.DataFrame(printed).to_csv(folder / "published.csv", index=False)


def _charts(task: str, results: Sequence[TaskResult], models: Sequence[str]) -> list[str]:
    """One figure for every six models: as many as can be told apart."""
    label = f"ROC curve, calibration and scores: {task}"
    parts = [results[start : start + len(STYLES)] for start in range(0, len(results), len(STYLES))]
    return [svg(task_figure(part, models), label) for part in parts]


def _plain(result: TaskResult) -> dict[str, Any]:
    values = {name: value for name, value in asdict(result).items() if name not in ("y", "score")}
    return {**values, "against_chance": result.against_chance}


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
    """Keys of the recipes, and `corpus`, that have several values where they are kept."""
    settings = [_settings(run) for run in runs if (Path(run) / "recipe.yaml").is_file()]
    differ = [key for key in sorted({*chain(*settings)}) if len({str(one.get(key)) for one in settings}) > 1]
    return differ if len(_corpora(runs)) < 2 else ["corpus", *differ]


def _settings(run: Path) -> dict[str, Any]:
    """What of a run's recipe makes its model, by dotted key."""
    tree = read_mapping(Path(run) / "recipe.yaml", "Copy it again, or move it away", yaml.safe_load)
    (flat,) = pd.json_normalize({name: tree.get(name) for name in ("model", "data")}).to_dict("records")
    flat |= {"data.labels": Path(str(flat.get("data.labels"))).name}  # its folder may be a disk of the run's own, too
    return {str(key): value for key, value in flat.items() if key not in NO_PART_OF_A_MODEL}


def _corpora(runs: Sequence[Path]) -> set[str]:
    """Identities of what the runs were trained on, as far as they tell."""
    configs = [Path(run) / "encoder" / "config.json" for run in runs]
    told = [read_mapping(path, "Copy it again, or move it away").get("corpus") for path in configs if path.is_file()]
    return {str(identity) for identity in told if identity is not None}


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
