"""Synthetic glioma exams with known truth, on the ICBM 2009a MNI152 tissue maps (Fonov et al., NeuroImage 2011).

They show that the machinery learns what is there to learn and reports chance where nothing is;
they say nothing about patients.
"""

import csv
import functools
import io
import json
import multiprocessing
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from umbif.corpus import phantom_lesions as lesions
from umbif.corpus.phantom_lesions import NEGATIVE, POSITIVE, STRENGTHS, Floats, Lesion, LesionMaps, smooth_noise
from umbif.errors import Problem, UsageError
from umbif.files import naming, read_mapping, write_text
from umbif.machine import num_cores
from umbif.progress import track

__all__ = ["STRENGTHS", "PhantomExam", "PhantomRecord", "make_exam", "write_phantom"]

SEQUENCES = ("t1", "t1ce", "t2", "flair")
# Relative to white matter on T1:  white, grey, CSF, necrosis, rim, solid tumour, oedema
CONTRAST = {
    "t1": (1.00, 0.74, 0.32, 0.45, 0.68, 0.66, 0.72),
    "t1ce": (1.00, 0.76, 0.32, 0.42, 0.68, 0.66, 0.72),
    "t2": (0.46, 0.64, 1.30, 1.15, 0.78, 0.92, 0.98),
    "flair": (0.62, 0.80, 0.20, 0.55, 1.00, 1.12, 1.22),
}
MISSING = {"t1": 0.12, "t1ce": 0.07, "t2": 0.12, "flair": 0.07}
LOW_MM, HIGH_MM = np.array((-88.0, -122.0, -86.0)), np.array((88.0, 94.0, 98.0))
CENTRE_MM = np.array((0.0, -18.0, 5.0))
BLOCK = 20  # one exam in so many is a follow-up of one of the others
HEAD, LESION, SCAN, BLOCKS, PERSON, EXAM, NULL, HEALTHY = range(8)  # what a stream of random numbers is for
UNFINISHED = ".unfinished"
README = """Synthetic brain MRI exams of gliomas. Nothing learnt from them holds for patients.

{shuffled}SITE/SUBJECT[_SESSION]/   skull-stripped volumes, the sequences spelled as each site does; some are missing;
                          *_seg.nii.gz: 1 necrosis and tumour that does not enhance, 2 oedema, 3 enhancing tumour
labels.csv                one row per exam, as a hospital would know it: some outcomes blank or indeterminate
truth.csv                 the hidden state of every exam and the look of its lesion; never shuffled

Designed effects of a positive label (distance of the classes' means over the spread within a class):
{effects}

Sites differ in intensity scale, noise, bias field, blur, missing sequences and, by 5 points, in IDH prevalence.
"""


@dataclass(frozen=True)
class Site:
    """A hospital: how it spells its sequences and how its scanner looks."""

    name: str
    spelling: tuple[str, str, str, str]  # as SEQUENCES
    axcodes: str
    scale: float  # intensity of white matter on T1
    noise: float  # standard deviation of the Rician noise, in units of white matter on T1
    bias: float  # standard deviation of the log of the bias field
    blur_mm: float
    missing: float  # multiplies MISSING
    idh_shift: float  # added to the prevalence of IDH mutants: mild, but a model could learn the site instead


SITES = (
    Site("site-a", ("t1", "t1ce", "t2", "flair"), "RAS", 600, 0.020, 0.06, 0.5, 0.6, 0.00),
    Site("site-b", ("t1n", "t1c", "t2w", "t2f"), "LPS", 1100, 0.030, 0.10, 0.7, 1.0, 0.05),
    Site("site-c", ("T1", "T1GD", "T2", "FLAIR"), "RAS", 250, 0.045, 0.15, 0.9, 1.5, -0.05),
)


