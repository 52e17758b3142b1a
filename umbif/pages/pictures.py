"""Brain volumes as pictures: three planes through one point, as radiologists hang them."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

Volume = NDArray[np.floating]

BACKGROUND = "black"
INK = "#dfe5ea"
MASKED = "#6b7278"
OVERLAY = "#ffb000"
PLANES = ("axial", "coronal", "sagittal")
LETTERS = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}
AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}


def three_planes(
    volumes: Sequence[tuple[str, Volume]],
    center: tuple[int, int, int] | None = None,
    spacing_mm: float | tuple[float, float, float] = 1.0,
    overlays: Sequence[Volume | None] | None = None,
    shared_window: bool = False,
) -> Figure:
    """Rows: the volumes. Columns: axial, coronal, sagittal. The patient's right is on the viewer's left.

    Args:
        volumes: Names and arrays on one grid, axes X Y Z towards right, anterior, superior; NaN is drawn mid-grey.
        center: Voxel that the planes go through; by default the middle.
        spacing_mm: Voxel size, one number or one per axis.
        overlays: For each volume a mask to outline, or None.
        shared_window: One grey scale for all rows, that of the first; else one each.

    Raises:
        ValueError: The volumes differ in shape or are not 3D.
    """
    shape = volumes[0][1].shape
    if len(shape) != 3 or any(array.shape != shape for _, array in volumes):
        raise ValueError(f"three_planes needs 3D volumes of one shape, got {[array.shape for _, array in volumes]}")
    spacing = (spacing_mm,) * 3 if isinstance(spacing_mm, int | float) else spacing_mm
    middle = center or (shape[0] // 2, shape[1] // 2, shape[2] // 2)
    sizes = [_plane(np.broadcast_to(0.0, shape), plane, middle).shape for plane in PLANES]
    extents = [_extent_mm(size, plane, spacing) for size, plane in zip(sizes, PLANES, strict=True)]
    widths = [width for width, _ in extents]
    row_height = max(height for _, height in extents)
    figure = Figure(figsize=(9.0, 9.0 * (row_height * len(volumes)) / (sum(widths) * 1.04)), facecolor=BACKGROUND)
    axes = figure.subplots(len(volumes), 3, squeeze=False, gridspec_kw={"width_ratios": widths})
    figure.subplots_adjust(left=0.04, right=1, top=1, bottom=0, wspace=0.01, hspace=0.02)
    first = window(volumes[0][1])
    for row, (name, array) in enumerate(volumes):
        limits = first if shared_window else window(array)
        mask = overlays[row] if overlays else None
        for column, plane in enumerate(PLANES):
            outline = None if mask is None else _plane(mask, plane, middle)
            _draw(axes[row, column], _plane(array, plane, middle), outline, plane, extents[column], limits)
        axes[row, 0].text(-0.05, 0.5, name, transform=axes[row, 0].transAxes, rotation=90, va="center", ha="center",
                          color=INK, fontsize=10)  # fmt: skip
    return figure


def window(array: Volume) -> tuple[float, float]:
    """Grey scale from the 0.5th to the 99.5th percentile of the finite voxels."""
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(finite, [0.5, 99.5])
    return float(low), float(high if high > low else low + 1)


def _plane(array: Volume, plane: str, middle: tuple[int, int, int]) -> Volume:
    """The slice, rows from top to bottom and columns from the viewer's left to right.

    X, Y and Z grow to the patient's right, front and top. Flipping both directions puts the top (or front) up and the
    patient's right (sagittal: front) on the viewer's left.
    """
    return np.flip(np.take(array, middle[AXIS[plane]], axis=AXIS[plane]).T)


def _extent_mm(size: tuple[int, ...], plane: str, spacing: tuple[float, float, float]) -> tuple[float, float]:
    across, up = (axis for axis in range(3) if axis != AXIS[plane])
    return size[1] * spacing[across], size[0] * spacing[up]


def _draw(
    axes: Axes,
    image: Volume,
    overlay: Volume | None,
    plane: str,
    extent_mm: tuple[float, float],
    limits: tuple[float, float],
) -> None:
    width, height = extent_mm
    grey = colormaps["gray"].with_extremes(bad=MASKED)
    axes.imshow(np.ma.masked_invalid(image), cmap=grey, vmin=limits[0], vmax=limits[1], extent=(0, width, 0, height),
                interpolation="nearest")  # fmt: skip
    if overlay is not None and overlay.any() and not overlay.all():
        axes.contour(overlay.astype(float), levels=[0.5], colors=[OVERLAY], linewidths=1.0, origin="upper",
                     extent=(0, width, 0, height))  # fmt: skip
    for letter, x, side in zip(LETTERS[plane], (0.03, 0.97), ("left", "right"), strict=True):
        axes.text(x, 0.5, letter, transform=axes.transAxes, ha=side, va="center", color=INK, fontsize=8,
                  path_effects=[withStroke(linewidth=2, foreground=BACKGROUND)])  # fmt: skip
    axes.set_axis_off()
