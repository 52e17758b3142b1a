"""Tables and figures of `learn.py`'s results: writes docs/evidence.md and what it shows.

    python benchmarks/evidence.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from _aims import SMALLEST_DIFFERENCE, SMALLEST_GAIN, verdict
from _arms import ABLATED, ABLATION_STEPS, ABOUT, ARMS, NUM_STEPS, SUPERVISED, TRUTH
from _cells import NUM_LABELS, NUM_SECONDARY, read_cells
from _cohort import FULL
from _evidence import PRIMARY_LABELS, Cells, null_cells, overlap
from _evidence_figures import draw_gains, draw_labels, draw_scores
from _evidence_tables import (
    ablations,
    asked,
    bounds,
    finetuned,
    gains_of,
    noise,
    other_probes,
    runs,
    scores,
    stands_out,
    table,
    tuning,
    unbounded,
)
from _features import MANY, NUM_COMPONENTS
from _finetuned import COURSE, NUM_DRAWS
from _finetuned import NUM_LABELS as NUM_TUNED

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
LEARN, ABLATION, FIRST, TUNING, TASKS = (
    f"{name}.jsonl" for name in ("learn", "ablation", "learn_first", "tuning", "tasks")
)
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
    beside = {"first": verdict(first), "tuning": table(tuning(args.results / TUNING))}
    beside["tasks"] = table(asked(read_cells(args.results / TASKS)))
    (args.docs / "evidence.md").write_text(TEMPLATE.read_text().format(**parts_of(cells, ablated), **beside))
    print(verdict(cells))


def in_order(path: Path) -> Cells:
    """Of a results file, arm by arm as they are declared: several processes may have written it."""
    order = {arm: place for place, arm in enumerate((*ARMS, *ABLATED))}
    return Cells(sorted(read_cells(path), key=lambda cell: (order[cell["arm"]], cell["seed"])))


def parts_of(cells: Cells, ablated: Cells) -> dict[str, str]:
    """What the page's braces stand for."""
    missed, num, (low, high) = null_cells(cells)
    seen, unseen, num_people = overlap(cells, [arm for arm in ARMS if arm not in (TRUTH, *SUPERVISED)])
    few, most = NUM_LABELS[0], NUM_LABELS[-1]
    return {
        "verdict": verdict(cells),
        "arms": "\n".join(f"| `{arm}` | {ABOUT[arm]} |" for arm in ARMS if arm in cells.arms),
        "scores": table(scores(cells)),
        "gains": table(gains_of(cells)),
        "noise": noise(cells),
        "other_probes": table(other_probes(cells)),
        "finetuned": table(finetuned(cells)),
        "bounds": table(bounds(cells)),
        "unbounded": unbounded(cells),
        "ablations": table(ablations(ablated)), "stands_out": stands_out(ablated),
        "few": table(scores(cells, "linear", few)), "most": table(scores(cells, "linear", most)),
        "knn": table(scores(cells, "knn")),
        "knn_few": table(scores(cells, "knn", few)), "knn_most": table(scores(cells, "knn", most)),
        "null": f"{missed} of {num} 95% intervals leave out one half; with 5% to be expected, {low} to {high} would.",
        "overlap": f"{seen:.2f} where their first one was labelled, {unseen:.2f} where as many of others were",
        "num_people": str(num_people),
        "runs": table(runs({"": cells, "parts of the method": ablated})),
        "num_few": str(few), "num_most": str(most), "resamples": str(NUM_SECONDARY),
        "smallest": f"{SMALLEST_GAIN:.2f}", "tie": f"{SMALLEST_DIFFERENCE:.2f}",
        "num_labels": str(PRIMARY_LABELS), "unlabelled": str(FULL.unlabelled),
        "num_tuned": str(NUM_TUNED), "num_draws": str(NUM_DRAWS), "num_steps": str(COURSE.num_steps),
        "steps": str(NUM_STEPS), "ablation_steps": str(ABLATION_STEPS),
        "many": str(MANY), "components": str(NUM_COMPONENTS),
    }  # fmt: skip


if __name__ == "__main__":
    main()
