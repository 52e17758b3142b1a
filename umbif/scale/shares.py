"""Which part of each tensor a process holds, whatever the strategy.

Single processes and DDP hold tensors whole, FSDP2 rows of them, ZeRO ranges of them laid flat. All of these are ranges
of the flattened tensor; in them a checkpoint is written and read, so that one strategy goes on with what another wrote.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

MODEL, OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True)
class Share:
    """A part of one tensor.

    Args:
        name: Of the tensor.
        shape: Of the whole.
        start: Its first element in the flattened whole.
        memory: Where the part lies; any shape.
        everywhere: All processes hold this same part.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    memory: Tensor
    everywhere: bool

    @property
    def num(self) -> int:
        """Elements of the part."""
        return self.memory.numel()

    @property
    def is_whole(self) -> bool:
        """Whether there is no other part."""
        return self.num == torch.Size(self.shape).numel()

    def flat(self) -> Tensor:
        """(num,) values; the memory itself where it is contiguous."""
        return self.memory.detach().reshape(-1)

    def put(self, values: Tensor) -> None:
        """Takes (num,) values in."""
        with torch.no_grad():
            self.memory.copy_(values.view(self.memory.shape))

    def cut(self, first: int, end: int) -> "Share":
        """A part of the part, by elements of it."""
        return replace(self, start=self.start + first, memory=self.flat()[first:end])


def held(name: str, tensor: Tensor) -> Share:
    """The part of a tensor that this process holds."""
    if not isinstance(tensor, DTensor):
        return Share(name, tuple(tensor.shape), 0, tensor, everywhere=True)
    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape) == tuple(local.shape)
    row = torch.Size(tensor.shape[1:]).numel()
    start = offset[0] * row if tensor.ndim else 0
    return Share(name, tuple(tensor.shape), start, local, everywhere=False)


def of_module(module: nn.Module) -> Iterator[Share]:
    """Parameters and persistent buffers."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield held(f"{MODEL}.{name}", tensor)


def of_optimizer(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[Share]:
    """What an optimiser remembers of each parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    yield held(f"{OPTIMIZER}.{key}.{names[id(parameter)]}", value)


def to_write(shares: Iterable[Share], rank: int, num_ranks: int) -> list[Share]:
    """Those that this process writes: its own, and an equal part of what all hold."""
    known = list(shares)
    total = sum(share.num for share in known if share.everywhere)
    first, end = total * rank // num_ranks, total * (rank + 1) // num_ranks
    mine, at = [], 0
    for share in known:
        if not share.everywhere:
            mine.append(share)
            continue
        a, b = max(first - at, 0), min(end - at, share.num)
        if a < b:
            mine.append(share if b - a == share.num else share.cut(a, b))
        at += share.num
    return mine
