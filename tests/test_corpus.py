"""Preparing keeps voxels and geometry, survives a cut-off, and nothing damaged or incomplete is published or read."""

import errno
import itertools
import os
import pickle
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

from umbif.corpus import prepare, preprocess, shards
from umbif.corpus.index import build_manifest, summary
from umbif.corpus.prepare import merge, parse_part, prepare_corpus
from umbif.corpus.preprocess import Preparation, UnusableExam, is_better, prepare_exam, quantise
from umbif.corpus.readers import BadVolume, Volume, read_volume
from umbif.corpus.shards import BRAIN, TUMOUR, Corpus, ShardWriter, encode
from umbif.errors import Stopped, UmbifError, UsageError
from umbif.stream.exams import read_view
from umbif.stream.order import View

SHAPE = (22, 26, 24)
WHOLE = Preparation(spacing_mm=1.0, clip_percentiles=(0.0, 100.0), min_brain_ml=0.1)  # clips nothing
RAS = np.diag([1.0, 1.0, 1.0, 1.0])
AXES = ["".join(c) for order in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*order)]


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_integers_at_the_target_spacing_come_back_bit_for_bit(dtype):
    head = ellipsoid(dtype)
    exam = prepare_exam({"t1": volume(head)}, WHOLE)
    box = box_of(head > 0)
    assert np.array_equal(intensities(exam.volumes["t1"])[exam.brain > 0], head[box][head[box] > 0])
    assert np.array_equal(exam.brain, head[box] > 0)


@pytest.mark.parametrize("percentiles", [(0.05, 99.95), (5.0, 90.0)])
def test_clipping_changes_only_what_lies_beyond_the_percentiles(percentiles):
    head = ellipsoid(np.int16)
    inside = head[head > 0]
    low, high = (np.sort(inside)[round(q / 100 * (inside.size - 1))] for q in percentiles)
    exam = prepare_exam({"t1": volume(head)}, replace(WHOLE, clip_percentiles=percentiles))
    assert (exam.volumes["t1"].low, exam.volumes["t1"].high) == (low, high)
    found = intensities(exam.volumes["t1"])[exam.brain > 0]
    assert np.array_equal(found, np.clip(inside, low, high))


@pytest.mark.parametrize("offset", [0.0, -3e4, 1e6])
@pytest.mark.parametrize("span", [1e-3, 1.0, 1e5])
def test_floats_are_recovered_within_half_a_quantum(offset, span):
    values = offset + span * np.random.default_rng(0).random(SHAPE)
    stored = quantise(values, np.ones(SHAPE), (0.0, 100.0))
    quantum = (values.max() - values.min()) / 65534
    assert stored.scale == pytest.approx(quantum, rel=1e-9)
    assert np.abs(intensities(stored) - values).max() <= quantum / 2 + 4 * np.spacing(abs(offset) + span)
    assert stored.mean == pytest.approx(values.mean())
    assert stored.std == pytest.approx(values.std())


@pytest.mark.parametrize("value", [0.0, 0.1, 5.0, -1234.5])
def test_a_sequence_of_one_value_becomes_zeros_not_noise(value):
    stored = quantise(np.full(SHAPE, value, np.float32), np.ones(SHAPE), (0.05, 99.95))
    assert np.allclose(intensities(stored), value)
    z = (np.float32(intensities(stored)) - np.float32(stored.mean)) / np.float32(stored.std)
    assert np.abs(z).max() == 0


@pytest.mark.parametrize("background", [0, -1000, 7])
def test_background_becomes_the_mean_of_the_brain(background):
    head = ellipsoid(np.int16)
    shown = np.where(head > 0, head, background).astype(np.int16)
    exam = prepare_exam({"t1": volume(shown)}, replace(WHOLE, clip_percentiles=(1.0, 99.0)))
    assert np.array_equal(exam.brain, head[box_of(head > 0)] > 0)
    t1 = exam.volumes["t1"]
    assert np.abs(intensities(t1)[exam.brain == 0] - t1.mean).max() <= t1.scale / 2


def test_every_axis_order_gives_the_same_prepared_exam():
    head, tumour = ellipsoid(np.int16), ellipsoid(np.uint8, 0.2)
    expected = prepare_exam({"t1": volume(head), "t2": volume(2 * head)}, WHOLE, tumour=volume(tumour))
    assert len(AXES) == 48
    for codes in AXES:
        images = {"t1": turned(volume(head), codes), "t2": volume(2 * head)}
        found = prepare_exam(images, WHOLE, tumour=turned(volume(tumour), codes))
        assert images["t1"].axcodes == codes
        for name in images:
            assert np.array_equal(found.volumes[name].stored, expected.volumes[name].stored), codes
        assert np.array_equal(found.tumour, expected.tumour), codes
        assert np.array_equal(found.brain, expected.brain), codes
        assert np.allclose(found.affine, expected.affine), codes


@pytest.mark.parametrize("degrees", [0, 25])
def test_the_box_maps_voxels_to_the_millimetres_they_came_from(degrees):
    affine = rotation(degrees)
    affine[:3, 3] = -11, 40, 3.5
    head = ellipsoid(np.int16)
    exam = prepare_exam({"t1": volume(head, affine)}, WHOLE)
    marked = np.unravel_index(head.argmax(), SHAPE)
    found = np.unravel_index(exam.volumes["t1"].stored.argmax(), exam.brain.shape)
    assert np.allclose((exam.affine @ [*found, 1])[:3], (affine @ [*marked, 1])[:3])


