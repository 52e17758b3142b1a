"""The manifest: one row per volume file, who it is of, what was found in it, which side of the split it is on."""

import csv
import hashlib
import io
import re
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from umbif.errors import Problem, UsageError
from umbif.files import no_folder, read_parquet, reading, whole
from umbif.progress import console

_TEXT = pa.string()
SCHEMA = {
    "dataset": _TEXT, "subject": _TEXT, "session": _TEXT, "exam": _TEXT, "person": _TEXT, "site": _TEXT, "role": _TEXT,
    "sequence": _TEXT, "path": _TEXT, "shape": pa.list_(pa.int64()), "spacing_mm": pa.list_(pa.float64()),
    "axcodes": _TEXT, "dtype": _TEXT, "bytes": pa.int64(), "voxel_sha256": _TEXT, "perceptual_hash": _TEXT,
    "flags": _TEXT, "status": _TEXT, "reason": _TEXT, "detail": _TEXT, "split": _TEXT,
}  # fmt: skip
COLUMNS = tuple(SCHEMA)  # label columns follow them, as text
IDENTITY = ("dataset", "subject", "session", "exam")
FILLED_BY_LABELS = ("person", "site")
SESSION_NAMES = ("session", "session_id", "ses", "visit", "timepoint")
LABEL_TABLES = (".csv", ".tsv", ".txt", ".parquet")
MANIFEST_CURE = "`umbif index` writes manifests; a corpus' index.parquet is another table"
NAMES_A_KEY = re.compile(r"(^|[^a-z])(id|subject|participant|patient|case|exam)([^a-z]|$)", re.IGNORECASE)


def label_columns(table: pd.DataFrame) -> list[str]:
    """The columns that came from people's tables."""
    return [str(column) for column in table.columns if column not in SCHEMA]


