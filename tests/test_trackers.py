"""Weights & Biases and MLflow: curves and values of a recipe, and nothing that names a person or a place."""

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from lightning.pytorch.loggers.logger import Logger
from small import small_recipe

from umbif.errors import UsageError
from umbif.fit import fit
from umbif.recipe.compose import Recipe
from umbif.scale import trackers
from umbif.scale.loggers import Spared

FIRST, STEPS, USER = 3, 5, "alice_q7"
TELLS = ("WANDB_NAME", "MLFLOW_TRACKING_URI", "WANDB_NOTES")  # of somebody's shell
SECRETS = ("secret_1", "secret_2")
UNTOLD = ("CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS")  # for which MLflow keeps silent anyway


@pytest.fixture(scope="module")
def runs(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run that was gone on with, and which addresses its first start has called."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    folder, before = tmp_path_factory.mktemp("tracked"), dict(os.environ)
    trace, file = folder / "trace", folder / "recipe.yaml"
    file.write_text(tracked(corpus_folder, folder, FIRST).to_yaml())
    shell = {name: value for name, value in os.environ.items() if name not in UNTOLD}
    shell |= dict.fromkeys(TELLS, "http://127.0.0.1:9/secret") | dict.fromkeys(("LOGNAME", "USER"), USER)
    shell |= {"HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    for place, name in zip((folder / "home" / ".config", folder), SECRETS, strict=True):  # of the user, of a project
        (place / "wandb").mkdir(parents=True)
        (place / "wandb" / "settings").write_text(f"[default]\nentity = {name}\n")
    watch = ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect", "-o", str(trace)] if shutil.which("strace") else []
    command = [*watch, sys.executable, "-m", "umbif", "fit", str(file)]
    subprocess.run(command, env=shell, cwd=folder, check=True, timeout=200)
    fit(tracked(corpus_folder, folder, STEPS))
    yield folder / "run", trace.read_text() if watch else ""
    os.environ.clear()
    os.environ.update(before)


def tracked(corpus: Path, folder: Path, num_steps: int) -> Recipe:
    less = ["tracker=wandb", "callbacks.monitors=null", "data.num_val_exams=0", "model.max_steps=9"]
    less.append("callbacks.mlflow.class_path=umbif.scale.trackers.MLflow")
    return small_recipe("pretrain/umbif_tiny", corpus, folder / "run", *less, max_steps=num_steps)


def expected(run: Path) -> list[float]:
    found = pd.read_csv(run / "metrics.csv")["train/loss"].tolist()
    assert len(found) == STEPS
    return found


def test_mlflow_has_the_curves_of_both_starts_as_one_run(runs: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    run, _ = runs
    client = MlflowClient(f"file:{run}/mlflow")
    (experiment,) = client.search_experiments()
    (found,) = client.search_runs([experiment.experiment_id])
    history = sorted(client.get_metric_history(found.info.run_id, "train/loss"), key=lambda metric: metric.step)
    assert [metric.step for metric in history] == [*range(STEPS)]
    assert [metric.value for metric in history] == pytest.approx(expected(run), rel=1e-5)
    assert found.info.status == "FINISHED"
    assert found.data.params["model.max_steps"] == "9"
    assert found.data.tags == {"mlflow.runName": "run"}


def test_so_has_wandb(runs: tuple[Path, str]) -> None:
    run, _ = runs
    parts = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len({part.name for part in parts}) == 1  # the same run, twice
    rows = [row for part in parts for row in history_of(part)]
    for step in ("_step", "trainer/global_step"):
        assert [int(row[step]) for row in rows if "train/loss" in row] == [*range(STEPS)]
    losses = [float(row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == pytest.approx(expected(run), rel=1e-5)


def test_nothing_names_user_machine_or_place(runs: tuple[Path, str]) -> None:
    run, _ = runs
    names = [*SECRETS, "/secret", USER, str(run.parent), socket.gethostname(), str(Path.home()), str(Path.cwd())]
    files = [path for place in ("wandb", "mlflow") for path in (run / place).rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert not [name for name in names if name.encode() in content], path


def test_nothing_leaves_the_machine(runs: tuple[Path, str]) -> None:
    _, trace = runs
    if not trace:
        pytest.skip("strace is not installed: what is called is not seen")
    assert "AF_UNIX" in trace  # W&B's own process
    assert "AF_INET" not in trace


def test_values_that_may_be_places_are_not_shown() -> None:
    data = {"corpus": "of_mueller", "labels": "charite.csv", "crop_size": [96, 96, 96], "seed": 3}
    model = {"encoder": {"weights": "mine", "depth": 12}, "file": "/a/b"}
    found = trackers.shown({"recipe": {"model": model, "data": data, "run": {"dir": "runs"}}})
    assert found == {"model.encoder.depth": 12, "data.crop_size": [96, 96, 96], "data.seed": 3}


def test_a_run_leaves_the_variables_of_a_process_as_they_were(runs: tuple[Path, str]) -> None:
    assert not [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]


def test_a_server_that_is_away_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = trackers.MLflow(tracking_uri="http://127.0.0.1:9")
    strategy = SimpleNamespace(about={})
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path), strategy=strategy, loggers=[])
    tracker.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert trainer.loggers == []
    assert "MLflow cannot begin: " in caplog.text
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_one_that_fails_costs_no_training(caplog: pytest.LogCaptureFixture) -> None:
    class Lost(Spared, Logger):
        called, failures, name, version = "It", (Exception,), "", ""

        def log_hyperparams(self, *_: Any) -> None: ...

        def log_metrics(self, *_: Any) -> None:
            self.spare(self._send)

        def _send(self) -> None:
            raise ConnectionResetError(104, "Connection reset by peer")

    lost = Lost()
    for _ in range(3):
        lost.log_metrics({}, 1)
    assert caplog.messages == ["It cannot be written: Connection reset by peer. Training goes on without it"]


@pytest.mark.parametrize(("tracker", "package"), [(trackers.WandB, "wandb"), (trackers.MLflow, "mlflow")])
def test_a_package_that_is_missing_is_told_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tracker: Any, package: str
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=rf"pip install 'umbif\[{package}\]'\), or set callbacks\.{package}=null"):
        tracker()


def history_of(path: Path) -> Iterator[dict[str, str]]:
    """What W&B has written of each step."""
    from wandb.proto.wandb_internal_pb2 import Record

    for content in records_of(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.HasField("history"):
            yield {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def records_of(content: bytes, block: int = 1 << 15, header: int = 7) -> Iterator[bytes]:
    """Of a log as LevelDB writes it: pieces with checksum, length and kind, none of them over the edge of a block."""
    at, record = header, b""  # W&B's own mark comes first
    while at + header <= len(content):
        length, kind = struct.unpack_from("<xxxxHB", content, at)
        if block - at % block < header or kind == 0:
            at += block - at % block
            continue
        record += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""
