"""Names of files and folders as the field gives them → subject, session, role, sequence."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
SEPARATORS = "_- .+"
BIDS = re.compile("sub-", re.IGNORECASE)
SPELLINGS = {
    "t1": "t1 t1n t1w st1w t1pre t1native t1precontrast mprage",
    "t1ce": "t1ce t1c ct1 t1gd t1gad t1post t1wce t1cew t1contrast t1km t1postcontrast",
    "t2": "t2 t2w st2w",
    "flair": "flair fla t2f t2flair flairw",
    "adc": "adc",  # before dwi: `DWI_ADC`
    "dwi": "dwi trace",
    "swi": "swi swan",
    "other": "asl cbf dti fa md ad rd dsc dce rcbv cbv pd pdw bold t2star t2starw mra tof",
    "brain_mask": "brainmask",
    "tumour_mask": "seg segm segmentation segmentations tumor tumour tumormask tumourmask lesion glistrboost",
    "tissue_map": "dseg probseg",
}
NAMED = {word: meaning for meaning, words in SPELLINGS.items() for word in words.split()}
TWO_WORDS = {
    "mprage": re.compile(r"mp[_-]rage", re.IGNORECASE),
    "flair": re.compile(r"dark[_-]?fluid|da-fl(?![a-z])", re.IGNORECASE),
}
MASKS = ("brain_mask", "tumour_mask", "tissue_map")
TUMOUR = {"tumor", "tumour", "tumormask", "tumourmask", "lesion"}
WEIGHTED = ("t1", "t1ce", "t2", "flair")
CONTRAST = {"ce", "gd", "gad", "gadolinium", "contrast", "post", "postcontrast", "km"}
PRE_POST = {"pre", "post"}
NEVER_CONTRAST = {"flair", "t2", "dwi", "adc", "swi", "tumour_mask"}
MIN_TIMES = 0.5  # files in which `pre` or `post` must be a time, for each in which it stands before T1
BEFORE_CONTRAST = {"pre", "native", "precontrast"}
# Words about how a volume was made; they belong neither to the exam's name nor to the sequence's.
MADE = {
    *CONTRAST, *BEFORE_CONTRAST, "bet", "bias", "brain", "mask", "stripped", "unstripped", "skullstripped", "ss", "n4",
    "reg", "registered", "norm", "normalized", "mni", "sri24", "atlas", "corrected", "preproc", "parenchyma", "fused",
    "automated", "approx", "eddy", "noreg", "l1", "l2", "l3", "ap",
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
NUMBER = re.compile(r"\d{1,4}")  # of a person, or of a series
NUMBER_LAST = re.compile(r"([a-z]+[_\- ]?)?\d+", re.IGNORECASE)
ENDING = re.compile(r"[a-z]{0,4}\d{1,3}", re.IGNORECASE)  # `_01`, `_v2`: of a visit, or of a person
WORD = re.compile(r"[^_\-\s.+]+")
BRAIN_MASK = re.compile(r"brain[_-](mask|seg)", re.IGNORECASE)
CLOCK = re.compile(r"(?<=\d\d-\d\d)(-\d\d){3}(-\d+)?$")  # `2006-05-02_12_31_52.0`: of a series, not of a visit
DATE = r"(?:(?:19|20)\d\d[-._]?(?:0[1-9]|1[0-2])[-._]?(?:0[1-9]|[12]\d|3[01])|\d\d[-._]\d\d[-._](?:19|20)\d\d)"
TIME = (
    r"(?:(?:pre|post)-?(?:op\w*|surg\w*|treatment|therapy|rt|radio\w*|chemo\w*)?|intra-?op\w*|baseline|follow-?ups?"
    r"|diagnosis|recurrence|progression|(?:day|month|year)(?=-?\d)|\d+-?(?:day|week|month|year)s?)-?\d*"
)
# A session is marked (`_ses-02`, `_Timepoint_1`), or two or three digits after five (UPENN-GBM-00001_11), or a date, or
# a scan after a number (`100101_time1`), or a time in words (`_preop`, `_followup2`).
EXAM = re.compile(
    r"(?P<subject>.+?)(?:(?:[_-]ses-|[_-](?:session|ses|visit|timepoint|tp|week|fu)[_-]?(?=\d)"
    rf"|(?<=\d{{5}})[_-](?=\d{{2,3}}$)|[_-](?={DATE}$)|(?<=\d)[_-](?=(?:scan|mri?|exam|study|time)-?\d{{1,2}}$)"
    rf"|[_-](?={TIME}$))(?P<session>{DATE}|[a-z0-9-]+))?",
    re.IGNORECASE,
)
Exam = tuple[str, str]  # subject and session


class Name(NamedTuple):
    """What the name of a file says."""

    subject: str
    session: str
    role: str
    sequence: str


class Whose(NamedTuple):
    """The exam by a file's name and folders, and what only the other files of its data set can tell."""

    exam: Exam
    unused: str = ""  # what stands before the sequence where a folder says whose file it is: `P7/gre_t1`
    series: Exam | None = None  # the exam if the number in its name is that of a series: `XY12/3_t1`
    protocol: Exam | None = None  # the exam if its name is that of a protocol: `XY12/ep2d_3scan_trace`


