"""Which files are one exam, and which of them are set aside. Light imports: worker processes read this."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple

from umbif.corpus.datasets import (
    ENDING,
    PERSON,
    WORD,
    Exam,
    Whose,
    exam_of,
    is_volume,
    names_below,
    own_name,
    session_of_folder,
)

TOLD_APART = "told_apart"  # flag of files whose exam has its name from their folders too
MARK = re.compile(r"(?:^|[/_-])(ses|visit|timepoint|tp|week|fu)(?:sion)?[_-]?\d", re.IGNORECASE)
ENDED = re.compile(rf"(?P<subject>.+)[_-](?P<session>{ENDING.pattern})", re.IGNORECASE)
CENTRE = re.compile(r"(.*\D)?\d{1,3}")
IMAGE_ID = re.compile(r"[a-z]?\d{4,}", re.IGNORECASE)
FEW_TIMES = 3  # that a data set of few people may have
MIN_PEOPLE = 2  # for each of their times: a centre has more people than there are centres, and people fewer visits
MANY_SERIES = 100  # of one exam
# Further images of a kind for each that exams have, above which names are people. An exam often has T1 in two planes.
MANY_SERIES_TWINS, MANY_PROTOCOL_TWINS = 1.0, 0.5
Folders = tuple[str, ...]


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
    flags: tuple[str, ...] = ()

    @property
    def exam(self) -> str:
        """Its name: files of equal names are one exam."""
        return "/".join(filter(None, (self.dataset, self.subject, self.session)))


class Place(NamedTuple):
    """What folders say beyond subject, session and kind of volume: `site-a/001/thin/t1` → (site-a), (thin)."""

    above: Folders  # the subject's folder: a site, a group
    below: Folders  # the subject's folder: a time, a version


Homes = dict[Place, Place | None]
Kind = tuple[str, str, str]  # exam, role, sequence
Named = MutableMapping[tuple[Exam, str], set[str]]  # whose it would be, by what it is named now → kinds of image


def grouped(found: list[Found], whose: Mapping[Path, Whose], roots: Mapping[Path, Path]) -> list[Found]:
    """The files with the subjects and sessions that they have beside each other.

    Args:
        found: Files as each is read alone.
        whose: What else their names say.
        roots: The source of each.
    """
    base = Path(os.path.commonpath([*roots.values()])) if roots else Path()
    found = _without_protocols(_without_series(found, whose), whose)
    return _told_apart(_with_sessions(found, roots), {path: of.unused for path, of in whose.items()}, base)


def set_aside(found: list[Found]) -> list[Found]:
    """With reasons for what is no image or mask to use."""
    reason, detail = "tissue_map", "A map of tissues. A tumour's mask has `lesion`, `tumor` or `_seg` in its name."
    is_map = [item.role == "tissue_map" and not item.reason for item in found]
    return [replace(item, reason=reason, detail=detail) if of else item for item, of in zip(found, is_map, strict=True)]


def _kind(item: Found) -> Kind:
    return item.exam, item.role, item.sequence


def _without_series(found: list[Found], whose: Mapping[Path, Whose]) -> list[Found]:
    """`XY12/3_t1`, `XY12/5_flair` are one exam: numbers that hardly ever have two kinds of image are of series."""
    numbers: defaultdict[str, Named] = defaultdict(lambda: defaultdict(set))
    for item in found:
        if item.role == "image" and (series := whose[item.path].series):
            number = item.session if item.subject == series[0] else item.subject
            numbers[item.dataset][series, number].add(item.sequence)
    of_series = {dataset for dataset, kinds in numbers.items() if _are_series(kinds)}
    return [_renamed(item, whose[item.path].series if item.dataset in of_series else None) for item in found]


def _without_protocols(found: list[Found], whose: Mapping[Path, Whose]) -> list[Found]:
    """`XY12/ep2d_3scan_trace` is of `XY12` where other files are, and names are hardly ever of two kinds of image."""
    of_known = _of_known(found, {path: of.protocol for path, of in whose.items()})
    names: defaultdict[str, Named] = defaultdict(lambda: defaultdict(set))
    for item in found:
        if exam := of_known[item.path]:
            names[item.dataset][exam, item.exam].add(item.sequence)
    of_protocols = {dataset for dataset, kinds in names.items() if _are_protocols(kinds)}
    return [_renamed(item, of_known[item.path] if item.dataset in of_protocols else None) for item in found]


def _known(item: Found, exam: Exam | None, known: set[tuple[str, str]]) -> Exam | None:
    """The exam of another subject that a folder names, or that the name of this one begins with."""
    name = item.subject
    starts = [name[: spot.start()] for spot in re.finditer("[_-]", name) if not ENDING.fullmatch(name, spot.end())]
    exams = [exam] if exam else [(start, item.session) for start in starts]
    return next((exam for exam in exams if (item.dataset, exam[0]) in known), None)


def _of_known(found: list[Found], protocols: Mapping[Path, Exam | None]) -> dict[Path, Exam | None]:
    """For each file the exam that it may be of; `Meyer-Lueck` is not `Meyer` where both have one kind of image."""
    known = {(item.dataset, item.subject) for item in found if not protocols[item.path]}
    exams = {item.path: _known(item, protocols[item.path], known) for item in found}
    images = [item for item in found if item.role == "image" and item.sequence != "other"]
    taken = {(item.dataset, item.subject, item.session, item.sequence) for item in images if not exams[item.path]}
    people = {(item.dataset, item.subject) for item in images
              if (exam := exams[item.path]) and (item.dataset, *exam, item.sequence) in taken}  # fmt: skip
    for item in found:  # all that such a person has
        if (item.dataset, item.subject) in people and not protocols[item.path]:
            exams[item.path] = None
    return exams


def _are_series(numbers: Named) -> bool:
    """By exam and number, with the kinds of image that each has; where all are of one kind, they are people.

    So they are where an exam has a kind twice, and no two exams have a number in common, as scanners would give them.
    """
    num_kinds = len({*chain(*numbers.values())})
    exams = Counter(exam for exam, _ in numbers)
    if num_kinds == 1 or max(exams.values()) > MANY_SERIES or not _have_one_kind(numbers):
        return False
    known = {name: kinds - {"other"} for name, kinds in numbers.items()}  # of which an exam has many series
    is_each_once = len(exams) > 1 and len({number for _, number in numbers}) == len(numbers)
    return _are_few_twins(known, 0 if is_each_once else MANY_SERIES_TWINS)


def _are_protocols(names: Named) -> bool:
    """By exam and name, with the kinds of image that each has."""
    return _are_few_twins(names, MANY_PROTOCOL_TWINS) and _have_one_kind(names)


def _are_few_twins(names: Mapping[tuple[Exam, str], set[str]], allowed: float) -> bool:
    """Whether exams hardly ever have a kind of image under several names: else these are people."""
    counts = Counter((exam, kind) for (exam, _), several in names.items() for kind in several)
    num_twins = counts.total() - len(counts)
    return num_twins == 0 or num_twins < allowed * len(counts)


def _have_one_kind(names: Named) -> bool:
    """More than three in four of them; of people, most have several."""
    return 4 * sum(len(kinds) > 1 for kinds in names.values()) < len(names)


def _renamed(item: Found, exam: Exam | None) -> Found:
    return replace(item, subject=exam[0], session=exam[1]) if exam else item


def _with_sessions(found: list[Found], roots: Mapping[Path, Path]) -> list[Found]:
    """`UCSD-PTGBM-0002_01`, `…_02`: endings of few kinds that names share are times, and nobody's number."""
    split = {item.path: _ended(item, roots[item.path]) for item in found}
    endings: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for item in found:
        if (exam := split[item.path]) and not _is_of_centre(exam):
            endings[item.dataset][exam[0]].add(exam[1])
    timed = {dataset for dataset, of_subjects in endings.items() if _are_times(of_subjects)}
    known = {(item.dataset, item.subject, item.session) for item in found}
    named = []
    for item in found:
        exam = split[item.path]
        is_alike = item.dataset in timed and not (exam and _is_of_centre(exam))
        named.append(_renamed(item, exam if exam and (is_alike or (item.dataset, *exam) in known) else None))
    return named


