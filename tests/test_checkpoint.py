"""A checkpoint is complete or absent, whatever ends the process that writes it, and never runs code."""

import errno
import json
import os
import resource
import shutil
import stat
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from umbif.errors import UmbifError
from umbif.scale import checkpoint_folder as folders
from umbif.scale import saver as saver_module
from umbif.scale import strategies
from umbif.scale.checkpoint import Checkpoints
from umbif.scale.checkpoint_folder import MANIFEST, SHARE, STATE, checkpoints, mark_damaged, prune, remove_leftovers
from umbif.scale.saver import Saver
from umbif.scale.shares import Share, held
from umbif.scale.strategies import chosen
from umbif.scale.tensor_file import ShareFiles

SHARE_0 = SHARE.format(0)
FULL = OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------- what comes back


def test_a_checkpoint_comes_back_bit_for_bit(folder: Path) -> None:
    assert torch.equal(read(folder / "step=000200"), values(200))
    assert torch.load(folder / "step=000200" / STATE, weights_only=True) == state(200)
    assert json.loads((folder / "step=000200" / MANIFEST).read_text())["corpus"] == "that of the test"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        save(tmp_path, step)
    assert chosen(tmp_path) == tmp_path / "step=1000000"
    assert [path.name for path in checkpoints(tmp_path)] == ["step=1000000", "step=999999", "step=000005"]


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == checkpoints(tmp_path / "absent") == []


DAMAGES = ("flip", "flip state", "cut", "extend", "no state", "no share", "no manifest", "empty manifest", "no key")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_for_the_one_before(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = folder / "step=000200"
    content = (newest / SHARE_0).read_bytes()
    {
        "flip": lambda: flip_a_bit(newest / SHARE_0),
        "flip state": lambda: flip_a_bit(newest / STATE),
        "cut": lambda: (newest / SHARE_0).write_bytes(content[:-1]),
        "extend": lambda: (newest / SHARE_0).write_bytes(content + b"\0"),
        "no state": (newest / STATE).unlink,
        "no share": (newest / SHARE_0).unlink,
        "no manifest": (newest / MANIFEST).unlink,
        "empty manifest": lambda: (newest / MANIFEST).write_bytes(b""),
        "no key": lambda: (newest / MANIFEST).write_text("{}"),
    }[damage]()
    assert chosen(folder) == folder / "step=000100"
    assert "Passed over the checkpoint step=000200" in caplog.text
    assert not newest.exists()  # nor does it count among those that are kept


def test_what_is_damaged_stays_where_it_is_if_all_are(folder: Path) -> None:
    for path in checkpoints(folder):
        flip_a_bit(path / STATE)
    with pytest.raises(UmbifError, match=r"All 2 checkpoints of .* are damaged; log\.txt says how\. To begin anew"):
        chosen(folder)
    assert len(checkpoints(folder)) == 2


def test_processes_that_do_not_see_the_same_checkpoints_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "all_gather", lambda value: [value, False if value is True else value])
    with pytest.raises(UmbifError, match=r"Process 1 does not see the checkpoint .*step=000200 yet.* in a minute"):
        chosen(folder)


