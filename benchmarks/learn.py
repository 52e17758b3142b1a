"""Does pretraining help? Arms, tasks and controls on synthetic exams whose truth is known.

    python benchmarks/learn.py                   goes on where it stopped
    python benchmarks/learn.py --minutes 60      begins no further arm after an hour
    python benchmarks/learn.py --arms mae umbif  these alone: a second process may do others meanwhile
    python benchmarks/learn.py --ablate          the hybrid with one part changed at a time, on seeds of its own
    python benchmarks/learn.py --verify --arms umbif --seeds 0 --folder NEW   does them once more and compares
    python benchmarks/learn.py --develop         for tuning: judges by training people alone, in a file of its own
    python benchmarks/learn.py --count           how many exams each task has
    python benchmarks/learn.py --quick           a check of the machinery in about three minutes

Every finished cell is a line of the results file. Arms: `_arms.py`; tasks: `_tasks.py`; exams: `_cohort.py`. Tables and
figures: `evidence.py`.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from _arms import (
    ABLATED,
    ABLATION_STEPS,
    ARMS,
    COURSES,
    MOST_SEEDS,
    NUM_STEPS,
    PRETRAINED,
    SUPERVISED,
    TRUTH,
    describer,
)  # fmt: skip
from _cells import NUM_LABELS, Cell, append, counts, frozen_cells, read_cells
from _cohort import FULL, Cohort, make_cohort
from _describe import Describer, Encoded
from _evidence import PRIMARY_LABELS, Cells
from _features import Array, features_of, load, places_of, save, targets_of, traits_of
from _finetuned import finetuned_cells, taught_cells
from _inputs import Shown, read
from _quick import quick_cells, told
from _report import commit, hardware
from _supervised import Course, Taught, teach

from umbif.corpus.shards import Corpus
from umbif.errors import UmbifError
from umbif.progress import console, track
from umbif.quiet import quiet

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SEEDS, ABLATION_SEEDS, DEVELOPMENT_SEEDS = range(5), range(10, 12), range(100, 105)  # tuned on some, judged on others
FINETUNED_SEEDS = (*SEEDS[:3], *DEVELOPMENT_SEEDS[:1])  # it takes most of the time
CACHE_BYTES = 3 * 2**30  # of decoded exams of the clinic


class Plan(NamedTuple):
    """What is to be done."""

    results: Path
    arms: Sequence[str]
    seeds: Sequence[int]
    every_seed: Sequence[int]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """As the command line asks."""
        if args.develop:
            plan = cls(args.folder / "develop.jsonl", ARMS, DEVELOPMENT_SEEDS, DEVELOPMENT_SEEDS)
        elif args.ablate:
            plan = cls(RESULTS / "ablation.jsonl", ("umbif", *ABLATED), ABLATION_SEEDS, ABLATION_SEEDS)
        else:
            plan = cls(RESULTS / "learn.jsonl", ARMS, SEEDS, SEEDS)
        return plan._replace(arms=args.arms or plan.arms, seeds=args.seeds or plan.seeds)

    def works(self, *, finished: bool = False) -> list[tuple[str, int]]:
        """Every arm with every seed that is missing, or `finished`, seed by seed; some arms have few."""
        done = {(cell["arm"], cell["seed"]) for cell in read_cells(self.results)}
        few = {arm: self.every_seed[:num] for arm, num in MOST_SEEDS.items()}
        every = [(arm, seed) for seed in self.seeds for arm in self.arms if seed in few.get(arm, self.seeds)]
        return [work for work in every if (work in done) == finished]


@dataclass
class Bench:
    """The clinic, read once, and where features and runs are kept."""

    folder: Path
    develop: bool = False  # on training people alone
    ablate: bool = False  # frozen alone, with as many labels as the primary comparisons have

    @cached_property
    def cohort(self) -> Cohort:
        """The exams."""
        return make_cohort(self.folder, FULL)

    @cached_property
    def rows(self) -> Array:
        """Of the clinic's exams: all, or those of training people."""
        truth = self.cohort.truth
        return np.flatnonzero((truth["split"] == "train").to_numpy() | (not self.develop))

    @cached_property
    def exams(self) -> list[Shown]:
        """In the corpus' order."""
        return list(track(read(Corpus(self.cohort.clinic), self.rows), "Reading exams", len(self.rows)))

    @cached_property
    def targets(self) -> pd.DataFrame:
        """What is asked about each. In development every second training person stands in for a test person."""
        found = targets_of(self.exams, self.cohort.truth.iloc[self.rows])
        if found.groupby("person")["test"].nunique().max() > 1:
            raise ValueError("a person is both labelled and tested")
        if self.develop:
            found["test"] = pd.factorize(found["person"])[0] % 2 == 1
        return found.reset_index(drop=True)

    @cached_property
    def places(self) -> dict[str, Array]:
        """What is asked about their places."""
        return places_of(self.exams)

    @cached_property
    def clinic(self) -> Corpus:
        """To learn from."""
        return Corpus(self.cohort.clinic, CACHE_BYTES)

    @property
    def train(self) -> Array:
        """(exams,) bool: whose labels may be learnt from."""
        return ~self.targets["test"].to_numpy()

    def cells(self, arm: str, seed: int) -> Iterator[Cell]:
        """Frozen ones of every arm; fine-tuned ones of some seeds; of taught networks their own answers."""
        if arm == TRUTH:
            features = traits_of(self.cohort.truth.iloc[self.rows], self.train)
            yield from frozen_cells(features, self.targets, self.places, seed)
            return
        num_steps = ABLATION_STEPS if self.ablate else NUM_STEPS
        found = describer(SUPERVISED.get(arm, arm), seed, self.cohort, self.kept("runs"), num_steps)
        if arm in SUPERVISED:
            assert isinstance(found, Encoded)
            model = self.taught(found, seed, COURSES[arm])
            found = Encoded(model.encoder)
            yield from taught_cells(model, self.exams, self.targets)
        num_labels = [PRIMARY_LABELS] if self.ablate else NUM_LABELS
        yield from frozen_cells(self.features(found, f"{arm}_{seed}"), self.targets, self.places, seed, num_labels)
        if arm in ("untrained", *PRETRAINED) and seed in FINETUNED_SEEDS:
            assert isinstance(found, Encoded)
            yield from finetuned_cells(found.encoder, self.clinic, self.exams, self.targets, seed)

    def features(self, found: Describer, name: str) -> dict[str, Array]:
        """Of every exam of the clinic, kept under a name."""
        path = self.kept("features") / f"{name}.npz"
        if not path.exists():
            save(path, features_of(found, self.exams, self.train))
        return load(path)

    def kept(self, what: str) -> Path:
        """A folder of what is not comparable between kinds of runs of this file."""
        return self.folder / f"{what}_{'develop' if self.develop else 'ablation' if self.ablate else 'full'}"

    def taught(self, encoded: Encoded, seed: int, course: Course) -> Taught:
        """All labels of the training people."""
        rows, targets = self.rows[self.train], self.targets[self.train].reset_index(drop=True)
        return teach(encoded.encoder, self.clinic, rows, targets, seed, course)


