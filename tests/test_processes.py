"""Work in processes that may die: one item is lost at most, the others are done once, and nothing goes on for ever."""

import os
from functools import partial
from pathlib import Path

import pytest

from umbif.corpus.processes import each
from umbif.errors import UmbifError


def dies_of_three(item: int) -> int:
    if item == 3:
        os._exit(9)
    return item * 10


def dies_once(item: int, mark: Path) -> int:
    if item == 3 and not mark.exists():
        mark.touch()
        os._exit(9)
    return item * 10


def refused_three(item: int) -> int:
    if item == 3:
        raise MemoryError
    return item * 10


def cannot_begin() -> None:
    raise OSError("no library")


def no_result(item: int) -> int:
    return -item


@pytest.mark.parametrize(("work", "num_workers"), [(dies_of_three, 2), (refused_three, 2), (refused_three, 0)])
def test_an_item_that_does_not_fit_costs_itself_alone(work, num_workers, caplog):
    results = sorted(each(work, range(7), num_workers, no_result))
    assert results == [(0, 0), (1, 10), (2, 20), (3, -3), (4, 40), (5, 50), (6, 60)]
    assert caplog.text == ""


def test_the_last_item_does_not_take_this_process_with_it():
    assert list(each(dies_of_three, [3], 1, no_result)) == [(3, -3)]


def test_where_each_item_fits_alone_all_are_done_by_fewer_processes(tmp_path, caplog):
    results = sorted(each(partial(dies_once, mark=tmp_path / "died"), range(7), 2, no_result))
    assert results == [(item, item * 10) for item in range(7)]
    assert "going on with --workers 1" in caplog.text


def test_an_error_of_the_work_is_raised():
    with pytest.raises(TypeError):
        list(each(dies_of_three, [None], 1, no_result))


@pytest.mark.parametrize("items", [[3], range(4)])
def test_where_no_process_can_begin_no_item_is_set_aside_for_it(items):
    done = []
    with pytest.raises(UmbifError, match="No process could work"):
        done.extend(each(dies_of_three, items, 2, no_result, cannot_begin))
    assert not done
