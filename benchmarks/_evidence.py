"""What the cells of `learn.py` say together: means, differences with intervals, and whether the controls hold.

A difference is bootstrapped over pretraining seeds, test people and draws of the labels; two arms are compared on the
same of all three.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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
SMALLEST_DIFFERENCE = 0.01  # less, the last digit that is printed, is a tie with one of its parts or the histogram
PRIMARY_TASKS = tuple(t.name for t in TASKS if not t.is_trivial and t.features != "tumour")  # nothing is given away
NUM_RESAMPLES = 10_000
CHANCE = {"binary": 0.5, "number": 0.0, "pairs": 0.5}  # by the kind of a task


class Scores(NamedTuple):
    """Of one arm, or differences of two."""

    people: Array  # (seeds, B), on resamples of the test people, means over the draws
    draws: Array  # (seeds, draws) of the labels, on all test people

    def minus(self, other: "Scores") -> "Scores":
        """The differences, seed by seed."""
        return Scores(self.people - other.people, self.draws - other.draws)


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

    def scores(self, arm: str, task: str, probe: str, labels: int, seeds: Sequence[int]) -> Scores:
        """For each of the seeds."""
        found = [self.by_key[arm, task, probe, labels, seed] for seed in seeds]
        people, draws = (np.array([cell[name] for cell in found]) for name in ("resamples", "draws"))
        return Scores(people, draws)


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
    return bootstrapped(a.minus(b)) if shared else None


def bootstrapped(scores: Scores) -> Estimate:
    """The mean, and its interval over seeds, test people and draws of the labels, both the same for all seeds.

    Of n seeds, n - 1 are drawn: of so few, n would give too narrow intervals (Rao and Wu 1988,
    doi:10.1080/01621459.1988.10478591).
    """
    rng = np.random.default_rng(0)
    num_seeds, num_draws = scores.draws.shape
    seeds = rng.integers(num_seeds, size=(NUM_RESAMPLES, max(1, num_seeds - 1)))
    people = rng.integers(scores.people.shape[1], size=NUM_RESAMPLES)
    draws = rng.integers(num_draws, size=(NUM_RESAMPLES, max(1, num_draws - 1)))
    centered = scores.draws - scores.draws.mean(1, keepdims=True)
    drawn = scores.people[seeds, people[:, None]] + centered[seeds[:, :, None], draws[:, None]].mean(2)
    low, high = np.nanpercentile(drawn.mean(1), [2.5, 97.5])
    return Estimate(float(scores.draws.mean()), float(low), float(high))


def gains(cells: Cells) -> dict[str, dict[str, Estimate]]:
    """The primary comparisons: of each task, the hybrid against each of the others."""
    found: dict[str, dict[str, Estimate]] = {}
    for task in PRIMARY_TASKS:
        pairs = {other: difference(cells, HYBRID, other, task, *probe_of(task)) for other in (*BEFORE, *ALONE)}
        found[task] = {other: estimate for other, estimate in pairs.items() if estimate is not None}
    return found


def wins(found: dict[str, dict[str, Estimate]], part: str) -> tuple[list[str], list[str]]:
    """Tasks on which the hybrid surely beats one of its parts, and on which it surely loses to it."""
    pairs = {task: of[part] for task, of in found.items() if part in of}
    return [t for t, gain in pairs.items() if is_more(gain)], [t for t, gain in pairs.items() if is_less(gain)]


def is_more(gain: Estimate) -> bool:
    """No tie, and surely above zero."""
    return gain.value >= SMALLEST_DIFFERENCE and gain.low > 0


def is_less(gain: Estimate) -> bool:
    """No tie, and surely below zero."""
    return gain.value <= -SMALLEST_DIFFERENCE and gain.high < 0


def verdict(cells: Cells) -> str:
    """Whether the aim was met, in words."""
    found = gains(cells)
    gained = [task for task, of in found.items() if is_gain(cells, task, of)]
    half = (len(found) + 1) // 2
    lines = [
        f"The hybrid gains {SMALLEST_GAIN:.2f} or more over both the untrained and the placebo encoder, with intervals "
        f"above zero, on {len(gained)} of {len(found)} tasks ({', '.join(gained) or 'none'}); the aim was {half}: "
        f"{'met' if len(gained) >= half else '**not met**'}."
    ]
    if full := without_room(cells):
        lines.append(
            f"On {', '.join(full)} one of these two knows so much that no encoder could gain {SMALLEST_GAIN:.2f} over "
            "both. They count all the same."
        )
    for part in [part for part in ALONE if part in cells.arms]:
        better, worse = wins(found, part)
        met = "met" if better and not worse else "**not met**"
        lines.append(
            f"It beats `{part}` on {', '.join(better) or 'no task'} and loses to it on {', '.join(worse) or 'none'}; "
            f"the aim was one at least and none: {met}."
        )
    if "histogram" not in cells.arms:
        return listed(lines)
    below = [task for task in PRIMARY_TASKS if lost_to_histogram(cells, task)]
    trivial = [task.name for task in TASKS if task.is_trivial and lost_to_histogram(cells, task.name)]
    lines.append(
        f"It is surely below the histogram on {', '.join(below) or 'none'} of these tasks; the aim was none: "
        f"{'**not met**' if below else 'met'}. Of the trivial ones it is on {', '.join(trivial) or 'none'}."
    )
    return listed(lines)


def without_room(cells: Cells) -> list[str]:
    """Tasks on which the untrained or the placebo encoder is nearer to the best score there is than a gain is large."""
    found = {task: [mean(cells, arm, task, *probe_of(task)) for arm in BEFORE] for task in PRIMARY_TASKS}
    return [task for task, of in found.items() if any(one and one.value > 1 - SMALLEST_GAIN for one in of)]


def listed(lines: Iterable[str]) -> str:
    """In Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def lost_to_histogram(cells: Cells, task: str) -> bool:
    """Whether the interval of the difference lies below zero."""
    found = difference(cells, HYBRID, "histogram", task, *probe_of(task))
    return found is not None and is_less(found)


