"""The corpus on disk: Blosc2 frames in shard files and one index, every read checked.

A frame is a standard Blosc2 array of one volume (or mask) of one exam. Frames stand 4 KiB-aligned in files of about
1 GB, so that a cluster's file system sees hundreds of files and not hundreds of thousands, and a crop is decoded
without the rest of its volume.
"""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import blosc2
import google_crc32c
import numpy as np
import numpy.typing as npt
import pandas as pd

from umbif.errors import Problem, UmbifError, UsageError, nearest
from umbif.files import naming, read_mapping, read_parquet, reading, refused

ALIGN_BYTES = 4096
CHUNK_VOXELS = 96
BLOCK_VOXELS = 32
NUMBERS = ("scale", "intercept", "mean", "std", "low", "high")  # how a frame's stored integers are read
LOOKED_UP = ("name", "shape", *NUMBERS, "shard", "byte_offset", "byte_length", "crc32c")
BRAIN, TUMOUR = "brain", "tumour"  # the frames of an exam that are masks, beside its sequences
ABOUT = "corpus.json"  # what a corpus is made of
ABOUT_CURE = "Copy it again; or delete it and give the umbif prepare command again that made this corpus"
OF_THE_FILE = (errno.ENOENT, errno.EIO)  # gone or damaged; what else the system says is not about the shard
MAX_OPEN = 128  # shards; a process may mostly have 1024 files open
MAX_NAMED = 20  # shards in a message
STATS_AT_ONCE = 16  # shards whose sizes are asked for
SHARD_CURE = (
    "Copy them again; or give the umbif prepare command again that made this corpus: their exams are prepared anew"
)
INDEX_CURE = "Copy it again, or write it anew: the same umbif prepare command with --merge"


def encode(array: npt.NDArray[Any], level: int = 5) -> bytes:
    """One array (X, Y, Z) as a compressed frame."""
    chunks = tuple(min(CHUNK_VOXELS, n) for n in array.shape)
    blocks = tuple(min(BLOCK_VOXELS, n) for n in chunks)
    params = {"codec": blosc2.Codec.ZSTD, "clevel": level, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    compressed = blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=params)
    return compressed.to_cframe()


class ShardWriter:
    """Appends frames to one shard file, which has its name only when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(f".{path.name}.writing")
        self.file: BinaryIO = self.aside.open("wb")

    @property
    def num_bytes(self) -> int:
        """Written so far."""
        return self.file.tell()

    def append(self, frame: bytes) -> dict[str, Any]:
        """Writes a frame and returns where it stands: the columns of the index that find it again."""
        self.file.write(b"\0" * (-self.file.tell() % ALIGN_BYTES))
        place = {
            "shard": self.path.name,
            "byte_offset": self.file.tell(),
            "byte_length": len(frame),
            "crc32c": int(google_crc32c.value(frame)),
        }
        self.file.write(frame)
        return place

    def close(self) -> None:
        """Gives the shard its name, once its bytes are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.aside.replace(self.path)


@dataclass(frozen=True)
class Frame:
    """Where one volume of an exam stands, and how its numbers are read."""

    row: int  # of index.parquet
    name: str  # sequence, or "brain", "tumour"
    shape: tuple[int, int, int]
    scale: float
    intercept: float
    mean: float
    std: float
    low: float
    high: float

    @property
    def outside(self) -> int:
        """The stored number of what lies outside of the brain: its mean, so that a z-score is zero there."""
        return round((self.mean - self.intercept) / self.scale)


