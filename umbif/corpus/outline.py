"""What of a volume is background, and where the rest of it ends. Light imports: worker processes read this."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Box = tuple[slice, slice, slice]
FLAT_CUT = "flat_cut"  # flag
MIN_FACE_BACKGROUND = 0.9  # share of each border face; a head that is not stripped runs out through the neck
MIN_LONG = 32  # voxels; the last plane of a round thing is a small share of its box only where these are many
MAX_LAST_PLANE = 0.25  # share of the box; a brain of MIN_LONG planes fills a tenth


def background(values: Array) -> Any:
    """The commonest value on the outer faces: what skull stripping left there (0 mostly, but not always)."""
    found, counts = np.unique(np.concatenate([face.ravel() for face in _faces(values)]), return_counts=True)
    return found[counts.argmax()]


def border_flags(values: Array) -> tuple[str, ...]:
    """`not_skull_stripped`, unless one value covers nearly all of every border face; `flat_cut`, if what it surrounds
    ends in a plane: a head within a larger array may, and so may a brain that the field of view cuts.

    Args:
        values: (X, Y, Z).
    """
    around = background(values)
    if any(np.mean(face == around) < MIN_FACE_BACKGROUND for face in _faces(values)):
        return ("not_skull_stripped",)
    inside = values != around
    box = inside[bounding_box(inside)]
    long = [axis for axis in range(3) if box.shape[axis] >= MIN_LONG]
    return (FLAT_CUT,) if any(face.mean() > MAX_LAST_PLANE for face in _faces(box, long)) else ()


def bounding_box(mask: npt.NDArray[np.bool_]) -> Box:
    """The smallest box that holds a mask (X, Y, Z); all of it where the mask is empty."""
    x, y, z = (_extent(mask, axis) for axis in range(3))
    return x, y, z


def _faces(values: Array, axes: Iterable[int] = range(3)) -> list[Array]:
    """The first and the last plane along some axes, as views: `np.take` would first copy a volume in Fortran order."""
    return [np.moveaxis(values, axis, 0)[end] for axis in axes for end in (0, -1)]


def _extent(mask: npt.NDArray[np.bool_], axis: int) -> slice:
    where = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
    return slice(int(where[0]), int(where[-1]) + 1) if len(where) else slice(0, mask.shape[axis])