def test_code_in_a_checkpoint_is_refused_when_it_is_written_and_not_run_when_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(UmbifError, match=r"keeps state that cannot be read again without running code \(Unsupported"):
        save(tmp_path, 100, extra=Payload(tmp_path / "ran"))
    strategy = strategies.Single(device=torch.device("cpu"))
    save(tmp_path, 200)
    torch.save({"extra": Payload(tmp_path / "ran")}, tmp_path / "step=000200" / STATE)
    manifest = json.loads((tmp_path / "step=000200" / MANIFEST).read_text())
    manifest["files"][STATE] = folders.fingerprint(tmp_path / "step=000200" / STATE)._asdict()  # type: ignore[union-attr]
    (tmp_path / "step=000200" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        strategy.load_checkpoint(tmp_path, weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_tensors_of_another_model_are_named(folder: Path) -> None:
    files = ShareFiles([folder / "step=000200" / SHARE_0])
    with pytest.raises(ValueError, match=r"model\.other is \[100\] now, and absent there"):
        files.fill(held("model.other", torch.empty(100)))
    with pytest.raises(ValueError, match=r"model\.weight is \[10, 10\] now, and \[100\] there"):
        files.fill(held("model.weight", torch.empty(10, 10)))


# ---------------------------------------------------------------- what goes wrong while it is written


def test_leftovers_are_no_checkpoints_and_are_removed(folder: Path) -> None:
    leftover = folder / ".step=000300.writing"
    leftover.mkdir()
    (leftover / STATE).write_bytes(b"half")
    assert chosen(folder) == folder / "step=000200"
    remove_leftovers(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step=000100", "step=000200"]


def test_a_leftover_does_not_hinder_the_next_save(folder: Path) -> None:
    (folder / ".step=000300.writing" / "deep").mkdir(parents=True)
    save(folder, 300)
    assert chosen(folder) == folder / "step=000300"
    assert sorted(path.name for path in (folder / "step=000300").iterdir()) == [MANIFEST, SHARE_0, STATE]


def test_a_copy_that_somebody_keeps_beside_is_no_checkpoint_and_stays(folder: Path) -> None:
    (folder / "step=000500.bak").mkdir()
    assert chosen(folder) == folder / "step=000200"
    assert (folder / "step=000500.bak").exists()


def test_a_file_system_that_cannot_bring_folders_to_the_disk_is_no_reason_to_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int, really: Any = os.fsync) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        really(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(folder, 300)
    assert chosen(folder) == folder / "step=000300"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("step", [200, 300])
@pytest.mark.parametrize(
    "broken", [(os, "fsync"), (Path, "rename"), (Path, "write_text"), (Path, "write_bytes"), (Path, "mkdir")]
)
def test_a_save_that_fails_leaves_the_earlier_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[Any, str], step: int, asynchronous: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FULL

    with monkeypatch.context() as full:
        full.setattr(*broken, fail)
        with pytest.raises(UmbifError, match=r"No space left.*Earlier ones are intact"):
            save(folder, step, asynchronous=asynchronous)
    assert chosen(folder) == folder / "step=000200"  # also when it was this one that was to be written again
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_really_full_leaves_the_earlier_ones(folder: Path, asynchronous: bool) -> None:
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UmbifError, match="could not be written: process 0: File too large"):
            save(folder, 300, size=200_000, asynchronous=asynchronous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert chosen(folder) == folder / "step=000200"
    assert not list(folder.glob(".*"))


def test_a_disk_without_room_is_found_out_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**25, 2**25))
    monkeypatch.setattr(saver_module, "write_shares", lambda *_: pytest.fail("a file was written"))
    with pytest.raises(UmbifError, match=r"has room for 0\.03 GiB, and it takes 0\.00"):
        save(folder, 300)
    assert not list(folder.glob(".*"))


def test_training_goes_on_after_a_save_that_failed_unless_it_is_to_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(asynchronous=True)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", MagicMock(side_effect=FULL))
        save(folder, 300, saver=saver)
    assert "step=000300 could not be written: process 0: No space left on device. Earlier ones are" in caplog.text
    assert "Training goes on, and tries again at the next one." in caplog.text
    save(folder, 400, saver=saver)
    assert chosen(folder) == folder / "step=000400"


def test_a_mistake_of_ours_ends_the_run_though_a_full_disk_would_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "write_shares", MagicMock(side_effect=KeyError("float8")))
    with pytest.raises(UmbifError, match="process 0: KeyError: 'float8'"):
        save(folder, 300, saver=Saver(asynchronous=True, stop_on_failure=False))
    assert chosen(folder) == folder / "step=000200"


def test_everything_is_on_the_disk_before_the_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        fsync(handle)

    def record_rename(self: Path, target: Path) -> Path:
        done.append((self.stat().st_dev == self.parent.stat().st_dev, self.parent == Path(target).parent))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(tmp_path, 100)
    path = tmp_path / "step=000100"
    inodes = [place.stat().st_ino for place in (path / SHARE_0, path / STATE, path / MANIFEST, path, tmp_path)]
    assert done == [*inodes[:4], (True, True), inodes[4]]


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        if path.name == MANIFEST:
            os._exit(9)
        really(path)

    really = folders.to_disk
    monkeypatch.setattr(folders, "to_disk", killed)
    if (child := os.fork()) == 0:
        save(tmp_path, 100)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert checkpoints(tmp_path) == []


# ---------------------------------------------------------------- beside training


