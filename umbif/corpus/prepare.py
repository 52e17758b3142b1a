"""Manifest to corpus: what `umbif prepare` does. Restartable, in parts, and published only when nothing is missing."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from umbif.corpus.datasets import WORD
from umbif.corpus.manifest import SCHEMA, label_columns
from umbif.corpus.preprocess import MIN_COVERED, Preparation, PreparedExam, UnusableExam, is_better, prepare_exam
from umbif.corpus.processes import each
from umbif.corpus.readers import UNREADABLE, BadVolume, Volume, read_volume
from umbif.corpus.shards import ABOUT, ABOUT_CURE, BRAIN, LOOKED_UP, NUMBERS, TUMOUR, ShardWriter, encode, incomplete
from umbif.errors import Problem, UmbifError, UsageError
from umbif.files import naming, read_mapping, read_parquet, reading, write_parquet, write_text
from umbif.machine import num_cores
from umbif.progress import stoppable, track

SHARD_BYTES = 2**30
TABLE_CURE = "Delete it and give the same umbif prepare command again (every --part): its exams are prepared anew"
TRIED_AGAIN = (UNREADABLE, "reader_crashed")  # reasons that lie with the system, and may be gone by the next time
CRASHED = "The process that prepared the exam died, mostly for lack of memory. Try again on a machine with more."
AUTOMATIC = {"auto", "automated", "automatic", "approx"}  # in the name of a mask that nobody may have looked at
SECOND_MASK = (
    "The exam has another {}; kept is the first path, an automatic one (auto, automated, automatic or approx in its "
    "name) last. Remove the one that is not meant, and index again."
)
TWIN = "The exam has this sequence twice; kept is what holds more of the brain, and of two that hold it the finer one."
OWN_COLUMNS = ("affine", *LOOKED_UP)  # of an index, beside those of a manifest
Row = dict[str, Any]
Result = tuple[list[tuple[Row, bytes]], list[Row]]  # frames of an exam, and what was set aside
MASK_NUMBERS = {"scale": 1.0, "intercept": 0.0, "mean": 0.0, "std": 1.0, "low": 0.0, "high": 1.0}


def prepare_corpus(
    manifest: pd.DataFrame,
    out: Path,
    how: Preparation,
    *,
    part: tuple[int, int] = (1, 1),
    num_workers: int | None = None,
) -> None:
    """Prepares the exams of one part and writes them to shards; a part that was cut off goes on where it stopped.

    Args:
        manifest: One row per volume; the quarantined ones are left out.
        out: The corpus folder. Parts of one corpus share it.
        how: The preparation recipe.
        part: (i, n): exams i, i+n, i+2n, … of n parts, counted from 1.
        num_workers: Processes; 0 for none beside this one. Default, the cores of this machine.

    Raises:
        UsageError: The folder holds a corpus of another manifest or recipe.
        UmbifError: Another process is preparing this part.
        Stopped: A scheduler's SIGTERM came; what is whole was kept, as after Ctrl-C.
    """
    _claim(out, manifest, how)
    exams = _exams_of(manifest)[part[0] - 1 :: part[1]]
    stem = f"{part[0]:05d}-of-{part[1]:05d}"
    with naming(out), _held(out, stem), stoppable("prepared"):
        _remove_leftovers(out / "shards", stem)
        before = _prepared(out)
        done = {*before["exam"]} - {*before["exam"][before["reason"].isin(TRIED_AGAIN)]}
        todo = [files for exam, files in exams if exam not in done]
        num_workers = min(num_cores() if num_workers is None else num_workers, len(todo))
        results = each(partial(_prepare_one, how=how), todo, num_workers, _crashed, _one_thread)
        _write_shards(_gains(track(results, "Preparing exams", len(todo)), before), out / "shards", stem)


def merge(manifest: pd.DataFrame, out: Path) -> str:
    """Joins the parts into index.parquet and returns a summary; an incomplete corpus is not published.

    Persons, split and labels are those of the manifest as it is now: they may have changed since the voxels were read.

    Raises:
        UmbifError: Exams of the manifest are in no part, or in a shard that is gone or cut.
    """
    rows = _prepared(out)
    missing = {*_usable(manifest)["exam"]} - {*rows["exam"]}
    if missing:
        raise UmbifError(
            f"{len(missing)} of {manifest['exam'].nunique()} exams have not been prepared, or their shard is gone or "
            "cut; nothing was published. Run the same umbif prepare command again (every --part of it), then --merge."
        )
    good = rows[rows["status"] == "ok"].drop(columns=["status", "reason", "detail"])
    if good.empty:
        raise UmbifError("No exam could be prepared.\n" + _reasons(rows[rows["status"] != "ok"]))
    good = _as_known_now(good, manifest).sort_values("exam", kind="stable").reset_index(drop=True)
    write_parquet(rows[rows["status"] != "ok"][["exam", "path", "reason", "detail"]], out / "quarantine.parquet")
    write_parquet(good, out / "index.parquet")
    return _summary(good, rows[rows["status"] != "ok"])


def parse_part(text: str) -> tuple[int, int]:
    """`3/16` → (3, 16)."""
    try:
        i, n = (int(number) for number in text.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise UsageError(Problem("--part is I/N with I from 1 to N", repr(text), "For example --part 3/16"))
    return i, n


def _claim(out: Path, manifest: pd.DataFrame, how: Preparation) -> None:
    """Writes what this corpus is made of, or refuses to mix it with another."""
    ours = _identity(manifest, how)
    (out / "shards").mkdir(parents=True, exist_ok=True)
    about = out / ABOUT
    if not about.exists():
        write_text(about, json.dumps({"identity": ours, "preparation": asdict(how)}, indent=2))
    with reading(about, ABOUT_CURE):
        theirs = str(read_mapping(about, ABOUT_CURE)["identity"])
    if theirs != ours:
        raise UsageError(
            Problem(
                "this folder holds a corpus of another manifest or recipe",
                f"{out} ({theirs[:12]}, now {ours[:12]})",
                "Choose another folder with -o",
            )
        )


def _identity(manifest: pd.DataFrame, how: Preparation) -> str:
    files = manifest[["exam", "sequence", "role", "voxel_sha256"]].fillna("").astype(str)
    content = json.dumps([asdict(how), sorted(map(list, files.itertuples(index=False)))])
    return hashlib.sha256(content.encode()).hexdigest()


def _usable(manifest: pd.DataFrame) -> pd.DataFrame:
    """Files of the exams that have an image, exam after exam."""
    usable = manifest[manifest["status"] == "ok"]
    with_image = usable["exam"].isin(usable.loc[usable["role"] == "image", "exam"])
    return usable[with_image].sort_values("exam", kind="stable")


def _exams_of(manifest: pd.DataFrame) -> list[tuple[str, list[Row]]]:
    rows = cast(list[Row], _usable(manifest).to_dict("records"))  # at once: a table of each exam takes minutes of many
    return [(exam, [*files]) for exam, files in groupby(rows, key=itemgetter("exam"))]


@contextmanager
def _held(out: Path, stem: str) -> Iterator[None]:
    """Two that write one part would write into the same files."""
    try:
        with FileLock(out / f".{stem}.lock", timeout=0):
            yield
    except Timeout:
        raise UmbifError(f"Another process is preparing this part of {out}. Wait for it to end.") from None


def _remove_leftovers(shards: Path, stem: str) -> None:
    """What this part was writing when it was cut off."""
    for leftover in shards.glob(f".{stem}_*.writing"):
        leftover.unlink()


def _prepared(out: Path) -> pd.DataFrame:
    """The rows of all whole shards; of an exam that was tried twice, those with the most frames, then the newest."""
    paths = sorted((out / "shards").glob("*.parquet"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not paths:
        return pd.DataFrame({"exam": [], "status": [], "reason": []})
    rows = pd.concat([_table(path).assign(age=age) for age, path in enumerate(paths)])  # names count parts, not tries
    if "shard" in rows:  # otherwise there is nothing but what was quarantined
        lost = rows.loc[rows["shard"].isin(incomplete(out, rows)), "age"]
        rows = rows[~rows["age"].isin(lost)]
    tries = (rows["status"] == "ok").groupby([rows["exam"], rows["age"]]).sum().reset_index(name="num_frames")
    best = tries.sort_values(["num_frames", "age"]).drop_duplicates("exam", keep="last")
    return rows.merge(best[["exam", "age"]]).drop(columns="age")


def _table(path: Path) -> pd.DataFrame:
    """The rows of one shard."""
    return read_parquet(path, TABLE_CURE, ("exam", "status", "reason"))


def _gains(results: Iterable[tuple[list[Row], Result]], before: pd.DataFrame) -> Iterator[Result]:
    """Passes over an exam that was tried again in vain: else each try would leave its bytes in a new shard."""
    num_before = (before["status"] == "ok").groupby(before["exam"]).sum().to_dict()
    for files, (frames, bad) in results:
        settled = all(row["reason"] not in TRIED_AGAIN for row in bad)
        if (len(frames), settled) > (num_before.get(files[0]["exam"], -1), False):
            yield frames, bad


def _as_known_now(good: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """With the manifest's persons, split, site and labels."""
    now = manifest.drop_duplicates("exam").set_index("exam")
    before = [name for name in good.columns if name not in SCHEMA and name not in OWN_COLUMNS]
    fresh = {name: good["exam"].map(now[name]) for name in ("person", "site", "split", *label_columns(manifest))}
    return good.drop(columns=before).assign(**fresh)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the exams are the parallelism


