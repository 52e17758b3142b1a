"""Label tables: which row is of which exam, and what the rows say, verbatim."""

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from umbif.corpus.datasets import form
from umbif.corpus.manifest import FILLED_BY_LABELS, IDENTITY
from umbif.errors import Problem, UsageError
from umbif.files import reading
from umbif.progress import console

LABEL_TABLES = (".csv", ".tsv", ".txt", ".parquet")
SESSION_NAMES = ("session", "session_id", "ses", "visit", "timepoint")
NAMES_A_KEY = re.compile(
    r"ids?|(subj?|subject|participant|pat|patient|case|exam)(id|no|nr)s?|(subject|participant|patient|case|exam)s?"
    "|mrn|eid|pid|ptid|rid"
)
MEASURES = {"age", "weight", "height", "size"}  # `PatientAge`, `age_at_exam`
MAX_NAMED = 3
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
Matches = dict[str, list[int]]  # rows of each exam that has any
Given = dict[str, dict[str, str]]  # column → exam → what its rows say


def join_labels(
    table: pd.DataFrame,
    *labels: str | Path,
    fills: Sequence[str] = FILLED_BY_LABELS,
    datasets: Sequence[str] = (),
) -> pd.DataFrame:
    """Adds the columns of label tables to the exams, verbatim as text ("" where an exam has no row).

    The key column is found by its values: subjects, or subjects with sessions, in any case, with any separators and
    leading zeros. Columns `person`, `site` and `split` fill the manifest's. Rows of one exam that agree become one; a
    column in which they disagree is no label of the exam and is left out, which is said. Where several tables have a
    column, the earlier one counts, and the later ones fill its blanks.

    Args:
        table: A manifest.
        labels: .csv, .tsv or .parquet files.
        fills: Columns of the manifest that they may fill.
        datasets: Names of data sets. If they are several, and as many as the tables, each table is of the exams of one,
            in their order, unless it has a column `dataset`. Else each is of all exams.

    Raises:
        UsageError: A table cannot be read, matches no exam or more than one, takes a name that is in use, or
            contradicts an earlier one in what it fills.
    """
    given: Given = {}
    names = datasets if len(datasets) == len(labels) > 1 else [""] * len(labels)
    for path, dataset in zip(map(Path, labels), names, strict=True):
        for column, values in _labels_of_exams(table, path, fills, dataset).items():
            earlier = given.setdefault(column, {})
            _compare(column, earlier, values, path, fills)
            given[column] = values | earlier
    joined = table.copy()
    for column, values in given.items():
        joined[column] = joined["exam"].map(values).fillna(joined[column] if column in fills else "")
    return joined


def label_problems(path: Path) -> list[Problem]:
    """Why a file cannot be a table of labels, as far as its name tells."""
    if not path.is_file():
        return [Problem("There is no label table", str(path), "Check the spelling.")]
    if path.suffix.lower() not in LABEL_TABLES:
        return [Problem("Label tables are .csv, .tsv or .parquet", path.name, "Save it as CSV.")]
    return []


def _labels_of_exams(table: pd.DataFrame, path: Path, fills: Sequence[str], dataset: str) -> Given:
    """What one table says of the exams that it knows; of those of one data set, if it is of one."""
    with reading(path, "Save the table as CSV again"):
        rows = _read(path)
    of = ""
    if dataset and "dataset" not in rows:
        table, of = _exams_of(table, dataset, path), f" of {dataset!r}"
    matches, key = _match(table, rows, path, of)
    names = [str(column) for column in rows]
    skipped = {key, *IDENTITY, *(name for name in names if name.lower() in SESSION_NAMES)}
    columns = [name for name in names if name not in skipped]
    if taken := [column for column in columns if column in table.columns and column not in fills]:
        cure = " Who is tested is settled by umbif index, with this table among its --labels." * ("split" in taken)
        got = ", ".join(taken)
        raise UsageError(Problem("The label table has columns that the manifest has", got, f"Rename them.{cure}"))
    values = {column: _values_of_exams(rows[column].tolist(), matches) for column in columns}
    torn = {column: sum(len(v) > 1 for v in of_exam.values()) for column, of_exam in values.items()}
    torn = {column: count for column, count in torn.items() if count}
    _check_torn(torn, columns, fills)
    console.print(
        f"Labels: {len(matches)} of {table['exam'].nunique()} exams{of} have a row in {path.name}, by column {key!r}.",
        markup=False,
    )
    for column, count in torn.items():
        console.print(f"Labels: left out {column!r}; its rows disagree within {count} exams.", markup=False)
    whole = [column for column in columns if column not in torn]
    return {column: {exam: v[0] for exam, v in values[column].items() if v} for column in whole}


