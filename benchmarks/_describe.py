"""What becomes of an exam before a probe sees it: the features of an encoder, or something that needs no learning.

Shapes: P asked places, F features of an exam, G features of a place.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from _inputs import PATCH, places_of_tokens
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, avg_pool3d

from umbif.downstream.heads import ExtremesHead
from umbif.encoders.cnn import CNN3D
from umbif.encoders.vit import ViT3D
from umbif.stream.exams import SEQUENCES, Exams
from umbif.stream.patches import gather, patch_grid

Array = npt.NDArray[Any]
BINS = np.linspace(-3, 4, 33)  # z-scores
RAW_CELLS = 10  # along each edge of the brain's box


class Describer(Protocol):
    """Turns one exam (a batch of one) into numbers."""

    def __call__(self, exams: Exams, places: Array | None = None) -> tuple[Array, Array | None]:
        """Of the exam (F,), and of some of its places (P, G), if they are asked for and it knows places."""
        ...


class Encoded:
    """Features of an encoder: the mean token and the extremes of its tokens, as fine-tuning starts from."""

    def __init__(self, encoder: ViT3D | CNN3D) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.pool = ExtremesHead(encoder.embed_dim)

    @torch.no_grad()
    def __call__(self, exams: Exams, places: Array | None = None) -> tuple[Array, Array | None]:
        """See `Describer`; of a place, the mean over its sequences."""
        found = self.encoder.forward_features(exams)
        exam = self.pool.features(*found)[0].numpy()
        if places is None or not isinstance(self.encoder, ViT3D):
            return exam, None
        at = places_of_tokens(patch_grid(exams, PATCH))
        return exam, np.stack([found[0][0, at == place].mean(0).numpy() for place in places.tolist()])


class Histogram:
    """Intensities without their places: a histogram of each sequence; of a place, mean, spread and extremes."""

    def __call__(self, exams: Exams, places: Array | None = None) -> tuple[Array, Array | None]:
        """See `Describer`."""
        volumes, brain = exams.z_scores()[0], exams.brain[0]
        shares = [np.histogram(volume[brain].numpy(), BINS, density=True)[0] for volume in volumes]
        exam = by_sequence(exams, shares)
        if places is None:
            return exam, None
        voxels = patches_of(exams, places).flatten(2)  # (S, P, voxels)
        spread, mean = torch.std_mean(voxels, -1)
        of_places = torch.stack([mean, spread, voxels.amax(-1), voxels.amin(-1)], -1).numpy()
        return exam, by_sequence(exams, of_places)


class Raw:
    """Voxels, coarsely. Probes see their principal components."""

    def __call__(self, exams: Exams, places: Array | None = None) -> tuple[Array, Array | None]:
        """See `Describer`."""
        x, y, z = (int(n) for n in exams.box[0])
        cells = adaptive_avg_pool3d(exams.z_scores()[0, :, :x, :y, :z], RAW_CELLS)
        exam = by_sequence(exams, cells.flatten(1).numpy())
        if places is None:
            return exam, None
        return exam, by_sequence(exams, avg_pool3d(patches_of(exams, places), 2).flatten(2).numpy())


def by_sequence(exams: Exams, found: Sequence[Array] | Array) -> Array:
    """Puts what was found of each entry to a place of its sequence, zeros for those that are absent."""
    found = np.asarray(found, dtype=np.float32)
    slots = np.zeros((len(SEQUENCES), *found.shape[1:]), np.float32)
    for entry in exams.present[0].nonzero()[:, 0].tolist():
        slots[int(exams.sequence[0, entry])] = found[entry]
    used = slots[[SEQUENCES.index(name) for name in ("t1", "t1ce", "t2", "flair", "other")]]
    return np.moveaxis(used, 0, -2).reshape(*found.shape[1:-1], -1)


def patches_of(exams: Exams, places: Array) -> Tensor:
    """Voxels of some places in every sequence, (S, P, p, p, p)."""
    grid = patch_grid(exams, PATCH)
    S, N = exams.present.shape[1], grid.position_mm.shape[1]
    index = (torch.arange(S)[:, None] * N + torch.from_numpy(places)).flatten()[None]
    voxels = gather(exams, grid, index, torch.ones_like(index, dtype=torch.bool)).voxels
    return voxels.view(S, len(places), PATCH, PATCH, PATCH)