def test_different_grids_end_on_the_finest_one():
    fine = waves(RAS, SHAPE)
    coarse_affine = np.diag([2.0, 1.5, 2.0, 1.0])
    coarse_affine[:3, 3] = 0.5, 0.25, 0.5
    coarse = waves(coarse_affine, (11, 17, 12))
    exam = prepare_exam({"t2": volume(coarse, coarse_affine), "t1": volume(fine)}, WHOLE, brain=volume(centre()))
    assert exam.volumes["t1"].stored.shape == exam.volumes["t2"].stored.shape == exam.brain.shape
    t1, t2 = (intensities(exam.volumes[name]) for name in ("t1", "t2"))
    assert np.allclose(t1, fine[box_of(centre())], atol=0.01)  # not resampled: half a quantum is 0.005
    assert np.corrcoef(t1.ravel(), t2.ravel())[0, 1] > 0.99  # a shift of one voxel gives 0.9


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("finer", [1, 2])
def test_a_sequence_that_shows_a_part_of_the_brain_cuts_no_other(finer, masked):
    head = ellipsoid(np.int16)
    part, affine = pixels(head[:, :, 6:16], finer)  # 60% of the brain
    affine[2, 3] = 6
    brain = volume((head > 0).astype(np.uint8)) if masked else None
    exam = prepare_exam({"flair": volume(part, affine), "t1": volume(head)}, WHOLE, brain=brain)
    assert exam.brain.sum() == (head > 0).sum()
    assert np.array_equal(intensities(exam.volumes["t1"])[exam.brain > 0], head[head > 0])
    assert set(exam.volumes) == {"flair", "t1"}


def test_thick_slices_of_small_pixels_give_no_grid():
    head = ellipsoid(np.int16)
    thick, affine = thick_slices(head)
    exam = prepare_exam({"t1ce": volume(thick, affine), "t1": volume(head)}, WHOLE, brain=volume(centre()))
    assert np.array_equal(intensities(exam.volumes["t1"]), head[box_of(centre())])  # not resampled


@pytest.mark.parametrize("spacing_mm", [2.0, 3.0])
def test_other_spacings_are_resampled_to_the_recipe(spacing_mm):
    head = ellipsoid(np.int16)
    exam = prepare_exam({"t1": volume(head)}, replace(WHOLE, spacing_mm=spacing_mm))
    assert np.allclose(np.linalg.norm(exam.affine[:3, :3], axis=0), spacing_mm)
    millilitres = exam.brain.sum() * spacing_mm**3
    assert millilitres == pytest.approx((head > 0).sum(), rel=0.1)


@pytest.mark.parametrize(("dtype", "share"), [(np.int16, 0.7), (np.float32, 0.55)])
def test_a_sequence_is_measured_where_it_was_imaged_and_is_the_mean_elsewhere(dtype, share):
    head, slices = ellipsoid(dtype), round(share * SHAPE[2])
    values = np.where(head > 0, np.random.default_rng(3).normal(600, 60, SHAPE), 0).astype(dtype)
    exam = prepare_exam({"t1": volume(head), "t2": volume(values[:, :, :slices])}, replace(WHOLE, spacing_mm=1.0))
    box = box_of(head > 0)
    shown = np.zeros(SHAPE, bool)
    shown[:, :, :slices] = True
    inside = (shown & (head > 0))[box]
    t2 = exam.volumes["t2"]
    assert t2.mean == pytest.approx(values[box][inside].mean(), abs=1e-3)
    assert t2.std == pytest.approx(values[box][inside].std(), abs=1e-3)
    assert (t2.low, t2.high) == pytest.approx((values[box][inside].min(), values[box][inside].max()), abs=1e-3)
    assert np.abs(intensities(t2)[inside] - values[box][inside]).max() <= 0.51 * t2.scale
    outside = round((t2.mean - t2.intercept) / t2.scale)  # as a corpus fills what lies outside
    assert set(t2.stored[~inside].tolist()) == {outside}
    assert (exam.brain.sum(), exam.off_the_brain) == ((head > 0).sum(), {})


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0])
def test_a_field_of_view_that_holds_the_brain_changes_no_byte(monkeypatch, spacing_mm):
    head = ellipsoid(np.int16)
    inner = tuple(slice(s.start - 1, s.stop + 1) for s in box_of(head > 0))
    affine = RAS.copy()
    affine[:3, 3] = [s.start for s in inner]
    images = {"t1": volume(head), "t2": volume(head[inner], affine)}
    how = replace(WHOLE, spacing_mm=spacing_mm)
    found = prepare_exam(images, how)
    with monkeypatch.context() as everywhere:
        everywhere.setattr(preprocess, "_field_of_view", lambda *_: np.bool_(True))
        expected = prepare_exam(images, how)
    for name in images:
        assert found.volumes[name].stored.tobytes() == expected.volumes[name].stored.tobytes()
        assert found.volumes[name].mean == expected.volumes[name].mean


