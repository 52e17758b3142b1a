"""Curves over training steps: one quantity a figure, calm, and safe for colour-blind readers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

# Okabe and Ito's palette without its yellow, which is lost on white; dashes carry the distinction into grey print.
STYLES: tuple[tuple[str, Any], ...] = (
    ("#0072b2", "-"), ("#d55e00", (0, (5, 1.5))), ("#009e73", (0, (1.5, 1.2))), ("#cc79a7", (0, (6, 1.5, 1.5, 1.5))),
    ("#56b4e9", "-"), ("#56606a", (0, (3, 3))), ("#e69f00", (0, (8, 2))), ("#1b232a", (0, (1, 1))),
)  # fmt: skip
INK, SOFT, FAINT = "#3c464f", "#7b868e", "#c9d0d6"
LOG_FROM = 30.0  # times the median: one spike would press all else to the ground
NOISY = 3.0  # times its range that a line goes up and down
SMALL = 0.01  # values that take fewer letters with an exponent
ROUND = [1, 2, 5, 10]  # ticks at numbers that people count in
FEW, MANY = 30, 60  # points: with few each is marked, with many they are averaged
LEGEND_COLUMNS = 4


@dataclass(frozen=True)
class Curve:
    """One line: its name in the legend, and its values by step, none of them missing."""

    name: str
    values: "pd.Series[float]"


def curves_figure(curves: Sequence[Curve], unit: str, chance: float | None = None, percent: bool = False) -> Figure:
    """Curves of one quantity over the steps of training.

    Args:
        curves: That share an axis.
        unit: What the axis measures.
        chance: A level to compare with, drawn grey.
        percent: Shares, shown in per cent.
    """
    figure = Figure(figsize=(5.8, 3.0 if len(curves) <= LEGEND_COLUMNS else 3.25))
    axes = figure.subplots()
    if chance is None and not percent and _has_spikes(curves):
        axes.set_yscale("log")
    for curve, (color, dashes) in zip(curves, STYLES, strict=False):
        _draw(axes, curve, color, dashes)
    if chance is not None:
        axes.axhline(chance, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
        axes.annotate(f"chance {chance:.2g}", (1, chance), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", fontsize=8, color=SOFT)  # fmt: skip
    _scale(axes, curves, chance, percent)
    _calm(axes, unit)
    if len(curves) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=LEGEND_COLUMNS, fontsize=8.5, frameon=False,
                    handlelength=2.4, columnspacing=1.6, borderaxespad=0, labelcolor=INK)  # fmt: skip
    rows = -(-len(curves) // LEGEND_COLUMNS) if len(curves) > 1 else 0
    figure.subplots_adjust(left=0.135, right=0.97, bottom=0.155, top=0.97 - 0.08 * rows)
    return figure


def running_mean(values: "pd.Series[float]") -> "pd.Series[float]":
    """Mean over a thirtieth of the points around each."""
    return values.rolling(max(3, len(values) // 30) | 1, center=True, min_periods=1).mean()


def is_noisy(values: "pd.Series[float]") -> bool:
    """Whether a line goes up and down more often than a person can follow; a schedule does not."""
    return float(values.diff().abs().sum()) > NOISY * float(values.max() - values.min())


def _has_spikes(curves: Sequence[Curve]) -> bool:
    every = pd.concat([curve.values for curve in curves])
    return bool(every.min() > 0 and every.max() / every.median() > LOG_FROM)


def _draw(axes: Axes, curve: Curve, color: str, dashes: Any) -> None:
    steps = curve.values.index.to_numpy()
    if len(steps) > MANY and is_noisy(curve.values):
        # On a logarithmic axis what the eye takes for the middle is the mean of logarithms.
        logarithmic = axes.get_yscale() == "log"
        mean = running_mean(curve.values.map(np.log)).map(np.exp) if logarithmic else running_mean(curve.values)
        axes.plot(steps, curve.values.to_numpy(), color=color, linewidth=0.7, alpha=0.3)
        axes.plot(steps, mean.to_numpy(), color=color, linestyle=dashes, linewidth=2, label=curve.name)
        return
    marker = "o" if len(steps) <= FEW else None
    axes.plot(steps, curve.values.to_numpy(), color=color, linestyle=dashes, linewidth=1.8, marker=marker, markersize=4,
              markeredgecolor="white", markeredgewidth=0.8, label=curve.name, clip_on=False)  # fmt: skip


def _scale(axes: Axes, curves: Sequence[Curve], chance: float | None, percent: bool) -> None:
    every = pd.concat([curve.values for curve in curves])
    low, high = float(every.min()), float(every.max())
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if chance is not None:
        axes.set_ylim(min(low, chance, 0.4) - 0.02, 1.0)
    elif percent:
        axes.set_ylim(0, max(1.15 * high, 0.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if high > 0.05 else 1))
    elif axes.get_yscale() == "log":
        _few_log_ticks(axes, low, high)
        return
    elif 0 < high < SMALL:
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e−") if value else "0")
        )
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))


def _few_log_ticks(axes: Axes, low: float, high: float) -> None:
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    axes.yaxis.set_major_locator(FixedLocator(list(10.0 ** powers[:: -(-len(powers) // 5)])))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _calm(axes: Axes, unit: str) -> None:
    axes.set_xlabel("Step", fontsize=9, color=INK)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=3, which="major")
    axes.tick_params(length=0, which="minor")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.margins(x=0.02)
