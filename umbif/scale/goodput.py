"""Which share of the time since a run began went into steps that count, over all its starts.

After the "effective training time" of Llama 3 (Dubey et al. 2024, arXiv:2407.21783, section 3.3.4): steps that a fault
has undone do not count, nor do starting, waiting for machines, and what training waits for a save.
"""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from umbif.scale.checkpoint import Checkpoints

STARTS = "starts.jsonl"  # of a run folder: when it was begun or gone on with, and from which step


class Goodput(Callback):
    """Logs `throughput/goodput`, a share of all the time, and `throughput/checkpoint_stall`, one of this start's.

    A checkpoint holds the useful seconds up to it. A run that resumes counts on from there: the seconds of
    steps that are lost do not count.
    """

    def __init__(self) -> None:
        self.before_s = 0.0  # useful, of earlier starts
        self.made_s = time.time()  # when this process began
        self.began_s = 0.0  # when the run did, with its first start
        self.since_s = 0.0  # since when this start trains
        self.savers: list[Checkpoints] = []

    def state_dict(self) -> dict[str, Any]:
        """Of a checkpoint."""
        return {"useful_s": self.useful_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self.before_s = float(state_dict["useful_s"])

    @property
    def useful_s(self) -> float:
        """Seconds of training that count so far."""
        return self.before_s + time.time() - self.since_s - self._stall_s

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the start in the run folder."""
        self.savers = [one for one in trainer.callbacks if isinstance(one, Checkpoints)]
        self.since_s = time.time()
        path = Path(trainer.default_root_dir) / STARTS
        if trainer.is_global_zero:
            with path.open("a") as file:
                file.write(json.dumps({"time": round(self.made_s, 1), "step": trainer.global_step}) + "\n")
            self.began_s = first_start(path)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs at the Trainer's interval."""
        if trainer.is_global_zero and trainer.global_step % trainer.log_every_n_steps == 0:
            now = time.time()
            pl_module.log("throughput/goodput", self.useful_s / max(now - self.began_s, 1e-9), rank_zero_only=True)
            stall = self._stall_s / max(now - self.since_s, 1e-9)
            pl_module.log("throughput/checkpoint_stall", stall, rank_zero_only=True)

    @property
    def _stall_s(self) -> float:
        return sum(one.stall_s for one in self.savers)


def first_start(path: Path) -> float:
    """Seconds since the epoch of the first line; those of now where it cannot be read."""
    try:
        return float(json.loads(path.read_text().splitlines()[0])["time"])
    except (OSError, ValueError, IndexError, KeyError):
        return time.time()
