"""Curves: what a disk does not take costs no training, and comes later if it can."""

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from umbif.errors import Transient
from umbif.progress import say
from umbif.run import _log_file
from umbif.scale.loggers import TensorBoard
from umbif.scale.metrics_csv import MetricsCSV

KEYS = ("train/loss", "train/lr")


@contextmanager
def full(num_bytes: int) -> Iterator[None]:
    """No file may become longer."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def log(logger: Any, steps: range) -> None:
    for step in steps:
        logger.log_metrics(dict.fromkeys(KEYS, step / 7), step)
        logger.log_metrics({"val/loss": float(step)}, step)
        logger.save()


def test_rows_that_a_full_disk_does_not_take_come_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    for folder in (ours, theirs):
        folder.mkdir()
    logger = MetricsCSV(ours)
    log(logger, range(5))
    with full((ours / "metrics.csv").stat().st_size + 5):  # in the middle of a row
        log(logger, range(5, 9))
    assert [record.message for record in caplog.records] == [
        "metrics.csv cannot be written: File too large. Training goes on without it"
    ]
    assert not {6, 7, 8} & {*pd.read_csv(ours / "metrics.csv")["step"]}
    log(logger, range(9, 12))
    log(MetricsCSV(theirs), range(12))
    assert (ours / "metrics.csv").read_text() == (theirs / "metrics.csv").read_text()


def test_half_a_row_is_no_row(tmp_path: Path) -> None:
    log(MetricsCSV(tmp_path), range(4))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,,0.5")
    logger = MetricsCSV(tmp_path)
    logger.go_on_from(9)
    assert pd.read_csv(tmp_path / "metrics.csv")["step"].tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # umbif.quiet
def test_tensorboard_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = TensorBoard(str(tmp_path), "tensorboard", "")
    log(logger, range(3))
    with full(next(tmp_path.rglob("*tfevents*")).stat().st_size):
        log(logger, range(3, 50))
    assert caplog.messages == ["TensorBoard cannot be written: File too large. Training goes on without it"]
    assert len([*tmp_path.rglob("*tfevents*")]) == 1  # none is made for each try
    monkeypatch.setattr(logger, "next_try_s", 0)  # a minute has passed
    log(logger, range(6, 9))
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {0, 1, 2, 6, 7, 8} <= {event.step for event in events.Scalars("train/loss")}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_what_ends_a_run_is_told_though_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = SimpleNamespace(write=Mock(side_effect=OSError(28, "No space left on device")), flush=Mock())

    def train() -> None:
        with monkeypatch.context() as full:
            full.setattr("sys.stdout", stdout)
            say("Training  step 1/2")
        logging.getLogger("umbif").info("training starts")
        raise Transient("the reason")

    with pytest.raises(Transient, match="the reason"), _log_file(Path("/dev/full")):
        train()
    assert stdout.write.called
