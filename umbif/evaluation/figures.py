"""Figures of the report: ROC curve, calibration and scores of every model of a task, safe for colour-blind readers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from umbif.evaluation.evaluate import TaskResult
from umbif.evaluation.statistics import calibration_curve

# Okabe and Ito's palette; the dashes carry the distinction into black-and-white print.
Style = tuple[str, Any]
STYLES: tuple[Style, ...] = (
    ("#0072b2", "-"),
    ("#d55e00", (0, (5, 1.5))),
    ("#009e73", (0, (1.5, 1.2))),
    ("#cc79a7", (0, (6, 1.5, 1.5, 1.5))),
    ("#56606a", (0, (3, 3))),
    ("#e69f00", (0, (8, 2))),
)
LEGEND_COLUMNS = 3
INK = "#3c464f"
FAINT = "#c9d0d6"


def task_figure(results: Sequence[TaskResult], models: Sequence[str]) -> Figure:
    """Three panels for one task: ROC curve, calibration, scores by true class.

    Args:
        results: One per model of the task.
        models: All models of the page: a model keeps its colour and dashes from task to task.
    """
    styles = [STYLES[models.index(result.model) % len(STYLES)] for result in results]
    legend_rows = -(-len(results) // LEGEND_COLUMNS)
    height = 3.8 + 0.35 * max(len(results) - 3, 0) + 0.25 * legend_rows
    figure = Figure(figsize=(11.4, height))
    roc, calibration, scores = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1, 1, 1.05]})
    bottom = (0.58 + 0.25 * legend_rows) / height
    figure.subplots_adjust(left=0.05, right=0.995, top=1 - 0.36 / height, bottom=bottom, wspace=0.24)
    _roc(roc, results, styles)
    _calibration(calibration, results, styles)
    _scores(scores, results, styles)
    for axes in (roc, calibration, scores):
        _calm(axes)
    handles, labels = roc.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.04, 0.0), ncols=LEGEND_COLUMNS, fontsize=9,
                      frameon=False, handlelength=3, columnspacing=3, borderaxespad=0, labelcolor=INK)  # fmt: skip
    return figure


def _roc(axes: Axes, results: Sequence[TaskResult], styles: Sequence[Style]) -> None:
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    axes.text(0.62, 0.56, "chance", color="#8a949c", fontsize=8, rotation=45, ha="center", va="center")
    for (color, dashes), result in zip(styles, results, strict=True):
        if not 0 < result.num_positive < result.num_exams:
            continue
        false, true, _ = roc_curve(result.y, result.score, drop_intermediate=False)
        label = f"{result.model} (AUC {result.auc.value:.3f})"
        axes.plot(false, true, color=color, linestyle=dashes, linewidth=1.8, label=label, clip_on=False)
        chosen = result.measures
        axes.plot([1 - chosen.specificity.value], [chosen.sensitivity.value], "o", color=color, markersize=6.5,
                  markeredgecolor="white", markeredgewidth=1.2, zorder=5, clip_on=False)  # fmt: skip
    axes.set(title="ROC curve", xlabel="1 − specificity", ylabel="Sensitivity", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal", anchor="N")


def _calibration(axes: Axes, results: Sequence[TaskResult], styles: Sequence[Style]) -> None:
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for (color, dashes), result in zip(styles, results, strict=True):
        table = calibration_curve(result.y, result.score)
        axes.vlines(table["predicted"], table["low"], table["high"], color=color, linewidth=1, alpha=0.35)
        axes.plot(table["predicted"], table["observed"], color=color, linestyle=dashes, linewidth=1.4, marker="o",
                  markersize=4.5, markeredgecolor="white", label=result.model, clip_on=False)  # fmt: skip
    axes.set(title="Calibration", xlabel="Mean score", ylabel="Observed share", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal", anchor="N")


def _scores(axes: Axes, results: Sequence[TaskResult], styles: Sequence[Style]) -> None:
    """Two rows of points for each model; the short line is the threshold. Jitter is fixed, so pages compare."""
    ticks, names = [], []
    for row, ((color, _), result) in enumerate(zip(styles, results, strict=True)):
        for truth in (1, 0):
            base = -(row * 2.6 + (1 - truth))
            values = result.score[result.y == truth]
            jitter = np.random.default_rng(0).uniform(-0.28, 0.28, len(values))
            fill = color if truth else "none"
            axes.scatter(values, base + jitter, s=15, facecolors=fill, edgecolors=color, linewidths=0.8, alpha=0.75)
            ticks.append(base)
            names.append("positive" if truth else "negative")
        axes.vlines(result.threshold, -(row * 2.6 + 1.45), -(row * 2.6 - 0.45), color=INK, linewidth=1.2)
        axes.text(0.0, -(row * 2.6 - 0.62), result.model, fontsize=8.5, color=color, va="center", fontweight="bold")
    axes.set(title="Scores by true class", xlabel="Score (bar: threshold)", xlim=(-0.02, 1.02))
    axes.set_yticks(ticks, names)
    axes.set_ylim(-(len(results) * 2.6 - 1.0), 0.95)


def _calm(axes: Axes) -> None:
    axes.title.set(fontsize=10.5, color="#1b232a", fontweight="bold")
    axes.tick_params(labelsize=8.5, colors=INK, length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
