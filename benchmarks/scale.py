"""What UMBIF costs beside the work itself: its loop, its checkpoints, and a second process.

    python benchmarks/scale.py                       ViT-S at 96³ on CPUs, about twenty minutes
    python benchmarks/scale.py --quick               seconds, at a size that says nothing
    python benchmarks/scale.py --only loops,stall    without the second process

Loops take turns within one process, A B C A B C …; times are seconds of this process, and ratios are of the same turn.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from _loops import LOOPS, Saved, saving
from _report import Row, print_table, write_json
from _trained import command

from umbif.quiet import quiet
from umbif.recipe.compose import Recipe, compose

CPU = torch.device("cpu")
SHAPE, CROP = (150, 180, 150), 96
QUICK_SHAPE, QUICK_CROP = (40, 48, 44), 32
LOG_EVERY, SAVE_EVERY, SAVES, DEFAULT_INTERVAL = 50, 5, 3, 500
MOST = {"bare Lightning": 1.02, "bare PyTorch": 1.05}  # our step over theirs
MOST_STALL = 0.01  # of the time
SHARE = f"share of the time, with one in {DEFAULT_INTERVAL} such steps"
SAME_LOSS = 1e-5
Rows = Iterator[Row]


class Sizes:
    """What is trained, and for how long.

    Args:
        quick: At a size that says nothing.
        place: For the corpus and for runs.
    """

    def __init__(self, quick: bool, place: Path) -> None:
        from exams import write_corpus

        self.quick, self.place, self.num_runs = quick, place, 0
        self.corpus = write_corpus(place, QUICK_SHAPE if quick else SHAPE, 1.0)
        self.num_steps, self.rounds, self.exams = (6, 1, 2) if quick else (LOG_EVERY + 2, 5, 2)

    def recipe(self, num_steps: int, *more: str) -> Recipe:
        """As it is but for what makes it large."""
        crop = [QUICK_CROP if self.quick else CROP] * 3
        small = ("model.encoder.depth=2", "model.decoder.depth=1") if self.quick else ()
        return compose("pretrain/umbif_vits", [
            "hardware=cpu", f"data.corpus={self.corpus}", f"run.dir={self.folder()}", f"data.crop_size={crop}",
            f"data.global_batch_size={self.exams}", "data.num_workers=0", "data.num_val_exams=0",
            f"trainer.max_steps={num_steps}", "model.warmup_steps=1", "callbacks.monitors=null", *small, *more,
        ])  # fmt: skip

    def folder(self) -> Path:
        """Of a run that was not there before."""
        self.num_runs += 1
        return self.place / f"run_{self.num_runs}"


def loops(sizes: Sizes) -> Rows:
    """The same training in our loop, in a bare Trainer, and in a bare loop."""
    turns = []
    for number in range(sizes.rounds + 1):
        recipe = sizes.recipe(sizes.num_steps)
        timed = {name: loop(recipe, sizes.folder()) for name, loop in LOOPS.items()}
        losses = [one.last_loss for one in timed.values()]
        if max(losses) - min(losses) > SAME_LOSS * abs(losses[0]):
            raise SystemExit(f"the loops do not do the same work: their last losses are {losses}")
        turns += [timed] if number else []  # the first is a warm-up
    for kind, by in (("step_s", "of this process"), ("wall_s", "by the clock")):
        for name in LOOPS:
            times = [(getattr(turn["umbif fit"], kind), getattr(turn[name], kind)) for turn in turns]
            found = median(theirs for _, theirs in times), median(ours / theirs for ours, theirs in times)
            yield Row(f"a step, {by}", name, found[0], "s", found[1])


def stall(sizes: Sizes) -> Rows:
    """What training waits for a checkpoint, written beside it and not, and how much longer it takes by the clock."""
    every = f"callbacks.checkpoint.every_n_steps={SAVE_EVERY}"
    few, many = sizes.recipe(SAVES * SAVE_EVERY + 1), sizes.recipe(SAVES * SAVE_EVERY + 1, every)
    found: dict[str, list[Saved]] = {"none": [], "beside training": [], "at once": []}
    for number in range(sizes.rounds + 1):
        for name, saved in found.items():
            one = saving(few if name == "none" else many, sizes.folder(), asynchronous=name != "at once")
            saved += [one] if number else []
    usual_s = median(one.timed.wall_s for one in found.pop("none"))
    for name, saved in found.items():
        stall_s = median(one.stall_s for one in saved)
        longer_s = (median(one.timed.wall_s for one in saved) - usual_s) * saved[0].timed.num_steps / SAVES
        share = stall_s / (stall_s + DEFAULT_INTERVAL * usual_s)
        yield Row("a checkpoint", name, saved[0].num_bytes / 2**20, "MiB", None)
        yield Row("training waits for one", name, stall_s, "s", stall_s / usual_s)
        yield Row("training takes longer for one, by the clock", name, longer_s, "s", longer_s / usual_s)
        yield Row(SHARE, name, 100 * share, "%", None)


def weak(sizes: Sizes) -> Rows:
    """Twice the exams with twice the processes, beside two trainings that do not know of each other."""
    one, two = sizes.exams, 2 * sizes.exams
    ways = {"1 process": ("auto", 1, one), "2, ddp": ("ddp", 2, two), "2, fsdp2": ("fsdp2", 2, two)}
    rates: dict[str, list[float]] = {}
    for number in range(max(1, sizes.rounds - 2) + 1):
        for name, way in ways.items():
            found = sum(rates_of(sizes, [way]))
            rates.setdefault(name, []).extend([found] if number else [])
        apart = sum(rates_of(sizes, [ways["1 process"]] * 2))
        rates.setdefault("2 trainings", []).extend([apart] if number else [])
    for name, found in rates.items():
        ratio = median(a / b for a, b in zip(found, rates["1 process"], strict=True))
        yield Row("exams a second, of so many processes", name, median(found), "1/s", ratio)


def rates_of(sizes: Sizes, ways: Sequence[tuple[str, int, int]]) -> list[float]:
    """Exams a second of trainings that run at the same time."""
    started = []
    for strategy, num, exams in ways:
        recipe = sizes.recipe(
            12 if sizes.quick else 40, f"trainer.strategy={strategy}", f"trainer.devices={num}",
            f"data.global_batch_size={exams}", "trainer.log_every_n_steps=4",
        )  # fmt: skip
        process = subprocess.Popen(**command(recipe), stdout=subprocess.DEVNULL)
        started.append((Path(recipe.tree["run"]["dir"]), process))
    codes = [process.wait() for _, process in started]
    if any(codes):
        raise SystemExit("a training has failed")
    tables = [pd.read_csv(run / "metrics.csv") for run, _ in started]
    return [float(table["throughput/exams_per_s"].dropna().iloc[1:].median()) for table in tables]


PARTS: dict[str, Callable[[Sizes], Rows]] = {"loops": loops, "stall": stall, "weak": weak}


def missed(rows: Sequence[Row]) -> Iterator[str]:
    """Bounds that were not kept."""
    for row in rows:
        if row.work.startswith("a step") and (row.ratio or 0) > MOST.get(row.contestant, row.ratio or 0):
            yield f"{row.work}: {row.ratio:.3f} times that of {row.contestant}, at most {MOST[row.contestant]}"
        if row.work == SHARE and row.contestant == "beside training" and row.value > 100 * MOST_STALL:
            yield f"{row.work}: {row.value:.2f}%, at most {MOST_STALL:.0%}"


NOTE = """Of a loop, the ratio is our step over its own; of a checkpoint, what it costs over a step; of processes, their
rate over that of one. The steps are those of a CPU: on a GPU a checkpoint costs the same, and a step far less. Monitors
and validation are off: what they cost, metrics.csv says of each run (monitor/time_share)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where all bounds are kept."""
    parser = argparse.ArgumentParser(description="What UMBIF costs beside the work itself")
    parser.add_argument("--quick", action="store_true", help="at a size that says nothing")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, of loops, stall, weak")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="umbif_scale_") as folder:
        sizes = Sizes(args.quick, Path(folder))
        rows = [row for name in args.only.split(",") for row in PARTS[name](sizes)]
    lines = [(f"{row.work}: {row.contestant}", f"{row.value:.4g} {row.unit}", said(row.ratio)) for row in rows]
    print_table("Beside the work", ("", "found", "ratio"), lines)
    print(NOTE)
    if args.json:
        write_json(args.json, rows, CPU)
    problems = [] if args.quick else [*missed(rows)]
    print(*problems, sep="\n")
    return int(bool(problems))


def said(ratio: float | None) -> str:
    """Of the table."""
    return "" if ratio is None else f"{ratio:.3f}"


if __name__ == "__main__":
    sys.exit(main())
