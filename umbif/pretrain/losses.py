"""The two losses: mean squared error of hidden patches, and InfoNCE (van den Oord et al. 2018, arXiv:1807.03748).

Shapes: B exams × views, T targets, P voxels, R rows that ask, K keys, D dimensions of a projection.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from umbif.encoders.gather import summed
from umbif.pretrain.units import Identity
from umbif.stream.exams import SEQUENCES
from umbif.stream.patches import Patches


def normalised(voxels: Tensor) -> Tensor:
    """Each patch to mean 0 and variance 1: the target of He et al. 2022 (arXiv:2111.06377), section 4.1."""
    variance, mean = torch.var_mean(voxels.float(), dim=-1, keepdim=True)
    return (voxels - mean) / (variance + 1e-6).sqrt()


@dataclass(frozen=True)
class TargetErrors:
    """Mean squared error of each predicted patch."""

    error: Tensor  # (B, T)
    valid: Tensor  # (B, T) bool
    sequence: Tensor  # (B, T)

    @classmethod
    def of(cls, predicted: Tensor, target: Patches, sequence: Tensor, normalise: bool) -> Self:
        """Of predictions (B, T, P) of z-scores of the brain, or, with `normalise`, of normalised patches.

        Args:
            predicted: (B, T, P).
            target: What was hidden.
            sequence: (B, S) which the entries of an exam are, whether or not the encoder was told.
            normalise: See above.
        """
        voxels = target.voxels.flatten(2)
        error = (predicted.float() - (normalised(voxels) if normalise else voxels)).square().mean(-1)
        return cls(error, target.valid, sequence.gather(1, target.entry))

    def by_exam(self) -> Tensor:
        """Mean over the valid targets of each exam, (B,); zero for an exam without any."""
        return self.error.where(self.valid, 0).sum(1) / self.valid.sum(1).clamp_min(1)

    def by_sequence(self) -> dict[str, Tensor]:
        """Mean over the valid targets of each sequence that the batch asked for, over all ranks."""
        which, error = self.sequence[self.valid], self.error[self.valid]
        sums = error.new_zeros(2, len(SEQUENCES)).index_add(1, which, torch.stack([error, torch.ones_like(error)]))
        total, count = summed(sums.detach())
        return {name: total[i] / count[i] for i, name in enumerate(SEQUENCES) if count[i]}


@dataclass(frozen=True)
class Losses:
    """What a batch costs."""

    total: Tensor  # (B,) weighted sum of the parts
    parts: dict[str, Tensor]  # each (B,)
    targets: TargetErrors | None = None

    def means(self) -> dict[str, Tensor]:
        """Means over the batch, for logs."""
        return {name: value.mean() for name, value in {"loss": self.total, **self.parts}.items()}


def full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast would make bf16 of a matrix product, whatever it is given; similarities are told apart by less."""
    return torch.autocast(tensor.device.type, enabled=False)


def info_nce(
    query: Tensor,
    key: Tensor,
    who: Identity,
    whose: Identity,
    *,
    temperature: float,
    same_person_negatives: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of telling another view of the same exam from the views of other people.

    Args:
        query: (R, D).
        key: (K, D).
        who: Of the queries.
        whose: Of the keys. Keys of the same slot and sequence in another view are positives. Those of the same view, or
            of another sequence, are left out.
        temperature: Of the softmax.
        same_person_negatives: Let other exams of one person be negatives. Their brain is the same, so pushing them
            apart teaches the scanner and the day.

    Returns:
        (R,) loss of each query, zero for one that is not valid or has no positive; and which of them had one.
    """
    with full_precision(query):
        logits = normalize(query.float(), dim=-1) @ normalize(key.float(), dim=-1).T / temperature  # (R, K)
    same_slot = who.slot[:, None] == whose.slot
    comparable = (who.sequence[:, None] == whose.sequence) & whose.valid
    positive = same_slot & (who.view[:, None] != whose.view) & comparable
    alike = same_slot if same_person_negatives else same_slot | (who.person[:, None] == whose.person)
    asked = positive.any(dim=1) & who.valid
    left_out = ~positive & (alike | ~comparable)
    logits = logits.masked_fill(left_out & asked[:, None], -torch.inf)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    loss = -torch.where(positive, log_probability, 0.0).sum(1) / positive.sum(1).clamp_min(1)
    return torch.where(asked, loss, 0.0), asked
