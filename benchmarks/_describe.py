"""What becomes of an exam before a probe sees it: the features of an encoder, or something that needs no learning.

Shapes: P asked places, F, G and H features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from _inputs import PATCH, tokens_of
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, avg_pool3d

from umbif.encoders.cnn import CNN3D
from umbif.encoders.pooling import pooled
from umbif.encoders.vit import ViT3D
from umbif.stream.exams import SEQUENCES, Exams
from umbif.stream.patches import gather, patch_grid

Array = npt.NDArray[Any]
BINS = np.linspace(-3, 4, 33)  # z-scores
EXTREME_SHARE = 0.015  # of the tokens
RAW_CELLS = 10  # along each edge of the brain's box


class Description(NamedTuple):
    """What is known of one exam."""

    by_sequence: Array  # (F,) NaN where a sequence is absent
    together: Array  # (G,) of all that is shown, comparable whatever the sequences
    places: Array | None  # (P, H) of some places, if they were asked for and are known
    tumour: Array | None  # as `by_sequence`, of the places of the tumour alone, if they were given


class Describer(Protocol):
    """Turns one exam (a batch of one) into numbers."""

    def __call__(self, exams: Exams, places: Array | None = None, tumour: Array | None = None) -> Description:
        """Of the exam, of some of its places, and of those where its tumour is."""
        ...


class Encoded:
    """Features of an encoder: the mean token and the extremes of the tokens of each sequence."""

    def __init__(self, encoder: ViT3D | CNN3D) -> None:
        self.encoder = encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, exams: Exams, places: Array | None = None, tumour: Array | None = None) -> Description:
        """See `Describer`; of a place, the mean over its sequences; of a tumour, the mean over its places."""
        tokens = self.encoder.forward_features(exams)[0]
        if isinstance(self.encoder, ViT3D):
            entry, place = tokens_of(patch_grid(exams, PATCH))
        else:
            entry, place = here(exams).repeat_interleave(tokens.shape[1] // len(here(exams))), None
        found = [described(tokens[:, entry == one]) for one in here(exams)]
        of_places = of_tumour = None
        if places is not None and place is not None:
            of_places = np.stack([tokens[0, place == one].mean(0).numpy() for one in places.tolist()])
        if tumour is not None and place is not None:
            inside = torch.isin(place, torch.from_numpy(tumour))
            means = [tokens[0, inside & (entry == one)].mean(0).numpy() for one in here(exams)]
            of_tumour = by_sequence(exams, means)
        return Description(by_sequence(exams, found), described(tokens), of_places, of_tumour)


class Histogram:
    """Intensities without their places: a histogram of each sequence; of a place, mean, spread and extremes."""

    def __call__(self, exams: Exams, places: Array | None = None, tumour: Array | None = None) -> Description:
        """See `Describer`."""
        volumes, brain = exams.z_scores()[0], exams.brain[0]
        shares = [shares_of(volumes[entry][brain]) for entry in here(exams)]
        of_places = of_tumour = None
        if places is not None:
            voxels = patches_of(exams, places).flatten(2)  # (S, P, voxels)
            spread, mean = torch.std_mean(voxels, -1)
            of_places = by_sequence(exams, torch.stack([mean, spread, voxels.amax(-1), voxels.amin(-1)], -1).numpy())
        if tumour is not None:
            of_tumour = by_sequence(exams, [shares_of(voxels) for voxels in patches_of(exams, tumour)])
        return Description(by_sequence(exams, shares), np.mean(shares, axis=0), of_places, of_tumour)


class Raw:
    """Voxels, coarsely. Probes see their principal components."""

    def __call__(self, exams: Exams, places: Array | None = None, tumour: Array | None = None) -> Description:
        """See `Describer`."""
        x, y, z = (int(n) for n in exams.box[0])
        cells = adaptive_avg_pool3d(exams.z_scores()[0, here(exams), :x, :y, :z], RAW_CELLS).flatten(1).numpy()
        of_places = of_tumour = None
        if places is not None:
            of_places = by_sequence(exams, avg_pool3d(patches_of(exams, places), 2).flatten(2).numpy())
        if tumour is not None:
            of_tumour = by_sequence(exams, avg_pool3d(patches_of(exams, tumour), 2).mean(1).flatten(1).numpy())
        return Description(by_sequence(exams, cells), cells.mean(0), of_places, of_tumour)


def shares_of(voxels: Tensor) -> Array:
    """Densities of z-scores."""
    return np.histogram(voxels.numpy(), BINS, density=True)[0]


def described(tokens: Tensor) -> Array:
    """Mean and extremes of tokens (1, V, E), as fine-tuning starts from: (3 E,)."""
    return pooled(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), EXTREME_SHARE)[0].numpy()


def here(exams: Exams) -> Tensor:
    """The entries that are present."""
    return exams.present[0].nonzero()[:, 0]


def by_sequence(exams: Exams, found: Sequence[Array] | Array) -> Array:
    """Puts what was found of each present entry (…, F) to a place of its sequence; NaN for those that are absent."""
    found = np.asarray(found, dtype=np.float32)
    slots = np.full((len(SEQUENCES), *found.shape[1:]), np.nan, np.float32)
    slots[exams.sequence[0, here(exams)].numpy()] = found
    used = slots[[SEQUENCES.index(name) for name in ("t1", "t1ce", "t2", "flair", "other")]]
    return np.moveaxis(used, 0, -2).reshape(*found.shape[1:-1], -1)


def patches_of(exams: Exams, places: Array) -> Tensor:
    """Voxels of some places in every present sequence, (S, P, p, p, p)."""
    grid = patch_grid(exams, PATCH)
    index = (here(exams)[:, None] * grid.position_mm.shape[1] + torch.from_numpy(places)).flatten()[None]
    voxels = gather(exams, grid, index, torch.ones_like(index, dtype=torch.bool)).voxels
    return voxels.view(-1, len(places), PATCH, PATCH, PATCH)