def read_manifest(path: str | Path) -> pd.DataFrame:
    """Reads a manifest that `write_manifest` wrote.

    Raises:
        UsageError: The file is missing, is no Parquet table, or lacks columns of a manifest.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(Problem("There is no manifest", str(path), "`umbif index SOURCE -o NAME.parquet` makes one."))
    table = read_parquet(path, MANIFEST_CURE, COLUMNS)
    with reading(path, MANIFEST_CURE):
        for column in ("shape", "spacing_mm"):
            table[column] = [list(value) for value in table[column]]
    return table


def write_manifest(table: pd.DataFrame, path: str | Path) -> Path | None:
    """Writes the manifest so that it is there in full or not at all; an older, different one is kept beside it.

    Returns:
        Where the older manifest was moved to, or None.

    Raises:
        UsageError: See `place_problems`.
    """
    path = Path(path)
    if problems := place_problems(path):
        raise UsageError(problems)
    content = _to_bytes(table)
    kept = None
    if path.exists():
        before = path.read_bytes()
        if before == content:
            return None
        kept = path.with_name(f"{path.stem}.{hashlib.sha256(before).hexdigest()[:8]}{path.suffix}")
        _replace(kept, before)
    _replace(path, content)
    return kept


def place_problems(path: Path) -> list[Problem]:
    """Why a manifest cannot be written there; it is cheap to know before hours of reading."""
    if path.suffix.lower() != ".parquet":
        return [Problem("A manifest is a .parquet file", str(path), "Give it such a name")]
    if not path.parent.is_dir():
        return [no_folder(path.parent, "Make it first")]
    if path.is_dir():
        return [Problem("The manifest would stand where a folder is", str(path), "Name a file")]
    if path.exists():
        try:
            read_manifest(path)
        except UsageError:
            return [Problem("The file to write exists and is no manifest", str(path), "Choose another name")]
    with tempfile.TemporaryFile(dir=path.parent):
        return []  # and so the system lets us write there


def join_labels(table: pd.DataFrame, labels: str | Path) -> pd.DataFrame:
    """Adds the columns of a label table to the exams, verbatim as text ("" where an exam has no row).

    The key column is found by its values: subjects, or subjects with sessions, in any case, with any separators and
    leading zeros. Columns `person` and `site` fill the manifest's. Rows of one exam that agree become one; a column
    in which they disagree is no label of the exam and is left out, which is said.

    Args:
        table: A manifest.
        labels: A .csv, .tsv or .parquet file.

    Raises:
        UsageError: The table cannot be read, matches no exam or more than one, or takes a name that is in use.
    """
    with reading(Path(labels), "Save the table as CSV again"):
        rows = _read_labels(Path(labels))
    names = [str(column) for column in rows]
    matches, key = _match(table, rows, Path(labels))
    skipped = {key, *IDENTITY, *(name for name in names if name.lower() in SESSION_NAMES)}
    columns = [name for name in names if name not in skipped]
    taken = [c for c in columns if c in table.columns and c not in FILLED_BY_LABELS]
    if taken:
        raise UsageError(Problem("The label table has columns that the manifest has", ", ".join(taken), "Rename them."))
    values = {column: _values_of_exams(rows[column].tolist(), matches) for column in columns}
    torn = {column: sum(len(v) > 1 for v in of_exam.values()) for column, of_exam in values.items()}
    _say(table, matches, key, {column: count for column, count in torn.items() if count}, columns)
    joined = table.copy()
    for column in columns:
        if not torn[column]:
            given = joined["exam"].map({exam: v[0] for exam, v in values[column].items() if v})
            joined[column] = given.fillna(joined[column] if column in FILLED_BY_LABELS else "")
    return joined


def assign_persons(table: pd.DataFrame) -> pd.DataFrame:
    """Fills `person`: as given by labels, else dataset/subject; exams that share an image's voxels are one person.

    Subjects `a/001` and `b/001`, whom only folders tell apart, are one person unless labels give a person for all of
    their exams: the folders may be sites, and may be times.
    """
    subjects = table["dataset"] + "/" + table["subject"]
    bare = table["dataset"] + "/" + table["subject"].str.rpartition("/")[2]
    unclear = {*bare[table["person"] == ""]}
    usable = (table["role"] == "image") & (table["status"] == "ok")
    parents: dict[str, str] = {}
    voxels_of = table["voxel_sha256"].where(usable, "")
    links = zip(table["exam"], subjects, bare, table["person"], voxels_of, strict=True)
    for exam, subject, name, given, voxels in links:
        ties = (f"subject {subject}", name in unclear and f"subject {name}", given and f"person {given}",
                voxels and f"voxels {voxels}")  # fmt: skip
        for tie in filter(None, ties):
            parents[_top(parents, f"exam {exam}")] = _top(parents, tie)
    tops = [_top(parents, f"exam {exam}") for exam in table["exam"]]
    names: dict[str, str] = {}
    for top, given, subject in sorted(zip(tops, table["person"], subjects, strict=True), key=lambda t: (not t[1], *t)):
        names.setdefault(top, given or subject)  # a given name comes before a made one
    return table.assign(person=[names[top] for top in tops])


def assign_splits(table: pd.DataFrame, test_fraction: float = 0.2, seed: int = 0) -> pd.DataFrame:
    """Fills `split`: a share of the persons, with all of their exams, is the test set.

    Persons are ranked by a hash of seed and name, so that most keep their side when exams are added. Persons without a
    usable image count as train, so that the share holds among those that can be used.

    Raises:
        UsageError: `test_fraction` is not in [0, 1).
    """
    if problems := fraction_problems(test_fraction):
        raise UsageError(problems)
    usable = table[(table["role"] == "image") & (table["status"] == "ok")]
    ranked = sorted(set(usable["person"]), key=lambda person: hashlib.sha256(f"{seed}/{person}".encode()).digest())
    num_test = round(test_fraction * len(ranked))
    if test_fraction > 0 and len(ranked) > 1:
        num_test = max(num_test, 1)
    test = set(ranked[:num_test])
    return table.assign(split=["test" if person in test else "train" for person in table["person"]])


def fraction_problems(test_fraction: float) -> list[Problem]:
    """Why a share of the persons cannot be held out."""
    if 0 <= test_fraction < 1:
        return []
    return [Problem("test_fraction must be at least 0 and less than 1", str(test_fraction))]


def label_problems(path: Path) -> list[Problem]:
    """Why a file cannot be a table of labels, as far as its name tells."""
    if not path.is_file():
        return [Problem("There is no label table", str(path), "Check the spelling.")]
    if path.suffix.lower() not in LABEL_TABLES:
        return [Problem("Label tables are .csv, .tsv or .parquet", path.name, "Save it as CSV.")]
    return []


def _read_labels(path: Path) -> pd.DataFrame:
    if problems := label_problems(path):
        raise UsageError(problems)
    if path.suffix.lower() == ".parquet":
        stored = pq.read_table(path)
        cells = {name: stored[name].cast(_TEXT).fill_null("").to_pylist() for name in stored.column_names}
        return pd.DataFrame(cells, dtype=object)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:  # spreadsheets of older systems
        text = content.decode("cp1252", errors="replace")
    header = text.partition("\n")[0]
    lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count)))
    return _rectangle([line for line in lines if any(line)], path)


def _values_of_exams(cells: list[str], matches: dict[str, list[int]]) -> dict[str, list[str]]:
    """The different values that the rows of each exam give; a blank cell gives none."""
    return {exam: sorted({cells[i] for i in found} - {""}) for exam, found in matches.items()}


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


def _normal(text: str) -> str:
    """`UCSF-PDGM-0004`, `ucsf_pdgm_004` → `ucsf-pdgm-4`; `sub-01` → `1`."""
    text = re.sub(r"^(sub|ses)-", "", text.strip().lower())
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", re.sub(r"[\W_]+", "-", text).strip("-"))


def _match(table: pd.DataFrame, rows: pd.DataFrame, path: Path) -> tuple[dict[str, list[int]], str]:
    """The label rows of each exam that has any, and the key column they were found by."""
    exams = table.drop_duplicates("exam")[list(IDENTITY)]
    names = [str(column) for column in rows]
    session = next((name for name in names if name.lower() in SESSION_NAMES), None)
    best: tuple[int, bool, int] = (0, False, 0)
    matches: dict[str, list[int]] = {}
    key = ""
    for position, column in enumerate(names):
        named = bool(NAMES_A_KEY.search(column))
        keys = _row_keys(rows, column, session)
        if column == session or not (named or any(re.search("[a-z]", k) for k in keys)):
            continue  # bare numbers in a column that no one calls an id may be ages
        found = _rows_of_exams(exams, keys, by_subject=session is None, by_dataset="dataset" in rows)
        if (rank := (len(found), named, -position)) > best and found:
            best, matches, key = rank, found, column
    if not matches:
        cure = f"One column must hold subjects as the files name them, of the form {form_of(exams['subject'].iloc[0])}."
        raise UsageError(Problem(f"No row of {path.name} belongs to an exam", f"columns {', '.join(names)}", cure))
    _check_unique(exams, rows, matches, key)
    return matches, key


def form_of(name: str) -> str:
    """`BraTS2021_00006` → `AAAAA9999_99999`: what a name looks like, and nobody's."""
    return re.sub("[A-Za-z]", "A", re.sub("[0-9]", "9", name))


