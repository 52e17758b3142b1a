"""Files of two people or of two times never become one exam, and no folder or name is lost without a word."""

import errno
import os
from pathlib import Path

import pytest
from test_index import brain, rows, save

from umbif.corpus.datasets import parse_name
from umbif.corpus.folders import find_volumes
from umbif.corpus.index import build_manifest, summary
from umbif.corpus.manifest import assign_persons
from umbif.errors import UsageError

LAYOUTS = {  # files, and the exams that they make
    "siteA/001/t1 siteA/001/flair siteB/001/t1 siteB/007/t1": {
        "siteA/001": "flair t1", "siteB/001": "t1", "007": "t1",
    },
    "siteA/001/t1 siteB/001/flair": {"siteA/001": "t1", "siteB/001": "flair"},
    "AD/001/t1 PD/001/flair": {"AD/001": "t1", "PD/001": "flair"},  # both words are sequences too
    "AD/001/001_AD_t1 PD/001/001_PD_t1": {"AD/001": "t1", "PD/001": "t1"},
    "siteA/P1_t1 siteB/P1_t1": {"siteA/P1": "t1", "siteB/P1": "t1"},
    "siteA/sub-01/anat/sub-01_T1w siteB/sub-01/anat/sub-01_FLAIR siteB/sub-01/dwi/sub-01_dwi": {
        "siteA/sub-01": "t1", "siteB/sub-01": "dwi flair",
    },
    "siteA/001/preop/t1 siteA/001/postop/t1 siteB/001/preop/t1": {
        "siteA/001/preop": "t1", "siteA/001/postop": "t1", "siteB/001/preop": "t1",
    },
    "subj01/baseline/t1 subj01/followup/flair subj02/baseline/t1": {
        "subj01/baseline": "t1", "subj01/followup": "flair", "subj02/baseline": "t1",
    },
    "P01/preop/P01_t1 P01/postop/P01_t1": {"P01/preop": "t1", "P01/postop": "t1"},
    "preop/P01_t1 postop/P01_flair": {"P01/preop": "t1", "P01/postop": "flair"},
    "P01_preop/P01_preop_t1 P01_month3/t1": {"P01/preop": "t1", "P01/month3": "t1"},
    "P01/thin/P01_t1 P01/thick/P01_flair": {"P01/thin": "t1", "P01/thick": "flair"},
    "XY12/scan1/t1 XY12/scan2/t1 XY13/scan1/t1": {"XY12/scan1": "t1", "XY12/scan2": "t1", "XY13": "t1"},
    "subj01/1/t1 subj01/2/t1 subj02/1/t1": {"subj01/1": "t1", "subj01/2": "t1", "subj02": "t1"},
    "XY12/2020_01_31/t1 XY12/03.05.2021/t1": {"XY12/2020-01-31": "t1", "XY12/03-05-2021": "t1"},
    "P01/week3/t1 P01/visit3/t1": {"P01/week-3": "t1", "P01/visit-3": "t1"},
    "P01_ses-2/t1 P02_ses-2/flair": {"P01/2": "t1", "P02/2": "flair"},
    "site1/Smith_t1 site1/Smith_flair site1/Miller_t1": {"site1/Smith": "flair t1", "site1/Miller": "t1"},
    "site1/Smith_t1 site1/Miller_flair": {"site1/Smith": "t1", "site1/Miller": "flair"},
    "wave1/Smith_t1 wave1/Miller_t1 wave2/Smith_t1 wave2/Miller_t1": {
        "wave1/Smith": "t1", "wave1/Miller": "t1", "wave2/Smith": "t1", "wave2/Miller": "t1",
    },
    "Smith/anat/t1 Smith/anat/flair Miller/anat/t1": {"Smith": "flair t1", "Miller": "t1"},
    "T1/Smith_t1 T1/Miller_t1": {"Smith": "t1", "Miller": "t1"},
    "A1/3d_t1 A2/3d_t1": {"A1": "t1", "A2": "t1"},
}  # fmt: skip
TOGETHER = {
    "sub-01/anat/sub-01_T1w sub-01/dwi/sub-01_dwi derivatives/hdbet/sub-01/anat/sub-01_FLAIR": {
        "sub-01": "dwi flair t1",
    },
    "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1 images_DTI/UPENN-GBM-00001_11_DTI_FA "
    "images_segm/UPENN-GBM-00001_11_segm": {"UPENN-GBM-00001/11": "other t1 tumour_mask"},
    "IXI-T1/IXI002-Guys-0828-T1 IXI-PD/IXI002-Guys-0828-PD": {"IXI002-Guys-0828": "other t1"},
    "P1/atlas_bet/P1_t1_bet P1/P1_flair P1/labels/P1_seg": {"P1": "flair t1 tumour_mask"},
    "P1/pre_contrast/P1_t1 P1/post_contrast/P1_t1ce": {"P1": "t1 t1ce"},
    "p7/ax_t1 p7/sag_flair p7/thin_t2 p8/thin_t2": {"p7": "flair t1 t2", "p8": "t2"},
    "P1/Someone_t1 P1/FLAIR": {"P1": "flair t1"},
    "siteA/P1_t1 labels/P1_seg P2_t1": {"P1": "t1 tumour_mask", "P2": "t1"},
    "P1/P1_t1 P2/P2_t1 rater_b/P1_seg rater_b/P2_seg": {"P1": "t1 tumour_mask", "P2": "t1 tumour_mask"},
    "siteA/P1_t1 siteA/rater_b/P1_seg siteB/P1_t1": {"siteA/P1": "t1 tumour_mask", "siteB/P1": "t1"},
}  # fmt: skip