def _crashed(files: list[Row]) -> Result:
    return [], [_quarantined(files[0], "reader_crashed", CRASHED)]


def _prepare_one(files: list[Row], how: Preparation) -> Result:
    """One exam: its frames with their index rows, and rows for what was quarantined."""
    images, masks, bad = _read(files, how)
    if not images:
        return [], bad or [_quarantined(files[0], "no_image", "No readable image in this exam.")]
    try:
        exam = prepare_exam(
            {name: volume for name, (_, volume) in images.items()},
            how,
            brain=masks.get("brain_mask"),
            tumour=masks.get("tumour_mask"),
        )
    except UnusableExam as error:
        return [], [*bad, _quarantined(files[0], error.reason, error.detail)]
    for name, share in exam.off_the_brain.items():
        row, _ = images[name]
        detail = f"It shows {share:.0%} of the brain, less than {MIN_COVERED:.0%}: a slab, or in a space of its own."
        bad.append(_quarantined(row, "off_the_brain", detail))
    return _frames(exam, {name: row for name, (row, _) in images.items()}, how) if exam.volumes else [], bad


def _read(files: list[Row], how: Preparation) -> tuple[dict[str, tuple[Row, Volume]], dict[str, Volume], list[Row]]:
    """One image of each sequence, one mask of each role, and rows for what was set aside."""
    images: dict[str, tuple[Row, Volume]] = {}
    masks: dict[str, Volume] = {}
    bad: list[Row] = []
    for row in sorted(files, key=_turn):
        role = row["role"]
        if role in masks:
            bad.append(_quarantined(row, "second_mask", SECOND_MASK.format(role.replace("_", " "))))
            continue
        try:
            volume = read_volume(Path(row["path"]), mask=role != "image")
            if role != "image":
                masks[role] = volume
                continue
            _check_face(volume, how, "brain_mask" in masks)
        except (BadVolume, UnusableExam) as error:
            bad.append(_quarantined(row, error.reason, error.detail))
            continue
        ours, twin = (row, volume), images.get(row["sequence"])
        better, lesser = ours, twin
        if twin is not None and not is_better(volume, twin[1], masks.get("brain_mask")):
            better, lesser = twin, ours
        images[row["sequence"]] = better
        bad += [_quarantined(lesser[0], "coarser_twin", TWIN)] if lesser is not None else []
    return images, masks, bad


