"""Augmentation on the device, each draw a function of (seed, slot, view), of the chosen patches only.

Two views of an exam must not be matched by their histogram or their shading, so each draws a monotone intensity curve
and a bias field of its own for each sequence. The field is a polynomial of third order (Van Leemput et al. 1999,
doi:10.1109/42.811268).
Shapes: B exams × views, S sequences, V patches, px py pz voxels along the edges of a patch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from umbif.ranges import NonNegativeFloat, Share
from umbif.stream.exams import SEQUENCES, Exams
from umbif.stream.patches import Patches
from umbif.stream.philox import uniform

FLIP, CURVE, BIAS, SCALE, NAME = 10, 11, 12, 13, 14  # purposes: their numbers are independent
ORDER = 3  # of the polynomial: as smooth as a coil's profile
HEAD_MM = 90.0  # half of a head: coordinates of the polynomial are about -1 to 1


@dataclass(frozen=True)
class Augmentation:
    """Strengths; 0 turns a part off.

    Args:
        flip_probability: Of mirroring left and right.
        curve: Largest log gamma: intensities between the darkest and the brightest of the brain are raised to
            exp(±curve).
        bias: Amplitude of each coefficient of the log of the multiplicative bias field.
        scale: Largest relative change of contrast, and largest change of brightness in standard deviations.
        hide_name: Share of the sequences that are shown as `other`: what they are must be told from what they show.
    """

    flip_probability: Share = 0.5
    curve: NonNegativeFloat = 0.1
    bias: NonNegativeFloat = 0.05
    scale: NonNegativeFloat = 0.1
    hide_name: Share = 0.0

    def __call__(self, patches: Patches, exams: Exams) -> Patches:
        """The same exam and view give the same curve, field and mirroring to all of their patches."""
        voxels = patches.voxels
        if self.curve or self.bias:
            low, span = (per_patch(numbers, patches) for numbers in exams.z_range())
            log_unit = ((voxels - low) / span).clamp_min(0).log()  # -inf of the darkest, which exp brings back to zero
            if self.bias:
                log_unit = log_unit + self._log_bias_field(patches, exams)
            if self.curve:
                log_unit = log_unit * per_patch((self.curve * _draw(exams, CURVE)).exp(), patches)
            voxels = log_unit.exp() * span + low
        if self.scale:
            contrast, brightness = (self.scale * _draw(exams, SCALE, 2)).unbind(-1)
            voxels = voxels * (1 + per_patch(contrast, patches)) + per_patch(brightness, patches)
        augmented = replace(patches, voxels=voxels)
        if self.hide_name:
            hidden = uniform(exams.seed, exams.slot, exams.view, NAME, exams.image.shape[1]) < self.hide_name  # (B, S)
            sequence = augmented.sequence.masked_fill(hidden.gather(1, patches.entry), SEQUENCES.index("other"))
            augmented = replace(augmented, sequence=sequence)
        if not self.flip_probability:
            return augmented
        return augmented.mirrored(uniform(exams.seed, exams.slot, exams.view, FLIP, 1)[:, 0] < self.flip_probability)

    def _log_bias_field(self, patches: Patches, exams: Exams) -> Tensor:
        """Log of it, (B, V, px, py, pz): one smooth field over the head for each sequence of each view."""
        num = ORDER + 1
        degree = torch.stack(torch.meshgrid(*[torch.arange(num, device=exams.image.device)] * 3, indexing="ij")).sum(0)
        drawn = self.bias * _draw(exams, BIAS, num**3) * (degree <= ORDER).flatten()
        field = drawn.view(*drawn.shape[:2], num, num, num)
        row = torch.arange(len(field), device=field.device)[:, None]
        field = field[row, patches.entry]  # (B, V, 4, 4, 4): coefficients of x, y and z
        x, y, z = (_powers(patches, axis, exams.spacing_mm) for axis in range(3))
        field = torch.einsum("bvijk,bvzk->bvijz", field, z)
        field = torch.einsum("bvijz,bvyj->bviyz", field, y)
        return torch.einsum("bviyz,bvxi->bvxyz", field, x)


def per_patch(numbers: Tensor, patches: Patches) -> Tensor:
    """Numbers of each sequence (B, S) to the patches of that sequence, (B, V, 1, 1, 1)."""
    return numbers.gather(1, patches.entry)[..., None, None, None]


def _powers(patches: Patches, axis: int, spacing_mm: float) -> Tensor:
    """What the coefficients of an axis are multiplied by at each voxel along it: (B, V, p, 4)."""
    p, device = patches.voxels.shape[2 + axis], patches.voxels.device
    offset_mm = (torch.arange(p, device=device) + 0.5 - p / 2) * spacing_mm
    where = (patches.position_mm[..., axis, None] + offset_mm) / HEAD_MM
    return where[..., None] ** torch.arange(ORDER + 1, device=device)


def _draw(exams: Exams, purpose: int, count: int = 1) -> Tensor:
    """Numbers in [-1, 1), `count` for each sequence: (B, S), or (B, S, count)."""
    S = exams.image.shape[1]
    drawn = 2 * uniform(exams.seed, exams.slot, exams.view, purpose, S * count) - 1
    return drawn.view(-1, S, count) if count > 1 else drawn