class Corpus:
    """A prepared corpus, opened for reading. Cheap to send to worker processes: files open on first use.

    Args:
        folder: What `umbif prepare` wrote.
        cache_bytes: Decoded volumes that each process keeps, of those that it reads first. Nothing makes way for
            others: exams come in random order, so the next to be read may as well be the oldest.
        sequences: Those that are looked at; None for all. The exams and their people stay who they are.

    Raises:
        UsageError: The folder is no corpus, its preparation has not been finished, it has not one of the sequences, or
            shards are gone or cut.
    """

    def __init__(self, folder: str | Path, cache_bytes: float = 0, sequences: Sequence[str] | None = None) -> None:
        self.folder, self.cache_bytes = Path(folder), cache_bytes
        _check_finished(self.folder)
        self.about = read_mapping(self.folder / ABOUT, ABOUT_CURE)
        with reading(self.folder / ABOUT, ABOUT_CURE):
            self.identity: str = self.about["identity"]
            self.spacing_mm: float = float(self.about["preparation"]["spacing_mm"])
        columns = ("exam", "person", "split", "affine", *LOOKED_UP)
        self.index = read_parquet(self.folder / "index.parquet", INDEX_CURE, columns)
        _check_shards(self.folder, self.index)
        self.exams = self._exam_table()
        self.looked_at = self._looked_at(sequences)
        starts = self.index.groupby("exam", sort=False).indices
        self._rows = [np.asarray(starts[exam]) for exam in self.exams["exam"]]
        self._column = {name: self.index[name].to_numpy() for name in LOOKED_UP}  # pandas rows cost 0.1 ms each
        self._files: dict[Path, int] = {}
        self._cache: dict[int, npt.NDArray[Any]] = {}  # by row of the index
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.exams)

    def __del__(self) -> None:
        for shard in [*self.__dict__.get("_files", ())]:
            self._close(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_cache": {}, "_cached_bytes": 0}

    def frames(self, exam: int) -> dict[str, Frame]:
        """The frames of one exam by name, masks included."""
        return {f.name: f for f in (self._frame(int(row)) for row in self._rows[exam])}

    def sequences(self, exam: int) -> list[str]:
        """The sequences an exam has of those that are looked at, in the corpus' order."""
        return [name for name in self.frames(exam) if name in self.looked_at]

    def num_sequences(self) -> npt.NDArray[np.int64]:
        """How many these are, for each row of `exams`."""
        images = self.index.loc[self.index["name"].isin(self.looked_at), "exam"].value_counts()
        return np.asarray(images.reindex(self.exams["exam"], fill_value=0), dtype=np.int64)

    def read(
        self, frame: Frame, start: tuple[int, int, int], size: tuple[int, int, int], fill: int = 0
    ) -> npt.NDArray[Any]:
        """Decodes the block of `size` voxels from `start`; what lies outside of the volume is `fill`.

        Raises:
            UmbifError: The bytes differ from those that were written, at the second reading too, or are gone.
        """
        array = self._volume(frame.row)
        low = [max(s, 0) for s in start]
        high = [min(s + n, full) for s, n, full in zip(start, size, frame.shape, strict=True)]
        inside = array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        if inside.shape == size:
            return inside
        block = np.full(size, fill, dtype=inside.dtype)
        at = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        block[at] = inside
        return block

    def affine(self, exam: int) -> npt.NDArray[np.float64]:
        """Voxel to RAS millimetres, (4, 4)."""
        flat = self.index["affine"].iloc[int(self._rows[exam][0])]
        return np.asarray(flat, dtype=np.float64).reshape(4, 4)

    def _frame(self, row: int) -> Frame:
        c = self._column
        x, y, z = (int(n) for n in c["shape"][row])
        numbers = (float(c[name][row]) for name in NUMBERS)
        return Frame(row, str(c["name"][row]), (x, y, z), *numbers)

    def _looked_at(self, sequences: Sequence[str] | None) -> frozenset[str]:
        there = {*self.index["name"].unique()} - {BRAIN, TUMOUR}
        if lacking := [name for name in sequences or () if name not in there]:
            what = "data.sequences names what no exam of the corpus has"
            raise UsageError([Problem(what, name, nearest(name, there)) for name in lacking])
        return frozenset(there if sequences is None else sequences)

    def _exam_table(self) -> pd.DataFrame:
        per_frame = (*LOOKED_UP, "sequence", "affine", "voxel_sha256", "path")
        table = self.index.drop(columns=[c for c in per_frame if c in self.index])
        return table.drop_duplicates("exam").reset_index(drop=True)

    def _volume(self, row: int) -> Any:
        """What can be sliced: decoded if it is kept, and block by block if it is not."""
        if row in self._cache:
            return self._cache[row]
        array = blosc2.ndarray_from_cframe(self._checked_bytes(row))
        if self._cached_bytes + array.nbytes > self.cache_bytes:
            return array
        self._cache[row] = array[:]
        self._cache[row].flags.writeable = False
        self._cached_bytes += array.nbytes
        return self._cache[row]

    def _checked_bytes(self, row: int) -> bytes:
        c, shard = self._column, self.folder / "shards" / str(self._column["shard"][row])
        for _ in range(2):  # a bad read from a network file system often comes right the second time
            fault: OSError | None = None
            try:
                with naming(shard):
                    raw = os.pread(self._open(shard), int(c["byte_length"][row]), int(c["byte_offset"][row]))
            except OSError as error:
                fault = error
                self._close(shard)  # a stale handle stays stale
                continue
            if google_crc32c.value(raw) == int(c["crc32c"][row]):
                return raw
        if fault is not None and fault.errno not in OF_THE_FILE:
            raise refused(fault) or fault
        found = "the bytes are not those that were written" if fault is None else fault.strerror
        raise UmbifError(
            f"{shard} is damaged or gone (row {row} of index.parquet): {found}. Copy it again; or delete it and give "
            "the umbif prepare command again that made this corpus: the exams of that shard are prepared anew."
        )

    def _open(self, shard: Path) -> int:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN:
                self._close(next(iter(self._files)))
            self._files[shard] = os.open(shard, os.O_RDONLY)
        return self._files[shard]

    def _close(self, shard: Path) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))


def incomplete(folder: Path, rows: pd.DataFrame) -> list[str]:
    """Names of the shards of some rows that are gone, or shorter than the rows say.

    Args:
        folder: Of the corpus.
        rows: With `shard`, `byte_offset` and `byte_length`, as in index.parquet.
    """
    ends = (rows["byte_offset"] + rows["byte_length"]).groupby(rows["shard"]).max()
    paths = [folder / "shards" / str(name) for name in ends.index]
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:  # a network file system takes a millisecond for each of hundreds
        sizes = [*pool.map(_num_bytes, paths)]
    return [path.name for path, size, end in zip(paths, sizes, ends, strict=True) if size < end]


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _check_shards(folder: Path, index: pd.DataFrame) -> None:
    if names := incomplete(folder, index):
        what = f"{len(names)} of {index['shard'].nunique()} shards are gone or cut"
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        raise UsageError(Problem(what, f"{', '.join(names[:MAX_NAMED])}{more} in {folder / 'shards'}", SHARD_CURE))


def _check_finished(folder: Path) -> None:
    if not (folder / ABOUT).is_file():
        raise UsageError(
            Problem("data.corpus is no prepared corpus", str(folder), "Make one: umbif prepare MANIFEST -o CORPUS")
        )
    if not (folder / "index.parquet").is_file():
        raise UsageError(
            Problem("the corpus is not finished", str(folder), "Run the same umbif prepare command again, or --merge")
        )
