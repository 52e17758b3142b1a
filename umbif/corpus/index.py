"""Folders of NIfTI → manifest: what `umbif index` does. Every file is read in full, in processes that may die."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pandas as pd

from umbif.corpus.checks import blank_row, duplicates, inspect, quarantined, taken_over
from umbif.corpus.datasets import NIFTI, form
from umbif.corpus.folders import LOOKED_FOR, find_volumes
from umbif.corpus.grouping import TOLD_APART, Found
from umbif.corpus.labels import join_labels, label_problems
from umbif.corpus.manifest import (
    COLUMNS,
    FILLED_BY_LABELS,
    assign_persons,
    assign_splits,
    fraction_problems,
    label_columns,
    place_problems,
    read_manifest,
    unfinished,
    write_unfinished,
)
from umbif.corpus.outline import FLAT_CUT
from umbif.corpus.processes import each
from umbif.corpus.spaces import in_one_space
from umbif.errors import Problem, UmbifError, UsageError
from umbif.machine import num_cores
from umbif.progress import console, stoppable, track

Row = dict[str, Any]
MAX_WORKERS = 16
MAX_LINES = 20
MAX_FORMS = 5
CRASHED = "The process that read the file died, mostly for lack of memory. Try it alone, on a machine with more."


def build_manifest(
    sources: Sequence[str | Path],
    *,
    dataset: str | Sequence[str] | None = None,
    labels: str | Path | Sequence[str | Path] = (),
    test_fraction: float = 0.2,
    seed: int = 0,
    num_workers: int | None = None,
    output: Path | None = None,
    layout: str | None = None,
) -> pd.DataFrame:
    """Reads and judges every NIfTI file of the sources; bad files become quarantined rows, never an error.

    Args:
        sources: Folders or files.
        dataset: The data set's name, or one for each source; by default the name of each source folder.
        labels: Tables whose columns are joined to the exams; as many as there are names of data sets are each of one,
            see `join_labels`.
        test_fraction: Share of the persons that makes the test set, among those whose side no label gives.
        seed: Of the split.
        num_workers: Processes; 0 reads in this process, None takes one per usable core.
        output: Where the manifest will stand. Files that are as they were when one was written there are not read
            again, and what is read before an end before its time is kept there for the next call.
        layout: How paths name subject and session, as `{subject}/*/{session}/**`; by default names are read.

    Raises:
        UsageError: A source is missing, none holds a NIfTI file, or layout or labels do not fit; before any is read.
        Stopped: A scheduler's SIGTERM came.
    """
    tables = [Path(table) for table in ([labels] if isinstance(labels, str | Path) else labels)]
    refuse_impossible(test_fraction, tables, output)
    found = find_volumes([Path(source) for source in sources], dataset, layout)
    if not found:
        raise UsageError(Problem("No image was found", ", ".join(map(str, sources)), LOOKED_FOR))
    names = [] if dataset is None or isinstance(dataset, str) else dataset
    known = join_labels(pd.DataFrame(map(blank_row, found), columns=list(COLUMNS)), *tables, datasets=names)
    assign_splits(assign_persons(known), test_fraction, seed)  # by names alone: what does not fit costs no hours
    earlier = _earlier(output)
    rows: list[Row] = []
    with _kept(earlier, rows, output), stoppable("read"):
        for row in _rows(found, earlier, num_workers):
            rows.append(row)
        return _split_table(rows, known, test_fraction, seed)


def refuse_impossible(test_fraction: float, labels: Sequence[Path] = (), output: Path | None = None) -> None:
    """Refuses what cannot be meant before any volume is read.

    Raises:
        UsageError: Names all of it.
    """
    problems = fraction_problems(test_fraction)
    problems += [problem for path in labels for problem in label_problems(path)]
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
    masks = table[(table["role"] != "image") & (table["status"] == "ok")]
    lines = [
        f"{usable['exam'].nunique()} exams of {usable['person'].nunique()} persons: "
        f"{sides.get('train', 0)} train, {sides.get('test', 0)} test",
        "volumes: " + (", ".join(f"{name} {count}" for name, count in sequences.items()) or "none"),
    ]
    if len(masks):
        lines.append("masks: " + ", ".join(f"{name} {count}" for name, count in masks["role"].value_counts().items()))
    if num_same := len(duplicates(table)):
        lines.append(f"{num_same} volumes have the voxels of another; their exams count as one person")
    if num_apart := usable[usable["flags"].str.contains(TOLD_APART)]["exam"].nunique():
        lines.append(f"{num_apart} exams have the name of others and are told apart by folders ({TOLD_APART} in flags)")
    if num_further := usable[usable["sequence"] != "other"].duplicated(["exam", "sequence"]).sum():
        lines.append(f"{num_further} volumes are a further one of their sequence in one exam")
    if num_further := masks.duplicated(["exam", "role"]).sum():
        lines.append(f"{num_further} masks are a further one of their kind in one exam")
    if num_flat := usable["flags"].str.contains(FLAT_CUT).sum():
        lines.append(f"{num_flat} volumes end in a plane ({FLAT_CUT} in flags), as heads with faces do: look at some")
    return "\n".join(lines + _forms(table) + _quarantine(table))


def _forms(table: pd.DataFrame) -> list[str]:
    """How names were read, by what they look like: people see a misreading at once, and nobody's name."""
    good = table[table["status"] == "ok"]
    common = _common(table)
    forms = Counter(
        (form(NIFTI.sub("", os.path.relpath(path, common))), form(subject), form(session))
        for path, subject, session in zip(good["path"], good["subject"], good["session"], strict=True)
    )
    lines = [
        f"  {path} ({count}): subject {subject}, " + (f"session {session}" if session else "no session")
        for (path, subject, session), count in forms.most_common(MAX_FORMS)
    ]
    if len(forms) > MAX_FORMS:
        lines.append(f"  … and {len(forms) - MAX_FORMS} forms more")
    return ["names were read like this, with A for letters and 9 for digits:", *lines] if lines else []