def _row_keys(rows: pd.DataFrame, column: str, session: str | None) -> list[str]:
    keys = [_normal(value) for value in rows[column]]
    if session and session != column:
        keys = [f"{k}-{s}" if k and (s := _normal(v)) else k for k, v in zip(keys, rows[session], strict=True)]
    if "dataset" in rows:
        keys = [k and f"{_normal(d)}/{k}" for k, d in zip(keys, rows["dataset"], strict=True)]
    return keys


def _rows_of_exams(exams: pd.DataFrame, keys: list[str], *, by_subject: bool, by_dataset: bool) -> dict[str, list[int]]:
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


def _check_unique(exams: pd.DataFrame, rows: pd.DataFrame, matches: dict[str, list[int]], key: str) -> None:
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


def _say(
    table: pd.DataFrame, matches: dict[str, list[int]], key: str, torn: dict[str, int], columns: list[str]
) -> None:
    lost = [c for c in torn if c in FILLED_BY_LABELS] or (columns if columns and len(torn) == len(columns) else [])
    if lost:
        got = ", ".join(f"{column} in {torn[column]} exams" for column in lost)
        cure = "Give one row per exam, with its session where there are several."
        raise UsageError(Problem("Label rows of one exam disagree", got, cure))
    num_exams = table["exam"].nunique()
    console.print(f"Labels: {len(matches)} of {num_exams} exams have a row, by column {key!r}.", markup=False)
    for column, count in torn.items():
        console.print(f"Labels: left out {column!r}; its rows disagree within {count} exams.", markup=False)


def _top(parents: dict[str, str], name: str) -> str:
    parents.setdefault(name, name)
    while parents[name] != name:
        parents[name] = parents[parents[name]]
        name = parents[name]
    return name


def _to_bytes(table: pd.DataFrame) -> bytes:
    labels = label_columns(table)
    schema = pa.schema([*SCHEMA.items(), *((column, _TEXT) for column in labels)])
    columns = [*COLUMNS, *labels]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(table[columns], schema, preserve_index=False), buffer)
    return buffer.getvalue()


def _replace(path: Path, content: bytes) -> None:
    with whole(path) as aside:
        aside.write_bytes(content)
