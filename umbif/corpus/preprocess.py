"""From the volumes of one exam, as stored on disk, to arrays that a network can take: pure functions.

Canonical RAS orientation, one isotropic grid per exam, brain mask, the brain's box, robust clipping, int16.
Shapes: X Y Z are voxel axes towards the patient's right, front and top.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
import torchio as tio
from scipy import ndimage

from umbif.corpus.outline import Array, Box, background, bounding_box
from umbif.corpus.readers import Volume
from umbif.errors import Problem, UsageError
from umbif.ranges import NonNegativeFloat, Percent, PositiveFloat, ZstdLevel

SAME_GRID_MM = 1e-3  # two grids that differ by less are one grid: no resampling, so no blurring
MIN_HELD = 0.95  # of what any volume holds of the brain; with less, a volume is no grid for the others
MAX_POINTS = 10_000  # of a brain, to see who holds it
MIN_COVERED = 0.5  # share of the brain in a sequence's field of view; with less, its numbers are not those of a brain


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How exams are made ready: the values of a `prepare/` recipe, and the identity of a corpus.

    Args:
        spacing_mm: Edge of the isotropic voxel. Volumes already at this spacing are not resampled.
        clip_percentiles: Brain intensities outside these percentiles are clipped.
        min_brain_ml: An exam with a smaller brain mask than this is quarantined.
        allow_faces: Accept volumes without skull stripping, with everything that is not air as the mask.
        compression_level: Of zstd, 0 to 9.

    Raises:
        UsageError: The percentiles do not rise.
    """

    spacing_mm: PositiveFloat = 1.0
    clip_percentiles: tuple[Percent, Percent] = (0.05, 99.95)
    min_brain_ml: NonNegativeFloat = 100.0
    allow_faces: bool = False
    compression_level: ZstdLevel = 5

    def __post_init__(self) -> None:
        low, high = self.clip_percentiles
        if low >= high:
            raise UsageError(Problem("clip_percentiles must rise", f"{low:g} to {high:g}", "Such as [0.05, 99.95]"))


@dataclass(frozen=True)
class StoredVolume:
    """One sequence on the exam's grid: intensity = stored * scale + intercept. The others are of the brain it shows."""

    stored: npt.NDArray[np.int16]  # (X, Y, Z)
    scale: float
    intercept: float
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class PreparedExam:
    """The brain's box of one exam. `brain` and `tumour` are uint8 masks (X, Y, Z); `affine` maps voxels to RAS mm."""

    volumes: dict[str, StoredVolume]
    brain: npt.NDArray[np.uint8]
    tumour: npt.NDArray[np.uint8] | None
    affine: npt.NDArray[np.float64]
    off_the_brain: dict[str, float]  # sequences that are left out, and the share of the brain that each shows


