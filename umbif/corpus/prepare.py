"""Manifest to corpus: what `umbif prepare` does. Restartable, in parts, and published only when nothing is missing."""

import hashlib
import json
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from umbif.corpus.manifest import SCHEMA, label_columns
from umbif.corpus.preprocess import MIN_COVERED, Preparation, PreparedExam, UnusableExam, is_finer, prepare_exam
from umbif.corpus.readers import BadVolume, Volume, read_volume
from umbif.corpus.shards import ABOUT, ABOUT_CURE, BRAIN, LOOKED_UP, NUMBERS, TUMOUR, ShardWriter, encode
from umbif.errors import Problem, Stopped, UmbifError, UsageError
from umbif.files import naming, read_mapping, read_parquet, reading, whole, write_text
from umbif.machine import num_cores
from umbif.progress import track

SHARD_BYTES = 2**30
TABLE_CURE = "Delete it and give the same umbif prepare command again (every --part): its exams are prepared anew"
UNREADABLE = "unreadable"  # the reason of a file that the system would not read
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
    with naming(out), _held(out, stem), _stoppable():
        _remove_unusable(out / "shards", stem)
        before = _prepared(out)
        done = {*before["exam"]} - {*before["exam"][before["reason"] == UNREADABLE]}  # a disk may have been away
        todo = [exam for exam in exams if exam[0] not in done]
        results = track(_in_processes([(rows, how) for _, rows in todo], num_workers), "Preparing exams", len(todo))
        _write_shards(_gains(results, [exam for exam, _ in todo], before), out / "shards", stem)


def merge(manifest: pd.DataFrame, out: Path) -> str:
    """Joins the parts into index.parquet and returns a summary; an incomplete corpus is not published.

    Persons, split and labels are those of the manifest as it is now: they may have changed since the voxels were read.

    Raises:
        UmbifError: Exams of the manifest are in no part.
    """
    rows = _prepared(out)
    missing = {*_usable(manifest)["exam"]} - {*rows["exam"]}
    if missing:
        raise UmbifError(
            f"{len(missing)} of {manifest['exam'].nunique()} exams have not been prepared; nothing was published. "
            "Run the same umbif prepare command again (every --part of it), then --merge."
        )
    good = rows[rows["status"] == "ok"].drop(columns=["status", "reason", "detail"])
    if good.empty:
        raise UmbifError("No exam could be prepared.\n" + _reasons(rows[rows["status"] != "ok"]))
    good = _as_known_now(good, manifest).sort_values("exam", kind="stable").reset_index(drop=True)
    _write_table(rows[rows["status"] != "ok"][["exam", "path", "reason", "detail"]], out / "quarantine.parquet")
    _write_table(good, out / "index.parquet")
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


@contextmanager
def _stoppable() -> Iterator[None]:
    """Lets a SIGTERM end the work in order, as Ctrl-C does; where signals can be taken at all, in the main thread."""

    def stop(number: int, _: object) -> None:
        raise Stopped("Ended by SIGTERM. What is prepared stays; the same command goes on.", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove_unusable(shards: Path, stem: str) -> None:
    """What this part was writing when it was cut off, and tables whose shard is gone or cut: their exams come anew."""
    for leftover in shards.glob(f".{stem}_*.writing"):
        leftover.unlink()
    for path in shards.glob(f"{stem}_*.parquet"):
        shard, rows = path.with_suffix(".shard"), _table(path)
        if "byte_offset" not in rows:
            continue  # nothing but what was quarantined
        if not shard.exists() or shard.stat().st_size < (rows["byte_offset"] + rows["byte_length"]).max():
            path.unlink()


def _prepared(out: Path) -> pd.DataFrame:
    """The rows of all shards; of an exam that was tried twice, those with the most frames, then the newest."""
    paths = sorted((out / "shards").glob("*.parquet"))
    if not paths:
        return pd.DataFrame({"exam": [], "status": [], "reason": []})
    ages = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))  # names count parts, not tries
    rows = pd.concat([_table(path).assign(age=ages.index(path)) for path in paths])
    tries = (rows["status"] == "ok").groupby([rows["exam"], rows["age"]]).sum().reset_index(name="num_frames")
    best = tries.sort_values(["num_frames", "age"]).drop_duplicates("exam", keep="last")
    return rows.merge(best[["exam", "age"]]).drop(columns="age")


