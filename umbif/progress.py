"""Long work: one calm bar on a terminal, a line every few seconds in a log file, and an orderly end before its time."""

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from umbif.errors import Stopped

T = TypeVar("T")
console = Console(highlight=False, soft_wrap=True)
LOG_EVERY_S = 15.0


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields `items` and shows how far the work is and how long it still takes; of no work it says nothing."""
    if not total:
        yield from items
        return
    yield from _bar(items, what, total) if sys.stdout.isatty() else _lines(items, what, total)


@contextmanager
def stoppable(done: str) -> Iterator[None]:
    """Lets a SIGTERM end the work in order, as Ctrl-C does; where signals can be taken at all, in the main thread.

    Args:
        done: What has become of that which stays, such as "prepared".

    Raises:
        Stopped: A scheduler's SIGTERM came.
    """

    def stop(number: int, _: object) -> None:
        raise Stopped(f"Ended by SIGTERM. What is {done} stays; the same command goes on.", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(line: str, file: TextIO | None = None) -> None:
    """Prints, to stdout where no file is given; one on a full disk must not end the work."""
    with suppress(OSError):
        print(line, file=file, flush=True)


def duration(seconds: float) -> str:
    """`95` → `1 min 35 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bar(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=32), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task)


def _lines(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= LOG_EVERY_S and done < total:
            left = duration((now - start) / done * (total - done))
            say(f"{what}  {done}/{total}  about {left} left")
            last = now
    say(f"{what}  {done}/{total}  {duration(time.monotonic() - start)}")
