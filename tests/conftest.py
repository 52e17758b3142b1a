"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
from exams import SPACING_MM, write_exams

os.environ.setdefault("OMP_NUM_THREADS", "1")


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
    write_exams(folder)
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


@pytest.fixture(scope="session")
def corpus_folder(corpus) -> Path:
    """Where that corpus lies."""
    return corpus.folder
