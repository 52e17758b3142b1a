"""From the tokens of an exam to numbers of fixed length.

Shapes: B exams, V tokens, E width.
"""

import math

import torch
from torch import Tensor


def masked_mean(tokens: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid tokens, (B, V, E) to (B, E); zeros for an exam without any."""
    weights = valid[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


def pooled(tokens: Tensor, valid: Tensor, extreme_share: float | None) -> Tensor:
    """Mean (B, E) of the valid tokens; with their `extremes` behind it, (B, 3 E), unless the share is None."""
    mean = masked_mean(tokens, valid)
    return mean if extreme_share is None else torch.cat([mean, *extremes(tokens, valid, extreme_share)], dim=-1)


def extremes(tokens: Tensor, valid: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Means of the largest and of the smallest values of each channel, (B, E) each; zeros for an exam without tokens.

    A lesion is few tokens of many, which a mean drowns; the extremes keep them (pooling of instances, as in Ilse et al.
    2018, arXiv:1802.04712).

    Args:
        tokens: (B, V, E).
        valid: (B, V) bool.
        share: Of an exam's valid tokens that each extreme is averaged over: a share and not a number, so that some
            tokens of an exam and all of them say the same.
    """
    return _largest(tokens, valid, share), -_largest(-tokens, valid, share)


def _largest(tokens: Tensor, valid: Tensor, share: float) -> Tensor:
    num = (valid.sum(1) * share).ceil().clamp_min(1)
    width = min(tokens.shape[1], math.ceil(tokens.shape[1] * share))
    top = tokens.masked_fill(~valid[..., None], -1e4).topk(width, dim=1).values
    counted = (torch.arange(width, device=tokens.device) < num[:, None]) & valid.any(1, keepdim=True)
    return (top * counted[..., None]).sum(1) / num[:, None]
