"""Trainings that are killed once and go on: as they were, and with another number of processes."""

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

from _chaos import SAME, STEPS, STRATEGY, Cases, Row, plan, same, show_end
from _faults import ACCUMULATING, SUMMING
from _trained import Job, apart, losses, trained

from umbif.recipe.files import list_recipes

BATCH = "data.global_batch_size=12"  # for one to four processes
POSITIONS = {  # the last step that was saved, where it is killed then, and more; 4 of 6 exams are a micro-step
    "in the warm-up": (3, SUMMING, ("model.warmup_steps=5",)), "in the middle of a pass": (4, SUMMING, ()),
    "at the end of a pass": (6, SUMMING, ()),
    "inside an accumulation": (5, ACCUMULATING, ("trainer.accumulate_grad_batches=2",)),
}  # fmt: skip
KINDS = (  # others differ in their size
    "pretrain/umbif_tiny", "pretrain/umbif_from_imagenet", "pretrain/ssl_imagenet", "pretrain/simclr_resunet",
    "pretrain/mae", "pretrain/simclr", "pretrain/ssl_cerebral", "finetune/idh",
)  # fmt: skip
SIZES = ((1, 2, 1), (2, 4, 3))
CLOSE = "within 1e-5"


def jobs(labels_in: Path) -> list[Job]:
    """Every recipe that trains."""
    from small import labelled

    tasks = [(name, labels_in / Path(name).name) for name in list_recipes("finetune")]
    pretraining = [Job(name) for name in list_recipes("pretrain")]
    return [*pretraining, *(Job(name, labels=labelled(folder, name)) for name, folder in tasks)]


def resume_cases(place: Path, corpus: Path) -> Cases:
    """Every recipe, killed everywhere, with one process and two, and without and with workers."""
    for job, circumstances in product(jobs(place), product((1, 2), (0, 2), POSITIONS)):
        yield resume_case(job, *circumstances, place, corpus)


def paired_cases(place: Path, corpus: Path) -> Cases:
    """Every kind of recipe once, and every pair of processes, workers and positions once."""
    known = {job.recipe: job for job in jobs(place)}
    for i, (name, (num, position)) in enumerate(zip(KINDS, product((1, 2), POSITIONS), strict=True)):
        workers = 2 * ((i + num) % 2)
        row = resume_case(known[name], num, workers, position, place, corpus)
        yield replace(row, group=f"{row.group}, pairwise")


def resume_case(job: Job, num: int, workers: int, position: str, place: Path, corpus: Path) -> Row:
    """Weights and logged losses of a run that was killed, and of one that was not."""
    step, where, more = POSITIONS[position]
    options = (
        f"callbacks.checkpoint.every_n_steps={step}", "callbacks.checkpoint.asynchronous=false",
        "trainer.log_every_n_steps=1", f"trainer.max_steps={STEPS}", f"data.num_workers={workers}", STRATEGY, *more,
    )  # fmt: skip
    folder = place / "case"
    alone, killed = (folder / which for which in ("alone", "killed"))
    trained(job, corpus, alone, num, *options)
    faults = plan(f"killed@0:{step} in {where}")
    codes = trained(job, corpus, killed, num, *options, *faults)
    reached = [path.name for path in (killed / "checkpoints").glob("step=*")]
    trained(job, corpus, killed, num, *options, *faults)
    found = same(killed, alone) if any(codes) and reached == [f"step={step:06d}"] else f"not killed there: {reached}"
    if found != SAME:
        show_end(killed)
    shutil.rmtree(folder)
    return Row("killed and resumed", f"{job.recipe}, {num} processes, {workers} workers, {position}", SAME, found)


def size_cases(place: Path, corpus: Path) -> Cases:
    """Trainings that go on with another number of processes."""
    for name, sizes in product(("umbif_tiny", "mae", "simclr", "ssl_cerebral"), SIZES):
        job, runs = Job(f"pretrain/{name}", (BATCH,)), (place / f"{name}{sizes}", place / name)
        for i, num in enumerate(sizes):
            trained(job, corpus, runs[0], num, f"trainer.max_steps={4 * (i + 1)}", "model.max_steps=20", STRATEGY)
        if not runs[1].exists():
            trained(job, corpus, runs[1], 1, "trainer.max_steps=12", "model.max_steps=20")
        furthest = apart(losses(runs[0]), losses(runs[1]))
        found = CLOSE if furthest < 1e-5 else f"{furthest:.1e}"
        yield Row("other numbers of processes", f"{name}, {' → '.join(map(str, sizes))}", CLOSE, found)
