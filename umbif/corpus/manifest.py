"""The manifest: one row per volume file, who it is of, what was found in it, which side of the split it is on."""

import hashlib
import io
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from umbif.errors import Problem, UsageError
from umbif.files import no_folder, read_parquet, reading, whole

_TEXT = pa.string()
SCHEMA = {
    "dataset": _TEXT, "subject": _TEXT, "session": _TEXT, "exam": _TEXT, "person": _TEXT, "site": _TEXT, "role": _TEXT,
    "sequence": _TEXT, "path": _TEXT, "shape": pa.list_(pa.int64()), "spacing_mm": pa.list_(pa.float64()),
    "axcodes": _TEXT, "dtype": _TEXT, "bytes": pa.int64(), "modified_ns": pa.int64(), "voxel_sha256": _TEXT,
    "flags": _TEXT, "status": _TEXT, "reason": _TEXT, "detail": _TEXT, "split": _TEXT,
}  # fmt: skip
COLUMNS = tuple(SCHEMA)  # label columns follow them, as text
IDENTITY = ("dataset", "subject", "session", "exam")
FILLED_BY_LABELS = ("person", "site", "split")
SIDES = ("train", "test")
MAX_SPELLINGS = 10
MANIFEST_CURE = "`umbif index` writes manifests; a corpus' index.parquet is another table"


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
    table = read_parquet(path, MANIFEST_CURE, [column for column in COLUMNS if column != "modified_ns"])
    if "modified_ns" not in table:  # written before manifests had it: its files count as changed
        table.insert(COLUMNS.index("modified_ns"), "modified_ns", 0)
    table = table.drop(columns="perceptual_hash", errors="ignore")  # of manifests from before: no label
    with reading(path, MANIFEST_CURE):
        for column in ("shape", "spacing_mm"):
            table[column] = [list(value) for value in table[column]]
    return table


def write_manifest(table: pd.DataFrame, path: str | Path) -> Path | None:
    """Writes the manifest so that it is there in full or not at all; an older, different one is kept beside it.

    What `write_unfinished` left for it is in it now, and goes.

    Returns:
        Where the older manifest was moved to, or None.

    Raises:
        UsageError: See `place_problems`.
    """
    path = Path(path)
    if problems := place_problems(path):
        raise UsageError(problems)
    content = _to_bytes(table)
    before = path.read_bytes() if path.exists() else None
    kept = None
    if before is not None and before != content:
        kept = path.with_name(f"{path.stem}.{hashlib.sha256(before).hexdigest()[:8]}{path.suffix}")
        _replace(kept, before)
    if before != content:
        _replace(path, content)
    unfinished(path).unlink(missing_ok=True)
    return kept


def write_unfinished(table: pd.DataFrame, path: Path) -> None:
    """Keeps the rows of files that were read for a manifest that is not made: half of one must not pass for whole."""
    _replace(unfinished(path), _to_bytes(table))


def unfinished(path: Path) -> Path:
    """Where these rows are kept until the manifest is written."""
    return path.with_name(f".{path.name}.unfinished")


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
    """Fills `split`: of the persons whose side no label gives, a share, with all of their exams, is the test set.

    Persons are ranked by a hash of seed and name, so that most keep their side when exams are added. Persons without a
    usable image count as train, so that the share holds among those that can be used.

    Raises:
        UsageError: `test_fraction` is not in [0, 1), or what labels give is no side, or both for one person.
    """
    if problems := fraction_problems(test_fraction):
        raise UsageError(problems)
    given = _given_sides(table)
    usable = table[(table["role"] == "image") & (table["status"] == "ok")]
    drawn = {*usable["person"]} - {*given}
    ranked = sorted(drawn, key=lambda person: hashlib.sha256(f"{seed}/{person}".encode()).digest())
    num_test = round(test_fraction * len(ranked))
    if test_fraction > 0 and len(ranked) > 1:
        num_test = max(num_test, 1)
    sides = dict.fromkeys(ranked[:num_test], "test") | given
    return table.assign(split=[sides.get(person, "train") for person in table["person"]])


def _given_sides(table: pd.DataFrame) -> dict[str, str]:
    """The side of each person for whom labels give one."""
    sides = table["split"].str.strip().str.casefold()
    if others := sorted({*table.loc[~sides.isin(["", *SIDES]), "split"]}):
        cure = "Leave blank who may be drawn; people for validation are taken from train, when it comes to training."
        got = ", ".join(map(repr, others[:MAX_SPELLINGS]))
        raise UsageError(Problem("The column split has values other than train and test", got, cure))
    pairs = {(person, side) for person, side in zip(table["person"], sides, strict=True) if side}
    if num_both := len(pairs) - len({person for person, _ in pairs}):
        cure = (
            "Give all exams of a person one side. Exams that share an image are one person, and so are subjects of one "
            "name in several folders, unless a column `person` tells them apart. Index once without the column to find "
            "them: they have one `person` in the manifest; nothing is read twice."
        )
        raise UsageError(Problem("Persons stand on both sides of the split", f"{num_both}", cure))
    return dict(pairs)


def fraction_problems(test_fraction: float) -> list[Problem]:
    """Why a share of the persons cannot be held out."""
    if 0 <= test_fraction < 1:
        return []
    return [Problem("test_fraction must be at least 0 and less than 1", str(test_fraction))]


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
    pq.write_table(pa.Table.from_pandas(table[columns], schema, preserve_index=False), buffer, write_page_checksum=True)
    return buffer.getvalue()


def _replace(path: Path, content: bytes) -> None:
    with whole(path) as aside:
        aside.write_bytes(content)
