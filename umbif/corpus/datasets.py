"""Names of files and folders as the field gives them → subject, session, role, sequence."""

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
SPELLINGS = {
    "t1": "t1 t1n t1w t1pre t1native t1precontrast mprage",
    "t1ce": "t1ce t1c t1gd t1gad t1post t1wce t1cew t1contrast t1km t1postcontrast",
    "t2": "t2 t2w",
    "flair": "flair fla t2f t2flair flairw",
    "dwi": "dwi trace",
    "adc": "adc",
    "swi": "swi swan",
    "other": "asl cbf dti fa md ad rd dsc dce rcbv cbv pd pdw bold t2star t2starw mra tof",
    "brain_mask": "brainmask",
    "tumour_mask": "seg segm dseg segmentation tumor tumour lesion glistrboost",
}
NAMED = {word: meaning for meaning, words in SPELLINGS.items() for word in words.split()}
CONTRAST = {"ce", "gd", "gad", "gadolinium", "contrast", "post", "postcontrast", "km"}
BEFORE_CONTRAST = {"pre", "native", "precontrast"}
# Words about how a volume was made; they belong neither to the exam's name nor to the sequence's.
MADE = {
    *CONTRAST, *BEFORE_CONTRAST, "bet", "bias", "brain", "mask", "stripped", "unstripped", "skullstripped", "ss", "n4",
    "reg", "registered", "norm", "normalized", "mni", "sri24", "atlas", "corrected", "preproc", "parenchyma", "fused",
    "automated", "approx", "eddy", "noreg", "l1", "l2", "l3", "ap", "w", "c",
}  # fmt: skip
# Words by which folders sort the volumes of one exam, or say how they were made: never whose they are, or of when.
SORTING = {
    "2d", "3d", "anatomical", "atlas", "automated", "ax", "axial", "bet", "bias", "brain", "contrast", "cor", "coronal",
    "corrected", "data", "derivatives", "diffusion", "files", "functional", "gad", "gadolinium", "gd", "image",
    "images", "imagestr", "imagests", "label", "labels", "labelstr", "labelsts", "mask", "masks", "mni", "mr", "mri",
    "n4", "native", "nifti", "nii", "norm", "normalized", "perfusion", "postcontrast", "precontrast", "preproc",
    "preprocessed", "processed", "raw", "rawdata", "reg", "registered", "rois", "sag", "sagittal", "scans",
    "segmentations", "skullstripped", "sri24", "stripped", "structural", "unstripped", "volumes",
}  # fmt: skip
DATATYPE = re.compile(r"(anat|func|dwi|perf|fmap)\d*")
GROUPS = {"ad", "fa", "lesion", "md", "pd", "rd", "tumor", "tumour"}  # sequences, but also groups of people
PERSON = re.compile(r"(sub|subj|subject|pat|patient|pt|participant|person|case|p)(id)?[_\- ]?\d+", re.IGNORECASE)
SCAN = re.compile(r"(scan|mri?|exam|study|time)[_\- ]?\d{1,2}", re.IGNORECASE)
WORD = re.compile(r"[^_\-\s.+]+")
BRAIN_MASK = re.compile(r"brain[_-](mask|seg)", re.IGNORECASE)
TIME = (
    r"(?:(?:pre|post)-?(?:op\w*|surg\w*|treatment|therapy|rt|radio\w*|chemo\w*)?|intra-?op\w*|baseline|follow-?ups?"
    r"|diagnosis|recurrence|progression|(?:day|month|year)(?=-?\d)|\d+-?(?:day|week|month|year)s?)-?\d*"
)
# A session is marked (`_ses-02`, `_Timepoint_1`), or two or three digits after five (UPENN-GBM-00001_11), or a date, or
# a time in words (`_preop`, `_followup2`).
EXAM = re.compile(
    r"(?P<subject>.+?)(?:(?:[_-]ses-|[_-](?:session|ses|visit|timepoint|tp|week|fu)[_-]?(?=\d)"
    r"|(?<=\d{5})[_-](?=\d{2,3}$)|[_-](?=(?:19|20)\d\d-?\d\d-?\d\d$)|[_-](?=\d\d-\d\d-(?:19|20)\d\d$)"
    rf"|[_-](?={TIME}$))(?P<session>[a-z0-9-]+))?",
    re.IGNORECASE,
)


class Name(NamedTuple):
    """What the name of a file says."""

    subject: str
    session: str
    role: str
    sequence: str