def exams(root: Path) -> dict[str, str]:
    """The volumes of each exam."""
    found: dict[str, list[str]] = {}
    for item in find_volumes([root], "D"):
        found.setdefault(item.exam.removeprefix("D/"), []).append(item.reason or item.sequence or item.role)
    return {exam: " ".join(sorted(volumes)) for exam, volumes in found.items()}


def touch(root: Path, files: str) -> Path:
    for name in files.split():
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.mark.parametrize("files", LAYOUTS)
def test_two_people_or_two_times_are_two_exams(tmp_path, files):
    assert exams(touch(tmp_path, files)) == LAYOUTS[files]


@pytest.mark.parametrize("files", TOGETHER)
def test_folders_that_sort_the_volumes_of_an_exam_do_not_part_them(tmp_path, files):
    assert exams(touch(tmp_path, files)) == TOGETHER[files]


def test_a_mask_that_may_be_of_two_exams_is_set_aside_and_so_are_exams_that_would_share_a_made_name(tmp_path):
    mask = touch(tmp_path / "mask", "siteA/001/t1 siteB/001/t1 rater_b/001_seg")
    assert exams(mask) == {"siteA/001": "t1", "siteB/001": "t1", "001": "unclear_exam"}
    name = touch(tmp_path / "name", "siteA/001/t1 siteB/001/t1 siteA_ses-001_flair")
    assert exams(name) == {"siteA/001": "unclear_exam unclear_exam", "siteB/001": "t1"}


def test_sources_of_one_data_set_are_told_apart_like_its_folders(tmp_path):
    touch(tmp_path, "a/images/p1_t1 b/images/p1_t1 b/labels/p1_seg")
    found = find_volumes([tmp_path / "a/images", tmp_path / "b/images", tmp_path / "b/labels"], "D")
    assert [item.exam for item in found] == ["D/a/p1", "D/b/p1", "D/b/p1"]


def test_time_words_are_sessions_and_no_part_of_other_names():
    root = Path("/data")
    for name, expected in {
        "P1/baseline/t1": ("P1", "baseline"), "P1/pre-op/t1": ("P1", "pre-op"), "P1/12months/t1": ("P1", "12months"),
        "P1/Follow_up 2/t1": ("P1", "Follow-up-2"), "P1/20200131_MRI/t1": ("P1", "20200131"),
        "P1/posterior/P1_t1": ("P1", ""), "day/P1_t1": ("P1", ""), "posttest7/t1": ("posttest7", ""),
    }.items():  # fmt: skip
        assert parse_name(root / f"{name}.nii.gz", root)[:2] == expected


def test_exams_that_folders_tell_apart_are_counted_and_of_one_person_unless_labels_name_them_all(tmp_path):
    for name, seed in (("siteA/001/t1", 1), ("siteB/001/t1", 2), ("siteB/007/t1", 3)):
        save(tmp_path / f"{name}.nii.gz", brain(seed))
    table = build_manifest([tmp_path], dataset="D", num_workers=0)
    assert table["exam"].tolist() == ["D/siteA/001", "D/siteB/001", "D/007"]
    assert table["flags"].tolist() == ["told_apart", "told_apart", ""]
    assert "2 exams have the name of others and are told apart by folders (told_apart in flags)" in summary(table)
    assert table["person"].tolist() == ["D/siteA/001", "D/siteA/001", "D/007"]
    some, all_of_them = (assign_persons(table.assign(person=given)) for given in (["x", "", ""], ["x", "y", ""]))
    assert some["person"].tolist() == ["x", "x", "D/007"]
    assert all_of_them["person"].tolist() == ["x", "y", "D/007"]
    assert assign_persons(rows(("D", "a", ""), ("D", "b", "")))["person"].tolist() == ["D/a", "D/b"]


def test_folders_that_cannot_be_read_are_told_all_of_them(tmp_path, monkeypatch):
    touch(tmp_path, "P1/P1_t1 P2/P2_t1 P3/anat/P3_t1")
    closed = {str(tmp_path / "P1"), str(tmp_path / "P3/anat")}

    def scandir(path, listed=os.scandir):
        if str(path) in closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = {str(item.path): (item.reason, item.detail) for item in find_volumes([tmp_path])}
    said = ("unreadable", "This folder cannot be read, so its files are missing here: Permission denied.")
    assert found == {**dict.fromkeys(closed, said), str(tmp_path / "P2/P2_t1.nii.gz"): ("", "")}
    closed.add(str(tmp_path))
    with pytest.raises(PermissionError) as caught:
        find_volumes([tmp_path])
    assert caught.value.filename == str(tmp_path)


def test_sources_that_may_not_be_read_are_named_at_once(tmp_path, monkeypatch):
    touch(tmp_path, "a/P1_t1 b/P2_t1")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=rf"may not be read: got {tmp_path}/a, {tmp_path}/b\. Ask its owner"):
        find_volumes([tmp_path / "a", tmp_path / "b"])


def test_names_that_are_no_utf8_are_refused_at_once_without_a_name(tmp_path):
    touch(tmp_path, "P1/P1_t1 P2/P2_t1")
    folder = os.fsencode(tmp_path)
    os.mkdir(folder + b"/M\xfcller")
    for name in (b"/M\xfcller/t1.nii.gz", b"/M\xfcller/flair.nii.gz", b"/P1/J\xe4ger_t2.nii.gz", b"/P1/J\xe4ger.txt"):
        open(folder + name, "wb").close()
    with pytest.raises(UsageError) as caught:
        build_manifest([tmp_path], num_workers=0)
    text = str(caught.value)
    assert "not in UTF-8: got 3 of 5 files, in 2 folders. `find SOURCE | grep -avx '.*'` lists them" in text
    assert "convmv -r -f latin1 -t utf-8 --notest SOURCE" in text
    assert "ller" not in text
    assert "ger" not in text
