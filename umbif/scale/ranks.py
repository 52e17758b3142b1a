"""What the processes of a job tell each other beside training: small things, on the CPU, in a group of their own."""

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


def all_of(value: bool) -> bool:
    """Whether all say so."""
    if not _joined():
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=_control())
    return bool(flag)


def told(values: T) -> list[T]:
    """What each of them says, in their order."""
    if not _joined():
        return [values]
    everywhere: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, values, group=_control())
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
