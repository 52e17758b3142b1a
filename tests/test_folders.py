"""Files of two people or of two times never become one exam, and no folder or name is lost without a word."""

import errno
import os
from itertools import chain
from pathlib import Path
from unicodedata import normalize

import pandas as pd
import pytest
from test_index import brain, rows, save

from umbif.corpus.checks import blank_row
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
VISITS = {  # of which every exam has its person's name before its session
    "RHUH-0001/0/RHUH-0001_0_t1ce RHUH-0001/1/RHUH-0001_1_t1ce RHUH-0001/1/RHUH-0001_1_segmentations "
    "RHUH-0002/0/RHUH-0002_0_t1ce masks/RHUH-0002_0_seg": {
        "RHUH-0001/0": "t1ce", "RHUH-0001/1": "t1ce tumour_mask", "RHUH-0002/0": "t1ce tumour_mask",
    },
    "UCSD-PTGBM-0002_01/UCSD-PTGBM-0002_01_T1post UCSD-PTGBM-0002_01/UCSD-PTGBM-0002_01_BraTS_tumor_seg "
    "UCSD-PTGBM-0002_02/UCSD-PTGBM-0002_02_T1post UCSD-PTGBM-0003_01/1_T1/x UCSD-PTGBM-0003_01/2_FLAIR/x": {
        "UCSD-PTGBM-0002/01": "t1ce tumour_mask", "UCSD-PTGBM-0002/02": "t1ce", "UCSD-PTGBM-0003/01": "flair t1",
    },
    "100101/100101_time1_t1ce 100101/100101_time2_t1ce 100101/100101_time2_seg": {
        "100101/time1": "t1ce", "100101/time2": "t1ce tumour_mask",
    },
    "OAS1_0001_MR1/OAS1_0001_MR1_t1 OAS1_0001_MR2/OAS1_0001_MR2_t1": {"OAS1_0001/MR1": "t1", "OAS1_0001/MR2": "t1"},
    "TCGA-02-0006/TCGA-02-0006_1996.08.23_t1 TCGA-02-0006/TCGA-02-0006_1997.08.23_t1": {
        "TCGA-02-0006/1996-08-23": "t1", "TCGA-02-0006/1997-08-23": "t1",
    },
    "P01/P01_ses-1_t1 P01/P01_ses-2_flair P02/P02_ses-3_t2": {"P01/1": "t1", "P01/2": "flair", "P02/3": "t2"},
    "P1/20200131_t1 P1/20210131_t1": {"P1/20200131": "t1", "P1/20210131": "t1"},
    "P01/P01_1_t1 P01/P01_2_t1 XY12/XY12_1/t1 XY12/XY12_2/t1": {
        "P01/1": "t1", "P01/2": "t1", "XY12/1": "t1", "XY12/2": "t1",
    },
    "XY12/1/t1 XY12/2/t1 XY13/1/t1": {"XY12/1": "t1", "XY12/2": "t1", "XY13/1": "t1"},
    "Patient-001/week-000-1/CT1 Patient-001/week-044/CT1": {"Patient-001/000-1": "t1ce", "Patient-001/044": "t1ce"},
    "P01_pre_t1 P01_pre_flair P01_post_t1 P01_post_flair P01_post_seg": {
        "P01/pre": "flair t1", "P01/post": "flair t1 tumour_mask",
    },
}  # fmt: skip
PEOPLE = {  # whom a rule for visits, series or protocols would take for one
    "center01/t1 center01/center01_0007_t1 center01/center01_0008_t1 center02/center02_0007_t1": {
        "center01": "t1", "center01_0007": "t1", "center01_0008": "t1", "center02_0007": "t1",
    },
    "A001_01_t1 A001_02_t1 A001_03_t1 A001_04_t1 A002_01_t1": {
        "A001_01": "t1", "A001_02": "t1", "A001_03": "t1", "A001_04": "t1", "A002_01": "t1",
    },
    "set18/1/t1 set18/2/t1 set18/3/t1 set18/4/t1": {"1": "t1", "2": "t1", "3": "t1", "4": "t1"},
    "2013/ABC_2013_7_t1 2014/ABC_2014_9_t1": {"ABC_2013_7": "t1", "ABC_2014_9": "t1"},
    "hospital2/0001_t1 hospital2/0001_flair hospital2/0002_t1": {"0001": "flair t1", "0002": "t1"},
    "site1/DTI_001/t1 site1/DTI_002/t1 Patient_A_t1 Patient_C_t1": {
        "DTI_001": "t1", "DTI_002": "t1", "Patient_A": "t1", "Patient_C": "t1",
    },
    "p1/GBM-7_T1 p1/GBM-7_T2 p1/GBM-8_T1 p1/GBM-8_T2": {"p1/GBM-7": "t1 t2", "p1/GBM-8": "t1 t2"},
    "P01_pre_t1 P01_post_t1 P01_flair": {"P01": "flair t1 t1ce"},
    "1_t1 2_t1 3_flair 4_flair": {"1": "t1", "2": "t1", "3": "flair", "4": "flair"},
    "patients/01_t1 patients/02_t1 controls/03_t1 controls/04_flair": {
        "01": "t1", "02": "t1", "03": "t1", "04": "flair",
    },
    "Meyer_t1 Meyer_flair Meyer-Lueck_t1 Meyer-Lueck_t2 Meyer-Lueck_seg": {
        "Meyer": "flair t1", "Meyer-Lueck": "t1 t2 tumour_mask",
    },
    "TCGA-06-0119_t1 TCGA-06-0119-B_t1 sub1_t2 sub1_rescan_t2 Kim_t1 Kim_Su_t1": {
        "TCGA-06-0119": "t1", "TCGA-06-0119-B": "t1", "sub1": "t2", "sub1_rescan": "t2", "Kim": "t1", "Kim_Su": "t1",
    },
    "101-001_t1 101-002_t1 102-001_t1 S01_P01_t1 S01_P02_t1": {
        "101-001": "t1", "101-002": "t1", "102-001": "t1", "S01_P01": "t1", "S01_P02": "t1",
    },
}  # fmt: skip
SERIES = {  # numbers of series, protocols and folders of one image, none of which is a person or a time
    "P001/20200101/3_t1_mprage P001/20200101/5_FLAIR": {"P001/20200101": "flair t1"},
    "XY12/3_t1 XY12/5_flair XY13/4_t1": {"XY12": "flair t1", "XY13": "t1"},
    "P001/P001_3_t1 P001/P001_5_flair P002/P002_3_t1 P002/P002_4_t2 P002/P002_5_flair": {
        "P001": "flair t1", "P002": "flair t1 t2",
    },
    "XY12/t1_mprage_2 XY12/ep2d_diff_3scan_trace_p2_ADC_4 XY13_t1_20200131_2 XY13_ep2d_diff_3scan_trace_p2_ADC_4": {
        "XY12": "adc t1", "XY13": "adc t1",
    },
    "EGD-0001/1_T1/NIFTI/T1 EGD-0001/4_FLAIR/NIFTI/FLAIR EGD-0001/5_MASK/NIFTI/MASK": {"EGD-0001": "flair other t1"},
    "S_0001/MPRAGE/2006-01-02/I118671/x S_0001/FLAIR/2006-01-02/I118672/x S_0001/MPRAGE/2007-01-02/I200000/x": {
        "S_0001/2006-01-02": "flair t1", "S_0001/2007-01-02": "t1",
    },
    "002_S_0413/MP-RAGE/2006-05-02_12_31_52.0/I45117/ADNI_002_S_0413_MR_MP-RAGE__br_raw_20060502141733_1_S13_I45117 "
    "002_S_0413/Axial_FLAIR/2006-05-02_12_44_03.0/I45118/ADNI_002_S_0413_MR_Axial_FLAIR__br_raw_2006050214_1_I45118": {
        "002_S_0413/2006-05-02": "flair t1",
    },
    "100307/unprocessed/3T/T1w_MPR1/100307_3T_T1w_MPR1 100307/unprocessed/3T/T2w_SPC1/100307_3T_T2w_SPC1": {
        "100307/3T": "t1 t2",
    },
    "4711/3_t1_tra 4711/4_t1_sag 4711/5_t2_tra 4711/6_t2_cor 4711/7_flair 4711/8_ADC 4711/9_t1_gd_tra "
    "4711/10_t1_gd_sag 4711/11_t1_gd_cor 4712/3_t1_tra 4712/4_flair": {
        "4711": "adc flair t1 t1 t1ce t1ce t1ce t2 t2", "4712": "flair t1",
    },
    "Miller/2020-01-31/3_t1 Miller/2020-01-31/4_t1 Miller/2020-01-31/5_flair Ott/2020-02-01/3_t1 Ott/2020-02-01/6_t2": {
        "Miller/2020-01-31": "flair t1 t1", "Ott/2020-02-01": "t1 t2",
    },
    "P7/t2_tse_tra_flair P7/ep2d_diff_3scan_trace_p2_ADC": {"P7": "adc flair"},
    "1234567/2019-05-03/t1_mprage 1234567/2019-05-03/ep2d_diff_3scan_trace_p2_ADC": {"1234567/2019-05-03": "adc t1"},
    "P1/gre_t1 P1/tse_t2 P2/gre_t1 P2/tse_t2": {"P1": "t1 t2", "P2": "t1 t2"},
    "t1_001 flair_001 t1_001_seg t1_002": {"001": "flair t1 tumour_mask", "002": "t1"},
    "p7/2019-05-03/3_Sag_T1_FSPGR_BRAVO_post p7/2019-05-03/5_AX_T2_FLAIR_FS p7/2019-05-03/t2_tse_tra "
    "p7/2019-05-03/ep2d_diff_3scan_trace_p2_ADC p7/2019-05-03/t2_tirm_tra_dark-fluid_4mm p7/2019-05-03/DWI_ADC_602 "
    "p7/2019-05-03/sT1W_3D_TFE_SENSE_401": {"p7/2019-05-03": "adc adc flair flair t1 t1ce t2"},
}  # fmt: skip
VOLUMES = {
    "t2_tirm_tra_dark-fluid": "flair", "t2_spc_da-fl_sag_p2": "flair", "Ax_T1_FSE_+C": "t1ce", "T1_C": "t1ce",
    "CT1": "t1ce", "DWI_ADC": "adc", "MP-RAGE": "t1", "mp_rage_gd": "t1ce", "FLAIR_in_T1": "flair",
    "T1_post_seg": "tumour_mask", "tumorMask": "tumour_mask", "segmentations": "tumour_mask",
    "sub-1_dseg": "tissue_map", "sub-1_label-GM_probseg": "tissue_map", "sub-1_seg-dk_dseg": "tissue_map",
    "sub-1_label-lesion_dseg": "tumour_mask",
}  # fmt: skip


