"""Transformer decoder by cross-attention to the visible tokens (CrossMAE: Fu et al. 2024, arXiv:2401.14391).

A hidden patch is asked for by its place and its sequence; the answers do not see each other, so any subset of the
hidden patches can be decoded at a cost in proportion.
Shapes: B exams × views, V visible tokens, T targets, E encoder width, D decoder width, P voxels of a patch.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from umbif.encoders.vit import SEQUENCE_STD, MillimetrePosition, initialise, key_mask, mlp
from umbif.stream.exams import SEQUENCES


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
        self.memory = nn.Linear(encoder_dim, width)
        self.position = MillimetrePosition(width, patch_mm)
        self.sequence = nn.Embedding(len(SEQUENCES), width)
        self.blocks = nn.ModuleList(CrossBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, patch_size**3)
        self.apply(initialise)
        nn.init.normal_(self.sequence.weight, std=SEQUENCE_STD)

    def forward(self, tokens: Tensor, valid: Tensor, position_mm: Tensor, sequence: Tensor) -> Tensor:
        """Visible tokens (B, V, E) and the places (B, T, 3) and sequences (B, T) asked for, to voxels (B, T, P)."""
        memory = self.memory(tokens)
        mask = key_mask(valid)
        x = self.position(position_mm).to(memory.dtype) + self.sequence(sequence)
        for block in self.blocks:
            x = block(x, memory, mask)
        return self.predict(self.norm(x))


class CrossBlock(nn.Module):
    """Cross-attention and a feed-forward layer, pre-norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = mlp(width, 4.0)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) asks (B, V, D)."""
        q = self._heads(self.query(self.norm1(x)))
        k, v = (self._heads(part) for part in self.key_value(self.norm2(memory)).chunk(2, dim=-1))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm3(x))

    def _heads(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        return x.view(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)


def normalised(voxels: Tensor) -> Tensor:
    """Each patch to mean 0 and variance 1: the target of He et al. 2022, section 4.1."""
    variance, mean = torch.var_mean(voxels.float(), dim=-1, keepdim=True)
    return (voxels - mean) / (variance + 1e-6).sqrt()
