"""The page of a training run, while it trains, at its end or after it was cut off: curves, pictures, warnings."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from safetensors import SafetensorError, safe_open

from umbif import __version__
from umbif.encoders.weights import CONFIG, WEIGHTS, read_config
from umbif.errors import Problem, UsageError
from umbif.files import read_mapping, reading
from umbif.pages.curves import Curve, curves_figure
from umbif.pages.page import data_uri, render, svg, write_page
from umbif.progress import duration

DASH = "–"
SKIPPED = "skipped"  # what the guard says in log.txt of a step that was not taken
PER_SEQUENCE = "val/reconstruction_"
INPUT_BOUND, COLLAPSED, FALLEN, MANY_SKIPPED, SLOW = 0.05, 0.01, 0.5, 0.01, 1.5


@dataclass(frozen=True)
class Chart:
    """A figure of the page: what is drawn, and what it says."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]  # column of metrics.csv, name in the legend
    words: str
    chance: str | float | None = None  # a level, or the column that holds it
    percent: bool = False


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as far as it is there."""

    folder: Path
    metrics: pd.DataFrame  # by step
    recipe: dict[str, Any]
    recipe_text: str
    machine: dict[str, Any]
    encoder: dict[str, Any]
    log: str

    def last(self, column: str) -> float | None:
        """The last value of a column."""
        values = self.values(column)
        return None if values.empty else float(values.iloc[-1])

    def values(self, column: str) -> "pd.Series[float]":
        """The finite values of a column by step, without gaps; empty where there is no such column."""
        if column not in self.metrics:
            return pd.Series(dtype=float)
        values = pd.to_numeric(self.metrics[column], errors="coerce")
        return values[np.isfinite(values)]  # a skipped step leaves a norm that no axis can hold

    @property
    def steps(self) -> int:
        """Optimiser steps done: rows are counted from 0."""
        return int(self.metrics.index.max()) + 1 if len(self.metrics) else 0

    @property
    def num_skipped(self) -> int:
        """Steps that the guard did not take."""
        return sum("WARNING" in line and SKIPPED in line for line in self.log.splitlines())


def has_page(folder: Path) -> bool:
    """Whether a run is to be shown by its curves: it has them, and no predictions."""
    return (folder / "metrics.csv").is_file() and not (folder / "predictions.parquet").is_file()


def write_run_page(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of one run.

    Args:
        folder: Of the run: metrics.csv, and whatever else there is of recipe.yaml, environment.json, log.txt,
            figures/ and encoder/.
        out: The page, or a folder for its `report.html`; by default in the run.

    Returns:
        Path of the page.

    Raises:
        UsageError: There is no metrics.csv, or a file of another origin in the page's place.
    """
    run = read_run(Path(folder))
    page = Path(out or folder)
    page = page if page.suffix.lower() in (".html", ".htm") else page / "report.html"
    sections = [(title, [drawn for chart in charts if (drawn := _drawn(chart, run))]) for title, charts in _plan(run)]
    html = render(
        "run.html.j2",
        title=run.folder.resolve().name,
        date=date.today().isoformat(),
        version=__version__,
        summary=summary(run),
        facts=facts(run),
        findings=findings(run),
        sections=[(title, figures) for title, figures in sections if figures],
        pictures=_pictures(run.folder / "figures"),
        table=last_values(run),
        recipe=run.recipe_text,
        machine=run.machine,
    )
    return write_page(page, html)


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        UsageError: It has no metrics.csv.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise UsageError(Problem("The run has no metrics.csv", str(folder), "`umbif fit` writes it as it trains."))
    return Run(
        folder, _metrics(path), _mapping(folder / "recipe.yaml", yaml.safe_load), _text(folder / "recipe.yaml"),
        _mapping(folder / "environment.json"), _encoder(folder / "encoder"), _text(folder / "log.txt"),
    )  # fmt: skip


# --- figures ---


def _plan(run: Run) -> list[tuple[str, list[Chart]]]:
    """Every section with the charts that it may hold; those without values are left out later."""
    return [
        ("Losses", _losses(run)),
        ("What the encoder knows", _knowledge(run)),
        ("Optimisation", [LEARNING_RATE, GRADIENT]),
        ("Speed", [EXAMS_PER_S, MFU, DATA_WAIT, MEMORY]),
        ("Lost time", [GOODPUT, STALL, SLOWEST]),
    ]


