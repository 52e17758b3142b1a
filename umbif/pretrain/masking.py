"""Which patches an encoder sees and which a decoder must predict, after He et al. 2022 (arXiv:2111.06377).

The budgets are fixed, so a batch is rectangular whatever sequences its exams have, and background is never encoded.
Shapes: B exams × views, S sequences, N patches of a crop, V visible, T targets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from umbif.ranges import PositiveInt, PositiveShare, Share
from umbif.stream.exams import Exams
from umbif.stream.patches import PatchGrid
from umbif.stream.philox import uniform

TOKENS, COLUMNS, PLACES, TARGETS = 20, 21, 22, 23  # purposes: their numbers are independent


@dataclass(frozen=True)
class Masks:
    """The visible patches and the targets of a batch, as indices into S * N."""

    visible: Tensor  # (B, V)
    visible_valid: Tensor  # (B, V) bool
    target: Tensor  # (B, T)
    target_valid: Tensor  # (B, T) bool

    def joined(self) -> tuple[Tensor, Tensor]:
        """Indices (B, V + T) and which are valid: what is read and augmented, once for both."""
        index = torch.cat([self.visible, self.target], dim=1)
        return index, torch.cat([self.visible_valid, self.target_valid], dim=1)


@dataclass(frozen=True)
class Masking:
    """How patches are hidden, and how many of them are asked for.

    Args:
        num_visible: Most patches that the encoder sees of a view, over all of its sequences.
        max_visible_share: Most of an exam's own patches that it ever shows, so that something is left to predict.
        num_targets: Most hidden patches that are predicted; null for all.
        decoded_share: Share of an exam's hidden patches that are predicted, as far as `num_targets` allows.
        column_share: Share of the places that are hidden in every sequence, and asked for in all of them together:
            there, one sequence has to be told from another without a look at any.
    """

    num_visible: PositiveInt = 48
    max_visible_share: PositiveShare = 0.5
    num_targets: PositiveInt | None = 48
    decoded_share: PositiveShare = 1.0
    column_share: Share = 0.25

    def draw(self, exams: Exams, grid: PatchGrid) -> Masks:
        """Draws from the patches with brain of all present sequences; (seed, slot, view) decide everything.

        Args:
            exams: The batch.
            grid: Its patches.
        """
        B, S = exams.present.shape
        N = grid.position_mm.shape[1]
        score, column, place, alone = (
            uniform(exams.seed, exams.slot, exams.view, purpose, num)
            for purpose, num in ((TOKENS, S * N), (COLUMNS, N), (PLACES, N), (TARGETS, S * N))
        )
        in_column = (column < self.column_share)[:, None].expand(B, S, N).flatten(1)
        shared = place[:, None].expand(B, S, N).flatten(1)
        visible, visible_valid = _first(
            score + in_column.float(), grid.available, self.num_visible, self.max_visible_share
        )
        hidden = grid.available.scatter(1, visible, grid.available.gather(1, visible) & ~visible_valid)
        num_targets = max(1, int(hidden.sum(1).max())) if self.num_targets is None else self.num_targets
        target, target_valid = _first(torch.where(in_column, shared, alone), hidden, num_targets, self.decoded_share)
        return Masks(visible, visible_valid, target, target_valid)


def _first(score: Tensor, candidates: Tensor, num: int, share: float) -> tuple[Tensor, Tensor]:
    """The `num` candidates with the smallest scores, at most `share` of an exam's (rounded up)."""
    num = min(num, score.shape[1])
    index = torch.where(candidates, score, torch.inf).argsort(dim=1, stable=True)[:, :num]
    allowed = (candidates.sum(1) * share).ceil()
    return index, torch.arange(num, device=score.device) < allowed[:, None]
