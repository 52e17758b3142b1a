"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
from exams import index_exams, preparation_of, prepare_exams, write_exams

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
    folder = tmp_path_factory.mktemp("cohort") / "TINY"
    write_exams(folder)
    return index_exams(folder)


@pytest.fixture(scope="session")
def preparation():
    """How the tiny exams are prepared."""
    return preparation_of()


@pytest.fixture(scope="session")
def corpus(manifest, preparation, tmp_path_factory):
    """The tiny exams, prepared; for reading only."""
    from umbif.corpus.shards import Corpus

    return Corpus(prepare_exams(manifest, tmp_path_factory.mktemp("corpus"), preparation))


@pytest.fixture(scope="session")
def corpus_folder(corpus) -> Path:
    """Where that corpus lies."""
    return corpus.folder
