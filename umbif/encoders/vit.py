"""Vision transformer over the patches of every present sequence (Dosovitskiy et al. 2021, arXiv:2010.11929).

Tokens come only from patches that hold brain. One linear layer embeds the patches of all sequences, times a gain of the
sequence: what is bright on T2 is dark on T1, so without it what is shared between sequences would cancel out.
Registers after Darcet et al. 2024 (arXiv:2309.16588).
Shapes: B exams × views, V tokens, R registers, E width, P voxels of a patch.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from umbif.encoders.pooling import masked_mean
from umbif.encoders.position import MillimetrePosition, RotaryPosition
from umbif.encoders.transformer import Block, initialise, key_mask, norm
from umbif.errors import Problem, UsageError
from umbif.ranges import NonNegativeInt, PositiveFloat, PositiveInt, ShareBelowOne
from umbif.stream.augment import Augmentation
from umbif.stream.exams import SEQUENCES, Exams
from umbif.stream.patches import Patches, PatchGrid, choose, gather, patch_grid

SEQUENCE_STD = 0.7  # as large as a sine: what a token is of weighs as much as where it is


class ViT3D(nn.Module):
    """Encoder of exams.

    Args:
        patch_size: Voxels along an edge of a patch.
        patch_mm: Edge of a patch in millimetres, at the corpus' spacing.
        embed_dim: Width; a multiple of `num_heads`.
        depth: Blocks.
        num_heads: Attention heads.
        num_registers: Tokens without a place.
        mlp_ratio: Width of the hidden layer of a block over `embed_dim`.
        position: `sincos` adds the place to a token, `rotary` turns queries and keys by it.
        layer_scale: First factor of the branches of a block, such as 1e-5; null leaves it out.
        drop_path: How likely the last block is left out in training; earlier ones in proportion to their depth.
        activation_checkpointing: Compute blocks twice and keep less in memory.
        weights: A run, the encoder folder of one, or a file of public weights, to start from.

    Raises:
        UsageError: `num_heads` does not divide `embed_dim`.
    """

    can_mask = True  # it may be shown some patches only

    def __init__(
        self,
        patch_size: PositiveInt = 16,
        patch_mm: PositiveFloat = 16.0,
        embed_dim: PositiveInt = 384,
        depth: PositiveInt = 12,
        num_heads: PositiveInt = 6,
        num_registers: NonNegativeInt = 4,
        mlp_ratio: PositiveFloat = 4.0,
        position: Literal["sincos", "rotary"] = "sincos",
        layer_scale: PositiveFloat | None = None,
        drop_path: ShareBelowOne = 0.0,
        activation_checkpointing: bool = False,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        check_heads("model.encoder", embed_dim, num_heads)
        self.config: dict[str, Any] = {
            "patch_size": patch_size, "patch_mm": patch_mm, "embed_dim": embed_dim, "depth": depth,
            "num_heads": num_heads, "num_registers": num_registers, "mlp_ratio": mlp_ratio, "position": position,
            "layer_scale": layer_scale,
        }  # fmt: skip
        self.patch_size, self.embed_dim, self.voxel_mm = patch_size, embed_dim, patch_mm / patch_size
        self.embed = nn.Linear(patch_size**3, embed_dim)
        self.rotary = RotaryPosition(embed_dim // num_heads, patch_mm) if position == "rotary" else None
        self.position = MillimetrePosition(embed_dim, patch_mm) if position == "sincos" else None
        self.sequence = nn.Embedding(len(SEQUENCES), embed_dim)
        self.gain = nn.Embedding(len(SEQUENCES), embed_dim)
        self.registers = nn.Parameter(torch.zeros(1, num_registers, embed_dim))
        dropped = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, num_heads, mlp_ratio, layer_scale=layer_scale, drop_path=drop,
                recomputed=activation_checkpointing,
            )
            for drop in dropped
        )  # fmt: skip
        self.norm = norm(embed_dim)
        self.apply(initialise)
        nn.init.normal_(self.registers, std=0.02)
        nn.init.normal_(self.sequence.weight, std=SEQUENCE_STD)
        nn.init.normal_(self.gain.weight)
        if weights is not None:
            from umbif.encoders.weights import load_encoder_weights

            load_encoder_weights(self, weights)

    def forward(self, patches: Patches) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes chosen patches.

        Returns:
            Tokens (B, V, E), which of them are valid (B, V), and the mean of those (B, E).
        """
        num_registers = self.registers.shape[1]
        tokens = self._embedded(patches)
        tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], dim=1)  # (B, R + V, E)
        mask = key_mask(patches.valid, num_registers)
        rotation = self.rotary(patches.position_mm, num_registers) if self.rotary is not None else None
        for block in self.blocks:
            tokens = block(tokens, mask, rotation)
        tokens = self.norm(tokens)[:, num_registers:]
        return tokens, patches.valid, masked_mean(tokens, patches.valid)

    def forward_features(
        self,
        exams: Exams,
        *,
        scores: Tensor | None = None,
        budget: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes every patch that holds brain, or the `budget` of them with the smallest `scores`.

        Args:
            exams: Of any size.
            scores: (B, `num_patches`); default, all alike.
            budget: Most tokens of an exam.
            augmentation: Of their patches.

        Returns:
            Tokens (B, V, E), which of them are valid (B, V), and their mean (B, E).
        """
        exams, grid = self.grid(exams)
        index, valid = choose(grid, scores, budget)
        patches = gather(exams, grid, index, valid)
        return self(augmentation(patches, exams) if augmentation else patches)

    def grid(self, exams: Exams) -> tuple[Exams, PatchGrid]:
        """The exams padded to whole patches, and these patches."""
        exams = exams.padded(self.patch_size)
        return exams, patch_grid(exams, self.patch_size)

    def num_patches(self, exams: Exams) -> int:
        """Patches of an exam of this batch, over all sequences, background included."""
        sides = (-(-n // self.patch_size) for n in exams.image.shape[2:])
        return exams.image.shape[1] * math.prod(sides)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would only harm, beside biases and norms."""
        return {"registers", "sequence.weight", "gain.weight"}

    def layer_groups(self) -> list[list[str]]:
        """Prefixes of parameter names from the input to the output, for layer-wise learning rates."""
        inner = [[f"blocks.{i}."] for i in range(len(self.blocks))]
        return [["embed.", "sequence.", "gain.", "registers"], *inner, ["norm."]]

    def _embedded(self, patches: Patches) -> Tensor:
        tokens = self.embed(patches.voxels.flatten(2)) * self.gain(patches.sequence) + self.sequence(patches.sequence)
        return tokens if self.position is None else tokens + self.position(patches.position_mm)


def check_heads(key: str, width: int, num_heads: int) -> None:
    """Refuses a width that heads cannot share.

    Raises:
        UsageError: Names the nearest width that they can.
    """
    if width % num_heads:
        near = max(num_heads, round(width / num_heads) * num_heads)
        raise UsageError(
            Problem(f"{key}: {num_heads} heads cannot share a width of {width}", cure=f"The nearest width is {near}")
        )
