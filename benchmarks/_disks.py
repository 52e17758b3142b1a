"""What befalls files: checkpoints that are damaged, disks that are full, and a corpus with a flipped bit."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from _chaos import EVERY_STEP, HYBRID, SAME, STEPS, STRATEGY, TWO, Cases, Row, plan, same
from _trained import commanded, trained

DAMAGES = ("flipped bit", "cut", "empty", "share missing", "manifest missing", "leftover", "all but the first")
OPTIONS = (
    "callbacks.checkpoint.every_n_steps=3", "trainer.log_every_n_steps=1", STRATEGY, f"trainer.max_steps={STEPS}",
)  # fmt: skip
TOLD = f"{SAME}, told"
OWN = ("unshare", "--map-root-user", "--mount")  # file systems of its own, for whoever may make them
SMALL = {"full": ("full@0:4", "room@0:8"), "for reading only": ("read-only@0:4", "writable@0:8")}
ON_SMALL_DISK = """mount -t tmpfs -o size=96m none "$0" && "$@" {}; code=$?; cp -r "$0/." "$0.kept"; exit $code"""
PRINTED_THERE = '> "$0/said.txt" 2>&1'


def checkpoint_cases(place: Path, corpus: Path) -> Cases:
    """What befalls checkpoints between two starts."""
    options = (*EVERY_STEP, "callbacks.checkpoint.keep=3", "model.max_steps=20")
    alone, begun = place / "alone", place / "begun"
    trained(HYBRID, corpus, alone, 1, *options, f"trainer.max_steps={STEPS}")
    trained(HYBRID, corpus, begun, 1, *options, "trainer.max_steps=6")
    shutil.rmtree(begun / "encoder")
    for damage in DAMAGES:
        run = place / damage
        shutil.copytree(begun, run)
        hurt(run / "checkpoints", damage)
        codes = trained(HYBRID, corpus, run, 1, *options, f"trainer.max_steps={STEPS}")
        yield Row("damaged checkpoints", damage, SAME, f"exit code {codes[0]}" if codes[0] else same(run, alone))


def disk_cases(place: Path, corpus: Path) -> Cases:
    """A disk that takes nothing from step 4 on, and does again after step 8."""
    commanded(HYBRID, corpus, place / "alone", *OPTIONS, TWO)
    quota = plan("quota@0:4", "no quota@0:8")
    code, said = commanded(HYBRID, corpus, place / "quota", *OPTIONS, TWO, *quota)
    yield disk_row("a quota is used up", code, said, place / "quota")
    stop, run = "callbacks.checkpoint.stop_on_failure=true", place / "stops"
    code, said = commanded(HYBRID, corpus, run, *OPTIONS, TWO, *quota, stop)
    left = ", ".join(path.name for path in (run / "checkpoints").iterdir())
    again, _ = commanded(HYBRID, corpus, run, *OPTIONS, TWO, *quota, stop)
    then = disk_row("a quota is used up, which is to end the run", again, said, run)
    expected = f"exit code 1, step=000003 left, then {then.expected}"
    yield replace(then, expected=expected, found=f"exit code {code}, {left} left, then {then.found}")
    if subprocess.run([*OWN, "true"], capture_output=True, check=False).returncode:
        print("left out, as this user may not make file systems: a full disk, a disk for reading only")
        return
    for case, faults in SMALL.items():
        run = place / case
        run.mkdir()
        within = (*OWN, "sh", "-c", ON_SMALL_DISK.format(""), str(run))
        code, said = commanded(HYBRID, corpus, run, *OPTIONS, TWO, *plan(*faults), within=within)
        yield disk_row(f"the disk is {case}", code, said, run.with_name(f"{case}.kept"))
    run = place / "printed"
    run.mkdir()
    within = (*OWN, "sh", "-c", ON_SMALL_DISK.format(PRINTED_THERE), str(run))
    code, _ = commanded(HYBRID, corpus, run, *OPTIONS, TWO, *plan(*SMALL["full"]), within=within)
    found = f"exit code {code}" if code else same(run.with_name("printed.kept"), place / "alone")
    yield Row("disks that take nothing", "the disk is full, and what is printed goes there", SAME, found)


def disk_row(case: str, code: int, said: str, run: Path) -> Row:
    """Whether it was told, and went on."""
    told = ", told" if "step=000006 could not be written" in as_one_line(said) else ", not told"
    found = f"exit code {code}" if code else same(run, run.parent / "alone") + told
    if found != TOLD:
        print(said)
    return Row("disks that take nothing", case, TOLD, found)


def corpus_cases(place: Path, corpus: Path) -> Cases:
    """A flipped bit in what is learnt from: named, and nothing is learnt from it."""
    index = pd.read_parquet(corpus / "index.parquet")
    frame = index[(index["split"] == "train") & (index["name"] == "brain")].iloc[0]
    shard, table = f"shards/{frame['shard']}", "index.parquet"
    middle = int(frame["byte_offset"] + frame["byte_length"] // 2)
    for file, at in ((shard, middle), (table, place_of(corpus / table, "std"))):
        damaged = place / Path(file).name
        shutil.copytree(corpus, damaged)
        flip(damaged / file, at)
        for circumstances in (("data.num_workers=0",), ("data.num_workers=2",), (STRATEGY, TWO)):
            run = place / f"run_{len([*place.iterdir()])}"
            code, said = commanded(HYBRID, damaged, run, f"trainer.max_steps={STEPS}", *circumstances)
            found = f"{'named' if named(file, said) else 'not named'}, exit code {code}"
            if found[:5] != "named":
                print(said)
            case = f"one bit of {file.split('/')[0]}, {circumstances[-1]}"
            yield Row("a damaged corpus", case, f"named, exit code {1 if file == shard else 2}", found)


def named(file: str, said: str) -> bool:
    """With what became of it, and no traceback."""
    return f"{file} is damaged" in as_one_line(said) and "Traceback" not in said


def as_one_line(said: str) -> str:
    """Long ones are broken."""
    return " ".join(said.split())


def hurt(checkpoints: Path, damage: str) -> None:
    """Damages the newest checkpoint, or more than that."""
    newest, *others = sorted(checkpoints.glob("step=*"), reverse=True)
    share = newest / "share-00000.safetensors"
    content = share.read_bytes()
    {
        "flipped bit": lambda: flip(share), "share missing": share.unlink,
        "cut": lambda: share.write_bytes(content[:-1000]), "empty": lambda: share.write_bytes(b""),
        "manifest missing": (newest / "complete.json").unlink,
        "leftover": lambda: newest.rename(newest.with_name(f".{newest.name}.writing")),
        "all but the first": lambda: [(path / "state.ckpt").write_bytes(b"") for path in (newest, *others[:-1])],
    }[damage]()  # fmt: skip


def place_of(table: Path, column: str) -> int:
    """Of the values of a column; elsewhere a bit may mean nothing."""
    group = pq.read_metadata(table).row_group(0)
    chunk = next(chunk for i in range(group.num_columns) if (chunk := group.column(i)).path_in_schema == column)
    return int(chunk.data_page_offset + chunk.total_compressed_size // 2)


def flip(path: Path, at: int | None = None) -> None:
    """One bit of a file, in its middle if nothing else is said."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 4
    path.write_bytes(content)
