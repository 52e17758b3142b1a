"""The transformer block of encoders and decoders, pre-norm (Dosovitskiy et al. 2021, arXiv:2010.11929).

Optional parts: layer scale (Touvron et al. 2021, arXiv:2103.17239) and stochastic depth (Huang et al. 2016,
arXiv:1603.09382), which deep encoders need to train well.
Shapes: B exams × views, N tokens, E width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from umbif.encoders.position import Rotation, rotate

NORM_EPS = 1e-6  # as in the public masked autoencoders, whose weights are to give the same numbers here


class Block(nn.Module):
    """Self-attention with fused qkv, and a feed-forward layer.

    Args:
        width: E.
        num_heads: Divides `width`.
        mlp_ratio: Width of the hidden layer over `width`.
        layer_scale: First factor of both branches; None leaves it out.
        drop_path: How likely a branch of an exam is left out in training.
        recomputed: Keep the input alone, and compute the rest once more in the backward.
    """

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float = 4.0, *, layer_scale: float | None = None,
        drop_path: float = 0.0, recomputed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.drop_path, self.recomputed = num_heads, drop_path, recomputed
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = mlp(width, mlp_ratio)
        scales = [None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2)]
        self.scale1, self.scale2 = scales

    def forward(self, x: Tensor, mask: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """(B, N, E) to the same; `mask` (B, 1, 1, N) is False for keys to ignore."""
        if self.recomputed and torch.is_grad_enabled():  # in here: torch.compile has to see it
            return checkpoint(self._both, x, mask, rotation, use_reentrant=False)
        return self._both(x, mask, rotation)

    def _both(self, x: Tensor, mask: Tensor | None, rotation: Rotation | None) -> Tensor:
        x = x + self._branch(self._attention(self.norm1(x), mask, rotation), self.scale1)
        return x + self._branch(self.mlp(self.norm2(x)), self.scale2)

    def _attention(self, x: Tensor, mask: Tensor | None, rotation: Rotation | None) -> Tensor:
        B, N, E = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, E // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, E / heads)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).reshape(B, N, E))

    def _branch(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            x = x * scale
        if self.drop_path and self.training:
            kept = 1 - self.drop_path
            x = x * (torch.rand(len(x), 1, 1, device=x.device) < kept) / kept
        return x


def norm(width: int) -> nn.LayerNorm:
    """Layer norm as all blocks use it."""
    return nn.LayerNorm(width, eps=NORM_EPS)


def mlp(width: int, ratio: float) -> nn.Sequential:
    """The feed-forward part of a block."""
    return nn.Sequential(nn.Linear(width, int(width * ratio)), nn.GELU(), nn.Linear(int(width * ratio), width))


def key_mask(valid: Tensor, num_always: int = 0) -> Tensor | None:
    """Attention mask of `valid` (B, V) after `num_always` keys that all may see; None where nothing is hidden.

    Where an exam has no valid key at all every key is seen: attention to nothing is NaN, and nobody counts the answer.
    """
    if bool(valid.all()):
        return None
    if num_always == 0:
        valid = valid | ~valid.any(dim=1, keepdim=True)
    return pad(valid, (num_always, 0), value=True)[:, None, None, :]


def initialise(module: nn.Module) -> None:
    """Xavier for linear layers, as He et al. 2022 for masked autoencoders."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
