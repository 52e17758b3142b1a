"""Folders as the field names them → which volume belongs to which exam. Light imports: worker processes read this."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from umbif.errors import Problem, UsageError

LOOKED_FOR = "Looked for .nii and .nii.gz files; DICOM and others are converted first, for example with dcm2niix."
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
BRAIN_MASK = re.compile(r"brain[_-](mask|seg)", re.IGNORECASE)
# A session is marked (`_ses-02`, `_Timepoint_1`), or two or three digits after five (UPENN-GBM-00001_11), or a date.
EXAM = re.compile(
    r"(?P<subject>.+?)(?:(?:[_-]ses-|[_-](?:session|ses|visit|timepoint|tp|week|fu)[_-]?(?=\d)"
    r"|(?<=\d{5})[_-](?=\d{2,3}$)|[_-](?=(?:19|20)\d\d-?\d\d-?\d\d$))(?P<session>[a-z0-9-]+))?",
    re.IGNORECASE,
)


class Name(NamedTuple):
    """What the name of a file says."""

    subject: str
    session: str
    role: str
    sequence: str


@dataclass(frozen=True)
class Found:
    """One file that calls itself NIfTI; `reason` says why it must not even be opened."""

    path: Path
    dataset: str
    subject: str
    session: str
    role: str
    sequence: str
    reason: str = ""
    detail: str = ""


def find_volumes(sources: Sequence[Path], dataset: str | None = None) -> list[Found]:
    """All NIfTI files in folders (or given singly), sorted by path.

    Args:
        sources: Folders or files. Hidden folders are passed over, symbolic links to folders are not entered.
        dataset: The data set's name; by default the name of each source folder.

    Raises:
        UsageError: A source is missing, is a file that is no image, or two sources would share one name.
    """
    roots = [Path(source).resolve() for source in sources]
    _check_sources(sources, roots, dataset)
    found: dict[Path, Found] = {}
    for root in roots:
        folder = root if root.is_dir() else root.parent
        for path in _walk(root) if root.is_dir() else [root]:
            found.setdefault(path, _found(path, folder, dataset or folder.name))
    return [found[path] for path in sorted(found)]


def parse_name(path: Path, root: Path) -> Name:
    """Reads subject, session, role and sequence from a file's name, and from its folders where the name is silent.

    Args:
        path: The file.
        root: The folder of the data set.

    Returns:
        `role` is image, brain_mask or tumour_mask; `sequence` is "other" where no known spelling was found.
    """
    stem = BRAIN_MASK.sub(r"brainmask-\1", NIFTI.sub("", path.name))
    folders = path.parent.relative_to(root).parts
    exam_id, words = _split(stem, folders)
    subject, session = _exam(exam_id, folders, root)
    return Name(subject, session, *_meaning(words))


def _check_sources(given: Sequence[Path], roots: list[Path], dataset: str | None) -> None:
    missing = [str(source) for source, root in zip(given, roots, strict=True) if not root.exists()]
    if missing or not roots:
        raise UsageError(Problem("There is no such folder or file", ", ".join(missing), "Check the spelling."))
    if others := [str(source) for source in given if source.is_file() and not NIFTI.search(source.name)]:
        raise UsageError(Problem("No image was found", ", ".join(others), LOOKED_FOR))
    names = [root.name for root in roots if root.is_dir() and dataset is None]
    if shared := sorted({name for name in names if names.count(name) > 1}):
        cure = "Exams of equal names would become one. Index them one by one, each with --dataset NAME."
        raise UsageError(Problem("Two sources have the same name", ", ".join(shared), cure))


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if NIFTI.search(name) and not name.startswith("."):  # macOS writes `._t1.nii.gz` beside `t1.nii.gz`
                yield Path(folder, name)
        for name in subfolders:
            linked = Path(folder, name)
            if linked.is_symlink() and not linked.resolve().is_relative_to(root):
                yield linked


def _found(path: Path, root: Path, dataset: str) -> Found:
    name = parse_name(path, root)
    reason = detail = ""
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        reason, detail = "symlink_outside", "This link leads out of the source. Index the folder that holds the files."
    return Found(path, dataset, *name, reason=reason, detail=detail)


def _split(stem: str, folders: tuple[str, ...]) -> tuple[str, list[str]]:
    """The exam's part of a file name, and the words that say which volume it is."""
    if stem.lower().startswith("sub-"):  # BIDS: entities in any order, the suffix last
        parts = stem.split("_")
        exam = [part for part in parts if re.match(r"(sub|ses)-", part, re.IGNORECASE)]
        return "_".join(exam), _words("_".join(part for part in parts if part not in exam))
    spans = [(m.start(), m.group().lower()) for m in re.finditer(r"[^_\-\s.+]+", stem)]
    named = [index for index, (_, word) in enumerate(spans) if word in NAMED]
    if not named:
        inside = folders and stem.lower().startswith(folders[-1].lower())
        return (folders[-1] if inside else stem), []
    first = named[-1]
    while first and (spans[first - 1][1] in NAMED or spans[first - 1][1] in MADE):
        first -= 1
    return stem[: spans[first][0]].rstrip("_- .+"), [word for _, word in spans[first:]]


def _words(text: str) -> list[str]:
    return re.findall(r"[^_\-\s.+]+", text.lower())


def _exam(exam_id: str, folders: tuple[str, ...], root: Path) -> tuple[str, str]:
    """Subject and session; the folders decide where the file's name has no number and theirs has one."""
    marked = [(name, _session(f"_{name}")) for name in folders]
    session_of_folder = next((session for _, session in reversed(marked) if session), "")
    plain = [name for name, session in marked if not session]
    numbered = [name for name in plain if re.search(r"\d", name)]
    if not exam_id or (numbered and not re.search(r"\d", exam_id)):
        exam_id = (numbered or plain or [root.name])[-1]
    match = EXAM.fullmatch(exam_id)
    if match is None:  # a name of separators only
        return exam_id, session_of_folder
    return match["subject"], match["session"] or session_of_folder


def _session(name: str) -> str:
    match = EXAM.fullmatch(f"x{name}")
    return (match["session"] or "") if match else ""


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
