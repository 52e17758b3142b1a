"""Saves that are killed once so many bytes are written: forked from a warm process, as imports take seconds."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from umbif.scale import ranks
from umbif.scale.checkpoint_folder import aside_of, remove_leftovers, step_of
from umbif.scale.saver import Saver
from umbif.scale.shares import Share, held, to_write
from umbif.scale.strategies import chosen
from umbif.scale.tensor_file import ShareFiles

POINTS, FIRST = 20, 100  # of a save; the checkpoint that must not be lost
NUM = 1 << 21  # elements of a tensor, 8 MiB


class Kind(NamedTuple):
    """How a checkpoint is written.

    Args:
        num_ranks: Processes that write it.
        beside: A thread writes, while training would go on.
        tensors: Such as weights, or weights and their moving average.
    """

    num_ranks: int = 1
    beside: bool = False
    tensors: tuple[str, ...] = ("model.weight",)


KINDS = {
    "whole": Kind(), "with a moving average": Kind(tensors=("model.weight", "model.average.weight")),
    "by two processes": Kind(num_ranks=2), "by two, beside training": Kind(num_ranks=2, beside=True),
}  # fmt: skip


class Killed(NamedTuple):
    """What a kill has left.

    Args:
        is_new: The checkpoint that was being written is complete; else the one before is the newest.
        is_intact: All bits of it are as they were.
    """

    is_new: bool
    is_intact: bool


def kills(folder: Path, kind: Kind, num_points: int = POINTS) -> Iterator[Killed]:
    """Kills as many saves, each further on its way, the last at its end."""
    _save(folder, FIRST, kind)
    size = sum(path.stat().st_size for path in (folder / name_of(FIRST)).iterdir())
    for point in range(num_points):
        step = FIRST + 1 + point
        _kill_at(_start(folder, step, kind), folder / name_of(step), size * point / (num_points - 1))
        newest = chosen(folder)
        intact = all(torch.equal(_read(newest, name), _values(step_of(newest), name)) for name in kind.tensors)
        yield Killed(step_of(newest) == step, intact)
        remove_leftovers(folder)


def name_of(step: int) -> str:
    """Of a checkpoint's folder."""
    return f"step={step:06d}"


def forked(work: Callable[[], None]) -> int:
    """A process that does something; its number."""
    child = os.fork()
    if child == 0:
        try:
            ranks._groups.clear()  # of its parent
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def _values(step: int, name: str) -> torch.Tensor:
    return torch.randn(NUM, generator=torch.Generator().manual_seed(step + len(name)))


def _read(path: Path, name: str) -> torch.Tensor:
    found = torch.empty(NUM)
    ShareFiles(sorted(path.glob("*.safetensors"))).fill(Share(name, (NUM,), 0, found, everywhere=True))
    return found


def _save(folder: Path, step: int, kind: Kind) -> None:
    for child in _start(folder, step, kind):
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"the save of step {step} failed")


def _start(folder: Path, step: int, kind: Kind) -> list[int]:
    return [forked(lambda rank=rank: _save_share(folder, step, rank, kind)) for rank in range(kind.num_ranks)]


def _save_share(folder: Path, step: int, rank: int, kind: Kind) -> None:
    torch.set_num_threads(1)  # threads of the parent are not here
    if kind.num_ranks > 1:
        meet = f"file://{folder}/.meet_{step}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=kind.num_ranks)
    saver = Saver(kind.beside)
    shares = to_write([held(name, _values(step, name)) for name in kind.tensors], rank, kind.num_ranks)
    saver.save(folder / name_of(step), {"global_step": step}, shares, {"step": step})
    saver.finish()


def _kill_at(children: list[int], path: Path, num_bytes: float) -> None:
    left = set(children)
    while _written(path) < num_bytes and left:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _written(path: Path) -> int:
    place = path if path.exists() else aside_of(path)
    try:
        return sum(entry.stat().st_size for entry in os.scandir(place))
    except FileNotFoundError:
        return 0
