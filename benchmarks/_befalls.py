"""What befalls one of two processes that `umbif fit` has started."""

import random
import re
from itertools import product
from pathlib import Path

from _chaos import HYBRID, SAME, STEPS, STRATEGY, TWO, WATCHDOG_S, Cases, Row, plan, same
from _faults import SAVING, STEP, SUMMED, SUMMING
from _trained import commanded

FALLS = ("killed", "aborted", "segfault", "raises", "leaves", "memory", "cut off", "stopped")
FLIPS = ("weight@{}:6", "moment@{}:6", f"gradient@{{}}:6 in {SUMMED}")
AGAIN = f"{SAME}, started again 1 time"
EACH = 6  # steps for each fault of a soak
OPTIONS = (
    TWO, STRATEGY, "data.num_workers=1", "callbacks.checkpoint.every_n_steps=3",
    f"callbacks.watchdog.watchdog_s={WATCHDOG_S}",
)  # fmt: skip
PLACES = (STEP, SUMMING, SAVING)


def fault_cases(place: Path, corpus: Path) -> Cases:
    """Each fault, in each process, at each place."""
    steps = (*OPTIONS, f"trainer.max_steps={STEPS}")
    commanded(HYBRID, corpus, place / "alone", *steps)
    faults = [f"{kind}@{rank}:6 in {where}" for kind, rank, where in product(FALLS, (0, 1), PLACES)]
    for fault in (*faults, *(flip.format(rank) for flip in FLIPS for rank in (0, 1))):
        code, said = commanded(HYBRID, corpus, place / fault, *steps, *plan(fault))
        found = f"exit code {code}" if code else same(place / fault, place / "alone", curves=False)
        found += f", started again {said.count('All processes start again')} time"
        yield row(fault, AGAIN, found, said)
    for rank, where in product((0, 1), PLACES):
        fault = f"terminated@{rank}:6 in {where}"
        code, said = commanded(HYBRID, corpus, place / fault, *steps, *plan(fault))
        commanded(HYBRID, corpus, place / fault, *steps, *plan(fault))
        found = f"exit code {code}, gone on with {same(place / fault, place / 'alone', curves=False)}"
        yield row(fault, f"exit code 143, gone on with {SAME}", found, said)
    for rank in (0, 1):
        fault = f"slow@{rank}:2"
        code, said = commanded(HYBRID, corpus, place / fault, *steps, "trainer.log_every_n_steps=2", *plan(fault))
        named = re.findall(r"Process (\d) on \S+ is slow", (place / fault / "log.txt").read_text())
        last = named[-1] if named else "?"  # a busy machine may have slowed one of the first steps
        found = f"{same(place / fault, place / 'alone', curves=False)}, process {last} named"
        yield row(fault, f"{SAME}, process {rank} named", found, said)


def row(fault: str, expected: str, found: str, said: str) -> Row:
    """In words; and all that was said where it went wrong."""
    if found != expected:
        print(said)
    kind, where = fault.split("@")
    return Row("faults of two processes", f"{kind}, process {where.replace(':', ', step ')}", expected, found)


def soak(place: Path, corpus: Path, num_faults: int, seed: int) -> Cases:
    """One training that many random faults befall."""
    rng = random.Random(seed)
    options = (*OPTIONS, f"trainer.max_steps={num_faults * EACH}")
    commanded(HYBRID, corpus, place / "alone", *options, limit_s=60 * num_faults)
    faults = [_random_fault(rng, EACH * i) for i in range(num_faults)]
    limit_s = 60 * num_faults + 600
    code, said = commanded(HYBRID, corpus, place / "soaked", *options, *plan(*faults), limit_s=limit_s)
    happened, number = len([*(place / "soaked" / ".faults").iterdir()]), said.count("All processes start again")
    ended = f"exit code {code}" if code else same(place / "soaked", place / "alone", curves=False)
    found = f"{ended}, {happened} happened, started again {number} times"
    expected = f"{SAME}, {num_faults} happened, started again {num_faults} times"
    if found != expected:
        print(said)
    yield Row("soak", f"{num_faults} faults, seed {seed}", expected, found)


def _random_fault(rng: random.Random, step: int) -> str:
    """In the steps that follow."""
    rank, after = rng.randrange(2), step + rng.randrange(1, EACH)
    if rng.random() < 0.25:
        return rng.choice(FLIPS).replace(":6", f":{after}").format(rank)
    where = SAVING if after % 3 == 0 and rng.random() < 0.5 else rng.choice((STEP, SUMMING))
    return f"{rng.choice(FALLS)}@{rank}:{after} in {where}"