LEARNING_RATE = Chart("Learning rate", "Learning rate", (("train/lr", ""),), "Warm-up and decay, as the recipe asks.")
GRADIENT = Chart(
    "Gradient norm", "Norm", (("train/gradient_norm", ""),),
    "Before clipping. Single spikes are harmless; a rise over many steps announces divergence: lower model.lr.",
)  # fmt: skip
EXAMS_PER_S = Chart(
    "Throughput", "Exams per second", (("throughput/exams_per_s", ""),),
    "Over all processes, validation left out. A level that sinks points to the file system or to a shared machine.",
)  # fmt: skip
MFU = Chart(
    "Model FLOPs utilisation", "Share of the peak", (("throughput/mfu", ""),),
    "Arithmetic that the model needs, over what the device could do in the time. On GPUs 40% is very good; below 20% "
    "try larger batches, compilation and fewer waits.", percent=True,
)  # fmt: skip
DATA_WAIT = Chart(
    "Waiting for data", "Share of the time", (("throughput/data_wait", ""),),
    "Above 5% the run is input bound: more data.num_workers, or a corpus on a faster disk.", percent=True,
)  # fmt: skip
MEMORY = Chart(
    "Memory of the GPU", "GiB at the highest", (("throughput/memory_gib", ""),), "Room above it allows larger batches."
)
GOODPUT = Chart(
    "Time that counts", "Share of all time", (("throughput/goodput", ""),),
    "Training that no fault has undone, over the time since the first start. A sharp fall is a start; a low level "
    "after many of them asks for more frequent checkpoints.", percent=True,
)  # fmt: skip
STALL = Chart(
    "Waiting for checkpoints", "Share of the time", (("throughput/checkpoint_stall", ""),),
    "Since this start. Above 1%: less frequent checkpoints, or a faster disk.", percent=True,
)  # fmt: skip
SLOWEST = Chart(
    "The slowest process", "Times the median", (("throughput/slowest", ""),),
    "Of the encoder's forward. All wait for the slowest at every step; from 1.5 on, log.txt names its machine.",
)  # fmt: skip
LOSS_WORDS = {
    "loss": "The weighted sum that is minimised. Worry when validation turns upward while training goes on down: the "
    "encoder memorises.",
    "reconstruction": "Mean squared error of hidden patches, in units of the variance of the brain, or of each patch "
    "where those are normalised: 1 is what predicting the mean gives.",
    "contrast": "Whether a view finds its sibling among the views of other exams. It starts above the "
    "logarithm of their number, which is what guessing gives. A sudden fall to 0 is a shortcut.",
}
RANK = Chart(
    "RankMe", "Directions in use", (("monitor/rank_me", ""),),
    "How many directions features fill about their mean: the number of exams watched is the most. Worry when it falls "
    "and keeps falling: the encoder collapses into few directions.",
)  # fmt: skip
SPREAD = Chart(
    "Spread of features", "Standard deviation × √width", (("monitor/feature_std", ""),),
    "1 is an even spread, 0 is one point for all exams: a collapse. Mean tokens have a large part in common, so 0.05 "
    "to 0.4 is usual. Worry below 0.01, or when it sinks without end.",
)  # fmt: skip


def _losses(run: Run) -> list[Chart]:
    """One chart for each loss, training beside validation, and one of the sequences."""
    columns = [str(c) for c in run.metrics]
    names = [c.split("/", 1)[1] for c in columns if c.startswith(("train/", "val/")) and PER_SEQUENCE not in c]
    names = [name for name in dict.fromkeys(names) if name not in ("gradient_norm", "lr")]
    charts = [
        Chart(name.capitalize(), "Loss", ((f"train/{name}", "training"), (f"val/{name}", "validation")),
              LOSS_WORDS.get(name, "")) for name in names
    ]  # fmt: skip
    sequences = [c.removeprefix(PER_SEQUENCE) for c in columns if c.startswith(PER_SEQUENCE)]
    words = "Validation. A sequence that stays behind the others is rare in the corpus, noisy or badly aligned."
    lines = tuple((PER_SEQUENCE + name, name) for name in sequences)
    return [*charts, Chart("Reconstruction by sequence", "Loss", lines, words)]


def _knowledge(run: Run) -> list[Chart]:
    """Collapse, and what neighbours and a line know of each label."""
    labels = [str(c).removeprefix("monitor/knn_") for c in run.metrics if str(c).startswith("monitor/knn_")]
    charts = [RANK, SPREAD]
    for name in labels:
        charts += [
            Chart(f"{name}: nearest neighbours", "Accuracy", ((f"monitor/knn_{name}", ""),),
                  "Mean over the classes of the share of exams whose neighbours, all of other persons, tell the class. "
                  "Few exams: read the trend, not the value.", f"monitor/chance_{name}"),
            Chart(f"{name}: linear probe", "AUC", ((f"monitor/probe_{name}", ""),),
                  "Of a logistic regression on frozen features, cross-validated by person. No training uses these "
                  "labels. Training exams all the same: this is no test result.", 0.5),
        ]  # fmt: skip
    return charts


def _drawn(chart: Chart, run: Run) -> dict[str, Any] | None:
    curves = [Curve(name, values) for column, name in chart.lines if not (values := run.values(column)).empty]
    if not curves:
        return None
    chance = run.last(chart.chance) if isinstance(chart.chance, str) else chart.chance
    figure = curves_figure(curves, chart.unit, chance, chart.percent)
    return {"title": chart.title, "svg": svg(figure, f"{chart.title} over training steps"), "words": chart.words}


def _pictures(folder: Path) -> list[tuple[str, str]]:
    paths = sorted(folder.glob("reconstruction_*.png")) if folder.is_dir() else []
    return [(path.stem.removeprefix("reconstruction_"), data_uri(path)) for path in paths]


# --- words ---


