"""Transformer decoder by cross-attention to the visible tokens (CrossMAE: Fu et al. 2024, arXiv:2401.14391).

A hidden patch is asked for by its place and its sequence; the answers do not see each other, so any subset of the
hidden patches can be decoded at a cost in proportion.
Shapes: B exams × views, V visible tokens, T targets, E encoder width, D decoder width, P voxels of a patch.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from umbif.encoders.vit import MillimetrePosition, initialise, key_mask, mlp
from umbif.stream.exams import SEQUENCES
from umbif.stream.patches import Patches

SEQUENCE_STD = 0.2  # smaller than a sine: one place in two sequences is nearer than two places in one
SHARPNESS = 2.0  # of the first attention: about two thirds of it fall on the asked place, where that is visible


class CrossDecoder(nn.Module):
    """Predicts the voxels of hidden patches.

    Args:
        encoder_dim: E.
        patch_size: Voxels along an edge of a patch.
        patch_mm: Edge of a patch in millimetres.
        width: D; a multiple of `num_heads`.
        depth: Blocks.
        num_heads: Attention heads.
    """

    def __init__(
        self, encoder_dim: int, patch_size: int, patch_mm: float, width: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.memory = nn.Sequential(nn.Linear(encoder_dim, width), nn.LayerNorm(width))
        self.position = MillimetrePosition(width, patch_mm)
        self.sequence = nn.Embedding(len(SEQUENCES), width)
        self.place_norm = nn.LayerNorm(width)
        blocks = [CrossBlock(width, num_heads) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.gain = nn.Embedding(len(SEQUENCES), width)
        self.predict = nn.Linear(width, patch_size**3)
        self.apply(initialise)
        nn.init.normal_(self.sequence.weight, std=SEQUENCE_STD)
        nn.init.normal_(self.gain.weight)
        for block in blocks:
            block.look_near()

    def forward(self, tokens: Tensor, visible: Patches, target: Patches) -> Tensor:
        """Tokens (B, V, E) of the visible patches, to the voxels (B, T, P) of the targets."""
        memory, place = self.memory(tokens), self._place(visible)
        mask = key_mask(visible.valid)
        x = self._place(target)
        for block in self.blocks:
            x = block(x, memory, place, mask)
        return self.predict(self.norm(x) * self.gain(target.sequence))

    def _place(self, patches: Patches) -> Tensor:
        return self.place_norm(self.position(patches.position_mm) + self.sequence(patches.sequence))


class CrossBlock(nn.Module):
    """Cross-attention and a feed-forward layer, pre-norm: keys say where and what a token is, values what it holds."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(2 * width, width)
        self.mlp = mlp(width, 4.0)

    def forward(self, x: Tensor, memory: Tensor, place: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) asks (B, V, D)."""
        q = self._heads(self.query(self.norm1(x)))
        k, v = self._heads(self.key(torch.cat([place, memory], dim=-1))), self._heads(self.value(memory))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def look_near(self) -> None:
        """Equal queries and keys of places: attention starts with the same place in another sequence.

        After Trockman and Kolter 2023 (arXiv:2305.09828). From random weights it takes thousands of steps to find out
        that a hidden patch is best told from what was seen there.
        """
        width = self.query.in_features
        with torch.no_grad():
            self.query.weight *= SHARPNESS
            self.key.weight[:, :width] = self.query.weight
            self.key.weight[:, width:] = 0

    def _heads(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        return x.view(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)


def normalised(voxels: Tensor) -> Tensor:
    """Each patch to mean 0 and variance 1: the target of He et al. 2022, section 4.1."""
    variance, mean = torch.var_mean(voxels.float(), dim=-1, keepdim=True)
    return (voxels - mean) / (variance + 1e-6).sqrt()
