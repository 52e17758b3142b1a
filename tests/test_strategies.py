"""The same losses however weights lie over processes, and checkpoints that go on under any number of them."""

import json
import math
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small import labelled
from strategy_ranks import ACCUMULATED, Job, run

from umbif.agreement import norm_problems
from umbif.encoders.cnn import CNN3D
from umbif.recipe.check import check
from umbif.recipe.compose import compose
from umbif.scale.choice import strategy_problems
from umbif.scale.shares import Share, held, to_write
from umbif.scale.strategies import DDP
from umbif.scale.tensor_file import ShareFiles, write_shares

OFFLOADED = ("deepspeed_stage_2_offload", "deepspeed_stage_3_offload")
STRATEGIES = ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
WIDELY, TASKED = ("ddp", "fsdp2"), ("fsdp2", "deepspeed_stage_3")  # of other methods, of a task
OPTIONED = ("fsdp2", "deepspeed_stage_2")
METHODS = ("mae", "simclr", "ssl_cerebral")
STEPS, STEPS_ON_THREE, STEPS_ALONE, SHORT, DROPPED = 10, 12, 14, 4, 2
TOLERANCE = 1e-5


# ---------------------------------------------------------------- which process holds what


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_what_all_hold_is_written_once_and_in_equal_parts(num_ranks: int) -> None:
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.tensor(5), "c": torch.arange(14).view(7, 2)}
    written = {name: torch.zeros(tensor.numel(), dtype=torch.int64) for name, tensor in tensors.items()}
    sizes = []
    for rank in range(num_ranks):
        mine = to_write([held(name, tensor) for name, tensor in tensors.items()], rank, num_ranks)
        sizes.append(sum(share.num for share in mine))
        for share in mine:
            assert torch.equal(share.flat(), tensors[share.name].view(-1)[share.start : share.start + share.num])
            written[share.name][share.start : share.start + share.num] += 1
    assert all((count == 1).all() for count in written.values())
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_readers", [1, 2, 4])
def test_parts_are_read_by_whoever_needs_others(tmp_path: Path, num_readers: int) -> None:
    whole = torch.randn(7, 3, dtype=torch.float64)
    cuts = (0, 4, 5, 21)
    paths = [tmp_path / f"{start}.safetensors" for start in cuts[:-1]]
    for path, start, end in zip(paths, cuts[:-1], cuts[1:], strict=True):
        write_shares(path, [Share("w", (7, 3), start, whole.view(-1)[start:end], everywhere=False)])
    files, found = ShareFiles(paths), torch.zeros(21, dtype=torch.float64)
    for i in range(num_readers):
        start, end = 21 * i // num_readers, 21 * (i + 1) // num_readers
        files.fill(Share("w", (7, 3), start, found[start:end], everywhere=False))
    assert torch.equal(found, whole.view(-1))
    with pytest.raises(ValueError, match="w lacks 1 of its elements"):
        ShareFiles([paths[0], paths[2]]).fill(held("w", torch.empty(7, 3, dtype=torch.float64)))