def test_steps_that_are_taken_while_a_checkpoint_is_written_are_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    really = saver_module.write_shares

    def waits(path: Path, shares: Any) -> Any:
        assert go.wait(10)
        return really(path, shares)

    monkeypatch.setattr(saver_module, "write_shares", waits)
    saver, weight, plain = Saver(asynchronous=True), values(100), state(100)
    saver.save(tmp_path / "step=000100", plain, [held("model.weight", weight)], {})
    weight.zero_()
    plain["data"]["next_slot"] = -1
    saver.poll()
    assert checkpoints(tmp_path) == []
    go.set()
    saver.finish()
    assert torch.equal(read(tmp_path / "step=000100"), values(100))
    assert torch.load(tmp_path / "step=000100" / STATE, weights_only=True) == state(100)


def test_without_room_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "available_memory_bytes", lambda: 500)
    saver = Saver(asynchronous=True)
    saver.save(tmp_path / "step=000100", state(100), [held("model.weight", values(100))], {})
    assert checkpoints(tmp_path) == [tmp_path / "step=000100"]


# ---------------------------------------------------------------- which are kept


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path: Path, keep: int) -> None:
    callback, trainer = Checkpoints(every_n_steps=10, keep=keep), Saves(tmp_path)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    for trainer.global_step in range(1, 36):
        callback.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
        callback.on_train_batch_end(trainer, None)  # type: ignore[arg-type]  # a second micro-batch of the same step
    callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.saved == [10, 20, 30, 35]
    found = [int(path.name[5:]) for path in checkpoints(tmp_path / "checkpoints")]
    assert found == [35, 30, 20, 10][: max(2, keep)]


def test_a_run_that_is_asked_to_end_saves_the_step_that_it_ends_with(tmp_path: Path) -> None:
    callback, trainer = Checkpoints(every_n_steps=10), Saves(tmp_path)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    trainer.global_step, trainer.received_sigterm = 7, True
    callback.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    callback.on_exception(trainer, None, SIGTERMException())  # type: ignore[arg-type]
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step=000007"]


def test_those_of_every_so_many_steps_are_kept_for_good(tmp_path: Path) -> None:
    for step in range(10, 110, 10):
        save(tmp_path, step)
    prune(tmp_path, keep=2, keep_every_n_steps=40)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [100, 90, 80, 40]


def test_a_damaged_one_goes_once_enough_whole_ones_have_followed(folder: Path) -> None:
    mark_damaged(folder / "step=000200")
    prune(folder, keep=2, keep_every_n_steps=None)
    assert (folder / "damaged.step=000200").exists()
    save(folder, 300)
    prune(folder, keep=2, keep_every_n_steps=None)
    assert sorted(path.name for path in folder.iterdir()) == ["step=000100", "step=000300"]


def test_a_resumed_run_does_not_save_its_first_step_again(tmp_path: Path) -> None:
    callback, trainer = Checkpoints(every_n_steps=10), Saves(tmp_path, global_step=20)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    callback.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.saved == []


def test_training_goes_on_where_an_old_checkpoint_cannot_be_deleted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    save(folder, 300)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    prune(folder, keep=2, keep_every_n_steps=None)
    assert "step=000100 could not be deleted: Directory not empty" in caplog.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints."""
    for step in (100, 200):
        save(tmp_path, step)
    return tmp_path


class Payload:
    """What unpickles by writing a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Saves:
    """As much of a Trainer as saving needs."""

    def __init__(self, folder: Path, global_step: int = 0) -> None:
        self.default_root_dir, self.global_step = str(folder), global_step
        self.saved: list[int] = []
        self.fit_loop, self.strategy = MagicMock(), MagicMock()
        self.callbacks: list[Any] = []
        self.num_devices = self.world_size = 1
        self.received_sigterm = False

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(self.global_step)
        step = self.global_step
        self.strategy.saver.save(path, state(step), [held("model.weight", values(step))], {})


def values(step: int, size: int = 100) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step))


def state(step: int) -> dict[str, Any]:
    return {"global_step": step, "data": {"next_slot": 4 * step}}


def save(
    folder: Path, step: int, size: int = 100, asynchronous: bool = False, saver: Saver | None = None, **extra: Any
) -> None:
    saver = saver or Saver(asynchronous, stop_on_failure=True)
    shares = [held("model.weight", values(step, size))]
    saver.save(folder / f"step={step:06d}", state(step) | extra, shares, {"corpus": "that of the test"})
    saver.finish()


def read(path: Path) -> torch.Tensor:
    found = torch.empty(100)
    ShareFiles([path / SHARE_0]).fill(Share("model.weight", (100,), 0, found, everywhere=True))
    return found


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
