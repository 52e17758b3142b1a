"""What the groups of `chaos.py` have in common: rows, and small trainings that are compared."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from _trained import Job, has_ended, weights

EVERY_STEP = ("callbacks.checkpoint.every_n_steps=1", "trainer.log_every_n_steps=1")
STEPS, WATCHDOG_S = 12, 6
HYBRID = Job("pretrain/umbif_tiny")
STRATEGY, TWO = "trainer.strategy=ddp", "trainer.devices=2"
SAME = "bit for bit"


@dataclass(frozen=True)
class Row:
    """One case."""

    group: str
    case: str
    expected: str
    found: str

    @property
    def is_expected(self) -> bool:
        """Whether all went well."""
        return self.expected == self.found


Cases = Iterator[Row]


def plan(*faults: str) -> tuple[str, ...]:
    """Overrides that let faults happen."""
    listed = ",".join(map(repr, faults))
    return ("callbacks.faults.class_path=_faults.Faults", f"callbacks.faults.plan=[{listed}]")


def same(run: Path, other: Path, curves: bool = True) -> str:
    """Whether two runs have ended alike, in words."""
    if not has_ended(run) or not has_ended(other):
        return "has not ended"
    if weights(run) != weights(other):
        return "other weights"
    ours, theirs = (pd.read_csv(folder / "metrics.csv")["train/loss"].tolist() for folder in (run, other))
    return "other losses" if curves and ours != theirs else SAME


def show_end(path: Path) -> None:
    """The last words of processes, where a case has gone wrong."""
    for said in sorted(path.parent.glob(f"{path.name}*.txt")):
        print(f"---- {said.name}", *said.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
