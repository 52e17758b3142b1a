"""The main job on real glioma exams, from files as their authors published them to a picture of a reconstruction."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import center_of_mass

from umbif.corpus.index import build_manifest
from umbif.corpus.prepare import merge, prepare_corpus
from umbif.corpus.preprocess import Preparation
from umbif.corpus.shards import TUMOUR, Corpus
from umbif.fit import fit
from umbif.recipe.compose import compose

EXAMS = ("BraTS2021_00006", "TCGA-FG-6692/atlas_bet", "TCGA-DU-7294/native_bet")


@pytest.fixture(scope="module")
def corpus(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("real") / "corpus"
    sources = [real_data / name for name in EXAMS]
    manifest = build_manifest(sources, dataset="glioma", test_fraction=0.34, num_workers=2)
    prepare_corpus(manifest, folder, Preparation(spacing_mm=2.0), num_workers=0)
    merge(manifest, folder)
    return Corpus(folder)


def test_three_exams_with_four_sequences_each(corpus: Corpus) -> None:
    assert sorted(corpus.exams["subject"]) == ["BraTS2021_00006", "TCGA-DU-7294", "TCGA-FG-6692"]
    assert all(set(corpus.sequences(exam)) == {"t1", "t1ce", "t2", "flair"} for exam in range(3))


def test_the_tumour_stays_where_it_was(corpus: Corpus, real_data: Path) -> None:
    """Orientation, resampling and cropping may not move anatomy: compared in scanner millimetres."""
    exam = corpus.exams.index[corpus.exams["subject"] == "TCGA-FG-6692"][0]
    frame = corpus.frames(exam)[TUMOUR]
    ours = corpus.affine(exam) @ [*center_of_mass(corpus.read(frame, (0, 0, 0), frame.shape)), 1]
    source = nib.load(real_data / "TCGA-FG-6692/atlas_bet/TCGA-FG-6692_seg_fused-mav.nii.gz")
    theirs = source.affine @ [*center_of_mass(np.asarray(source.dataobj) > 0), 1]
    assert np.abs(ours - theirs).max() < 1.0


def test_pretraining_learns_and_draws_what_it_learnt(corpus: Corpus, tmp_path: Path) -> None:
    run = fit(
        compose(
            "pretrain/umbif_tiny",
            [f"data.corpus={corpus.folder}", f"run.dir={tmp_path / 'run'}", "trainer.max_steps=100",
             "data.global_batch_size=8", "data.num_workers=0", "model.lr=3e-2"],
        )
    )
    metrics = pd.read_csv(run / "metrics.csv")
    loss = metrics["train/reconstruction"].dropna()
    assert loss.iloc[-1] < 0.95 * loss.iloc[0]
    assert loss.iloc[-1] < 1.0  # a normalised patch predicted as its mean costs exactly 1
    assert len(list((run / "figures").glob("reconstruction_*.png"))) == 4


def test_odd_and_broken_files_never_stop_the_work(real_data: Path, tmp_path: Path) -> None:
    folders = ("nibabel", "nifti-reader-js", "niivue-demos", "derived", "TCGA-DU-7294/broken")
    manifest = build_manifest([real_data / name for name in folders], num_workers=2)
    how = Preparation(spacing_mm=2.0, min_brain_ml=1.0, allow_faces=True)
    prepare_corpus(manifest, tmp_path / "corpus", how, num_workers=0)
    merge(manifest, tmp_path / "corpus")
    assert len(Corpus(tmp_path / "corpus")) >= 3
    bad = manifest[manifest["status"] != "ok"]
    assert (bad["reason"] != "").all()
    assert (bad["detail"].str.len() > 20).all()
