"""A run that is killed anywhere and started again ends with the weights of a run that was left alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations, product
from pathlib import Path
from unittest.mock import Mock

import lightning.pytorch as pl
import pandas as pd
import pytest
from small import VIT, labelled, small_recipe, small_task

from umbif.encoders.guard import Guard
from umbif.errors import Stopped, UmbifError, UsageError
from umbif.fit import fit
from umbif.recipe.compose import Recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
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


def test_every_kind_of_recipe_goes_on_bit_for_bit_wherever_it_was_killed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "chaos.py"), "--only", "paired", "--json", str(rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [tuple(row["case"].split(", ")) for row in json.loads(rows.read_text())]
    recipes, *circumstances = zip(*cases, strict=True)
    assert len({*recipes}) == 8
    for one, other in combinations(circumstances, 2):  # processes, workers, place
        assert {*zip(one, other, strict=True)} == {*product(one, other)}


def test_metrics_of_a_resumed_run_have_no_seam(corpus_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "cut"
    kill_when(start(corpus_folder, run), lambda: saved_steps(run) >= 8 and num_rows(run) > 9)
    assert start(corpus_folder, run).wait() == 0
    ours, theirs = (pd.read_csv(folder / "metrics.csv") for folder in (run, undisturbed))
    assert ours["step"].tolist() == theirs["step"].tolist()
    assert ours["train/loss"].tolist() == theirs["train/loss"].tolist()


def test_a_run_that_is_made_longer_logs_step_after_step(corpus_folder: Path, tmp_path: Path) -> None:
    for num_steps in (3, 4, 8):  # it validates every second step
        run = fit(small(corpus_folder, tmp_path, num_steps))
    assert pd.read_csv(run / "metrics.csv")["step"].tolist() == [*range(8)]


def test_a_run_goes_on_with_its_corpus_wherever_that_lies_and_with_no_other(
    corpus_folder: Path, tmp_path: Path
) -> None:
    fit(small(corpus_folder, tmp_path, 2))
    moved = shutil.copytree(corpus_folder, tmp_path / "job_2" / "corpus")
    run = fit(small(moved, tmp_path, 3))
    about = json.loads((moved / "corpus.json").read_text())
    (moved / "corpus.json").write_text(json.dumps({**about, "identity": "0" * 64}))
    with pytest.raises(UsageError, match="another corpus"):
        fit(small(moved, tmp_path, 4))
    with pytest.raises(UsageError, match="has finished with other exams"):
        fit(small(moved, tmp_path, 3))
    assert pd.read_csv(run / "metrics.csv")["step"].tolist() == [*range(3)]


def test_a_finished_run_without_checkpoints_does_not_begin_anew(corpus_folder: Path, tmp_path: Path) -> None:
    run = fit(small(corpus_folder, tmp_path, 2))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UmbifError, match="has no checkpoint to go on from"):
        fit(small(corpus_folder, tmp_path, 3))
    assert pd.read_csv(run / "metrics.csv")["step"].tolist() == [0, 1]


def test_a_run_goes_on_though_recipes_have_gained_a_key_since(corpus_folder: Path, tmp_path: Path) -> None:
    run = fit(small(corpus_folder, tmp_path, 2))
    lines = (run / "recipe.yaml").read_text().splitlines()
    kept = [line for line in lines if line.strip() != "sequences: null"]
    assert len(kept) == len(lines) - 1
    (run / "recipe.yaml").write_text("\n".join(kept))
    assert pd.read_csv(fit(small(corpus_folder, tmp_path, 3)) / "metrics.csv")["step"].tolist() == [0, 1, 2]


def test_an_encoder_is_kept_though_no_picture_of_it_can_be_drawn(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("umbif.pretrain.umbif.write_reconstruction", Mock(side_effect=UmbifError("a shard is damaged")))
    run = fit(small(corpus_folder, tmp_path, 2))
    assert (run / "encoder" / "config.json").exists()
    assert "No reconstruction was drawn: a shard is damaged" in caplog.text


def test_a_run_of_which_every_step_was_skipped_exports_nothing(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Guard, "_reason", lambda guard, norm: "the loss is not finite")
    with pytest.raises(UmbifError, match=r"All 3 steps were skipped; .*log\.txt says why\. Nothing was exported\."):
        fit(small(corpus_folder, tmp_path, 3))
    assert not list(tmp_path.rglob("encoder"))
    assert re.search(r"WARNING +Step 2: the loss is not finite; the step was skipped", capsys.readouterr().out)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(corpus_folder: Path, tmp_path: Path) -> None:
    run = fit(small(corpus_folder, tmp_path, 3))
    for state in run.glob("checkpoints/*/state.ckpt"):
        state.write_bytes(b"torn")
    with pytest.raises(UmbifError, match=r"All 1 checkpoints of .* are damaged.*give another run\.dir"):
        fit(small(corpus_folder, tmp_path, 5))
    assert pd.read_csv(run / "metrics.csv")["step"].tolist() == [0, 1, 2]


def test_a_run_that_is_interrupted_says_where_and_how_it_goes_on(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("umbif.scale.training_progress.TrainingProgress.on_train_batch_end", pressed)
    with pytest.raises(Stopped, match=r"Ended by SIGINT at step 1\. The same command goes on") as stopped:
        fit(small(corpus_folder, tmp_path, 3))
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert stopped.value.exit_code == 130


@pytest.mark.parametrize(("come", "ended"), [(2, 3), (3, 5), (6, 7), (7, 7)])  # the fourth step is one that validates
def test_a_run_that_a_scheduler_ends_loses_no_step(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, come: int, ended: int
) -> None:
    def signalled(_: object, trainer: pl.Trainer, *__: object) -> None:
        if trainer.global_step == come:
            signal.raise_signal(signal.SIGTERM)

    def recipe(folder: Path) -> Recipe:
        more = ["trainer.val_check_interval=4", "callbacks.monitors=null"]
        return small_recipe("pretrain/umbif_tiny", corpus_folder, folder, *more, max_steps=7)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr("umbif.scale.training_progress.TrainingProgress.on_train_batch_end", signalled)
        with pytest.raises(Stopped, match=rf"Ended by SIGTERM at step {ended}\. The same command goes on") as stopped:
            fit(recipe(tmp_path / "run"))
    assert stopped.value.exit_code == 143  # 0 would pass for finished work
    assert signal.getsignal(signal.SIGTERM) == before
    assert saved_steps(tmp_path / "run") == ended
    ours, theirs = fit(recipe(tmp_path / "run")), fit(recipe(tmp_path / "other"))
    assert weights(ours) == weights(theirs)
    curves = [pd.read_csv(run / "metrics.csv")["val/loss"].dropna().tolist() for run in (ours, theirs)]
    assert curves[0] == curves[1]
    assert len(curves[1]) == 1


def test_a_run_that_is_ended_while_it_predicts_goes_on_to_predict(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = labelled(tmp_path / "labels", "finetune/idh")
    vit = [f"model.encoder.{key}={value}" for key, value in VIT.items()]
    recipe = small_task("finetune/idh", corpus_folder, tmp_path / "run", labels, *vit, "trainer.max_steps=2")
    with monkeypatch.context() as patch:
        end = partial(signal.raise_signal, signal.SIGTERM)
        patch.setattr("umbif.scale.preemption.Preemption.on_predict_batch_start", lambda *_: end(), raising=False)
        with pytest.raises(Stopped, match="Ended by SIGTERM at step 2"):
            fit(recipe)
    assert not (tmp_path / "run" / "predictions.parquet").exists()
    assert (fit(recipe) / "predictions.parquet").exists()


def small(corpus: Path, folder: Path, num_steps: int) -> Recipe:
    """A run in this process, of which the cosine does not depend on its length."""
    less = ["data.num_val_exams=0", "callbacks.monitors=null", "model.max_steps=10"]
    return small_recipe("pretrain/umbif_tiny", corpus, folder / "run", *less, max_steps=num_steps)


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
    process.kill()
    process.wait()


def saved_steps(run: Path) -> int:
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step=*")), default=0)


def num_rows(run: Path) -> int:
    return len((run / "metrics.csv").read_text().splitlines()) - 1


def weights(run: Path) -> bytes:
    return (run / "encoder" / "model.safetensors").read_bytes()
