"""What befalls one process costs the steps since the last checkpoint, and the run ends as one that was left alone."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from umbif.errors import UNEXPECTED, Transient
from umbif.scale import launch, replicas, stragglers
from umbif.scale.ranks import lost
from umbif.scale.replicas import bit_sum, difference
from umbif.scale.shares import held
from umbif.scale.stragglers import Stragglers
from umbif.scale.watchdog import Beat, Watch, Watchdog, suspects

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAULTS = ("killed@1:4", "raises@0:8", "weight@1:13", "stopped@1:17")
ENDED = "terminated@1:20"  # by a scheduler
SAID = (
    "Process 1 was ended by SIGKILL, as the system does when memory runs out. All processes start again",
    "ZeroDivisionError: a fault on purpose",
    "Process 0 ended with an error, as shown above. All processes start again from step",
    "Step 15: The bits of model.encoder.registers differ between processes. Wrong: process 0 on ",
    "in a step, after step 17:",
    " does not answer: it, or its machine, has stopped.",
    "Process 0 gave up, as it says above. All processes start again from step 15.",
)


# ---------------------------------------------------------------- real processes


def test_a_run_of_two_that_four_faults_befall_ends_with_the_same_weights(corpus_folder: Path, tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    code, said = trained(corpus_folder, undisturbed, ())
    assert code == 0, said
    code, said = trained(corpus_folder, disturbed, (*FAULTS, ENDED))
    assert code == 143, said
    assert "Ended by SIGTERM at step 22. The same command goes on" in said
    code, more = trained(corpus_folder, disturbed, (*FAULTS, ENDED))
    assert code == 0, more
    assert sorted(path.name for path in (disturbed / ".faults").iterdir()) == sorted((*FAULTS, ENDED))
    weights, expected = ((run / "encoder" / "model.safetensors").read_bytes() for run in (disturbed, undisturbed))
    assert weights == expected
    at = [said.find(line) for line in SAID]
    assert -1 not in at
    assert at == sorted(at)
    assert not list((disturbed / ".alive").iterdir())
    starts = [json.loads(line)["step"] for line in (disturbed / "starts.jsonl").read_text().splitlines()]
    assert starts[:1] + starts[3:] == [0, 12, 15, 22]
    goodput = [pd.read_csv(run / "metrics.csv")["throughput/goodput"].iloc[-1] for run in (disturbed, undisturbed)]
    assert 0 < goodput[0] < goodput[1] <= 1


def trained(corpus: Path, run_dir: Path, faults: Sequence[str]) -> tuple[int, str]:
    """Two processes, each with one that reads: their exit code, and what they said."""
    overrides = [
        "hardware=cpu_ddp", f"data.corpus={corpus}", f"run.dir={run_dir}", "data.global_batch_size=4",
        "data.crop_size=[16,16,16]", "data.num_workers=1", "data.num_val_exams=0", "model.masking.num_visible=8",
        "model.masking.num_targets=8", "model.warmup_steps=3", "trainer.max_steps=24", "trainer.log_every_n_steps=1",
        "callbacks.checkpoint.every_n_steps=3", "callbacks.monitors=null",
        "callbacks.watchdog.watchdog_s=5", "callbacks.faults.class_path=_faults.Faults",
        f"callbacks.faults.plan=[{','.join(map(repr, faults))}]",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    command = [sys.executable, "-m", "umbif", "fit", "pretrain/umbif_tiny", *overrides]
    joined = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=environment, text=True, timeout=400, check=False, **joined)
    return done.returncode, done.stdout


# ---------------------------------------------------------------- starting again


def fell(code: int, rank: int = 0, at: int = 0) -> SimpleNamespace:
    return SimpleNamespace(exitcode=code, local_rank=rank, timestamp=at)


@pytest.mark.parametrize(
    ("codes", "answer"),
    [
        ((2, 2), 2), ((2, -15), 2), ((1, -9), 1), ((1, 143), 1), ((1, 75), 1), ((143, 143), 143), ((130, -15), 130),
        ((143, 75), 143), ((-9, 75), None), ((70, -15), None), ((70, 143), None), ((-11, 1), None), ((75, 75), None),
    ],
)  # fmt: skip
def test_what_was_refused_or_told_to_end_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, int], answer: int | None
) -> None:
    runs = iter([[fell(code, rank) for rank, code in enumerate(codes)], []])  # the second time, all goes well
    monkeypatch.setattr(launch, "_run_once", lambda *_: next(runs))
    if answer is None:
        launch.launch(["fit"], 2, tmp_path, restarts=3)
        return
    with pytest.raises(SystemExit) as ended:
        launch.launch(["fit"], 2, tmp_path, restarts=3)
    assert ended.value.code == answer


def test_a_run_that_makes_no_progress_is_given_up_and_one_that_does_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starts: list[int] = []

    def falls(*_: object) -> list[SimpleNamespace]:
        starts.append(len(starts))
        if len(starts) < 5:
            (tmp_path / "checkpoints" / f"step={len(starts):06d}").mkdir(parents=True)
        return [fell(-9, rank=1), fell(Transient.exit_code, rank=0)]

    monkeypatch.setattr(launch, "_run_once", falls)
    with pytest.raises(Transient, match=r"by SIGKILL, .*, as 2 times before without a new checkpoint"):
        launch.launch(["fit"], 2, tmp_path, restarts=2)
    assert len(starts) == 4 + 1 + 2
    assert "All processes start again from step 4." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failed", "said"),
    [
        ([fell(-15, 0), fell(-11, 1)], "Process 1 was ended by SIGSEGV"),
        ([fell(Transient.exit_code, 0), fell(-6, 1)], "Process 1 was ended by SIGABRT"),
        ([fell(UNEXPECTED, 1, at=1), fell(-9, 0, at=2)], "Process 1 ended with an error, as shown above"),
        ([fell(3, 1)], "Process 1 ended with exit code 3"),
    ],
)
def test_the_process_that_fell_first_is_named_and_not_those_that_followed(failed: list[object], said: str) -> None:
    assert launch._ended(failed) == said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words", ["[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:31850", "ncclRemoteError: A"]
)
def test_a_lost_connection_is_told_from_an_error_of_the_work(words: str) -> None:
    found = lost(RuntimeError(words))
    assert found is not None
    assert found.exit_code == Transient.exit_code
    assert lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


# ---------------------------------------------------------------- who is behind, who is wrong


def test_a_process_that_is_silent_is_suspected_before_one_that_is_behind() -> None:
    before = {0: Beat(5, 7, "a step", "a"), 1: Beat(5, 7, "a step", "b"), 2: Beat(3, 6, "a save", "c")}
    now = {0: Beat(6, 7, "a step", "a"), 1: Beat(6, 7, "a step", "b"), 2: Beat(3, 6, "a save", "c")}
    assert [*suspects(before, now)] == ["Process 2 on c does not answer: it, or its machine, has stopped."]
    now[2] = Beat(4, 6, "a save", "c")
    assert [*suspects(before, now)] == ["Process 2 on c is behind, in a save."]
    now[2] = Beat(4, 7, "a step", "c")
    assert not [*suspects(before, now)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_any_flipped_bit_changes_the_sum(dtype: torch.dtype) -> None:
    tensor = (10 * torch.randn(5, 7)).to(dtype)
    raw = tensor.view(torch.uint8)
    expected = bit_sum(tensor)
    for bit in range(1 if dtype == torch.bool else 8):
        raw[2, 3] ^= 1 << bit
        assert bit_sum(tensor) != expected
        raw[2, 3] ^= 1 << bit
    assert bit_sum(tensor) == expected


def test_of_three_processes_the_one_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_others(mine: tuple[torch.Tensor, str]) -> list[tuple[torch.Tensor, str]]:
        wrong = mine[0].clone()
        wrong[1] += 1
        return [(mine[0], "a"), (wrong, "b"), (mine[0], "c")]

    monkeypatch.setattr(replicas, "all_gather", of_others)
    shares = [held("model.a", torch.ones(3)), held("model.b", torch.ones(2, 2))]
    assert difference(shares) == "The bits of model.b differ between processes. Wrong: process 1 on b."


def test_a_process_that_is_slow_is_named_with_its_machine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    others = {"all_gather": lambda mine: [(0.1, "a"), (0.11, "b"), (0.3, "c")], "num_ranks": lambda: 3}
    for name, value in others.items():
        monkeypatch.setattr(stragglers, name, value)
    module = SimpleNamespace(encoder=torch.nn.Linear(2, 2), log=lambda name, value: logged.append((name, value)))
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(in_shards=False), global_step=10, log_every_n_steps=10, is_global_zero=True
    )
    logged: list[tuple[str, float]] = []
    callback = Stragglers()
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    module.encoder.eval()(torch.ones(1, 2))
    callback.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
    assert logged == []  # what monitors encode is no training
    module.encoder.train()(torch.ones(1, 2))
    for _ in range(2):  # micro-steps of one step
        callback.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
    assert logged == [("throughput/slowest", pytest.approx(0.3 / 0.11))]
    assert "Process 2 on c is slow: 2.7 times the median" in caplog.text


def test_a_process_tells_that_it_lives_before_its_first_beat(tmp_path: Path) -> None:
    watch = Watch(tmp_path, limit_s=1000)  # a beat every hundred seconds
    assert json.loads((tmp_path / ".alive" / "process-00000.json").read_text())[0] == 0
    watch.end()
    assert not [*(tmp_path / ".alive").iterdir()]


def test_a_disk_that_keeps_a_beat_waiting_does_not_keep_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = threading.Event()
    monkeypatch.setattr(Watch, "_give_up", lambda _: given_up.set())
    watch = Watch(tmp_path, limit_s=0.2)
    monkeypatch.setattr(watch, "_tell", lambda _: watch.ended.wait())
    watch.moved(7, "a step")
    assert given_up.wait(10)
    watch.end()


def test_a_run_that_goes_on_after_all_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("faulthandler.dump_traceback", lambda _: watch.moved(8, "a step", patience=100))
    watch = Watch(tmp_path, limit_s=0.2)
    watch.moved(7, "a step")
    time.sleep(0.6)  # as of a process that a person has stopped for a while
    watch.end()
    assert "has waited 0 s or more in a step, after step 7" in capsys.readouterr().err
    assert ended == []


def test_a_run_that_ends_with_an_error_is_watched_no_more(tmp_path: Path) -> None:
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), global_step=0)
    watchdog = Watchdog(watchdog_s=0.2)
    watchdog.on_train_start(trainer, None)  # type: ignore[arg-type]
    watchdog.on_exception(trainer, None, RuntimeError())  # type: ignore[arg-type]
    assert watchdog.watch is not None
    assert watchdog.watch.ended.is_set()
