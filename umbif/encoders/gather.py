"""What the ranks know together: rows of all with their gradients, sums, and what one of them hands to the others."""

from typing import Any

import torch
from torch import Tensor


def gathered(values: Tensor) -> Tensor:
    """Rows (B, …) of this rank to those of all ranks, in their order; each rank's rows get the gradients of all."""
    return _Gather.apply(values) if distributed() else values


def gathered_rows(values: Tensor) -> Tensor:
    """The same without a gradient."""
    return _joined(values) if distributed() else values


def summed(values: Tensor) -> Tensor:
    """The sum of the values of all ranks, without a gradient."""
    if distributed():
        torch.distributed.all_reduce(values)
    return values


def from_first(values: Tensor) -> Tensor:
    """Takes the values of the first rank, in place."""
    if distributed():
        torch.distributed.broadcast(values, 0)
    return values


def is_first() -> bool:
    """Whether this is the rank that `from_first` takes from; alone, every process is."""
    return not distributed() or torch.distributed.get_rank() == 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _joined(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def _joined(values: Tensor) -> Tensor:
    everywhere = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everywhere, values.contiguous())
    return torch.cat(everywhere)


def distributed() -> bool:
    """Whether there are other ranks to ask."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
