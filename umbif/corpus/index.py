"""Folders of NIfTI → manifest: what `umbif index` does. Every file is read in full, in processes that may die."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from umbif.corpus.checks import blank_row, duplicates, inspect, quarantined
from umbif.corpus.folders import LOOKED_FOR, TOLD_APART, Found, find_volumes
from umbif.corpus.manifest import (
    COLUMNS,
    FILLED_BY_LABELS,
    assign_persons,
    assign_splits,
    fraction_problems,
    join_labels,
    label_columns,
    label_problems,
    place_problems,
)
from umbif.corpus.processes import each
from umbif.errors import Problem, UmbifError, UsageError
from umbif.machine import num_cores
from umbif.progress import track

Row = dict[str, Any]
MAX_WORKERS = 16
MAX_LINES = 20
CRASHED = "The process that read the file died, mostly for lack of memory. Try it alone, on a machine with more."


def build_manifest(
    sources: Sequence[str | Path],
    *,
    dataset: str | None = None,
    labels: str | Path | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    num_workers: int | None = None,
) -> pd.DataFrame:
    """Reads and judges every NIfTI file of the sources; bad files become quarantined rows, never an error.

    Args:
        sources: Folders or files.
        dataset: The data set's name; by default the name of each source folder.
        labels: A table whose columns are joined to the exams.
        test_fraction: Share of the persons that makes the test set.
        seed: Of the split.
        num_workers: Processes; 0 reads in this process, None takes one per usable core.

    Raises:
        UsageError: A source is missing, none holds a NIfTI file, or the label table does not fit; before any is read.
    """
    refuse_impossible(test_fraction, labels)
    found = find_volumes([Path(source) for source in sources], dataset)
    if not found:
        raise UsageError(Problem("No image was found", ", ".join(map(str, sources)), LOOKED_FOR))
    known = pd.DataFrame(map(blank_row, found), columns=list(COLUMNS))
    if labels is not None:
        known = join_labels(known, labels)  # by names alone, so that a table that does not fit costs no hours
    if num_workers is None:
        num_workers = min(num_cores(), MAX_WORKERS, len(found))
    rows = sorted(track(_inspect_all(found, num_workers), "Reading volumes", len(found)), key=lambda row: row["path"])
    known = known.set_index("path").loc[[row["path"] for row in rows]].reset_index()
    labelled = known[[*FILLED_BY_LABELS, *label_columns(known)]]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).drop(columns=list(FILLED_BY_LABELS)).join(labelled)
    table = assign_splits(assign_persons(table), test_fraction, seed)
    return table[[*COLUMNS, *label_columns(table)]]


def refuse_impossible(test_fraction: float, labels: str | Path | None = None, output: Path | None = None) -> None:
    """Refuses what cannot be meant before any volume is read.

    Raises:
        UsageError: Names all of it.
    """
    problems = fraction_problems(test_fraction)
    problems += label_problems(Path(labels)) if labels is not None else []
    problems += place_problems(output) if output is not None else []
    if problems:
        raise UsageError(problems)


def refuse_without_images(table: pd.DataFrame, output: Path) -> None:
    """Refuses a manifest of which nothing can be prepared; it is there to be read.

    Raises:
        UmbifError: No volume is an image that can be used.
    """
    if not ((table["role"] == "image") & (table["status"] == "ok")).any():
        found = f"No image was found among {len(table)} files that could be used: there is nothing to prepare."
        raise UmbifError(f"{found} {LOOKED_FOR} {output} has status, reason and detail of each.")


def summary(table: pd.DataFrame) -> str:
    """What a manifest holds, as plain text for the person who made it: it names quarantined files."""
    usable = table[(table["role"] == "image") & (table["status"] == "ok")]
    sides = usable.drop_duplicates("exam")["split"].value_counts()
    sequences = usable["sequence"].value_counts()
    masks = table[(table["role"] != "image") & (table["status"] == "ok")]["role"].value_counts()
    lines = [
        f"{usable['exam'].nunique()} exams of {usable['person'].nunique()} persons: "
        f"{sides.get('train', 0)} train, {sides.get('test', 0)} test",
        "volumes: " + (", ".join(f"{name} {count}" for name, count in sequences.items()) or "none"),
    ]
    if len(masks):
        lines.append("masks: " + ", ".join(f"{name} {count}" for name, count in masks.items()))
    if num_same := len(duplicates(table)):
        lines.append(f"{num_same} volumes have the voxels of another; their exams count as one person")
    if num_apart := usable[usable["flags"].str.contains(TOLD_APART)]["exam"].nunique():
        lines.append(f"{num_apart} exams have the name of others and are told apart by folders ({TOLD_APART} in flags)")
    return "\n".join(lines + _quarantine(table))


def _quarantine(table: pd.DataFrame) -> list[str]:
    bad = table[table["status"] != "ok"]
    if bad.empty:
        return []
    common = os.path.commonpath([os.path.dirname(path) for path in table["path"]])
    lines = []
    for reason, files in bad.groupby("reason"):
        lines.append(f"  {reason} ({len(files)}): {files['detail'].iloc[0]}")
        lines += [f"    {os.path.relpath(path, common)}" for path in files["path"]]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], "  … and more: see status, reason and detail in the manifest"]
    return [f"{len(bad)} files are quarantined:", *lines]


def _inspect_all(
    found: Sequence[Found], num_workers: int, inspect_one: Callable[[Found], Row] = inspect
) -> Iterator[Row]:
    """Rows in the order of completion."""
    return (row for _, row in each(inspect_one, found, num_workers, _crashed))


def _crashed(item: Found) -> Row:
    return quarantined(item, "reader_crashed", CRASHED)
