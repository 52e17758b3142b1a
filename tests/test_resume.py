"""A run that is killed anywhere and started again ends with the weights of a run that was left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

STEPS = 24


@pytest.fixture(scope="module")
def undisturbed(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert start(corpus_folder, run).wait() == 0
    return run


def test_killed_in_a_step_and_in_a_save_ends_bit_for_bit_the_same(
    corpus_folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    kill_when(start(corpus_folder, run), lambda: saved_steps(run) >= 4)
    assert saved_steps(run) < STEPS
    kill_when(start(corpus_folder, run), lambda: any(run.glob("checkpoints/.*.writing/state.ckpt")))
    leftovers = list(run.glob("checkpoints/.*.writing"))
    assert leftovers, "the kill missed the save"
    assert start(corpus_folder, run).wait() == 0
    assert weights(run) == weights(undisturbed)
    assert not list(run.glob("checkpoints/.*.writing"))


def test_metrics_of_a_resumed_run_have_no_seam(corpus_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "cut"
    kill_when(start(corpus_folder, run), lambda: saved_steps(run) >= 8 and num_rows(run) > 9)
    assert start(corpus_folder, run).wait() == 0
    ours, theirs = (pd.read_csv(folder / "metrics.csv") for folder in (run, undisturbed))
    assert ours["step"].tolist() == theirs["step"].tolist()
    assert ours["train/loss"].tolist() == theirs["train/loss"].tolist()


def start(corpus: Path, run: Path) -> "subprocess.Popen[bytes]":
    overrides = [
        f"data.corpus={corpus}", f"run.dir={run}", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1",
        "callbacks.checkpoint.every_n_steps=2", "data.global_batch_size=4", "data.crop_size=[16,16,16]",
        "data.num_workers=0", "data.num_val_exams=0", "model.masking.num_visible=8", "model.masking.num_targets=8",
        "trainer.accumulate_grad_batches=2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "umbif", "fit", "pretrain/umbif_tiny", *overrides]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def kill_when(process: "subprocess.Popen[bytes]", happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.poll() is None, "the run ended before the kill"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def saved_steps(run: Path) -> int:
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step=*")), default=0)


def num_rows(run: Path) -> int:
    return len((run / "metrics.csv").read_text().splitlines()) - 1


def weights(run: Path) -> bytes:
    return (run / "encoder" / "model.safetensors").read_bytes()
