"""Tables and figures of `learn.py`'s results: writes docs/evidence.md and what it shows.

    python benchmarks/evidence.py
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from _arms import ABLATED, ABLATION_STEPS, ABOUT, ARMS, NUM_STEPS, SUPERVISED, TRUTH
from _cells import NUM_LABELS, read_cells
from _cohort import FULL
from _evidence import (
    ALONE,
    BEFORE,
    HYBRID,
    PRIMARY_LABELS,
    PRIMARY_PROBE,
    PRIMARY_TASKS,
    SMALLEST_DIFFERENCE,
    SMALLEST_GAIN,
    Cell,
    Cells,
    difference,
    gains,
    is_at_chance,
    is_gain,
    mean,
    null_cells,
    overlap,
    probe_of,
    verdict,
)  # fmt: skip
from _evidence_figures import draw_gains, draw_labels, draw_scores
from _features import MANY, NUM_COMPONENTS
from _finetuned import COURSE, FINETUNED, NUM_DRAWS
from _finetuned import NUM_LABELS as NUM_TUNED
from _supervised import LEARNT
from _tasks import METRIC, TASKS

from umbif.evaluation.statistics import Estimate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
LEARN, ABLATION, FIRST, TUNING = "learn.jsonl", "ablation.jsonl", "learn_first.jsonl", "tuning.jsonl"
TEMPLATE = Path(__file__).parent / "_evidence.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description="Writes docs/evidence.md from the results of learn.py")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    cells, ablated, first = (in_order(args.results / name) for name in (LEARN, ABLATION, FIRST))
    (args.docs / "figures").mkdir(parents=True, exist_ok=True)
    draw_scores(cells).savefig(args.docs / "figures" / "evidence_scores.svg")
    draw_gains(cells).savefig(args.docs / "figures" / "evidence_gains.svg")
    draw_labels(cells).savefig(args.docs / "figures" / "evidence_labels.svg")
    earlier = {"first": verdict(first), "tuning": table(tuning(args.results / TUNING))}
    parts = parts_of(cells, ablated) | earlier
    (args.docs / "evidence.md").write_text(TEMPLATE.read_text().format(**parts))
    print(verdict(cells))


def in_order(path: Path) -> Cells:
    """Of a results file, arm by arm as they are declared: several processes may have written it."""
    order = {arm: place for place, arm in enumerate((*ARMS, *ABLATED))}
    return Cells(sorted(read_cells(path), key=lambda cell: (order[cell["arm"]], cell["seed"])))


def parts_of(cells: Cells, ablated: Cells) -> dict[str, str]:
    """What the page's braces stand for."""
    missed, num, (low, high) = null_cells(cells)
    seen, unseen, num_people = overlap(cells, [arm for arm in ARMS if arm not in (TRUTH, *SUPERVISED)])
    return {
        "verdict": verdict(cells),
        "arms": "\n".join(f"| `{arm}` | {ABOUT[arm]} |" for arm in ARMS if arm in cells.arms),
        "scores": table(scores(cells)),
        "gains": table(gains_of(cells)),
        "finetuned": table(finetuned(cells)),
        "bounds": table(bounds(cells)),
        "ablations": table(ablations(ablated)),
        "knn": table(scores(cells, "knn")),
        "few": table(scores(cells, "linear", NUM_LABELS[0])), "most": table(scores(cells, "linear", NUM_LABELS[-1])),
        "null": f"{missed} of {num} intervals miss one half; with 5% to be expected, {low} to {high} would.",
        "overlap": f"{seen:.2f} where their first one was labelled, {unseen:.2f} where as many of others were",
        "num_people": str(num_people),
        "runs": table(runs(cells, ablated)),
        "num_few": str(NUM_LABELS[0]), "num_most": str(NUM_LABELS[-1]),
        "smallest": f"{SMALLEST_GAIN:.2f}", "tie": f"{SMALLEST_DIFFERENCE:.2f}",
        "num_labels": str(PRIMARY_LABELS), "unlabelled": str(FULL.unlabelled),
        "num_tuned": str(NUM_TUNED), "num_draws": str(NUM_DRAWS), "num_steps": str(COURSE.num_steps),
        "steps": str(NUM_STEPS), "ablation_steps": str(ABLATION_STEPS),
        "many": str(MANY), "components": str(NUM_COMPONENTS),
    }