@dataclass(frozen=True)
class PhantomRecord:
    """All that is known of an exam without making its images."""

    seed: int
    index: int
    head: int  # index of the exam that first showed this person
    site: Site
    session: str
    age: int
    sex: str
    hidden: dict[str, bool]
    labels: dict[str, str]
    lesion: Lesion  # what would grow there, of a healthy person
    healthy: bool
    sequences: tuple[str, ...]

    @property
    def subject(self) -> str:
        """The person's name at the site, `phantom-0001`."""
        return f"phantom-{self.head + 1:04d}"

    @property
    def person(self) -> str:
        """One name per human: phantoms of different seeds share subject names and no persons."""
        return f"phantom-seed{self.seed}-{self.head + 1:04d}"

    @property
    def stem(self) -> str:
        """How the exam's files begin, `phantom-0001` or `phantom-0001_ses-2`."""
        return f"{self.subject}_{self.session}" if self.session else self.subject

    @property
    def folder(self) -> Path:
        """Where the exam lies inside the phantom."""
        return Path(self.site.name, self.stem)


@dataclass(frozen=True)
class PhantomExam:
    """One exam: volumes by sequence and the tumour (as `segment` labels it), all RAS+ of shape (X, Y, Z)."""

    record: PhantomRecord
    volumes: dict[str, NDArray[np.int16]]
    tumour: NDArray[np.uint8]
    affine: NDArray[np.float64]


def write_phantom(out: Path, num_exams: int, *, spacing_mm: float = 2.0, seed: int = 0, null: bool = False,
                  healthy: float = 0.0, num_workers: int | None = None) -> Path:  # fmt: skip
    """Writes synthetic exams as a hospital would hand them over; the same call again adds what is missing.

    Args:
        out: Folder; new, empty, or begun by the same call.
        num_exams: Exams; about one in twenty is a second session of an earlier person.
        spacing_mm: Edge of a voxel, 1 to 4 mm.
        seed: All that is random follows from it.
        null: Shuffle each label column over the exams: no model can then do better than chance.
        healthy: How likely a person has no tumour, and so no labels and no mask.
        num_workers: Processes; all cores by default, 1 for none but this one. The images do not depend on it.

    Returns:
        The path of labels.csv: one row per exam.

    Raises:
        UsageError: The settings mean nothing, or the folder holds something else.
    """
    _check(num_exams, spacing_mm, seed, healthy)
    settings = {"exams": num_exams, "spacing_mm": float(spacing_mm), "seed": seed, "null": null}
    _claim(out, {**settings, **({"healthy": healthy} if healthy else {})})
    records = [_record(index, seed, healthy) for index in range(num_exams)]
    todo = [record.index for record in records if not (out / record.folder).exists()]
    work = functools.partial(_write_exam, out=out, seed=seed, spacing_mm=spacing_mm, healthy=healthy)
    with naming(out):
        for _ in track(_run(work, todo, num_workers), "Making phantom exams", len(todo)):
            pass
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return _write_tables(out, records, seed, null)


def make_exam(index: int, *, seed: int, spacing_mm: float, healthy: float = 0.0) -> PhantomExam:
    """Makes one exam; a pure function of its arguments."""
    record = _record(index, seed, healthy)
    heads, scan = _rng(seed, HEAD, record.head), _rng(seed, SCAN, index)
    ends = zip(LOW_MM, HIGH_MM, strict=True)
    axes = [np.arange(low, high + 1e-6, spacing_mm).astype(np.float32) for low, high in ends]
    centre, coordinates = _deform(heads, scan, record, axes)
    tissue, mask = _tissue(coordinates, spacing_mm)
    grown = None if record.healthy else _grow(_rng(seed, LESION, record.head), record.lesion, centre, axes, tissue)
    volumes = {name: _scan(scan, record, name, tissue, grown, axes) * mask for name in SEQUENCES}
    tumour = np.zeros(mask.shape, np.uint8)
    if grown is not None:
        box, maps = grown
        tumour[box] = lesions.segment(record.lesion, maps) * mask[box]
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = LOW_MM
    return PhantomExam(record, {name: volumes[name] for name in record.sequences}, tumour, affine)


def _rng(seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, purpose, index))))