def main(argv: Sequence[str] | None = None) -> None:
    """Does the cells that are missing."""
    args = arguments(argv)
    quiet()
    torch.set_num_threads(1)
    if args.quick:
        told(quick_cells(args.folder / "quick"))
        return
    bench, plan = Bench(args.folder, args.develop, args.ablate), Plan.of(args)
    if args.verify:
        if bench.kept("runs").exists() or bench.kept("features").exists():
            sys.exit(f"{args.folder} holds runs or features, which would be taken as they are: give --folder a new one")
        verify(bench, plan)
        return
    if args.count:
        write_counts(bench, RESULTS / "tasks.jsonl")
        return
    failed = run(bench, plan, args.minutes)
    for work, problem in failed.items():
        console.print(f"Failed: {work}: {problem}")
    if failed:
        sys.exit(1)
    left = len(plan.works())
    console.print(
        f"{left} are left. The same command goes on." if left
        else "All is done. Tables and figures:  python benchmarks/evidence.py"
    )  # fmt: skip


def run(bench: Bench, plan: Plan, minutes: float | None) -> dict[str, UmbifError]:
    """Does what is missing, as far as the time reaches; what failed, and why."""
    begun, failed = time.monotonic(), {}
    for arm, seed in plan.works():
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            break
        console.print(f"{arm}, seed {seed}")
        try:
            append(plan.results, cells_of(bench, arm, seed))
        except UmbifError as error:
            failed[f"{arm}, seed {seed}"] = error
    return failed


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Does pretraining help?")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "learn", help="exams, runs and features")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--develop", action="store_true", help="judge by training people alone: for tuning")
    kind.add_argument("--ablate", action="store_true", help="change one part of the hybrid at a time")
    kind.add_argument("--quick", action="store_true", help="few exams, one question: does the machinery learn?")
    kind.add_argument("--count", action="store_true", help="write how many exams each task has")
    parser.add_argument("--verify", action="store_true", help="do what is finished once more, and compare")
    parser.add_argument("--minutes", type=float)
    known = (*ARMS, *ABLATED)
    parser.add_argument("--arms", nargs="+", choices=known, metavar="ARM", help=", ".join(known))
    parser.add_argument("--seeds", nargs="+", type=int, help="of pretraining")
    return parser.parse_args(argv)


def verify(bench: Bench, plan: Plan) -> None:
    """Says how far scores are from those of the file when everything is done once more."""
    known = Cells(read_cells(plan.results)).by_key
    works = plan.works(finished=True)
    if not works:
        console.print(f"{plan.results} has none of these.")
    for arm, seed in works:
        again = Cells(cells_of(bench, arm, seed)).by_key
        apart = [abs(cell["score"] - known[key]["score"]) for key, cell in again.items()]
        same = f"{apart.count(0)} of {len(apart)} the same"
        console.print(f"{arm}, seed {seed}: {same}, the largest difference {max(apart):g}")


def write_counts(bench: Bench, path: Path) -> None:
    """How many exams of the clinic, or patches of them, each task has. What training takes no part in answers it."""
    features = bench.features(describer("histogram", 0, bench.cohort, bench.kept("runs")), "histogram_0")
    path.unlink(missing_ok=True)
    append(path, counts(features, bench.targets, bench.places))
    console.print(path.read_text(), end="")


def cells_of(bench: Bench, arm: str, seed: int) -> list[Cell]:
    """All of one encoder, and where they come from."""
    begun, of = time.monotonic(), commit()
    found = list(bench.cells(arm, seed))
    minutes = round((time.monotonic() - begun) / 60, 1)
    source = {"commit": of, "hardware": hardware(torch.device("cpu")), "minutes": minutes}
    return [{"arm": arm, "seed": seed, **cell} for cell in (*found, source)]


if __name__ == "__main__":
    main()
