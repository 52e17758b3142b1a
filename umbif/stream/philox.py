"""Random numbers as a function of a counter, on any device: Philox4x32-10 (Salmon et al. 2011).

doi:10.1145/2063384.2063405

A generator with a state would have to be saved, restored and kept apart between ranks; a function of (seed, slot, view)
has nothing to keep. Integer arithmetic only, so that a CPU and a GPU give the same bits.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLY = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def uniform(seed: int, slot: Tensor, view: Tensor, purpose: int, count: int) -> Tensor:
    """Numbers in [0, 1) that belong to one view of one slot.

    Args:
        seed: Of the stream.
        slot: (B,) int64.
        view: (B,) int64.
        purpose: Keeps the uses apart: numbers of two purposes are independent.
        count: How many for each view.

    Returns:
        (B, count) float32 on the device of `slot`.
    """
    blocks = torch.arange((count + 3) // 4, device=slot.device, dtype=torch.int64)
    shape = (slot.shape[0], blocks.shape[0])
    counter = (
        blocks.expand(shape),
        (slot & MASK32)[:, None].expand(shape),
        ((slot >> 32) & MASK32)[:, None].expand(shape),
        view[:, None].expand(shape),
    )
    words = philox(counter, (seed & MASK32, purpose & MASK32))
    bits = torch.stack(words, dim=-1).reshape(shape[0], -1)[:, :count]
    return (bits >> 8).to(torch.float32) * 2.0**-24


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds over a 128-bit counter held as four int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLY[0])
        high1, low1 = _multiply(c2, MULTIPLY[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b  # wraps modulo 2**64, which leaves both halves right once they are masked
    return (product >> 32) & MASK32, product & MASK32
