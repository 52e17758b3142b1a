"""What befalls trainings, on purpose, and whether they end as those that were left alone.

    python benchmarks/chaos.py                    everything: some hours on two cores
    python benchmarks/chaos.py --only kills,files some of it: kills, files, resume, sizes, faults
    python benchmarks/chaos.py --quick            a few cases of each, minutes
    python benchmarks/chaos.py --soak 100         one training that so many random faults befall

Ends with exit code 0 where every row is as expected. `--json FILE` keeps the rows, `--docs FILE` writes a page of them.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path

import pandas as pd
import torch
from _kills import KINDS as SAVES
from _kills import POINTS, kills
from _report import commit, hardware
from _trained import Course, apart, commanded, losses, trained, weights

from umbif.quiet import quiet
from umbif.recipe.files import list_recipes

EVERY_STEP = ("callbacks.checkpoint.every_n_steps=1", "trainer.log_every_n_steps=1")
STEPS, WATCHDOG_S, CPU = 12, 6, torch.device("cpu")
HYBRID = Course("pretrain/umbif_tiny")
STRATEGY, TWO = "trainer.strategy=ddp", "trainer.devices=2"
BATCH = "data.global_batch_size=12"  # for one to four processes
POSITIONS = {  # a fault, and what more makes it fall there: of 6 exams for training, 4 a micro-step
    "in the warm-up": ("killed@0:1", ()), "in the middle of a pass": ("killed@0:4", ()),
    "at the end of a pass": ("killed@0:6", ()),
    "inside an accumulation": ("inside@0:5", ("trainer.accumulate_grad_batches=2",)),
}  # fmt: skip
SOON = ("killed", "aborted", "segfault", "raises", "leaves", "memory", "cut off", "stopped", "weight", "moment")
DAMAGES = ("flipped bit", "cut", "empty", "share missing", "manifest missing", "leftover", "all but the first")


@dataclass(frozen=True)
class Row:
    """One case."""

    group: str
    case: str
    expected: str
    found: str

    @property
    def is_expected(self) -> bool:
        """Whether all went well."""
        return self.expected == self.found


Cases = Iterator[Row]


def kill_cases(place: Path, corpus: Path) -> Cases:
    """Kills in a save, with temporary files on this file system and on another one."""
    for name, elsewhere in product(SAVES, (False, True)):
        folder = place / f"{name}{elsewhere}"
        folder.mkdir()
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = "/dev/shm" if elsewhere else str(folder)
        num_intact = sum(killed.is_intact for killed in kills(folder, SAVES[name]))
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
        where = "TMPDIR elsewhere" if elsewhere else "TMPDIR beside it"
        yield Row("kills in a save", f"{name}, {where}", f"{POINTS} of {POINTS}", f"{num_intact} of {POINTS}")


def resume_cases(place: Path, corpus: Path) -> Cases:
    """Trainings that are killed once, and go on: weights and logged losses, bit for bit."""
    courses = [Course(name) for name in list_recipes("pretrain")]
    courses.append(Course("finetune/idh", labels=labels_of(place)))
    for i, (course, num, workers) in enumerate(product(courses, (1, 2), (0, 2))):
        for name, (fault, more) in POSITIONS.items():
            options = (*EVERY_STEP, *more, f"trainer.max_steps={STEPS}", f"data.num_workers={workers}", STRATEGY)
            runs = [place / f"{i}_{name}" / which for which in ("alone", "killed")]
            trained(course, corpus, runs[0], num, *options)
            codes = trained(course, corpus, runs[1], num, *options, *plan(fault))
            trained(course, corpus, runs[1], num, *options, *plan(fault))
            found = "never killed" if not any(codes) else same(*runs)
            case = f"{course.recipe}, {num} processes, {workers} workers, {name}"
            yield Row("killed and resumed", case, "bit for bit", found)
            shutil.rmtree(runs[0].parent)


def size_cases(place: Path, corpus: Path) -> Cases:
    """Trainings that go on with another number of processes."""
    for name, sizes in product(("umbif_tiny", "mae", "simclr", "ssl_cerebral"), ((1, 2, 1), (2, 4, 3))):
        course, runs = Course(f"pretrain/{name}", (BATCH,)), (place / f"{name}{sizes}", place / name)
        for i, num in enumerate(sizes):
            trained(course, corpus, runs[0], num, f"trainer.max_steps={4 * (i + 1)}", "model.max_steps=20", STRATEGY)
        if not runs[1].exists():
            trained(course, corpus, runs[1], 1, "trainer.max_steps=12", "model.max_steps=20")
        furthest = apart(losses(runs[0]), losses(runs[1]))
        found = "within 1e-5" if furthest < 1e-5 else f"{furthest:.1e}"
        yield Row("other numbers of processes", f"{name}, {' → '.join(map(str, sizes))}", "within 1e-5", found)


def fault_cases(place: Path, corpus: Path) -> Cases:
    """What befalls one of two processes that `umbif fit` has started."""
    alone = place / "alone"
    for kind, rank in [(None, 0), *product(SOON, (0, 1))]:
        fault = f"{kind}@{rank}:7"
        run = alone if kind is None else place / fault
        options = [f"trainer.max_steps={STEPS}", "callbacks.checkpoint.every_n_steps=3", TWO, STRATEGY]
        options.append(f"callbacks.watchdog.watchdog_s={WATCHDOG_S}")
        code, said, _ = commanded(HYBRID, corpus, run, *options, *plan(*([fault] if kind else [])))
        if kind is not None:
            again = said.count("All processes start again")
            found = f"exit code {code}" if code else f"{same(run, alone, curves=False)}, started again {again} time"
            yield Row("faults of two processes", f"{kind}, process {rank}", "bit for bit, started again 1 time", found)


def file_cases(place: Path, corpus: Path) -> Cases:
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
        found = f"exit code {codes[0]}" if codes[0] else same(run, alone)
        yield Row("damaged checkpoints", damage, "bit for bit", found)


def soak(place: Path, corpus: Path, num_faults: int, seed: int) -> Cases:
    """One training that many random faults befall."""
    rng, each = random.Random(seed), 6
    steps = num_faults * each
    faults = [f"{rng.choice(SOON)}@{rng.randrange(2)}:{each * i + rng.randrange(1, each)}" for i in range(num_faults)]
    options = [f"trainer.max_steps={steps}", "callbacks.checkpoint.every_n_steps=3", TWO, STRATEGY, "run.restarts=10"]
    options.append(f"callbacks.watchdog.watchdog_s={WATCHDOG_S}")
    commanded(HYBRID, corpus, place / "alone", *options)
    code, said, _ = commanded(HYBRID, corpus, place / "soaked", *options, *plan(*faults), limit_s=60 * num_faults + 600)
    number = said.count("All processes start again")
    found = f"exit code {code}" if code else same(place / "soaked", place / "alone", curves=False)
    yield Row("soak", f"{num_faults} faults, seed {seed}; started again {number} times", "bit for bit", found)


GROUPS: dict[str, Callable[[Path, Path], Cases]] = {
    "kills": kill_cases, "files": file_cases, "resume": resume_cases, "sizes": size_cases, "faults": fault_cases,
}  # fmt: skip
QUICK = {"kills": 2, "files": 3, "resume": 4, "sizes": 1, "faults": 4}


def plan(*faults: str) -> tuple[str, ...]:
    """Overrides that let faults happen."""
    listed = ",".join(map(repr, faults))
    return ("callbacks.faults.class_path=_faults.Faults", f"callbacks.faults.plan=[{listed}]")


def same(run: Path, other: Path, curves: bool = True) -> str:
    """Whether two runs have ended alike, in words."""
    if weights(run) != weights(other):
        return "other weights"
    ours, theirs = (pd.read_csv(folder / "metrics.csv")["train/loss"].tolist() for folder in (run, other))
    return "other losses" if curves and ours != theirs else "bit for bit"


def hurt(checkpoints: Path, damage: str) -> None:
    """Damages the newest checkpoint, or more than that."""
    newest, *others = sorted(checkpoints.glob("step=*"), reverse=True)
    share = newest / "share-00000.safetensors"
    content = bytearray(share.read_bytes())
    content[len(content) // 2] ^= 4
    {
        "flipped bit": lambda: share.write_bytes(content), "share missing": share.unlink,
        "cut": lambda: share.write_bytes(content[:-1000]), "empty": lambda: share.write_bytes(b""),
        "manifest missing": (newest / "complete.json").unlink,
        "leftover": lambda: newest.rename(newest.with_name(f".{newest.name}.writing")),
        "all but the first": lambda: [(path / "state.ckpt").write_bytes(b"") for path in (newest, *others[:-1])],
    }[damage]()  # fmt: skip


def labels_of(place: Path) -> Path:
    """For the exams of the corpus."""
    from small import labelled

    return labelled(place, "finetune/idh")


def small_corpus(place: Path) -> Path:
    """Eight tiny exams, as the tests make them."""
    from exams import SPACING_MM, write_exams

    from umbif.corpus.index import build_manifest
    from umbif.corpus.prepare import merge, prepare_corpus
    from umbif.corpus.preprocess import Preparation

    write_exams(place / "TINY")
    manifest = build_manifest([place / "TINY"], test_fraction=0.25, seed=8, num_workers=0)
    prepare_corpus(manifest, place / "corpus", Preparation(spacing_mm=SPACING_MM, min_brain_ml=5.0), num_workers=0)
    merge(manifest, place / "corpus")
    return place / "corpus"


def told(row: Row) -> str:
    """One line."""
    mark = "ok " if row.is_expected else "BAD"
    return f"{mark}  {row.group}: {row.case}: {row.found}" + ("" if row.is_expected else f" instead of {row.expected}")


def write_docs(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a page."""
    lines = ["# What was done to trainings, and what became of them", ""]
    lines += [f"Written by `python benchmarks/chaos.py --docs {path.name}` at {commit()}, {hardware(CPU)}.", ""]
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group]
        num = sum(row.is_expected for row in mine)
        lines += [f"## {group.capitalize()}: {num} of {len(mine)} as expected", "", "| case | result |", "|---|---|"]
        lines += [f"| {row.case} | {row.found} |" for row in mine]
        lines.append("")
    path.write_text("\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where all is as expected."""
    parser = argparse.ArgumentParser(description="What befalls trainings, and whether they end alike")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of cases")
    parser.add_argument("--quick", action="store_true", help="a few cases of each")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="one training that N random faults befall")
    parser.add_argument("--seed", type=int, default=0, help="of the soak")
    parser.add_argument("--json", type=Path, help="where to keep the rows")
    parser.add_argument("--docs", type=Path, help="where to write them as a page")
    args = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)  # or the processes that are forked would wait for threads that they do not have
    rows = []
    with tempfile.TemporaryDirectory(prefix="umbif_chaos_") as folder:
        corpus = small_corpus(Path(folder))
        groups = {"soak": partial(soak, num_faults=args.soak, seed=args.seed)} if args.soak else {
            name: GROUPS[name] for name in args.only.split(",")
        }  # fmt: skip
        for name, cases in groups.items():
            place = Path(folder) / name
            place.mkdir()
            for row in islice(cases(place, corpus), QUICK.get(name) if args.quick else None):
                print(told(row), flush=True)
                rows.append(row)
    num = sum(row.is_expected for row in rows)
    print(f"{num} of {len(rows)} as expected")
    if args.json:
        source = {"hardware": hardware(CPU), "commit": commit()}
        args.json.write_text(json.dumps({**source, "rows": [asdict(row) for row in rows]}, indent=1))
    if args.docs:
        write_docs(args.docs, rows)
    return int(num < len(rows))


if __name__ == "__main__":
    sys.exit(main())