def _record(index: int, seed: int, healthy: float = 0.0) -> PhantomRecord:
    first_of_block = index - index % BLOCK
    follow_up = index % BLOCK == BLOCK - 1
    head = first_of_block + int(_rng(seed, BLOCKS, first_of_block).integers(BLOCK - 1)) if follow_up else index
    person, exam = _rng(seed, PERSON, head), _rng(seed, EXAM, index)
    site = SITES[int(person.integers(len(SITES)))]
    hidden = lesions.draw_hidden(person, site.idh_shift)
    traits = lesions.draw_traits(person, hidden)
    age = int(np.clip(60 + 12 * traits["age"] + follow_up, 19, 88))
    labels = {name: (POSITIVE if value else NEGATIVE)[name] for name, value in hidden.items()}
    known = {name: label if exam.random() < lesions.LABELLED[name] else "" for name, label in labels.items()}
    known["mgmt"] = known["mgmt"] or "indeterminate"
    is_healthy = bool(_rng(seed, HEALTHY, head).random() < healthy)
    known = dict.fromkeys(known, "") if is_healthy else known
    present = tuple(s for s in SEQUENCES if exam.random() >= MISSING[s] * site.missing) or ("t1ce",)
    lesion = lesions.lesion_from_traits(traits, growth=1.2 if follow_up else 1.0)
    session, sex = "ses-2" if follow_up else "", "FM"[int(person.integers(2))]
    return PhantomRecord(seed, index, head, site, session, age, sex, hidden, known, lesion, is_healthy, present)


@functools.cache
def _template(spacing_mm: float) -> tuple[Floats, NDArray[np.float64]]:
    """White matter, grey matter and brain of the MNI152 head, shape (3, X, Y, Z) at 1 mm, and their affine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nilearn announces its own future on import
        from nilearn import datasets

        load = (datasets.load_mni152_wm_template, datasets.load_mni152_gm_template, datasets.load_mni152_brain_mask)
        images = [f(resolution=1).slicer[22:176, 22:212, :160] for f in load]  # the brain's box
    white, grey, brain = (np.clip(np.asarray(image.dataobj, np.float32), 0, 1) for image in images)
    # The maps are means of 152 heads, so blurred: a power makes borders as crisp as in one head.
    powers = np.stack([white, grey, np.clip(brain - white - grey, 0, 1)]) ** 1.7
    shares = powers[:2] / np.maximum(powers.sum(0), 1e-6)
    maps = np.stack([*(shares * (brain > 0)), brain])
    blur = [ndimage.gaussian_filter(m, 0.4 * spacing_mm + extra) for m, extra in zip(maps, (0, 0, 0.8), strict=True)]
    return np.stack(blur), images[0].affine


@functools.cache
def _places(spacing_mm: float) -> tuple[Floats, Floats]:
    """Where gliomas may begin, frontal and elsewhere: deep white matter of the cerebrum, shape (N, 3), in mm."""
    maps, affine = _template(spacing_mm)
    inside = ndimage.distance_transform_edt(maps[2, ::4, ::4, ::4] > 0.5) * 4
    deep = np.argwhere((maps[0, ::4, ::4, ::4] > 0.6) & (inside > 14)) * 4 + affine[:3, 3]
    points = deep[(np.abs(deep[:, 0]) > 14) & (deep[:, 2] > -8)].astype(np.float32)
    frontal = points[:, 1] > 5
    return points[frontal], points[~frontal]


def _deform(head: np.random.Generator, scan: np.random.Generator, record: PhantomRecord,
            axes: list[Floats]) -> tuple[Floats, Floats]:  # fmt: skip
    """The lesion's centre, and the place in the template that each voxel shows, shape (3, X, Y, Z); mm."""
    spacing_mm = float(axes[0][1] - axes[0][0])
    stretch = np.diag(1 / (head.normal(0.97, 0.035) * np.exp(head.normal(0, 0.02, 3))))
    tilt = head.normal(0, 0.035, 3)
    skew = np.array([[0, -tilt[2], tilt[1]], [tilt[2], 0, -tilt[0]], [-tilt[1], tilt[0], 0]])
    matrix = stretch @ (np.eye(3) + skew + skew @ skew / 2)
    places = _places(spacing_mm)[0 if record.lesion.frontal else 1]
    centre = np.linalg.solve(matrix, places[head.integers(len(places))] - CENTRE_MM) + CENTRE_MM
    shift: Floats = np.stack([3.0 * smooth_noise(head, axes, 42) + 1.0 * smooth_noise(head, axes, 16)
                              + 0.3 * smooth_noise(scan, axes, 30) for _ in range(3)]).astype(np.float32)  # fmt: skip
    x, y, z = np.meshgrid(*(a - c for a, c in zip(axes, CENTRE_MM, strict=True)), indexing="ij", sparse=True)
    for i, (a, b, c) in enumerate(matrix.astype(np.float32)):
        shift[i] += CENTRE_MM[i] + a * x + b * y + c * z
    wider = np.clip(0.012 * (record.age - 55) + head.normal(0, 0.12), -0.3, 0.5)
    _push(shift, np.array((0, -18, 14)), wider, 32)
    if not record.healthy:
        _push(shift, matrix @ (centre - CENTRE_MM) + CENTRE_MM, record.lesion.mass, 1.6 * record.lesion.radius_mm)
    return centre.astype(np.float32), shift