def _common(table: pd.DataFrame) -> str:
    return os.path.commonpath([os.path.dirname(path) for path in table["path"]])


def _quarantine(table: pd.DataFrame) -> list[str]:
    bad = table[table["status"] != "ok"]
    if bad.empty:
        return []
    common = _common(table)
    lines = []
    for reason, files in bad.groupby("reason"):
        lines.append(f"  {reason} ({len(files)}): {files['detail'].iloc[0]}")
        lines += [f"    {os.path.relpath(path, common)}" for path in files["path"]]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], "  … and more: see status, reason and detail in the manifest"]
    return [f"{len(bad)} files are quarantined:", *lines]


@contextmanager
def _kept(earlier: dict[str, Row], rows: list[Row], output: Path | None) -> Iterator[None]:
    """What was read, now or before, outlives whatever ends the work before the manifest is made."""
    try:
        yield
    except BaseException:
        if rows and output is not None:
            known = earlier | {row["path"]: row for row in rows}
            write_unfinished(pd.DataFrame([*known.values()], columns=list(COLUMNS)), output)
        raise


def _earlier(output: Path | None) -> dict[str, Row]:
    """By path, the rows that were made for this manifest before."""
    paths = [] if output is None else [path for path in (output, unfinished(output)) if path.is_file()]
    return {row["path"]: row for path in paths for row in cast(list[Row], read_manifest(path).to_dict("records"))}


def _rows(found: Sequence[Found], earlier: dict[str, Row], num_workers: int | None) -> Iterator[Row]:
    todo = []
    for item in found:
        if row := taken_over(item, earlier.get(str(item.path))):
            yield row
        else:
            todo.append(item)
    if len(todo) < len(found):
        console.print(f"{len(found) - len(todo)} of {len(found)} files are as they were, and are not read again.")
    if num_workers is None:
        num_workers = min(num_cores(), MAX_WORKERS, len(todo))
    yield from track(_inspect_all(todo, num_workers), "Reading volumes", len(todo))


def _split_table(rows: list[Row], known: pd.DataFrame, test_fraction: float, seed: int) -> pd.DataFrame:
    """The manifest of what was read and of what labels say."""
    rows = in_one_space(sorted(rows, key=lambda row: row["path"]))
    known = known.set_index("path").loc[[row["path"] for row in rows]].reset_index()
    labelled = known[[*FILLED_BY_LABELS, *label_columns(known)]]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).drop(columns=list(FILLED_BY_LABELS)).join(labelled)
    table = assign_splits(assign_persons(table), test_fraction, seed)
    return table[[*COLUMNS, *label_columns(table)]]


def _inspect_all(
    found: Sequence[Found], num_workers: int, inspect_one: Callable[[Found], Row] = inspect
) -> Iterator[Row]:
    """Rows in the order of completion."""
    return (row for _, row in each(inspect_one, found, num_workers, _crashed))


def _crashed(item: Found) -> Row:
    return quarantined(item, "reader_crashed", CRASHED)
