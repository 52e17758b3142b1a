"""Files that are written and read again: damage, and what the system refuses, end in a message that names the file."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from umbif.errors import Problem, Transient, UmbifError, UsageError, nearest, one_line

if TYPE_CHECKING:
    import pandas as pd

NOT_A_FOLDER = (errno.ENOTDIR, errno.EEXIST)
NO_SUCH_CALL = (errno.EINVAL, errno.ENOTSUP)
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH)
NOT_MINE = "Ask its owner for the permission, or choose another place"
FULL = "Make room or choose another place; what is written so far stays, and the same command again goes on"
CURES = {
    errno.EACCES: NOT_MINE,
    errno.EPERM: NOT_MINE,
    errno.EROFS: "Choose another place",
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EISDIR: "Name a file",
    errno.ENOENT: "Check the spelling",
    errno.EMFILE: "Raise the limit in this shell (ulimit -n 65536) and give the same command again",
    errno.ENFILE: "The machine as a whole has too many files open; try again later, or on another one",
}


@contextmanager
def reading(path: Path, cure: str, fault: str = "is damaged, or not what it should be") -> Iterator[None]:
    """Around what reads a file and takes apart what it holds: any failure there is the file's.

    Raises:
        UsageError: Names the file, what is wrong with it, and the cure.
    """
    try:
        with naming(path):
            yield
    except (UmbifError, MemoryError):
        raise
    except Exception as error:  # each library has its own
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's; Arrow's have no number
            raise
        raise UsageError(Problem(f"{path} {fault}", one_line(error), cure)) from error


def read_mapping(path: Path, cure: str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The keys and values of a file, JSON unless `parse` reads something else.

    Raises:
        UsageError: It holds none.
    """
    with reading(path, cure):
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no keys and values")
    return content


def read_parquet(path: Path, cure: str, columns: Sequence[str] = ()) -> "pd.DataFrame":
    """A Parquet table that has certain columns, and may have more.

    Raises:
        UsageError: It is no such table.
    """
    import pandas as pd

    with reading(path, cure), path.open("rb") as file:
        table = pd.read_parquet(file, page_checksum_verification=True)
        if missing := [name for name in columns if name not in table]:
            raise ValueError(f"no column {', '.join(missing)}")
    return table


def write_parquet(table: "pd.DataFrame", path: Path) -> None:
    """Writes a table, whole or not at all. Without checksums a flipped bit may be read as another value."""
    with whole(path) as aside:
        table.to_parquet(aside, index=False, write_page_checksum=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to. The file takes its name once its bytes are on the disk: it is whole or not there."""
    aside = path.with_name(f".{path.name}.{token_hex(4)}.writing")  # containers share numbers of processes, and disks
    try:
        with naming(path):
            yield aside
            to_disk(aside)
            aside.replace(path)
            to_disk(path.parent)
    except OSError as error:
        error.filename = str(path) if error.filename == str(aside) else error.filename
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of text, whole or not at all."""
    with whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around what writes: a system error that names no file, as that of a full disk, is given this name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def refused(error: OSError) -> UmbifError | None:
    """What the system would not do, for people; None for an error that is not about a file or a folder."""
    if error.errno is None or (error.filename is None and error.errno not in (*CURES, *PASSING)):
        return None
    said, path = os.strerror(error.errno), Path(str(error.filename))
    if error.errno in NOT_A_FOLDER and (file := next((p for p in (path, *path.parents) if p.is_file()), None)):
        return UsageError(Problem(f"{file} is a file where a folder is meant", cure="Name another folder"))
    what = said if error.filename is None else f"{path}: {said}"
    if error.errno in PASSING:
        return Transient(f"{what}. The disk or the network has failed; the same command goes on.")
    return UmbifError(str(Problem(what, cure=CURES.get(error.errno, ""))))


def no_folder(path: Path, cure: str = "") -> Problem:
    """For a folder that does not exist, with the nearest name of those that stand where its path leaves what exists."""
    first = next((p for p in reversed((path, *path.parents)) if not p.exists()), path)
    beside = [p.name for p in first.parent.iterdir() if p.is_dir()]
    hint = nearest(first.name, beside)
    return Problem("There is no such folder", str(path), hint if hint.startswith("Did") else cure)


def to_disk(path: Path) -> None:
    """Waits until a file, or what a folder lists, would outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL or not path.is_dir():  # some file systems cannot do it for a folder
            raise
    finally:
        os.close(handle)
