"""Fixtures that every test may use."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
SHAPE, SPACING_MM = (20, 24, 22), 2.0
EXAMS = {  # two persons come twice; every number of sequences from one to four
    "P1_ses-1": "t1 t1ce t2 flair", "P1_ses-2": "t1 flair", "P2": "t1ce", "P3_ses-1": "t2 flair",
    "P3_ses-2": "t1 t1ce t2", "P4": "flair", "P5": "t1 t2 flair", "P6": "t1 t1ce t2 flair",
}  # fmt: skip
WITH_TUMOUR = ("P1_ses-1", "P4")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real exams, or a skip that says where it was looked for."""
    folder = os.environ.get("UMBIF_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"real exams not found: UMBIF_TEST_DATA is {folder or 'not set'}")
    return Path(folder)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """Eight tiny exams at 2 mm (see `EXAMS`): flair is float32, the rest int16; P3 and P4 are the test split."""
    from umbif.corpus.index import build_manifest

    folder = tmp_path_factory.mktemp("cohort") / "TINY"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for exam, sequences in EXAMS.items():
        brain, tissue = _head(rng)
        for sequence in sequences.split():
            values = brain * (tissue * rng.uniform(0.5, 2) + 20 * rng.random(SHAPE) + rng.uniform(500, 900))
            _write(folder / f"{exam}_{sequence}.nii.gz", values.astype(np.float32 if sequence == "flair" else np.int16))
        if exam in WITH_TUMOUR:
            tumour = brain & (tissue > np.percentile(tissue[brain], 90))
            _write(folder / f"{exam}_seg.nii.gz", tumour.astype(np.uint8))
    return build_manifest([folder], test_fraction=0.25, seed=8, num_workers=0)


@pytest.fixture(scope="session")
def preparation():
    """How the tiny exams are prepared."""
    from umbif.corpus.preprocess import Preparation

    return Preparation(spacing_mm=SPACING_MM, min_brain_ml=5.0)


@pytest.fixture(scope="session")
def corpus(manifest, preparation, tmp_path_factory):
    """The tiny exams, prepared; for reading only."""
    from umbif.corpus.prepare import merge, prepare_corpus
    from umbif.corpus.shards import Corpus

    folder = tmp_path_factory.mktemp("corpus")
    prepare_corpus(manifest, folder, preparation, num_workers=0)
    merge(manifest, folder)
    return Corpus(folder)


def _head(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid, and waves within it."""
    where = [np.arange(n) - n / 2 + rng.uniform(-1, 1) for n in SHAPE]
    x, y, z = np.meshgrid(*where, indexing="ij")
    brain = sum((axis / rng.uniform(0.35, 0.42) / n) ** 2 for axis, n in zip((x, y, z), SHAPE, strict=True)) < 1
    return brain, 100 * (np.sin(x / rng.uniform(2, 4)) + np.cos(y / rng.uniform(2, 4)) + np.sin(z / 3))


def _write(path: Path, data: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(data, np.diag([-SPACING_MM, -SPACING_MM, SPACING_MM, 1])), path)


@pytest.fixture(scope="session")
def corpus_folder(corpus) -> Path:
    """Where that corpus lies."""
    return corpus.folder