@pytest.mark.parametrize(("away_mm", "shown"), [(500.0, "0%"), (14.0, "4[0-9]%")])
def test_a_sequence_that_misses_the_brain_is_set_aside(tmp_path, away_mm, shown):
    folder = tmp_path / "AWAY"
    folder.mkdir()
    affine = RAS.copy()
    affine[2, 3] = away_mm
    save(folder / "P1_t1.nii.gz", ellipsoid(np.int16))
    save(folder / "P1_t2.nii.gz", ellipsoid(np.int16), affine)
    frames, bad = prepare._prepare_one(build_manifest([folder], num_workers=0).to_dict("records"), WHOLE)
    assert [row["name"] for row, _ in frames] == ["t1", BRAIN]
    assert frames[0][0]["shape"] == list(ellipsoid(np.int16)[box_of(ellipsoid(np.int16) > 0)].shape)
    assert [(Path(row["path"]).name, row["reason"]) for row in bad] == [("P1_t2.nii.gz", "off_the_brain")]
    assert re.match(f"It shows {shown} of the brain, less than 50%", bad[0]["detail"])


def test_a_given_brain_mask_wins():
    head, mask = ellipsoid(np.int16), np.zeros(SHAPE, np.uint8)
    mask[8:14, 9:17, 7:15] = 1
    exam = prepare_exam({"t1": volume(head)}, WHOLE, brain=volume(mask))
    assert exam.brain.shape == (6, 8, 8)
    assert exam.brain.all()
    assert np.allclose(exam.affine[:3, 3], (8, 9, 7))


def test_specks_do_not_blow_up_the_box():
    head = ellipsoid(np.int16)
    speckled = head.copy()
    speckled[0, 0, 0] = speckled[-1, 3, -1] = 500
    assert prepare_exam({"t1": volume(speckled)}, WHOLE).brain.shape == head[box_of(head > 0)].shape


@pytest.mark.parametrize(
    ("mask", "how", "reason"),
    [
        (np.zeros(SHAPE, np.uint8), WHOLE, "no_brain"),
        (None, replace(WHOLE, min_brain_ml=100.0), "little_brain"),
    ],
)
def test_an_exam_without_a_brain_is_refused(mask, how, reason):
    with pytest.raises(UnusableExam) as caught:
        prepare_exam({"t1": volume(ellipsoid(np.int16))}, how, brain=None if mask is None else volume(mask))
    assert caught.value.reason == reason


@pytest.mark.parametrize(("allow", "masked", "passes"), [(0, 0, False), (1, 0, True), (0, 1, True)])
def test_heads_with_faces_are_refused_unless_allowed_or_masked(tmp_path, allow, masked, passes):
    rows = head_with_face(tmp_path / "FACES", masked)
    frames, bad = prepare._prepare_one(rows, replace(WHOLE, allow_faces=bool(allow)))
    assert bool(frames) == passes
    assert [row["reason"] for row in bad] == ([] if passes else ["not_skull_stripped"])


def test_a_brain_mask_that_cannot_be_read_lets_no_face_through(tmp_path):
    rows = head_with_face(tmp_path / "FACES", masked=True)
    mask = next(Path(row["path"]) for row in rows if row["role"] == "brain_mask")
    mask.write_bytes(mask.read_bytes()[:-40])  # whole when it was indexed
    frames, _ = prepare._prepare_one(rows, WHOLE)
    assert frames == []


def test_the_finer_of_two_volumes_of_one_sequence_is_kept_and_the_other_recorded(tmp_path):
    folder = tmp_path / "TWINS"
    folder.mkdir()
    head = ellipsoid(np.int16)
    save(folder / "P1_acq-a_t1.nii.gz", head[::2], np.diag([2.0, 1, 1, 1]))
    save(folder / "P1_acq-b_t1.nii.gz", head)
    save(folder / "P1_acq-c_t1.nii.gz", head[:, ::2], np.diag([1.0, 2, 1, 1]))
    manifest = build_manifest([folder], num_workers=0).assign(exam="TWINS/P1")
    frames, bad = prepare._prepare_one(manifest.to_dict("records"), WHOLE)
    assert [Path(row["path"]).name for row, _ in frames if row["name"] == "t1"] == ["P1_acq-b_t1.nii.gz"]
    assert {(Path(row["path"]).name, row["reason"]) for row in bad} == {
        ("P1_acq-a_t1.nii.gz", "coarser_twin"),
        ("P1_acq-c_t1.nii.gz", "coarser_twin"),
    }


@pytest.mark.parametrize("brain", [None, "given"])
def test_of_twins_the_one_that_holds_the_brain_is_kept_and_then_the_finer(brain):
    head = ellipsoid(np.int16)
    mask = volume((head > 0).astype(np.uint8)) if brain else None
    whole, coarse = volume(head), volume(head[::2], np.diag([2.0, 1, 1, 1]))
    slab, thick = volume(*pixels(head[:, :, :14], 3)), volume(*thick_slices(head))
    for better, lesser in ((whole, slab), (whole, thick), (whole, coarse), (coarse, slab)):
        assert is_better(better, lesser, mask)
        assert not is_better(lesser, better, mask)
    assert not is_better(whole, whole, mask)