def summary(run: Run) -> str:
    """What this run is and how far it is, in a sentence or two."""
    what = str(run.recipe.get("about", {}).get("summary", "") or "Training")
    planned = (run.recipe.get("trainer") or {}).get("max_steps")
    exported = int(run.encoder.get("steps", 0))
    done = max(run.steps, exported)
    if exported and (planned is None or exported >= planned):
        return f"{what}. Finished after {done:,} steps."
    of = f" of {planned:,}" if isinstance(planned, int) else ""
    return f"{what}. Step {done:,}{of}: still training, or cut off. The same command goes on."


def facts(run: Run) -> list[tuple[str, str]]:
    """Large figures for the top of the page, each with what it counts."""
    slots, parameters = run.last("slot"), run.encoder.get("num_parameters")
    shown = [
        (f"{run.steps:,}", "steps"),
        (f"{int(slots):,}" if slots else "", "exams seen"),
        (duration(training_s(run)) if training_s(run) else "", "in training steps"),
        (_count(parameters) if parameters else "", "parameters of the encoder"),
        (_hardware(run), "hardware"),
    ]
    return [(value, name) for value, name in shown if value]


def training_s(run: Run) -> float:
    """Seconds in training steps: exams over their rates, so that pauses between resumptions do not count."""
    both = run.metrics.reindex(columns=["slot", "throughput/exams_per_s"]).dropna()
    return float((both["slot"].diff().fillna(both["slot"]) / both["throughput/exams_per_s"]).sum())


def findings(run: Run) -> list[str]:
    """What a person should look into, plainly; empty where nothing stands out."""
    found = []
    if run.num_skipped:
        share = "" if run.num_skipped < MANY_SKIPPED * run.steps else " That is many: lower model.lr."
        found.append(f"{run.num_skipped:,} of {run.steps:,} steps were skipped by the guard; log.txt says why.{share}")
    if (wait := _recent(run, "throughput/data_wait")) is not None and wait > INPUT_BOUND:
        found.append(f"Training waits for data {wait:.0%} of its time: it is input bound. Raise data.num_workers.")
    if (slowest := _recent(run, "throughput/slowest")) is not None and slowest > SLOW:
        found.append(f"One process takes {slowest:.1f} times as long as the median, and all wait for it: see log.txt.")
    if (spread := run.last("monitor/feature_std")) is not None and spread < COLLAPSED:
        found.append(f"Features of different exams are nearly alike (spread {spread:.2f}): the encoder has collapsed.")
    rank = run.values("monitor/rank_me")
    if len(rank) > 2 and rank.iloc[-1] < FALLEN * rank.max():
        found.append(f"RankMe fell from {rank.max():.1f} to {rank.iloc[-1]:.1f}: features lose directions.")
    val = run.values("val/loss")
    if len(val) > 4 and val.iloc[-1] > 1.05 * val.min():
        found.append(f"The validation loss was lowest at step {val.idxmin():,} and has risen since.")
    return found


def last_values(run: Run) -> list[dict[str, str]]:
    """First and last value of every column, for the table."""
    rows = []
    for column in run.metrics.drop(columns=["slot"], errors="ignore"):
        values = run.values(str(column))
        if not values.empty:
            ends = [float(values.iloc[0]), float(values.iloc[-1])]
            first, last = (f"{v:.4g}".replace("-", "−") for v in ends)
            rows.append({"name": str(column), "first": first, "last": last, "step": f"{int(values.index[-1]):,}"})
    return rows


def _recent(run: Run, column: str) -> float | None:
    """Mean of the last quarter: the start of a run is no measure of it."""
    values = run.values(column)
    return None if values.empty else float(values.iloc[-max(1, len(values) // 4) :].mean())


def _hardware(run: Run) -> str:
    trainer: dict[str, Any] = run.recipe.get("trainer") or {}
    gpus = trainer.get("accelerator") in ("gpu", "cuda")
    nodes, devices = trainer.get("num_nodes", 1), trainer.get("devices", 1)
    many = f"{nodes} × {devices}" if nodes != 1 else f"{devices}"
    if gpus:
        return f"{many} GPU{'s' if many != '1' else ''}"
    cores = run.machine.get("cores")
    return f"{cores} CPU cores" if cores else ""


def _count(number: int) -> str:
    return f"{number / 1e6:.3g} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


# --- files ---


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _metrics(path: Path) -> pd.DataFrame:
    with reading(path, "Copy it again, or delete it: a run that goes on begins another"):
        table = pd.read_csv(path, on_bad_lines="skip")  # a run that trains may be in the middle of a line
        table["step"] = pd.to_numeric(table["step"], errors="coerce")
        return table.dropna(subset="step").astype({"step": int}).set_index("step").sort_index()


def _mapping(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    return read_mapping(path, "Copy it again, or move it away: the page does without", parse) if path.is_file() else {}


def _encoder(folder: Path) -> dict[str, Any]:
    """Config of the exported encoder and its `num_parameters`; empty before export."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return {}
    config = read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            shapes: Sequence[Sequence[int]] = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except SafetensorError:
        return config
    return {**config, "num_parameters": sum(math.prod(shape) for shape in shapes)}
