"""Patches of exams: where they lie, which hold brain, and their intensities, without a touch on the others.

A patch is a box of voxels: a cube for a transformer, the whole crop for a convolutional network.
Shapes: B exams × views, S sequences, N patches of a crop, V chosen patches over all sequences, px py pz voxels along
the edges of a patch, P voxels of it.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from umbif.stream.exams import Exams
from umbif.stream.order import Triple

MIN_BRAIN = 0.1  # a patch with less of its voxels in the brain is background


@dataclass(frozen=True)
class PatchGrid:
    """The patches of a batch of crops."""

    shape: Triple  # patches along X, Y, Z
    position_mm: Tensor  # (B, N, 3) of the centre, from the centre of the brain's box
    available: Tensor  # (B, S * N) bool: holds brain, in a sequence that is present


@dataclass(frozen=True)
class Patches:
    """Chosen patches with their z-scored intensities."""

    voxels: Tensor  # (B, V, px, py, pz) float32
    position_mm: Tensor  # (B, V, 3)
    sequence: Tensor  # (B, V) int64, index into SEQUENCES
    entry: Tensor  # (B, V) int64, index into S
    valid: Tensor  # (B, V) bool: False where an exam had fewer than V

    def split(self, num: int) -> tuple[Self, Self]:
        """The first `num` patches of each exam, and the others."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        first, others = ({name: part[:, cut] for name, part in parts.items()} for cut in (slice(num), slice(num, None)))
        return type(self)(**first), type(self)(**others)

    def mirrored(self, chosen: Tensor) -> Self:
        """The patches of the mirrored head (left for right), where `chosen` (B,)."""
        sign = torch.where(chosen, -1.0, 1.0)[:, None, None]
        position = torch.cat([self.position_mm[..., :1] * sign, self.position_mm[..., 1:]], dim=-1)
        voxels = torch.where(chosen[:, None, None, None, None], self.voxels.flip(2), self.voxels)
        return replace(self, voxels=voxels, position_mm=position)


def patch_grid(exams: Exams, patch_size: int | Triple, min_brain: float = MIN_BRAIN) -> PatchGrid:
    """The patches of crops whose sides are multiples of `patch_size` (see `Exams.padded`).

    Args:
        exams: The batch.
        patch_size: Voxels along the edges of a patch; one number for a cube.
        min_brain: A patch with less of its voxels in the brain is not available.
    """
    px, py, pz = (patch_size,) * 3 if isinstance(patch_size, int) else patch_size
    x, y, z = (n // p for n, p in zip(exams.brain.shape[1:], (px, py, pz), strict=True))
    inside = exams.brain.view(-1, x, px, y, py, z, pz).sum((2, 4, 6), dtype=torch.float32)
    axes = [torch.arange(n, device=inside.device) for n in (x, y, z)]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)  # (N, 3)
    middle = (index + 0.5) * torch.tensor((px, py, pz), device=index.device)  # of a patch, from the crop's corner
    centre = exams.crop_start[:, None] + middle - exams.box[:, None] / 2
    holds = inside.flatten(1) / (px * py * pz) >= min_brain
    available = (exams.present[:, :, None] & holds[:, None]).flatten(1)
    return PatchGrid((x, y, z), centre * exams.spacing_mm, available)


def gather(exams: Exams, grid: PatchGrid, index: Tensor, valid: Tensor) -> Patches:
    """The patches at `index` (B, V), which counts through S * N: sequence by sequence."""
    B, S = exams.image.shape[:2]
    x, y, z = grid.shape
    px, py, pz = edges(exams, grid)
    entry, place = index // (x * y * z), index % (x * y * z)
    blocks = exams.image.view(B, S, x, px, y, py, z, pz).permute(0, 1, 2, 4, 6, 3, 5, 7)
    row = torch.arange(B, device=index.device)[:, None]
    stored = blocks[row, entry, place // (y * z), place // z % y, place % z]  # (B, V, px, py, pz): copies these only
    factor, shift = (numbers.gather(1, entry)[..., None, None, None] for numbers in exams.to_z_scores())
    return Patches(
        voxels=stored.float() * factor + shift,
        position_mm=grid.position_mm.gather(1, place[..., None].expand(-1, -1, 3)),
        sequence=exams.sequence.gather(1, entry),
        entry=entry,
        valid=valid,
    )


def scatter(exams: Exams, grid: PatchGrid, index: Tensor, valid: Tensor, voxels: Tensor) -> Tensor:
    """Puts patches (B, V, P) at `index` (B, V) back to their places in (B, S, X, Y, Z); NaN elsewhere."""
    B, S = exams.image.shape[:2]
    x, y, z = grid.shape
    px, py, pz = edges(exams, grid)
    flat = torch.full((B, S * x * y * z, px * py * pz), torch.nan, device=voxels.device)
    flat.scatter_(1, index[..., None].expand_as(voxels), torch.where(valid[..., None], voxels.float(), torch.nan))
    blocks = flat.view(B, S, x, y, z, px, py, pz).permute(0, 1, 2, 5, 3, 6, 4, 7)
    return blocks.reshape(exams.image.shape)


def edges(exams: Exams, grid: PatchGrid) -> Triple:
    """Voxels along the edges of a patch, px, py, pz."""
    px, py, pz = (n // num for n, num in zip(exams.image.shape[2:], grid.shape, strict=True))
    return px, py, pz


def choose(grid: PatchGrid, scores: Tensor | None = None, budget: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices (B, V) of every available patch, or of the `budget` with the smallest scores; and which are valid.

    V is the largest number that an exam of the batch has (at least 1), so a batch is as small as it can be.
    """
    counts = grid.available.sum(1)
    width = max(1, int(counts.max()))
    width = min(width, budget) if budget else width
    order = torch.zeros(grid.available.shape, device=counts.device) if scores is None else scores
    index = torch.where(grid.available, order, torch.inf).argsort(dim=1, stable=True)[:, :width]
    valid = torch.arange(width, device=counts.device) < counts[:, None]
    return index, valid
