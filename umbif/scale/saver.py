"""One checkpoint on its way to the disk, written by all processes at once and beside training."""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from umbif.errors import UmbifError, one_line
from umbif.files import to_disk
from umbif.machine import available_memory_bytes
from umbif.scale import checkpoint_folder as folders
from umbif.scale.checkpoint_folder import SHARE, STATE
from umbif.scale.ranks import all_of, num_ranks, rank, told
from umbif.scale.shares import Share
from umbif.scale.tensor_file import Fingerprint, num_bytes_of, write_shares

FATAL = " (a mistake of UMBIF's own)"  # ends the run: the next time would be the same
MEMORY_SHARE = 0.5  # of what is free, for tensors that wait to be written
log = logging.getLogger("umbif")


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
        self.stall_s = 0.0

    def save(self, path: Path, state: Mapping[str, Any], shares: Iterable[Share], about: Mapping[str, Any]) -> None:
        """Begins a checkpoint, once the one before has ended.

        Raises:
            UmbifError: One could not be written, and that is to end the run; or `state` is none that can be read again.
        """
        start = time.perf_counter()
        self.finish()
        content = in_bytes(state)
        mine = [share for share in shares if share.num]
        if self._begun(path, num_bytes_of(mine)):
            beside = self.asynchronous and all_of(_room_for(mine, self.num_siblings))
            self.writing = _Writing(path, content, [_copy(share) for share in mine] if beside else mine, about)
            self.writing.start(beside)
            if not beside:
                self.finish()
        self.stall_s += time.perf_counter() - start

    def poll(self) -> None:
        """Completes the checkpoint on its way once all processes have written their part."""
        if self.writing is not None and all_of(self.writing.has_ended()):
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint on its way, and completes it."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        writing.wait()
        problems = [f"process {i}: {problem}" for i, problem in enumerate(told(writing.problem)) if problem]
        files = {name: found for of_rank in told(writing.files) for name, found in of_rank.items()}
        if not problems and rank() == 0:
            assert set(files) == {STATE, *(SHARE.format(i) for i in range(num_ranks()))}
            problems = _tried(lambda: folders.publish(writing.path, files, writing.about))
        self._told_apart(writing.path, told(problems)[0])

    def _begun(self, path: Path, num_bytes: int) -> bool:
        needed = sum(told(num_bytes))
        problems = _tried(lambda: folders.begin(path, needed)) if rank() == 0 else []
        return self._told_apart(path, told(problems)[0])

    def _told_apart(self, path: Path, problems: list[str]) -> bool:
        """Whether it went well, said once where it did not."""
        if not problems:
            return True
        if rank() == 0:
            folders.discard(path)
        message = f"The checkpoint {path} could not be written: {'; '.join(problems)}. Earlier ones are intact."
        if self.stop_on_failure or FATAL in message:
            raise UmbifError(message)
        if rank() == 0:
            log.warning("%s Training goes on, and tries again at the next one.", message)
        return False


class _Writing:
    """The part of this process."""

    def __init__(self, path: Path, state: bytes, shares: list[Share], about: Mapping[str, Any]) -> None:
        self.path, self.state, self.shares, self.about = path, state, shares, about
        self.files: dict[str, Fingerprint] = {}
        self.problem = ""
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
        problems = _tried(self._write_files)
        self.problem = problems[0] if problems else ""
        self.shares = []  # copies

    def _write_files(self) -> None:
        aside, name = folders.aside_of(self.path), SHARE.format(rank())
        self.files[name] = write_shares(aside / name, self.shares)
        if rank() == 0:
            (aside / STATE).write_bytes(self.state)
            to_disk(aside / STATE)
            self.files[STATE] = Fingerprint(0, 0).after(self.state)


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


def _tried(work: Callable[[], None]) -> list[str]:
    """What went wrong, to be told to the others: none of them may wait for one that has left."""
    try:
        work()
    except OSError as error:
        return [error.strerror or str(error)]
    except Exception as error:
        return [f"{type(error).__name__}: {error}{FATAL}"]
    return []


def _room_for(shares: list[Share], num_siblings: int) -> bool:
    free = available_memory_bytes()
    return free is None or num_bytes_of(shares) * num_siblings < MEMORY_SHARE * free


def _copy(share: Share) -> Share:
    """In this process' memory, where no later step changes it."""
    return replace(share, memory=share.memory.detach().to("cpu", copy=True))