def _push(coordinates: Floats, centre: NDArray[np.float64], amount: float, reach_mm: float) -> None:
    """Swells what lies at `centre` (in the template, mm), in place; never folds for amounts below 1."""
    offset = coordinates - centre[:, None, None, None].astype(np.float32)
    coordinates -= offset * (amount * np.exp(-(offset**2).sum(0) / reach_mm**2)).astype(np.float32)


def _tissue(coordinates: Floats, spacing_mm: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Shares of white matter, grey matter and CSF, shape (3, X, Y, Z), and the brain, shape (X, Y, Z)."""
    maps, affine = _template(spacing_mm)
    voxels = coordinates - affine[:3, 3, None, None, None].astype(np.float32)
    white, grey, brain = (ndimage.map_coordinates(m, voxels, order=1, output=np.float32) for m in maps)
    return np.stack([white, grey, np.clip(1 - white - grey, 0, 1)]), brain > 0.5


def _grow(rng: np.random.Generator, lesion: Lesion, centre: Floats, axes: list[Floats],
          tissue: Floats) -> tuple[tuple[slice, ...], LesionMaps]:  # fmt: skip
    """The lesion, in the box of voxels that it can reach."""
    reach = 1.5 * lesion.radius_mm + 2 * lesion.oedema_mm + 4
    ends = [np.searchsorted(a, (c - reach, c + reach)) for a, c in zip(axes, centre, strict=True)]
    box = tuple(slice(int(low), int(high)) for low, high in ends)
    local = [a[s] - c for a, s, c in zip(axes, box, centre, strict=True)]
    return box, lesions.lesion_maps(rng, lesion, local, tissue[0][box], tissue[2][box])


def _scan(rng: np.random.Generator, record: PhantomRecord, sequence: str, tissue: Floats,
          grown: tuple[tuple[slice, ...], LesionMaps] | None, axes: list[Floats]) -> NDArray[np.int16]:  # fmt: skip
    """One volume as the site's scanner shows it, shape (X, Y, Z)."""
    site, spacing_mm = record.site, float(axes[0][1] - axes[0][0])
    values = np.array(CONTRAST[sequence], np.float32) * np.exp(rng.normal(0, 0.02, 7)).astype(np.float32)
    image = np.tensordot(values[:3], tissue, axes=1)
    if grown is not None:
        box, maps = grown
        image[box] = lesions.paint(image[box], values[3:], record.lesion.enhancement * (sequence == "t1ce"), maps)
    image = ndimage.gaussian_filter(image, site.blur_mm / spacing_mm)
    image *= np.exp(site.bias * smooth_noise(rng, axes, 75))
    real, imaginary = site.noise * rng.standard_normal((2, *image.shape), dtype=np.float32)
    gain = site.scale * np.exp(rng.normal(0, 0.1))
    return np.clip(np.hypot(image + real, imaginary) * gain, 1, 32767).astype(np.int16)


def _check(num_exams: int, spacing_mm: float, seed: int, healthy: float) -> None:
    problems = []
    if num_exams < 1:
        problems.append(Problem("the number of exams must be 1 or more", str(num_exams)))
    if not 1 <= spacing_mm <= 4:
        problems.append(Problem("the spacing must lie between 1 and 4 mm", f"{spacing_mm:g}"))
    if seed < 0:
        problems.append(Problem("the seed must be 0 or more", str(seed)))
    if not 0 <= healthy <= 1:
        problems.append(Problem("the share of healthy persons must lie between 0 and 1", f"{healthy:g}"))
    if problems:
        raise UsageError(problems)


def _claim(out: Path, settings: dict[str, object]) -> None:
    """Marks the folder as this phantom's, or refuses one that holds something else."""
    note = out / "phantom.json"
    if note.exists():
        found = read_mapping(note, "Choose a new or an empty folder")
        if found != settings:
            differing = ", ".join(f"{k}={found.get(k)}" for k in settings if found.get(k) != settings[k])
            raise UsageError(Problem(f"{out} holds another phantom", differing,
                                     "Choose a new folder, or ask for the same settings to continue it."))  # fmt: skip
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(Problem(f"{out} holds something that is no phantom", cure="Choose a new or an empty folder."))
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write_whole(note, json.dumps(settings))


def _run(work: Callable[[int], None], todo: list[int], num_workers: int | None) -> Iterator[None]:
    workers = min(num_workers or num_cores(), len(todo))
    if workers <= 1:
        yield from map(work, todo)
        return
    # Spawned, not forked: the caller may hold threads. Ctrl-C is for the parent, which cancels what has not begun.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.map(work, todo)


def _write_exam(index: int, out: Path, seed: int, spacing_mm: float, healthy: float) -> None:
    """Writes the exam's folder under another name and renames it: a folder that is there is complete."""
    exam = make_exam(index, seed=seed, spacing_mm=spacing_mm, healthy=healthy)
    record, folder = exam.record, out / UNFINISHED / exam.record.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spelling = dict(zip(SEQUENCES, record.site.spelling, strict=True))
    for name, volume in exam.volumes.items():
        _save(volume, exam.affine, record.site.axcodes, folder / f"{record.stem}_{spelling[name]}.nii.gz")
    if not record.healthy:
        _save(exam.tumour, exam.affine, record.site.axcodes, folder / f"{record.stem}_seg.nii.gz")
    (out / record.folder).parent.mkdir(exist_ok=True)
    folder.rename(out / record.folder)


def _save(voxels: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64], axcodes: str, path: Path) -> None:
    image = nib.Nifti1Image(voxels, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axcodes))
    image = image.as_reoriented(turn)
    image.set_sform(image.affine, code="mni")
    image.set_qform(image.affine, code="mni")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _write_tables(out: Path, records: list[PhantomRecord], seed: int, null: bool) -> Path:
    keys = [{"subject": r.subject, "session": r.session, "person": r.person} for r in records]
    facts = [{"site": r.site.name, "age": r.age, "sex": r.sex} for r in records]
    labels = [r.labels for r in records]
    if null:
        rng = _rng(seed, NULL, 0)
        order = {name: rng.permutation(len(records)) for name in POSITIVE}
        labels = [{name: records[order[name][i]].labels[name] for name in POSITIVE} for i in range(len(records))]
    truth = [{"healthy": r.healthy, **r.hidden, **asdict(r.lesion), "sequences": " ".join(r.sequences)}
             for r in records]  # fmt: skip
    _write_table(out / "truth.csv", [{**k, **t} for k, t in zip(keys, truth, strict=True)])
    _write_whole(out / "README.txt", _readme(null))
    _write_table(out / "labels.csv", [{**k, **f, **x} for k, f, x in zip(keys, facts, labels, strict=True)])
    return out / "labels.csv"


def _write_table(path: Path, rows: list[dict[str, object]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write_whole(path, text.getvalue())


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is complete or absent; one that is there stays as it is, for a person may have edited it."""
    if not path.exists():
        write_text(path, text)


def _readme(null: bool) -> str:
    effects = "\n".join(f"  {label:12s}{s.trait:14s}{s.effect_sd:+.1f} SD  {s.look}"
                        for label, strengths in STRENGTHS.items() for s in strengths)  # fmt: skip
    shuffled = "The label columns are SHUFFLED over the exams: chance is all that can be learnt.\n\n" if null else ""
    return README.format(shuffled=shuffled, effects=effects)