def test_a_second_mask_is_set_aside_and_replaces_nothing(tmp_path):
    folder = tmp_path / "MASKS"
    folder.mkdir()
    save(folder / "P1_t1.nii.gz", ellipsoid(np.int16))
    for number, (name, radius) in enumerate({"brain_mask": 0.3, "brainmask": 0.1, "seg": 0.2, "tumor": 0.05}.items()):
        save(folder / f"P1_{name}.nii.gz", (ellipsoid(np.int16, radius) > 0).astype(np.uint8) * (number + 1))
    rows = build_manifest([folder], num_workers=0).to_dict("records")
    frames, bad = prepare._prepare_one(rows[::-1], WHOLE)
    assert {(Path(row["path"]).name, row["reason"]) for row in bad} == {
        ("P1_brainmask.nii.gz", "second_mask"),
        ("P1_tumor.nii.gz", "second_mask"),
    }
    assert "another tumour mask" in bad[1]["detail"]
    found = {row["name"]: blosc2.ndarray_from_cframe(frame)[...] for row, frame in frames}
    assert found[BRAIN].sum() == (ellipsoid(np.int16, 0.3) > 0).sum()
    assert found[TUMOUR].sum() == (ellipsoid(np.int16, 0.2) > 0).sum()


def test_an_automatic_mask_gives_way_to_one_that_a_person_made(tmp_path):
    for folder in ("images", "a", "b", "c"):
        (tmp_path / folder).mkdir()
    save(tmp_path / "images" / "P1_t1.nii.gz", ellipsoid(np.int16))
    for name, radius in {"a/P1_automated_approx_segm": 0.1, "b/P1_segm": 0.2, "c/P1_segm": 0.3}.items():
        save(tmp_path / f"{name}.nii.gz", (ellipsoid(np.int16, radius) > 0).astype(np.uint8))
    manifest = build_manifest([tmp_path], dataset="MASKS", num_workers=0)
    assert "2 masks are a further one of their kind in one exam" in summary(manifest)
    frames, bad = prepare._prepare_one(manifest.to_dict("records"), WHOLE)
    assert [Path(row["path"]).parent.name for row in bad if row["reason"] == "second_mask"] == ["c", "a"]
    found = {row["name"]: blosc2.ndarray_from_cframe(frame)[...] for row, frame in frames}
    assert found[TUMOUR].sum() == (ellipsoid(np.int16, 0.2) > 0).sum()


def test_the_corpus_holds_what_the_files_hold(corpus, manifest):
    assert set(corpus.exams["exam"]) == set(manifest["exam"])
    for exam, name in enumerate(corpus.exams["exam"]):
        files = manifest[(manifest["exam"] == name) & (manifest["role"] == "image")]
        assert set(corpus.sequences(exam)) == set(files["sequence"])
        for sequence, path in zip(files["sequence"], files["path"], strict=True):
            frames = corpus.frames(exam)
            frame, brain = frames[sequence], whole(corpus, frames[BRAIN]) > 0
            found = whole(corpus, frame)[brain] * frame.scale + frame.intercept
            expected = np.clip(original(path, corpus.affine(exam), brain), frame.low, frame.high)
            assert np.abs(found - expected).max() <= (0 if sequence != "flair" else 0.51 * frame.scale)
            assert np.mean(found != frame.low) > 0.99


def test_labels_and_splits_travel_into_the_corpus(corpus, manifest):
    per_exam = manifest.drop_duplicates("exam").set_index("exam")
    for column in ("person", "split", "site"):
        assert list(corpus.exams[column]) == list(per_exam.loc[corpus.exams["exam"], column])


@pytest.mark.parametrize("num_whole", [0, 1, 3])
def test_a_preparation_that_was_cut_off_goes_on_to_the_same_corpus(
    corpus, manifest, preparation, tmp_path, monkeypatch, num_whole
):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1)  # one exam a shard
    with monkeypatch.context() as cut:
        cut.setattr(prepare, "ShardWriter", writer_that_stops_at(num_whole))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    assert len(list((tmp_path / "shards").glob(".*.writing"))) == 1
    assert len(list((tmp_path / "shards").glob("*.parquet"))) == num_whole
    with pytest.raises(UmbifError, match=f"{8 - num_whole} of 8 exams"):
        merge(manifest, tmp_path)
    assert not (tmp_path / "index.parquet").exists()
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    merge(manifest, tmp_path)
    assert not list((tmp_path / "shards").glob(".*.writing"))
    assert contents(Corpus(tmp_path)) == contents(corpus)


