"""Whether processes that must hold the same weights still do: a flipped bit in one of them would spread unseen.

Silent corruption is met "every week or two" in large runs (Gemini Team 2023, arXiv:2312.11805, section 4). Compared are
sums of the bits of every tensor, which change with any single one.
"""

import socket
from collections.abc import Sequence

import torch
from torch import Tensor

from umbif.errors import Transient
from umbif.scale.ranks import all_gather, num_ranks
from umbif.scale.shares import Share

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def refuse_difference(shares: Sequence[Share], step: int) -> None:
    """Compares what all processes hold alike, before it is saved. What lies in parts cannot be compared.

    Raises:
        Transient: A process holds other bits than the others; names it and the tensor.
    """
    alike = [share for share in shares if share.everywhere and share.num]
    if num_ranks() > 1 and alike and (problem := difference(alike)):
        raise Transient(f"Step {step}: {problem} A machine that is named again is to be left out.")


def difference(shares: Sequence[Share]) -> str:
    """Which process holds other bits than the others, and where; nothing where all are alike."""
    sums = torch.stack([bit_sum(share.memory).cpu() for share in shares])
    found = all_gather((sums, socket.gethostname()))
    everyone = torch.stack([sums for sums, _ in found])  # (processes, tensors)
    usual = everyone.mode(0).values
    apart = (everyone != usual).nonzero().tolist()
    if not apart:
        return ""
    who = sorted({rank for rank, _ in apart}) if len(found) > 2 else (0, 1)  # of two, nobody knows which
    wrong = (" and " if len(found) > 2 else " or ").join(f"process {rank} on {found[rank][1]}" for rank in who)
    return f"The bits of {shares[apart[0][1]].name} differ between processes. Wrong: {wrong}."


def bit_sum(tensor: Tensor) -> Tensor:
    """Sum of the bits of a tensor, read as integers; of 64 bits, wrapping."""
    flat = tensor.detach().reshape(-1)
    return flat.view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
