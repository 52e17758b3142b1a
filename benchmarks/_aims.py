"""What the hybrid was to reach in `learn.py`, and whether it did.

Tasks, probe and thresholds were written down before the full run. That the hybrid must know something itself to beat
another was asked for after it, and only takes wins away from the hybrid.
"""

from collections.abc import Iterable, Sequence

from _evidence import PRIMARY_LABELS, PRIMARY_PROBE, PRIMARY_TASKS, Cells, difference, mean, probe_of
from _tasks import TASKS, Task

from umbif.evaluation.statistics import Estimate

HYBRID, BEFORE, ALONE, HISTOGRAM = "umbif", ("untrained", "placebo"), ("mae", "contrast"), "histogram"
SMALLEST_GAIN = 0.05  # of AUC, R² or accuracy
SMALLEST_DIFFERENCE = 0.01  # less, the last digit that is printed, is a tie with one of its parts or the histogram
CHANCE = {"binary": 0.5, "number": 0.0, "pairs": 0.5}  # by the kind of a task; of several classes nobody says
KINDS = {task.name: task.kind for task in TASKS}
TRIVIAL = tuple(task.name for task in TASKS if task.is_trivial)
PRIMARY = (PRIMARY_PROBE, PRIMARY_LABELS)
Probe = tuple[str, int]


def verdict(cells: Cells) -> str:
    """Whether the aim was met, in words."""
    gained, half = gains(cells), (len(PRIMARY_TASKS) + 1) // 2
    lines = [
        f"The hybrid gains {SMALLEST_GAIN:.2f} or more over both the untrained and the placebo encoder, with intervals "
        f"above zero, on {len(gained)} of {len(PRIMARY_TASKS)} tasks ({named(gained)}); the aim was {half}: "
        f"{met(len(gained) >= half)}."
    ]
    for part in [part for part in ALONE if part in cells.arms]:
        alone = gains(cells, part)
        same = "the same" if set(alone) == set(gained) else named(alone)
        lines.append(f"By the same rule `{part}`, one of its two parts, gains on {len(alone)} ({same}).")
    if full := without_room(cells):
        lines.append(
            f"On {named(full)} one of these two knows so much that no encoder could gain {SMALLEST_GAIN:.2f} over "
            "both. They count all the same."
        )
    lines += [against(cells, part) for part in ALONE if part in cells.arms]
    if HISTOGRAM in cells.arms:
        _, below = wins(cells, HISTOGRAM, PRIMARY_TASKS)
        _, trivial = wins(cells, HISTOGRAM, TRIVIAL)
        lines.append(
            f"By its 95% interval it is below the histogram on {named(below)} of these tasks; the aim was "
            f"none: {met(not below)}. Of the trivial ones it is on {named(trivial)}."
        )
    return "\n".join(f"- {line}" for line in lines)


def against(cells: Cells, part: str) -> str:
    """The hybrid beside one of its parts."""
    better, worse = wins(cells, part, PRIMARY_TASKS)
    trivially = [named(tasks) for tasks in wins(cells, part, TRIVIAL)]
    possible = [task for task, of in over(cells, part).items() if of.high >= SMALLEST_GAIN]
    return (
        f"It beats `{part}` on {named(better, 'no task')} and loses to it on {named(worse)}; the aim was one "
        f"at least and none: {met(bool(better) and not worse)}. Of the trivial ones it beats it on {trivially[0]} and "
        f"loses on {trivially[1]}. That it is better by {SMALLEST_GAIN:.2f} the intervals rule out on all of these "
        f"tasks{' but ' + named(possible) if possible else ''}."
    )


def gains(cells: Cells, arm: str = HYBRID, probe: Probe = PRIMARY) -> list[str]:
    """Primary tasks on which an arm knows something, and beats what has learnt nothing and what learnt the placebo."""
    return [task for task in PRIMARY_TASKS if is_gain(cells, task, arm, probe)]


def is_gain(cells: Cells, task: str, arm: str = HYBRID, probe: Probe = PRIMARY) -> bool:
    """Whether this is one of `gains`."""
    found = [difference(cells, arm, other, task, *probe_of(task, *probe)) for other in BEFORE]
    large = all(of is not None and of.value >= SMALLEST_GAIN and of.low > 0 for of in found)
    return large and knows(cells, arm, task, probe)


def wins(cells: Cells, other: str, tasks: Iterable[str], probe: Probe = PRIMARY) -> tuple[list[str], list[str]]:
    """Tasks on which the hybrid beats another, and on which it loses to it: no tie, and an interval without zero.

    To be above one that knows nothing is a win only with a score above chance; to be below is a loss in any case.
    """
    found = over(cells, other, tasks, probe)
    more = [task for task, of in found.items() if of.value >= SMALLEST_DIFFERENCE and of.low > 0]
    less = [task for task, of in found.items() if of.value <= -SMALLEST_DIFFERENCE and of.high < 0]
    return [task for task in more if knows(cells, HYBRID, task, probe)], less


def over(cells: Cells, other: str, tasks: Iterable[str] = PRIMARY_TASKS, probe: Probe = PRIMARY) -> dict[str, Estimate]:
    """What the hybrid has more than another on each task."""
    found = {task: difference(cells, HYBRID, other, task, *probe_of(task, *probe)) for task in tasks}
    return {task: of for task, of in found.items() if of is not None}


def knows(cells: Cells, arm: str, task: str, probe: Probe = PRIMARY) -> bool:
    """Whether an arm's interval lies above the score of knowing nothing."""
    found = mean(cells, arm, task, *probe_of(task, *probe))
    return found is not None and (KINDS[task] not in CHANCE or found.low > CHANCE[KINDS[task]])


def is_at_chance(task: Task, found: Iterable[Estimate]) -> bool:
    """Whether no interval lies above the score of knowing nothing."""
    return task.kind in CHANCE and all(of.low <= CHANCE[task.kind] for of in found)


def without_room(cells: Cells) -> list[str]:
    """Tasks on which the untrained or the placebo encoder is nearer to the best score there is than a gain is large."""
    found = {task: [mean(cells, arm, task, *probe_of(task)) for arm in BEFORE] for task in PRIMARY_TASKS}
    return [task for task, of in found.items() if any(one and one.value > 1 - SMALLEST_GAIN for one in of)]


def named(tasks: Sequence[str], nothing: str = "none") -> str:
    """In words."""
    return ", ".join(tasks) or nothing


def met(is_met: bool) -> str:
    """In words."""
    return "met" if is_met else "**not met**"
