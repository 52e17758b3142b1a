"""Folders → the NIfTI files in them, each with what its name says. Light imports: worker processes read this."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from umbif.corpus.datasets import NIFTI, PRE_POST, Name, form, mean_times, names_below, read_name
from umbif.corpus.grouping import Found, grouped, set_aside
from umbif.corpus.readers import UNREADABLE
from umbif.errors import Problem, UsageError
from umbif.files import NOT_MINE

LOOKED_FOR = "Looked for .nii and .nii.gz files; DICOM and others are converted first, for example with dcm2niix."
LAYOUT_CURE = "It has {subject}, mostly {session}, and * or ** for what else there is: '{subject}/*/{session}/**'"
NAMED_IN_LAYOUTS = {"{subject}": "subject", "{session}": "session"}
WILD = {"*": "[^/]*", "**": ".*", "**/": "(?:.*/)?"}
OTHER_CHARACTERS = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8


class File(NamedTuple):
    """A file of a source, with what the system says against it, if anything."""

    path: Path
    root: Path
    dataset: str
    problem: str


def find_volumes(
    sources: Sequence[Path], dataset: str | Sequence[str] | None = None, layout: str | None = None
) -> list[Found]:
    """All NIfTI files in folders (or given singly), sorted by path.

    Files whose names make them one exam, but whose folders do not, become exams of their own (see `grouping`), unless
    a layout says whose they are. Folders that cannot be read are among them, with a reason.

    Args:
        sources: Folders or files. Hidden folders are passed over, symbolic links to folders are not entered.
        dataset: The data set's name, or one for each source; by default the name of each source folder.
        layout: How paths below a source name subject and session (see `read_layout`); by default names are read.

    Raises:
        UsageError: A source is missing, is a file that is no image, or two sources would share one name; the layout
            cannot be meant, or fits no file of a source; or names of files are no UTF-8.
    """
    pattern = read_layout(layout) if layout is not None else None
    roots = [Path(source).resolve() for source in sources]
    given = [dataset] if isinstance(dataset, str) else [*(dataset or [""])]
    names = given * len(roots) if len(given) == 1 else given
    _check_sources(sources, roots, names)
    files: dict[Path, File] = {}
    for root, name in zip(roots, names, strict=True):
        folder = root if root.is_dir() else root.parent
        for path, problem in _walk(root) if root.is_dir() else [(root, "")]:
            files.setdefault(path, File(path, folder, name or normalize("NFC", folder.name), problem))
    _check_names([*files])
    found = _laid_out([*files.values()], pattern) if pattern else _as_named([*files.values()])
    return sorted(set_aside(found), key=lambda item: item.path)


def read_layout(layout: str) -> re.Pattern[str]:
    """`{subject}/*/{session}/**` as a pattern for paths below a source, without their ending.

    `{subject}` and `{session}` take as little as fits, within one name, and the same wherever they are repeated;
    `*` is anything within one name, `**` anything.

    Raises:
        UsageError: It has no `{subject}`, or other braces.
    """
    parts = re.split(r"(\{[^{}]*\}|\*\*/?|\*)", NIFTI.sub("", normalize("NFC", layout)))
    if unknown := [part for part in parts if re.search("[{}]", part) and part not in NAMED_IN_LAYOUTS]:
        raise UsageError(Problem("--layout has braces that mean nothing", ", ".join(unknown), LAYOUT_CURE))
    if "{subject}" not in parts:
        raise UsageError(Problem("--layout does not say where the subject stands", layout, LAYOUT_CURE))
    pattern = ""
    for part in parts:
        if name := NAMED_IN_LAYOUTS.get(part):
            pattern += f"(?P={name})" if f"(?P<{name}>" in pattern else f"(?P<{name}>[^/]+?)"
        else:
            pattern += WILD.get(part, re.escape(part))
    return re.compile(pattern, re.DOTALL)


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


def _found(file: File, name: Name) -> Found:
    reason = detail = ""
    if file.problem:
        reason, detail = UNREADABLE, f"This folder cannot be read, so its files are missing here: {file.problem}."
    elif os.path.islink(file.path) and not file.path.resolve().is_relative_to(file.root):
        reason, detail = "symlink_outside", "This link leads out of the source. Index the folder that holds the files."
    return Found(file.path, file.dataset, *name, reason=reason, detail=detail)


def _as_named(files: list[File]) -> list[Found]:
    names: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        names[file.dataset].append(file.path.name)
    timed = {dataset for dataset, several in names.items() if mean_times(several)}
    read = {file.path: read_name(file.path, file.root, file.dataset in timed) for file in files}
    found = [_found(file, read[file.path][0]) for file in files]
    whose = {path: of for path, (_, of) in read.items()}
    usable = grouped([item for item in found if not item.reason], whose, {file.path: file.root for file in files})
    return [*usable, *(item for item in found if item.reason)]


def _laid_out(files: list[File], layout: re.Pattern[str]) -> list[Found]:
    matches = {file.path: layout.fullmatch(_place(file)) for file in files}
    _check_fits([file for file in files if not file.problem], matches)
    return [_fitted(file, matches[file.path]) for file in files]


def _place(file: File) -> str:
    return NIFTI.sub("", "/".join(names_below(file.path, file.root)))


def _check_fits(files: list[File], matches: Mapping[Path, re.Match[str] | None]) -> None:
    """Of each source a file has to fit: a layout that is meant for one of several would leave the others out."""
    fitting = {file.root for file in files if matches[file.path]}
    others: dict[Path, str] = {}
    for file in files:
        if file.root not in fitting:
            others.setdefault(file.root, form(_place(file)))
    is_one = len({file.root for file in files}) == 1
    got = [f"paths below {'the source' if is_one else root} such as {place}" for root, place in others.items()]
    if got:
        raise UsageError([Problem("--layout fits no file", paths, LAYOUT_CURE) for paths in got])


def _fitted(file: File, match: re.Match[str] | None) -> Found:
    exam = match.groupdict() if match else {}
    session = exam.get("session", "")
    item = _found(file, read_name(file.path, file.root, timed=session.lower() in PRE_POST)[0])
    if match:
        return replace(item, subject=exam["subject"], session=session)
    reason, detail = "outside_layout", "Its path below the source does not fit --layout."
    return item if item.reason else replace(item, reason=reason, detail=detail)