def scores(cells: Cells, probe: str = PRIMARY_PROBE, num_labels: int = PRIMARY_LABELS) -> Iterator[list[str]]:
    """Of every arm on every task; retrieval has neither probe nor labels."""
    yield ["task", "", *(f"`{arm}`" for arm in cells.arms)]
    for task in TASKS:
        which = probe_of(task.name) if task.name == "retrieval" else (probe, num_labels)
        found = [mean(cells, arm, task.name, *which) for arm in cells.arms]
        known = [one for arm, one in zip(cells.arms, found, strict=True) if one is not None and arm != TRUTH]
        name = f"*{task.name}*" if task.is_trivial else task.name
        name += ", at chance" if known and is_at_chance(task, known) else ""
        yield [name, METRIC[task.kind], *map(number, found)]


def gains_of(cells: Cells) -> Iterator[list[str]]:
    """The hybrid over the others on every task that is not trivial."""
    others = [other for other in (*BEFORE, *ALONE, "histogram") if other in cells.arms]
    yield ["task", "", *(f"over `{other}`" for other in others), "gain"]
    by_task = gains(cells)
    for task in TASKS:
        if task.name in PRIMARY_TASKS:
            found = [difference(cells, HYBRID, other, task.name, *probe_of(task.name)) for other in others]
            yield [task.name, METRIC[task.kind], *(told(one, sign="+") for one in found),
                   "yes" if is_gain(cells, task.name, by_task[task.name]) else "no"]  # fmt: skip


def finetuned(cells: Cells) -> Iterator[list[str]]:
    """Of encoders that went on learning from the labelled exams."""
    arms = [arm for arm in cells.arms if cells.seeds(arm, FINETUNED[0].name, "finetuned", NUM_TUNED)]
    yield ["task", "", *(f"`{arm}`" for arm in arms)]
    for task in FINETUNED:
        found = [mean(cells, arm, task.name, "finetuned", NUM_TUNED) for arm in arms]
        yield [task.name, METRIC[task.kind], *map(told, found)]


def bounds(cells: Cells) -> Iterator[list[str]]:
    """What the tumour's own numbers tell, and what is learnt from all labels without pretraining."""
    yield ["task", "", f"`{TRUTH}`", *(f"`{arm}`" for arm in SUPERVISED), f"`{HYBRID}`"]
    for task in [task for task in LEARNT if task.name in PRIMARY_TASKS and task.name != "age"]:  # those about tumours
        known = mean(cells, TRUTH, task.name, "linear", NUM_LABELS[-1])
        taught = [mean(cells, arm, task.name, "taught", 0) for arm in SUPERVISED]
        most = mean(cells, HYBRID, task.name, "linear", NUM_LABELS[-1])
        yield [task.name, METRIC[task.kind], *map(number, (known, *taught, most))]


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
    counts = abs(of.value) >= SMALLEST_GAIN and (of.low > 0 or of.high < 0)
    return f"**{of.value:+.2f}**" if counts else f"{of.value:+.2f}"


def tuning(path: Path) -> Iterator[list[str]]:
    """What was tried before the full run."""
    asked = [task.name for task in TASKS if task.name in PRIMARY_TASKS or task.name == "head size"]
    yield ["", "steps", *asked]
    for tried in map(json.loads, path.read_text().splitlines()):
        scores = [tried["scores"].get(task) for task in asked]
        yield [tried["about"], str(tried["steps"]), *("–" if one is None else f"{one:.2f}" for one in scores)]


def runs(*results: Cells) -> Iterator[list[str]]:
    """Where the numbers come from, a line for each arm, commit and machine."""
    yield ["arm", "seeds", "minutes, each", "commit", "hardware"]
    alike: dict[tuple[str, ...], list[Cell]] = {}
    for run in (run for cells in results for run in cells.runs):
        alike.setdefault((run["arm"], run["commit"], run["hardware"]), []).append(run)
    for (arm, commit, hardware), of in alike.items():
        seeds = ", ".join(str(run["seed"]) for run in of)
        yield [f"`{arm}`", seeds, f"{np.mean([run['minutes'] for run in of]):.0f}", commit, hardware]


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


if __name__ == "__main__":
    main()
