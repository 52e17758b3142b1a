"""The phantom: what it promises about its exams, labels and folder."""

import csv
import itertools
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from umbif.corpus import phantom
from umbif.corpus.phantom import STRENGTHS, PhantomExam, make_exam, write_phantom
from umbif.errors import UsageError

SPACING_MM = 4.0
NUM_EXAMS = 6


def exam(index: int, seed: int = 0) -> PhantomExam:
    return make_exam(index, seed=seed, spacing_mm=SPACING_MM)


def complete_exam() -> PhantomExam:
    return exam(next(i for i in itertools.count() if len(phantom._record(i, 0).sequences) == 4))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def images(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.nii.gz")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by two processes; the tests compare it with what this one makes."""
    return write_phantom(tmp_path_factory.mktemp("phantom"), NUM_EXAMS, spacing_mm=SPACING_MM, num_workers=2).parent


def test_the_same_key_gives_the_same_exam_and_another_key_another() -> None:
    one, same, other = exam(3), exam(3), exam(3, seed=1)
    assert one.record == same.record
    assert all(np.array_equal(one.volumes[s], same.volumes[s]) for s in one.volumes)
    assert not np.array_equal(one.tumour, other.tumour)


def test_sequences_have_the_contrast_of_their_kind() -> None:
    made = complete_exam()
    healthy = ndimage.binary_dilation(made.tumour > 0, iterations=2) == 0
    record = made.record
    steps = [SPACING_MM * np.arange(n, dtype=np.float32) for n in made.tumour.shape]
    axes = [low + step for low, step in zip(made.affine[:3, 3].astype(np.float32), steps, strict=True)]
    streams = [phantom._rng(0, stream, record.index) for stream in (phantom.HEAD, phantom.SCAN)]
    tissue, brain = phantom._tissue(phantom._deform(*streams, record, axes)[1], SPACING_MM)
    mean = {s: [v[(share > 0.9) & brain & healthy].mean() for share in tissue] for s, v in made.volumes.items()}
    orders = {"t1": "wgc", "t1ce": "wgc", "t2": "cgw", "flair": "gwc"}
    for sequence, order in orders.items():
        levels = [mean[sequence]["wgc".index(letter)] for letter in order]
        assert levels[0] > 1.1 * levels[1] > 1.2 * levels[2], sequence


def test_background_is_zero_the_brain_is_whole_and_holds_the_lesion() -> None:
    for index in range(4):
        made = exam(index)
        brain = next(iter(made.volumes.values())) > 0
        assert all(np.array_equal(v > 0, brain) for v in made.volumes.values())
        assert not any(brain.take(end, axis).any() for axis in range(3) for end in (0, -1))
        parts = np.bincount(ndimage.label(brain)[0].ravel())[1:]
        assert parts.max() > 0.999 * brain.sum()
        assert 900 < brain.sum() * SPACING_MM**3 / 1000 < 2400  # ml
        assert (made.tumour > 0).sum() * SPACING_MM**3 > 3000
        assert not (made.tumour[~brain] > 0).any()


def test_files_of_two_processes_open_in_the_right_place_whatever_their_axes(written: Path) -> None:
    seen = set()
    for index in range(NUM_EXAMS):
        made = exam(index)
        record = made.record
        spelling = dict(zip(phantom.SEQUENCES, record.site.spelling, strict=True))
        expected = {f"{record.stem}_{name}.nii.gz" for name in ("seg", *(spelling[s] for s in record.sequences))}
        assert {p.name for p in (written / record.folder).iterdir()} == expected
        for sequence, volume in made.volumes.items():
            image = nib.load(written / record.folder / f"{record.stem}_{spelling[sequence]}.nii.gz")
            assert image.get_data_dtype() == np.int16
            assert image.header["qform_code"] > 0
            assert np.allclose(image.get_qform(), image.get_sform(), atol=1e-3)
            seen.add("".join(nib.aff2axcodes(image.affine)))
            upright = nib.as_closest_canonical(image)
            assert np.allclose(upright.affine, made.affine)
            assert np.array_equal(np.asarray(upright.dataobj), volume)
    assert seen == {"RAS", "LPS"}


def test_null_shuffles_labels_but_keeps_images_and_counts(written: Path, tmp_path: Path) -> None:
    null = rows(write_phantom(tmp_path, NUM_EXAMS, spacing_mm=SPACING_MM, null=True, num_workers=1))
    real = rows(written / "labels.csv")
    assert images(tmp_path) == images(written)
    assert (tmp_path / "truth.csv").read_text() == (written / "truth.csv").read_text()
    for name in STRENGTHS:
        assert Counter(r[name] for r in null) == Counter(r[name] for r in real)
    assert any(a[name] != b[name] for name in STRENGTHS for a, b in zip(null, real, strict=True))
    assert [r["age"] for r in null] == [r["age"] for r in real]


def test_the_same_call_finishes_what_was_interrupted(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = phantom._save, itertools.count()

    def interrupted(*args: object) -> None:
        if next(calls) == 7:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(phantom, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path, NUM_EXAMS, spacing_mm=SPACING_MM, num_workers=1)
    assert not (tmp_path / "labels.csv").exists()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("site-*/*/*.nii.gz")}
    assert 0 < len(kept) <= 7
    write_phantom(tmp_path, NUM_EXAMS, spacing_mm=SPACING_MM, num_workers=1)
    assert images(tmp_path) == images(written)
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())