EXAMS = {
    "two people or two times": LAYOUTS, "folders that sort": TOGETHER, "visits": VISITS, "people of like names": PEOPLE,
    "series and protocols": SERIES,
}  # fmt: skip


def exams(root: Path, layout: str | None = None) -> dict[str, str]:
    """The volumes of each exam."""
    found: dict[str, list[str]] = {}
    for item in find_volumes([root], "D", layout):
        found.setdefault(item.exam.removeprefix("D/"), []).append(item.reason or item.sequence or item.role)
    return {exam: " ".join(sorted(volumes)) for exam, volumes in found.items()}


def touch(root: Path, files: str) -> Path:
    for name in files.split():
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.mark.parametrize(("table", "files"), [(table, files) for table in EXAMS for files in EXAMS[table]])
def test_which_files_are_one_exam(tmp_path, table, files):
    assert exams(touch(tmp_path, files)) == EXAMS[table][files]


@pytest.mark.parametrize(
    ("form", "kinds"),
    [
        ("{:03}_{}", {"t1": range(50), "flair": range(10)}),
        ("siteA/{:03}_{}", {"t1": range(50), "flair": range(10)}),
        ("hosp1/{:03}_{}", {"t1": range(20), "dwi": range(20, 40)}),
    ],
)
def test_numbered_people_of_whom_most_have_one_image_are_not_series_of_one(tmp_path, form, kinds):
    names = [form.format(number, kind) for kind, numbers in kinds.items() for number in numbers]
    assert len(exams(touch(tmp_path, " ".join(names)))) == len({*chain(*kinds.values())})


