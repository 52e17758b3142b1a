"""metrics.csv: one row a logged step, readable by anything, continued without a seam when a run resumes."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCSV(Logger):
    """Appends rows; a new column rewrites the file once.

    Args:
        folder: Of the run.
        resumed_step: Rows after it belong to work that was lost, and are dropped.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step", "slot"]
        if self.path.exists():
            self._read(resumed_step)

    @property
    def name(self) -> str:
        """Of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """None: a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder holds the whole recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds to the row of this step."""
        values = {k: v for k, v in metrics.items() if k != "epoch"}
        if not values:
            return
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(values)
        else:
            self._append_last()
            self.rows = [{"step": step, **values}]

    @rank_zero_only
    def save(self) -> None:
        """Nothing is held back but the row of the current step."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the last row."""
        self._append_last()
        self.rows = []

    def _append_last(self) -> None:
        if not self.rows:
            return
        row = self.rows[-1]
        new = [c for c in row if c not in self.columns]
        if new or not self.path.exists():
            self.columns += new
            self._rewrite(self._existing())
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({k: _short(v) for k, v in row.items()})

    def _read(self, resumed_step: int) -> None:
        existing = self._existing()
        self.columns = list(existing[0]) if existing else self.columns
        self._rewrite([row for row in existing if int(row["step"]) < resumed_step])

    def _existing(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["step"].isdigit() and None not in row]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        aside = self.path.with_name(f".{self.path.name}.writing")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
