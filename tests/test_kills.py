"""A save that is killed at any byte leaves a checkpoint to go on from: the new one or the one before, bit for bit."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from umbif.scale.checkpoint_folder import MANIFEST, SHARE, STATE, checkpoints

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
    assert not all(killed.is_new for killed in found[1:]), "no kill has hit a save"  # the first comes before any byte


def test_a_save_after_a_killed_one_is_complete(tmp_path: Path, killing: ModuleType) -> None:
    assert [*killing.kills(tmp_path, killing.Kind(beside=True), num_points=2)]
    killing._save(tmp_path, 300, killing.Kind(beside=True))
    assert checkpoints(tmp_path)[0] == tmp_path / "step=000300"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: the system's view is not tested")
def test_the_system_is_asked_to_bring_all_to_the_disk_before_the_name_is_given(tmp_path: Path) -> None:
    checkpoints_in, trace = tmp_path / "checkpoints", tmp_path / "trace"
    program = f"from test_checkpoint import save; from pathlib import Path; save(Path({str(checkpoints_in)!r}), 100)"
    watch = ["strace", "-f", "--seccomp-bpf", "-y", "-e", "trace=fsync,rename", "-o", trace]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([*watch, sys.executable, "-c", program], env=paths, check=True, timeout=120)
    lines = trace.read_text().splitlines()
    aside, path = checkpoints_in / ".step=000100.writing", checkpoints_in / "step=000100"
    renamed = next(i for i, line in enumerate(lines) if f'rename("{aside}", "{path}") = 0' in line)
    for place in (aside / SHARE.format(0), aside / STATE, aside / MANIFEST, aside):
        assert any(f"<{place}>" in line for line in lines[:renamed]), place
    assert not [line for line in lines[:renamed] if "fsync" in line and "= -1" in line]
    begun, ended = (sum(word in line for line in lines[:renamed]) for word in ("unfinished", "resumed"))
    assert begun == ended
    assert any(f"<{checkpoints_in}>) = 0" in line for line in lines[renamed:])
