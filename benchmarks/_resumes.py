"""Trainings that are killed once and go on: as they were, and with another number of processes."""

import shutil
from itertools import product
from pathlib import Path

from _chaos import EVERY_STEP, SAME, STEPS, STRATEGY, Cases, Row, plan, same, show_end
from _trained import Course, apart, losses, trained

from umbif.recipe.files import list_recipes

BATCH = "data.global_batch_size=12"  # for one to four processes
POSITIONS = {  # a fault, and what more makes it fall there: of 6 exams for training, 4 a micro-step
    "in the warm-up": ("killed@0:1", ()), "in the middle of a pass": ("killed@0:4", ()),
    "at the end of a pass": ("killed@0:6", ()),
    "inside an accumulation": ("killed@0:5 in an accumulation", ("trainer.accumulate_grad_batches=2",)),
}  # fmt: skip
SIZES = ((1, 2, 1), (2, 4, 3))
CLOSE = "within 1e-5"


def courses(labels_in: Path) -> list[Course]:
    """Every recipe that trains."""
    from small import labelled

    tasks = [(name, labels_in / Path(name).name) for name in list_recipes("finetune")]
    pretraining = [Course(name) for name in list_recipes("pretrain")]
    return [*pretraining, *(Course(name, labels=labelled(folder, name)) for name, folder in tasks)]


def resume_cases(place: Path, corpus: Path) -> Cases:
    """Every recipe, killed everywhere, with one process and two, and without and with workers."""
    for course, circumstances in product(courses(place), product((1, 2), (0, 2), POSITIONS)):
        yield resume_case(course, *circumstances, place, corpus)


def paired_cases(place: Path, corpus: Path) -> Cases:
    """Every recipe once, and every pair of processes, workers and positions at least once."""
    circumstances = [*product((1, 2), (0, 2), POSITIONS)]
    for i, course in enumerate(courses(place)):
        yield resume_case(course, *circumstances[i % len(circumstances)], place, corpus)


def resume_case(course: Course, num: int, workers: int, position: str, place: Path, corpus: Path) -> Row:
    """Weights and logged losses of a run that was killed, and of one that was not."""
    fault, more = POSITIONS[position]
    options = (*EVERY_STEP, *more, f"trainer.max_steps={STEPS}", f"data.num_workers={workers}", STRATEGY)
    folder = place / "case"
    alone, killed = (folder / which for which in ("alone", "killed"))
    trained(course, corpus, alone, num, *options)
    codes = trained(course, corpus, killed, num, *options, *plan(fault))
    trained(course, corpus, killed, num, *options, *plan(fault))
    found = same(killed, alone) if any(codes) else "never killed"
    if found != SAME:
        show_end(killed)
    shutil.rmtree(folder)
    return Row("killed and resumed", f"{course.recipe}, {num} processes, {workers} workers, {position}", SAME, found)


def size_cases(place: Path, corpus: Path) -> Cases:
    """Trainings that go on with another number of processes."""
    for name, sizes in product(("umbif_tiny", "mae", "simclr", "ssl_cerebral"), SIZES):
        course, runs = Course(f"pretrain/{name}", (BATCH,)), (place / f"{name}{sizes}", place / name)
        for i, num in enumerate(sizes):
            trained(course, corpus, runs[0], num, f"trainer.max_steps={4 * (i + 1)}", "model.max_steps=20", STRATEGY)
        if not runs[1].exists():
            trained(course, corpus, runs[1], 1, "trainer.max_steps=12", "model.max_steps=20")
        furthest = apart(losses(runs[0]), losses(runs[1]))
        found = CLOSE if furthest < 1e-5 else f"{furthest:.1e}"
        yield Row("other numbers of processes", f"{name}, {' → '.join(map(str, sizes))}", CLOSE, found)