@pytest.mark.parametrize(("form", "num_centres", "num_people"), [("S{:02}_{:02}_t1", 20, 15), ("{}-{:03}_t1", 30, 5)])
def test_people_numbered_within_centres_are_no_visits_of_the_centre(tmp_path, form, num_centres, num_people):
    names = [form.format(100 + c, p) for c in range(num_centres) for p in range(num_people)]
    found = find_volumes([touch(tmp_path, " ".join(names))], "D")
    assert len({item.subject for item in found}) == num_centres * num_people


def test_visits_of_many_are_visits_where_their_numbers_are_few(tmp_path):
    names = [f"XY{person:03}_{visit:02}_t1" for person in range(12) for visit in range(1, 7)]
    assert len({item.subject for item in find_volumes([touch(tmp_path, " ".join(names))], "D")}) == 12


@pytest.mark.parametrize("slip", ["P20_post_flair", "P01_post_seg"])
def test_one_slip_of_a_name_makes_no_times_of_pre_and_post(tmp_path, slip):
    names = [f"P{person:02}_{kind}" for person in range(20) for kind in ("pre_t1", "post_t1", "flair")]
    found = exams(touch(tmp_path, " ".join([*names, slip])))
    assert found["P02"] == "flair t1 t1ce"
    assert {exam.partition("/")[2] for exam in found} == {""}


def test_numbers_are_people_of_a_source_whatever_other_sources_there_are(tmp_path):
    touch(tmp_path, "A/1/t1 A/2/t1 A/3/t1 B/P7/t1")
    alone, beside = (find_volumes([tmp_path / name for name in names]) for names in ("A", "AB"))
    assert [item.exam for item in beside] == [*(item.exam for item in alone), "B/P7"] == ["A/1", "A/2", "A/3", "B/P7"]


