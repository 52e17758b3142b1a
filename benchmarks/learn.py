"""Does pretraining help? Arms, tasks and controls on synthetic exams whose truth is known.

    python benchmarks/learn.py                   goes on where it stopped
    python benchmarks/learn.py --minutes 60      begins no further arm after an hour
    python benchmarks/learn.py --develop         for tuning: judges by training people alone, in a file of its own
    python benchmarks/learn.py --quick           a check of the machinery in about three minutes

Every finished cell is a line of the results file. Arms: `_arms.py`; tasks: `_tasks.py`; exams: `_cohort.py`. Tables and
figures: `evidence.py`. It has not been run in full yet.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _arms import ARMS, BASELINES, PRETRAINED, SUPERVISED, describer
from _cells import Cell, append, frozen_cells, read_cells
from _cohort import FULL, Cohort, make_cohort
from _describe import Describer, Encoded
from _features import Array, features_of, load, places_of, save, targets_of
from _finetuned import finetuned_cells
from _inputs import Shown, read
from _quick import quick_cells, told
from _report import commit, hardware
from _supervised import UPPER_BOUND, teach

from umbif.corpus.shards import Corpus
from umbif.progress import console, track
from umbif.quiet import quiet

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "learn.jsonl"
NUM_SEEDS, DEVELOPMENT_SEED = 5, 100  # what is tuned on some seeds is judged on others


@dataclass
class Bench:
    """The clinic, read once, and where features and runs are kept."""

    folder: Path
    develop: bool  # on training people alone

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

    def features(self, arm: str, seed: int) -> dict[str, Array]:
        """Of every exam of the clinic."""
        path = self.folder / ("features_develop" if self.develop else "features") / f"{arm}_{seed}.npz"
        if not path.exists():
            save(path, features_of(self.describer(arm, seed), self.exams, ~self.targets["test"].to_numpy()))
        return load(path)

    def describer(self, arm: str, seed: int) -> Describer:
        """What an arm makes of an exam; trains it where that has not been done."""
        found = describer(SUPERVISED.get(arm, arm), seed, self.cohort, self.folder / "runs")
        if isinstance(found, Encoded) and arm in SUPERVISED:
            taught = np.flatnonzero(~self.targets["test"])
            targets = self.targets.iloc[taught].reset_index(drop=True)
            teach(found.encoder, Corpus(self.cohort.clinic), self.rows[taught], targets, seed, UPPER_BOUND)
            found = Encoded(found.encoder)
        return found

    def cells(self, arm: str, seed: int) -> Iterator[Cell]:
        """Frozen, and for a transformer fine-tuned too."""
        yield from frozen_cells(self.features(arm, seed), self.targets, self.places, seed)
        if arm in ("untrained", *PRETRAINED):
            encoded, corpus = self.describer(arm, seed), Corpus(self.cohort.clinic)
            assert isinstance(encoded, Encoded)
            yield from finetuned_cells(encoded.encoder, corpus, self.exams, self.targets, seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Does the cells that are missing."""
    args = arguments(argv)
    quiet()
    torch.set_num_threads(1)
    if args.quick:
        told(quick_cells(args.folder / "quick"))
        return
    bench = Bench(args.folder, args.develop)
    results = args.folder / "develop.jsonl" if args.develop else RESULTS
    begun = time.monotonic()
    done = {(cell["arm"], cell["seed"]) for cell in read_cells(results)}
    for arm, seed in [work for work in works(args.arms, args.seeds) if work not in done]:
        if args.minutes is not None and time.monotonic() - begun > 60 * args.minutes:
            console.print("The time is up. The same command goes on.")
            return
        console.print(f"{arm}, seed {seed}")
        append(results, cells_of(bench, arm, seed))
    console.print("All is done. Tables and figures:  python benchmarks/evidence.py")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Does pretraining help?")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "learn", help="exams, runs and features")
    parser.add_argument("--develop", action="store_true", help="judge by training people alone: for tuning")
    parser.add_argument("--quick", action="store_true", help="few exams, one question: does the machinery learn?")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4, and in development 100 to 104")
    args = parser.parse_args(argv)
    first = DEVELOPMENT_SEED if args.develop else 0
    args.seeds = args.seeds or [*range(first, first + NUM_SEEDS)]
    return args


def works(arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Every arm with every seed, seed by seed; what has no chance in it once."""
    return [(arm, seed) for seed in seeds for arm in arms if arm not in BASELINES or seed == seeds[0]]


def cells_of(bench: Bench, arm: str, seed: int) -> list[Cell]:
    """All of one encoder, and where they come from."""
    begun = time.monotonic()
    found = list(bench.cells(arm, seed))
    minutes = round((time.monotonic() - begun) / 60, 1)
    source = {"commit": commit(), "hardware": hardware(torch.device("cpu")), "minutes": minutes}
    return [{"arm": arm, "seed": seed, **cell} for cell in (*found, source)]


if __name__ == "__main__":
    main()