def _is_of_centre(exam: Exam) -> bool:
    """`101-001` and `S01_P01` are people of a centre, as trials number them; `P001-001` is a visit."""
    centre, number = exam
    is_trial = CENTRE.fullmatch(centre) and re.fullmatch(r"\d{3}", number) and not PERSON.fullmatch(centre)
    return bool(is_trial or PERSON.fullmatch(number))


def _ended(item: Found, root: Path) -> Exam | None:
    """Its subject in two, after a number or the name of a folder; or its folder and a small number: `XY12/1/t1`."""
    match, is_small = ENDED.fullmatch(item.subject), re.fullmatch(r"\d{1,2}", item.subject)
    if item.session or not (match or is_small):
        return None
    folders = names_below(item.path, root)[:-1]
    if match and (match["subject"][-1].isdigit() or match["subject"] in folders):
        return match["subject"], match["session"]
    if is_small and item.subject in folders:
        own = [name for name in folders[: folders.index(item.subject)] if own_name(name)]
        return (own[-1], item.subject) if own else None
    return None


def _are_times(endings: Mapping[str, set[str]]) -> bool:
    num_kinds = len({*chain(*endings.values())})
    return max(map(len, endings.values())) > 1 and num_kinds <= max(FEW_TIMES, len(endings) // MIN_PEOPLE)


def _told_apart(found: list[Found], unused: Mapping[Path, str], base: Path) -> list[Found]:
    """Gives files of one name that lie in places of two people or two times exams of their own.

    A place without an image in any exam, such as the folder of a rater, belongs to the place whose images it is about.
    """
    places = _places(found, unused, base)
    imaged = {(item.dataset, places[item.path]) for item in found if item.role == "image"}
    files: defaultdict[str, list[Found]] = defaultdict(list)
    for item in found:
        files[item.exam].append(item)
    homes = {exam: _homes(group, places, imaged) for exam, group in files.items()}
    torn = _torn_subjects(files, homes)
    named: list[Found] = []
    owners: defaultdict[str, set[tuple[str, Place]]] = defaultdict(set)
    for item in found:
        home = homes[item.exam][places[item.path]]
        named.append(_named(item, home, homes[item.exam], torn.get((item.dataset, item.subject), [])))
        if home:
            owners[named[-1].exam].add((item.exam, home))
    return [item if len(owners[item.exam]) < 2 else _unclear(item) for item in named]


def _places(found: list[Found], unused: Mapping[Path, str], base: Path) -> dict[Path, Place]:
    """The place of each file. Names before the sequence count where they cannot be words for the kind of volume."""
    of_exam: defaultdict[str, defaultdict[str, set[Kind]]] = defaultdict(lambda: defaultdict(set))
    exams: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for item in found:
        if name := unused[item.path]:
            of_exam[item.exam][name].add(_kind(item))
            exams[item.dataset, name].add(item.exam)
    persons = {item.exam for item in found if PERSON.fullmatch(item.subject)}
    apart = {exam for exam, names in of_exam.items() if _are_people(names, exam in persons)}
    places = {}
    for item in found:
        name, alone = unused[item.path], len(of_exam[item.exam]) == 1
        is_unique = not alone and item.exam not in persons and len(exams[item.dataset, name]) == 1
        places[item.path] = _place(item, base, name if is_unique or item.exam in apart else "")
    return places


def _are_people(names: Mapping[str, set[Kind]], of_person: bool) -> bool:
    """Names before the sequence that share a kind of volume, or, in a person's folder, that have several kinds each."""
    if of_person:  # `patient7` and not `p1` for a first part
        return sum(len(kinds) > 1 for kinds in names.values()) > 1
    return sum(map(len, names.values())) > len({*chain(*names.values())})


def _place(item: Found, base: Path, name: str) -> Place:
    folders = names_below(item.path, base)[:-1]
    if "derivatives" in folders:  # BIDS: results of a pipeline, of the same people
        at = folders.index("derivatives")
        del folders[at : at + 2]
    words = frozenset(WORD.findall(item.path.name.lower()) if item.sequence == "other" else ())
    says = [_says(folder, item, words) for folder in folders]
    whose = says.index(None) if None in says else len(says)
    marks = MARK.findall("/".join(folders)) or MARK.findall(item.path.name)
    mark = marks[-1].lower().replace("timepoint", "tp") if marks and item.session else ""
    below = _without_images(folders[whose:], says[whose:])
    return Place(tuple(filter(None, says[:whose])), tuple(filter(None, [mark, *below, name])))


def _without_images(folders: list[str], says: list[str | None]) -> list[str | None]:
    """Without what folders say of one image of the exam: `MPRAGE/2006-01-02/I118671`, `1_T1/NIFTI`."""
    at = len([*takewhile(lambda folder: not is_volume(folder), folders)])
    kept = (said for folder, said in zip(folders[at:], says[at:], strict=True)
            if not is_volume(folder) and not IMAGE_ID.fullmatch(folder))  # fmt: skip
    return [*says[:at], *kept]


def _says(folder: str, item: Found, words: frozenset[str]) -> str | None:
    """What a folder's name says beyond the exam's, such as a site; None of the folder that names the subject."""
    own = own_name(folder, words)
    for text in (folder, own):
        ended = ENDED.fullmatch(text)  # `UCSD-PTGBM-0002_01`
        if ended and ended.groups() == (item.subject, item.session):
            return None
        subject, session = exam_of(text)
        if subject == item.subject and session in ("", item.session):
            return None
    return "" if item.session and item.session in (folder, session_of_folder(folder)) else own


def _homes(files: list[Found], places: dict[Path, Place], imaged: set[tuple[str, Place]]) -> Homes:
    """For each place of files of one name, the place of the images that they belong to; None where that is unclear."""
    images = sorted({places[item.path] for item in files if item.role == "image"})
    homes: Homes = {}
    for item in files:
        place = places[item.path]
        own = any(place) and (item.dataset, place) in imaged
        shared = [len({*sum(place, ())} & {*sum(image, ())}) for image in images]
        nearest = [image for image, num in zip(images, shared, strict=True) if num == max(shared)]
        mask_only = images and place not in images and not own
        homes[place] = place if not mask_only else nearest[0] if len(nearest) == 1 else None
    return homes


def _torn_subjects(files: dict[str, list[Found]], homes: dict[str, Homes]) -> dict[tuple[str, str], list[Folders]]:
    """Subjects of whom one exam lies in folders of several, with all such folders, also those of their other exams."""
    above: defaultdict[tuple[str, str], set[Folders]] = defaultdict(set)
    torn = set()
    for exam, group in files.items():
        subject, several = (group[0].dataset, group[0].subject), {home.above for home in homes[exam].values() if home}
        above[subject] |= several
        if len(several) > 1:
            torn.add(subject)
    return {subject: [*above[subject]] for subject in torn}


def _named(item: Found, home: Place | None, homes: Homes, above: list[Folders]) -> Found:
    """The file as one of an exam whose name has what tells it from the others."""
    if home is None:
        return _unclear(item)
    below = [place.below for place in {*homes.values()} if place]
    subject = "/".join((*home.above[_num_common(above) :], item.subject)) if above else item.subject
    session = "-".join(filter(None, (*home.below[_num_common(below) :], item.session)))
    alone = len(below) == 1 and not above
    return item if alone else replace(item, subject=subject, session=session, flags=(TOLD_APART,))


def _num_common(several: list[Folders]) -> int:
    """How many first folders are the same."""
    return len([*takewhile(lambda alike: len({*alike}) == 1, zip(*several, strict=False))])


def _unclear(item: Found) -> Found:
    reason, detail = "unclear_exam", "Several exams have this name, and the folders do not tell which of them it is of."
    return replace(item, reason=reason, detail=detail)
