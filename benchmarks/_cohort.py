"""The synthetic exams of `learn.py`: unlabelled ones to pretrain on, a placebo of them, and a clinic with outcomes."""

import functools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from filelock import FileLock

from umbif.corpus.index import build_manifest
from umbif.corpus.manifest import write_manifest
from umbif.corpus.phantom import write_phantom
from umbif.corpus.prepare import merge, prepare_corpus
from umbif.corpus.preprocess import Preparation
from umbif.corpus.shards import Corpus
from umbif.machine import num_cores

SPACING_MM = 2.0
HEALTHY = 0.25  # of the people
UNLABELLED_SEED, SHUFFLE_SEED = 1001, 1003
CLINIC_SEED = 1005  # others judged the tuning (1002) and the first full run (1004)
TEST_FRACTION = 0.47  # of the clinic's people


@dataclass(frozen=True)
class Size:
    """How many exams."""

    unlabelled: int
    clinic: int


FULL = Size(unlabelled=400, clinic=680)


@dataclass(frozen=True)
class Cohort:
    """Folders of prepared corpora, and what is true of the clinic's exams."""

    unlabelled: Path
    placebo: Path
    clinic: Path
    truth: pd.DataFrame  # one row for each row of the clinic's `Corpus.exams`


def make_cohort(folder: Path, size: Size) -> Cohort:
    """Makes what is missing; the same call goes on where it was stopped, and a second process waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        unlabelled = make_corpus(folder, "unlabelled", size.unlabelled, UNLABELLED_SEED)
        shuffle(folder / "phantom_unlabelled", folder / "phantom_placebo")
        placebo = prepare(folder / "phantom_placebo", folder / "placebo", 0.0)
        clinic = make_corpus(folder, "clinic", size.clinic, CLINIC_SEED, TEST_FRACTION)
    return Cohort(unlabelled, placebo, clinic, truth_of(Corpus(clinic), folder / "phantom_clinic"))


def make_corpus(folder: Path, name: str, num: int, seed: int, test_fraction: float = 0.0) -> Path:
    """Synthetic exams in `folder`, and the corpus that they are prepared to."""
    files = folder / f"phantom_{name}"
    write_phantom(files, num, spacing_mm=SPACING_MM, seed=seed, healthy=HEALTHY)
    return prepare(files, folder / name, test_fraction)


def prepare(files: Path, folder: Path, test_fraction: float) -> Path:
    """A corpus of NIfTI files."""
    if not (folder / "index.parquet").exists():
        manifest = build_manifest([files], dataset=folder.name, test_fraction=test_fraction)
        write_manifest(manifest, folder.with_suffix(".parquet"))
        prepare_corpus(manifest, folder, Preparation(spacing_mm=SPACING_MM))
        merge(manifest, folder)
    return folder


def truth_of(corpus: Corpus, phantom: Path) -> pd.DataFrame:
    """What the phantom knows of each exam of a corpus, in the corpus' order."""
    keys = ["subject", "session"]
    tables = [pd.read_csv(phantom / name, dtype={"session": str}) for name in ("truth.csv", "labels.csv")]
    for table in tables:
        table["session"] = table["session"].fillna("").str.removeprefix("ses-")  # as an index writes it
    known = tables[0].merge(tables[1][[*keys, "site", "age"]], on=keys)
    exams = corpus.exams[[*keys, "exam", "person", "split"]]
    return exams.merge(known.drop(columns="person"), on=keys, how="left", validate="one_to_one")


def shuffle(source: Path, target: Path) -> None:
    """Copies NIfTI files with the voxels of each brain in random order: the histogram stays, the anatomy goes."""
    files = sorted(source.rglob("*.nii.gz"))
    todo = [(n, file) for n, file in enumerate(files) if not (target / file.relative_to(source)).exists()]
    work = functools.partial(_shuffle_file, source=source, target=target)
    if todo:
        with ProcessPoolExecutor(num_cores(), get_context("spawn")) as pool:
            list(pool.map(work, *zip(*todo, strict=True)))


def _shuffle_file(number: int, file: Path, source: Path, target: Path) -> None:
    path = target / file.relative_to(source)
    image = nib.load(file)
    voxels = np.asarray(image.dataobj)
    inside = voxels > 0
    if not file.name.endswith("_seg.nii.gz"):
        voxels[inside] = np.random.default_rng((SHUFFLE_SEED, number)).permutation(voxels[inside])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), aside)
    aside.rename(path)
