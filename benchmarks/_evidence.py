"""What the cells of `learn.py` say together: means and differences with intervals, and whether the controls hold.

A difference is bootstrapped over pretraining seeds, test people and draws of the labels; two arms are compared on the
same of all three.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from _controls import CONTROLS
from _tasks import TASKS
from scipy.stats import binom

from umbif.evaluation.statistics import Estimate

Array = npt.NDArray[Any]
Cell = dict[str, Any]

PRIMARY_PROBE, PRIMARY_LABELS = "linear", 64  # written before the full run
PRIMARY_TASKS = tuple(t.name for t in TASKS if not t.is_trivial and t.features != "tumour")  # nothing is given away
NUM_RESAMPLES = 10_000
SEEDLESS = ("truth", "histogram", "raw")  # arms without chance: what they have stands for every seed


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


def probe_of(task: str, probe: str = PRIMARY_PROBE, labels: int = PRIMARY_LABELS) -> tuple[str, int]:
    """The probe of a task, by default the primary one, and its number of labels: retrieval has neither."""
    return ("cosine", 0) if task == "retrieval" else (probe, labels)


def mean(cells: Cells, arm: str, task: str, probe: str, labels: int) -> Estimate | None:
    """Of an arm over its seeds; None where it was not measured."""
    seeds = cells.seeds(arm, task, probe, labels)
    return bootstrapped(cells.scores(arm, task, probe, labels, seeds)) if seeds else None


def difference(cells: Cells, arm: str, other: str, task: str, probe: str, labels: int) -> Estimate | None:
    """Of two arms on the seeds that both have; None where there are none."""
    own, others = (cells.seeds(name, task, probe, labels) for name in (arm, other))
    shared = own if other in SEEDLESS and others else sorted({*own} & {*others})
    if not shared:
        return None
    a = cells.scores(arm, task, probe, labels, shared)
    b = cells.scores(other, task, probe, labels, others if other in SEEDLESS else shared)
    return bootstrapped(a.minus(b))


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
