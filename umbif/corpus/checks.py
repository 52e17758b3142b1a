"""What one file is worth, and which files are the same. Light imports: worker processes read this."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from umbif.corpus.grouping import TOLD_APART, Found
from umbif.corpus.readers import UNREADABLE, BadVolume, read_volume

if TYPE_CHECKING:
    import pandas as pd

OTHER_SPACE = "other_space"  # the reason of a good file that others of its exam put aside: they may be gone now
USABLE = {"status": "ok", "reason": "", "detail": ""}
READ = (  # what is known of a file by reading it
    "shape", "spacing_mm", "axcodes", "dtype", "bytes", "modified_ns", "voxel_sha256", "status", "reason",
    "detail",
)  # fmt: skip


def inspect(found: Found) -> dict[str, Any]:
    """Reads one file in full and says all that a manifest row holds about it; never raises for a bad file."""
    if found.reason:
        return quarantined(found, found.reason, found.detail)
    is_mask, state = found.role != "image", _state(found.path)  # before: what is written meanwhile is read next time
    try:
        volume = read_volume(found.path, mask=is_mask)
        if found.role == "brain_mask" and "empty_mask" in volume.flags:
            raise BadVolume("constant", "The brain mask has one value only. The step that wrote it failed.")
    except BadVolume as error:
        return quarantined(found, error.reason, error.detail) | (state if error.reason != UNREADABLE else {})
    values = volume.canonical()
    return blank_row(found) | state | {
        "shape": list(volume.data.shape), "spacing_mm": list(volume.spacing_mm), "axcodes": volume.axcodes,
        "dtype": volume.data.dtype.name, "voxel_sha256": _voxel_sha256(values),
        "flags": ",".join(found.flags + volume.flags),
    }  # fmt: skip


def quarantined(found: Found, reason: str, detail: str) -> dict[str, Any]:
    """The manifest row of a file that is not used."""
    return blank_row(found) | {"status": "quarantined", "reason": reason, "detail": detail}


def taken_over(found: Found, row: dict[str, Any] | None) -> dict[str, Any] | None:
    """The earlier row of a file that is as it was then, with what its name says now; None of any other."""
    if row is None or found.reason or row["role"] != found.role:
        return None
    if _state(found.path) != {"bytes": row["bytes"], "modified_ns": row["modified_ns"]}:
        return None
    of_voxels = [flag for flag in row["flags"].split(",") if flag not in ("", TOLD_APART)]
    now = {name: row[name] for name in READ} | {"flags": ",".join([*found.flags, *of_voxels])}
    return blank_row(found) | now | (USABLE if row["reason"] == OTHER_SPACE else {})


def _state(path: Path) -> dict[str, int]:
    """What changes when a file is written; nothing where the system does not say."""
    try:
        found = path.stat()
    except OSError:
        return {}
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def duplicates(table: "pd.DataFrame") -> "pd.DataFrame":
    """The usable images of a manifest whose voxels occur in more than one file, equal ones together."""
    images = table[(table["role"] == "image") & (table["status"] == "ok")]
    return images[images.duplicated("voxel_sha256", keep=False)].sort_values(["voxel_sha256", "path"])


def blank_row(found: Found) -> dict[str, Any]:
    """The manifest row of a file as far as its name tells."""
    return {
        "dataset": found.dataset, "subject": found.subject, "session": found.session, "exam": found.exam, "person": "",
        "site": found.dataset, "role": found.role, "sequence": found.sequence, "path": str(found.path), "shape": [],
        "spacing_mm": [], "axcodes": "", "dtype": "", "bytes": 0, "modified_ns": 0, "voxel_sha256": "",
        "flags": ",".join(found.flags), "status": "ok", "reason": "", "detail": "", "split": "",
    }  # fmt: skip


def _voxel_sha256(values: np.ndarray) -> str:
    """Of the real values in RAS order, so that a copy in another axis order or storage type is known again."""
    digest = hashlib.sha256(str(values.shape).encode())
    for z in range(values.shape[2]):
        digest.update((np.ascontiguousarray(values[..., z].T) + np.float32(0)).tobytes())  # -0.0 becomes 0.0
    return digest.hexdigest()
