"""Every defect of a NIfTI file is refused for its true reason, in bounded memory; what is sound is read exactly."""

import gzip
import itertools
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from umbif.corpus.readers import BadVolume, Limits, read_volume

SHAPE = (12, 14, 10)


def brain(shape=SHAPE, dtype=np.int16) -> np.ndarray:
    """Noise in a box, background 0 around it."""
    data = np.zeros(shape, dtype)
    inside = tuple(slice(2, -2) for _ in range(3))
    data[inside] = np.random.default_rng(0).integers(50, 120, data[inside].shape)
    return data


def nifti(data, affine=None, cls=nib.Nifti1Image, endianness="<", **fields) -> bytes:
    """The bytes of a file; header fields are set last, so that they may lie."""
    header = cls.header_class(endianness=endianness)
    image = cls(data, np.diag([-1.0, -1.0, 1.2, 1]) if affine is None else affine, header)
    image.header.set_data_dtype(data.dtype)
    header = bytearray(image.to_bytes()[: image.header.template_dtype.itemsize])
    parsed = type(image.header)(bytes(header), endianness, check=False)
    for name, value in fields.items():
        parsed[name] = value
    voxels = data.astype(data.dtype.newbyteorder(endianness)).tobytes(order="F")
    return parsed.binaryblock + b"\0" * 4 + voxels


def refused(path: Path, content: bytes, **options) -> BadVolume:
    path.write_bytes(content)
    with pytest.raises(BadVolume) as caught:
        read_volume(path, **options)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) > 20
    return caught.value


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "t1.nii.gz"


@pytest.mark.parametrize("cls", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gz", "plain"])
def test_voxels_and_geometry_come_back_as_written(path, cls, endianness, pack):
    data = brain()
    path.write_bytes(pack(nifti(data, cls=cls, endianness=endianness, scl_slope=0.5, scl_inter=3)))
    volume = read_volume(path)
    assert volume.data.dtype == np.int16
    assert volume.data.dtype.isnative
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_array_equal(volume.values(), (data * 0.5 + 3).astype(np.float32))
    np.testing.assert_allclose(volume.affine, np.diag([-1, -1, 1.2, 1]), atol=1e-6)
    assert (volume.axcodes, volume.spacing_mm, volume.flags) == ("LPS", (1, 1, 1.2), ())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint16, np.uint32, np.int64, np.float32, np.float64])
def test_every_real_voxel_type_is_read(path, dtype):
    path.write_bytes(gzip.compress(nifti(brain(dtype=dtype))))
    np.testing.assert_array_equal(read_volume(path).data, brain(dtype=dtype))


def test_all_48_axis_orders_are_named_and_turned_to_ras(path):
    ras = brain()
    seen = set()
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            codes = "".join("LPI"[axis] if sign < 0 else "RAS"[axis] for axis, sign in zip(order, signs, strict=True))
            turn = nib.orientations.ornt_transform(
                nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
            )
            image = nib.Nifti1Image(ras, np.eye(4)).as_reoriented(turn)
            path.write_bytes(nifti(np.asarray(image.dataobj), image.affine))
            volume = read_volume(path)
            assert volume.axcodes == codes
            np.testing.assert_array_equal(volume.canonical(), ras)
            seen.add(volume.axcodes)
    assert len(seen) == 48


def test_gzip_members_and_zero_padding_are_one_file(path):
    content = nifti(brain())
    parts = [content[:100], content[100:352], content[352:1000], content[1000:]]
    path.write_bytes(b"".join(gzip.compress(part) + b"\0" * 7 for part in parts) + b"\0" * 5000)
    np.testing.assert_array_equal(read_volume(path).data, brain())


def test_a_flipped_bit_is_noticed_or_changes_nothing(path):
    content = nifti(brain())
    packed = gzip.compress(content)
    reasons = []
    for position, bit in itertools.product(range(400, len(packed), 3), (0, 7)):
        damaged = bytearray(packed)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            read_volume(path)
        except BadVolume as error:
            reasons.append(error.reason)
        else:  # a few bits of a gzip file have no meaning
            assert gzip.decompress(damaged) == content
    assert set(reasons) <= {"corrupt_gzip", "truncated", "bomb"}
    assert len(reasons) > 0.98 * 2 * len(range(400, len(packed), 3))


