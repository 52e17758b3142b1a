"""Tensors in files of the safetensors format, written without a copy of them in memory.

The library's own writer first makes one string of everything. Here bytes go from the tensors' memory to the disk, and
into the checksum on their way. Reading is left to the library: it maps the file, and touches what is asked for.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from isal import isal_zlib
from safetensors import safe_open

from umbif.scale.shares import Share

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8
PIECE_BYTES = 1 << 24  # signals, and other threads, get through between two of them
PARTS = "parts"  # metadata: [first element, shape of the whole] of each tensor that is not there as a whole
Bytes = bytes | memoryview


class Fingerprint(NamedTuple):
    """Of a file: its length, and a sum that any damage of up to 32 bits in a row changes."""

    num_bytes: int
    crc32: int

    def after(self, piece: Bytes) -> "Fingerprint":
        """With more bytes at the end."""
        return Fingerprint(self.num_bytes + len(piece), isal_zlib.crc32(piece, self.crc32))


EMPTY = Fingerprint(0, 0)


def write_shares(path: Path, shares: Iterable[Share]) -> Fingerprint:
    """Writes parts of tensors, brings them to the disk, and says what was written.

    A part that is a whole tensor keeps its shape: what a single process writes is what any reader of safetensors takes.

    Raises:
        OSError: The disk is full, or cannot be written.
    """
    ordered = sorted((share for share in shares if share.num), key=lambda share: -share.memory.element_size())
    pieces: Iterator[Bytes] = (piece for share in ordered for piece in _pieces(share))
    written = EMPTY
    with path.open("xb", buffering=0) as file:
        for piece in chain([_header(ordered)], pieces):
            _write(file, piece)
            written = written.after(piece)
        os.fsync(file.fileno())
    return written


def fingerprint(path: Path) -> Fingerprint | None:
    """Of a file that is there; None where there is none."""
    if not path.is_file():
        return None
    found = EMPTY
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            found = found.after(piece)
    return found


def num_bytes_of(shares: Iterable[Share]) -> int:
    """What they take on the disk, to within a header."""
    return sum(share.num * share.memory.element_size() for share in shares)


class _Part(NamedTuple):
    """Where elements [start, end) of a flattened tensor lie."""

    start: int
    end: int
    file: Any


class ShareFiles:
    """The tensors of a folder, whoever wrote which part of them.

    Args:
        paths: Files of `write_shares`.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.parts: dict[str, list[_Part]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            file = safe_open(str(path), framework="pt")
            placed: Mapping[str, Any] = json.loads((file.metadata() or {}).get(PARTS, "{}"))
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                shape = tuple(file.get_slice(name).get_shape())
                start, whole = placed.get(name, (0, shape))
                self.shapes[name] = tuple(whole)
                part = _Part(start, start + torch.Size(shape).numel(), file)
                self.parts.setdefault(name, []).append(part)

    def fill(self, share: Share) -> None:
        """Reads a part of a tensor into its place, from wherever its elements lie.

        Raises:
            ValueError: The tensor is not there, has another shape, or is not there as a whole.
        """
        if not share.num:
            return
        if self.shapes.get(share.name) != share.shape:
            there = self.shapes.get(share.name)
            raise ValueError(f"{share.name} is {list(share.shape)} now, and {list(there) if there else 'absent'} there")
        values, missing = torch.empty(share.num, dtype=share.memory.dtype), share.num
        for part in self.parts[share.name]:
            first, end = max(part.start, share.start), min(part.end, share.start + share.num)
            if first < end:
                flat = part.file.get_tensor(share.name).view(-1)
                values[first - share.start : end - share.start] = flat[first - part.start : end - part.start]
                missing -= end - first
        if missing:
            raise ValueError(f"{share.name} lacks {missing} of its elements")
        share.put(values)


def _header(shares: list[Share]) -> bytes:
    entries: dict[str, Any] = {}
    parts, offset = {}, 0
    for share in shares:
        end = offset + share.num * share.memory.element_size()
        shape = list(share.shape) if share.is_whole else [share.num]
        entries[share.name] = {"dtype": DTYPES[share.memory.dtype], "shape": shape, "data_offsets": [offset, end]}
        if not share.is_whole:
            parts[share.name] = [share.start, share.shape]
        offset = end
    if parts:
        entries["__metadata__"] = {PARTS: json.dumps(parts)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _pieces(share: Share) -> Iterator[memoryview]:
    view: memoryview = share.flat().cpu().contiguous().view(torch.uint8).numpy().data
    return (view[at : at + PIECE_BYTES] for at in range(0, len(view), PIECE_BYTES))


def _write(file: Any, piece: Bytes) -> None:
    view = memoryview(piece)
    while len(view):
        view = view[file.write(view) :]
