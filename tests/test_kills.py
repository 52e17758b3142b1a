"""A save that is killed at any byte leaves a checkpoint to go on from: the new one or the one before, bit for bit."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from umbif.scale.checkpoint_folder import checkpoints

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def killing() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("_kills")


@pytest.mark.parametrize("kind", ["whole", "with a moving average", "by two processes", "by two, beside training"])
def test_a_save_that_is_killed_anywhere_leaves_a_checkpoint(tmp_path: Path, killing: ModuleType, kind: str) -> None:
    found = [*killing.kills(tmp_path, killing.KINDS[kind])]
    assert all(killed.is_intact for killed in found)
    assert len(found) == killing.POINTS
    assert not all(killed.is_new for killed in found), "no kill has hit a save"


def test_a_save_after_a_killed_one_is_complete(tmp_path: Path, killing: ModuleType) -> None:
    assert [*killing.kills(tmp_path, killing.Kind(beside=True), num_points=2)]
    killing._save(tmp_path, 300, killing.Kind(beside=True))
    assert checkpoints(tmp_path)[0] == tmp_path / "step=000300"
