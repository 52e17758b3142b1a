"""What the cells of `learn.py` say together: means, differences with intervals, and whether the controls hold.

A difference is bootstrapped in two levels, over pretraining seeds and over test people; two arms are compared on the
same seeds, labelled exams and test people.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from _controls import CONTROLS
from _tasks import TASKS, Task
from scipy.stats import binom

from umbif.evaluation.statistics import Estimate

Array = npt.NDArray[Any]
Cell = dict[str, Any]

# Written before the full run.
HYBRID, BEFORE, ALONE = "umbif", ("untrained", "placebo"), ("mae", "contrast")
PRIMARY_PROBE, PRIMARY_LABELS = "linear", 64
SMALLEST_GAIN = 0.05  # of AUC, R² or accuracy
PRIMARY_TASKS = tuple(t.name for t in TASKS if not t.is_trivial and t.features != "tumour")  # nothing is given away
NUM_RESAMPLES = 10_000
CHANCE = {"binary": 0.5, "number": 0.0, "pairs": 0.5}  # by the kind of a task


class Cells:
    """All cells, found by what they are."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        found = list(cells)
        self.runs = [cell for cell in found if "commit" in cell]
        self.by_key: dict[tuple[Any, ...], Cell] = {
            (cell["arm"], cell["task"], cell["probe"], cell["labels"], cell["seed"]): cell
            for cell in found if "commit" not in cell
        }  # fmt: skip
        self.arms = list(dict.fromkeys(key[0] for key in self.by_key))

    def seeds(self, arm: str, task: str, probe: str, labels: int) -> list[int]:
        """Those that have been measured."""
        return sorted(key[4] for key in self.by_key if key[:4] == (arm, task, probe, labels))

    def scores(self, arm: str, task: str, probe: str, labels: int, seeds: Sequence[int]) -> Array:
        """(seeds, 1 + B): the score on the test people, and on each resample of them."""
        found = [self.by_key[arm, task, probe, labels, seed] for seed in seeds]
        return np.array([[cell["score"], *cell["resamples"]] for cell in found])


def probe_of(task: str) -> tuple[str, int]:
    """The primary probe of a task, and its number of labels: retrieval has neither."""
    return ("cosine", 0) if task == "retrieval" else (PRIMARY_PROBE, PRIMARY_LABELS)


def mean(cells: Cells, arm: str, task: str, probe: str, labels: int) -> Estimate | None:
    """Of an arm over its seeds; None where it was not measured."""
    seeds = cells.seeds(arm, task, probe, labels)
    return bootstrapped(cells.scores(arm, task, probe, labels, seeds)) if seeds else None


def difference(cells: Cells, arm: str, other: str, task: str, probe: str, labels: int) -> Estimate | None:
    """Of two arms on the seeds that both have; an arm without chance has one seed, which stands for all."""
    own, others = (cells.seeds(name, task, probe, labels) for name in (arm, other))
    if not own or not others:
        return None
    shared = own if len(others) == 1 else sorted({*own} & {*others})
    a = cells.scores(arm, task, probe, labels, shared)
    b = cells.scores(other, task, probe, labels, others if len(others) == 1 else shared)
    return bootstrapped(a - b) if shared else None


def bootstrapped(scores: Array) -> Estimate:
    """Mean of (seeds, 1 + B) scores; its interval over seeds and, within a resample, the same test people for all."""
    rng = np.random.default_rng(0)
    num_seeds, num = len(scores), scores.shape[1] - 1
    seeds = rng.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    people = rng.integers(num, size=NUM_RESAMPLES)
    drawn = scores[seeds, 1 + people[:, None]].mean(1)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Estimate(float(scores[:, 0].mean()), float(low), float(high))


def gains(cells: Cells) -> dict[str, dict[str, Estimate]]:
    """The primary comparisons: of each task, the hybrid against each of the others."""
    found = {}
    for task in PRIMARY_TASKS:
        pairs = {other: difference(cells, HYBRID, other, task, *probe_of(task)) for other in (*BEFORE, *ALONE)}
        found[task] = {other: estimate for other, estimate in pairs.items() if estimate is not None}
    return found


def wins(found: dict[str, dict[str, Estimate]], part: str) -> tuple[list[str], list[str]]:
    """Tasks on which the hybrid surely beats one of its parts, and on which it surely loses to it."""
    pairs = {task: of[part] for task, of in found.items() if part in of}
    return [t for t, gain in pairs.items() if gain.low > 0], [t for t, gain in pairs.items() if gain.high < 0]


def verdict(cells: Cells) -> str:
    """Whether the aim was met, in words."""
    found = gains(cells)
    gained = [task for task, of in found.items() if is_gain(of)]
    half = (len(found) + 1) // 2
    lines = [
        f"The hybrid gains {SMALLEST_GAIN:.2f} or more over both the untrained and the placebo encoder, with intervals "
        f"above zero, on {len(gained)} of {len(found)} tasks ({', '.join(gained) or 'none'}); the aim was {half}: "
        f"{'met' if len(gained) >= half else '**not met**'}."
    ]
    for part in [part for part in ALONE if part in cells.arms]:
        better, worse = wins(found, part)
        met = "met" if better and not worse else "**not met**"
        lines.append(
            f"It beats `{part}` on {', '.join(better) or 'no task'} and loses to it on {', '.join(worse) or 'none'}; "
            f"the aim was one at least and none: {met}."
        )
    if "histogram" not in cells.arms:
        return listed(lines)
    below = [task.name for task in TASKS if lost_to_histogram(cells, task.name)]
    lines.append(
        f"It is surely below the histogram on {', '.join(below) or 'no task'}; the aim was none: "
        f"{'**not met**' if below else 'met'}."
    )
    return listed(lines)


def listed(lines: Iterable[str]) -> str:
    """In Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def lost_to_histogram(cells: Cells, task: str) -> bool:
    """Whether the interval of the difference lies below zero."""
    found = difference(cells, HYBRID, "histogram", task, *probe_of(task))
    return found is not None and found.high < 0


def is_at_chance(task: Task, found: Iterable[Estimate]) -> bool:
    """Whether no interval lies above the score of knowing nothing. Of several classes nobody says what that is."""
    return task.kind in CHANCE and all(of.low <= CHANCE[task.kind] for of in found)


def is_gain(of: dict[str, Estimate]) -> bool:
    """Whether the hybrid beats both what has learnt nothing and what has learnt the placebo."""
    return all(other in of and of[other].value >= SMALLEST_GAIN and of[other].low > 0 for other in BEFORE)


def null_cells(cells: Cells) -> tuple[int, int, tuple[int, int]]:
    """Null cells whose interval misses one half, all null cells, and the 95% range of the former if 5% are to."""
    null = [cell for key, cell in cells.by_key.items() if key[2] == "null"]
    missed = sum(not cell["interval"][0] <= 0.5 <= cell["interval"][1] for cell in null)
    low, high = binom.interval(0.95, len(null), 0.05) if null else (0, 0)
    return missed, len(null), (int(low), int(high))


def overlap(cells: Cells) -> tuple[float, float]:
    """Mean areas of `seen` and `unseen` (see `controls`) over arms, seeds and tasks."""
    areas = {name: [cell["score"] for key, cell in cells.by_key.items() if key[2] == name] for name in CONTROLS[1:]}
    seen, unseen = (float(np.mean(found)) if found else float("nan") for found in areas.values())
    return seen, unseen
