"""Figures of the evidence page: scores of every arm, gains of the hybrid, and scores by the number of labels."""

from collections.abc import Sequence

from _aims import ALONE, BEFORE, HYBRID, SMALLEST_GAIN
from _evidence import PRIMARY_TASKS, Cells, difference, mean, probe_of
from _tasks import METRIC, TASKS, Task
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from umbif.evaluation.figures import FAINT, INK, STYLES

LOWEST = -0.2  # of an axis: an R² can fall without end
BY_LABELS = ("lesion", "lesion volume", "enhancing", "idh", "progression", "flair from t1")
LABELS = (16, 64, 256)


def draw_scores(cells: Cells) -> Figure:
    """A panel for each task, a row for each arm."""
    columns = 5
    rows = -(-len(TASKS) // columns)
    figure = Figure(figsize=(12.5, 0.6 + rows * (1.1 + 0.19 * len(cells.arms))), layout="constrained")
    every = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes in every[len(TASKS) :]:
        axes.set_visible(False)
    for axes, task in zip(every, TASKS, strict=False):
        for row, arm in enumerate(cells.arms):
            found = mean(cells, arm, task.name, *probe_of(task.name))
            if found is not None:
                color = STYLES[1][0] if arm == HYBRID else STYLES[0][0]
                low, value, high = (max(LOWEST, number) for number in (found.low, found.value, found.high))
                axes.plot([low, high], [-row, -row], color=color, linewidth=1.5)
                axes.plot([value], [-row], "<" if found.value < LOWEST else "o", color=color, markersize=4)
        axes.set_yticks(range(0, -len(cells.arms), -1), cells.arms)
        label(axes, task.name, METRIC[task.kind])
        calm(axes)
    return figure


def draw_gains(cells: Cells) -> Figure:
    """What the hybrid has more than an untrained, a placebo and a reconstructing encoder; the smallest that counts."""
    others = (*BEFORE, ALONE[0])
    figure = Figure(figsize=(7.5, 0.9 + 0.4 * len(PRIMARY_TASKS)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.axvline(SMALLEST_GAIN, color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
    for style, other, shift in zip(STYLES, others, (0.2, 0, -0.2), strict=False):
        for row, task in enumerate(PRIMARY_TASKS):
            found = difference(cells, HYBRID, other, task, *probe_of(task))
            if found is not None:
                y, label = shift - row, f"over {other}" if not row else None
                axes.plot([found.low, found.high], [y, y], color=style[0], linewidth=1.6)
                axes.plot([found.value], [y], "o", color=style[0], markersize=5, label=label)
    axes.set_yticks(range(0, -len(PRIMARY_TASKS), -1), PRIMARY_TASKS)
    axes.set_xlabel("Gain of the hybrid (dashes: the smallest that counts)", fontsize=9, color=INK)
    figure.legend(loc="outside upper center", ncols=len(others), frameon=False, fontsize=9, labelcolor=INK)
    calm(axes)
    return figure


def draw_labels(cells: Cells) -> Figure:
    """Scores over the number of labelled exams."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    tasks = [task for task in TASKS if task.name in BY_LABELS]
    arms = [arm for arm in (HYBRID, *BEFORE, *ALONE, "histogram") if arm in cells.arms]
    for axes, task in zip(figure.subplots(2, 3).flatten(), tasks, strict=True):
        for (color, dashes), arm in zip(STYLES, arms, strict=False):
            curve(axes, cells, arm, task, color, dashes)
        axes.set_xscale("log")
        axes.set_xticks(LABELS, [str(num) for num in LABELS])
        axes.minorticks_off()
        label(axes, f"{task.name} ({METRIC[task.kind]})", "labelled exams")
        calm(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(arms), frameon=False, labelcolor=INK)
    return figure


def curve(axes: Axes, cells: Cells, arm: str, task: Task, color: str, dashes: object) -> None:
    """One arm on one task."""
    found = [(num, of) for num in LABELS if (of := mean(cells, arm, task.name, "linear", num)) is not None]
    values: Sequence[float] = [max(LOWEST, of.value) for _, of in found]
    below = [num for num, of in found if of.value < LOWEST]
    axes.plot(below, [LOWEST] * len(below), "v", color=color, markersize=8, fillstyle="none")
    axes.plot([num for num, _ in found], values, color=color, linestyle=dashes, marker="o", markersize=4, label=arm)


def label(axes: Axes, title: str, below: str) -> None:
    """A title, and what the axis counts."""
    axes.set_title(title, fontsize=9.5, color=INK, fontweight="bold")
    axes.set_xlabel(below, fontsize=8.5, color=INK)


def calm(axes: Axes) -> None:
    """Less ink."""
    axes.tick_params(labelsize=8.5, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