def test_volumes_are_known_by_the_names_that_scanners_and_tools_give():
    root = Path("/data")
    read = {name: parse_name(root / f"P1/{name}.nii.gz", root)[2:] for name in VOLUMES}
    assert {name: sequence or role for name, (role, sequence) in read.items()} == VOLUMES


def test_maps_of_tissues_are_neither_image_nor_mask(tmp_path):
    files = touch(tmp_path, "sub-01/anat/sub-01_T1w sub-01/anat/sub-01_dseg sub-01/anat/sub-01_label-WM_probseg")
    assert exams(files) == {"sub-01": "t1 tissue_map tissue_map"}


def test_one_name_in_two_unicode_spellings_is_one_person(tmp_path):
    composed, apart = (normalize(spelling, "Müller") for spelling in ("NFC", "NFD"))
    assert composed != apart
    touch(tmp_path, f"{composed}/t1 {apart}/flair {apart}/labels/{composed}_seg")
    assert exams(tmp_path) == {composed: "flair t1 tumour_mask"}


def test_a_layout_says_whose_a_file_is_and_sets_aside_what_does_not_fit(tmp_path):
    export = touch(tmp_path / "export", "4711/MR/20200131/3_t1 4711/MR/20200131/a/b/flair 4711/MR/t2 0815/CT/1/seg")
    assert exams(export, "{subject}/*/{session}/**") == {
        "4711/20200131": "flair t1", "4711": "outside_layout", "0815/1": "tumour_mask",
    }  # fmt: skip
    sites = touch(tmp_path / "sites", "siteA/1/t1 siteA/1/thin/t2 siteB/2/ep2d_3scan_ADC siteB/notes_t1")
    assert exams(sites, "*/{subject}/**") == {"1": "t1 t2", "2": "adc", "notes": "outside_layout"}
    again = touch(tmp_path / "again", "XY1/XY1_2_t1 XY1/XY2_2_t1 x/XY1/XY1_3_t1")
    assert exams(again, "**/{subject}/{subject}_{session}_*.nii.gz") == {
        "XY1/2": "t1", "XY2_2": "outside_layout", "XY1/3": "t1",
    }  # fmt: skip


def test_a_time_that_a_layout_names_is_no_contrast(tmp_path):
    files = touch(tmp_path, "P01_pre_t1 P01_post_t1 P01_3_t1_post")
    assert exams(files, "{subject}_{session}_*") == {"P01/pre": "t1", "P01/post": "t1", "P01/3": "t1ce"}


def test_a_layout_fits_a_file_of_each_source(tmp_path):
    touch(tmp_path, "a/P1/MR/Miller_t1 b/P2_Miller_t1 c/P3_t1")
    sources = [tmp_path / name for name in "abc"]
    with pytest.raises(UsageError) as caught:
        find_volumes(sources, layout="{subject}/*/**")
    told = str(caught.value)
    assert f"got paths below {sources[1]} such as A9_A_A9" in told
    assert f"got paths below {sources[2]} such as A9_A9" in told
    assert f"below {sources[0]}" not in told


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("*/{session}/**", r"does not say where the subject stands: got \*/\{session\}/\*\*\. It has \{subject\}"),
        ("{subject}/{visit}/**", r"braces that mean nothing: got \{visit\}\. It has"),
        ("{subject}/{session/**", r"braces that mean nothing: got /\{session/"),
        ("{subject}/*/{session}/**", r"fits no file: got paths below the source such as A9/A9_A9\. It has"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_told_before_a_volume_is_read(tmp_path, layout, message):
    touch(tmp_path, "P1/Miller2_t1")
    with pytest.raises(UsageError, match=message) as caught:
        build_manifest([tmp_path], layout=layout, num_workers=0)
    assert "Miller" not in str(caught.value)


def test_the_summary_shows_how_names_were_read_and_nobody_s_name(tmp_path):
    files = "Müller-7/2020-01-31/Müller-7_2020-01-31_t1 Øre_12/t1 Øre_12/t1_b 李/t1 李/flair X/Y/t1 Z1/flair V1_2/t1"
    found = find_volumes([touch(tmp_path, files)], "D")
    text = summary(pd.DataFrame(map(blank_row, found)).assign(person="x"))
    assert "1 volumes are a further one of their sequence in one exam" in text
    lines = text.partition("names were read like this, with A for letters and 9 for digits:\n")[2].splitlines()
    assert lines[0] == "  A-9/9-9-9/A-9_9-9-9_A9 (1): subject A-9, session 9-9-9"
    assert lines[5] == "  … and 3 forms more"
    assert not {*"MülerØ李XYZV"} & {*"".join(lines[:5])} - {*"subject", *"session"}


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
