"""What one file is worth, and which files are the same. Light imports: worker processes read this."""

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from umbif.corpus.folders import Found
from umbif.corpus.outline import bounding_box
from umbif.corpus.readers import BadVolume, Volume, read_volume

if TYPE_CHECKING:
    import pandas as pd

NUM_BLOCKS = 4  # per axis: 64 bits
FOREGROUND = 0.1  # share of the 99th percentile


def inspect(found: Found) -> dict[str, Any]:
    """Reads one file in full and says all that a manifest row holds about it; never raises for a bad file."""
    is_mask = found.role != "image"
    try:
        if found.reason:
            raise BadVolume(found.reason, found.detail)
        volume = read_volume(found.path, mask=is_mask)
        if found.role == "brain_mask" and "empty_mask" in volume.flags:
            raise BadVolume("constant", "The brain mask has one value only. The step that wrote it failed.")
    except BadVolume as error:
        return quarantined(found, error.reason, error.detail)
    values = volume.canonical()
    return blank_row(found) | {
        "shape": list(volume.data.shape), "spacing_mm": list(volume.spacing_mm), "axcodes": volume.axcodes,
        "dtype": volume.data.dtype.name, "bytes": found.path.stat().st_size, "voxel_sha256": _voxel_sha256(values),
        "perceptual_hash": "" if is_mask else _perceptual_hash(values), "flags": ",".join(found.flags + volume.flags),
    }  # fmt: skip


def quarantined(found: Found, reason: str, detail: str) -> dict[str, Any]:
    """The manifest row of a file that is not used."""
    return blank_row(found) | {"status": "quarantined", "reason": reason, "detail": detail}


def perceptual_hash(volume: Volume) -> str:
    """64 bits as 16 hex digits that stay the same under another scale, storage type or axis order of one image."""
    return _perceptual_hash(volume.canonical())


def duplicates(table: "pd.DataFrame") -> "pd.DataFrame":
    """The usable images of a manifest whose voxels occur in more than one file, equal ones together."""
    images = table[(table["role"] == "image") & (table["status"] == "ok")]
    return images[images.duplicated("voxel_sha256", keep=False)].sort_values(["voxel_sha256", "path"])


def blank_row(found: Found) -> dict[str, Any]:
    """The manifest row of a file as far as its name tells."""
    return {
        "dataset": found.dataset, "subject": found.subject, "session": found.session, "exam": found.exam, "person": "",
        "site": found.dataset, "role": found.role, "sequence": found.sequence, "path": str(found.path), "shape": [],
        "spacing_mm": [], "axcodes": "", "dtype": "", "bytes": 0, "voxel_sha256": "", "perceptual_hash": "",
        "flags": ",".join(found.flags), "status": "ok", "reason": "", "detail": "", "split": "",
    }  # fmt: skip


def _voxel_sha256(values: np.ndarray) -> str:
    """Of the real values in RAS order, so that a copy in another axis order or storage type is known again."""
    digest = hashlib.sha256(str(values.shape).encode())
    for z in range(values.shape[2]):
        digest.update((np.ascontiguousarray(values[..., z].T) + np.float32(0)).tobytes())  # -0.0 becomes 0.0
    return digest.hexdigest()


def _perceptual_hash(values: np.ndarray) -> str:
    step = max(1, max(values.shape) // 128)
    values = values[::step, ::step, ::step]
    low, high = np.percentile(values, [1, 99])  # not the minimum: interpolation leaves a few voxels far below zero
    foreground = values > low + FOREGROUND * (high - low)
    box = bounding_box(foreground)
    means = _block_means(values[box], foreground[box])
    return np.packbits(means > np.nanmedian(means)).tobytes().hex()


def _block_means(values: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Of the foreground alone (NaN where there is none): the outline is alike in all brains and would decide."""
    edges = [[(i * n // NUM_BLOCKS, max((i + 1) * n // NUM_BLOCKS, i * n // NUM_BLOCKS + 1)) for i in range(NUM_BLOCKS)]
             for n in values.shape]  # fmt: skip
    boxes = [tuple(slice(*edge) for edge in box) for box in itertools.product(*edges)]
    inside = (values[box][foreground[box]] for box in boxes)
    return np.array([block.mean(dtype=np.float64) if block.size else np.nan for block in inside])
