"""Batches of exams: what every network of UMBIF takes. Reads the corpus in worker processes, sends int16.

Shapes: B exams × views, S sequences, X Y Z voxels towards right, front, top.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from umbif.corpus.shards import BRAIN, TUMOUR, Corpus
from umbif.stream.order import Triple, View, draw_views, exam_of_slot

SEQUENCES = ("t1", "t1ce", "t2", "flair", "dwi", "adc", "swi", "other")
# How stored numbers are read, and what stands there for an absent sequence, so that nothing divides by zero.
NUMBERS = {"scale": 0.0, "intercept": 0.0, "mean": 0.0, "std": 1.0, "low": 0.0, "high": 1.0}
Sample = dict[str, Any]
SOME_EXAMS = 32


@dataclass(frozen=True)
class Exams:
    """A batch. Sequences are packed: entry s of an exam is its s-th present one, and `sequence` says which that is.

    `image` is the corpus' int16, all that travels to the device; what a network sees is made there.
    """

    image: Tensor  # (B, S, X, Y, Z) int16
    scale: Tensor  # (B, S): intensity = image * scale + intercept
    intercept: Tensor  # (B, S)
    mean: Tensor  # (B, S) of the brain that the sequence shows, as are the next
    std: Tensor  # (B, S)
    low: Tensor  # (B, S) darkest
    high: Tensor  # (B, S) brightest
    present: Tensor  # (B, S) bool
    sequence: Tensor  # (B, S) int64, index into SEQUENCES
    brain: Tensor  # (B, X, Y, Z) bool
    crop_start: Tensor  # (B, 3) voxels of the exam's box
    box: Tensor  # (B, 3) voxels
    slot: Tensor  # (B,)
    view: Tensor  # (B,)
    exam: Tensor  # (B,) row of Corpus.exams
    person: Tensor  # (B,)
    spacing_mm: float
    seed: int
    target: Tensor | None = None  # (B,) float32

    def __len__(self) -> int:
        return self.image.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Moves every tensor; Lightning calls it."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """For the DataLoader, so that copies to a GPU overlap its work."""
        return self._map(Tensor.pin_memory)

    def to_z_scores(self) -> tuple[Tensor, Tensor]:
        """Factor and shift (B, S): z-score of the brain = image * factor + shift."""
        return self.scale / self.std, (self.intercept - self.mean) / self.std

    def z_range(self) -> tuple[Tensor, Tensor]:
        """Z-score of the darkest voxel, and the span to the brightest (B, S)."""
        return (self.low - self.mean) / self.std, ((self.high - self.low) / self.std).clamp_min(1e-6)

    def z_scores(self) -> Tensor:
        """(B, S, X, Y, Z) float32; background is zero, the mean of the brain."""
        factor, shift = (numbers[:, :, None, None, None] for numbers in self.to_z_scores())
        return self.image.float() * factor + shift

    def padded(self, multiple: int) -> Self:
        """Background added at the far ends, up to a multiple of the patch size."""
        missing = [-n % multiple for n in self.image.shape[2:]]
        if not any(missing):
            return self
        ends = [end for n in reversed(missing) for end in (0, n)]
        x, y, z = self.image.shape[2:]
        outside = ((self.mean - self.intercept) / self.scale).nan_to_num().round().to(self.image.dtype)
        size = [n + m for n, m in zip((x, y, z), missing, strict=True)]
        image = outside[:, :, None, None, None].expand(*outside.shape, *size).contiguous()
        image[:, :, :x, :y, :z] = self.image
        return replace(self, image=image, brain=pad(self.brain, ends))

    def _map(self, move: Any) -> Self:
        moved = {f.name: move(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)


class CropDataset(Dataset[list[Sample]]):
    """Random views of exams, by slot.

    Args:
        corpus: Prepared exams.
        exams: Rows of `corpus.exams` to draw from.
        crop_size: Voxels of a crop.
        seed: Of the stream.
        num_views: Views of an exam.
        disjoint_share: See `draw_views`.
        keep_probability: See `draw_views`.
        max_sequences: See `draw_views`.
        exams_per_place: See `draw_views`.
        around_tumour: Crops around the tumour, of exams that have its mask.
    """

    def __init__(
        self,
        corpus: Corpus,
        exams: npt.NDArray[np.int64],
        *,
        crop_size: Triple,
        seed: int,
        num_views: int = 2,
        disjoint_share: float = 0.5,
        keep_probability: float = 0.75,
        max_sequences: int | None = None,
        exams_per_place: int = 0,
        around_tumour: bool = False,
    ) -> None:
        self.corpus, self.exams, self.crop_size, self.seed = corpus, exams, crop_size, seed
        self.around_tumour = around_tumour
        self.policy: dict[str, Any] = {
            "num_views": num_views, "disjoint_share": disjoint_share, "keep_probability": keep_probability,
            "max_sequences": max_sequences, "exams_per_place": exams_per_place,
        }  # fmt: skip
        self.width = most_sequences(corpus)
        self.person = person_codes(corpus)

    def sample_bytes(self) -> int:
        """Of the voxels of one sample: int16 of each sequence, and the brain mask."""
        return self.policy["num_views"] * math.prod(self.crop_size) * (2 * self.width + 1)

    def __getitem__(self, slot: int) -> list[Sample]:
        exam = int(self.exams[exam_of_slot(slot, len(self.exams), self.seed)])
        box = self.corpus.frames(exam)[BRAIN].shape
        views = draw_views(
            self.seed, slot, sequences=self.corpus.sequences(exam), box=box, crop=self.crop_size,
            focus=tumour_centre(self.corpus, exam) if self.around_tumour else None, **self.policy,
        )  # fmt: skip
        samples = [read_view(self.corpus, exam, view, self.crop_size, self.width) for view in views]
        known = {"exam": exam, "person": self.person[exam], "slot": slot}
        return [{**sample, **known, "view": number} for number, sample in enumerate(samples)]


class WholeBrainDataset(Dataset[list[Sample]]):
    """The whole brain's box of each exam with its target: nothing of a tumour can be cut off.

    Args:
        corpus: Prepared exams.
        exams: Rows of `corpus.exams`.
        targets: One number for each row of `exams`.
        seed: Of the order; None keeps the order of `exams`, each once.
    """

    def __init__(
        self, corpus: Corpus, exams: npt.NDArray[np.int64], targets: npt.NDArray[np.float32], seed: int | None = None
    ) -> None:
        self.corpus, self.exams, self.targets, self.seed = corpus, exams, targets, seed
        self.width = most_sequences(corpus)
        self.person = person_codes(corpus)

    def __len__(self) -> int:
        return len(self.exams)

    def sample_bytes(self) -> int:
        """Of the voxels of one sample, by the largest of a few boxes."""
        some = self.exams[:: max(1, len(self.exams) // SOME_EXAMS)]
        boxes = [math.prod(self.corpus.frames(int(exam))[BRAIN].shape) for exam in some]
        return max(boxes) * (2 * self.width + 1)

    def __getitem__(self, slot: int) -> list[Sample]:
        at = slot if self.seed is None else exam_of_slot(slot, len(self.exams), self.seed)
        exam = int(self.exams[at])
        box = self.corpus.frames(exam)[BRAIN].shape
        view = View((0, 0, 0), tuple(self.corpus.sequences(exam)))
        sample = read_view(self.corpus, exam, view, box, self.width)
        known = {"exam": exam, "person": self.person[exam], "slot": slot, "view": 0}
        return [{**sample, **known, "target": self.targets[at]}]


def read_view(corpus: Corpus, exam: int, view: View, size: Triple, width: int) -> Sample:
    """One view from the corpus: int16 voxels and the numbers that make intensities of them.

    Args:
        corpus: Prepared exams.
        exam: Row of `corpus.exams`.
        view: Where and which sequences.
        size: Voxels to read.
        width: Entries of the sequence axis; those that are left over stay absent.
    """
    frames = corpus.frames(exam)
    sample: Sample = {
        "image": np.zeros((width, *size), dtype=np.int16),
        "brain": corpus.read(frames[BRAIN], view.start, size).astype(bool),
        "present": np.zeros(width, dtype=bool),
        "sequence": np.full(width, SEQUENCES.index("other"), dtype=np.int64),
        **{name: np.full(width, absent, dtype=np.float32) for name, absent in NUMBERS.items()},
        "crop_start": np.asarray(view.start, dtype=np.int64),
        "box": np.asarray(frames[BRAIN].shape, dtype=np.int64),
    }
    for entry, name in enumerate(view.sequences):
        frame = frames[name]
        sample["image"][entry] = corpus.read(frame, view.start, size, fill=frame.outside)
        sample["present"][entry] = True
        sample["sequence"][entry] = SEQUENCES.index(name)
        for number in NUMBERS:
            sample[number][entry] = getattr(frame, number)
    return sample


def collate(samples: Sequence[list[Sample]], *, spacing_mm: float, seed: int) -> Exams:
    """Joins the views of several exams; boxes of different sizes are padded at their far ends to the largest."""
    views = [view for sample in samples for view in sample]
    size = np.max([view["brain"].shape for view in views], axis=0)
    stacked = {
        "image": torch.from_numpy(np.stack([_grown(view["image"], size, outside_of(view)) for view in views])),
        "brain": torch.from_numpy(np.stack([_grown(view["brain"][None], size, np.zeros(1))[0] for view in views])),
    }
    for name in (*NUMBERS, "present", "sequence", "crop_start", "box"):
        stacked[name] = torch.from_numpy(np.stack([view[name] for view in views]))
    for name in ("slot", "view", "exam", "person"):
        stacked[name] = torch.tensor([int(view[name]) for view in views])
    if "target" in views[0]:
        stacked["target"] = torch.tensor([float(view["target"]) for view in views])
    return Exams(spacing_mm=spacing_mm, seed=seed, **stacked)


def tumour_centre(corpus: Corpus, exam: int) -> Triple:
    """The voxel in the middle of the tumour's box."""
    frame = corpus.frames(exam)[TUMOUR]
    where = np.nonzero(corpus.read(frame, (0, 0, 0), frame.shape))
    if not len(where[0]):
        x, y, z = (n // 2 for n in frame.shape)
    else:
        x, y, z = (int(axis.min() + axis.max()) // 2 for axis in where)
    return x, y, z


def most_sequences(corpus: Corpus) -> int:
    """The corpus' largest number of sequences in an exam: a width that no batch, rank or worker changes."""
    return int(corpus.num_sequences().max())


def person_codes(corpus: Corpus) -> npt.NDArray[np.int64]:
    """One number for each human of the corpus, by row of `corpus.exams`."""
    codes, _ = corpus.exams["person"].factorize(sort=True)
    return np.asarray(codes, dtype=np.int64)


def outside_of(view: Sample) -> npt.NDArray[np.int16]:
    """The stored number (S,) of background: a z-score of zero."""
    scale = np.where(view["present"], view["scale"], 1)
    return np.rint((view["mean"] - view["intercept"]) / scale).astype(np.int16)


def _grown(array: npt.NDArray[Any], size: npt.NDArray[np.int64], fill: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(S, X, Y, Z) up to `size`, with `fill` (S,) at the far ends."""
    if tuple(size) == array.shape[1:]:
        return array
    grown = np.empty((len(array), *size), dtype=array.dtype)
    grown[:] = fill[:, None, None, None]
    x, y, z = array.shape[1:]
    grown[:, :x, :y, :z] = array
    return grown
