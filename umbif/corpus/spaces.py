"""Which of the spaces that an exam's files are in is used, told by `space-` in BIDS names and by what was read."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# `individual`, and its older names, are the exam's own.
SPACE = re.compile(r"sub-.*_space-(?!(?:individual|orig|t1w)(?![a-z0-9]))([a-z0-9]+)", re.IGNORECASE)


def in_one_space(rows: Iterable[Row]) -> list[Row]:
    """Manifest rows of which each exam has one space; what is usable in others is set aside (`other_space`).

    An exam's own space is used where it has an image and the brain is known, by stripping or by a mask. Else the first
    other one is, by name, of which that is true. Masks are never laid on images of another space.
    """
    rows = list(rows)
    spaces: defaultdict[str, defaultdict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["status"] == "ok":
            spaces[row["exam"]][_space(row)].append(row)
    used = {exam: _best(of_exam) for exam, of_exam in spaces.items()}
    return [_judged(row, used[row["exam"]]) if row["status"] == "ok" else row for row in rows]


def _space(row: Row) -> str:
    """Its name; nothing for the exam's own."""
    match = SPACE.match(Path(row["path"]).name)
    return match[1].lower() if match else ""


def _best(spaces: dict[str, list[Row]]) -> str:
    """Without any brain, a space that has an image: whether faces are allowed is not known here."""
    return min(spaces, key=lambda space: (not _has_brain(spaces[space]), not _images(spaces[space]), space))


def _images(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["role"] == "image"]


def _has_brain(rows: list[Row]) -> bool:
    is_masked = any(row["role"] == "brain_mask" for row in rows)
    return any(is_masked or "not_skull_stripped" not in row["flags"] for row in _images(rows))


def _judged(row: Row, used: str) -> Row:
    if _space(row) == used:
        return row
    name = f"space-{used}" if used else "its own space"
    reason, detail = "other_space", f"The exam is used in {name}, and in no other."
    return row | {"status": "quarantined", "reason": reason, "detail": detail}
