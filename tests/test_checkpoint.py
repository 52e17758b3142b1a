"""A checkpoint is complete or absent, whatever ends the process that writes it, and never runs code."""

import errno
import json
import os
import resource
import stat
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from umbif.errors import UmbifError
from umbif.scale import checkpoint as module
from umbif.scale.checkpoint import (
    MANIFEST,
    STATE,
    AtomicCheckpointIO,
    Checkpoints,
    checkpoints,
    newest_complete,
    remove_leftovers,
)


def test_a_checkpoint_comes_back_bit_for_bit(folder):
    found = AtomicCheckpointIO().load_checkpoint(folder / "step=000200")
    assert found["global_step"] == 200
    assert torch.equal(found["state_dict"]["weight"], state(200)["state_dict"]["weight"])
    assert json.loads((folder / "step=000200" / MANIFEST).read_text())["step"] == 200


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 5):
        save(tmp_path, step)
    assert newest_complete(tmp_path) == tmp_path / "step=1000000"
    assert [path.name for path in checkpoints(tmp_path)] == ["step=1000000", "step=999999", "step=000005"]


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert newest_complete(tmp_path) is None
    assert newest_complete(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "extend", "no state", "no manifest", "empty manifest", "no key"])
def test_a_damaged_newest_is_passed_over_for_the_one_before(folder, damage, caplog):
    newest = folder / "step=000200"
    content = bytearray((newest / STATE).read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: (newest / STATE).write_bytes(content),
        "cut": lambda: (newest / STATE).write_bytes(content[:-1]),
        "extend": lambda: (newest / STATE).write_bytes(content + b"\0"),
        "no state": (newest / STATE).unlink,
        "no manifest": (newest / MANIFEST).unlink,
        "empty manifest": lambda: (newest / MANIFEST).write_bytes(b""),
        "no key": lambda: (newest / MANIFEST).write_text("{}"),
    }[damage]()
    assert newest_complete(folder) == folder / "step=000100"
    assert "Passed over the checkpoint step=000200" in caplog.text


def test_leftovers_are_no_checkpoints_and_are_removed(folder):
    leftover = folder / ".step=000300.writing"
    leftover.mkdir()
    (leftover / STATE).write_bytes(b"half")
    assert newest_complete(folder) == folder / "step=000200"
    remove_leftovers(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step=000100", "step=000200"]


def test_a_leftover_does_not_hinder_the_next_save(folder):
    (folder / ".step=000300.writing" / "deep").mkdir(parents=True)
    save(folder, 300)
    assert newest_complete(folder) == folder / "step=000300"
    assert sorted(path.name for path in (folder / "step=000300").iterdir()) == [MANIFEST, STATE]


def test_a_copy_that_somebody_keeps_beside_is_no_checkpoint_and_stays(folder):
    (folder / "step=000500.bak").mkdir()
    assert newest_complete(folder) == folder / "step=000200"
    assert (folder / "step=000500.bak").exists()


def test_training_goes_on_where_an_old_checkpoint_cannot_be_deleted(tmp_path, monkeypatch, caplog):
    callback, trainer = Checkpoints(every_n_steps=1, keep=2), MagicMock(is_global_zero=True, default_root_dir=tmp_path)
    callback.setup(trainer, MagicMock(), "fit")
    trainer.save_checkpoint = lambda path: save(path.parent, trainer.global_step)
    (tmp_path / "checkpoints").mkdir()

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(module.shutil, "rmtree", rmtree)
    for trainer.global_step in (1, 2, 3):
        callback.save(trainer)
    assert "step=000001 could not be deleted: Directory not empty" in caplog.text


def test_a_file_system_that_cannot_bring_folders_to_the_disk_is_no_reason_to_stop(folder, monkeypatch):
    def fsync(handle: int, really=os.fsync) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        really(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(folder, 300)
    assert newest_complete(folder) == folder / "step=000300"


@pytest.mark.parametrize("step", [200, 300])
@pytest.mark.parametrize("broken", [(torch, "save"), (os, "fsync"), (Path, "rename"), (Path, "write_text")])
def test_a_save_that_fails_leaves_the_earlier_ones(folder, monkeypatch, broken, step):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(*broken, fail)
        with pytest.raises(UmbifError, match=r"No space left.*Earlier ones are intact"):
            save(folder, step)
    assert newest_complete(folder) == folder / "step=000200"  # also when it was this one that was to be written again
    assert not list(folder.glob(".*"))


def test_a_disk_that_is_really_full_leaves_the_earlier_ones(folder):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # torch's own writer fails in C++, with another error
    try:
        with pytest.raises(UmbifError, match="could not be written"):
            save(folder, 300, size=200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_complete(folder) == folder / "step=000200"
    assert not list(folder.glob(".*"))


def test_everything_is_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(handle):
        done.append(os.fstat(handle).st_ino)
        fsync(handle)

    def record_rename(self, target):
        done.append((self.stat().st_dev == self.parent.stat().st_dev, self.parent == Path(target).parent))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(tmp_path, 100)
    path = tmp_path / "step=000100"
    inodes = [place.stat().st_ino for place in (path / STATE, path / MANIFEST, path, tmp_path)]
    assert done == [*inodes[:3], (True, True), inodes[3]]


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    def killed(path):
        if path.name == MANIFEST:
            raise KeyboardInterrupt
        return real(path)

    real = module.to_disk
    monkeypatch.setattr(module, "to_disk", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 100)
    assert newest_complete(tmp_path) is None


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    save(tmp_path, 100, extra=Payload(tmp_path / "ran"))
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step=000100")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step=000100", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path, keep):
    callback = Checkpoints(every_n_steps=10, keep=keep)
    trainer = Saves(tmp_path)
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, None)
    for trainer.global_step in range(1, 36):
        callback.on_train_batch_end(trainer, None)
        callback.on_train_batch_end(trainer, None)  # a second micro-batch of the same step
    callback.on_train_end(trainer, None)
    assert trainer.saved == [10, 20, 30, 35]
    found = [int(path.name[5:]) for path in checkpoints(tmp_path / "checkpoints")]
    assert found == [35, 30, 20, 10][: max(2, keep)]


def test_a_resumed_run_does_not_save_its_first_step_again(tmp_path):
    callback = Checkpoints(every_n_steps=10)
    trainer = Saves(tmp_path, global_step=20)
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, None)
    callback.on_train_batch_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert trainer.saved == []


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two checkpoints."""
    for step in (100, 200):
        save(tmp_path, step)
    return tmp_path


class Payload:
    """What unpickles by writing a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Saves:
    """As much of a Trainer as saving needs."""

    is_global_zero = True

    def __init__(self, folder: Path, global_step: int = 0) -> None:
        self.default_root_dir, self.global_step = str(folder), global_step
        self.saved: list[int] = []
        self.fit_loop = MagicMock()

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(self.global_step)
        AtomicCheckpointIO().save_checkpoint(state(self.global_step), path)


def state(step: int, size: int = 100) -> dict:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(step))
    return {"global_step": step, "state_dict": {"weight": weight}, "PretrainData": {"next_slot": 4 * step}}


def save(folder: Path, step: int, size: int = 100, **extra) -> None:
    AtomicCheckpointIO().save_checkpoint(state(step, size) | extra, folder / f"step={step:06d}")
