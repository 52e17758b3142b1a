"""What the tests of strategies run in processes of their own: many runs in one set of processes, as imports cost."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from small import small_fit

from umbif.fit import fit
from umbif.recipe.compose import Recipe
from umbif.scale.deepspeed import DeepSpeed

LEFT_WHOLE = 200  # elements of a weight: biases and norms are smaller
EXAMS_PER_STEP, ACCUMULATED = 12, 2  # shared by one, two, three or four processes


class Job(NamedTuple):
    """One `umbif fit`.

    Args:
        recipe: Its name.
        run_dir: A folder.
        overrides: Of the command line.
        labels: A table; for fine-tuning.
    """

    recipe: str
    run_dir: str
    overrides: list[str]
    labels: str = ""

    def composed(self, corpus: Path, world_size: int) -> Recipe:
        """As small as the others, and shared by so many processes."""
        always = [
            f"trainer.devices={world_size}", f"data.global_batch_size={EXAMS_PER_STEP}", "model.gradient_clip=0.05",
            f"trainer.accumulate_grad_batches={ACCUMULATED}",
        ]  # fmt: skip
        labels = Path(self.labels) if self.labels else None
        return small_fit(self.recipe, corpus, Path(self.run_dir), labels, *always, *self.overrides)


class Poison(pl.Callback):
    """One exam of the batches of a step has voxels that are no numbers, on one process.

    Args:
        step: Which, from 0.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            batch.scale[0] = torch.nan


class Losses(pl.Callback):
    """Writes the losses of all micro-steps, means over the processes, as losses.json."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "losses.json"
        self.values = json.loads(path.read_text()) if path.exists() else []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().double().clone(), reduce_op="mean")
        self.values.append(float(loss))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / "losses.json").write_text(json.dumps(self.values))


def run(jobs: list[Job], corpus: Path, world_size: int) -> None:
    """Does all jobs, alone or as one of some processes, of which the environment tells."""
    torch.set_num_threads(1)
    shard_small_weights_too(LEFT_WHOLE if world_size == 2 else 0)
    for job in jobs:
        fit(job.composed(corpus, world_size))


def shard_small_weights_too(left_whole: int) -> None:
    """DeepSpeed leaves weights whole that are as small as those of these tests: all of them, or of so few elements."""
    begun = DeepSpeed.__init__

    def begin(self: Any, *args: Any, **options: Any) -> None:
        begun(self, *args, **options)
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = left_whole

    DeepSpeed.__init__ = begin  # type: ignore[method-assign]


if __name__ == "__main__":
    jobs, corpus, world_size, port = sys.argv[1:]
    os.environ |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run([Job(*job) for job in json.loads(jobs)], Path(corpus), int(world_size))