def _turn(row: Row) -> tuple[bool, bool, str]:
    """Masks come first, for they decide about images; of masks, those that a person made."""
    is_image, words = row["role"] == "image", WORD.findall(Path(row["path"]).name.lower())
    return is_image, not is_image and not AUTOMATIC.isdisjoint(words), row["path"]


def _check_face(volume: Volume, how: Preparation, has_brain_mask: bool) -> None:
    if "not_skull_stripped" in volume.flags and not (how.allow_faces or has_brain_mask):
        raise UnusableExam(
            "not_skull_stripped",
            "The background is not constant: a head with its face. Strip it first (HD-BET, SynthStrip), put a brain "
            "mask beside it, or set allow_faces=true if the data may be used so.",
        )


def _frames(exam: PreparedExam, rows: dict[str, Row], how: Preparation) -> list[tuple[Row, bytes]]:
    shared = {"affine": exam.affine.ravel().tolist(), "shape": list(exam.brain.shape)}
    first = next(iter(rows.values()))
    frames = []
    for name, volume in exam.volumes.items():
        numbers = {k: getattr(volume, k) for k in NUMBERS}
        frames.append(({**rows[name], **shared, **numbers, "name": name}, encode(volume.stored, how.compression_level)))
    for name, mask in ((BRAIN, exam.brain), (TUMOUR, exam.tumour)):
        if mask is not None:
            row = {**first, **shared, **MASK_NUMBERS, "name": name, "sequence": ""}
            frames.append((row, encode(mask, how.compression_level)))
    return [({**row, "reason": "", "detail": ""}, frame) for row, frame in frames]