def test_every_cut_is_noticed(path):
    packed = gzip.compress(nifti(brain()))
    for length in [1, 5, 12, 200, len(packed) // 2, *range(len(packed) - 9, len(packed))]:
        assert refused(path, packed[:length]).reason == ("not_nifti" if length == 1 else "truncated"), length
    plain = nifti(brain())
    for length in [348, 351, 352, 353, len(plain) - 1]:
        assert refused(path, plain[:length]).reason == "truncated"


def _small_memory(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(BadVolume) as caught:
        read_volume(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == reason
    assert peak_bytes < 8 * 2**20


def _zeros_behind(content: bytes, num_bytes: int) -> bytes:
    packer = zlib.compressobj(1, wbits=31)
    packed = [packer.compress(content), *(packer.compress(bytes(2**20)) for _ in range(num_bytes >> 20))]
    return b"".join([*packed, packer.flush()])


def test_a_bomb_behind_a_modest_header_is_not_inflated(path):
    _small_memory(path, _zeros_behind(nifti(brain()), 2**28), "bomb")


def test_a_second_member_may_not_be_a_bomb_either(path):
    _small_memory(path, gzip.compress(nifti(brain())) + _zeros_behind(b"", 2**26), "bomb")


def test_an_honest_bomb_is_refused_by_its_header(path):
    honest = nifti(brain(), dim=[3, 1024, 2048, 1024, 1, 1, 1, 1])  # 4 GiB of int16
    _small_memory(path, _zeros_behind(honest, 2**26), "too_large")


def test_limits_can_be_set(path):
    assert refused(path, nifti(brain()), limits=Limits(max_bytes=1000)).reason == "too_large"
    assert refused(path, nifti(brain()), limits=Limits(max_voxels=1000)).reason == "too_large"


def _floats(value: float) -> np.ndarray:
    data = brain(dtype=np.float32)
    data[5, 5, 5] = value
    return data


SINGULAR = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
LABELS = (brain() > 0).astype(np.uint8) * 3
DEFECTS = {
    "nan": ("non_finite", nifti(_floats(np.nan))),
    "inf": ("non_finite", nifti(_floats(-np.inf))),
    "constant": ("constant", nifti(np.full(SHAPE, 7, np.int16))),
    "labels": ("label_map", nifti(LABELS)),
    "float_labels": ("label_map", nifti(LABELS.astype(np.float32))),
    "4d": ("four_dimensional", nifti(np.stack([brain()] * 2, -1))),
    "5d": ("four_dimensional", nifti(np.stack([brain()] * 3, -1)[..., None, :])),
    "2d": ("two_dimensional", nifti(brain()[..., 5])),
    "one_slice": ("two_dimensional", nifti(brain()[..., 5:6])),
    "complex": ("complex_or_rgb", nifti(brain(dtype=np.complex64))),
    "rgb": ("complex_or_rgb", nifti(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))),
    "dtype": ("bad_header", nifti(brain(), datatype=77)),
    "negative_dim": ("bad_header", nifti(brain(), dim=[3, -12, 14, 10, 1, 1, 1, 1])),
    "no_dim": ("bad_header", nifti(brain(), dim=[0, 12, 14, 10, 1, 1, 1, 1])),
    "ndim": ("bad_header", nifti(brain(), dim=[99, 12, 14, 10, 1, 1, 1, 1])),
    "offset_nan": ("bad_header", nifti(brain(), vox_offset=np.nan)),
    "offset_in_header": ("bad_header", nifti(brain(), vox_offset=100)),
    "offset_far": ("bad_header", nifti(brain(), vox_offset=1e30)),
    "offset_past_end": ("truncated", nifti(brain(), vox_offset=1e6)),
    "dim_too_large": ("truncated", nifti(brain(), dim=[3, 12, 14, 11, 1, 1, 1, 1])),
    "singular": ("singular_affine", nifti(brain(), srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0])),
    "nan_affine": ("singular_affine", nifti(brain(), srow_x=[np.nan, 0, 0, 0])),
    "zero_affine": ("singular_affine", nifti(brain(), srow_x=0, srow_y=0, srow_z=0)),
    "huge_voxels": ("bad_spacing", nifti(brain(), srow_x=[1e6, 0, 0, 0])),
    "tiny_voxels": ("bad_spacing", nifti(brain(), np.diag([0.01, 1, 1, 1]))),
    "no_orientation": ("no_orientation", nifti(brain(), sform_code=0, qform_code=0)),
    "nan_slope": ("bad_scaling", nifti(brain(), scl_slope=np.nan)),
    "inf_intercept": ("bad_scaling", nifti(brain(), scl_slope=1, scl_inter=np.inf)),
    "beyond_float32": ("bad_scaling", nifti(_floats(1e38), scl_slope=1e10)),
    "quaternion": ("bad_header", nifti(brain(), sform_code=0, qform_code=1, quatern_b=9)),
    "text": ("not_nifti", b"subject,age\n" * 50),
    "analyze": ("not_nifti", nifti(brain(), magic=b"")),
    "pair": ("not_nifti", nifti(brain(), magic=b"ni1")),
    "lfs": ("lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_defect_has_its_true_reason(path, name, pack):
    reason, content = DEFECTS[name]
    if name == "lfs" and pack is gzip.compress:
        reason = "not_nifti"
    assert refused(path, pack(content)).reason == reason


def test_headers_that_understate_their_voxels_are_noticed(path):
    content = nifti(brain((64, 64, 40)), dim=[3, 12, 14, 10, 1, 1, 1, 1])
    assert refused(path, content).reason == "trailing_data"
    assert refused(path, gzip.compress(content)).reason == "bomb"


def test_random_headers_never_crash_the_reader(path):
    rng = np.random.default_rng(2)
    content, codes = nifti(brain()), set()
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.integers(4, 344, 12):
            damaged[position] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            read_volume(path)
        except BadVolume as error:
            codes.add(error.reason)
    assert {"bad_header", "bad_spacing"} <= codes


def test_what_is_no_file_is_refused_without_waiting(path):
    assert refused(path, b"").reason == "empty_file"
    assert refused(path, gzip.compress(b"")).reason == "empty_file"
    path.unlink()
    os.mkfifo(path)
    for place, reason in ((path, "not_a_file"), (path.parent, "not_a_file"), (path.parent / "gone", "unreadable")):
        with pytest.raises(BadVolume) as caught:
            read_volume(place)
        assert caught.value.reason == reason


def test_slope_zero_means_no_scaling_and_trailing_singletons_are_dropped(path):
    path.write_bytes(nifti(brain()[..., None, None], scl_slope=0, scl_inter=np.nan))
    volume = read_volume(path)
    assert volume.data.shape == SHAPE
    np.testing.assert_array_equal(volume.values(), brain())


def test_masks_may_have_few_values_or_one(path):
    path.write_bytes(nifti(LABELS))
    assert read_volume(path, mask=True).flags == ()
    path.write_bytes(nifti(LABELS * 0))
    assert read_volume(path, mask=True).flags == ("empty_mask",)


def test_flags_say_what_people_should_know(path):
    turned = np.array([[0.9, -0.4, 0, 0], [0.4, 0.9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    whole_head = brain()
    whole_head[3:9, 3:11, 0] = 60  # runs out of the volume below
    cases = {
        "oblique": nifti(brain(), turned),
        "negative_values": nifti(brain() - (brain() > 0).astype(np.int16) * 80),
        "not_skull_stripped": nifti(whole_head),
        "pixdim_differs": nifti(brain(), pixdim=[1, 2, 1, 1.2, 0, 0, 0, 0], qform_code=0),
        "qform_sform_differ": nifti(brain(), qform_code=1, sform_code=1, qoffset_x=5),
    }
    for flag, content in cases.items():
        path.write_bytes(content)
        assert read_volume(path).flags == (flag,)
    extended = bytearray(nifti(brain(), vox_offset=352 + 16))
    extended[352:352] = struct.pack("<ii8s", 16, 6, b"a note")
    path.write_bytes(extended)
    assert read_volume(path).flags == ("header_extension",)
    np.testing.assert_array_equal(read_volume(path).data, brain())


def ball(cut: int, size: int = 48, turn: int = 0, padding: int = 6) -> np.ndarray:
    """Noise in a ball of `size` voxels without its last planes, in a larger array of zeros."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size + 2)[1:-1]] * 3, indexing="ij")
    inside = (x**2 + y**2 + z**2 < 1)[:, :, : size - cut]
    noise = np.random.default_rng(0).integers(50, 120, inside.shape).astype(np.int16)
    return np.pad(np.moveaxis(inside * noise, 2, turn), padding)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_head_that_is_padded_is_not_taken_for_stripped_without_a_word(path, turn):
    for cut, size, flags in ((8, 48, ("flat_cut",)), (0, 48, ()), (0, 32, ()), (4, 24, ())):
        for data in (ball(cut, size, turn), ball(cut, size, turn)[::-1, ::-1, ::-1]):
            path.write_bytes(nifti(data))
            assert read_volume(path).flags == flags, (cut, size)
    path.write_bytes(nifti((ball(8, turn=turn) > 0).astype(np.uint8)))
    assert read_volume(path, mask=True).flags == ()


BAD = {
    "TCGA-DU-7294/broken/TCGA-DU-7294_flair_allzero.nii.gz": "constant",
    "derived/dev/corrupt_crc.nii.gz": "corrupt_gzip",
    "derived/dev/float32_nan_inf.nii.gz": "non_finite",
    "derived/dev/lfs_pointer.nii.gz": "lfs_pointer",
    "derived/dev/no_orientation.nii.gz": "no_orientation",
    "derived/dev/truncated_flair.nii.gz": "truncated",
    "derived/dev/truncated_raw.nii": "truncated",
    "derived/dev/zero_byte.nii.gz": "empty_file",
    "nibabel/example4d.nii.gz": "four_dimensional",
    "nibabel/example_nifti2.nii.gz": "four_dimensional",
    "nibabel/functional.nii": "four_dimensional",
    "nibabel/invalid.nii.gz": "not_nifti",
    "nibabel/resampled_anat_moved.nii": "non_finite",
    "nibabel/someones_anatomy_symlink.nii.gz": "not_nifti",
    "nifti-reader-js/not-nifti.nii": "not_nifti",
    "nifti-reader-js/with_extension.nii.gz": "label_map",
    "niivue-demos/pcasl.nii.gz": "four_dimensional",
}
ODD_FOLDERS = ("TCGA-DU-7294/broken", "derived", "nibabel", "nifti-reader-js", "niivue-demos")


def test_real_files_are_refused_for_their_true_reason_and_no_good_one_is(real_data):
    found = {}
    for path in sorted(p for folder in ODD_FOLDERS for p in (real_data / folder).rglob("*.nii*")):
        try:
            volume = read_volume(path)
        except BadVolume as error:
            found[str(path.relative_to(real_data))] = error.reason
        else:
            image = nib.load(path)
            expected = np.asarray(image.dataobj, np.float32).reshape(volume.data.shape)
            np.testing.assert_allclose(volume.values(), expected, rtol=1e-5)
            np.testing.assert_allclose(volume.affine, image.affine)
            assert volume.axcodes == "".join(nib.aff2axcodes(image.affine))
    assert found == BAD


def test_a_real_header_extension_is_flagged(real_data):
    volume = read_volume(real_data / "nifti-reader-js/with_extension.nii.gz", mask=True)
    assert volume.data.shape == (161, 191, 151)
    assert "header_extension" in volume.flags


def test_real_brains_are_known_as_stripped(real_data):
    for pattern in ("BraTS2021_00006/*_t1.nii.gz", "TCGA-FG-6692/*/*_t1_bet.nii.gz", "TCGA-DU-7294/*/*_t1.nii.gz"):
        (path,) = real_data.glob(pattern)
        assert "not_skull_stripped" not in read_volume(path).flags, path.name