def _exams_of(table: pd.DataFrame, dataset: str, path: Path) -> pd.DataFrame:
    own = table[table["dataset"] == dataset]
    if own.empty:
        cure = "Look at the sources, or leave out this name with its source and its table."
        raise UsageError(Problem("A data set has no exam for its table", f"{dataset!r}, with {path.name}", cure))
    return own


def _compare(column: str, earlier: dict[str, str], now: dict[str, str], path: Path, fills: Sequence[str]) -> None:
    """Says where a table has another value than an earlier one; of persons, sites and sides this cannot be meant."""
    same = [now[exam].strip().casefold() == value.strip().casefold() for exam, value in earlier.items() if exam in now]
    if not (num_other := same.count(False)):
        return
    if column in fills:
        cure = f"Correct {path.name}, or leave its cells blank where an earlier table speaks."
        raise UsageError(Problem("Label tables disagree", f"{column} in {num_other} exams", cure))
    said = f"Labels: {path.name} gives {num_other} exams another {column!r} than a table before it, which counts."
    console.print(said, markup=False)


def _read(path: Path) -> pd.DataFrame:
    """The table, every cell as text."""
    if problems := label_problems(path):
        raise UsageError(problems)
    if path.suffix.lower() == ".parquet":
        stored = pq.read_table(path)
        cells = {name: stored[name].cast(pa.string()).fill_null("").to_pylist() for name in stored.column_names}
        return pd.DataFrame(cells, dtype=object)
    text = _decoded(path.read_bytes())
    header = text.partition("\n")[0]
    lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count)))
    return _rectangle([line for line in lines if any(line)], path)


def _decoded(content: bytes) -> str:
    if content.startswith(UTF_16):  # Excel's "Unicode Text"
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:  # spreadsheets of older systems
        return content.decode("cp1252", errors="replace")


def _rectangle(lines: list[list[str]], path: Path) -> pd.DataFrame:
    names = [name.strip() for name in lines[0]] if lines else []
    doubled = sorted({name for name in names if name and names.count(name) > 1})
    uneven = [number for number, line in enumerate(lines, 1) if len(line) != len(names)]
    if doubled or uneven or len(lines) < 2:
        got = f"columns named twice: {', '.join(doubled)}" if doubled else "no rows"
        got = f"row {uneven[0]} has {len(lines[uneven[0] - 1])} cells, the first {len(names)}" if uneven else got
        raise UsageError(Problem(f"{path.name} is no table with one header row", got, "Save it as CSV again."))
    table = pd.DataFrame(lines[1:], columns=names, dtype=object)
    return table.loc[:, [bool(name) for name in names]]  # a nameless column is a spreadsheet's row number


def _values_of_exams(cells: list[str], matches: Matches) -> dict[str, list[str]]:
    """The different values that the rows of each exam give; a blank cell gives none."""
    return {exam: sorted({cells[i] for i in found} - {""}) for exam, found in matches.items()}


def _check_torn(torn: dict[str, int], columns: list[str], fills: Sequence[str]) -> None:
    lost = [c for c in torn if c in fills] or (columns if columns and len(torn) == len(columns) else [])
    if lost:
        got = ", ".join(f"{column} in {torn[column]} exams" for column in lost)
        cure = "Give one row per exam, with its session where there are several."
        raise UsageError(Problem("Label rows of one exam disagree", got, cure))


