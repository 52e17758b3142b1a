"""What can befall a process of a training, on purpose: a callback that does it once, at a step and to a rank."""

import ctypes
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

STEP, SUMMING, SUMMED, ACCUMULATING, SAVING = "a step", "an all-reduce", "a sum", "an accumulation", "a save"
FILLER, MOST_BYTES = "filler", 1 << 28
SLOWED_S = 0.3  # a forward of the small encoders takes a hundredth of it


class Fault(NamedTuple):
    """One of `KINDS`, and where it falls.

    Args:
        kind: What happens.
        rank: To which process.
        step: After how many optimiser steps.
        place: After a step and before a save of it; where the others wait in an all-reduce; once gradients are summed;
            after a micro-step of an accumulation; or where the others wait in a save.
    """

    kind: str
    rank: int
    step: int
    place: str = STEP

    @classmethod
    def read(cls, text: str) -> "Fault":
        """Of `killed@1:12` or `killed@1:12 in a save`: process 1, after step 12."""
        where, _, place = text.partition(" in ")
        kind, _, where = where.partition("@")
        rank, _, step = where.partition(":")
        return cls(kind, int(rank), int(step), place or STEP)

    def __str__(self) -> str:
        return f"{self.kind}@{self.rank}:{self.step}" + f" in {self.place}" * (self.place != STEP)


class Faults(pl.Callback):
    """Lets faults happen, each once in the life of a run folder.

    Args:
        plan: Such as `[killed@1:12, stopped@0:15 in a save]`.
    """

    def __init__(self, plan: list[str]) -> None:
        self.plan = [Fault.read(text) for text in plan]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before a checkpoint of this step is begun."""
        has_stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self._reached(STEP if has_stepped else ACCUMULATING, trainer, pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """What others sum up will lack a part."""
        self._reached(SUMMING, trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """All have the same gradients."""
        self._reached(SUMMED, trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """All have begun to save."""
        self._reached(SAVING, trainer, pl_module)

    def _reached(self, place: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for fault in self.plan:
            mark = Path(trainer.default_root_dir) / ".faults" / str(fault)
            if fault[1:] == (trainer.global_rank, trainer.global_step, place) and not mark.exists():
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
                KINDS[fault.kind](trainer, module)


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


def slow_down(_: Any, module: pl.LightningModule) -> None:
    """Every forward takes long from now on."""
    module.encoder.register_forward_pre_hook(lambda *_: time.sleep(SLOWED_S))


def flip_weight(_: Any, module: pl.LightningModule) -> None:
    """One bit of a weight."""
    _flip(next(module.parameters()))


def flip_moment(trainer: pl.Trainer, _: Any) -> None:
    """One bit of a moment of AdamW."""
    state = trainer.optimizers[0].state
    _flip(next(values["exp_avg"] for values in state.values() if values["exp_avg"].numel() > 1))


def flip_gradient(_: Any, module: pl.LightningModule) -> None:
    """One bit of a gradient."""
    _flip(next(weight.grad for weight in module.parameters() if weight.grad is not None))


def fill_disk(trainer: pl.Trainer, _: Any) -> None:
    """To the last byte: for a small one that a test has made."""
    folder = Path(trainer.default_root_dir)
    if shutil.disk_usage(folder).total > MOST_BYTES:
        raise RuntimeError(f"{folder} is no disk of a test")
    with (folder / FILLER).open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while file.write(b"0" * size):
                    pass


def empty_disk(trainer: pl.Trainer, _: Any) -> None:
    """Somebody has made room."""
    (Path(trainer.default_root_dir) / FILLER).unlink()


def protect(trainer: pl.Trainer, _: Any) -> None:
    """Nothing can be written where checkpoints lie, as after a fault of a disk. Needs a file system of its own."""
    folder = str(Path(trainer.default_root_dir) / "checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def allow(trainer: pl.Trainer, _: Any) -> None:
    """The disk is as it was."""
    subprocess.run(["umount", "--lazy", str(Path(trainer.default_root_dir) / "checkpoints")], check=True)


def refuse_large_files(*_: Any) -> None:
    """As of a quota that is used up: the disk has room, and nothing large can be written."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))


def allow_large_files(*_: Any) -> None:
    """Somebody has made room."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


KINDS: dict[str, Callable[..., None]] = {
    "killed": sent(signal.SIGKILL), "terminated": sent(signal.SIGTERM), "stopped": sent(signal.SIGSTOP),
    "aborted": sent(signal.SIGABRT), "segfault": segfault, "raises": raise_, "leaves": leave, "memory": out_of_memory,
    "cut off": cut_off,
    "slow": slow_down, "weight": flip_weight, "moment": flip_moment, "gradient": flip_gradient,
    "quota": refuse_large_files, "no quota": allow_large_files, "full": fill_disk, "room": empty_disk,
    "read-only": protect, "writable": allow,
}  # fmt: skip


@torch.no_grad()
def _flip(tensor: torch.Tensor) -> None:
    flat = tensor.detach().view(-1)
    largest = int(flat.abs().argmax())
    bits = flat[largest : largest + 1].view(torch.int32)
    bits ^= 1 << 20
