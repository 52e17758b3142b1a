"""What of a view is compared with other views: all of it, or each of its sequences.

Shapes: B exams × views, V tokens, U units of a view, E width, F features of a unit, R = B * U rows.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from umbif.encoders.pooling import pooled
from umbif.stream.exams import Exams
from umbif.stream.patches import Patches

Unit = Literal["view", "sequence"]


@dataclass(frozen=True)
class Identity:
    """Whose a row is: what makes two of them a pair, or keeps them from being opponents."""

    rows: Tensor  # (R, 5) int64: the columns below

    @property
    def slot(self) -> Tensor:
        """(R,) number of the exam in the stream."""
        return self.rows[:, 0]

    @property
    def view(self) -> Tensor:
        """(R,) number of the view."""
        return self.rows[:, 1]

    @property
    def person(self) -> Tensor:
        """(R,) code of the person."""
        return self.rows[:, 2]

    @property
    def sequence(self) -> Tensor:
        """(R,) index into SEQUENCES; 0 where views are compared as a whole."""
        return self.rows[:, 3]

    @property
    def valid(self) -> Tensor:
        """(R,) bool."""
        return self.rows[:, 4].bool()


@dataclass(frozen=True)
class Units:
    """The units of a batch."""

    features: Tensor  # (B, U, F)
    who: Identity  # of the rows of `features`

    @classmethod
    def of(
        cls, tokens: Tensor, valid: Tensor, patches: Patches, exams: Exams, unit: Unit, extreme_share: float | None
    ) -> Self:
        """Pools tokens.

        Args:
            tokens: (B, V, E), of as many channels as are compared.
            valid: (B, V) bool.
            patches: What the tokens are of; a convolution makes several tokens of each.
            exams: The batch.
            unit: What is compared.
            extreme_share: F is 3 E with extremes of that share, see `pooled`; None leaves the mean alone.
        """
        if unit == "view":
            entry, sequence = torch.zeros_like(valid, dtype=torch.int64), torch.zeros_like(exams.sequence[:, :1])
        else:
            entry = patches.entry.repeat_interleave(tokens.shape[1] // patches.entry.shape[1], dim=1)
            sequence = exams.sequence
        own = [valid & (entry == one) for one in range(sequence.shape[1])]
        features = torch.stack([pooled(tokens, which, extreme_share) for which in own], dim=1)
        known = torch.stack([exams.slot, exams.view, exams.person], dim=1)[:, None].expand(-1, len(own), -1)
        own_columns = torch.stack([sequence, torch.stack(own, dim=1).any(-1).long()], dim=-1)
        return cls(features, Identity(torch.cat([known, own_columns], dim=-1).flatten(0, 1)))
