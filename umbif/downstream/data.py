"""The exams of one task: the whole brain's box of each, in batches that resume from one integer."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import BatchSampler, DataLoader

from umbif.corpus.people import digest
from umbif.corpus.shards import Corpus
from umbif.downstream.tasks import MISSING, BinaryLabel, labelled, split_rows, targets
from umbif.ranges import NonNegativeFloat, NonNegativeInt, OpenShare, PositiveInt, Seed, Spellings
from umbif.stream.exams import Exams, WholeBrainDataset
from umbif.stream.modules import Position, SlotBatches, data_loader, place, tell_left_out


class TaskData(pl.LightningDataModule):
    """A binary task on a corpus.

    Args:
        corpus: Folder that `umbif prepare` wrote.
        task: Name of the task, for tables and reports.
        label: Columns and spellings of the label.
        labels: A further table of labels, joined by exam.
        sequences: Those that the run sees; null for all. Exams with none of them are left out.
        global_batch_size: Exams of a micro-step over all ranks.
        val_fraction: Share of the training people on whom the threshold is chosen.
        num_workers: Reading processes of each rank.
        cache_gib: Decoded volumes that each of these keeps in memory, for a corpus that fits.
        seed: Of the order and of the validation people.
    """

    def __init__(
        self,
        corpus: str,
        task: str,
        label: BinaryLabel,
        labels: str | None = None,
        sequences: Spellings | None = None,
        global_batch_size: PositiveInt = 8,
        val_fraction: OpenShare = 0.2,
        num_workers: NonNegativeInt = 4,
        cache_gib: NonNegativeFloat = 0.0,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.corpus = Corpus(corpus, cache_gib * 2**30, sequences)
        tell_left_out(self.corpus)
        self.task, self.positive = task, label.positive[0]
        self.global_batch_size, self.num_workers = global_batch_size, num_workers
        self.position = Position(seed)
        self.exams = labelled(self.corpus, labels)
        self.y = np.where(self.corpus.num_sequences() > 0, targets(self.exams, label), MISSING)
        self.parts = split_rows(self.exams, self.y, val_fraction=val_fraction, seed=seed)

    def train_dataloader(self) -> DataLoader[Exams]:
        """This rank's share of every global batch, endless."""
        rank, world_size = place(self.trainer)
        batches = SlotBatches(self.position.next_slot, self.global_batch_size, rank, world_size)
        return data_loader(self.dataset("train", self.position.seed), batches, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader[Exams]:
        """Each validation exam once."""
        return self.each_once("val")

    def predict_dataloader(self) -> list[DataLoader[Exams]]:
        """Each validation and each test exam once, in this order of loaders."""
        return [self.each_once("val"), self.each_once("test")]

    def each_once(self, part: str, shared: bool = False) -> DataLoader[Exams]:
        """The exams of a part in their order, one by one: what is said of an exam hangs on no other.

        Args:
            part: train, val or test.
            shared: This rank's share of them, and not all.
        """
        dataset = self.dataset(part, None)
        rank, world_size = place(self.trainer) if shared else (0, 1)
        batches = BatchSampler(range(rank, len(dataset), world_size), 1, drop_last=False)
        return data_loader(dataset, batches, min(self.num_workers, len(batches)), self.trainer)

    def dataset(self, part: str, seed: int | None) -> WholeBrainDataset:
        """The exams of a part, in random order if there is a seed."""
        rows = self.parts[part]
        return WholeBrainDataset(self.corpus, rows, self.y[rows].astype(np.float32), seed)

    @property
    def num_train_exams(self) -> int:
        """Exams that are learnt from."""
        return len(self.parts["train"])

    def state_dict(self) -> dict[str, Any]:
        """See `Position.state`."""
        return self.position.state(self.corpus, self.people())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Position.restore`."""
        self.position.restore(state_dict, self.corpus, self.people())

    def people(self) -> str:
        """A name for what is learnt from: who is in which part, and with which label."""
        part = np.full(len(self.exams), "", dtype=object)
        for name, rows in self.parts.items():
            part[rows] = name
        return digest(self.exams[["exam", "person"]].assign(part=part, y=self.y))