def _table(path: Path) -> pd.DataFrame:
    """The rows of one shard."""
    return read_parquet(path, TABLE_CURE, ("exam", "status", "reason"))


def _gains(results: Iterable[Result], exams: list[str], before: pd.DataFrame) -> Iterator[Result]:
    """Passes over an exam that was tried again in vain: else each try would leave its bytes in a new shard."""
    num_before = (before["status"] == "ok").groupby(before["exam"]).sum().to_dict()
    for exam, (frames, bad) in zip(exams, results, strict=True):
        settled = all(row["reason"] != UNREADABLE for row in bad)
        if (len(frames), settled) > (num_before.get(exam, -1), False):
            yield frames, bad


def _as_known_now(good: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """With the manifest's persons, split, site and labels."""
    now = manifest.drop_duplicates("exam").set_index("exam")
    before = [name for name in good.columns if name not in SCHEMA and name not in OWN_COLUMNS]
    fresh = {name: good["exam"].map(now[name]) for name in ("person", "site", "split", *label_columns(manifest))}
    return good.drop(columns=before).assign(**fresh)


def _in_processes(jobs: list[tuple[list[Row], Preparation]], num_workers: int | None) -> Iterator[Result]:
    """Results in the order of the jobs, with a bounded number in flight so that memory stays bounded."""
    if num_workers == 0 or len(jobs) <= 1:
        yield from (_prepare_one(*job) for job in jobs)
        return
    num_workers = min(num_workers or num_cores(), len(jobs))
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_calm_worker) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(_prepare_one, *job))
                if len(waiting) >= 2 * num_workers:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # nobody waits for what comes after an end


def _result(future: "Future[Result]") -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UmbifError(
            "A worker process died, most likely for want of memory. What is prepared stays; "
            "run the same command again with fewer --workers."
        ) from error


def _calm_worker() -> None:
    import torch

    torch.set_num_threads(1)  # the exams are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all of them; the first one answers


def _prepare_one(rows: list[Row], how: Preparation) -> Result:
    """One exam: its frames with their index rows, and rows for what was quarantined."""
    images: dict[str, tuple[Row, Volume]] = {}
    masks: dict[str, Volume] = {}
    bad: list[Row] = []
    for row in sorted(rows, key=lambda row: row["role"] == "image"):  # masks first: they decide which images may pass
        try:
            volume = read_volume(Path(row["path"]), mask=row["role"] != "image")
            if row["role"] != "image":
                masks[row["role"]] = volume
                continue
            _check_face(volume, how, "brain_mask" in masks)
        except (BadVolume, UnusableExam) as error:
            bad.append(_quarantined(row, error.reason, error.detail))
            continue
        twin = images.get(row["sequence"])
        finer = twin is None or is_finer(volume, twin[1])
        if twin is not None:
            other = twin[0] if finer else row
            bad.append(_quarantined(other, "coarser_twin", "The exam has this sequence twice; the finer one is kept."))
        if finer:
            images[row["sequence"]] = (row, volume)
    if not images:
        return [], bad or [_quarantined(rows[0], "no_image", "No readable image in this exam.")]
    try:
        exam = prepare_exam(
            {name: volume for name, (_, volume) in images.items()},
            how,
            brain=masks.get("brain_mask"),
            tumour=masks.get("tumour_mask"),
        )
    except UnusableExam as error:
        return [], [*bad, _quarantined(rows[0], error.reason, error.detail)]
    for name, share in exam.off_the_brain.items():
        row, _ = images[name]
        detail = f"It shows {share:.0%} of the brain, less than {MIN_COVERED:.0%}: a slab, or in a space of its own."
        bad.append(_quarantined(row, "off_the_brain", detail))
    return _frames(exam, {name: row for name, (row, _) in images.items()}, how) if exam.volumes else [], bad


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
    _write_table(pd.DataFrame(rows), writer.path.with_suffix(".parquet"))


def _write_table(table: pd.DataFrame, path: Path) -> None:
    with whole(path) as aside:
        table.to_parquet(aside, index=False)


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
