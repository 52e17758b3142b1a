"""The order of samples and the views of each: pure functions of one counter.

`slot` counts samples since the start of training. Everything random about a sample follows from (seed, slot), so ranks,
workers and nodes never enter the randomness, and a run resumes from one integer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Triple = tuple[int, int, int]
ORDER, VIEWS, PLACES = 0, 1, 2  # purposes of the generators below: their numbers are independent


@dataclass(frozen=True)
class View:
    """One random look at an exam: the block of voxels from `start`, in some of its sequences."""

    start: Triple
    sequences: tuple[str, ...]


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    """The generator that belongs to one slot (or epoch) and purpose."""
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, purpose]))


def exam_of_slot(slot: int, num_exams: int, seed: int) -> int:
    """Every exam once an epoch, in an order of its own for each epoch."""
    epoch, position = divmod(slot, num_exams)
    return int(_epoch_order(epoch, num_exams, seed)[position])


def slots_of_rank(start: int, global_batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Endless batches of slots: each rank's contiguous share of each global batch.

    Args:
        start: First slot of the next global batch.
        global_batch_size: Slots of a micro-step over all ranks; a multiple of `world_size`.
        rank: Of this process.
        world_size: Number of processes.
    """
    share = global_batch_size // world_size
    while True:
        first = start + rank * share
        yield list(range(first, first + share))
        start += global_batch_size


def draw_views(
    seed: int,
    slot: int,
    *,
    sequences: Sequence[str],
    box: Triple,
    crop: Triple,
    num_views: int,
    disjoint_share: float,
    keep_probability: float,
    max_sequences: int | None = None,
    exams_per_place: int = 0,
    focus: Triple | None = None,
) -> list[View]:
    """The views of a slot.

    Args:
        seed: Of the stream.
        slot: The sample's number.
        sequences: Those that the exam has.
        box: Voxels of the brain's box.
        crop: Voxels of a crop; along an axis where the box is smaller, the crop is centred on it.
        num_views: Of the exam.
        disjoint_share: Of the exams with two sequences or more, the share whose views have no sequence in common.
        keep_probability: Otherwise, how likely each view sees a sequence (one at least).
        max_sequences: Most sequences of a view.
        exams_per_place: Consecutive slots whose crops all lie at the same place of their box (or about their focus).
            Where siblings lie elsewhere, a contrast unlearns where and how large things are. 0 draws a place for each
            view.
        focus: Voxel that lies in the middle half of every crop, as far as the box allows; None draws them anywhere.
    """
    rng = generator(seed, VIEWS, slot)
    subsets = _draw_subsets(rng, sequences, num_views, disjoint_share, keep_probability)
    if max_sequences is not None:
        subsets = [_some(rng, subset, max_sequences) for subset in subsets]
    if exams_per_place:
        places = [generator(seed, PLACES, slot // exams_per_place).random(3)] * len(subsets)
    else:
        places = [rng.random(3) for _ in subsets]
    return [View(_start(place, box, crop, focus), subset) for place, subset in zip(places, subsets, strict=True)]


@lru_cache(maxsize=4)
def _epoch_order(epoch: int, num_exams: int, seed: int) -> npt.NDArray[np.int64]:
    return generator(seed, ORDER, epoch).permutation(num_exams)


def _start(place: npt.NDArray[np.float64], box: Triple, crop: Triple, focus: Triple | None) -> Triple:
    centre = focus or (None, None, None)
    x, y, z = (_start_along(*axis) for axis in zip(place, box, crop, centre, strict=True))
    return x, y, z


def _start_along(place: float, box: int, crop: int, focus: int | None) -> int:
    """Where a crop begins, for a place from 0 to 1."""
    if box <= crop:
        return (box - crop) // 2
    if focus is None:
        return int(place * (box - crop + 1))
    margin = crop // 4
    return int(np.clip(focus - margin - int(place * (crop - 2 * margin + 1)), 0, box - crop))


def _some(rng: np.random.Generator, sequences: tuple[str, ...], most: int) -> tuple[str, ...]:
    chosen = np.sort(rng.permutation(len(sequences))[:most])
    return tuple(sequences[i] for i in chosen)


def _draw_subsets(
    rng: np.random.Generator, sequences: Sequence[str], num_views: int, disjoint_share: float, keep_probability: float
) -> list[tuple[str, ...]]:
    if num_views > 1 and len(sequences) >= num_views and rng.random() < disjoint_share:
        shuffled = [sequences[i] for i in rng.permutation(len(sequences))]
        cuts = np.sort(rng.permutation(len(sequences) - 1)[: num_views - 1]) + 1
        parts = np.split(np.arange(len(sequences)), cuts)
        return [_in_order([shuffled[i] for i in part], sequences) for part in parts]
    subsets = []
    for _ in range(num_views):
        keep = rng.random(len(sequences)) < keep_probability
        keep[rng.integers(len(sequences))] = True
        subsets.append(tuple(s for s, k in zip(sequences, keep, strict=True) if k))
    return subsets


def _in_order(chosen: Sequence[str], order: Sequence[str]) -> tuple[str, ...]:
    return tuple(s for s in order if s in chosen)
