"""What befalls trainings, on purpose, and whether they end as those that were left alone.

    python benchmarks/chaos.py                    everything: one to two hours on two cores
    python benchmarks/chaos.py --only kills,sizes some of it
    python benchmarks/chaos.py --quick            a few cases of each, minutes
    python benchmarks/chaos.py --only soak --soak 1000 --seed 1

Ends with exit code 0 where every row is as expected. `--json FILE` keeps the rows, each group in the place of its
earlier ones, and `--docs FILE` writes a page of all that are kept.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice, product
from pathlib import Path

import torch
from _befalls import fault_cases, soak
from _chaos import Cases, Row
from _chaos_page import write_page
from _disks import checkpoint_cases, corpus_cases, disk_cases
from _kills import KINDS as SAVES
from _kills import POINTS, kills
from _report import commit, hardware
from _resumes import paired_cases, resume_cases, size_cases

from umbif.files import write_text
from umbif.quiet import quiet

CPU = torch.device("cpu")


def kill_cases(place: Path, corpus: Path) -> Cases:
    """Kills in a save, with temporary files on this file system and on another one."""
    for name, elsewhere in product(SAVES, (False, True)):
        folder = place / f"{name}{elsewhere}"
        folder.mkdir()
        before = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = "/dev/shm" if elsewhere else str(folder)
        found = [*kills(folder, SAVES[name])]
        came_late = all(killed.is_new for killed in found[1:])  # the first comes before any byte
        num_intact = 0 if came_late else sum(killed.is_intact for killed in found)
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
        where = "TMPDIR elsewhere" if elsewhere else "TMPDIR beside it"
        yield Row("kills in a save", f"{name}, {where}", f"{POINTS} of {POINTS}", f"{num_intact} of {POINTS}")


GROUPS: dict[str, Callable[..., Cases]] = {
    "kills": kill_cases, "checkpoints": checkpoint_cases, "disks": disk_cases, "corpus": corpus_cases,
    "sizes": size_cases, "faults": fault_cases, "resume": resume_cases, "paired": paired_cases,
    "soak": soak,
}  # fmt: skip
ALL = [name for name in GROUPS if name != "paired"]  # which `resume` holds
QUICK = {"kills": 2, "checkpoints": 3, "disks": 1, "corpus": 1, "sizes": 1, "faults": 3, "paired": 4}


def told(row: Row) -> str:
    """One line."""
    mark = "ok " if row.is_expected else "BAD"
    return f"{mark}  {row.group}: {row.case}: {row.found}" + ("" if row.is_expected else f" instead of {row.expected}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where all is as expected."""
    args = parsed(arguments)
    from exams import write_corpus

    quiet()
    torch.set_num_threads(1)  # or forked processes would wait for threads that they lack
    groups = {**GROUPS, "soak": partial(soak, num_faults=args.soak, seed=args.seed)}
    num = total = 0
    with tempfile.TemporaryDirectory(prefix="umbif_chaos_") as folder:
        corpus = write_corpus(Path(folder))
        for name in args.only:
            place = Path(folder) / f"{name}_cases"
            place.mkdir()
            rows = []
            for row in islice(groups[name](place, corpus), QUICK.get(name) if args.quick else None):
                print(told(row), flush=True)
                rows.append(row)
            num, total = num + sum(row.is_expected for row in rows), total + len(rows)
            if args.json:
                keep(args.json, rows)
    print(f"{num} of {total} as expected")
    if args.docs:
        write_page(args.docs, args.json)
    return int(num < total)


def keep(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a file, in which they take the place of their groups."""
    before = json.loads(path.read_text()) if path.exists() else []
    source = {"hardware": hardware(CPU), "commit": commit()}
    groups = {row.group for row in rows}
    kept = [one for one in before if one["group"] not in groups]
    write_text(path, json.dumps([*kept, *({**source, **asdict(row)} for row in rows)], indent=1) + "\n")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description="What befalls trainings, and whether they end alike")
    parser.add_argument("--only", type=lambda words: words.split(","), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="a few cases of each")
    parser.add_argument("--soak", type=int, default=100, metavar="N", help="random faults of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the soak")
    parser.add_argument("--json", type=Path, help="where to keep the rows")
    parser.add_argument("--docs", type=Path, help="where to write a page of all that --json holds")
    args = parser.parse_args(arguments)
    if args.docs and not args.json:
        parser.error("--docs needs --json, of which it is made")
    if args.quick and args.json:
        parser.error("--quick has too few rows to keep them")
    args.only = [*(QUICK if args.quick else ALL)] if args.only is None else [name for name in args.only if name]
    if wrong := {*args.only} - {*GROUPS}:
        parser.error(f"--only {','.join(wrong)}: choose from {', '.join(GROUPS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
