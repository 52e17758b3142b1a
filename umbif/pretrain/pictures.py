"""Pictures of what a pretraining run has learnt, in scanner orientation."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from umbif.encoders.vit import ViT3D
from umbif.pages.pictures import three_planes
from umbif.stream.exams import SEQUENCES, Exams, WholeBrainDataset, collate
from umbif.stream.modules import PretrainData

VISIBLE_SHARE = 0.25  # enough that a person can judge the rest


class Reconstructs(Protocol):
    """A method with a decoder of voxels."""

    encoder: ViT3D

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def shown_and_predicted(self, exams: Exams, visible_share: float) -> tuple[Tensor, Tensor]:
        """See `UMBIF.shown_and_predicted`."""


def held_out_exam(data: PretrainData) -> Exams:
    """The whole brain of one held-out exam, or of a training exam where none is held out."""
    held_out = data.exams("test")
    rows = held_out if len(held_out) else data.exams("train")
    dataset = WholeBrainDataset(data.corpus, rows[:1], np.zeros(1, dtype=np.float32))
    return collate([dataset[0]], spacing_mm=data.corpus.spacing_mm, seed=data.position.seed)


def write_reconstruction(module: Reconstructs, exams: Exams, folder: Path) -> list[Path]:
    """Input, visible part and prediction of the batch's first exam: a PNG for each of its sequences.

    Args:
        module: In evaluation mode.
        exams: Whole brains or crops, as the corpus stores them.
        folder: Where the pictures go.
    """
    exams = exams.padded(module.encoder.patch_size)
    images = exams.z_scores()
    both = module.shown_and_predicted(exams.to(module.device), VISIBLE_SHARE)
    shown, predicted = (volumes.float().cpu() for volumes in both)
    folder.mkdir(parents=True, exist_ok=True)
    brain = exams.brain[0]
    paths = []
    for entry in torch.nonzero(exams.present[0])[:, 0].tolist():
        image = images[0, entry]
        dark = image[brain].min()
        whole = torch.where(predicted[0, entry].isnan(), shown[0, entry], predicted[0, entry]).nan_to_num(float(dark))
        rows = [
            ("input", _on_dark(image, brain, dark)),
            ("visible", _on_dark(shown[0, entry], brain, dark)),
            ("predicted", _on_dark(whole, brain, dark)),
        ]
        paths.append(folder / f"reconstruction_{SEQUENCES[int(exams.sequence[0, entry])]}.png")
        aside = paths[-1].with_name(f".{paths[-1].name}.writing")  # a page may be reading the old one
        three_planes(rows, spacing_mm=exams.spacing_mm, shared_window=True).savefig(aside, dpi=110, format="png")
        aside.replace(paths[-1])
    return paths


def _on_dark(values: Tensor, brain: Tensor, dark: Tensor) -> np.ndarray:
    return torch.where(brain, values, dark).numpy()
