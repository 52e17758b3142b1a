"""Whether a pretraining run learns anything: features of a fixed panel of exams, asked every few steps.

Nothing here enters the numbers of training: no gradient, no random number and no mode of a module is left changed.
Shapes: B exams, V tokens, N exams of the panel, E width.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.image import imread
from torch.distributed.fsdp import FSDPModule

from umbif.corpus.shards import BRAIN, Corpus
from umbif.encoders.probing import MIN_PERSONS, MISSING, answerable, feature_std, knn_accuracy, linear_probe, rank_me
from umbif.errors import one_line
from umbif.pretrain.pictures import VISIBLE_SHARE, held_out_exam, write_reconstruction
from umbif.ranges import PositiveInt, Seed
from umbif.stream.exams import Exams, Sample, collate, most_sequences, person_codes, read_view
from umbif.stream.modules import PretrainData, exams_of_split
from umbif.stream.order import Triple, View
from umbif.stream.philox import uniform

EXAMS_AT_ONCE = 8
PATCHES = 40  # purpose of the draw of patches: independent of all others
log = logging.getLogger("umbif")


class Monitors(Callback):
    """Encodes a fixed panel of training exams every few steps, and asks what their features know.

    Logs `monitor/rank_me`, `monitor/feature_std`, and for each label `monitor/knn_LABEL`, `monitor/probe_LABEL` and
    `monitor/chance_LABEL`, the chance level of the neighbours. `monitor/time_share` is what all this costs, over the
    time since training began. A run that begins is asked once before its first step, to have something to compare.

    The exams are centre crops of the size that training sees, read once and kept in memory. Only rank 0 computes and
    no collective is called, except where weights are sharded: there a forward is itself a collective, so under any
    strategy but plain DDP all ranks encode.

    Args:
        every_n_steps: Optimiser steps between two looks.
        num_exams: Of the panel.
        labels: Columns of the corpus' table of exams. Their values are the classes as they stand there, blanks are
            missing; classes of fewer than five persons are left out.
        neighbours: That vote about an exam.
        max_tokens: Random patches of an exam that are encoded, the same each time: all of them would cost many times a
            training step.
        pictures_every_n_steps: Optimiser steps between two reconstructions of one held-out exam; null draws none.
        seed: Of the choice of exams.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt = 500,
        num_exams: PositiveInt = 64,
        labels: Sequence[str] = ("idh",),
        neighbours: PositiveInt = 5,
        max_tokens: PositiveInt = 128,
        pictures_every_n_steps: PositiveInt | None = 5000,
        seed: Seed = 0,
    ) -> None:
        self.every_n_steps, self.num_exams, self.labels = every_n_steps, num_exams, tuple(labels)
        self.max_tokens = max_tokens
        self.neighbours, self.pictures_every_n_steps, self.seed = neighbours, pictures_every_n_steps, seed
        self.panel: Panel | None = None
        self.pictured: Exams | None = None
        self.began_s = self.spent_s = 0.0
        self.last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to count its own time, and looks at the untrained encoder."""
        self.began_s, self.spent_s, self.last_step = time.monotonic(), 0.0, trainer.global_step
        # A sharded module must meet its own forward first: FSDP2 takes the first one it sees for the root.
        if trainer.global_step == 0 and not is_collective(trainer):
            self._look(trainer, pl_module, ask=True, draw=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Looks after every few optimiser steps."""
        step = trainer.global_step
        if step == self.last_step:  # in the middle of an accumulation
            return
        self.last_step = step
        drawn = bool(self.pictures_every_n_steps and getattr(pl_module, "reconstruction_weight", 0))
        ask = step % self.every_n_steps == 0
        draw = drawn and hasattr(pl_module, "shown_and_predicted") and step % (self.pictures_every_n_steps or 1) == 0
        self._look(trainer, pl_module, ask=ask, draw=draw)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule, *, ask: bool, draw: bool) -> None:
        if not (ask or draw) or not (trainer.is_global_zero or is_collective(trainer)):
            return
        _finish_training_step(module)
        begun = time.monotonic()
        values: dict[str, float] = {}
        with undisturbed(trainer, module):
            if ask:
                values = self._ask(trainer, module)
            if draw:
                self._draw(trainer, module)
        self.spent_s += time.monotonic() - begun
        if trainer.global_step:
            values["monitor/time_share"] = self.spent_s / (time.monotonic() - self.began_s)
        _log(trainer, values)

    def _ask(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        self.panel = panel = self.panel or read_panel(trainer.datamodule, self.labels, self.num_exams, self.seed)
        features = as_forward(module, lambda: encode(module, panel.batches, self.max_tokens))
        return panel.values(features, self.neighbours) if trainer.is_global_zero else {}

    def _draw(self, trainer: pl.Trainer, module: Any) -> None:
        self.pictured = exam = self.pictured or held_out_exam(trainer.datamodule)
        if not trainer.is_global_zero:
            padded = exam.padded(module.encoder.patch_size).to(module.device)
            as_forward(module, lambda: module.shown_and_predicted(padded, VISIBLE_SHARE))
            return
        folder = Path(trainer.default_root_dir) / "figures"
        try:
            paths = as_forward(module, lambda: write_reconstruction(module, exam, folder))
        except OSError as error:
            log.warning("No reconstruction was drawn: %s", one_line(error))
            return
        pictures = {path.stem.replace("_", "/", 1): imread(path)[..., :3] for path in paths}
        for logger in (found for found in trainer.loggers if hasattr(found, "add_pictures")):
            logger.add_pictures(pictures, trainer.global_step)


@dataclass(frozen=True)
class Panel:
    """Exams that are encoded again and again, on the CPU, and what is known of them."""

    batches: list[Exams]
    persons: npt.NDArray[np.int64]  # (N,)
    labels: dict[str, npt.NDArray[np.str_]]  # each (N,); the empty text is missing

    def values(self, features: npt.NDArray[np.float32], neighbours: int) -> dict[str, float]:
        """What features (N, E) are worth; what cannot be said is left out.

        Rank is that of what tells exams apart: mean tokens share a large part, which alone would make it small.
        """
        rank = rank_me(features - features.mean(axis=0))
        values = {"monitor/rank_me": rank, "monitor/feature_std": feature_std(features)}
        for name, labels in self.labels.items():
            values[f"monitor/knn_{name}"] = knn_accuracy(features, labels, self.persons, neighbours)
            values[f"monitor/probe_{name}"] = linear_probe(features, labels, self.persons)
            values[f"monitor/chance_{name}"] = 1 / len(np.unique(labels[answerable(labels, self.persons)]))
        return {name: value for name, value in values.items() if math.isfinite(value)}


def read_panel(data: PretrainData, labels: Sequence[str], num_exams: int, seed: int) -> Panel:
    """Reads the exams of the panel, and says once which labels it has to do without."""
    corpus, table = data.corpus, data.corpus.exams
    found = {name: verbatim(table[name]) for name in labels if name in table}
    rows = choose(exams_of_split(corpus, "train"), list(found.values()), num_exams, seed)
    persons = person_codes(corpus)[rows]
    asked = {name: column[rows] for name, column in found.items() if answerable(column[rows], persons).any()}
    lacking = [name for name in labels if name not in asked]
    if lacking:
        there = ", ".join(str(name) for name in table if (verbatim(table[name]) != MISSING).any())
        rule = f"two classes of {MIN_PERSONS} persons or more"
        log.warning("The monitors do without %s: no %s. The corpus has: %s", ", ".join(lacking), rule, there)
    parts = [rows[i : i + EXAMS_AT_ONCE] for i in range(0, len(rows), EXAMS_AT_ONCE)]
    samples = [[[centre_crop(corpus, int(row), data.crop_size)] for row in part] for part in parts]
    batches = [collate(part, spacing_mm=corpus.spacing_mm, seed=seed) for part in samples]
    return Panel(batches, persons, asked)


def verbatim(column: "pd.Series[Any]") -> npt.NDArray[np.str_]:
    """The values of a column as text; blank and NaN are the empty text."""
    return np.asarray(column.astype(object).where(column.notna(), MISSING).astype(str).str.strip(), dtype=np.str_)


def choose(
    rows: npt.NDArray[np.int64], columns: Sequence[npt.NDArray[np.str_]], num_exams: int, seed: int
) -> npt.NDArray[np.int64]:
    """The same `num_exams` of `rows` each time, in order; those with a label where there are any."""
    known = [row for row in rows if any(column[row] != MISSING for column in columns)]
    drawn = np.random.default_rng(seed).permutation(np.asarray(known or rows, dtype=np.int64))
    return np.sort(drawn[:num_exams])


def centre_crop(corpus: Corpus, exam: int, size: Triple) -> Sample:
    """The middle of an exam in all of its sequences."""
    x, y, z = ((n - crop) // 2 for n, crop in zip(corpus.frames(exam)[BRAIN].shape, size, strict=True))
    sample = read_view(corpus, exam, View((x, y, z), tuple(corpus.sequences(exam))), size, most_sequences(corpus))
    return {**sample, "exam": exam, "person": 0, "slot": 0, "view": 0}


def encode(module: Any, batches: Sequence[Exams], max_tokens: int) -> npt.NDArray[np.float32]:
    """Pooled features (N, E) of the encoder that is being trained."""
    pooled = []
    for batch in (exams.to(module.device) for exams in batches):
        scores = uniform(batch.seed, batch.exam, batch.view, PATCHES, module.encoder.num_patches(batch))
        pooled.append(module.encoder.forward_features(batch, scores=scores, budget=max_tokens)[2].float().cpu())
    return torch.cat(pooled).numpy()


def is_collective(trainer: pl.Trainer) -> bool:
    """Whether a forward needs all ranks, as it does where none of them has all weights."""
    return trainer.world_size > 1 and getattr(trainer.strategy, "in_shards", True)


def as_forward(module: pl.LightningModule, work: Callable[[], Any]) -> Any:
    """Does `work` within the module's own forward, whose hooks gather sharded weights; as Lightning's training step."""
    vars(module)["forward"] = work
    try:
        return module()
    finally:
        del vars(module)["forward"]


@contextmanager
def undisturbed(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Evaluation without gradients, after which modes and random numbers are as they were."""
    modes = [(part, part.training) for part in module.modules()]
    devices = [module.device] if module.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.precision_plugin.forward_context())
        if "torch._dynamo" in sys.modules:  # panels differ in length: compiled blocks would be compiled again
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training
                if isinstance(part, FSDPModule):
                    part.reshard()  # without a backward nothing else gives gathered weights back


def _finish_training_step(module: pl.LightningModule) -> None:
    """What the device still has to do of the step is not the monitors' time."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)


def _log(trainer: pl.Trainer, values: dict[str, float]) -> None:
    if trainer.is_global_zero and values:
        for logger in trainer.loggers:
            # The Trainer counts a step only after its callbacks: this is the row that its own numbers will join.
            logger.log_metrics(values, step=max(0, trainer.global_step - 1))