class Above(NamedTuple):
    """What the folders above a file say of its exam."""

    names: tuple[str, ...]
    exam: Exam  # of the one that is most like a person's, or of the root
    own: tuple[str, ...]  # those that do not only sort, and are no session: `P7` and not `images`
    numbered: tuple[str, ...]  # those that may be a person's: with a number, and above all that say a sequence
    is_dated: bool  # a date stands below one of them: `1234567/2019-05-03`


def parse_name(path: Path, root: Path) -> Name:
    """Reads subject, session, role and sequence from a file's name, and from its folders where the name is silent.

    Args:
        path: The file.
        root: The folder of the data set.

    Returns:
        `role` is image, brain_mask, tumour_mask or tissue_map; `sequence` is "other" where no known spelling was found.
    """
    return read_name(path, root)[0]


def read_name(path: Path, root: Path, timed: bool = False) -> tuple[Name, Whose]:
    """The same, and what it takes to compare it with others; `timed` where `pre` and `post` are times of a data set."""
    *folders, file = names_below(path, root)
    exam_id, volume = _split(file, folders, timed)
    whose = _whose(exam_id, volume, _above(tuple(folders), normalize("NFC", root.name)))
    words = _words(volume) or next(filter(None, map(_volume_of_folder, reversed(folders))), [])
    return Name(*whose.exam, *_meaning(words)), whose


def names_below(path: Path, root: Path) -> list[str]:
    """The names of the folders between root and file, and the file's. Systems spell `ü` in one or in two characters."""
    return normalize("NFC", path.relative_to(root).as_posix()).split("/")


def mean_times(files: Iterable[str]) -> bool:
    """Whether `pre` and `post` are times in a data set: one `P01_post_flair` beside many `P01_post_t1` is a slip."""
    said = Counter(_before_kind(file) for file in files)
    return sum(said[kind] for kind in NEVER_CONTRAST) > MIN_TIMES * said["t1"]


def _before_kind(file: str) -> str:
    """The kind of volume directly before which `pre` or `post` stands in a name: `P01_post_flair`."""
    words = _words(_stem(file))
    first = _first(words) or 0
    return NAMED[words[first]] if first and words[first - 1] in PRE_POST else ""


def form(name: str) -> str:
    """`BraTS2021_00006` → `A9_9`: what a name looks like, and nobody's."""
    return re.sub(r"[^\d\s_\-./+]+", "A", re.sub(r"\d+", "9", normalize("NFC", name)))


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
        sorting |= PRE_POST
    kept = WORD.sub(lambda match: "" if match.group().lower() in sorting else match.group(), _joined(folder))
    return re.sub(r"([_\- .+])[_\- .+]+", r"\1", kept).strip(SEPARATORS)


@lru_cache(2**16)
def session_of_folder(folder: str) -> str:
    """The session that a folder's whole name is, or nothing: `ses-02` → `02`, `preop` → `preop`."""
    subject, session = exam_of("x_" + CLOCK.sub("", re.sub(r"[_ .]+", "-", own_name(folder))))
    return session if subject == "x" else ""


