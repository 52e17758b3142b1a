"""From an exam's tokens to one logit.

Shapes: B exams, V tokens, E width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from umbif.encoders.vit import key_mask


class MeanHead(nn.Module):
    """A linear layer on the mean token.

    Args:
        embed_dim: E.
        dropout: Before the linear layer.
    """

    def __init__(self, embed_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.dropout, self.linear = nn.LayerNorm(embed_dim), nn.Dropout(dropout), nn.Linear(embed_dim, 1)

    def forward(self, tokens: Tensor, valid: Tensor, pooled: Tensor) -> Tensor:
        """Logits (B,)."""
        return self.linear(self.dropout(self.norm(pooled)))[:, 0]


class AttentiveHead(nn.Module):
    """A learned query looks for the tokens that matter (Lee et al. 2019, arXiv:1810.00825): a lesion is few of many.

    Args:
        embed_dim: E.
        num_heads: Queries, each on its share of the width.
        dropout: Before the linear layer.
    """

    def __init__(self, embed_dim: int, num_heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(num_heads, embed_dim // num_heads))
        self.key_value = nn.Linear(embed_dim, 2 * embed_dim)
        self.norm = nn.LayerNorm(2 * embed_dim)
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(2 * embed_dim, 1)
        nn.init.normal_(self.query, std=0.02)

    def forward(self, tokens: Tensor, valid: Tensor, pooled: Tensor) -> Tensor:
        """Logits (B,) from what the queries found, beside the mean."""
        B, V, E = tokens.shape
        key, value = self.key_value(tokens).view(B, V, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query = self.query[None, :, None].expand(B, -1, -1, -1)
        found = scaled_dot_product_attention(query, key, value, attn_mask=key_mask(valid)).reshape(B, E)
        return self.linear(self.dropout(self.norm(torch.cat([found, pooled], dim=-1))))[:, 0]