def test_a_folder_that_holds_something_else_is_refused(written: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(UsageError, match="no phantom"):
        write_phantom(tmp_path, 2)
    with pytest.raises(UsageError, match="another phantom: got seed=0"):
        write_phantom(written, NUM_EXAMS, spacing_mm=SPACING_MM, seed=1)
    with pytest.raises(UsageError, match="4 problems"):
        write_phantom(tmp_path / "new", 0, spacing_mm=9, seed=-1, healthy=2)
    assert not (tmp_path / "new").exists()


def test_a_follow_up_shows_the_same_head_with_a_grown_lesion() -> None:
    later = next(r for r in (phantom._record(i, 0) for i in range(20, 40)) if r.session)
    first = phantom._record(later.head, 0)
    assert (later.person, later.hidden, later.site) == (first.person, first.hidden, first.site)
    assert not first.session
    before, after = exam(first.index), exam(later.index)
    brains = [next(iter(e.volumes.values())) > 0 for e in (before, after)]
    assert (brains[0] & brains[1]).sum() > 0.97 * (brains[0] | brains[1]).sum()
    assert later.lesion.radius_mm == pytest.approx(1.2 * first.lesion.radius_mm)
    cores = [np.isin(e.tumour, (1, 3)).sum() for e in (before, after)]
    assert cores[1] > 1.1 * cores[0]


def test_a_healthy_person_has_the_same_head_without_a_tumour_a_mask_or_a_label(tmp_path: Path) -> None:
    ill, well = (make_exam(3, seed=0, spacing_mm=4.0, healthy=share) for share in (0.0, 1.0))
    assert ill.tumour.any()
    assert not well.tumour.any()
    far = np.indices(ill.tumour.shape)[0] > ill.tumour.shape[0] // 2
    far ^= np.argwhere(ill.tumour).mean(0)[0] > ill.tumour.shape[0] // 2  # the other hemisphere
    a, b = (exam.volumes["t1ce"].astype(float) for exam in (ill, well))
    assert np.corrcoef(a[far], b[far])[0, 1] > 0.97 > np.corrcoef(a[ill.tumour > 0], b[ill.tumour > 0])[0, 1]
    labels = rows(write_phantom(tmp_path, 8, spacing_mm=4.0, healthy=0.5, num_workers=1))
    truth = rows(tmp_path / "truth.csv")
    healthy = {t["subject"] for t in truth if t["healthy"] == "True"}
    assert 0 < len(healthy) < 8
    assert {r["subject"] for r in labels if not r["idh"]} == healthy
    masks = {p.parent.name.split("_")[0] for p in tmp_path.glob("site-*/*/*_seg.nii.gz")}
    assert masks == {r["subject"] for r in labels} - healthy


def test_labels_occur_as_often_as_documented() -> None:
    records = [phantom._record(i, 0) for i in range(3000)]
    share = {name: np.mean([r.hidden[name] for r in records]) for name in STRENGTHS}
    assert share == pytest.approx({"idh": 0.40, "codeletion": 0.18, "mgmt": 0.50, "progression": 0.60}, abs=0.04)
    assert all(r.hidden["idh"] for r in records if r.hidden["codeletion"])
    assert np.mean([r.labels["mgmt"] == "indeterminate" for r in records]) == pytest.approx(0.10, abs=0.03)
    assert np.mean([r.labels["progression"] == "" for r in records]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([bool(r.session) for r in records]) == 0.05
    assert len({(r.subject, r.session) for r in records}) == len(records)
    assert all(r.sequences for r in records)


@pytest.mark.parametrize(
    ("label", "look", "sign"),
    [("idh", "enhancement", -1), ("idh", "oedema_edge_mm", -1), ("codeletion", "frontal", 1), ("mgmt", "necrosis", 1),
     ("codeletion", "patchiness", 1), ("progression", "rim_mm", 1), ("progression", "radius_mm", 1)],
)  # fmt: skip
def test_labels_move_the_lesions_look_as_documented(label: str, look: str, sign: int) -> None:
    records = [r for r in (phantom._record(i, 0) for i in range(1000)) if label != "codeletion" or r.hidden["idh"]]
    groups = [[float(getattr(r.lesion, look)) for r in records if r.hidden[label] is value] for value in (False, True)]
    error = np.hypot(*(np.std(g) / len(g) ** 0.5 for g in groups))
    assert sign * (np.mean(groups[1]) - np.mean(groups[0])) > 2.5 * error


def test_idh_can_be_seen_in_the_images() -> None:
    brightness: dict[bool, list[float]] = {False: [], True: []}
    for index in (i for i in range(40) if "t1ce" in phantom._record(i, 0).sequences):
        idh = phantom._record(index, 0).hidden["idh"]
        if len(brightness[idh]) < 6:
            made = exam(index)
            volume = made.volumes["t1ce"]
            brightness[idh].append(volume[made.tumour > 0].mean() / np.median(volume[volume > 0]))
    assert np.mean(brightness[False]) > np.mean(brightness[True]) + 0.1
