"""The two losses: mean squared error of hidden patches, and InfoNCE (van den Oord et al. 2018, arXiv:1807.03748).

Both return one value an exam, so that a broken sample can be named.
Shapes: B exams × views, T targets, P voxels, D dimensions of a projection, W ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


def reconstruction_loss(predicted: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error over the valid targets of each exam: (B, T, P) to (B,)."""
    error = (predicted.float() - target.float()).square().mean(-1)
    return (error * valid).sum(1) / valid.sum(1).clamp_min(1)


def info_nce(projection: Tensor, slot: Tensor, person: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of telling the other view of the same exam from the views of other people, over all ranks.

    Args:
        projection: (B, D) of this rank; every slot appears with two views.
        slot: (B,) the exam's number in the stream: its two views are each other's positives.
        person: (B,) other exams of one person are neither positives nor negatives.
        temperature: Of the softmax.

    Returns:
        (B,) loss of this rank's views as anchors. The mean over ranks of the means is the loss of the joined batch,
        and so are its gradients under data-parallel averaging.
    """
    z, num = normalize(projection.float(), dim=-1), len(projection)
    keys, key_slot, key_person = _gathered(z), _gathered_ids(slot), _gathered_ids(person)
    logits = z @ keys.T / temperature  # (B, W * B)
    positive = slot[:, None] == key_slot[None]
    same_person = person[:, None] == key_person[None]
    itself = torch.zeros_like(positive)
    itself[torch.arange(num), _first_row(num) + torch.arange(num)] = True
    positive = positive & ~itself
    logits = logits.masked_fill((same_person & ~positive) | itself, -torch.inf)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    return -torch.where(positive, log_probability, 0.0).sum(1) / positive.sum(1).clamp_min(1)


def standardised(projection: Tensor) -> Tensor:
    """Projections (B, D) with mean 0 and variance 1 in each dimension, over the joined batch of all ranks.

    Without it all projections start out nearly parallel, and the contrast stays at that of guessing.
    """
    std, mean = torch.std_mean(_gathered(projection.float()), dim=0, keepdim=True)
    return (projection - mean) / (std + 1e-4)


class _Gather(torch.autograd.Function):
    """The rows of all ranks; each rank's rows get the gradients of all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _joined(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def _gathered(values: Tensor) -> Tensor:
    return _Gather.apply(values) if _distributed() else values


def _gathered_ids(values: Tensor) -> Tensor:
    return _joined(values) if _distributed() else values


def _joined(values: Tensor) -> Tensor:
    everywhere = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everywhere, values.contiguous())
    return torch.cat(everywhere)


def _first_row(num_local: int) -> int:
    return torch.distributed.get_rank() * num_local if _distributed() else 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
