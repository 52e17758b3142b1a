"""The tables of the evidence page."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from _aims import ALONE, BEFORE, CHANCE, HISTOGRAM, HYBRID, SMALLEST_GAIN, gains, is_at_chance, is_gain, knows, wins
from _arms import ABLATED, PRETRAINED, SUPERVISED, TRUTH
from _cells import NUM_LABELS
from _evidence import PRIMARY_LABELS, PRIMARY_PROBE, PRIMARY_TASKS, Cell, Cells, difference, mean, probe_of
from _finetuned import FINETUNED, NUM_DRAWS
from _finetuned import NUM_LABELS as NUM_TUNED
from _probes import PROBES
from _supervised import LEARNT
from _tasks import METRIC, TASKS, Task

from umbif.evaluation.statistics import Estimate


def scores(cells: Cells, probe: str = PRIMARY_PROBE, num_labels: int = PRIMARY_LABELS) -> Iterator[list[str]]:
    """Of every arm on every task; retrieval has neither probe nor labels."""
    yield ["task", "", *(f"`{arm}`" + "\\*" * (arm in SUPERVISED) for arm in cells.arms)]
    for task in TASKS:
        found = [mean(cells, arm, task.name, *probe_of(task.name, probe, num_labels)) for arm in cells.arms]
        few = [arm not in (TRUTH, *SUPERVISED) for arm in cells.arms]  # those that go by these labels alone
        known = [one for is_few, one in zip(few, found, strict=True) if one is not None and is_few]
        name = f"*{task.name}*" if task.is_trivial else task.name
        name += ", at chance" if known and is_at_chance(task, known) else ""
        yield [name, METRIC[task.kind], *map(number, found)]


def gains_of(cells: Cells) -> Iterator[list[str]]:
    """The hybrid over the others on every task that is not trivial."""
    others = [other for other in (*BEFORE, *ALONE, HISTOGRAM) if other in cells.arms]
    yield ["task", "", *(f"over `{other}`" for other in others), "gain"]
    for task in [task for task in TASKS if task.name in PRIMARY_TASKS]:
        found = [difference(cells, HYBRID, other, task.name, *probe_of(task.name)) for other in others]
        gained = "yes" if is_gain(cells, task.name) else "no"
        yield [task.name, METRIC[task.kind], *(told(one, sign="+") for one in found), gained]


def other_probes(cells: Cells) -> Iterator[list[str]]:
    """What the verdict would be with another probe, or another number of labels."""
    parts = [part for part in (*ALONE, HISTOGRAM) if part in cells.arms]
    counting = [arm for arm in (HYBRID, *ALONE) if arm in cells.arms]
    yield ["probe", "labels", *(f"`{arm}` gains" for arm in counting), *(f"beats `{p}` on" for p in parts),
           *(f"loses to `{p}` on" for p in parts)]  # fmt: skip
    for which in [(probe, num) for probe in PROBES for num in NUM_LABELS]:
        counted = [len(gains(cells, arm, which)) for arm in counting]
        compared = [wins(cells, part, PRIMARY_TASKS, which) for part in parts]
        better, worse = ([", ".join(one[i]) or "–" for one in compared] for i in (0, 1))
        yield [which[0], str(which[1]), *map(str, counted), *better, *worse]


def noise(cells: Cells) -> str:
    """How far seeds of pretraining are apart, in words."""
    said = []
    for arm in ("untrained", *PRETRAINED):
        seeds = [cells.seeds(arm, task, *probe_of(task)) for task in PRIMARY_TASKS]
        means = [
            cells.scores(arm, task, *probe_of(task), of).draws.mean(1)
            for task, of in zip(PRIMARY_TASKS, seeds, strict=True) if len(of) > 1
        ]  # fmt: skip
        apart = [float(np.std(of, ddof=1)) for of in means]
        said += [f"{np.median(apart):.3f} (at most {max(apart):.3f}) for `{arm}`"] if apart else []
    return ", ".join(said)


def finetuned(cells: Cells) -> Iterator[list[str]]:
    """Of encoders that went on learning from the labelled exams, and of the same ones frozen; the hybrid over `mae`."""
    arms = [arm for arm in cells.arms if cells.seeds(arm, FINETUNED[0].name, "finetuned", NUM_TUNED)]
    yield ["task", "", *(f"`{arm}`" for arm in arms), f"`{HYBRID}` over `{ALONE[0]}`"]
    for task in FINETUNED:
        tuned = [mean(cells, arm, task.name, "finetuned", NUM_TUNED) for arm in arms]
        gain = difference(cells, HYBRID, ALONE[0], task.name, "finetuned", NUM_TUNED)
        yield [task.name, METRIC[task.kind], *map(told, tuned), told(gain, sign="+")]
        frozen = [frozen_like(cells, arm, task) for arm in arms]
        yield ["the same, frozen", "", *(f"{one:.2f}" for one in frozen), "–"]


def frozen_like(cells: Cells, arm: str, task: Task) -> float:
    """A linear probe of the encoders that were fine-tuned, on the labels that they were fine-tuned with."""
    seeds = cells.seeds(arm, task.name, "finetuned", NUM_TUNED)
    draws = cells.scores(arm, task.name, PRIMARY_PROBE, PRIMARY_LABELS, seeds).draws
    return float(draws[:, :NUM_DRAWS].mean())


def bounds(cells: Cells) -> Iterator[list[str]]:
    """What the tumour's own numbers tell, and what is learnt from all labels without pretraining."""
    yield ["task", "", f"`{TRUTH}`", *(f"`{arm}`" for arm in SUPERVISED), f"`{HYBRID}`"]
    for task, found in compared(cells):
        yield [task.name, METRIC[task.kind], *map(number, found)]


