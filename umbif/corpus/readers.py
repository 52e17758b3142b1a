"""NIfTI files → arrays, with every defence: a bad file is refused with its true reason, in bounded memory.

The header is read and judged before anything else is inflated; voxels are inflated no further than the header declares;
the gzip trailer is always reached, because nibabel stops at the last voxel and so accepts a wrong CRC.
Imports stay light: this runs in worker processes.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import nibabel as nib
import numpy as np
from isal import isal_zlib
from nibabel.affines import obliquity

from umbif.corpus.outline import border_flags
from umbif.errors import UmbifError

CHUNK_BYTES = 1 << 20
SLACK_BYTES = 1 << 16  # some writers pad the last block
MAX_EXTENSION_BYTES = 1 << 25
GZIP_MAGIC = b"\x1f\x8b"
LFS_MAGIC = b"version https://git-lfs"
UNREADABLE = "unreadable"  # the reason of a file that the system would not read: it may tomorrow
MIN_DISTINCT = 16  # an image has more grey values than a segmentation has labels


@dataclass(frozen=True)
class Limits:
    """What a volume may declare before any of its voxels is read."""

    max_bytes: int = 2**30
    max_voxels: int = 2**28
    min_spacing_mm: float = 0.1
    max_spacing_mm: float = 10.0


class BadVolume(UmbifError):
    """A file that cannot be used as a volume.

    Args:
        reason: A short code for counting (`truncated`, `corrupt_gzip`, ...).
        detail: A sentence for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True, eq=False)
class Volume:
    """One three-dimensional volume as it is stored.

    Args:
        data: Stored voxels (X, Y, Z) in their stored type and native byte order.
        affine: Voxel → world (4, 4), mm, RAS+.
        scale: Real value = stored · scale + intercept.
        intercept: See `scale`.
        spacing_mm: Length of the three voxel edges.
        axcodes: Direction of the three voxel axes, such as `LPS`.
        flags: What people should know although the volume is usable.
    """

    data: np.ndarray
    affine: np.ndarray
    scale: float
    intercept: float
    spacing_mm: tuple[float, float, float]
    axcodes: str
    flags: tuple[str, ...]

    def values(self) -> np.ndarray:
        """Real values (X, Y, Z) as float32."""
        values = np.empty(self.data.shape, np.float32, order="F")
        for z in range(self.data.shape[2]):  # plane by plane: the float64 between lives for one plane only
            values[..., z] = self.data[..., z].astype(np.float64) * self.scale + self.intercept
        return values

    def canonical(self) -> np.ndarray:
        """Real values as float32 with the voxel axes turned to RAS+, never resampled."""
        return nib.orientations.apply_orientation(self.values(), nib.io_orientation(self.affine))


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    scale: float
    intercept: float
    flags: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Of the voxels."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class _Readable(Protocol):
    def read(self, num_bytes: int, /) -> bytes: ...


def read_volume(path: str | Path, limits: Limits | None = None, *, mask: bool = False) -> Volume:
    """Reads one NIfTI-1 or NIfTI-2 file, gzipped or not, and checks everything that can be checked in one file.

    Args:
        path: The file. What it is follows from its bytes, not from its name.
        limits: What its header may declare.
        mask: Few distinct values are then expected, and a constant volume is only flagged (`empty_mask`).

    Raises:
        BadVolume: With the reason why the file cannot be used.
    """
    limits = limits or Limits()
    try:
        size = _regular_size(os.stat(path))
        with open(path, "rb") as file:
            header, data = _read(file, size, limits)
    except OSError as error:
        raise BadVolume(UNREADABLE, f"The file cannot be read: {error.strerror or type(error).__name__}.") from error
    data = data.reshape(header.shape, order="F")
    flags = header.flags + _voxel_flags(data, header, mask)
    axcodes = "".join(nib.aff2axcodes(header.affine))
    return Volume(data, header.affine, header.scale, header.intercept, header.spacing_mm, axcodes, flags)


