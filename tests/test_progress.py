"""Progress of long work, as a log file sees it."""

import pytest

from umbif.progress import duration, track


def test_work_is_passed_on_and_summed_up_in_one_line(capsys):
    assert list(track(iter("abc"), "Reading", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == "Reading  3/3  0 s\n"


def test_of_no_work_nothing_is_said(capsys):
    assert list(track(iter(()), "Reading", 0)) == []
    assert capsys.readouterr().out == ""


def test_long_work_says_how_long_it_still_takes(capsys, monkeypatch):
    monkeypatch.setattr("umbif.progress.LOG_EVERY_S", 0.0)
    list(track(range(3), "Reading", 3))
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize(("seconds", "said"), [
    (9.6, "10 s"), (95, "1 min 35 s"), (3599.6, "1 h 0 min"), (7260, "2 h 1 min"),
])
def test_a_duration_is_said_in_two_units(seconds, said):
    assert duration(seconds) == said