@lru_cache(2**16)
def is_volume(folder: str) -> bool:
    """Whether a folder's name says which volume lies in it: `MPRAGE`, `4_FLAIR`, `5_MASK`; `DTI_001` is a person."""
    words = _words(folder)
    said = {NAMED[word] for word in words if word in NAMED and word not in GROUPS}.difference(MASKS)
    if "mask" in words or said - {"other"}:
        return True
    return bool(said) and not any(re.fullmatch(r"\d{3,}", word) for word in words)


def exam_of(name: str) -> Exam:
    """Subject and session of a name in which no sequence stands: `P01_preop`, `UPENN-GBM-00001_11`."""
    match = EXAM.fullmatch(name)
    return (match["subject"], re.sub(r"[_.]", "-", match["session"] or "")) if match else (name, "")


def _split(file: str, folders: Sequence[str], timed: bool) -> tuple[str, str]:
    """The exam's part of a file name, and the part that says which volume it is."""
    stem = _stem(file)
    if BIDS.match(stem):  # entities in any order, the suffix last
        parts = stem.split("_")
        exam = [part for part in parts if re.match(r"(sub|ses)-", part, re.IGNORECASE)]
        return "_".join(exam), "_".join(part for part in parts if part not in exam)
    words = _words(stem)
    first = _first(words)
    if first is None:
        return (folders[-1] if folders and stem.lower().startswith(folders[-1].lower()) else stem), ""
    made = MADE - PRE_POST if timed else MADE
    while first and (words[first - 1] in NAMED or words[first - 1] in made):
        first -= 1
    start = [match.start() for match in WORD.finditer(stem)][first]
    return stem[:start].rstrip(SEPARATORS), stem[start:]


def _first(words: Sequence[str]) -> int | None:
    """Where the part that says which volume it is begins, but for words of how it was made."""
    named = [at for at, word in enumerate(words) if word in NAMED]
    weighted = [at for at in named if NAMED[words[at]] in WEIGHTED]  # `t2_tse_tra_flair` begins with its t2
    return next(iter(weighted or named[-1:]), None)


def _stem(file: str) -> str:
    return _joined(BRAIN_MASK.sub(r"brainmask-\1", NIFTI.sub("", file)))


def _joined(text: str) -> str:
    """Names of sequences that are spelled in two words, in one."""
    for word, spelled in TWO_WORDS.items():
        text = spelled.sub(word, text)
    return text


def _words(text: str) -> list[str]:
    return WORD.findall(_joined(text).lower())


def _volume_of_folder(folder: str) -> list[str]:
    """The words of a folder that say which volume the files in it are: `FLAIR/I118672/x`, `seg/x`."""
    words = _words(folder)
    return words if is_volume(folder) or (not own_name(folder) and NAMED.keys() & {*words}) else []


@lru_cache(2**16)
def _above(names: tuple[str, ...], root: str) -> Above:
    times = [session_of_folder(name) for name in names]
    own = [name for name, time in zip(names, times, strict=True) if not time and own_name(name)]
    with_number = [name for name in own if _number(own_name(name))]
    numbered = [name for name in takewhile(lambda name: not is_volume(name), names) if name in with_number]
    numbered = numbered or with_number
    persons = [name for name in numbered if PERSON.fullmatch(exam_of(name)[0])]
    no_scans = [name for name in numbered if not (SCAN.fullmatch(name) or _is_sorted(name))]
    subject, session = exam_of(next(kind for kind in (persons, no_scans, numbered, own, [root]) if kind)[-1])
    below = times[names.index(numbered[0]) :] if numbered else []
    session = session or next(filter(None, reversed(times)), "")
    is_dated = any(re.fullmatch(DATE, time) for time in below)
    return Above(names, (subject, session), tuple(own), tuple(numbered), is_dated)