def is_at_chance(task: Task, found: Iterable[Estimate]) -> bool:
    """Whether no interval lies above the score of knowing nothing. Of several classes nobody says what that is."""
    return task.kind in CHANCE and all(of.low <= CHANCE[task.kind] for of in found)


def is_gain(cells: Cells, task: str, of: dict[str, Estimate]) -> bool:
    """Whether the hybrid knows something, and beats both what has learnt nothing and what has learnt the placebo."""
    (kind,) = [one.kind for one in TASKS if one.name == task]
    own = mean(cells, HYBRID, task, *probe_of(task))
    knows = own is not None and own.low > CHANCE[kind]
    return knows and all(other in of and of[other].value >= SMALLEST_GAIN and of[other].low > 0 for other in BEFORE)


def null_cells(cells: Cells) -> tuple[int, int, tuple[int, int]]:
    """Null cells whose interval misses one half, all null cells, and the 95% range of the former if 5% are to."""
    null = [cell for key, cell in cells.by_key.items() if key[2] == "null"]
    missed = sum(not cell["interval"][0] <= 0.5 <= cell["interval"][1] for cell in null)
    low, high = binom.interval(0.95, len(null), 0.05) if null else (0, 0)
    return missed, len(null), (int(low), int(high))


def overlap(cells: Cells, arms: Iterable[str]) -> tuple[float, float, int]:
    """Mean areas of `seen` and `unseen` (see `controls`) over some arms, seeds and tasks; and of how many people."""
    known = [(key, cell) for key, cell in cells.by_key.items() if key[0] in set(arms)]
    areas = {name: [cell["score"] for key, cell in known if key[2] == name] for name in CONTROLS[1:]}
    seen, unseen = (float(np.mean(found)) if found else float("nan") for found in areas.values())
    return seen, unseen, max((cell["labels"] for key, cell in known if key[2] in CONTROLS[1:]), default=0)