@pytest.mark.parametrize(("end", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_a_preparation_that_is_ended_keeps_every_whole_exam(
    corpus, manifest, preparation, tmp_path, monkeypatch, end, error
):
    tried = []

    def ended_at_the_third(rows, how, prepare_one=prepare._prepare_one):
        tried.append(rows[0]["exam"])
        if len(tried) == 3:
            os.kill(os.getpid(), end)
        return prepare_one(rows, how)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    monkeypatch.setattr(prepare, "_prepare_one", ended_at_the_third)
    with pytest.raises(error):
        prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    merge(manifest, tmp_path)
    assert len(tried) == 8 + 1  # the third is tried twice, no other
    assert contents(Corpus(tmp_path)) == contents(corpus)


def test_parts_make_the_same_corpus_as_the_whole(corpus, manifest, preparation, tmp_path):
    prepare_corpus(manifest, tmp_path, preparation, part=(3, 3), num_workers=0)
    prepare_corpus(manifest, tmp_path, preparation, part=(1, 3), num_workers=0)
    with pytest.raises(UmbifError, match="3 of 8 exams"):
        merge(manifest, tmp_path)
    prepare_corpus(manifest, tmp_path, preparation, part=(2, 3), num_workers=0)
    merge(manifest, tmp_path)
    assert contents(Corpus(tmp_path)) == contents(corpus)


def test_a_part_leaves_alone_what_another_part_is_writing(manifest, preparation, tmp_path):
    (tmp_path / "shards").mkdir()
    other = ShardWriter(tmp_path / "shards" / "00002-of-00002_00000.shard")
    prepare_corpus(manifest, tmp_path, preparation, part=(1, 2), num_workers=0)
    other.append(b"frame")
    other.close()


def test_preparing_again_changes_nothing(manifest, preparation, tmp_path):
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    merge(manifest, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before


def test_labels_that_came_later_reach_a_corpus_that_is_there(manifest, preparation, tmp_path):
    early = manifest.assign(idh="", split="train")
    prepare_corpus(early, tmp_path, preparation, num_workers=0)
    merge(early, tmp_path)
    late = manifest.assign(mgmt=manifest["exam"])
    prepare_corpus(late, tmp_path, preparation, num_workers=0)
    merge(late, tmp_path)
    exams = Corpus(tmp_path).exams
    assert exams["mgmt"].tolist() == exams["exam"].tolist()
    assert "idh" not in exams
    split = manifest.drop_duplicates("exam").set_index("exam")["split"]
    assert exams["split"].tolist() == split[exams["exam"]].tolist()


def test_a_part_has_one_writer(manifest, preparation, tmp_path):
    with FileLock(tmp_path / ".00001-of-00001.lock"), pytest.raises(UmbifError, match="Another process is preparing"):
        prepare_corpus(manifest, tmp_path, preparation, num_workers=0)


@pytest.mark.parametrize("lost", ["P2", "TINY"])
def test_an_exam_that_could_not_be_read_is_tried_again(corpus, manifest, preparation, tmp_path, monkeypatch, lost):
    with monkeypatch.context() as gone:
        away(gone, *{path for path in manifest["path"] if lost in path})
        prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    if lost == "TINY":  # all of them
        with pytest.raises(UmbifError, match=r"No exam could be prepared\.\nQuarantined: \d+ × unreadable"):
            merge(manifest, tmp_path)
    else:
        assert "1 × unreadable" in merge(manifest, tmp_path)
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    assert "unreadable" not in merge(manifest, tmp_path)
    found = Corpus(tmp_path)
    assert found.exams["exam"].tolist() == corpus.exams["exam"].tolist()
    (row,) = np.flatnonzero(found.exams["exam"].str.contains("P2"))
    ours, theirs = ([whole(one, frame) for frame in one.frames(row).values()] for one in (found, corpus))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def away(monkeypatch, *names: str) -> None:
    """A disk on which some files cannot be read for now."""

    def read(path, **_):
        if any(str(path).endswith(name) for name in names):
            raise BadVolume("unreadable", "The file cannot be read: Stale file handle.")
        return read_volume(path, **_)

    monkeypatch.setattr(prepare, "read_volume", read)


@pytest.mark.parametrize("parts", [1, 3])
def test_an_exam_without_one_of_its_files_is_completed_later_and_takes_no_room_until_then(
    corpus, manifest, preparation, tmp_path, monkeypatch, parts
):
    def prepared(parts: int) -> str:
        for part in range(1, parts + 1):
            prepare_corpus(manifest, tmp_path, preparation, part=(part, parts), num_workers=0)
        return merge(manifest, tmp_path)

    with monkeypatch.context() as gone:
        away(gone, "P6_t2.nii.gz", "P1_ses-1_seg.nii.gz", "P2_t1ce.nii.gz")
        assert "3 × unreadable" in prepared(parts)
        exams = Corpus(tmp_path).exams["exam"].tolist()
        assert exams == [exam for exam in corpus.exams["exam"] if "P2" not in exam]
        before = sorted((tmp_path / "shards").iterdir())
        assert "3 × unreadable" in prepared(parts)
        assert sorted((tmp_path / "shards").iterdir()) == before
    assert "unreadable" not in prepared(1)
    assert contents(Corpus(tmp_path))[1] == contents(corpus)[1]
    assert not (set(before) - {*(tmp_path / "shards").iterdir()})  # what is there stays; its bytes are unused


def test_a_brain_mask_that_can_be_read_later_wins_over_the_brain_that_was_guessed(tmp_path):
    source, out = tmp_path / "LATE", tmp_path / "corpus"
    source.mkdir()
    save(source / "P1_t1.nii.gz", ellipsoid(np.int16))
    save(source / "P1_brainmask.nii.gz", (ellipsoid(np.int16, 0.3) > 0).astype(np.uint8))
    manifest = build_manifest([source], num_workers=0)
    with pytest.MonkeyPatch.context() as gone:
        away(gone, "P1_brainmask.nii.gz")
        prepare_corpus(manifest, out, WHOLE, part=(1, 2), num_workers=0)
    prepare_corpus(manifest, out, WHOLE, num_workers=0)
    merge(manifest, out)
    found = Corpus(out)
    assert whole(found, found.frames(0)[BRAIN]).sum() == (ellipsoid(np.int16, 0.3) > 0).sum()


def test_of_two_tries_the_complete_one_counts_even_if_it_is_older(corpus, manifest, preparation, tmp_path, monkeypatch):
    prepare_corpus(manifest, tmp_path, preparation, part=(1, 1), num_workers=0)
    with monkeypatch.context() as gone:
        away(gone, "nii.gz")
        prepare_corpus(manifest, tmp_path / "later", preparation, part=(2, 2), num_workers=0)
    for table in (tmp_path / "later" / "shards").iterdir():
        shutil.copy(table, tmp_path / "shards")
    merge(manifest, tmp_path)
    assert contents(Corpus(tmp_path))[1] == contents(corpus)[1]


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_exams_whose_shard_is_gone_or_cut_are_prepared_anew(
    corpus, manifest, preparation, tmp_path, monkeypatch, damage
):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1)  # one exam a shard
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    shard = sorted((tmp_path / "shards").glob("*.shard"))[2]
    shard.unlink() if damage == "gone" else shard.write_bytes(shard.read_bytes()[:10])
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    merge(manifest, tmp_path)
    assert contents(Corpus(tmp_path)) == contents(corpus)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_shards_that_are_gone_or_cut_are_named_when_a_corpus_is_opened_and_nothing_is_published(
    corpus, manifest, preparation, tmp_path, monkeypatch, damage
):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1)  # one exam a shard
    for part in ((1, 2), (2, 2)):
        prepare_corpus(manifest, tmp_path, preparation, part=part, num_workers=0)
    merge(manifest, tmp_path)
    lost = sorted((tmp_path / "shards").glob("*.shard"))[3:5]
    for shard in lost:
        shard.unlink() if damage == "gone" else os.truncate(shard, shard.stat().st_size - 1)
    names = ", ".join(shard.name for shard in lost)
    with pytest.raises(UsageError, match=rf"2 of 8 shards are gone or cut: got {names} in .*umbif prepare"):
        Corpus(tmp_path)
    with pytest.raises(UmbifError, match=r"2 of 8 exams .* gone or cut"):
        merge(manifest, tmp_path)
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)  # whatever the parts were
    merge(manifest, tmp_path)
    assert contents(Corpus(tmp_path)) == contents(corpus)


