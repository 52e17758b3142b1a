"""One checkpoint on its way to the disk, written by all processes at once and beside training."""

import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch

from umbif.errors import UmbifError, one_line
from umbif.files import to_disk
from umbif.machine import available_memory_bytes
from umbif.scale import checkpoint_folder as folders
from umbif.scale.checkpoint_folder import SHARE, STATE
from umbif.scale.ranks import all_gather, all_true, num_ranks, rank
from umbif.scale.shares import Share
from umbif.scale.tensor_file import EMPTY, Fingerprint, num_bytes_of, write_shares

MEMORY_SHARE = 0.5  # of what is free, for tensors that wait to be written
log = logging.getLogger("umbif")


class Trouble(NamedTuple):
    """What went wrong.

    Args:
        what: For people.
        passes: It may go well the next time, as where a disk is full.
    """

    what: str
    passes: bool


class Saver:
    """Saves, and tells later whether that went well. Every call is one of all processes.

    Args:
        asynchronous: Copy the tensors aside, and write while training goes on, if the memory allows it.
        stop_on_failure: Whether a checkpoint that cannot be written ends the run.
    """

    def __init__(self, asynchronous: bool = True, stop_on_failure: bool = False) -> None:
        self.asynchronous, self.stop_on_failure = asynchronous, stop_on_failure
        self.num_siblings = 1  # processes that share this machine's memory
        self.writing: _Writing | None = None

    def save(self, path: Path, state: Mapping[str, Any], shares: Iterable[Share], about: Mapping[str, Any]) -> None:
        """Begins a checkpoint, once the one before has ended.

        Raises:
            UmbifError: One could not be written, and that is to end the run; or `state` is none that can be read again.
        """
        self.finish()
        content = in_bytes(state)
        mine = [share for share in shares if share.num]
        if self._begun(path, num_bytes_of(mine)):
            beside = self.asynchronous and all_true(_room_for(mine, self.num_siblings))
            self.writing = _Writing(path, content, [_copy(share) for share in mine] if beside else mine, about)
            self.writing.start(beside)
            if not beside:
                self.finish()

    def poll(self) -> None:
        """Completes the checkpoint on its way once all processes have written their part."""
        if self.writing is not None and all_true(self.writing.has_ended()):
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint on its way, and completes it."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        writing.wait()
        troubles = [trouble for trouble in all_gather(writing.trouble) if trouble is not None]
        files = {name: found for of_rank in all_gather(writing.files) for name, found in of_rank.items()}
        if not troubles and rank() == 0:
            assert set(files) == {STATE, *(SHARE.format(i) for i in range(num_ranks()))}
            troubles = _troubles(lambda: folders.publish(writing.path, files, writing.about))
        self._went_well(writing.path, all_gather(troubles)[0])

    def _begun(self, path: Path, num_bytes: int) -> bool:
        needed = sum(all_gather(num_bytes))
        troubles = _troubles(lambda: folders.begin(path, needed)) if rank() == 0 else []
        return self._went_well(path, all_gather(troubles)[0])

    def _went_well(self, path: Path, troubles: list[Trouble]) -> bool:
        """Whether it did; said once where it did not."""
        if not troubles:
            return True
        if rank() == 0:
            folders.discard(path)
        said = "; ".join(trouble.what for trouble in troubles)
        message = f"The checkpoint {path} could not be written: {said}. Earlier ones are intact."
        if self.stop_on_failure or not all(trouble.passes for trouble in troubles):
            raise UmbifError(message)
        if rank() == 0:
            log.warning("%s Training goes on, and tries again at the next one.", message)
        return False


class _Writing:
    """The part of this process."""

    def __init__(self, path: Path, state: bytes, shares: list[Share], about: Mapping[str, Any]) -> None:
        self.path, self.state, self.shares, self.about = path, state, shares, about
        self.files: dict[str, Fingerprint] = {}
        self.trouble: Trouble | None = None
        self.thread: threading.Thread | None = None

    def start(self, beside: bool) -> None:
        if not beside:
            self._write()
            return
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def has_ended(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def _write(self) -> None:
        self.trouble = next(iter(_troubles(self._write_files)), None)
        self.shares = []  # copies

    def _write_files(self) -> None:
        aside, name = folders.aside_of(self.path), SHARE.format(rank())
        self.files[name] = write_shares(aside / name, self.shares)
        if rank() == 0:
            (aside / STATE).write_bytes(self.state)
            to_disk(aside / STATE)
            self.files[STATE] = EMPTY.after(self.state)


def in_bytes(state: Mapping[str, Any]) -> bytes:
    """Plain values as they are now, in a form that can be read without running code.

    Raises:
        UmbifError: They cannot.
    """
    buffer = BytesIO()
    torch.save(dict(state), buffer)
    try:
        torch.load(BytesIO(buffer.getvalue()), weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"Unsupported.*?(?=\.? was not|$)", str(error), re.MULTILINE)
        why = found[0] if found else one_line(error)
        what = f"A callback or module keeps state that cannot be read again without running code ({why})"
        raise UmbifError(f"{what}: keep numbers, texts, lists and tensors.") from error
    return buffer.getvalue()


def _troubles(work: Callable[[], None]) -> list[Trouble]:
    """What went wrong, to be told to the others: none of them may wait for one that has left."""
    try:
        work()
    except OSError as error:
        return [Trouble(f"process {rank()}: {error.strerror or error}", passes=True)]
    except Exception as error:
        return [Trouble(f"process {rank()}: {type(error).__name__}: {error}", passes=False)]
    return []


def _room_for(shares: list[Share], num_siblings: int) -> bool:
    free = available_memory_bytes()
    return free is None or num_bytes_of(shares) * num_siblings < MEMORY_SHARE * free


def _copy(share: Share) -> Share:
    """In this process' memory, where no later step changes it."""
    return replace(share, memory=share.memory.detach().to("cpu", copy=True))