def test_a_file_of_one_process_is_what_any_reader_of_safetensors_takes(tmp_path: Path) -> None:
    tensors = {"whole": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "flag": torch.tensor([True, False, True])}
    write_shares(tmp_path / "a.safetensors", [held(name, tensor) for name, tensor in tensors.items()])
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# ---------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def runs(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, of two, and then what three and one made of those of two."""
    folder = tmp_path_factory.mktemp("runs")
    others = [*STRATEGIES[1:], STRATEGIES[0]]  # each goes on with what another has written
    of_two = [hybrid(folder / strategy, strategy, STEPS) for strategy in STRATEGIES]
    of_two += [hybrid(folder / strategy, strategy, SHORT) for strategy in OFFLOADED]
    of_two += [other(folder, strategy, name) for name in METHODS for strategy in WIDELY]
    of_two += [task(folder, strategy) for strategy in TASKED]
    of_two += [with_options(folder, strategy) for strategy in OPTIONED]
    in_processes(2, of_two, corpus_folder)
    of_three = [hybrid(folder / was, now, STEPS_ON_THREE) for was, now in zip(STRATEGIES, others, strict=True)]
    in_processes(3, of_three, corpus_folder)
    alone = [hybrid(folder / name, "auto", STEPS_ALONE) for name in ("alone", *STRATEGIES)]
    alone += [other(folder, "alone", name) for name in METHODS]
    run([*alone, task(folder, "alone"), with_options(folder, "alone")], corpus_folder, 1)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_and_gradients_are_those_of_one_process(runs: Path, strategy: str) -> None:
    expected, found = (losses(runs / name)[: STEPS * ACCUMULATED] for name in ("alone", strategy))
    assert len(found) == STEPS * ACCUMULATED
    assert found == pytest.approx(expected, rel=TOLERANCE, nan_ok=True)
    assert [math.isnan(loss) for loss in found].count(True) == ACCUMULATED  # of a step that was dropped


