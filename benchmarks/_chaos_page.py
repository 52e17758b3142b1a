"""The page of what `chaos.py` has found."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from _chaos import Row

MOST_LINES = 30  # of a table
FIELDS = ("group", "case", "expected", "found")
INTRODUCTION = """# What was done to trainings, and what became of them

Written by `python benchmarks/chaos.py`, of `benchmarks/results/chaos.json`: trainings of a tiny encoder on tiny exams,
disturbed on purpose, and compared with those that were left alone.

**{} of {} cases as expected.** In bold what was not.
"""
MEANING = {  # of a group
    "kills in a save":
        "SIGKILL at twenty points of a save, by the bytes that it has written. The new checkpoint or the one "
        "before must be there, bit for bit.",
    "damaged checkpoints": "What befalls the newest between two starts. The run must end as one that nothing befell.",
    "disks that take nothing":
        "From step 4 to step 8. The failure must be reported, and the run must end as one with room.",
    "a damaged corpus": "A flipped bit in what is learnt from. The file must be named, and nothing learnt from it.",
    "other numbers of processes": "Each for a third of the steps. All losses must be those of one process.",
    "faults of two processes":
        "Each kind, in each process, where the others are in a step, wait in an all-reduce, or wait in a save; each "
        "has one that reads for it. Who is slow must be named. SIGTERM must end the run, and the same command go on. "
        "After every other fault the run must start again by itself. All must end as one that nothing befell.",
    "killed and resumed":
        "Every recipe that trains, by one process and two, without and with workers, killed once: in its warm-up, "
        "in the middle of a pass, at its end, or inside an accumulation. Resumed from the checkpoint before, it must "
        "have the weights and all logged losses of a run that was not killed.",
    "killed and resumed, pairwise": "Of these, each pair of processes, workers and places once.",
    "soak": "Faults of all kinds, at random places of one run, which must start again by itself each time.",
}  # fmt: skip


def write_page(path: Path, source: Path) -> None:
    """The rows of a file as a page."""
    found = json.loads(source.read_text())
    good = sum(one["expected"] == one["found"] for one in found)
    groups = [part for group in dict.fromkeys(one["group"] for one in found) for part in part_of(group, found)]
    path.write_text("\n".join([INTRODUCTION.format(good, len(found)), *groups]))


def part_of(group: str, found: Sequence[dict[str, str]]) -> Iterator[str]:
    """Of one group: what was done, on what, and a table."""
    mine = [one for one in found if one["group"] == group]
    where = "; ".join(dict.fromkeys(f"{one['hardware']}, commit {one['commit']}" for one in mine))
    rows = [Row(**{name: one[name] for name in FIELDS}) for one in mine]
    yield from (f"## {group.capitalize()}", "", MEANING[group], f"({where})", "", "| case | found |", "|---|---|")
    yield from (*lines_of(rows), "")


def lines_of(rows: Sequence[Row]) -> Iterator[str]:
    """Of a table; of many cases those that begin alike in one line, and those that went wrong by themselves."""
    if len(rows) <= MOST_LINES:
        yield from map(line_of, rows)
        return
    for kind in dict.fromkeys(row.case.split(",")[0] for row in rows):
        alike = [row for row in rows if row.case.split(",")[0] == kind]
        good = [row for row in alike if row.is_expected]
        for found in dict.fromkeys(row.found for row in good):
            yield f"| {kind}, {len([row for row in good if row.found == found])} cases | {found} |"
        yield from (line_of(row) for row in alike if not row.is_expected)


def line_of(row: Row) -> str:
    """Of one case."""
    return f"| {row.case} | {row.found if row.is_expected else f'**{row.found}**'} |"
