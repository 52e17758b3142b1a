"""Where a patch lies, in millimetres from the centre of the brain's box: any crop, box or spacing fits.

Either added to the tokens as sines and cosines (Vaswani et al. 2017, arXiv:1706.03762, along three axes), or by turning
queries and keys (rotary: Su et al. 2021, arXiv:2104.09864), so that attention depends on how far two patches lie apart.
Shapes: B exams × views, N tokens, E width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

SHORTEST_WAVE_PATCHES = 2.0  # two neighbouring patches stand half a wave apart
LONGEST_WAVE_MM = 200.0  # as long as a head
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (B, 1, N, half of a head)


class MillimetrePosition(nn.Module):
    """Sines and cosines of the three coordinates, waves from two patches to longer than a head.

    Args:
        width: Of the embedding.
        patch_mm: Edge of a patch.
    """

    waves: Tensor

    def __init__(self, width: int, patch_mm: float) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("waves", wave_numbers(width // 6, patch_mm), persistent=False)

    def forward(self, position_mm: Tensor) -> Tensor:
        """(B, N, 3) to (B, N, width)."""
        phase = phases(position_mm, self.waves)
        encoded = torch.cat([phase.sin(), phase.cos()], dim=-1)
        return pad(encoded, (0, self.width - encoded.shape[-1]))


class RotaryPosition(nn.Module):
    """Angles by which the halves of a head are turned.

    Args:
        head_dim: Width of an attention head; even. What three axes cannot share evenly is not turned.
        patch_mm: Edge of a patch.
    """

    waves: Tensor

    def __init__(self, head_dim: int, patch_mm: float) -> None:
        super().__init__()
        self.num_pairs = head_dim // 2
        self.register_buffer("waves", wave_numbers(self.num_pairs // 3, patch_mm), persistent=False)

    def forward(self, position_mm: Tensor, num_before: int) -> Rotation:
        """Of `num_before` tokens without a place, which are not turned, and then of those at (B, N, 3)."""
        phase = phases(position_mm, self.waves)
        phase = pad(phase, (0, self.num_pairs - phase.shape[-1], num_before, 0))[:, None]
        return phase.cos(), phase.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys (B, heads, N, head) turned; their lengths stay."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def wave_numbers(num: int, patch_mm: float) -> Tensor:
    """(num,) radians per millimetre."""
    shortest = SHORTEST_WAVE_PATCHES * patch_mm
    return 2 * math.pi / (shortest * (LONGEST_WAVE_MM / shortest) ** torch.linspace(0, 1, num))


def phases(position_mm: Tensor, waves: Tensor) -> Tensor:
    """(B, N, 3) to (B, N, 3 * waves)."""
    return (position_mm[..., None].float() * waves).flatten(-2)
