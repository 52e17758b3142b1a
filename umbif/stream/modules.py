"""A corpus as endless training batches that resume from one integer."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from umbif.corpus.people import people_of
from umbif.corpus.shards import TUMOUR, Corpus
from umbif.errors import Problem, Transient, UmbifError, UsageError
from umbif.machine import SHARED_MEMORY, available_memory_bytes, end_with_parent, shared_memory_bytes
from umbif.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, Share, Spellings
from umbif.stream.exams import CropDataset, Exams, WholeBrainDataset, collate
from umbif.stream.order import Triple, slots_of_rank

log = logging.getLogger("umbif")
PREFETCHED = 2  # batches of each worker that wait
MEMORY_SHARE = 0.6  # of what is free, for batches on the way
SHARED_SHARE = 0.9  # of what is free in shared memory; the rest is for what processes tell each other
SHARED_CURE = "Give a container more of it (--shm-size=16g, or --ipc=host), or set data.num_workers=0"
VALIDATION_SEED = 2**31  # added to the stream's: validation views are the same at every validation


@dataclass
class Position:
    """Where training stands in its endless stream."""

    seed: int
    next_slot: int = 0

    def state(self, corpus: Corpus, people: str) -> dict[str, Any]:
        """All that it takes to go on: one integer, and what it counts in."""
        return {"next_slot": self.next_slot, "seed": self.seed, "corpus": corpus.identity, "people": people}

    def restore(self, state: dict[str, Any], corpus: Corpus, people: str) -> None:
        """Goes on with the next slot, of the same corpus and the same people only."""
        cure = "Choose another run.dir"
        if state["corpus"] != corpus.identity:
            raise UsageError(Problem("the checkpoint was trained on another corpus", str(corpus.folder), cure))
        if state.get("people", people) != people:
            what = "the persons, the split or the labels of the corpus have changed since the checkpoint was written"
            raise UsageError(Problem(what, str(corpus.folder), cure))
        self.next_slot = state["next_slot"]


class PretrainData(pl.LightningDataModule):
    """Random crops of a corpus' training exams.

    Args:
        corpus: Folder that `umbif prepare` wrote.
        sequences: Those that the run sees; null for all. Exams with none of them are left out.
        crop_size: Voxels of a crop; multiples of the patch size.
        global_batch_size: Exams of a micro-step over all ranks.
        num_views: Views of each exam.
        disjoint_share: Share of the exams with several sequences whose views have none in common.
        keep_probability: How likely another view sees a sequence that its exam has.
        max_sequences: Most sequences of a view; null for no limit.
        exams_per_place: Consecutive exams whose crops all lie at the same place; 0 draws one for each view.
        around_tumour: Crop around the tumour, and leave out exams without a tumour mask.
        num_workers: Reading processes of each rank.
        cache_gib: Decoded volumes that each of these keeps in memory, for a corpus that fits.
        num_val_exams: Held-out exams whose losses are logged.
        seed: Of order and views.
    """

    def __init__(
        self,
        corpus: str,
        sequences: Spellings | None = None,
        crop_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (96, 96, 96),
        global_batch_size: PositiveInt = 64,
        num_views: PositiveInt = 2,
        disjoint_share: Share = 0.5,
        keep_probability: Share = 0.75,
        max_sequences: PositiveInt | None = None,
        exams_per_place: NonNegativeInt = 0,
        around_tumour: bool = False,
        num_workers: NonNegativeInt = 4,
        cache_gib: NonNegativeFloat = 0.0,
        num_val_exams: NonNegativeInt = 16,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.policy: dict[str, Any] = {
            "num_views": num_views, "disjoint_share": disjoint_share, "keep_probability": keep_probability,
            "max_sequences": max_sequences, "exams_per_place": exams_per_place, "around_tumour": around_tumour,
        }  # fmt: skip
        self.corpus = Corpus(corpus, cache_gib * 2**30, sequences)
        tell_left_out(self.corpus)
        self.crop_size: Triple = (crop_size[0], crop_size[1], crop_size[2])
        self.global_batch_size, self.num_workers, self.num_val_exams = global_batch_size, num_workers, num_val_exams
        self.position = Position(seed)

    def train_dataloader(self) -> DataLoader[Exams]:
        """This rank's share of every global batch, from the next slot on."""
        rank, world_size = place(self.trainer)
        batches = SlotBatches(self.position.next_slot, self.global_batch_size, rank, world_size)
        return data_loader(self.dataset("train"), batches, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader[Exams] | list[Any]:
        """The same views of the same held-out exams every time; none where fewer are held out than there are ranks."""
        rank, world_size = place(self.trainer)
        num_exams = min(self.num_val_exams, len(self.exams("test"))) // world_size * world_size
        if not num_exams:
            return []
        batch_size = min(self.global_batch_size, num_exams)
        batches = SlotBatches(0, batch_size, rank, world_size, num_exams // batch_size)
        return data_loader(self.dataset("test"), batches, num_workers=0)

    @property
    def num_train_exams(self) -> int:
        """Exams that are learnt from."""
        return len(self.exams("train"))

    def exams(self, split: str) -> npt.NDArray[np.int64]:
        """Rows of `corpus.exams` of one split that can be cropped as asked."""
        rows = exams_of_split(self.corpus, split)
        return with_tumour(self.corpus, rows) if self.policy["around_tumour"] else rows

    def dataset(self, split: str) -> CropDataset:
        """The views of one split, by slot.

        Raises:
            UsageError: The split is empty.
        """
        exams = self.exams(split)
        if not len(exams):
            asked = ["a tumour mask"] * self.policy["around_tumour"]
            asked += [" or ".join(sorted(self.corpus.looked_at))] * (0 in self.corpus.num_sequences())
            what = " and".join(f" with {thing}" for thing in asked)
            raise UsageError(Problem(f"the corpus has no exam{what} in its {split} split", str(self.corpus.folder)))
        seed = self.position.seed + (VALIDATION_SEED if split == "test" else 0)
        return CropDataset(self.corpus, exams, crop_size=self.crop_size, seed=seed, **self.policy)

    def state_dict(self) -> dict[str, Any]:
        """See `Position.state`."""
        return self.position.state(self.corpus, self.people())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Position.restore`."""
        self.position.restore(state_dict, self.corpus, self.people())

    def people(self) -> str:
        """A name for what is learnt from."""
        return people_of(self.corpus)


class SlotBatches:
    """Batch sampler: the slots of one rank, endless unless `num_batches` is given.

    Raises:
        UsageError: The world size does not divide the global batch.
    """

    def __init__(
        self, start: int, global_batch_size: int, rank: int = 0, world_size: int = 1, num_batches: int | None = None
    ) -> None:
        if global_batch_size % world_size:
            near = max(world_size, round(global_batch_size / world_size) * world_size)
            raise UsageError(
                Problem(
                    f"data.global_batch_size={global_batch_size} cannot be shared by {world_size} processes",
                    cure=f"The nearest that can is {near}",
                )
            )
        self.place = start, global_batch_size, rank, world_size
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[list[int]]:
        return islice(slots_of_rank(*self.place), self.num_batches)


def data_loader(
    dataset: CropDataset | WholeBrainDataset, batches: Any, num_workers: int, trainer: pl.Trainer | None = None
) -> DataLoader[Any]:
    """A loader whose workers live as long as training and only read: they draw nothing.

    Args:
        dataset: Of samples by slot.
        batches: Lists of slots.
        num_workers: As many as the memory allows.
        trainer: Whose processes share the memory of this machine.
    """
    if num_workers:
        batch_bytes = len(next(iter(batches))) * dataset.sample_bytes()
        num_processes = trainer.num_devices if trainer is not None else 1
        num_workers = affordable_workers(num_workers, batch_bytes, num_processes, dataset.corpus.cache_bytes)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=partial(collate, spacing_mm=dataset.corpus.spacing_mm, seed=dataset.seed or 0),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCHED if num_workers else None,
        worker_init_fn=stand_apart,
    )


def stand_apart(_: int) -> None:
    """Takes a worker out of the group of its process, and lets it end with that.

    A signal to the whole group, as launchers send it, would take the worker from a process that ends in order.
    """
    end_with_parent()
    os.setpgid(0, 0)


def affordable_workers(num_wanted: int, batch_bytes: int, num_processes: int, cache_bytes: float) -> int:
    """As many workers as may hold batches in memory; a system that runs out of it kills one without a word.

    Args:
        num_wanted: Of the recipe.
        batch_bytes: Of one batch.
        num_processes: That share the memory and do the same.
        cache_bytes: What each worker keeps.

    Returns:
        The number, at least one where only the machine's memory is short: it may still do. None at all where shared
        memory does not hold what one would hand over, which is certain to fail.
    """
    bounds = [(num_wanted, "")]
    free, shared = available_memory_bytes(), shared_memory_bytes()
    if free is not None:
        # Each has PREFETCHED batches on the way, and the one that it makes twice: as samples and as a batch.
        of_each = batch_bytes * (PREFETCHED + 2) + cache_bytes
        said = f"each takes {of_each / 2**30:.1f} GiB and {free / 2**30:.0f} GiB are free"
        bounds.append((max(1, int(free * MEMORY_SHARE / num_processes / of_each)), said))
    if shared is not None:
        # Batches on the way lie there, and so do two that have arrived: those of this step and of the next.
        room = shared * SHARED_SHARE / num_processes / batch_bytes - 2
        said = f"each hands over {PREFETCHED} batches of {batch_bytes / 2**30:.2f} GiB in {SHARED_MEMORY}"
        said += f" and {shared / 2**30:.2f} GiB are free there. {SHARED_CURE}"
        bounds.append((max(0, int(room / PREFETCHED)), said))
    num, why = min(bounds, key=itemgetter(0))
    if why:
        log.warning("%d reading processes instead of data.num_workers=%d: %s", num, num_wanted, why)
    return num


def killed(error: RuntimeError) -> UmbifError | None:
    """What to say where a reading process of a DataLoader has fallen; None for another error."""
    said = str(error).strip()
    if "DataLoader worker" not in said:
        return None
    what = f"A reading process was killed ({said.splitlines()[-1]})."
    if "bus error" in f"{said} {error.__cause__}".lower():
        return UmbifError(f"{what} Shared memory ran out. {SHARED_CURE}.")
    return Transient(f"{what} Most often the memory ran out: lower data.num_workers or data.global_batch_size.")


def tell_left_out(corpus: Corpus) -> None:
    """Counts the exams that have none of the sequences that are looked at."""
    if num_left_out := int((corpus.num_sequences() == 0).sum()):
        names = ", ".join(sorted(corpus.looked_at))
        log.info("%d of %d exams have none of %s and are left out", num_left_out, len(corpus), names)


def exams_of_split(corpus: Corpus, split: str) -> npt.NDArray[np.int64]:
    """Rows of `corpus.exams` with a sequence that is looked at."""
    return np.flatnonzero((corpus.exams["split"].to_numpy() == split) & (corpus.num_sequences() > 0))


def with_tumour(corpus: Corpus, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Those of some rows of `corpus.exams` that have a tumour mask."""
    with_mask = corpus.index.loc[corpus.index["name"] == TUMOUR, "exam"]
    return rows[corpus.exams["exam"].isin(with_mask).to_numpy()[rows]]


def place(trainer: pl.Trainer | None) -> tuple[int, int]:
    """Rank and world size."""
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


class SlotCounter(Callback):
    """Counts the slots that training has used, and makes torch's own generator a function of them.

    Dropout and drop path draw from torch's generator. Seeding it from (seed, slot, rank) before each batch leaves
    no state that a checkpoint could miss.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds torch for this batch."""
        position: Position = trainer.datamodule.position
        words = np.random.SeedSequence([position.seed, position.next_slot, trainer.global_rank]).generate_state(2)
        torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances the counter."""
        data: Any = trainer.datamodule
        data.position.next_slot += data.global_batch_size
        pl_module.log("slot", float(data.position.next_slot))