def _regular_size(status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise BadVolume("not_a_file", "This is a folder, a pipe or a device, not a file.")
    if status.st_size == 0:
        raise BadVolume("empty_file", "The file has no bytes. Copy or download it again.")
    return status.st_size


def _read(file: BinaryIO, size: int, limits: Limits) -> tuple[_Header, np.ndarray]:
    start = file.read(len(LFS_MAGIC))
    file.seek(0)
    if start == LFS_MAGIC:
        raise BadVolume("lfs_pointer", "This is a git-LFS pointer, not the image. Run `git lfs pull`.")
    gzipped = start.startswith(GZIP_MAGIC)
    stream: _Readable = _Gzip(file) if gzipped else file
    header = _read_header(stream, limits)
    if not gzipped:
        _check_size(size, header)
    data = np.empty(header.num_bytes // header.dtype.itemsize, header.dtype)
    _fill(data.view(np.uint8).data, stream, header)
    if len(_up_to(stream, SLACK_BYTES + 1)) > SLACK_BYTES:
        raise BadVolume("bomb", f"The file inflates beyond the {header.num_bytes:,} bytes that its header declares.")
    native = header.dtype.newbyteorder("=")
    return header, data if header.dtype == native else data.byteswap(inplace=True).view(native)


def _check_size(size: int, header: _Header) -> None:
    declared = header.offset + header.num_bytes
    if size < declared:
        raise BadVolume("truncated", f"The file has {size:,} of the {declared:,} bytes that its header declares.")
    if size > declared + SLACK_BYTES:
        raise BadVolume("trailing_data", f"The file has {size:,} bytes, its header declares {declared:,}.")


def _fill(target: memoryview, stream: _Readable, header: _Header) -> None:
    done = 0
    while done < len(target):
        block = stream.read(min(CHUNK_BYTES, len(target) - done))
        if not block:
            raise BadVolume("truncated", f"{done:,} of the {header.num_bytes:,} declared voxel bytes are there.")
        target[done : done + len(block)] = block
        done += len(block)


def _up_to(stream: _Readable, num_bytes: int) -> bytes:
    blocks, left = [], num_bytes
    while left and (block := stream.read(min(left, CHUNK_BYTES))):
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


class _Gzip:
    """A gzip file of one or more members, inflated no further than asked; each member's CRC and length are verified."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pending = b""
        self._member: Any = None

    def read(self, num_bytes: int, /) -> bytes:
        """Up to `num_bytes` (> 0) inflated bytes; none at the verified end."""
        while self._member is not None or self._next_member():
            block = self._inflate(num_bytes)
            if block:
                return block
        return b""

    def _inflate(self, num_bytes: int) -> bytes:
        given = self._pending or self._file.read(CHUNK_BYTES)
        try:
            block = self._member.decompress(given, num_bytes)
        except isal_zlib.error as error:  # type: ignore[misc]  # the stub declares no class
            raise BadVolume("corrupt_gzip", f"The gzip data are damaged ({error}). Copy the file again.") from error
        ended = self._member.eof
        self._pending = self._member.unused_data if ended else self._member.unconsumed_tail
        if not block and not ended and self._pending == given:
            raise BadVolume("truncated", "The gzip data end in the middle. Copy or download the file again.")
        if ended:
            self._member = None
        return block

    def _next_member(self) -> bool:
        rest = self._pending.lstrip(b"\0")  # tapes and block copies pad with zeros
        while not rest and (block := self._file.read(CHUNK_BYTES)):
            rest = block.lstrip(b"\0")
        if not rest:
            return False
        self._pending = rest if len(rest) > 1 else rest + self._file.read(CHUNK_BYTES)
        if not self._pending.startswith(GZIP_MAGIC):
            raise BadVolume("corrupt_gzip", "Bytes that are no gzip follow the gzip data. Copy the file again.")
        self._member = isal_zlib.decompressobj(wbits=31)
        return True


def _read_header(stream: _Readable, limits: Limits) -> _Header:
    raw = _up_to(stream, 348)
    kind, order = _kind(raw)
    size = 540 if kind is nib.Nifti2Header else 348
    raw += _up_to(stream, size - len(raw))
    if len(raw) < size:
        raise BadVolume("truncated", "The file ends inside its header.")
    try:
        header = _judge(kind(raw, order, check=False), limits)
    except BadVolume:
        raise
    except Exception as error:  # a hostile header reaches corners of nibabel that raise anything
        raise BadVolume("bad_header", f"The header cannot be understood ({type(error).__name__}).") from error
    extension = _up_to(stream, header.offset - size)
    if len(extension) < header.offset - size:
        raise BadVolume("truncated", "The file ends before its first voxel.")
    return header


def _kind(raw: bytes) -> tuple[type, str]:
    if not raw:
        raise BadVolume("empty_file", "The gzip file holds no bytes. Copy or download it again.")
    for order, name in (("<", "little"), (">", "big")):
        declared = int.from_bytes(raw[:4], name)  # type: ignore[arg-type]
        if declared == 348 and raw[344:347] == b"n+1":
            return nib.Nifti1Header, order
        if declared == 540 and raw[4:7] == b"n+2":
            return nib.Nifti2Header, order
        if declared == 348 and len(raw) == 348:
            raise BadVolume("not_nifti", "This is Analyze or one half of a .hdr/.img pair. Convert it to .nii.gz.")
    raise BadVolume("not_nifti", "The file does not begin with a NIfTI header.")


def _judge(header: nib.Nifti1Header, limits: Limits) -> _Header:
    shape, dtype = _shape(header), _dtype(header)
    num_voxels = int(np.prod(shape, dtype=object))
    if num_voxels > limits.max_voxels or num_voxels * dtype.itemsize > limits.max_bytes:
        gib = num_voxels * dtype.itemsize / 2**30
        raise BadVolume("too_large", f"The header declares {shape[0]}×{shape[1]}×{shape[2]} voxels, {gib:.1f} GiB.")
    affine = _affine(header)
    spacing_mm = _spacing(affine, limits)
    scale, intercept = _scaling(header)
    first = header.single_vox_offset
    offset = int(header["vox_offset"]) or first
    if not first <= offset <= first + MAX_EXTENSION_BYTES:
        raise BadVolume("bad_header", f"The header places the first voxel at byte {offset}.")
    flags = _header_flags(header, affine, spacing_mm, shape)
    flags += ("header_extension",) if offset > first else ()
    return _Header(shape, dtype, offset, affine, spacing_mm, scale, intercept, flags)


def _shape(header: nib.Nifti1Header) -> tuple[int, int, int]:
    dim = [int(d) for d in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise BadVolume("bad_header", f"The header declares the dimensions {dim}.")
    sizes = dim[1 : dim[0] + 1]
    num_volumes = int(np.prod(sizes[3:], dtype=object))
    if num_volumes > 1:
        detail = f"The file holds {num_volumes} volumes. Split it, or keep the one that is meant."
        raise BadVolume("four_dimensional", detail)
    if len(sizes) < 3 or min(sizes[:3]) < 2:
        raise BadVolume("two_dimensional", f"The file holds one slice: {'×'.join(map(str, sizes))}.")
    return sizes[0], sizes[1], sizes[2]


def _dtype(header: nib.Nifti1Header) -> np.dtype:
    dtype = header.get_data_dtype()
    if dtype.kind in "cV" and dtype.itemsize:
        raise BadVolume("complex_or_rgb", "Voxels are complex or colours. Convert them to one real value each.")
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or not dtype.itemsize:
        raise BadVolume("bad_header", f"Voxels of the type {dtype} are not supported.")
    return dtype


def _affine(header: nib.Nifti1Header) -> np.ndarray:
    if int(header["sform_code"]) > 0:
        affine = header.get_sform()
    elif int(header["qform_code"]) > 0:
        affine = header.get_qform()
    else:
        detail = "The header has neither qform nor sform, so left and right are unknown. Convert it again from DICOM."
        raise BadVolume("no_orientation", detail)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not lengths.all():
        raise BadVolume("singular_affine", "The affine has an axis of no length or a value that is no number.")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise BadVolume("singular_affine", "The affine maps two voxel axes onto one.")
    return np.asarray(affine, np.float64)


def _spacing(affine: np.ndarray, limits: Limits) -> tuple[float, float, float]:
    x, y, z = (round(float(length), 6) for length in np.linalg.norm(affine[:3, :3], axis=0))
    if min(x, y, z) < limits.min_spacing_mm or max(x, y, z) > limits.max_spacing_mm:
        allowed = f"{limits.min_spacing_mm:g} to {limits.max_spacing_mm:g} mm"
        raise BadVolume("bad_spacing", f"Voxels measure {x:g}×{y:g}×{z:g} mm; {allowed} are allowed.")
    return x, y, z


def _scaling(header: nib.Nifti1Header) -> tuple[float, float]:
    scale, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if scale == 0:  # NIfTI: "if scl_slope is zero, the data are not scaled"
        return 1.0, 0.0
    if not np.isfinite([scale, intercept]).all():
        raise BadVolume("bad_scaling", f"The header scales voxels by {scale} and adds {intercept}.")
    return scale, intercept


def _header_flags(
    header: nib.Nifti1Header, affine: np.ndarray, spacing_mm: tuple[float, ...], shape: tuple[int, ...]
) -> tuple[str, ...]:
    flags = []
    if int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
        away_mm = np.linalg.norm((_qform(header) - affine)[:3] @ np.vstack([corners, np.ones(8)]), axis=0)
        if not away_mm.max() < 0.5 * min(spacing_mm):
            flags.append("qform_sform_differ")
    if not np.allclose(np.abs(header["pixdim"][1:4]), spacing_mm, rtol=0.01):
        flags.append("pixdim_differs")
    if np.degrees(obliquity(affine)).max() > 1:
        flags.append("oblique")
    return tuple(flags)


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    try:
        return header.get_qform()
    except ValueError:  # a quaternion longer than 1; the sform holds
        return np.full((4, 4), np.nan)


def _voxel_flags(data: np.ndarray, header: _Header, mask: bool) -> tuple[str, ...]:
    low, high = data.min(), data.max()  # NaN in either if there is one anywhere
    if not np.isfinite([low, high]).all():
        bad = sum(int(np.count_nonzero(~np.isfinite(data[..., z]))) for z in range(data.shape[2]))
        detail = f"{bad:,} of {data.size:,} voxels are NaN or infinite. Decide what they mean and write them again."
        raise BadVolume("non_finite", detail)
    reals = [float(v) * header.scale + header.intercept for v in (low, high)]
    if max(map(abs, reals)) > float(np.finfo(np.float32).max):
        raise BadVolume("bad_scaling", f"Voxel values reach {max(reals, key=abs):.3g}, beyond float32.")
    if low == high and not mask:
        raise BadVolume("constant", f"All voxels are {reals[0]:g}. The step that wrote the file failed.")
    if not mask and (num_labels := _num_labels(data)):
        detail = (
            f"Only {num_labels} different whole numbers: not an image. Name it ..._brain_mask if it is the brain's, "
            "..._seg if it is the tumour's."
        )
        raise BadVolume("label_map", detail)
    flags = (("empty_mask",) if low == high else ()) + (("negative_values",) if min(reals) < 0 else ())
    return flags if mask else flags + border_flags(data)


def _num_labels(data: np.ndarray) -> int:
    """How many labels a label map has; 0 for an image."""
    if len(np.unique(data[::4, ::4, ::4])) >= MIN_DISTINCT:  # the whole is sorted only where a part leaves a doubt
        return 0
    distinct = np.unique(data)
    return len(distinct) if len(distinct) < MIN_DISTINCT and (distinct == np.round(distinct)).all() else 0
