"""Folders as the field writes them become one true table: who, which sequence, whose labels, which split."""

import gzip
import os
import signal
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from umbif.corpus import checks, index
from umbif.corpus.checks import duplicates, inspect
from umbif.corpus.datasets import parse_name
from umbif.corpus.folders import find_volumes
from umbif.corpus.grouping import Found
from umbif.corpus.index import _inspect_all, build_manifest, refuse_impossible, refuse_without_images, summary
from umbif.corpus.labels import join_labels
from umbif.corpus.manifest import (
    COLUMNS,
    assign_persons,
    assign_splits,
    label_columns,
    read_manifest,
    write_manifest,
)
from umbif.corpus.readers import read_volume
from umbif.errors import Stopped, UmbifError, UsageError


def brain(seed: int) -> np.ndarray:
    data = np.zeros((14, 16, 12), np.int16)
    data[2:-2, 2:-2, 2:-2] = np.random.default_rng(seed).integers(50, 120, (10, 12, 8))
    return data


def save(path: Path, data: np.ndarray, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1, 1, 1]) if affine is None else affine), path)
    return path


NAMES = {
    "BraTS2021_00006/BraTS2021_00006_flair": ("BraTS2021_00006", "", "image", "flair"),
    "BraTS2021_00006/BraTS2021_00006_seg": ("BraTS2021_00006", "", "tumour_mask", ""),
    "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n": ("BraTS-GLI-00000", "000", "image", "t1"),
    "BraTS-GLI-00000-001/BraTS-GLI-00000-001-t2f": ("BraTS-GLI-00000", "001", "image", "flair"),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1c_bias": ("UCSF-PDGM-0004", "", "image", "t1ce"),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1gad": ("UCSF-PDGM-0004", "", "image", "t1ce"),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_ADC": ("UCSF-PDGM-0004", "", "image", "adc"),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_DWI_bias": ("UCSF-PDGM-0004", "", "image", "dwi"),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_SWI": ("UCSF-PDGM-0004", "", "image", "swi"),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_DTI_eddy_FA": ("UCSF-PDGM-0004", "", "image", "other"),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_brain_segmentation": ("UCSF-PDGM-0004", "", "brain_mask", ""),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_tumor_segmentation": ("UCSF-PDGM-0004", "", "tumour_mask", ""),
    "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_brain_parenchyma_segmentation": ("UCSF-PDGM-0004", "", "image", "other"),
    "UCSF-PDGM-0429_FU002d_nifti/UCSF-PDGM-0429_FU002d_FLAIR": ("UCSF-PDGM-0429", "002d", "image", "flair"),
    "UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1GD": ("UPENN-GBM-00001", "11", "image", "t1ce"),
    "UPENN-GBM-00001_11_automated_approx_segm": ("UPENN-GBM-00001", "11", "tumour_mask", ""),
    "TCGA-FG-6692/atlas_bet/TCGA-FG-6692_fla_bet": ("TCGA-FG-6692", "", "image", "flair"),
    "TCGA-FG-6692/atlas_bet/TCGA-FG-6692_seg_fused-mav": ("TCGA-FG-6692", "", "tumour_mask", ""),
    "TCGA-FG-6692/atlas_bet/TCGA-FG-6692_brainmask": ("TCGA-FG-6692", "", "brain_mask", ""),
    "sub-01/ses-02/anat/sub-01_ses-02_ce-gadolinium_T1w": ("sub-01", "02", "image", "t1ce"),
    "sub-01/ses-02/anat/sub-01_ses-02_acq-3d_run-1_T1w": ("sub-01", "02", "image", "t1"),
    "sub-01/anat/sub-01_FLAIR": ("sub-01", "", "image", "flair"),
    "sub-01/anat/sub-01_desc-brain_mask": ("sub-01", "", "brain_mask", ""),
    "sub-01/perf/sub-01_asl": ("sub-01", "", "image", "other"),
    "MU/PatientID_0003/Timepoint_1/PatientID_0003_Timepoint_1_brain_t1c": ("PatientID_0003", "1", "image", "t1ce"),
    "site-a/phantom-0001_ses-2/phantom-0001_ses-2_T1GD": ("phantom-0001", "2", "image", "t1ce"),
    "p007/t1": ("p007", "", "image", "t1"),
    "p007/20200101/T1CE": ("p007", "20200101", "image", "t1ce"),
    "p007/ses-02/anat/flair": ("p007", "02", "image", "flair"),
    "p007/brain_mask": ("p007", "", "brain_mask", ""),
    "p007/tumour": ("p007", "", "tumour_mask", ""),
    "all/PatientA_t1_post": ("PatientA", "", "image", "t1ce"),
    "S1_T1_pre_contrast": ("S1", "", "image", "t1"),
    "S1_t2_flair": ("S1", "", "image", "flair"),
    "S1-T2w": ("S1", "", "image", "t2"),
    "BRAIN-0001_t1": ("BRAIN-0001", "", "image", "t1"),
    "someones_anatomy": ("someones_anatomy", "", "image", "other"),
    "t2": ("data", "", "image", "t2"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", [".nii.gz", ".NII"])
def test_names_are_read_as_the_field_writes_them(name, ending):
    root = Path("/somewhere/data")
    assert tuple(parse_name(root / f"{name}{ending}", root)) == NAMES[name]


def test_links_out_of_the_source_are_quarantined_and_links_inside_are_not(tmp_path):
    outside = save(tmp_path / "elsewhere/secret_t1.nii.gz", brain(0))
    source = tmp_path / "source"
    inside = save(source / "raw/p1_t1.nii", brain(1))
    (source / "p2_t1.nii").symlink_to(inside)
    (source / "p3_t1.nii.gz").symlink_to(outside)
    (source / "linked").symlink_to(outside.parent)
    save(source / ".hidden/p4_t1.nii", brain(2))
    (source / "._p1_t1.nii").write_bytes(b"finder")
    (source / "notes.txt").write_text("nii")
    reasons = {found.path.name: found.reason for found in find_volumes([source])}
    outside_code = "symlink_outside"
    assert reasons == {"p1_t1.nii": "", "p2_t1.nii": "", "p3_t1.nii.gz": outside_code, "linked": outside_code}


def test_sources_that_cannot_be_meant_are_refused(tmp_path):
    for folder in ("a/images", "b/images"):
        save(tmp_path / folder / "p1_t1.nii", brain(0))
    with pytest.raises(UsageError, match="same name"):
        find_volumes([tmp_path / "a/images", tmp_path / "b/images"])
    assert len(find_volumes([tmp_path / "a/images", tmp_path / "b/images"], "both")) == 2
    with pytest.raises(UsageError, match=r"2 names for 3 sources.*once for each source"):
        find_volumes([tmp_path / "a", tmp_path / "b", tmp_path], ["A", "B"])
    assert len(find_volumes([tmp_path, tmp_path / "a/images/p1_t1.nii"])) == 2
    with pytest.raises(UsageError, match="no such folder"):
        build_manifest([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nii")
    for source in (tmp_path / "empty", tmp_path / "empty" / "notes.txt"):
        with pytest.raises(UsageError, match=rf"No image was found: got {source}\. Looked for \.nii and .*dcm2niix"):
            build_manifest([source])


def test_a_manifest_without_an_image_is_told(tmp_path, manifest):
    (tmp_path / "P1_t1.nii.gz").write_text("no image")
    save(tmp_path / "P1_seg.nii.gz", (brain(4) > 0).astype(np.uint8))
    with pytest.raises(UmbifError, match=r"No image was found among 2 files .*Looked for \.nii.*m\.parquet has status"):
        refuse_without_images(build_manifest([tmp_path], num_workers=0), Path("m.parquet"))
    refuse_without_images(manifest, Path("m.parquet"))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Three exams of two subjects, a copy of one volume under another name, a mask and three bad files."""
    root = tmp_path_factory.mktemp("data") / "cohort"
    for seed, exam in enumerate(("P-001_ses-1", "P-001_ses-2", "P-002_ses-1")):
        save(root / exam / f"{exam}_t1.nii.gz", brain(2 * seed))
        save(root / exam / f"{exam}_FLAIR.nii.gz", brain(2 * seed + 1))
    save(root / "P-002_ses-1/P-002_ses-1_seg.nii.gz", (brain(4) > 0).astype(np.uint8))
    turned = np.ascontiguousarray(brain(4)[::-1].astype(np.float32))
    save(root / "copy/X-9_t1.nii", turned, np.array([[1.0, 0, 0, -13], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    (root / "P-003_t1.nii.gz").write_bytes(b"")
    (root / "P-004_t2.nii.gz").write_bytes(gzip.compress(b"no image"))
    save(root / "P-005_brainmask.nii.gz", np.zeros((5, 5, 5), np.uint8))
    return root


@pytest.fixture(scope="module")
def manifest(cohort) -> pd.DataFrame:
    return build_manifest([cohort], test_fraction=0.5, num_workers=0)


def test_the_manifest_says_what_is_in_the_files(cohort, manifest):
    assert tuple(manifest.columns) == COLUMNS
    row = manifest[manifest["path"].str.endswith("P-001_ses-2_FLAIR.nii.gz")].iloc[0]
    assert (row["exam"], row["role"], row["sequence"]) == ("cohort/P-001/2", "image", "flair")
    assert (row["shape"], row["spacing_mm"], row["axcodes"], row["dtype"]) == ([14, 16, 12], [1, 1, 1], "LPS", "int16")
    assert row["bytes"] == os.path.getsize(row["path"])
    assert (row["status"], row["reason"], row["site"]) == ("ok", "", "cohort")
    bad = manifest[manifest["status"] == "quarantined"].set_index("subject")["reason"].to_dict()
    assert bad == {"P-003": "empty_file", "P-004": "not_nifti", "P-005": "constant"}


def test_one_person_is_one_side_even_under_another_name_and_storage(manifest):
    same = duplicates(manifest)
    assert sorted(same["subject"]) == ["P-002", "X-9"]
    assert same["dtype"].nunique() == 2
    assert same["axcodes"].nunique() == 2
    persons = manifest.groupby("subject")["person"].unique()
    assert persons["X-9"] == persons["P-002"] != persons["P-001"]
    assert manifest.groupby("person")["split"].nunique().max() == 1
    assert set(manifest[manifest["status"] == "ok"]["split"]) == {"train", "test"}


def test_the_summary_names_bad_files_relative_to_the_source(cohort, manifest):
    text = summary(manifest)
    assert "4 exams of 2 persons" in text
    assert "flair 3" in text
    assert "t1 4" in text
    assert "tumour_mask 1" in text
    assert "    P-003_t1.nii.gz" in text
    assert str(cohort) not in text
    many = pd.concat([manifest[manifest["status"] != "ok"]] * 30)
    assert len(summary(many).splitlines()) < 25
    flat = manifest.assign(flags="flat_cut")
    assert "volumes end in a plane (flat_cut in flags)" in summary(flat)
    assert "flat_cut" not in text


def _crash_on_bad_name(found: Found) -> dict:
    if found.subject == "P-004":
        os._exit(9)
    return inspect(found)


def test_a_reader_that_dies_costs_its_file_only(cohort, manifest):
    rows = list(_inspect_all(find_volumes([cohort]), 2, _crash_on_bad_name))
    reasons = {row["path"]: row["reason"] for row in rows}
    expected = dict(zip(manifest["path"], manifest["reason"], strict=True))
    crashed = next(path for path in expected if "P-004" in path)
    assert reasons == expected | {crashed: "reader_crashed"}


def test_processes_give_the_same_table_as_one(cohort, manifest):
    again = build_manifest([cohort], test_fraction=0.5, num_workers=2)
    pd.testing.assert_frame_equal(again, manifest)


def rows(*exams: tuple[str, str, str], **columns) -> pd.DataFrame:
    """A manifest of usable images with the given (dataset, subject, session)."""
    table = pd.DataFrame(list(exams), columns=["dataset", "subject", "session"])
    table["exam"] = ["/".join(filter(None, exam)) for exam in exams]
    table = table.assign(person="", site=table["dataset"], role="image", sequence="t1", status="ok", split="")
    table = table.assign(voxel_sha256=[f"sha{i}" for i in range(len(table))], **columns)
    for column in COLUMNS:
        if column not in table:
            empty = 0 if column in ("bytes", "modified_ns") else ""
            table[column] = [[1]] * len(table) if column in ("shape", "spacing_mm") else empty
    return table[list(COLUMNS)]


def test_persons_are_joined_by_labels_by_voxels_and_through_each_other():
    table = rows(("A", "1", ""), ("A", "2", "x"), ("A", "2", "y"), ("B", "9", ""), ("B", "8", ""), ("B", "7", ""))
    table["person"] = ["", "", "Z", "Z", "", ""]
    table["voxel_sha256"] = ["same", "b", "c", "d", "same", "e"]
    assert list(assign_persons(table)["person"]) == ["A/1", "Z", "Z", "Z", "A/1", "B/7"]
    quarantined = assign_persons(table.assign(status="quarantined", person=""))
    assert list(quarantined["person"]) == ["A/1", "A/2", "A/2", "B/9", "B/8", "B/7"]


def test_splits_are_by_person_seeded_and_stable_when_exams_are_added():
    table = assign_persons(rows(*[("A", str(i // 2), str(i % 2)) for i in range(400)]))
    split = assign_splits(table, 0.2, seed=3)
    sides = split.groupby("person")["split"].unique()
    assert sides.map(len).max() == 1
    assert (sides.map(lambda side: side[0]) == "test").sum() == 40
    shuffled = assign_splits(table.sample(frac=1, random_state=0), 0.2, seed=3)["split"].sort_index()
    assert list(shuffled) == list(split["split"])
    assert list(assign_splits(table, 0.2, seed=4)["split"]) != list(split["split"])
    more = assign_splits(assign_persons(rows(*[("A", str(i // 2), str(i % 2)) for i in range(440)])), 0.2, seed=3)
    assert (more["split"][:400] != split["split"]).mean() < 0.06
    assert set(assign_splits(table, 0)["split"]) == {"train"}
    with pytest.raises(UsageError, match="test_fraction"):
        assign_splits(table, 1.5)


def test_a_split_of_ones_own_is_kept_and_the_others_are_drawn():
    table = assign_persons(rows(*[("A", str(i // 2), str(i % 2)) for i in range(40)]))
    given = table.assign(split=[" TEST ", "", "train", *[""] * 37])
    drawn = assign_splits(given, 0.5, seed=3).groupby("subject")["split"].unique()
    assert (drawn["0"].tolist(), drawn["1"].tolist()) == (["test"], ["train"])
    assert (drawn.drop(["0", "1"]).map(lambda sides: sides[0]) == "test").sum() == 9
    only = assign_splits(given, 0).query("split == 'test'")
    assert only["subject"].tolist() == ["0", "0"]


def test_a_split_that_cannot_be_meant_is_told_without_names():
    table = rows(("A", "Smith", "1"), ("A", "Smith", "2"), ("A", "Miller", ""), ("A", "Jones", ""))
    with pytest.raises(UsageError, match=r"other than train and test: got 'fold 1', 'val'"):
        assign_splits(table.assign(person="x", split=["val", "fold 1", "val", ""]))
    with pytest.raises(UsageError, match=r"both sides of the split: got 1\. ") as caught:
        assign_splits(assign_persons(table.assign(split=["train", "test", "train", ""])))
    assert "Smith" not in str(caught.value)


def test_who_shares_an_image_with_a_test_person_cannot_be_put_into_training(cohort, tmp_path):
    table = table_file(tmp_path, "subject,split\nP-002,test\nX-9,train\n")
    with pytest.raises(UsageError, match=r"both sides of the split: got 1.*Index once without the column to find them"):
        build_manifest([cohort], labels=table, num_workers=0)
    table = table_file(tmp_path, "subject,split\nP-002,test\n")
    split = build_manifest([cohort], labels=table, test_fraction=0, num_workers=0).groupby("subject")["split"].first()
    assert split[split == "test"].index.tolist() == ["P-002", "X-9"]


def table_file(tmp_path: Path, text: str, name: str = "labels.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_labels_are_joined_verbatim_by_whatever_spelling_of_the_subject(tmp_path, capsys):
    table = rows(("U", "UCSF-PDGM-0004", ""), ("U", "UPENN-GBM-00001", "11"), ("U", "sub-07", "02"), ("U", "P9", ""))
    text = 'ID;IDH, status;age\nucsf_pdgm_004;"wildtype";066\nUPENN-GBM-00001_11;0;NA\n7-2; mutant ;1.0\n'
    joined = join_labels(table, table_file(tmp_path, text))
    assert label_columns(joined) == ["IDH, status", "age"]
    assert list(joined["IDH, status"]) == ["wildtype", "0", " mutant ", ""]
    assert list(joined["age"]) == ["066", "NA", "1.0", ""]
    assert "3 of 4 exams have a row" in capsys.readouterr().out


def test_a_session_column_tells_the_exams_of_a_subject_apart(tmp_path):
    table = rows(("A", "P1", ""), ("A", "P1", "2"), ("A", "P2", "1"))
    text = "subject\tsession\tperson\tsite\tidh\nP1\t\thuman-1\tBonn\t0\nP1\tses-02\thuman-1\t\t1\n"
    joined = join_labels(table, table_file(tmp_path, text, "labels.tsv"))
    assert list(joined["idh"]) == ["0", "1", ""]
    assert list(joined["person"]) == ["human-1", "human-1", ""]
    assert list(joined["site"]) == ["Bonn", "A", "A"]


@pytest.mark.parametrize(
    "name",
    ["PatientID", "SubjectID", "patients", "MRN", "eid", "pid", "PATNO", "patientid", "PTID", "case no", "BraTS21ID"],
)
def test_bare_numbers_are_subjects_where_their_column_is_called_so(tmp_path, name):
    table = rows(("A", "001", ""), ("A", "062", ""))
    text = f"no,PatientAge,{name},idh\n1,62,1,0\n2,1,62,1\n"
    assert list(join_labels(table, table_file(tmp_path, text))["idh"]) == ["0", "1"]


def test_a_column_of_bare_numbers_that_could_be_the_key_is_named(tmp_path):
    text = "age,nummer,idh\n62,1,wt\n88,62,mut\n"
    with pytest.raises(UsageError, match=r"No row.*'nummer', 'age' hold bare numbers: call .* `subject`"):
        join_labels(rows(("A", "001", ""), ("A", "062", "")), table_file(tmp_path, text))
    with pytest.raises(UsageError, match=r"No row.*Column 'nummer' holds bare numbers: call it `subject`"):
        join_labels(rows(("A", "001", ""), ("A", "2", "")), table_file(tmp_path, text))


def test_what_a_spreadsheet_saves_as_unicode_text_is_read(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("ID\tGrad\tOrt\r\nP1\tIV\tKöln\r\n", encoding="utf-16")
    assert list(join_labels(rows(("A", "P1", "")), path)["Ort"]) == ["Köln"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_join_however_their_umlauts_are_encoded(tmp_path, forms):
    subject, key = (unicodedata.normalize(form, "Müller-07") for form in forms)
    table = rows(("A", subject, ""))
    assert list(join_labels(table, table_file(tmp_path, f"ID,idh\n{key},1\n"))["idh"]) == ["1"]


def test_tables_are_joined_in_turn_and_the_earlier_one_counts(tmp_path, capsys):
    table = rows(("A", "P1", ""), ("A", "P2", ""), ("B", "Q1", ""))
    first = table_file(tmp_path, "ID,site,idh\nP1,Bonn,0\nP2,,1\n", "first.csv")
    second = table_file(tmp_path, "subject,site,idh,mgmt\nP2,Köln,0,1\nQ1,,1,0\nP1,bonn ,,\n", "second.csv")
    joined = join_labels(table, first, second)
    assert label_columns(joined) == ["idh", "mgmt"]
    assert list(joined["idh"]) == ["0", "1", "1"]
    assert list(joined["mgmt"]) == ["", "1", "0"]
    assert list(joined["site"]) == ["Bonn", "Köln", "B"]
    assert "second.csv gives 1 exams another 'idh'" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"columns that the manifest has: got idh, mgmt"):
        join_labels(joined, second)
    for column in ("person", "site", "split"):
        one, other = (table_file(tmp_path, f"ID,{column}\nP1,{v}\n", f"{v}.csv") for v in ("train", "test"))
        with pytest.raises(UsageError, match=rf"tables disagree: got {column} in 1 exams"):
            join_labels(table, one, other)


def test_rows_of_one_exam_that_agree_become_one_and_torn_columns_are_left_out(tmp_path, capsys):
    table = rows(("A", "P1", ""), ("A", "P2", ""))
    text = "case_id,slide,idh,mgmt\nP1,s1,mut,\nP1,s2,mut,meth\nP2,s3,wt,\n"
    joined = join_labels(table, table_file(tmp_path, text))
    assert label_columns(joined) == ["idh", "mgmt"]
    assert list(joined["mgmt"]) == ["meth", ""]
    assert "left out 'slide'; its rows disagree within 1 exams" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ID,idh\nQ1,0\n", "No row of labels.csv belongs to an exam.*of the form A-9"),
        ("weight,grade\n1,2\n2,3\n", "No row"),
        ("ID,shape\nP-01,round\n", "has: got shape. Rename"),
        ("ID,idh\nP-01,0\nP-1,1\n", "ambiguous"),
        ("ID,idh\n77,1\n", "more than one subject"),
        ("ID,idh\nP-01,0\nP-01,1\n", "disagree: got idh in 1 exams"),
        ("ID,person,idh\nP-01,a,1\nP-01,b,1\n", "disagree: got person in 1 exams"),
        ("ID,idh,idh\nP-01,0,1\n", "named twice: idh"),
        ("ID,idh\nP-01,0,1\n", "row 2 has 3 cells"),
        ("", "no rows"),
    ],
)
def test_label_tables_that_cannot_be_meant_are_refused(tmp_path, text, message):
    table = rows(("A", "P-01", ""), ("A", "1", ""), ("A", "77", ""), ("B", "77", ""))
    with pytest.raises(UsageError, match=message):
        join_labels(table, table_file(tmp_path, text))


@pytest.mark.parametrize("kind", ["csv", "parquet", "nested.parquet"])
def test_a_label_table_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / f"labels.{kind}"
    path.write_bytes(b'"' * 1_000_001)
    if kind == "nested.parquet":
        pd.DataFrame({"ID": [[{"a": 1}]]}).to_parquet(path)
    with pytest.raises(UsageError, match=rf"{path} is damaged, .*got .*as CSV again"):
        join_labels(rows(("A", "P-01", "")), path)


def test_what_cannot_be_meant_is_told_before_a_volume_is_read(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_inspect_all", lambda *_: pytest.fail("a volume was read"))
    wrong = {
        "There is no label table": {"labels": tmp_path / "gone.csv"},
        r"Label tables are \.csv": {"labels": cohort / "P-003_t1.nii.gz"},
        "no table with one header row": {"labels": table_file(tmp_path, "ID,idh\nP-001,0,1\n", "uneven.csv")},
        "No row of other.csv belongs to an exam": {"labels": table_file(tmp_path, "ID,idh\nQ1,0\n", "other.csv")},
        r"disagree: got idh": {"labels": table_file(tmp_path, "ID,idh\nP-001,0\nP-001,1\n", "torn.csv")},
        "test_fraction must be at least 0": {"test_fraction": 1.0},
    }
    for message, asked in wrong.items():
        with pytest.raises(UsageError, match=message):
            build_manifest([cohort], num_workers=0, **asked)


def test_all_that_cannot_be_meant_is_told_at_once_with_the_place_of_the_manifest(cohort, tmp_path):
    with pytest.raises(UsageError) as caught:
        refuse_impossible(-0.1, [tmp_path / "gone.csv"], tmp_path / "manifest.csv")
    assert [problem.what for problem in caught.value.problems] == [
        "test_fraction must be at least 0 and less than 1", "There is no label table", "A manifest is a .parquet file",
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "other.parquet").write_text("mine")
    for name, message in {
        "folder.parquet": "where a folder is", "other.parquet": "exists and is no manifest",
        "dta/m.parquet": "no such folder: got .*/dta. Did you mean data?", "x/m.parquet": "no such folder.*Make it",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=message):
            refuse_impossible(0.2, output=tmp_path / name)
    assert (tmp_path / "other.parquet").read_text() == "mine"


def test_labels_of_an_indexed_folder_stand_in_the_rows_of_their_exams(cohort, manifest, tmp_path):
    text = "subject,person,idh\nP-002,human-9,1\nP-001,,0\n"
    table = build_manifest([cohort], labels=table_file(tmp_path, text), test_fraction=0.5, num_workers=0)
    assert list(table.columns) == [*COLUMNS, "idh"]
    assert table["path"].tolist() == manifest["path"].tolist()
    expected = {"P-001": "0", "P-002": "1"}
    assert table["idh"].tolist() == [expected.get(subject, "") for subject in table["subject"]]
    assert table.groupby("subject")["person"].unique()["P-002"].tolist() == ["human-9"]
    untouched = [c for c in COLUMNS if c not in ("person", "split")]
    pd.testing.assert_frame_equal(table[untouched], manifest[untouched])


def test_a_dataset_column_keeps_equal_names_of_data_sets_apart(tmp_path):
    table = rows(("A", "77", ""), ("B", "77", ""))
    joined = join_labels(table, table_file(tmp_path, "dataset,subject,idh\nA,77,0\nB,77,1\n"))
    assert list(joined["idh"]) == ["0", "1"]


def test_each_of_several_data_sets_takes_the_labels_of_its_own_table(tmp_path, capsys):
    table = rows(("A", "1", ""), ("A", "2", ""), ("B", "1", ""), ("C", "3", ""))
    a = table_file(tmp_path, "subject,idh\n1,of a\n2,of a\n3,of nobody\n", "a.csv")
    b = table_file(tmp_path, "subject,idh\n1,of b\n2,of nobody\n", "b.csv")
    assert list(join_labels(table, a, b, datasets=["A", "B"])["idh"]) == ["of a", "of a", "of b", ""]
    assert "1 of 1 exams of 'B' have a row in b.csv" in capsys.readouterr().out
    for datasets in (["A"], ["A", "B", "C"]):  # then a table is of all
        with pytest.raises(UsageError, match="more than one subject"):
            join_labels(table, a, b, datasets=datasets)
    with pytest.raises(UsageError, match=r"No row of b.csv belongs to an exam of 'C'.*in the order of --dataset"):
        join_labels(table, a, b, datasets=["A", "C"])
    with pytest.raises(UsageError, match=r"no exam for its table: got 'D', with b.csv"):
        join_labels(table, a, b, datasets=["A", "D"])


def test_a_dataset_column_comes_before_the_order_of_tables_and_equal_names_are_one_data_set(tmp_path):
    table = rows(("A", "1", ""), ("A", "2", ""), ("B", "1", ""))
    both = table_file(tmp_path, "dataset,subject,idh\nA,1,a\nB,1,b\n", "both.csv")
    more = table_file(tmp_path, "subject,mgmt\n1,b\n", "more.csv")
    joined = join_labels(table, both, more, datasets=["A", "B"])
    assert (list(joined["idh"]), list(joined["mgmt"])) == (["a", "", "b"], ["", "", "b"])
    one = table_file(tmp_path, "subject,idh\n1,first\n", "one.csv")
    two = table_file(tmp_path, "subject,idh\n2,second\n", "two.csv")
    assert list(join_labels(table[:2], one, two, datasets=["A", "A"])["idh"]) == ["first", "second"]


def test_sources_tables_and_names_go_together_in_their_order(tmp_path):
    for number, site in enumerate("ab"):
        save(tmp_path / site / "images" / "1" / "1_t1.nii.gz", brain(number))
        table_file(tmp_path, f"subject,idh\n1,of {site}\n", f"{site}.csv")
    sources, labels = [[tmp_path / f"{site}{rest}" for site in "ab"] for rest in ("/images", ".csv")]
    table = build_manifest(sources, dataset=["A", "B"], labels=labels, num_workers=0)
    assert dict(zip(table["exam"], table["idh"], strict=True)) == {"A/1": "of a", "B/1": "of b"}


@pytest.fixture
def copied(cohort, tmp_path) -> Path:
    """The cohort, to be changed."""
    for path in cohort.rglob("*.nii*"):
        (tmp_path / "cohort" / path.relative_to(cohort)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cohort" / path.relative_to(cohort)).write_bytes(path.read_bytes())
    return tmp_path / "cohort"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    monkeypatch.setattr(checks, "read_volume", lambda path, **how: names.append(path.name) or read_volume(path, **how))
    return names


def indexed(source: Path, **how) -> pd.DataFrame:
    """What `umbif index` writes beside its source."""
    table = build_manifest([source], num_workers=0, output=source.parent / "m.parquet", **how)
    write_manifest(table, source.parent / "m.parquet")
    return table


def test_a_file_that_is_as_it_was_is_not_read_again(copied, read):
    first = indexed(copied)
    assert len(read) == len(first)
    read.clear()
    pd.testing.assert_frame_equal(indexed(copied), first)
    table = table_file(copied.parent, "subject,person,idh\nP-002,human-9,1\n")
    again = indexed(copied, dataset="other", labels=table, test_fraction=0.5)
    assert set(again["dataset"]) == {"other"}
    assert set(again.loc[again["subject"] == "P-002", "idh"]) == {"1"}
    assert set(again["person"]) >= {"human-9", "other/P-001"}
    assert list(again["voxel_sha256"]) == list(first["voxel_sha256"])
    assert read == []


def test_a_file_that_has_changed_is_read_alone(copied, read):
    first = indexed(copied)
    read.clear()
    changed = save(copied / "P-001_ses-1/P-001_ses-1_t1.nii.gz", brain(77))
    hashes = pd.DataFrame({"before": first["voxel_sha256"], "now": indexed(copied)["voxel_sha256"]})
    assert read == [changed.name]
    assert (hashes["before"] != hashes["now"]).sum() == 1
    os.utime(changed, ns=(0, 10**18))
    indexed(copied)
    assert read == [changed.name] * 2


FACE = np.random.default_rng(0).integers(1, 120, (14, 16, 12)).astype(np.int16)  # it ends nowhere
STRIPPED, MASK = brain(3), (brain(3) > 0).astype(np.uint8)
SPACES = {  # files of one BIDS exam, and which of them are used
    "its own comes first": (
        {"T1w": STRIPPED, "space-MNI_T1w": STRIPPED, "space-MNI_desc-brain_mask": MASK}, ["T1w"],
    ),
    "the other one is stripped": ({"T1w": FACE, "space-MNI_desc-brain_T1w": STRIPPED}, ["space-MNI_desc-brain_T1w"]),
    "the other one has the mask": (
        {"T1w": FACE, "space-MNI_T1w": FACE, "space-MNI_desc-brain_mask": MASK},
        ["space-MNI_T1w", "space-MNI_desc-brain_mask"],
    ),
    "a mask makes its own usable": (
        {"T1w": FACE, "desc-brain_mask": MASK, "space-MNI_T1w": STRIPPED}, ["T1w", "desc-brain_mask"],
    ),
    "its own is damaged": ({"T1w": None, "space-MNI_T1w": STRIPPED}, ["space-MNI_T1w"]),
    "one other space, and not two": (
        {"space-B_T1w": STRIPPED, "space-A_T1w": FACE, "space-C_FLAIR": STRIPPED}, ["space-B_T1w"],
    ),
    "a mask alone is no exam": ({"T1w": FACE, "space-MNI_desc-brain_mask": MASK}, ["T1w"]),
    "T1w is its own by another name": (
        {"T1w": FACE, "space-T1w_desc-brain_mask": MASK}, ["T1w", "space-T1w_desc-brain_mask"],
    ),
}  # fmt: skip


def save_bids(folder: Path, names: dict[str, np.ndarray | None]) -> Path:
    for name, data in names.items():
        path = folder / f"sub-01/anat/sub-01_{name}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"") if data is None else save(path, data)
    return folder


def used(table: pd.DataFrame) -> list[str]:
    return [Path(path).name[len("sub-01_") : -len(".nii")] for path in table.loc[table["status"] == "ok", "path"]]


@pytest.mark.parametrize("case", SPACES)
def test_an_exam_is_used_in_one_space_in_which_its_brain_is_known(tmp_path, case):
    names, expected = SPACES[case]
    table = build_manifest([save_bids(tmp_path, names)], num_workers=0)
    assert sorted(used(table)) == sorted(expected)
    assert {*table["reason"]} <= {"", "other_space", "empty_file"}


def test_which_space_is_used_is_asked_anew_though_nothing_is_read_again(tmp_path, read):
    source = save_bids(tmp_path / "bids", {"T1w": STRIPPED, "space-MNI_T1w": STRIPPED})
    assert used(indexed(source)) == ["T1w"]
    save_bids(source, {"T1w": None})
    read.clear()
    assert used(indexed(source)) == ["space-MNI_T1w"]
    save_bids(source, {"T1w": brain(5)})
    assert used(indexed(source)) == ["T1w"]
    assert {*read} == {"sub-01_T1w.nii"}


def test_what_the_system_would_not_read_is_tried_again(copied, monkeypatch):
    indexed(copied)
    refused = copied / "P-003_t1.nii.gz"
    with monkeypatch.context() as patched:
        os.utime(refused, ns=(0, 10**18))
        patched.setattr(checks, "read_volume", _unreadable)
        table = indexed(copied)
        assert table.loc[table["subject"] == "P-003", "reason"].tolist() == ["unreadable"]
    table = indexed(copied)
    assert table.loc[table["subject"] == "P-003", "reason"].tolist() == ["empty_file"]


def _unreadable(*_, **__):
    raise checks.BadVolume("unreadable", "The disk is away.")


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("end", "said"), [(_interrupt, KeyboardInterrupt), (signal.raise_signal, Stopped)])
def test_what_was_read_before_an_end_is_not_read_again(copied, read, monkeypatch, end, said):
    whole, output = build_manifest([copied], num_workers=0), copied.parent / "m.parquet"
    reader, names = checks.read_volume, sorted(read)
    read.clear()
    with monkeypatch.context() as patched:
        patched.setattr(checks, "read_volume", _ends_at(4, end, reader))
        with pytest.raises(said):
            indexed(copied)
        patched.setattr(checks, "read_volume", _ends_at(2, end, reader))
        with pytest.raises(said):
            build_manifest([copied / "P-002_ses-1"], num_workers=0, output=output)
    assert len(read) == 3 + 1
    assert not output.exists()  # nobody prepares half of a data set for the whole
    pd.testing.assert_frame_equal(indexed(copied), whole)
    assert sorted(read) == names
    assert {path.name for path in copied.parent.iterdir()} == {"cohort", "m.parquet"}


def _ends_at(number, end, reader):
    calls: list[Path] = []

    def reads(path, **how):
        calls.append(path)
        return end(signal.SIGTERM) if len(calls) >= number else reader(path, **how)

    return reads


def test_a_manifest_of_before_files_had_times_is_read_and_replaced(copied, read):
    path = copied.parent / "m.parquet"
    indexed(copied).drop(columns="modified_ns").to_parquet(path)
    assert list(read_manifest(path).columns) == list(COLUMNS)
    read.clear()
    assert len(indexed(copied)) == len(read)


def test_a_manifest_comes_back_as_written_and_an_older_one_is_kept(tmp_path, manifest):
    path = tmp_path / "manifest.parquet"
    labelled = manifest.assign(**{"1p/19q": "intact"})
    assert write_manifest(manifest, path) is None
    pd.testing.assert_frame_equal(read_manifest(path), manifest)
    assert write_manifest(manifest, path) is None
    kept = write_manifest(labelled, path)
    pd.testing.assert_frame_equal(read_manifest(path), labelled)
    pd.testing.assert_frame_equal(read_manifest(kept), manifest)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, kept.name])


def test_what_is_no_manifest_is_neither_read_nor_overwritten(tmp_path, manifest):
    other = tmp_path / "results.parquet"
    pd.DataFrame({"auc": [0.9]}).to_parquet(other)
    text = table_file(tmp_path, "subject\n1\n")
    for path in (other, text, tmp_path / "gone.parquet"):
        with pytest.raises(UsageError):
            read_manifest(path)
    for path in (other, text, tmp_path / "gone/manifest.parquet"):
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(UsageError):
            write_manifest(manifest, path)
        assert (path.read_bytes() if path.exists() else None) == before


def test_real_exams_are_grouped_and_labelled(real_data):
    names = ("BraTS2021_00006", "TCGA-FG-6692", "TCGA-DU-7294")
    found = find_volumes([real_data / name for name in names], "glioma")
    grouped: dict[str, list[str]] = {}
    for item in found:
        if "broken" not in item.path.parts:
            grouped.setdefault(item.subject, []).append(item.sequence or item.role)
    four = ["flair", "t1", "t1ce", "t2"]
    assert {subject: sorted(volumes) for subject, volumes in grouped.items()} == {
        "BraTS2021_00006": sorted([*four, "tumour_mask", "tumour_mask"]),
        "TCGA-FG-6692": sorted([*four, "tumour_mask", "brain_mask"]),
        "TCGA-DU-7294": four,
    }
    table = rows(*sorted({(item.dataset, item.subject, item.session) for item in found}))
    tcga = join_labels(table, real_data / "tables/tcga_2021_who_labels.csv").set_index("subject")
    assert tcga["1p/19q codeletion"].to_dict() == {
        "BraTS2021_00006": "", "TCGA-DU-7294": "codel", "TCGA-FG-6692": "non-codel",
    }  # fmt: skip
    ucsf = join_labels(table, real_data / "tables/UCSF-PDGM-metadata_v2.csv").set_index("subject")
    assert ucsf.loc["BraTS2021_00006", ["ID", "IDH", "1p/19q"]].tolist() == ["UCSF-PDGM-116", "wildtype", "intact"]


def test_real_label_tables_find_their_key_for_every_exam(real_data):
    upenn = pd.read_csv(real_data / "tables/UPENN-GBM_clinical_info_v2.1.csv", dtype=str, keep_default_na=False)
    exams = [("UPENN", *name.rsplit("_", 1)) for name in upenn["ID"]]
    joined = join_labels(rows(*exams), real_data / "tables/UPENN-GBM_clinical_info_v2.1.csv")
    assert list(joined["PsP_TP_score"]) == list(upenn["PsP_TP_score"])
    ucsf = pd.read_csv(real_data / "tables/UCSF-PDGM-metadata_v2.csv", dtype=str, keep_default_na=False)
    exams = [("UCSF", f"UCSF-PDGM-{int(name.split('-')[2]):04d}", "") for name in ucsf["ID"] if "FU" not in name]
    joined = join_labels(rows(*exams), real_data / "tables/UCSF-PDGM-metadata_v2.csv")
    assert (joined["Sex"] != "").all()