@pytest.mark.parametrize("strategy", OFFLOADED)
def test_so_are_those_with_moments_in_the_memory_of_the_machine(runs: Path, strategy: str) -> None:
    expected = losses(runs / "alone")[: SHORT * ACCUMULATED]
    assert losses(runs / strategy) == pytest.approx(expected, rel=TOLERANCE, nan_ok=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", WIDELY)
def test_so_are_those_of_other_methods(runs: Path, strategy: str, method: str) -> None:
    expected, found = (losses(runs / f"{name}_{method}") for name in ("alone", strategy))
    assert len(found) == SHORT * ACCUMULATED
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", OPTIONED)
def test_so_are_those_with_moving_average_queue_recomputed_blocks_and_half_precision(runs: Path, strategy: str) -> None:
    expected, found = (losses(runs / f"{name}_options") for name in ("alone", strategy))
    assert found == pytest.approx(expected, rel=1e-3)  # sums of halves of a batch are rounded otherwise
    assert found != pytest.approx(losses(runs / "alone")[: len(found)], rel=1e-3)


@pytest.mark.parametrize("strategy", TASKED)
def test_so_are_those_of_a_task_and_what_it_predicts(runs: Path, strategy: str) -> None:
    expected, found = (losses(runs / f"{name}_task") for name in ("alone", strategy))
    assert found == pytest.approx(expected, rel=TOLERANCE)
    ours, theirs = (pd.read_parquet(runs / f"{name}_task" / "predictions.parquet") for name in (strategy, "alone"))
    assert ours["exam"].tolist() == theirs["exam"].tolist()
    assert ours["score"].tolist() == pytest.approx(theirs["score"].tolist(), rel=1e-4)
    logged = [pd.read_csv(runs / f"{name}_task" / "metrics.csv") for name in (strategy, "alone")]
    for column in ("train/gradient_norm", "val/loss", "val/auc"):
        assert logged[0][column].dropna().tolist() == pytest.approx(logged[1][column].dropna().tolist(), rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_of_two_goes_on_with_three_and_another_strategy_and_then_alone(runs: Path, strategy: str) -> None:
    expected, found = losses(runs / "alone"), losses(runs / strategy)
    assert len(found) == STEPS_ALONE * ACCUMULATED
    assert found == pytest.approx(expected, rel=TOLERANCE, nan_ok=True)
    ours, theirs = encoder(runs / strategy), encoder(runs / "alone")
    squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in theirs]
    apart, size = (torch.stack(parts).sum().sqrt() for parts in zip(*squares, strict=True))
    assert apart < TOLERANCE * size  # the bias of keys gets no gradient but noise, and AdamW steps on it like on others


def test_a_checkpoint_says_what_it_is_of(runs: Path) -> None:
    about = json.loads((runs / "fsdp2" / "checkpoints" / f"step={STEPS_ON_THREE:06d}" / "complete.json").read_text())
    assert about["step"] == STEPS_ON_THREE
    assert about["num_processes"] == 3
    assert about["recipe"]["trainer"]["strategy"] == "deepspeed_stage_1"
    assert {"corpus", "umbif", "libraries"} <= about.keys()


@pytest.mark.parametrize(
    ("strategy", "told"),
    [("ddp", None), ("fsdp2", "weights and moments"), ("deepspeed_stage_2", "weights and moments")],
)
def test_what_no_comparison_of_processes_can_find_is_told(runs: Path, strategy: str, told: str | None) -> None:
    said = (runs / f"{strategy}_mae" if strategy in WIDELY else runs / "deepspeed_stage_2_options").joinpath("log.txt")
    lines = [line.partition("not compared between processes")[2] for line in said.read_text().splitlines()]
    assert [line for line in lines if line] == ([f", as each has a part of them: {told}"] if told else [])


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("trainer", "model", "said"),
    [
        ({"strategy": "fsdp"}, {}, "got fsdp. FSDP2 is offered, which is called fsdp2"),
        ({"strategy": "ddp_spawn"}, {}, "got ddp_spawn. Valid: auto, ddp, "),
        ({"strategy": "deepspeed_stage3"}, {}, "Did you mean deepspeed_stage_3?"),
        ({"strategy": SimpleNamespace()}, {}, "or umbif.scale.strategies.DDP with options"),
        ({"strategy": "deepspeed_stage_3"}, {"average": object()}, "Set model.ema_decay=null, or trainer.strat"),
        ({"strategy": "deepspeed_stage_3_offload"}, {"compile_backend": "inductor"}, "Set model.compile_backend=null"),
        ({"strategy": "fsdp2"}, {"encoder": SimpleNamespace(can_mask=False)}, "Set trainer.strategy=ddp"),
        ({"strategy": DDP(static_graph=True), "accumulate_grad_batches": 2}, {}, "static_graph=true does not go with"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_cure(
    trainer: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    model = {"encoder": SimpleNamespace(can_mask=True), **model}
    problems = [str(problem) for problem in strategy_problems(trainer, SimpleNamespace(**model))]
    assert any(said in problem for problem in problems), problems


def test_rows_of_weights_on_cpus_are_refused_to_a_torch_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.Stream", type("Stream", (), {}))  # as of torch 2.6
    model = SimpleNamespace(encoder=SimpleNamespace(can_mask=True))
    problems = [str(one) for one in strategy_problems({"strategy": "fsdp2", "accelerator": "cpu"}, model)]
    assert problems == [
        f"trainer.strategy=fsdp2 needs a newer torch on CPUs: got {torch.__version__}. "
        "Update it, or set trainer.strategy=ddp"
    ]
    assert not [*strategy_problems({"strategy": "fsdp2", "accelerator": "cuda"}, model)]


@pytest.mark.parametrize(
    ("norm", "trainer", "num_problems"),
    [
        ("batch", {"accelerator": "cpu", "devices": 2}, 1), ("batch", {"accelerator": "cpu", "devices": 1}, 0),
        ("batch", {"accelerator": "cpu", "devices": 2, "sync_batchnorm": True}, 1),
        ("batch", {"accelerator": "cuda", "devices": 2, "sync_batchnorm": True}, 0),
        ("group", {"accelerator": "cpu", "devices": 2}, 0),
    ],
)  # fmt: skip
def test_batch_norm_that_would_differ_between_processes_is_refused(
    norm: Any, trainer: dict[str, Any], num_problems: int
) -> None:
    built = SimpleNamespace(trainer_args=trainer, model=CNN3D("resnet50", norm=norm))
    problems = [*norm_problems(built)]  # type: ignore[arg-type]
    assert len(problems) == num_problems
    built.model.requires_grad_(False)
    assert not [*norm_problems(built)]  # type: ignore[arg-type]


def test_options_of_ddp_reach_it() -> None:
    found = DDP(gradient_as_bucket_view=True, timeout_s=90)
    assert found._ddp_kwargs["gradient_as_bucket_view"]
    assert found._ddp_kwargs["bucket_cap_mb"] is None  # torch's own, with a smaller first one
    assert found._timeout == timedelta(seconds=90)


OPTIONS = "trainer.strategy.class_path=umbif.scale.strategies.DDP"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.accumulate_grad_batches=0", "trainer.num_nodes=0"], "num_nodes: expected at least 1: got 0"),
        (["trainer.accumulate_grad_batches=-2"], "accumulate_grad_batches: expected at least 1: got -2"),
        ([OPTIONS, "trainer.strategy.bucket_cap_mb=many"], "bucket_cap_mb: expected int or null: got 'many'"),
        ([OPTIONS, "trainer.strategy.find_unused=true"], "Did you mean find_unused_parameters?"),
        (["trainer.strategy.class_path=umbif.scale.strategies.DPP"], "Did you mean DDP?"),
        (["trainer.strategy=[ddp]"], "trainer.strategy: expected class_path and its arguments"),
        (["callbacks.watchdog.watchdog_s=0"], "watchdog_s: expected more than 0: got 0"),
        (["run.restarts=-1"], "run.restarts: expected at least 0: got -1"),
    ],
)
def test_values_that_nothing_can_be_made_of_are_refused_before_anything_is_built(
    overrides: list[str], said: str
) -> None:
    problems = [str(problem) for problem in check(compose("pretrain/umbif_tiny", ["data.corpus=c", *overrides]))]
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("strategy", [None, "auto", *STRATEGIES, DDP(static_graph=True)])
def test_what_goes_together_is_not(strategy: Any) -> None:
    pytest.importorskip("deepspeed")
    model = SimpleNamespace(encoder=SimpleNamespace(can_mask=True))
    assert not [*strategy_problems({"strategy": strategy}, model)]


def hybrid(run_dir: Path, strategy: str, num_steps: int) -> Job:
    more = ["model.max_steps=20", f"trainer.strategy={strategy}", f"trainer.max_steps={num_steps}"]
    more += ["callbacks.poison.class_path=strategy_ranks.Poison", f"callbacks.poison.step={DROPPED}"]
    return Job("pretrain/umbif_tiny", str(run_dir), more)


def other(folder: Path, strategy: str, method: str) -> Job:
    more = [f"trainer.strategy={word(strategy)}", f"trainer.max_steps={SHORT}"]
    return Job(f"pretrain/{method}", str(folder / f"{strategy}_{method}"), more)


def with_options(folder: Path, strategy: str) -> Job:
    more = [
        f"trainer.strategy={word(strategy)}", f"trainer.max_steps={SHORT}", "trainer.precision=bf16-mixed",
        "model.ema_decay=0.9", "model.contrast.queue_size=32", "model.encoder.activation_checkpointing=true",
    ]  # fmt: skip
    return Job("pretrain/umbif_tiny", str(folder / f"{strategy}_options"), more)


def task(folder: Path, strategy: str) -> Job:
    name = "finetune/idh"
    more = [f"trainer.strategy={word(strategy)}", f"trainer.max_steps={SHORT}", "trainer.val_check_interval=2"]
    more += ["trainer.log_every_n_steps=1", "model.head.dropout=0"]  # which draws anew for each number of processes
    return Job(name, str(folder / f"{strategy}_task"), more, str(labelled(folder, name)))


def word(strategy: str) -> str:
    return "auto" if strategy == "alone" else strategy


def losses(run_dir: Path) -> list[float]:
    """Those of all times that a run was gone on with."""
    found: list[float] = json.loads((run_dir / "losses.json").read_text())
    return found


def encoder(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "encoder" / "model.safetensors")


def in_processes(num: int, jobs: list[Job], corpus: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).parent
    command = [sys.executable, str(here / "strategy_ranks.py"), json.dumps(jobs), str(corpus), str(num), port]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    processes = [subprocess.Popen(command, env=shared | {"LOCAL_RANK": str(rank)}) for rank in range(num)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * num
    finally:
        for process in processes:
            process.kill()

