"""What can befall a process of a training, on purpose: a callback that does it once, at a step and to a rank."""

import ctypes
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

INSIDE = "inside"  # an accumulation


class Fault(NamedTuple):
    """One of `KINDS`, and where it falls.

    Args:
        kind: What happens.
        rank: To which process.
        step: After which optimiser step.
    """

    kind: str
    rank: int
    step: int

    @classmethod
    def read(cls, text: str) -> "Fault":
        """Of `killed@1:12`: process 1, after step 12."""
        kind, _, where = text.partition("@")
        rank, _, step = where.partition(":")
        return cls(kind, int(rank), int(step))

    def __str__(self) -> str:
        return f"{self.kind}@{self.rank}:{self.step}"


class Faults(pl.Callback):
    """Lets faults happen, each once in the life of a run folder.

    Args:
        plan: Such as `[killed@1:12]`.
    """

    def __init__(self, plan: list[str]) -> None:
        self.plan = [Fault.read(text) for text in plan]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before a checkpoint of this step is begun; or, of a fault inside of it, at the micro-step after that."""
        has_stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        for fault in self.plan:
            mark = Path(trainer.default_root_dir) / ".faults" / str(fault)
            here = fault[1:] == (trainer.global_rank, trainer.global_step) and has_stepped != (fault.kind == INSIDE)
            if not here or mark.exists():
                continue
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
            KINDS[fault.kind](trainer, pl_module)


def sent(number: signal.Signals) -> Callable[..., None]:
    """Sends this process a signal."""
    return lambda *_: os.kill(os.getpid(), number)


def segfault(*_: Any) -> None:
    """Reads address 0."""
    ctypes.string_at(0)


def raise_(*_: Any) -> None:
    """An error that nobody expects."""
    raise ZeroDivisionError("a fault on purpose")


def leave(*_: Any) -> None:
    """Ends as if all were done."""
    os._exit(0)


def out_of_memory(*_: Any) -> None:
    """Asks for more than there may be."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, resource.RLIM_INFINITY))
    bytearray(1 << 34)


def cut_off(*_: Any) -> None:
    """Loses all connections."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                socket.socket(fileno=os.dup(int(name))).shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


def flip_weight(_: Any, module: pl.LightningModule) -> None:
    """One bit of a weight."""
    _flip(next(module.parameters()))


def flip_moment(trainer: pl.Trainer, _: Any) -> None:
    """One bit of a moment of AdamW."""
    state = trainer.optimizers[0].state
    _flip(next(values["exp_avg"] for values in state.values() if values["exp_avg"].numel() > 1))


KINDS: dict[str, Callable[..., None]] = {
    "killed": sent(signal.SIGKILL), "stopped": sent(signal.SIGSTOP), "aborted": sent(signal.SIGABRT),
    "segfault": segfault, "raises": raise_, "leaves": leave, "memory": out_of_memory, "cut off": cut_off,
    INSIDE: sent(signal.SIGKILL), "weight": flip_weight, "moment": flip_moment,
}  # fmt: skip


@torch.no_grad()
def _flip(tensor: torch.Tensor) -> None:
    bits = tensor.detach().view(-1)[:1].view(torch.int32)
    bits ^= 1 << 20