class UnusableExam(Exception):
    """The exam as a whole can't be used. `reason` is a short code, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def prepare_exam(
    images: Mapping[str, Volume],
    how: Preparation,
    *,
    brain: Volume | None = None,
    tumour: Volume | None = None,
) -> PreparedExam:
    """Brings the sequences of one exam to one grid, cuts out the brain's box and quantises.

    Args:
        images: Sequence name to volume, on any grids that share the scanner's space.
        how: The preparation recipe.
        brain: Brain mask, where one was given; else what is not background in any sequence.
        tumour: Tumour mask, if there is one.

    Raises:
        UnusableExam: There is no brain in it, or too little of one.
    """
    subjects = {name: _canonical(volume) for name, volume in images.items()}
    given = None if brain is None else _canonical(brain, mask=True)
    foregrounds = {} if given is not None else {name: _foreground(volume) for name, volume in images.items()}
    best = _best(images, foregrounds.values() if given is None else [given])
    grid = _isotropic(subjects[best], how.spacing_mm)
    mask = _brain_mask(given, foregrounds.values(), grid)
    box = _box(mask)
    shares = {name: _share_shown(image, mask, grid, box) for name, image in subjects.items()}
    near = {name: image for name, image in subjects.items() if shares[name] >= MIN_COVERED}
    if len(near) < len(subjects):  # what lies elsewhere says nothing about where the brain is
        mask = _brain_mask(given, [shown for name, shown in foregrounds.items() if name in near], grid)
        box = _box(mask)
    _check_brain(mask, how)
    volumes = {}
    for name, image in near.items():
        shown = mask[box] & _field_of_view(image, grid, box)
        volumes[name] = quantise(_numpy(_onto(image, grid))[box], shown, how.clip_percentiles)
    lesion = _numpy(_onto(_canonical(tumour, mask=True), grid))[box] > 0 if tumour is not None else None
    return PreparedExam(
        volumes=volumes,
        brain=mask[box].astype(np.uint8),
        tumour=None if lesion is None else lesion.astype(np.uint8),
        affine=_affine_of_box(grid.affine, box),
        off_the_brain={name: share for name, share in shares.items() if name not in near},
    )


def quantise(values: Array, brain: Array, clip_percentiles: tuple[Percent, Percent]) -> StoredVolume:
    """Clips to percentiles of the brain and stores as int16: without loss where the clipped values are such integers.

    Args:
        values: Intensities, (X, Y, Z).
        brain: Brain that was imaged, (X, Y, Z); outside of it the mean is stored, a z-score of zero.
        clip_percentiles: Lower and upper percentile, in 0 to 100.
    """
    inside = values[brain > 0]
    low, high = (float(v) for v in np.percentile(inside, clip_percentiles, method="nearest"))
    clipped = np.clip(values, low, high).astype(np.float64)
    brain_values = clipped[brain > 0]
    mean, std = float(brain_values.mean()), float(brain_values.std())
    if np.array_equal(brain_values, np.rint(brain_values)) and low >= -32768 and high <= 32767:
        scale, intercept = 1.0, 0.0
    else:
        scale, intercept = max((high - low) / 65534.0, 1e-30), (high + low) / 2
    stored = np.rint((np.where(brain > 0, clipped, mean) - intercept) / scale).astype(np.int16)
    if std <= 1e-12 * abs(mean):
        std = 1.0  # a sequence without any contrast becomes all zeros, not NaN
    return StoredVolume(stored, scale, intercept, mean, std, low, high)


def is_better(candidate: Volume, other: Volume, brain: Volume | None = None) -> bool:
    """Whether a second volume of the same sequence holds more of the brain, or holds it too and in finer voxels.

    Args:
        candidate: The second.
        other: The first, which stays where they are equal.
        brain: Brain mask, where one was given; else what is not background in the one that shows more.
    """
    both = {"other": other, "candidate": candidate}
    masks = [_foreground(volume) for volume in both.values()] if brain is None else [_canonical(brain, mask=True)]
    return _best(both, masks) == "candidate"


def _canonical(volume: Volume, *, mask: bool = False) -> tio.Image:
    kind = tio.LabelMap if mask else tio.ScalarImage
    values = (volume.values() > 0).astype(np.float32) if mask else volume.values()
    return tio.ToCanonical()(kind(tensor=torch.from_numpy(np.ascontiguousarray(values))[None], affine=volume.affine))


def _best(volumes: Mapping[str, Volume], masks: Iterable[tio.Image]) -> str:
    """The finest of the volumes that hold the brain: about all that any of them holds of it.

    Args:
        volumes: By name; of equals, the first one.
        masks: Say where the brain is, the one that shows most of it.
    """
    points_mm = _points_mm(max(masks, key=lambda mask: float(mask.data.sum()) * float(np.prod(mask.spacing))))
    held = {name: _share_held(volume, points_mm) for name, volume in volumes.items()}
    enough = MIN_HELD * max(held.values())

    def coarseness(name: str) -> tuple[float, float, float]:
        edges_mm = np.round(volumes[name].spacing_mm, 3)
        return float(edges_mm.max()), float(np.prod(edges_mm)), -held[name]  # a thick slice of small pixels is not fine

    return min((name for name, share in held.items() if share >= enough), key=coarseness)


def _points_mm(mask: tio.Image) -> npt.NDArray[np.float64]:
    """Places of a mask (3, points). Random ones, as each n-th might lie in one plane, and the same every time."""
    inside = np.flatnonzero(_numpy(mask))
    if len(inside) > MAX_POINTS:
        inside = inside[np.random.default_rng(0).integers(len(inside), size=MAX_POINTS)]
    at = np.stack(np.unravel_index(inside, mask.spatial_shape))
    return np.asarray(mask.affine[:3, :3] @ at + mask.affine[:3, 3:], dtype=np.float64)


def _share_held(volume: Volume, points_mm: npt.NDArray[np.float64]) -> float:
    """How many of some places lie in a volume's field of view."""
    onto_image = np.linalg.inv(volume.affine)
    at = onto_image[:3, :3] @ points_mm + onto_image[:3, 3:]
    size = np.array(volume.data.shape)[:, None]
    inside = (np.abs(at - (size - 1) / 2) <= size / 2).all(axis=0)
    return float(inside.sum() / max(1, inside.size))


