"""What every benchmark prints and writes: rows, the machine without its name, and the commit."""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from umbif.machine import num_cores

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 140  # of a table in a file: a narrow one would cut its columns


@dataclass(frozen=True)
class Row:
    """One number: of which work, by whom, and how many times that of the first contestant."""

    work: str
    contestant: str
    value: float
    unit: str
    ratio: float | None


def hardware(device: torch.device) -> str:
    """The processor that does the work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), flags=re.MULTILINE)
    return f"{found[1].strip() if found else 'unknown CPU'}, {num_cores()} cores"


def commit() -> str | None:
    """Short name of the commit that is checked out, and whether code differs from it; None outside of a repository."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        code = ("umbif", "recipes", "benchmarks", ":!benchmarks/results")
        return f"{name}, changed" if _git("status", "--porcelain", "--untracked-files=no", "--", *code) else name
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def write_json(path: Path, rows: Sequence[Row], device: torch.device) -> None:
    """Adds rows to those that the same machine and commit left in the file; the same work replaces itself."""
    source = {"hardware": hardware(device), "commit": commit()}
    kept = json.loads(path.read_text()) if path.exists() else {"rows": []}
    works = {row.work for row in rows}
    kept["rows"] = [row for row in kept["rows"] if row["work"] not in works]
    if kept["rows"] and source != {name: kept.get(name) for name in source}:
        raise SystemExit(f"{path} holds numbers of another machine or commit: name another file, or move it away")
    path.write_text(json.dumps({**source, "rows": [*kept["rows"], *map(asdict, rows)]}, indent=1) + "\n")


def print_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """The first column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for line in lines:
        table.add_row(*line)
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
