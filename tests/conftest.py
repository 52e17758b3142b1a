"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real exams, or a skip that says where it was looked for."""
    folder = os.environ.get("UMBIF_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"real exams not found: UMBIF_TEST_DATA is {folder or 'not set'}")
    return Path(folder)
