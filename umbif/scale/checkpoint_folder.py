"""Folders of checkpoints that are complete or absent.

Everything is written aside in the folder where it will stay (a rename from another file system is a copy that can be
cut off), brought to the disk, and renamed. A manifest of checksums, written last, is what makes one complete.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from umbif.errors import Transient
from umbif.files import to_disk
from umbif.scale.tensor_file import Fingerprint, fingerprint

STATE, MANIFEST, DAMAGED = "state.ckpt", "complete.json", "damaged."
SHARE, SHARES = "share-{:05d}.safetensors", "share-*.safetensors"
NAME = re.compile(r"step=\d+")
SPARE_BYTES = 1 << 26  # beside tensors: state, manifest, logs
READ_AT_ONCE = 4
log = logging.getLogger("umbif")


def aside_of(path: Path) -> Path:
    """Where a checkpoint stands until it is complete."""
    return path.with_name(f".{path.name}.writing")


def begin(path: Path, num_bytes: int) -> None:
    """Makes an empty folder aside.

    Raises:
        OSError: It cannot be made, or the disk has no room for that many bytes.
    """
    aside = aside_of(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    free = shutil.disk_usage(aside).free
    if free < num_bytes + SPARE_BYTES:
        discard(path)
        raise OSError(f"{aside.parent} has room for {free / 2**30:.2f} GiB, and it takes {num_bytes / 2**30:.2f}")


def publish(path: Path, files: Mapping[str, Fingerprint], about: Mapping[str, Any]) -> None:
    """Makes a checkpoint complete, of files that are on the disk.

    Raises:
        OSError: A file of another process is not there, or the disk cannot be written.
    """
    aside = aside_of(path)
    for name, found in files.items():
        if not (aside / name).is_file() or (aside / name).stat().st_size != found.num_bytes:
            raise OSError(f"{name} of another process is not there: all nodes must see the same run folder")
    (aside / MANIFEST).write_text(json.dumps({**about, "files": {n: f._asdict() for n, f in files.items()}}, indent=1))
    to_disk(aside / MANIFEST)
    to_disk(aside)
    _put_in_place(aside, path)


def discard(path: Path) -> None:
    """Removes what stands aside."""
    shutil.rmtree(aside_of(path), ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete or not."""
    found = [path for path in folder.glob("step=*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """`step=000100` → 100."""
    return int(path.name.removeprefix("step="))


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was finished, whatever has become of it since."""
    return (path / MANIFEST).is_file()


def problem_of(path: Path, rank: int = 0, num_ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint; None where nothing is. Each process looks at its part of the files.

    Raises:
        Transient: It could not be read.
    """
    try:
        files: Mapping[str, Any] = about(path)["files"]
        mine = sorted(files)[rank::num_ranks]
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            found = dict(zip(mine, pool.map(fingerprint, [path / name for name in mine]), strict=True))
        damaged = [name for name, now in found.items() if now is None or now._asdict() != files[name]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "it is not complete"
    except OSError as error:  # of the disk or the network, and not of the checkpoint
        raise Transient(f"The checkpoint {path} could not be read: {error.strerror}.") from error
    return f"{damaged[0]} is damaged" if damaged else None


def mark_damaged(path: Path) -> None:
    """Renames a damaged checkpoint: it must not count among those that are kept."""
    damaged = path.with_name(f"{DAMAGED}{path.name}")
    shutil.rmtree(damaged, ignore_errors=True)  # of an earlier time
    path.rename(damaged)


def about(path: Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself."""
    return dict(json.loads((path / MANIFEST).read_text()))


def prune(folder: Path, keep: int, keep_every_n_steps: int | None) -> None:
    """Deletes all but the newest few and those of every so many steps, and damaged ones that these have replaced."""
    found = checkpoints(folder)
    for old in found[keep:]:
        if keep_every_n_steps is None or step_of(old) % keep_every_n_steps:
            _remove(old)
    for damaged in folder.glob(f"{DAMAGED}*") if len(found) >= keep else ():
        _remove(damaged)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed save left aside. Only the holder of the run's lock may call it."""
    for leftover in folder.glob(".*.writing"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(old: Path) -> None:
    """A network file system keeps a folder while a file of it is open; no training ends for that."""
    try:
        shutil.rmtree(old)
    except OSError as error:
        log.warning("The old checkpoint %s could not be deleted: %s", old.name, error.strerror)


def _put_in_place(aside: Path, path: Path) -> None:
    """Renames; a checkpoint that stands there already goes only when the new one has its name."""
    old = path.with_name(f".{path.name}.old.writing")
    if path.exists():
        path.rename(old)
    try:
        aside.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)
