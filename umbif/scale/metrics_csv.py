"""metrics.csv: one row a logged step, readable by anything, continued without a seam when a run resumes."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from umbif.files import reading, whole
from umbif.machine import is_leader
from umbif.scale.loggers import Spared


class MetricsCSV(Spared, Logger):
    """Appends rows; a new column rewrites the file once. Rows that a full disk does not take wait until it does.

    Args:
        folder: Of the run.
    """

    called, pause_s = "metrics.csv", 0.0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.last: dict[str, str] = {}
        self.waiting: list[dict[str, str]] = []  # in no file yet
        self.columns = ["step", "slot"]

    @property
    def name(self) -> str:
        """Of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder holds the whole recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes a row; what comes later for the same step joins it."""
        values = {k: _short(v) for k, v in metrics.items() if k != "epoch"}
        if not values:
            return
        joins = self.last.get("step") == str(step)
        self.last = {**self.last, **values} if joins else {"step": str(step), **values}
        self.spare(self._append_row, joins)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the rows that still wait, if that can be done now."""
        if self.waiting:
            self.spare(self._write_waiting)

    def go_on_from(self, step: int) -> None:
        """Drops rows of work that was lost: those from a step on."""
        if not is_leader() or not self.path.exists():
            return
        kept = [row for row in self._existing() if int(row["step"]) < step]
        self.columns = list(kept[0]) if kept else self.columns
        self._rewrite(kept)

    def _append_row(self, joins: bool) -> None:
        """The last row; it takes the place of one of the same step."""
        new = [c for c in self.last if c not in self.columns]
        simple = not (joins or new or self.waiting)
        self.columns += new
        self.waiting = [row for row in self.waiting if row["step"] != self.last["step"]] + [self.last]
        if simple and self.path.exists():
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(self.last)
            self.waiting = []
        else:
            self._write_waiting()

    def _write_waiting(self) -> None:
        steps = {row["step"] for row in self.waiting}
        self._rewrite([*(row for row in self._existing() if row["step"] not in steps), *self.waiting])
        self.waiting = []

    def _existing(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        cure = "Copy it again, or delete it: the run goes on and begins another"
        with reading(self.path, cure), self.path.open(newline="") as file:
            lines = (line for line in file if line.endswith("\n"))  # the last one may have been cut off
            return [row for row in csv.DictReader(lines) if row["step"].isdigit() and None not in row]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with whole(self.path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