def _isotropic(image: tio.Image, spacing_mm: float) -> tio.Image:
    if np.allclose(image.spacing, spacing_mm, atol=SAME_GRID_MM):
        return image
    return tio.Resample(spacing_mm)(image)


def _onto(image: tio.Image, grid: tio.Image) -> tio.Image:
    if image.spatial_shape == grid.spatial_shape and np.allclose(image.affine, grid.affine, atol=SAME_GRID_MM):
        return image
    return tio.Resample(grid)(image)


def _share_shown(image: tio.Image, mask: npt.NDArray[np.bool_], grid: tio.Image, box: Box) -> float:
    return float((mask[box] & _field_of_view(image, grid, box)).sum() / mask.sum())


def _field_of_view(image: tio.Image, grid: tio.Image, box: Box) -> npt.NDArray[np.bool_]:
    """Which voxels of the box an image reaches: beyond its edge resampling writes zeros that nobody measured."""
    ends = np.array([*product(*((side.start, side.stop - 1) for side in box))]).T
    onto_image = np.linalg.inv(image.affine) @ grid.affine
    at = onto_image[:3, :3] @ ends + onto_image[:3, 3:]
    last = np.array(image.spatial_shape)[:, None] - 1
    if (np.abs(at - last / 2) < last / 2 + 0.499).all():  # mostly so; a corner nearer to the edge is left to resampling
        return np.ones([side.stop - side.start for side in box], dtype=bool)
    everywhere = tio.LabelMap(tensor=torch.ones((1, *image.spatial_shape), dtype=torch.uint8), affine=image.affine)
    return _numpy(_onto(everywhere, grid))[box] > 0


def _numpy(image: tio.Image) -> Array:
    return image.data[0].numpy()


def _brain_mask(given: tio.Image | None, foregrounds: Iterable[tio.Image], grid: tio.Image) -> npt.NDArray[np.bool_]:
    """The given mask; else all that any image shows."""
    if given is not None:
        return _numpy(_onto(given, grid)) > 0
    mask = np.zeros(grid.spatial_shape, dtype=bool)
    for foreground in foregrounds:
        mask |= _numpy(_onto(foreground, grid)) > 0
    return _largest_part(ndimage.binary_fill_holes(mask))


def _foreground(volume: Volume) -> tio.Image:
    values = volume.values()
    inside = torch.from_numpy(np.ascontiguousarray(values != background(values), dtype=np.uint8))
    return tio.ToCanonical()(tio.LabelMap(tensor=inside[None], affine=volume.affine))


def _largest_part(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Drops specks: one bright voxel at the edge of the field of view would blow up the brain's box."""
    parts, num_parts = ndimage.label(mask)
    if num_parts <= 1:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.isin(parts, np.flatnonzero(sizes >= 0.1 * sizes.max()))


def _box(mask: npt.NDArray[np.bool_]) -> Box:
    if not mask.any():
        raise UnusableExam("no_brain", "The brain mask is empty: there is nothing but background.")
    return bounding_box(mask)


def _check_brain(mask: npt.NDArray[np.bool_], how: Preparation) -> None:
    millilitres = float(mask.sum()) * how.spacing_mm**3 / 1000
    if millilitres < how.min_brain_ml:
        raise UnusableExam(
            "little_brain",
            f"The brain mask holds {millilitres:.0f} ml, less than min_brain_ml={how.min_brain_ml:g}: "
            "a partial scan, or not a brain.",
        )


def _affine_of_box(affine: npt.NDArray[np.float64], box: Box) -> npt.NDArray[np.float64]:
    moved = np.array(affine, dtype=np.float64)
    moved[:3, 3] = affine[:3, :3] @ np.array([s.start for s in box], dtype=float) + affine[:3, 3]
    return moved
