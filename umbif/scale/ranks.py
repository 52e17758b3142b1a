"""What the processes of a job tell each other beside training: small things, on the CPU, in a group of their own."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from umbif.errors import Transient

T = TypeVar("T")
LOST = (  # what backends say where another process has gone
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "Timed out waiting",
    "ncclRemoteError", "ncclSystemError", "communicator was aborted",
)  # fmt: skip
_groups: dict[Any, dist.ProcessGroup] = {}  # of small things, by the group of all


def num_ranks() -> int:
    """Processes of the job."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """Of this one."""
    return dist.get_rank() if _joined() else 0


def all_true(value: bool) -> bool:
    """Whether it is true on every process. All must call it."""
    if not _joined():
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=_control())
    return bool(flag)


def any_true_later(value: bool) -> Callable[[], bool]:
    """Asks whether it is true on any process; what is returned waits for the answer. All must call both."""
    if not _joined():
        return lambda: value
    flag = torch.tensor(int(value))
    asked = dist.all_reduce(flag, dist.ReduceOp.MAX, group=_control(), async_op=True)

    def answer() -> bool:
        asked.wait()
        return bool(flag)

    return answer


def all_gather(value: T) -> list[T]:
    """The value of every process, by rank. All must call it: it waits for the last one."""
    if not _joined():
        return [value]
    everywhere: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value, group=_control())
    return everywhere  # type: ignore[return-value]


def lost(error: RuntimeError) -> Transient | None:
    """What to say where another process has gone; None for another error."""
    if not any(words in str(error) for words in LOST):
        return None
    return Transient("Another process of the run has ended, or cannot be reached any more.")


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _control() -> dist.ProcessGroup:
    """Gloo, so that no GPU has to be waited for. All ranks come here for the first time together."""
    if dist.group.WORLD not in _groups:
        _groups.clear()
        _groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return _groups[dist.group.WORLD]