def parse_name(path: Path, root: Path) -> Name:
    """Reads subject, session, role and sequence from a file's name, and from its folders where the name is silent.

    Args:
        path: The file.
        root: The folder of the data set.

    Returns:
        `role` is image, brain_mask or tumour_mask; `sequence` is "other" where no known spelling was found.
    """
    folders = path.parent.relative_to(root).parts
    exam_id, words = _split(path, folders)
    if words and not own_name(exam_id):  # `3d_t1`, `mri_t1`: nobody's name
        exam_id = ""
    subject, session = _exam(exam_id, folders, root)
    return Name(subject, session, *_meaning(words))


def unused_name(path: Path, root: Path, subject: str) -> str:
    """What stands before the sequence in a file's name where the folders have decided on another subject."""
    exam_id, words = _split(path, path.parent.relative_to(root).parts)
    match = EXAM.fullmatch(exam_id)
    return own_name(exam_id) if words and match and match["subject"] != subject else ""


@lru_cache(2**16)  # a folder is asked for each of its files
def own_name(folder: str, words_of_file: frozenset[str] = frozenset()) -> str:
    """A folder's name without the words that sort volumes of one exam, or say how they were made: `IXI-T1` → `IXI`.

    Args:
        folder: Its name.
        words_of_file: Of a name that says no common sequence; a word of both is a sequence and no group of people.
    """
    words = _words(folder)
    named = {word for word in words if word in NAMED and (word not in GROUPS or word in words_of_file)}
    sorting = named | {word for word in words if word in SORTING or DATATYPE.fullmatch(word)}
    if sorting & CONTRAST:
        sorting |= {"pre", "post"}
    kept = WORD.sub(lambda match: "" if match.group().lower() in sorting else match.group(), folder)
    return re.sub(r"([_\- .+])[_\- .+]+", r"\1", kept).strip("_- .+")


@lru_cache(2**16)
def session_of_folder(folder: str) -> str:
    """The session that a folder's whole name is, or nothing: `ses-02` → `02`, `preop` → `preop`."""
    match = EXAM.fullmatch("x_" + re.sub(r"[_ .]+", "-", own_name(folder)))
    return (match["session"] or "") if match and match["subject"] == "x" else ""


def _split(path: Path, folders: tuple[str, ...]) -> tuple[str, list[str]]:
    """The exam's part of a file name, and the words that say which volume it is."""
    stem = BRAIN_MASK.sub(r"brainmask-\1", NIFTI.sub("", path.name))
    if stem.lower().startswith("sub-"):  # BIDS: entities in any order, the suffix last
        parts = stem.split("_")
        exam = [part for part in parts if re.match(r"(sub|ses)-", part, re.IGNORECASE)]
        return "_".join(exam), _words("_".join(part for part in parts if part not in exam))
    spans = [(m.start(), m.group().lower()) for m in WORD.finditer(stem)]
    named = [index for index, (_, word) in enumerate(spans) if word in NAMED]
    if not named:
        inside = folders and stem.lower().startswith(folders[-1].lower())
        return (folders[-1] if inside else stem), []
    first = named[-1]
    while first and (spans[first - 1][1] in NAMED or spans[first - 1][1] in MADE):
        first -= 1
    return stem[: spans[first][0]].rstrip("_- .+"), [word for _, word in spans[first:]]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _exam(exam_id: str, folders: tuple[str, ...], root: Path) -> tuple[str, str]:
    """Subject and session; the folders decide where the file's name has no number and theirs has one."""
    marked = [(name, session_of_folder(name)) for name in folders]
    session = next((session for _, session in reversed(marked) if session), "")
    plain = [name for name, session in marked if not session]
    own = [name for name in plain if own_name(name)]
    numbered = [name for name in own if _number(name)]
    if not exam_id or (numbered and not _number(exam_id)):
        persons = [name for name in numbered if PERSON.fullmatch(name)]
        no_scans = [name for name in numbered if not SCAN.fullmatch(name)]
        exam_id = next(kind for kind in (persons, no_scans, numbered, own, plain, [root.name]) if kind)[-1]
    match = EXAM.fullmatch(exam_id)
    if match is None:  # a name of separators only
        return exam_id, session
    return match["subject"], match["session"] or session


def _number(name: str) -> bool:
    return bool(re.search(r"\d", name))


def _meaning(words: list[str]) -> tuple[str, str]:
    """Role and sequence of the words of a name."""
    meanings = {NAMED[word] for word in words if word in NAMED}
    if "parenchyma" in words:  # the brain without its fluid: neither the brain's mask nor the tumour's
        return "image", "other"
    for mask in ("brain_mask", "tumour_mask"):
        if mask in meanings:
            return mask, ""
    if "flair" in meanings:  # before t2: `T2_FLAIR`
        return "image", "flair"
    if "t1" in meanings and CONTRAST & set(words) and not BEFORE_CONTRAST & set(words):
        return "image", "t1ce"
    return "image", next((sequence for sequence in SPELLINGS if sequence in meanings), "other")
