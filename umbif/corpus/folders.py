"""Folders → the NIfTI files in them, and which of these are one exam. Light imports: worker processes read this."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from umbif.corpus.datasets import EXAM, NIFTI, WORD, own_name, parse_name, session_of_folder, unused_name
from umbif.errors import Problem, UsageError
from umbif.files import NOT_MINE

LOOKED_FOR = "Looked for .nii and .nii.gz files; DICOM and others are converted first, for example with dcm2niix."
TOLD_APART = "told_apart"  # flag of files whose exam has its name from their folders too
MARK = re.compile(r"(?:^|[/_-])(ses|visit|timepoint|tp|week|fu)(?:sion)?[_-]?\d", re.IGNORECASE)
Folders = tuple[str, ...]
OTHER_CHARACTERS = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8


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


def find_volumes(sources: Sequence[Path], dataset: str | Sequence[str] | None = None) -> list[Found]:
    """All NIfTI files in folders (or given singly), sorted by path.

    Files whose names make them one exam, but whose folders do not, become exams of their own (see `_told_apart`).
    Folders that cannot be read are among them, with a reason.

    Args:
        sources: Folders or files. Hidden folders are passed over, symbolic links to folders are not entered.
        dataset: The data set's name, or one for each source; by default the name of each source folder.

    Raises:
        UsageError: A source is missing, is a file that is no image, or two sources would share one name; or names of
            files are no UTF-8.
    """
    roots = [Path(source).resolve() for source in sources]
    given = [dataset] if isinstance(dataset, str) else [*(dataset or [""])]
    names = given * len(roots) if len(given) == 1 else given
    _check_sources(sources, roots, names)
    found: dict[Path, Found] = {}
    for root, name in zip(roots, names, strict=True):
        folder = root if root.is_dir() else root.parent
        for path, problem in _walk(root) if root.is_dir() else [(root, "")]:
            found.setdefault(path, _found(path, folder, name or folder.name, problem))
    _check_names([*found])
    base = Path(os.path.commonpath([root if root.is_dir() else root.parent for root in roots]))
    usable = _told_apart([item for item in found.values() if not item.reason], base)
    return sorted([*usable, *(item for item in found.values() if item.reason)], key=lambda item: item.path)


def _check_sources(given: Sequence[Path], roots: list[Path], names: list[str]) -> None:
    missing = [str(source) for source, root in zip(given, roots, strict=True) if not root.exists()]
    if missing or not roots:
        raise UsageError(Problem("There is no such folder or file", ", ".join(missing), "Check the spelling."))
    if others := [str(source) for source in given if source.is_file() and not NIFTI.search(source.name)]:
        raise UsageError(Problem("No image was found", ", ".join(others), LOOKED_FOR))
    if closed := [str(source) for source in given if source.is_dir() and not os.access(source, os.R_OK | os.X_OK)]:
        raise UsageError(Problem("The folder may not be read", ", ".join(closed), NOT_MINE))
    if len(names) != len(roots):
        cure = "Give --dataset once for all of them, or once for each source in the order of the sources."
        raise UsageError(Problem("Not every source has a name", f"{len(names)} names for {len(roots)} sources", cure))
    own = [root.name for root, name in zip(roots, names, strict=True) if root.is_dir() and not name]
    if shared := sorted({name for name in own if own.count(name) > 1}):
        cure = "Exams of equal names would become one. Give --dataset NAME for each source, in their order."
        raise UsageError(Problem("Two sources have the same name", ", ".join(shared), cure))


def _check_names(paths: Sequence[Path]) -> None:
    if bad := [path for path in paths if OTHER_CHARACTERS.search(str(path))]:
        got = f"{len(bad)} of {len(paths)} files, in {len({path.parent for path in bad})} folders"
        cure = (
            "`find SOURCE | grep -avx '.*'` lists them in a UTF-8 locale, and `convmv -r -f latin1 -t utf-8 --notest "
            "SOURCE` renames them, if they are Latin-1"
        )
        raise UsageError(Problem("Names of files or folders are not in UTF-8", got, cure))


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Paths, each with what the system says against it, if anything."""
    refused: list[OSError] = []
    for folder, subfolders, files in os.walk(root, onerror=refused.append):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if NIFTI.search(name) and not name.startswith("."):  # macOS writes `._t1.nii.gz` beside `t1.nii.gz`
                yield Path(folder, name), ""
        for name in subfolders:
            linked = Path(folder, name)
            if os.path.islink(linked) and not linked.resolve().is_relative_to(root):
                yield linked, ""
    for error in refused:
        if Path(error.filename) == root:
            raise error
        yield Path(error.filename), error.strerror or type(error).__name__


def _found(path: Path, root: Path, dataset: str, problem: str) -> Found:
    name = parse_name(path, root)
    reason = detail = ""
    if problem:
        reason, detail = "unreadable", f"This folder cannot be read, so its files are missing here: {problem}."
    elif os.path.islink(path) and not path.resolve().is_relative_to(root):
        reason, detail = "symlink_outside", "This link leads out of the source. Index the folder that holds the files."
    return Found(path, dataset, *name, reason=reason, detail=detail)


def _told_apart(found: list[Found], base: Path) -> list[Found]:
    """Gives files of one name that lie in places of two people or two times exams of their own.

    A place without an image in any exam, such as the folder of a rater, belongs to the place whose images it is about.
    """
    places = _places(found, base)
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


def _places(found: list[Found], base: Path) -> dict[Path, Place]:
    """The place of each file. Names before the sequence count where they cannot be words for the kind of volume."""
    names = {item.path: unused_name(item.path, base, item.subject) for item in found}
    of_exam: defaultdict[str, set[str]] = defaultdict(set)
    exams: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    of_volume: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    for item in found:
        if name := names[item.path]:
            of_exam[item.exam].add(name)
            exams[item.dataset, name].add(item.exam)
            of_volume[item.exam, item.role, item.sequence].add(name)
    twice = {exam for (exam, *_), several in of_volume.items() if len(several) > 1}
    places = {}
    for item in found:
        name = names[item.path]
        owns = len(of_exam[item.exam]) > 1 and (item.exam in twice or len(exams[item.dataset, name]) == 1)
        places[item.path] = _place(item, base, name if owns else "")
    return places


def _place(item: Found, base: Path, name: str) -> Place:
    folders = [*item.path.parent.relative_to(base).parts]
    if "derivatives" in folders:  # BIDS: results of a pipeline, of the same people
        at = folders.index("derivatives")
        del folders[at : at + 2]
    words = frozenset(WORD.findall(item.path.name.lower()) if item.sequence == "other" else ())
    says = [_says(folder, item, words) for folder in folders]
    whose = says.index(None) if None in says else len(says)
    marks = MARK.findall("/".join(folders)) or MARK.findall(item.path.name)
    mark = marks[-1].lower().replace("timepoint", "tp") if marks and item.session else ""
    return Place(tuple(filter(None, says[:whose])), tuple(filter(None, [mark, *says[whose:], name])))


def _says(folder: str, item: Found, words: frozenset[str]) -> str | None:
    """What a folder's name says beyond the exam's, such as a site; None of the folder that names the subject."""
    own = own_name(folder, words)
    for text in (folder, own):
        match = EXAM.fullmatch(text)
        if match and match["subject"] == item.subject and match["session"] in (None, item.session):
            return None
    return "" if item.session and session_of_folder(folder) == item.session else own


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