def unbounded(cells: Cells) -> str:
    """Where what was taught everything knows less than the frozen hybrid, in words."""
    less = [
        task.name
        for task, (_, *taught, frozen) in compared(cells)
        if any(taught) and frozen and all(one.value < frozen.value for one in taught if one)
        and knows(cells, HYBRID, task.name, (PRIMARY_PROBE, NUM_LABELS[-1]))
    ]  # fmt: skip
    if not less:
        return ""
    return f"On {', '.join(less)} they know less than the frozen hybrid: so few exams' labels alone are no upper bound."


def compared(cells: Cells) -> Iterator[tuple[Task, list[Estimate | None]]]:
    """Of each task about tumours: the truth, taught networks, and the frozen hybrid, with the most labels."""
    for task in [task for task in LEARNT if task.name in PRIMARY_TASKS and task.name != "age"]:
        frozen = [mean(cells, arm, task.name, PRIMARY_PROBE, NUM_LABELS[-1]) for arm in (TRUTH, HYBRID)]
        taught = [mean(cells, arm, task.name, "taught", 0) for arm in SUPERVISED]
        yield task, [frozen[0], *taught, frozen[1]]


def ablations(cells: Cells) -> Iterator[list[str]]:
    """What the hybrid gains or loses when one part of it is changed."""
    yield ["", *(task.name for task in TASKS)]
    yield ["the recipe", *(number(mean(cells, HYBRID, task.name, *probe_of(task.name))) for task in TASKS)]
    for arm in [arm for arm in ABLATED if arm in cells.arms]:
        changes = [difference(cells, arm, HYBRID, task.name, *probe_of(task.name)) for task in TASKS]
        yield [ABLATED[arm].about, *map(change, changes)]


def change(of: Estimate | None) -> str:
    """A difference, in bold where it would count as a gain or a loss."""
    if of is None:
        return "–"
    return f"**{of.value:+.2f}**" if counts(of) else f"{of.value:+.2f}"


def counts(of: Estimate) -> bool:
    """Whether a difference is large, and its interval leaves out zero."""
    return abs(of.value) >= SMALLEST_GAIN and (of.low > 0 or of.high < 0)


def stands_out(cells: Cells) -> str:
    """Which changes of the recipe count on tasks of the verdict, in a sentence."""
    lost, gained = [], []
    for arm in [arm for arm in ABLATED if arm in cells.arms]:
        differences = {name: difference(cells, arm, HYBRID, name, *probe_of(name)) for name in PRIMARY_TASKS}
        found = {name: of.value for name, of in differences.items() if of is not None and counts(of)}
        for those, sign in ((lost, -1), (gained, 1)):
            if names := [name for name, value in found.items() if value * sign > 0]:
                those.append(f"{ABLATED[arm].about} ({', '.join(names)})")
    said = f"Lost by: {'; '.join(lost) or 'no change'}. Gained by: {'; '.join(gained) or 'no change'}"
    return f"What is bold on tasks of the verdict. {said}."


def tuning(path: Path) -> Iterator[list[str]]:
    """What was tried before the full run."""
    columns = [task.name for task in TASKS if task.name in PRIMARY_TASKS or task.name == "head size"]
    yield ["", "steps", *columns]
    for tried in map(json.loads, path.read_text().splitlines()):
        scores = [tried["scores"].get(task) for task in columns]
        yield [tried["about"], str(tried["steps"]), *("–" if one is None else f"{one:.2f}" for one in scores)]


def asked(counts: Iterable[Cell]) -> Iterator[list[str]]:
    """What each task asks, of how many."""
    yield ["task", "asks", "score", "chance", "to be labelled", "tested", "of these, yes"]
    found = {line["task"]: line for line in counts}
    for task in TASKS:
        of = found.get(task.name, {})
        chance = f"{CHANCE[task.kind]:g}" if task.kind in CHANCE else "–"
        numbers = [f"{of[key]}" if of.get(key) is not None else "–" for key in ("labelled", "tested", "positive")]
        yield [f"*{task.name}*" if task.is_trivial else task.name, task.asks, METRIC[task.kind], chance, *numbers]


def runs(results: Mapping[str, Cells]) -> Iterator[list[str]]:
    """Where the numbers come from, a line for each arm, commit and machine."""
    yield ["arm", "seeds", "minutes, each", "commit", "hardware"]
    alike: dict[tuple[str, ...], list[Cell]] = {}
    for part, run in ((part, run) for part, cells in results.items() for run in cells.runs):
        changed = ABLATED[run["arm"]].about if run["arm"] in ABLATED else "the recipe"
        arm = f"{part}: {changed}" if part else f"`{run['arm']}`"
        alike.setdefault((arm, run["commit"], run["hardware"]), []).append(run)
    for (arm, commit, hardware), of in alike.items():
        seeds = ", ".join(str(run["seed"]) for run in of)
        yield [arm, seeds, f"{np.mean([run['minutes'] for run in of]):.0f}", commit, hardware]


def told(of: Estimate | None, sign: str = "") -> str:
    """A number with its interval."""
    return "–" if of is None else f"{of.value:{sign}.2f} [{of.low:{sign}.2f}, {of.high:{sign}.2f}]"


def number(of: Estimate | None) -> str:
    """A number alone."""
    return "–" if of is None else f"{of.value:.2f}"


def table(lines: Iterator[list[str]]) -> str:
    """Markdown."""
    head, *rows = lines
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