def test_reading_processes_do_not_look_for_all_shards_again(corpus, monkeypatch):
    sent = pickle.dumps(corpus)
    monkeypatch.setattr(shards, "incomplete", lambda *_: pytest.fail("each of hundreds of shards was asked for"))
    assert len(pickle.loads(sent)) == len(corpus)


def test_the_table_of_a_shard_that_is_damaged_is_named_and_comes_anew_once_deleted(
    corpus, manifest, preparation, tmp_path
):
    for part in ((1, 2), (2, 2)):
        prepare_corpus(manifest, tmp_path, preparation, part=part, num_workers=0)
    (table, _) = sorted((tmp_path / "shards").glob("*.parquet"))
    table.write_bytes(table.read_bytes()[:-20])
    for again in (lambda: prepare_corpus(manifest, tmp_path, preparation, part=(2, 2), num_workers=0),
                  lambda: merge(manifest, tmp_path)):  # fmt: skip
        with pytest.raises(UsageError, match=rf"{table} is damaged, .*Delete it .*every --part"):
            again()
    table.unlink()
    prepare_corpus(manifest, tmp_path, preparation, part=(1, 2), num_workers=0)
    merge(manifest, tmp_path)
    assert contents(Corpus(tmp_path)) == contents(corpus)


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_corpus_json_that_is_damaged_is_named_and_comes_anew_once_deleted(
    corpus, manifest, preparation, tmp_path, content
):
    folder = shutil.copytree(corpus.folder, tmp_path / "copy")
    about = folder / "corpus.json"
    before = about.read_text()
    about.write_text(content)
    with pytest.raises(UsageError, match=rf"{about} is damaged, .*delete it .*umbif prepare"):
        prepare_corpus(manifest, folder, preparation, num_workers=0)
    about.unlink()
    prepare_corpus(manifest, folder, preparation, num_workers=0)
    assert about.read_text() == before


def test_two_processes_make_the_same_corpus(corpus, manifest, preparation, tmp_path):
    prepare_corpus(manifest, tmp_path, preparation, num_workers=2)
    merge(manifest, tmp_path)
    assert contents(Corpus(tmp_path)) == contents(corpus)


def _dies_of_one_exam(files, how, prepare_one=prepare._prepare_one):
    if files[0]["exam"].endswith("P6"):
        os._exit(9)
    return prepare_one(files, how)


def test_an_exam_that_kills_its_process_costs_itself_alone_and_is_tried_again(
    corpus, manifest, preparation, tmp_path, monkeypatch
):
    with monkeypatch.context() as short:
        short.setattr(prepare, "_prepare_one", _dies_of_one_exam)
        prepare_corpus(manifest, tmp_path, preparation, num_workers=1)
        assert "Quarantined: 1 × reader_crashed" in merge(manifest, tmp_path)
        assert len(Corpus(tmp_path)) == 7
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    merge(manifest, tmp_path)
    assert contents(Corpus(tmp_path))[1] == contents(corpus)[1]


def test_a_folder_of_another_recipe_or_manifest_is_refused(corpus, manifest, preparation):
    before = (corpus.folder / "corpus.json").read_text()
    with pytest.raises(UsageError, match="another manifest or recipe"):
        prepare_corpus(manifest, corpus.folder, replace(preparation, spacing_mm=1.0), num_workers=0)
    other = manifest.assign(voxel_sha256=["0" * 64, *manifest["voxel_sha256"][1:]])
    with pytest.raises(UsageError, match="another manifest or recipe"):
        prepare_corpus(other, corpus.folder, preparation, num_workers=0)
    assert (corpus.folder / "corpus.json").read_text() == before