def _match(table: pd.DataFrame, rows: pd.DataFrame, path: Path, of: str) -> tuple[Matches, str]:
    """The label rows of each exam that has any, and the key column they were found by."""
    exams = table.drop_duplicates("exam")[list(IDENTITY)]
    names = [str(column) for column in rows]
    session = next((name for name in names if name.lower() in SESSION_NAMES), None)
    best: tuple[int, bool, int] = (0, False, 0)
    matches: Matches = {}
    key = ""
    passed_over: dict[str, int] = {}
    for position, column in enumerate(names):
        if column == session:
            continue
        keys = _row_keys(rows, column, session)
        found = _rows_of_exams(exams, keys, by_subject=session is None, by_dataset="dataset" in rows)
        named = _names_a_key(column)
        if found and not (named or any(re.search("[a-z]", k) for k in keys)):
            passed_over[column] = len(found)  # bare numbers in a column that no one calls an id may be ages
        elif found and (rank := (len(found), named, -position)) > best:
            best, matches, key = rank, found, column
    if not matches:
        likely = sorted(passed_over, key=lambda column: -passed_over[column])[:MAX_NAMED]
        raise UsageError(_no_row(path, of, rows, exams["subject"].iloc[0], likely))
    _check_unique(exams, rows, matches, key)
    return matches, key


def _names_a_key(column: str) -> bool:
    """Whether a column is called what holds people or exams: `ID`, `PatientID`, `case_no`, `MRN`."""
    words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", column).lower())
    return any(NAMES_A_KEY.fullmatch(word) for word in words) and not MEASURES & {*words}


def _no_row(path: Path, of: str, rows: pd.DataFrame, subject: str, passed_over: list[str]) -> Problem:
    cure = "Give tables in the order of --dataset, or with a column `dataset`. " if of else ""
    cure += f"One column must hold subjects as the files name them, of the form {form(subject)}."
    if len(passed_over) == 1:
        cure += f" Column {passed_over[0]!r} holds bare numbers: call it `subject` if it names them."
    elif passed_over:
        cure += f" Columns {', '.join(map(repr, passed_over))} hold bare numbers: call the one of subjects `subject`."
    return Problem(f"No row of {path.name} belongs to an exam{of}", f"columns {', '.join(map(str, rows))}", cure)


def _normal(text: str) -> str:
    """`UCSF-PDGM-0004`, `ucsf_pdgm_004` → `ucsf-pdgm-4`; `sub-01` → `1`."""
    text = unicodedata.normalize("NFC", text)  # macOS takes letters with accents apart
    text = re.sub(r"^(sub|ses)-", "", text.strip().lower())
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", re.sub(r"[\W_]+", "-", text).strip("-"))


def _row_keys(rows: pd.DataFrame, column: str, session: str | None) -> list[str]:
    keys = [_normal(value) for value in rows[column]]
    if session:
        keys = [f"{k}-{s}" if k and (s := _normal(v)) else k for k, v in zip(keys, rows[session], strict=True)]
    if "dataset" in rows:
        keys = [k and f"{_normal(d)}/{k}" for k, d in zip(keys, rows["dataset"], strict=True)]
    return keys


def _rows_of_exams(exams: pd.DataFrame, keys: list[str], *, by_subject: bool, by_dataset: bool) -> Matches:
    places: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        if key:
            places.setdefault(key, []).append(index)
    found = {}
    for dataset, subject, session, exam in exams.itertuples(index=False):
        forms = [_normal(exam), _normal(f"{subject}-{session}"), *([_normal(subject)] if by_subject else [])]
        prefix = f"{_normal(dataset)}/" if by_dataset else ""
        if place := next((places[prefix + form] for form in forms if prefix + form in places), None):
            found[exam] = place
    return found


def _check_unique(exams: pd.DataFrame, rows: pd.DataFrame, matches: Matches, key: str) -> None:
    spelt = {exam: {rows[key].iloc[i].strip().lower() for i in found} for exam, found in matches.items()}
    if unclear := sum(len(names) > 1 for names in spelt.values()):
        got = f"{unclear} exams match rows of two spellings that differ in zeros or separators only"
        raise UsageError(Problem(f"Column {key!r} is ambiguous", got, "Spell them as the files do."))
    owners: dict[int, set[tuple[str, str]]] = {}
    for dataset, subject, _, exam in exams.itertuples(index=False):
        for index in matches.get(exam, ())[:1]:
            owners.setdefault(index, set()).add((dataset, subject))
    if shared := sum(len(people) > 1 for people in owners.values()):
        cure = "Subjects of several data sets have equal names: add a column `dataset` to the table."
        raise UsageError(Problem(f"Column {key!r} is ambiguous", f"{shared} rows match more than one subject", cure))
