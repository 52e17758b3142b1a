"""Which patches an encoder sees and which a decoder must predict, after He et al. 2022 (arXiv:2111.06377).

The budgets are fixed, so a batch is rectangular whatever sequences its exams have, and background is never encoded.
Shapes: B exams × views, S sequences, N patches of a crop, V visible, T targets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from umbif.stream.exams import Exams
from umbif.stream.patches import PatchGrid
from umbif.stream.philox import uniform

TOKENS, COLUMNS, PLACES, TARGETS = 20, 21, 22, 23  # purposes: their numbers are independent


@dataclass(frozen=True)
class Masking:
    """The visible patches and the targets of a batch, as indices into S * N."""

    visible: Tensor  # (B, V)
    visible_valid: Tensor  # (B, V) bool
    target: Tensor  # (B, T)
    target_valid: Tensor  # (B, T) bool


def draw_masking(
    exams: Exams, grid: PatchGrid, *, num_visible: int, num_targets: int, column_share: float
) -> Masking:
    """Draws what is visible and what is predicted, over all present sequences, from patches with brain only.

    Args:
        exams: The batch; (seed, slot, view) are the source of all randomness.
        grid: Its patches.
        num_visible: Budget of visible patches. An exam never shows more than half of its patches, so that something
            is left to predict.
        num_targets: Budget of predicted patches.
        column_share: Share of the places that are hidden in every sequence, and asked for in all of them together:
            there, one sequence has to be told from another without a look at any.
    """
    B, S = exams.present.shape
    N = grid.position_mm.shape[1]
    score = uniform(exams.seed, exams.slot, exams.view, TOKENS, S * N)
    column = uniform(exams.seed, exams.slot, exams.view, COLUMNS, N) < column_share
    place = uniform(exams.seed, exams.slot, exams.view, PLACES, N)
    alone = uniform(exams.seed, exams.slot, exams.view, TARGETS, S * N)
    in_column = column[:, None].expand(B, S, N).flatten(1)
    shared = place[:, None].expand(B, S, N).flatten(1)
    visible, visible_valid = _first(score + in_column.float(), grid.available, num_visible, most=0.5)
    hidden = grid.available.scatter(1, visible, grid.available.gather(1, visible) & ~visible_valid)
    target, target_valid = _first(torch.where(in_column, shared, alone), hidden, num_targets)
    return Masking(visible, visible_valid, target, target_valid)


def _first(score: Tensor, candidates: Tensor, num: int, most: float = 1.0) -> tuple[Tensor, Tensor]:
    """The `num` candidates with the smallest scores, at most the share `most` of an exam's (rounded up)."""
    num = min(num, score.shape[1])
    index = torch.where(candidates, score, torch.inf).argsort(dim=1, stable=True)[:, :num]
    allowed = (candidates.sum(1) * most).ceil()
    return index, torch.arange(num, device=score.device) < allowed[:, None]