def _quarantined(row: Row, reason: str, detail: str) -> Row:
    return {**row, "status": "quarantined", "reason": reason, "detail": detail}


def _write_shards(results: Iterable[Result], folder: Path, stem: str) -> None:
    writer: ShardWriter | None = None
    rows: list[Row] = []
    number = max((int(path.stem[-5:]) + 1 for path in folder.glob(f"{stem}_*.parquet")), default=0)
    try:
        for frames, bad in results:
            if writer is None:
                writer = ShardWriter(folder / f"{stem}_{number:05d}.shard")
            rows += [{**row, **writer.append(frame)} for row, frame in frames] + bad
            if writer.num_bytes >= SHARD_BYTES:
                full, writer = writer, None
                _close(full, rows)
                rows, number = [], number + 1
    finally:
        if writer is not None and rows:  # also of a preparation that is cut off here: whole exams stay
            _close(writer, rows)


def _close(writer: ShardWriter, rows: list[Row]) -> None:
    """The rows come after the bytes: a shard without its table is written anew, a table has its shard."""
    writer.close()
    write_parquet(pd.DataFrame(rows), writer.path.with_suffix(".parquet"))


def _summary(good: pd.DataFrame, bad: pd.DataFrame) -> str:
    images = good[~good["name"].isin([BRAIN, TUMOUR])]
    counts = images["name"].value_counts()
    megabytes = good["byte_length"].sum() / 1e6
    sizes = np.stack(good.drop_duplicates("exam")["shape"].map(np.asarray).to_list())
    lines = [
        f"{good['exam'].nunique()} exams, {len(images)} volumes ({', '.join(f'{n} {s}' for s, n in counts.items())}), "
        f"{megabytes:,.0f} MB",
        f"Brain boxes of {' x '.join(map(str, np.median(sizes, axis=0).astype(int)))} voxels in the median",
    ]
    return "\n".join(lines + ([_reasons(bad)] if len(bad) else []))


def _reasons(bad: pd.DataFrame) -> str:
    counts = bad["reason"].value_counts()
    return "\n".join(f"Quarantined: {n} × {reason}" for reason, n in counts.items())