def test_exams_that_cannot_be_used_are_named_with_a_reason(manifest, preparation, tmp_path):
    how = replace(preparation, min_brain_ml=1000.0)
    prepare_corpus(manifest, tmp_path, how, num_workers=0)
    with pytest.raises(UmbifError, match="8 × little_brain"):
        merge(manifest, tmp_path)


@pytest.mark.parametrize("name", ["t1", BRAIN])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_bit_is_caught(tmp_path, name, where):
    folder = small_corpus(tmp_path)
    corpus = Corpus(folder)
    frame = corpus.frames(0)[name]
    row = corpus.index.iloc[frame.row]
    flip_bit(folder / "shards" / row["shard"], row["byte_offset"] + round(where * (row["byte_length"] - 1)))
    with pytest.raises(UmbifError, match=rf"damaged or gone \(row {frame.row} .*umbif prepare"):
        corpus.read(frame, (0, 0, 0), (4, 4, 4))


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_few_shards_are_open_at_a_time_and_none_after_the_corpus(manifest, preparation, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1)  # one exam a shard
    monkeypatch.setattr(shards, "MAX_OPEN", 3)
    prepare_corpus(manifest, tmp_path, preparation, num_workers=0)
    merge(manifest, tmp_path)
    found, before = Corpus(tmp_path), open_files()
    for exam in [*range(8), *range(8)]:
        whole(found, found.frames(exam)[BRAIN])
        assert open_files() - before <= 3
    assert open_files() - before == 3
    del found
    assert open_files() == before


def test_what_the_system_refuses_is_not_told_as_damage(tmp_path):
    found = Corpus(small_corpus(tmp_path))
    frame = found.frames(0)["t1"]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(UmbifError) as caught:
            whole(found, frame)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert re.match(rf"{found.folder}/shards/\S+: Too many open files\. Raise .*ulimit -n", str(caught.value))
    assert "elete" not in str(caught.value)
    assert whole(found, frame).any()


def test_a_stale_handle_is_opened_anew(tmp_path, monkeypatch):
    found = Corpus(small_corpus(tmp_path))
    expected = whole(found, found.frames(0)["t1"])
    (stale,) = found._files.values()

    def pread(handle, *where, read=os.pread):
        if handle == stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(handle, *where)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.MonkeyPatch.context() as kept:
        kept.setattr(os, "close", lambda _: None)  # so that the number is not given out again
        assert np.array_equal(whole(found, found.frames(0)["t1"]), expected)
    os.close(stale)


def test_frames_stand_aligned(corpus):
    assert (corpus.index["byte_offset"] % 4096 == 0).all()


@pytest.mark.parametrize("start", [(0, 0, 0), (3, 5, 2), (-4, -2, -3), (9, 12, 10), (-6, 4, -6)])
@pytest.mark.parametrize("size", [(8, 8, 8), (40, 10, 40)])
def test_a_crop_is_the_volume_there_and_the_mean_beyond(corpus, start, size):
    exam = list(corpus.exams["exam"]).index("TINY/P6")
    frames = corpus.frames(exam)
    sample = read_view(corpus, exam, View(start, ("t1", "flair")), size, width=3)
    for entry, name in enumerate(("t1", "flair")):
        frame = frames[name]
        padded = np.pad(whole(corpus, frame), 64, constant_values=frame.outside)
        at = tuple(slice(64 + s, 64 + s + n) for s, n in zip(start, size, strict=True))
        assert np.array_equal(sample["image"][entry], padded[at])
        assert frame.outside * frame.scale + frame.intercept == pytest.approx(frame.mean, abs=frame.scale / 2)
    assert list(sample["present"]) == [True, True, False]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_as_many_volumes_are_kept_as_memory_was_given_for_and_they_read_the_same(corpus, tmp_path, kept):
    exam = list(corpus.exams["exam"]).index("TINY/P6")
    frames = [corpus.frames(exam)[name] for name in ("t1", "flair")]
    folder = shutil.copytree(corpus.folder, tmp_path / "copy")
    own = Corpus(folder, cache_bytes=sum(2 * np.prod(frame.shape) for frame in frames[:kept]))
    for _ in range(2):
        for frame in frames:
            crop = own.read(frame, (-3, 2, 1), (12, 9, 10), fill=7)
            assert np.array_equal(crop, corpus.read(frame, (-3, 2, 1), (12, 9, 10), fill=7))
    for shard in (folder / "shards").iterdir():
        os.truncate(shard, 0)
    for number, frame in enumerate(frames):
        if number < kept:
            assert np.array_equal(whole(own, frame), whole(corpus, frame))
        else:
            with pytest.raises(UmbifError, match="damaged"):
                whole(own, frame)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 130, 33), (97, 31, 2)])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8])
def test_frames_of_any_shape_come_back(shape, dtype):
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    assert np.array_equal(blosc2.ndarray_from_cframe(encode(array))[...], array)


