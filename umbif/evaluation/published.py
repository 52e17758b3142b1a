"""Figures of "Unified Multimodal Brain Imaging Foundation" (Li et al., JCO Precision Oncology 2026), and their sums.

They come from other exams than ours and serve as context only. `arithmetic` asks whether one confusion matrix can give
the figures printed for progression: each figure, with its rounding, is a linear condition on the four cells, so a
linear programme answers for every number of exams at once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import linprog

CITATION = "Li et al., Unified Multimodal Brain Imaging Foundation, JCO Precision Oncology 2026"
ROUNDING = 0.0005  # three decimals are printed
CELLS = ("tp", "fp", "fn", "tn")
# Every measure is numerator / denominator, both sums of the cells tp, fp, fn, tn.
RATIOS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "accuracy": ((1, 0, 0, 1), (1, 1, 1, 1)),
    "sensitivity": ((1, 0, 0, 0), (1, 0, 1, 0)),
    "specificity": ((0, 0, 0, 1), (0, 1, 0, 1)),
    "ppv": ((1, 0, 0, 0), (1, 1, 0, 0)),
    "npv": ((0, 0, 0, 1), (0, 0, 1, 1)),
    "f1": ((2, 0, 0, 0), (2, 1, 1, 0)),
}


@dataclass(frozen=True)
class Published:
    """One printed row. What was not printed is absent from `figures`."""

    task: str
    model: str
    figures: Mapping[str, float]
    auc: tuple[float, float, float] | None = None  # value, low, high
    inconsistent: bool = False


PUBLISHED = (
    Published(
        "Progression",
        "UMBIF",
        {"accuracy": 0.899, "specificity": 0.636, "ppv": 0.990, "npv": 0.878, "f1": 0.942},
        (0.815, 0.740, 0.885),
        inconsistent=True,
    ),
    Published(
        "Progression",
        "SSL-Cerebral",
        {"sensitivity": 0.875, "specificity": 0.588, "ppv": 0.333, "npv": 0.643, "f1": 0.483},
        inconsistent=True,
    ),
    Published(
        "Progression",
        "SSL-ImageNet",
        {"sensitivity": 0.250, "specificity": 0.735, "ppv": 0.182, "npv": 0.806, "f1": 0.211},
    ),
    Published("1p/19q codeletion", "UMBIF", {"accuracy": 0.898}, (0.916, 0.886, 0.945)),
    Published("IDH mutation", "UMBIF", {"accuracy": 0.829}, (0.896, 0.857, 0.929)),
    Published("MGMT methylation", "UMBIF", {"accuracy": 0.905}, (0.859, 0.817, 0.900)),
)
KEYWORDS = {
    "Progression": ("progress", "post-treatment", "post_treatment"),
    "1p/19q codeletion": ("1p", "codel"),
    "IDH mutation": ("idh",),
    "MGMT methylation": ("mgmt",),
}


@dataclass(frozen=True)
class Arithmetic:
    """What the search found in the printed progression figures."""

    consistent: bool
    impossible_fours: list[tuple[str, ...]]
    npv_range: tuple[float, float]
    accuracy_range: tuple[float, float]
    smallest_matrix: dict[str, int]
    cerebral_matrices: list[dict[str, int]]
    imagenet_matrices: list[dict[str, int]]

    @property
    def sentences(self) -> list[str]:
        """The findings in words, with their numbers."""
        return _sentences(self)


def published_task(task: str) -> str | None:
    """The published task that a task of ours is about, told by its name."""
    name = task.lower()
    return next((known for known, words in KEYWORDS.items() if any(word in name for word in words)), None)


def rounds_to(value: float, printed: float) -> bool:
    """Whether `value` prints as `printed`; a last digit of 5 may go either way."""
    return abs(value - printed) <= ROUNDING + 1e-9


def measures_of(cells: Mapping[str, int]) -> dict[str, float]:
    """All six measures of a confusion matrix; NaN where the denominator is 0."""
    values = np.array([cells[name] for name in CELLS], dtype=float)
    sums = {name: (values @ np.array(top), values @ np.array(bottom)) for name, (top, bottom) in RATIOS.items()}
    return {name: float(top / bottom) if bottom else float("nan") for name, (top, bottom) in sums.items()}


def possible(figures: Mapping[str, float]) -> bool:
    """Whether any confusion matrix, of any size, prints as these figures."""
    answer = linprog(np.zeros(4), *_rounded(figures), A_eq=np.ones((1, 4)), b_eq=[1.0], bounds=(0, None))
    return bool(answer.status == 0)


def implied_range(figures: Mapping[str, float], measure: str) -> tuple[float, float]:
    """Lowest and highest value of `measure` among all matrices that print as `figures`; NaN if there are none."""
    top, bottom = (np.array(part, dtype=float) for part in RATIOS[measure])
    ends = []
    for sign in (1.0, -1.0):
        # With the denominator fixed at 1 the ratio itself is linear (Charnes and Cooper 1962).
        answer = linprog(sign * top, *_rounded(figures), A_eq=bottom[None], b_eq=[1.0], bounds=(0, None))
        ends.append(sign * answer.fun if answer.status == 0 else float("nan"))
    return float(ends[0]), float(ends[1])


def matrices(figures: Mapping[str, float], positives: int, negatives: int) -> Iterator[dict[str, int]]:
    """All confusion matrices of so many positive and negative exams that print as `figures`."""
    for tp in range(positives + 1):
        for tn in range(negatives + 1):
            cells = {"tp": tp, "fp": negatives - tn, "fn": positives - tp, "tn": tn}
            found = measures_of(cells)
            if all(rounds_to(found[name], printed) for name, printed in figures.items()):
                yield cells


def smallest(figures: Mapping[str, float], most: int) -> dict[str, int]:
    """The matrix of fewest exams, up to `most`, that prints as specificity, PPV and F1; empty if there is none."""
    best: dict[str, int] = {}
    for negatives in range(1, most // 2):
        for tn in range(negatives + 1):
            if rounds_to(tn / negatives, figures["specificity"]):
                best = _fewest(best, _with_positives(figures, tn, negatives - tn, most))
    return best


def arithmetic() -> Arithmetic:
    """Does the sums on the printed progression figures. Takes about a second."""
    ours, cerebral, imagenet = (row.figures for row in PUBLISHED[:3])
    base = {name: ours[name] for name in ("specificity", "ppv", "f1")}
    return Arithmetic(
        consistent=possible(ours),
        impossible_fours=[four for four in combinations(ours, 4) if not possible({n: ours[n] for n in four})],
        npv_range=implied_range(base, "npv"),
        accuracy_range=implied_range(base, "accuracy"),
        smallest_matrix=smallest(base, 600),
        cerebral_matrices=_search({name: v for name, v in cerebral.items() if name != "npv"}, 60),
        imagenet_matrices=_search(imagenet, 60),
    )


def _rounded(figures: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """`printed - h <= top / bottom <= printed + h` as two rows of `A @ cells <= 0` for each figure."""
    rows = []
    for name, printed in figures.items():
        top, bottom = (np.array(part, dtype=float) for part in RATIOS[name])
        rows += [(printed - ROUNDING) * bottom - top, top - (printed + ROUNDING) * bottom]
    return np.array(rows), np.zeros(len(rows))


def _with_positives(figures: Mapping[str, float], tn: int, fp: int, most: int) -> dict[str, int]:
    for tp in range(1, most - tn - fp):
        if not rounds_to(tp / (tp + fp), figures["ppv"]):
            continue
        errors = 2 * tp / figures["f1"] - 2 * tp - fp
        for fn in {int(np.floor(errors)), int(np.ceil(errors))}:
            if fn >= 0 and rounds_to(2 * tp / (2 * tp + fp + fn), figures["f1"]):
                return {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
    return {}


def _fewest(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return min((cells for cells in (a, b) if cells), key=lambda cells: sum(cells.values()), default={})


def _search(figures: Mapping[str, float], most: int) -> list[dict[str, int]]:
    pairs = ((p, n) for p in range(1, most) for n in range(1, most - p + 1))
    fits = ((p, n) for p, n in pairs if _reachable(figures["sensitivity"], p) and _reachable(figures["specificity"], n))
    return [cells for p, n in fits for cells in matrices(figures, p, n)]


def _reachable(rate: float, count: int) -> bool:
    return rounds_to(round(rate * count) / count, rate)


def _sentences(sums: Arithmetic) -> list[str]:
    npv, accuracy, least = sums.npv_range, sums.accuracy_range, sums.smallest_matrix
    found = measures_of(least)
    cerebral, imagenet = sums.cerebral_matrices[0], sums.imagenet_matrices[0]
    c, i = measures_of(cerebral), measures_of(imagenet)
    return [
        "UMBIF, progression: no confusion matrix of any size rounds to the five printed values. Leaving one value out "
        f"does not help ({len(sums.impossible_fours)} of the 5 choices of four are impossible), so at least two values "
        "must be wrong or come from other exams than the rest.",
        f"Specificity 0.636, PPV 0.990 and F1 0.942 together force NPV between {npv[0]:.3f} and {npv[1]:.3f} "
        f"(printed: 0.878) and accuracy between {accuracy[0]:.3f} and {accuracy[1]:.3f} (printed: 0.899).",
        f"The smallest matrix with those three values has {sum(least.values())} exams ({_cells(least)}); "
        f"its NPV is {found['npv']:.3f} and its accuracy {found['accuracy']:.3f}.",
        f"SSL-Cerebral: up to 60 exams, sensitivity, specificity, PPV and F1 fit {_only(sums.cerebral_matrices)} "
        f"({_cells(cerebral)}). Its NPV is {c['npv']:.3f}; the printed 0.643 is its accuracy ({c['accuracy']:.3f}).",
        f"SSL-ImageNet: up to 60 exams, all five values fit {_only(sums.imagenet_matrices)} ({_cells(imagenet)}), "
        f"of accuracy {i['accuracy']:.3f}.",
        "On those 8 positive and 34 negative exams UMBIF's row is impossible: no whole number of 34 is 0.636 and none "
        "of 42 is 0.899. That row was measured on other exams, or averaged over several test sets, or misprinted.",
    ]


def _cells(cells: Mapping[str, int]) -> str:
    return (
        f"{cells['tp']} of {cells['tp'] + cells['fn']} positive and {cells['tn']} of {cells['tn'] + cells['fp']} "
        "negative exams right"
    )


def _only(found: list[dict[str, int]]) -> str:
    return "exactly one matrix" if len(found) == 1 else f"{len(found)} matrices, the smallest"
