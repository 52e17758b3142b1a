"""Vision transformer over the patches of every present sequence (Dosovitskiy et al. 2021, arXiv:2010.11929).

Tokens come only from patches that hold brain. One linear layer embeds the patches of all sequences, times a gain of the
sequence: what is bright on T2 is dark on T1, so without it what is shared between sequences would cancel out.
Positions are sines and cosines of millimetres from the centre of the brain's box, so any crop or spacing fits without
re-made positions; registers after Darcet et al. 2024 (arXiv:2309.16588).
Shapes: B exams × views, V tokens, R registers, E width, P voxels of a patch.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from umbif.stream.augment import Augmentation
from umbif.stream.exams import SEQUENCES, Exams
from umbif.stream.patches import Patches, choose, gather, patch_grid

SHORTEST_WAVE_PATCHES = 2.0  # two neighbouring patches stand half a wave apart
LONGEST_WAVE_MM = 200.0  # as long as a head
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
        weights: A run, or the encoder folder of one, to start from.
    """

    def __init__(
        self,
        patch_size: int = 16,
        patch_mm: float = 16.0,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_registers: int = 4,
        mlp_ratio: float = 4.0,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "patch_size": patch_size, "patch_mm": patch_mm, "embed_dim": embed_dim, "depth": depth,
            "num_heads": num_heads, "num_registers": num_registers, "mlp_ratio": mlp_ratio,
        }  # fmt: skip
        self.patch_size, self.embed_dim = patch_size, embed_dim
        self.embed = nn.Linear(patch_size**3, embed_dim)
        self.position = MillimetrePosition(embed_dim, patch_mm)
        self.sequence = nn.Embedding(len(SEQUENCES), embed_dim)
        self.gain = nn.Embedding(len(SEQUENCES), embed_dim)
        self.registers = nn.Parameter(torch.zeros(1, num_registers, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(initialise)
        nn.init.normal_(self.registers, std=0.02)
        nn.init.normal_(self.sequence.weight, std=SEQUENCE_STD)
        nn.init.normal_(self.gain.weight)
        if weights is not None:
            from umbif.encoders.weights import load_encoder_weights

            load_encoder_weights(self, weights)

    def forward(self, patches: Patches) -> tuple[Tensor, Tensor]:
        """Encodes chosen patches.

        Returns:
            Tokens (B, V, E) and their mean over the valid ones (B, E).
        """
        place = self.position(patches.position_mm) + self.sequence(patches.sequence)
        tokens = self.embed(patches.voxels.flatten(2)) * self.gain(patches.sequence) + place
        num_registers = self.registers.shape[1]
        tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], dim=1)
        mask = key_mask(patches.valid, num_registers)
        for block in self.blocks:
            tokens = block(tokens, mask)
        tokens = self.norm(tokens)[:, num_registers:]
        return tokens, masked_mean(tokens, patches.valid)

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
        padded = exams.padded(self.patch_size)
        grid = patch_grid(padded, self.patch_size)
        index, valid = choose(grid, scores, budget)
        patches = gather(padded, grid, index, valid)
        tokens, pooled = self(augmentation(patches, padded) if augmentation else patches)
        return tokens, valid, pooled

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


class Block(nn.Module):
    """Pre-norm transformer block with fused qkv."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, E) to the same; `mask` (B, 1, 1, N) is False for keys to ignore."""
        B, N, E = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.num_heads, E // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, E / heads)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(attended.transpose(1, 2).reshape(B, N, E))
        return x + self.mlp(self.norm2(x))


class MillimetrePosition(nn.Module):
    """Sines and cosines of the three coordinates, waves from two patches to longer than a head.

    Args:
        width: Of the embedding.
        patch_mm: Edge of a patch.
    """

    waves: Tensor

    def __init__(self, width: int, patch_mm: float) -> None:
        super().__init__()
        self.width, num = width, width // 6
        shortest = SHORTEST_WAVE_PATCHES * patch_mm
        lengths = shortest * (LONGEST_WAVE_MM / shortest) ** torch.linspace(0, 1, num)
        self.register_buffer("waves", 2 * math.pi / lengths, persistent=False)

    def forward(self, position_mm: Tensor) -> Tensor:
        """(B, V, 3) to (B, V, width)."""
        angles = (position_mm[..., None].float() * self.waves).flatten(-2)
        encoded = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return nn.functional.pad(encoded, (0, self.width - encoded.shape[-1]))


def mlp(width: int, ratio: float) -> nn.Sequential:
    """The feed-forward part of a block."""
    return nn.Sequential(nn.Linear(width, int(width * ratio)), nn.GELU(), nn.Linear(int(width * ratio), width))


def key_mask(valid: Tensor, num_always: int = 0) -> Tensor | None:
    """Attention mask of `valid` (B, V) after `num_always` keys that all may see; None where nothing is hidden."""
    if bool(valid.all()):
        return None
    return nn.functional.pad(valid, (num_always, 0), value=True)[:, None, None, :]


def masked_mean(tokens: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid tokens, (B, V, E) to (B, E); zeros for an exam without any."""
    weights = valid[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


def initialise(module: nn.Module) -> None:
    """Xavier for linear layers, as He et al. 2022 for masked autoencoders."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