def _whose(exam_id: str, volume: str, above: Above) -> Whose:
    """By what the name of a file and its folders have in common."""
    folder, when = above.exam
    if not (own_name(exam_id) if volume else exam_id):  # `3d_t1`, `mri_t1`: nobody's name
        number = "" if above.own else own_name(volume)
        return Whose((number, when), series=above.exam) if NUMBER_LAST.fullmatch(number) else Whose(above.exam)
    subject, time = exam_of(exam_id)
    if BIDS.match(subject):
        return Whose((subject, time or when))
    if subject in above.own:
        is_bare = NUMBER.fullmatch(exam_id.removeprefix(subject)[1:])  # `4711001_15`, and not `4711001_ses-15`
        return Whose((subject, time or when), series=(subject, when) if is_bare else None)
    if repeated := _repeated(subject, time, bool(volume), above):
        return repeated
    if above.own and (own_time := session_of_folder(subject)):  # `P7/20200131_t1`
        return Whose((folder, time or own_time))
    return _of_two_names(exam_id, bool(volume), above)


def _repeated(subject: str, time: str, has_volume: bool, above: Above) -> Whose | None:
    """Of a name that repeats a folder's and goes on, with a time or else: `RHUH-0001/0/RHUH-0001_0_t1`."""
    spots = [(name, spot) for name in above.numbered if (spot := _spot(name, subject)) and not _number(spot[0])]
    if not spots:
        return None
    folder, (before, after) = max(spots, key=lambda spot: len(spot[0]))
    theirs, is_person, is_number = (folder, time or above.exam[1]), PERSON.fullmatch(folder), NUMBER.fullmatch(after)
    if own_time := session_of_folder(after) or (after if after in above.names else ""):
        return Whose((folder, time or own_time))
    if is_person and not theirs[1] and ENDING.fullmatch(after):
        return Whose((folder, after), series=theirs if is_number else None)
    if has_volume and _number(after) and not is_person:  # `center1/center1_0007_t1`
        ours = subject, theirs[1]
        return Whose(ours, series=theirs) if is_number else Whose(ours, protocol=theirs)
    return Whose(theirs, "" if is_person or not has_volume else own_name(f"{before}_{after}"))


def _of_two_names(exam_id: str, has_volume: bool, above: Above) -> Whose:
    """Of a file and of folders with names that have nothing in common."""
    (subject, time), (folder, when) = exam_of(exam_id), above.exam
    ours, theirs = (subject, time or when), (folder, time or when)
    is_person = PERSON.fullmatch(subject)
    of_person = above.own and PERSON.fullmatch(folder) and not is_person  # `P7/ep2d_3scan_trace_ADC`
    number = own_name(subject)
    if has_volume and NUMBER.fullmatch(number) and subject.startswith(number):  # `P7/3_t1`, `hospital/0007_t1`
        is_series = of_person or (above.numbered and when)
        return Whose(theirs) if is_series else Whose((number, ours[1]), series=theirs)
    if of_person or (above.numbered and (not _number(subject) or (above.is_dated and not is_person))):
        return Whose(theirs, own_name(exam_id) if has_volume and subject != folder else "")
    return Whose(ours, protocol=theirs if has_volume and above.own and not is_person else None)


def _spot(name: str, text: str) -> tuple[str, str] | None:
    """What stands before and after a name in a text, if it stands there as a word."""
    before, found, after = text.partition(name)
    whole = found and not before[-1:].isalnum() and not after[:1].isalnum()
    return (before.strip(SEPARATORS), after.strip(SEPARATORS)) if whole else None


def _is_sorted(folder: str) -> bool:
    """Whether a small number is all that a folder says beside words that sort: `anat_1`."""
    own = own_name(folder)
    return own != folder and bool(re.fullmatch(r"\d{1,2}", own))


def _number(name: str) -> bool:
    return bool(re.search(r"\d", name))


def _meaning(words: list[str]) -> tuple[str, str]:
    """Role and sequence of the words of a name."""
    meanings = {NAMED[word] for word in words if word in NAMED}
    if "parenchyma" in words:  # the brain without its fluid: neither the brain's mask nor the tumour's
        return "image", "other"
    if "tissue_map" in meanings:
        return "tumour_mask" if TUMOUR & {*words} else "tissue_map", ""
    for mask in MASKS:
        if mask in meanings:
            return mask, ""
    if "flair" in meanings:  # before t2: `T2_FLAIR`
        return "image", "flair"
    if "t1" in meanings and {*CONTRAST, "c"} & {*words} and not BEFORE_CONTRAST & {*words}:  # `T1_+C`
        return "image", "t1ce"
    return "image", next((sequence for sequence in SPELLINGS if sequence in meanings), "other")
