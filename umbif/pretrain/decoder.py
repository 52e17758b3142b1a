"""Transformer decoders: from the tokens of what was seen to the voxels of what was hidden.

`CrossDecoder` asks for each hidden patch alone (CrossMAE: Fu et al. 2024, arXiv:2401.14391), so that any subset of them
costs in proportion. `JointDecoder` lets all patches see each other (He et al. 2022, arXiv:2111.06377).
Shapes: B exams × views, V visible tokens, T targets, E encoder width, D decoder width, P voxels of a patch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from umbif.encoders.position import MillimetrePosition
from umbif.encoders.transformer import Block, initialise, key_mask, mlp, norm
from umbif.encoders.vit import ViT3D, check_heads
from umbif.ranges import PositiveInt
from umbif.stream.exams import SEQUENCES
from umbif.stream.patches import Patches

SEQUENCE_STD = 0.2  # smaller than a sine: one place in two sequences is nearer than two places in one
SHARPNESS = 2.0  # of the first attention: about two thirds of it fall on the asked place, where that is visible


@dataclass(frozen=True)
class DecoderShape:
    """Which decoder, and how large.

    Args:
        kind: `cross` or `joint`.
        width: D; a multiple of `num_heads`.
        depth: Blocks.
        num_heads: Attention heads.
    """

    kind: Literal["cross", "joint"] = "cross"
    width: PositiveInt = 512
    depth: PositiveInt = 8
    num_heads: PositiveInt = 8


def build_decoder(encoder: ViT3D, shape: DecoderShape) -> "CrossDecoder | JointDecoder":
    """The decoder of an encoder's tokens.

    Raises:
        UsageError: The heads cannot share the width.
    """
    check_heads("model.decoder", shape.width, shape.num_heads)
    return CrossDecoder(encoder, shape) if shape.kind == "cross" else JointDecoder(encoder, shape)


class CrossDecoder(nn.Module):
    """Predicts the voxels of hidden patches, each by its own look at the visible tokens.

    Args:
        encoder: Whose tokens these are.
        shape: Width, depth and heads.
    """

    def __init__(self, encoder: ViT3D, shape: DecoderShape) -> None:
        super().__init__()
        self.memory = nn.Sequential(nn.Linear(encoder.embed_dim, shape.width), norm(shape.width))
        self.place = Place(shape.width, encoder.config["patch_mm"])
        blocks = [CrossBlock(shape.width, shape.num_heads) for _ in range(shape.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.head = VoxelHead(shape.width, encoder.patch_size**3)
        self.apply(initialise)
        for block in blocks:
            block.look_near()

    def forward(self, tokens: Tensor, visible: Patches, target: Patches) -> Tensor:
        """Tokens (B, V, E) of the visible patches, to the voxels (B, T, P) of the targets."""
        memory, place = self.memory(tokens), self.place(visible)
        mask = key_mask(visible.valid)
        x = self.place(target)
        for block in self.blocks:
            x = block(x, memory, place, mask)
        return self.head(x, target.sequence)

    def no_weight_decay(self) -> set[str]:
        """See `ViT3D.no_weight_decay`."""
        return {"place.sequence.weight", "head.gain.weight"}


class JointDecoder(nn.Module):
    """Predicts the voxels of hidden patches together: self-attention over visible tokens and mask tokens.

    Args:
        encoder: Whose tokens these are.
        shape: Width, depth and heads.
    """

    def __init__(self, encoder: ViT3D, shape: DecoderShape) -> None:
        super().__init__()
        self.memory = nn.Linear(encoder.embed_dim, shape.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.place = Place(shape.width, encoder.config["patch_mm"])
        self.blocks = nn.ModuleList(Block(shape.width, shape.num_heads) for _ in range(shape.depth))
        self.head = VoxelHead(shape.width, encoder.patch_size**3)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, visible: Patches, target: Patches) -> Tensor:
        """Tokens (B, V, E) of the visible patches, to the voxels (B, T, P) of the targets."""
        x = torch.cat([self.memory(tokens) + self.place(visible), self.mask_token + self.place(target)], dim=1)
        mask = key_mask(torch.cat([visible.valid, target.valid], dim=1))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x[:, tokens.shape[1] :], target.sequence)

    def no_weight_decay(self) -> set[str]:
        """See `ViT3D.no_weight_decay`."""
        return {"mask_token", "place.sequence.weight", "head.gain.weight"}


class Place(nn.Module):
    """Where a patch lies and of which sequence it is: (B, N, D)."""

    def __init__(self, width: int, patch_mm: float) -> None:
        super().__init__()
        self.position = MillimetrePosition(width, patch_mm)
        self.sequence = nn.Embedding(len(SEQUENCES), width)
        self.norm = norm(width)
        nn.init.normal_(self.sequence.weight, std=SEQUENCE_STD)

    def forward(self, patches: Patches) -> Tensor:
        """Of each patch."""
        return self.norm(self.position(patches.position_mm) + self.sequence(patches.sequence))


class VoxelHead(nn.Module):
    """From a token to voxels, with a gain of its sequence: bright in one sequence is dark in another."""

    def __init__(self, width: int, num_voxels: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.gain = nn.Embedding(len(SEQUENCES), width)
        self.predict = nn.Linear(width, num_voxels)
        nn.init.normal_(self.gain.weight)

    def forward(self, x: Tensor, sequence: Tensor) -> Tensor:
        """(B, T, D) and (B, T) to (B, T, P)."""
        return self.predict(self.norm(x) * self.gain(sequence))


class CrossBlock(nn.Module):
    """Cross-attention and a feed-forward layer, pre-norm: keys say where and what a token is, values what it holds."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = norm(width), norm(width)
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
