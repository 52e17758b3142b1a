"""Eight tiny exams as files, for every test that needs a corpus."""

from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from umbif.corpus.preprocess import Preparation

SHAPE, SPACING_MM = (20, 24, 22), 2.0
EXAMS = {  # two persons come twice; every number of sequences from one to four
    "P1_ses-1": "t1 t1ce t2 flair", "P1_ses-2": "t1 flair", "P2": "t1ce", "P3_ses-1": "t2 flair",
    "P3_ses-2": "t1 t1ce t2", "P4": "flair", "P5": "t1 t2 flair", "P6": "t1 t1ce t2 flair",
}  # fmt: skip
WITH_TUMOUR = ("P1_ses-1", "P4")


def write_exams(folder: Path, shape: tuple[int, int, int] = SHAPE, spacing_mm: float = SPACING_MM) -> None:
    """Writes `EXAMS`: flair is float32, the rest int16."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for exam, sequences in EXAMS.items():
        brain, tissue = _head(rng, shape)
        for sequence in sequences.split():
            values = brain * (tissue * rng.uniform(0.5, 2) + 20 * rng.random(shape) + rng.uniform(500, 900))
            values = values.astype(np.float32 if sequence == "flair" else np.int16)
            _write(folder / f"{exam}_{sequence}.nii.gz", values, spacing_mm)
        if exam in WITH_TUMOUR:
            tumour = brain & (tissue > np.percentile(tissue[brain], 90))
            _write(folder / f"{exam}_seg.nii.gz", tumour.astype(np.uint8), spacing_mm)


def index_exams(folder: Path) -> pd.DataFrame:
    """Their manifest: P3 and P4 are the test split."""
    from umbif.corpus.index import build_manifest

    return build_manifest([folder], test_fraction=0.25, seed=8, num_workers=0)


def preparation_of(spacing_mm: float = SPACING_MM) -> "Preparation":
    """How they are prepared."""
    from umbif.corpus.preprocess import Preparation

    return Preparation(spacing_mm=spacing_mm, min_brain_ml=5.0)


def prepare_exams(manifest: pd.DataFrame, folder: Path, preparation: "Preparation") -> Path:
    """Their corpus."""
    from umbif.corpus.prepare import merge, prepare_corpus

    prepare_corpus(manifest, folder, preparation, num_workers=0)
    merge(manifest, folder)
    return folder


def write_corpus(place: Path, shape: tuple[int, int, int] = SHAPE, spacing_mm: float = SPACING_MM) -> Path:
    """All of it."""
    write_exams(place / "TINY", shape, spacing_mm)
    return prepare_exams(index_exams(place / "TINY"), place / "corpus", preparation_of(spacing_mm))


def _head(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid, and waves within it."""
    where = [np.arange(n) - n / 2 + rng.uniform(-1, 1) for n in shape]
    x, y, z = np.meshgrid(*where, indexing="ij")
    brain = sum((axis / rng.uniform(0.35, 0.42) / n) ** 2 for axis, n in zip((x, y, z), shape, strict=True)) < 1
    return brain, 100 * (np.sin(x / rng.uniform(2, 4)) + np.cos(y / rng.uniform(2, 4)) + np.sin(z / 3))


def _write(path: Path, data: np.ndarray, spacing_mm: float) -> None:
    nib.save(nib.Nifti1Image(data, np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1])), path)