@pytest.mark.parametrize("left", ["nothing", "no index"])
def test_a_folder_that_is_no_finished_corpus_is_refused(tmp_path, left):
    folder = small_corpus(tmp_path)
    os.remove(folder / ("index.parquet" if left == "no index" else "corpus.json"))
    with pytest.raises(UsageError, match="not finished" if left == "no index" else "no prepared corpus"):
        Corpus(folder)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", ""])
def test_a_part_that_cannot_be_is_refused(text):
    with pytest.raises(UsageError, match="I/N"):
        parse_part(text)


def ellipsoid(dtype, radius=0.4) -> np.ndarray:
    """Integers from 20 to 220 in an ellipsoid off the middle, each side different; 0 around it."""
    x, y, z = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")
    inside = sum(((axis - 0.45 * n) / (radius * n)) ** 2 for axis, n in zip((x, y, z), SHAPE, strict=True)) < 1
    values = np.random.default_rng(1).integers(20, 220, SHAPE)
    values[7, 9, 13] = 250  # the one brightest voxel
    return (inside * values).astype(dtype)


def waves(affine, shape) -> np.ndarray:
    """A smooth function of millimetres, sampled on a grid."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    x, y, z = np.einsum("ij,jxyz->ixyz", affine[:3, :3], index) + affine[:3, 3][:, None, None, None]
    return (500 + 100 * np.sin(x / 3) + 100 * np.cos(y / 4) + 100 * np.sin((y + z) / 5)).astype(np.float32)


def pixels(head, finer: int) -> tuple[np.ndarray, np.ndarray]:
    """The same head in as many times smaller pixels along X and Y, and its affine."""
    affine = np.diag([1 / finer, 1 / finer, 1.0, 1.0])
    affine[:2, 3] = (1 / finer - 1) / 2
    return head.repeat(finer, axis=0).repeat(finer, axis=1), affine


def thick_slices(head) -> tuple[np.ndarray, np.ndarray]:
    """The head in voxels of 0.25 x 0.25 x 3 mm, and their affine."""
    fine, affine = pixels(head, 4)
    affine[2] = 0, 0, 3, 1.4
    return fine[:, :, 1::3], affine


def centre() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:-4, 4:-4, 4:-4] = 1
    return mask


def volume(data, affine=RAS) -> Volume:
    spacing = tuple(float(n) for n in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(data, np.asarray(affine), 1.0, 0.0, spacing, "".join(nib.aff2axcodes(affine)), ())


def turned(given: Volume, axcodes: str) -> Volume:
    """The same head, stored in another axis order."""
    image = nib.Nifti1Image(given.data, given.affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(given.affine), nib.orientations.axcodes2ornt(axcodes))
    image = image.as_reoriented(turn)
    return volume(np.asanyarray(image.dataobj), image.affine)


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def box_of(mask) -> tuple[slice, ...]:
    return tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(mask))


def intensities(stored) -> np.ndarray:
    return stored.stored * stored.scale + stored.intercept


def save(path: Path, data, affine=RAS) -> None:
    nib.save(nib.Nifti1Image(data, affine), path)


def head_with_face(folder: Path, masked: bool) -> list[dict]:
    """Manifest rows of an exam without skull stripping: noise everywhere."""
    folder.mkdir()
    save(folder / "P1_t1.nii.gz", ellipsoid(np.int16) + np.random.default_rng(2).integers(0, 9, SHAPE).astype(np.int16))
    if masked:
        save(folder / "P1_brainmask.nii.gz", (ellipsoid(np.int16) > 0).astype(np.uint8))
    return build_manifest([folder], num_workers=0).to_dict("records")


def small_corpus(folder: Path) -> Path:
    source, out = folder / "ONE", folder / "corpus"
    source.mkdir()
    save(source / "P1_t1.nii.gz", ellipsoid(np.int16))
    manifest = build_manifest([source], num_workers=0)
    prepare_corpus(manifest, out, WHOLE, num_workers=0)
    merge(manifest, out)
    return out


def original(path: str, affine, brain) -> np.ndarray:
    """The brain's values in the file, found by millimetres."""
    given = read_volume(path)
    voxels = np.argwhere(brain)
    mm = voxels @ affine[:3, :3].T + affine[:3, 3]
    inverse = np.linalg.inv(given.affine)
    at = np.rint(mm @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    return given.values()[tuple(at.T)]


def writer_that_stops_at(exam: int) -> type[ShardWriter]:
    """A run that is cut off in the middle of its exam-th shard."""

    class Stopped(ShardWriter):
        number = itertools.count()

        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.last = next(self.number) == exam

        def append(self, frame: bytes) -> dict:
            if self.last:
                self.file.write(frame[: len(frame) // 2])
                self.file.flush()
                raise KeyboardInterrupt
            return super().append(frame)

    return Stopped


def whole(corpus: Corpus, frame) -> np.ndarray:
    return corpus.read(frame, (0, 0, 0), frame.shape)


def contents(corpus: Corpus) -> tuple[str, dict]:
    """All of a corpus, but where in which shard it stands."""
    frames = {
        (exam, name): whole(corpus, frame).tobytes()
        for exam in range(len(corpus))
        for name, frame in corpus.frames(exam).items()
    }
    assert {name for _, name in frames} >= {BRAIN, TUMOUR, "t1"}
    return corpus.index.drop(columns=["shard", "byte_offset"]).to_json(), frames


def flip_bit(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[int(byte)] ^= 1
    path.write_bytes(content)
