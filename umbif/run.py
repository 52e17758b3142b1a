"""The run folder: one layout whatever made it, one writer at a time, and enough in it to explain the result.

runs/NAME/ holds recipe.yaml, origin.yaml, command.txt, environment.json, metrics.csv, tensorboard/,
checkpoints/step=000100/, encoder/, figures/, log.txt, predictions.parquet and report.html.
"""

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout
from rich.logging import RichHandler

from umbif.errors import Problem, UmbifError, UsageError
from umbif.files import naming, write_text
from umbif.machine import environment, is_leader
from umbif.progress import console
from umbif.recipe.compose import Recipe, read_tree

# What may differ when a run goes on: nothing of it enters the numbers. A corpus or a table may lie elsewhere; whether
# they are the same is asked of them, and not of their paths.
MAY_CHANGE = (
    "about", "run.dir", "run.restarts", "callbacks", "data.corpus", "data.labels", "data.num_workers", "data.cache_gib",
    "trainer.max_steps", "model.max_steps", "model.model_name", "model.encoder.activation_checkpointing",
)  # fmt: skip
TRAINER_MAY_NOT_CHANGE = ("precision", "accumulate_grad_batches")
ABSENT = "absent"
UNLOCKED = "nothing keeps a second command from writing there. See that there is one"
GAINED = {"data.sequences": None}  # keys that recipes did not have from the start, and what runs did before


@contextmanager
def open_run(folder: Path, recipe: Recipe) -> Iterator[Path]:
    """Holds a run folder while it is written: makes it, or goes on with it if the recipe is the same.

    Raises:
        UsageError: The folder belongs to a run with another model, data or seed; lists the differences.
        UmbifError: Another process is writing it.
    """
    if not is_leader():
        _check_same(folder, recipe)  # as the leader does: left alone, they would wait for it
        logging.getLogger("umbif").addHandler(logging.NullHandler())  # the leader says it for all
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), _held(folder):
        _check_same(folder, recipe)
        with _log_file(folder / "log.txt"):
            yield folder


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UmbifError(
            f"Another process is writing {folder}. Wait for it to end, or give this run another run.dir."
        ) from None
    if isinstance(lock, SoftFileLock):  # which it becomes where `flock` fails, and which keeps nobody out
        logging.getLogger("umbif").warning("%s lies on a file system without locks: %s", folder, UNLOCKED)
    try:
        yield
    finally:
        lock.release()


def _check_same(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.yaml"
    if not path.exists() or not _has_kept(folder):
        return
    before, now = (GAINED | flat(tree) for tree in (read_tree(path), recipe.tree))
    problems = [
        Problem(f"{key} was {before.get(key, ABSENT)}, is now {now.get(key, ABSENT)}")
        for key in sorted({*before, *now})
        if before.get(key, ABSENT) != now.get(key, ABSENT) and not _may_change(key)
    ]
    steps = [tree.get("trainer.max_steps") for tree in (before, now)]
    if all(isinstance(n, int) for n in steps) and steps[1] < steps[0]:  # type: ignore[operator]
        problems.append(Problem("trainer.max_steps may grow, not shrink", f"{steps[1]} after {steps[0]}"))
    if problems:
        cure = Problem("Go on with the old values, or start another run with run.dir=runs/ANOTHER_NAME")
        raise UsageError([*problems, cure], f"going on with {folder}, which another recipe began")


def _has_kept(folder: Path) -> bool:
    """Whether anything would be gone on with: a run that ended before its first checkpoint begins anew."""
    return any(folder.glob("checkpoints/step=*")) or (folder / "encoder").exists()


def _may_change(key: str) -> bool:
    if key.startswith("trainer."):
        return key.removeprefix("trainer.") not in TRAINER_MAY_NOT_CHANGE
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def write_provenance(folder: Path, recipe: Recipe) -> None:
    """Writes what explains a run. Called once it starts: a recipe that cannot must not claim the folder."""
    if not is_leader():
        return
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    origins = "".join(f"{key}: {json.dumps(origin)}\n" for key, origin in recipe.origins.items())
    write_text(folder / "origin.yaml", origins)
    with (folder / "command.txt").open("a") as file:
        file.write(shlex.join(["umbif", *sys.argv[1:]]) + "\n")
    write_text(folder / "environment.json", json.dumps(environment(), indent=2))


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Writes what is logged to a file, and warnings to the console too: who watches must not miss them."""
    file = logging.FileHandler(path)
    file.handleError = lambda _: None  # type: ignore[method-assign, assignment]  # a full disk would print a traceback a line
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    shown = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    logger = logging.getLogger("umbif")
    logger.setLevel(logging.INFO)
    for handler in (file, shown):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, shown):
            logger.removeHandler(handler)
        with suppress(OSError):  # of a full disk: what ends the run is to be told, and not this
            file.close()
