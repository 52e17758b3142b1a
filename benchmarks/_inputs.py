"""The clinic's exams as the tasks of `learn.py` show them to an encoder: whole, in parts, and place by place.

Shapes: S sequences, P places (patches that hold brain), of which a few are asked about.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from umbif.corpus.shards import TUMOUR, Corpus
from umbif.stream.exams import SEQUENCES, Exams, WholeBrainDataset, collate
from umbif.stream.patches import PatchGrid, choose, gather, patch_grid

Array = npt.NDArray[Any]
PATCH = 8  # voxels, as the encoders have it
NUM_PLACES = 48  # of an exam, that patch tasks ask about
MIN_LESION = 0.25  # of a patch's voxels: with less it is no patch of the lesion
COARSE = 4  # voxels: what is predicted of a hidden patch are the means of cubes of this size
T1, T1CE, T2, FLAIR, OTHER = (SEQUENCES.index(name) for name in ("t1", "t1ce", "t2", "flair", "other"))
HALVES = ((T1, T1CE), (T2, FLAIR))  # of everyone the same: or else the sequences would tell the exams apart


@dataclass(frozen=True)
class Shown:
    """One exam, in every way that it is shown."""

    row: int  # of the corpus
    whole: Exams
    alone: Exams  # one sequence, without its name
    alone_is: int  # index into SEQUENCES
    halves: list[Exams] | None  # `HALVES`; None for an exam that lacks one of the four
    t1: Exams | None  # alone; None where T1 or FLAIR is missing
    brain_voxels: int
    lesion_voxels: int
    places: Array  # (≤ NUM_PLACES,) asked about, in the exam's grid of patches
    position_mm: Array  # (≤ NUM_PLACES, 3)
    is_lesion: Array  # (≤ NUM_PLACES,) bool
    flair: Array | None  # (≤ NUM_PLACES, 8) coarse voxels
    tumour: Array | None  # places of the tumour, all of them; None for a healthy exam


def read(corpus: Corpus, rows: Array) -> Iterator[Shown]:
    """Each exam of `rows`; the same choices every time."""
    dataset = WholeBrainDataset(corpus, rows, np.zeros(len(rows), np.float32))
    for at, row in enumerate(rows.tolist()):
        exams = collate([dataset[at]], spacing_mm=corpus.spacing_mm, seed=0).padded(PATCH)
        yield shown(corpus, exams, row)


def shown(corpus: Corpus, exams: Exams, row: int) -> Shown:
    """One exam (a batch of one) of a corpus."""
    rng = np.random.default_rng((row, 0))
    entries = rng.permutation(int(exams.present.sum()))  # absent ones come last
    alone = int(entries[0])
    here = set(exams.sequence[0, : len(entries)].tolist())
    grid = patch_grid(exams, PATCH)
    any_brain = grid.available.view(len(exams.sequence[0]), -1).any(0).nonzero()[:, 0].numpy()
    lesion = lesion_share(corpus, exams, row)
    places = asked_places(rng, any_brain, lesion)
    return Shown(
        row=row, whole=exams, alone=replace(only(exams, [alone]), sequence=torch.full_like(exams.sequence, OTHER)),
        alone_is=int(exams.sequence[0, alone]),
        halves=[only(exams, [entry_of(exams, s) for s in half]) for half in HALVES] if len(entries) == 4 else None,
        t1=only(exams, [entry_of(exams, T1)]) if {T1, FLAIR} <= here else None, brain_voxels=int(exams.brain.sum()),
        lesion_voxels=round(float(lesion.sum()) * PATCH**3), places=places,
        position_mm=grid.position_mm[0, torch.from_numpy(places)].numpy(), is_lesion=lesion[places] > MIN_LESION,
        flair=coarse(exams, grid, entry_of(exams, FLAIR), places) if {T1, FLAIR} <= here else None,
        tumour=tumour_places(lesion, any_brain),
    )  # fmt: skip


def only(exams: Exams, entries: Any) -> Exams:
    """The exam without its other sequences."""
    present = torch.zeros_like(exams.present)
    present[0, torch.as_tensor(np.asarray(entries))] = True
    return replace(exams, present=present)


def entry_of(exams: Exams, sequence: int) -> int:
    """Where a sequence stands that is present."""
    return int(((exams.sequence[0] == sequence) & exams.present[0]).nonzero()[0])


def lesion_share(corpus: Corpus, exams: Exams, row: int) -> Array:
    """Share of each patch that is lesion, for all places of the grid; zeros for a healthy exam."""
    frame = corpus.frames(row).get(TUMOUR)
    size = exams.image.shape[2:]
    if frame is None:
        return np.zeros(int(np.prod([n // PATCH for n in size])))
    mask = torch.from_numpy((corpus.read(frame, (0, 0, 0), tuple(size)) > 0).astype(np.float32))
    return avg_pool3d(mask[None, None], PATCH).flatten().numpy()


def asked_places(rng: np.random.Generator, places: Array, lesion: Array) -> Array:
    """Some places, in order: half of them in the lesion, as far as it reaches."""
    within, without = (rng.permutation(places[inside]) for inside in (lesion[places] > MIN_LESION,
                                                                      lesion[places] <= MIN_LESION))  # fmt: skip
    within = within[: NUM_PLACES // 2]
    return np.sort(np.concatenate([within, without[: NUM_PLACES - len(within)]]))


def tumour_places(lesion: Array, places: Array) -> Array | None:
    """Where much of a patch is lesion; of a small lesion, where most of it is."""
    share = lesion[places]
    within = places[share > MIN_LESION] if share.max() > MIN_LESION else places[[share.argmax()]]
    return within if share.any() else None


def coarse(exams: Exams, grid: PatchGrid, entry: int, places: Array) -> Array:
    """Means of cubes within the patches of one sequence, (places, 8)."""
    num_places = grid.position_mm.shape[1]
    index = torch.from_numpy(entry * num_places + places)[None]
    voxels = gather(exams, grid, index, torch.ones_like(index, dtype=torch.bool)).voxels[0]
    return avg_pool3d(voxels[:, None], COARSE).flatten(1).numpy()


def tokens_of(grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """Entry and place (V,) of every token of one exam, in the order in which an encoder gives them."""
    index, num_places = choose(grid)[0][0], grid.position_mm.shape[1]
    return index // num_places, index % num_places
