"""Work on many items in processes that may die: a death costs the item that caused it, and no other."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context
from typing import TypeVar

from umbif.errors import UmbifError

Item = TypeVar("Item")
Result = TypeVar("Result")
TOO_MUCH = (BrokenProcessPool, MemoryError)  # how an item ends that does not fit: the system kills, or refuses
CANNOT_BEGIN = (
    "No process could work: each died before it had anything to do. What it said stands above. Try one process alone "
    '(--workers 0); a script of your own starts the work below `if __name__ == "__main__":`.'
)
log = logging.getLogger("umbif")


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int,
    crashed: Callable[[Item], Result],
    begin: Callable[[], object] | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Every item with its result, in the order of completion.

    Items that were under way when a process died are tried again, each alone. Where all of them pass so, it was their
    sum that did not fit, and half as many processes go on.

    Args:
        work: What is done to an item; other processes must be able to import it.
        items: Few of them are under way at a time, so memory stays bounded.
        num_workers: Processes; 0 works in this one.
        crashed: Result of an item whose process died though it was alone.
        begin: What each process does first.

    Raises:
        UmbifError: Processes die before they have any item.
    """
    if num_workers == 0:
        yield from ((item, _here(work, item, crashed)) for item in items)
        return
    todo = [*reversed(items)]
    can_work = False  # as far as is known
    while todo:
        suspects: list[Item] = []
        with _pool(num_workers, begin) as pool:
            for done in _until_one_dies(pool, work, todo, suspects, num_workers):
                can_work = True
                yield done
        num_died = 0
        for suspect in suspects:
            result, died = _alone(work, suspect, crashed, begin)
            if died and not can_work:
                _check_begin(work, begin)
            can_work = True
            num_died += died
            yield suspect, result
        if suspects and not num_died:
            num_workers = max(1, num_workers // 2)
            log.warning("A process died, though each item fits alone: going on with --workers %d", num_workers)


def _until_one_dies(
    pool: ProcessPoolExecutor, work: Callable[[Item], Result], todo: list[Item], suspects: list[Item], num_workers: int
) -> Iterator[tuple[Item, Result]]:
    """Takes from `todo` until it is empty or a process dies; then the items that were under way are in `suspects`."""
    running: dict[Future[Result], Item] = {}
    while (todo and not suspects) or running:
        while todo and not suspects and len(running) < num_workers:
            item = todo.pop()
            try:
                running[pool.submit(work, item)] = item
            except BrokenProcessPool:
                suspects.append(item)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            item = running.pop(future)
            try:
                result = future.result()
            except TOO_MUCH:
                suspects.append(item)
            else:
                yield item, result


def _here(work: Callable[[Item], Result], item: Item, crashed: Callable[[Item], Result]) -> Result:
    try:
        return work(item)
    except MemoryError:
        return crashed(item)


def _alone(
    work: Callable[[Item], Result], item: Item, crashed: Callable[[Item], Result], begin: Callable[[], object] | None
) -> tuple[Result, bool]:
    """The result, and whether the process died."""
    with _pool(1, begin) as pool:
        try:
            return pool.submit(work, item).result(), False
        except TOO_MUCH:
            return crashed(item), True


def _check_begin(work: Callable[[Item], Result], begin: Callable[[], object] | None) -> None:
    """Lets a process begin and do nothing: if it dies of that too, no item is to blame."""
    with _pool(1, begin) as pool:
        try:
            pool.submit(_nothing, work).result()
        except TOO_MUCH:
            raise UmbifError(CANNOT_BEGIN) from None


def _nothing(work: object) -> None:
    """To be sent what is to be done is enough: it is imported."""


@contextmanager
def _pool(num_workers: int, begin: Callable[[], object] | None) -> Iterator[ProcessPoolExecutor]:
    """Never forked: a process that has started threads cannot be copied safely."""
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(num_workers, get_context(method), _calmly, (begin,))
    ended = False
    try:
        yield pool
        ended = True
    finally:
        pool.shutdown(wait=ended, cancel_futures=True)  # where the work was ended, nobody waits for what is under way


def _calmly(begin: Callable[[], object] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all processes; the first one answers
    if begin is not None:
        begin()
