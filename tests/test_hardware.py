"""What a recipe asks of a machine is held against what there is before anything is built, waited for or written."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from small import small_recipe

from umbif import machine
from umbif.check import check_recipe
from umbif.errors import UsageError
from umbif.fit import fit, make_trainer
from umbif.hardware import Asked, hardware_problems, launcher_problems, slow_precision
from umbif.recipe.compose import Recipe
from umbif.run import open_run

CPU = {"accelerator": "cpu", "devices": 1}
TWO_CPUS = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
LAUNCHER = ("SLURM_", "TORCHELASTIC_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")
GIB = 2**30


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say themselves who has started them."""
    for name in [*os.environ]:
        if name.startswith(LAUNCHER):
            monkeypatch.delenv(name)


@pytest.fixture
def tiny(corpus_folder: Path, tmp_path: Path) -> Recipe:
    """One process on a CPU."""
    return small_recipe("pretrain/umbif_tiny", corpus_folder, tmp_path / "run")


def slurm(patch: pytest.MonkeyPatch, tasks: int, rank: int = 0, **more: Any) -> None:
    """What srun tells a process; `more` without SLURM_, and an empty value for what is not set."""
    told = {
        "JOB_NAME": "x", "NTASKS": tasks, "NTASKS_PER_NODE": tasks, "STEP_NUM_TASKS": tasks, "NNODES": 1,
        "PROCID": rank, "LOCALID": rank, "NODEID": 0, **more,
    }  # fmt: skip
    for name, value in told.items():
        if value != "":
            patch.setenv(f"SLURM_{name}", str(value))


# ---------------------------------------------------------------- hardware


def test_hardware_that_is_not_there_is_refused_and_lightning_is_never_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(pl, "Trainer", lambda **_: pytest.fail("Lightning was asked"))
    with pytest.raises(UsageError, match=r"trainer asks for 8 x gpu; this machine has none\. .*hardware=cpu"):
        make_trainer({"accelerator": "gpu", "devices": 8, "strategy": "ddp"}, [], tmp_path, None)


@pytest.mark.parametrize(
    ("trainer", "num_gpus", "said"),
    [
        ({"accelerator": "gpu", "devices": 2}, 2, ""),
        ({"accelerator": "gpu", "devices": "auto"}, 1, ""),
        ({"accelerator": "gpu", "devices": -1}, 0, "auto x gpu; this machine has none"),
        ({"accelerator": "cuda", "devices": "0,1"}, 1, "2 x cuda; this machine has 1"),
        ({"accelerator": "auto", "devices": 4}, 2, "4 x auto; this machine has 2"),
        ({"accelerator": "cpu", "devices": 64}, 0, ""),
        ({"devices": 2}, 0, ""),  # on CPUs
        ({"accelerator": "abacus"}, 0, ""),  # for Lightning to refuse
    ],
)
def test_devices_are_counted_as_lightning_counts_them(
    trainer: dict[str, Any], num_gpus: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    problems = [str(problem) for problem in hardware_problems(Asked.of(trainer))]
    assert len(problems) == bool(said)
    assert all(said in problem for problem in problems)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MisconfigurationException("zzz your system zzz not supported"), "that Lightning does not take: got zzz"),
        (RuntimeError("No precision set"), "that Lightning does not take: got No precision set"),
        (ModuleNotFoundError("no module zzz"), "a package that is not installed: got no module zzz"),
    ],
)
def test_what_lightning_refuses_is_told_by_its_kind_and_not_by_its_words(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(pl, "Trainer", refuse)
    with pytest.raises(UsageError, match=said):
        make_trainer(dict(CPU), [], tmp_path, None)


def test_half_precision_that_a_gpu_emulates_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert "trainer.precision=32-true" in slow_precision(asked)
    assert not slow_precision({**asked, "precision": "32-true"})
    assert not slow_precision({**CPU, "precision": "bf16-mixed"})
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert not slow_precision(asked)


# ---------------------------------------------------------------- launchers


def test_eight_tasks_of_a_recipe_for_one_process_do_not_train_eight_times(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(monkeypatch, 8, rank=3)
    with pytest.raises(UsageError, match=r"got 8 on 1 node .*, for 1 x cpu\. .*--ntasks-per-node=1, .*devices=8"):
        fit(tiny)
    assert not (Path(tiny.tree["run"]["dir"]) / "checkpoints").exists()


EIGHT, FOUR_NODES = {"accelerator": "cpu", "devices": 8}, {"accelerator": "cpu", "devices": 8, "num_nodes": 4}


@pytest.mark.parametrize(
    ("trainer", "tasks", "more", "said"),
    [
        (EIGHT, 8, {}, ""),
        (FOUR_NODES, 32, {"NNODES": "4", "NTASKS_PER_NODE": "8"}, ""),
        (EIGHT, 8, {"STEP_NUM_TASKS": ""}, "got 1 on 1 node (srun was not used), for 8 x cpu"),
        (EIGHT, 8, {"NTASKS_PER_NODE": ""}, "(without --ntasks-per-node), for 8 x cpu. Start it by srun with"),
        (EIGHT, 8, {"NNODES": "2", "NTASKS_PER_NODE": "4"}, "set trainer.num_nodes=2 and trainer.devices=4"),
        (FOUR_NODES, 8, {}, "for 8 x cpu on each of 4 nodes. Start it by srun with --nodes=4 --ntasks-per-node=8"),
        ({"accelerator": "cpu"}, 8, {}, "got 8 on 1 node (--ntasks-per-node=8), for auto x cpu"),
        (CPU, 8, {"STEP_NUM_TASKS": "", "NTASKS_PER_NODE": ""}, ""),  # tasks reserved for their cores
        (CPU, 1, {"NTASKS_PER_NODE": ""}, ""),
        (EIGHT, 1, {"JOB_NAME": "bash"}, ""),  # from a shell of SLURM, Lightning starts the others
        (CPU, 8, {"JOB_NAME": "interactive"}, "got 8 on 1 node"),  # srun within salloc
    ],
)
def test_the_tasks_of_slurm_are_those_of_the_recipe(
    trainer: dict[str, Any], tasks: int, more: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(monkeypatch, tasks, **more)
    problems = [str(problem) for problem in launcher_problems(Asked.of(trainer))]
    assert len(problems) == bool(said)
    assert all(said in problem for problem in problems)


def test_the_processes_of_torchrun_are_those_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, 1)  # which may have started torchrun
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert not [*launcher_problems(Asked.of(EIGHT))]
    (problem,) = launcher_problems(Asked.of(CPU))
    assert "got 8 on 1 node, for 1 x cpu. Start it by torchrun with --nnodes=1 --nproc-per-node=1" in str(problem)


@pytest.mark.parametrize("job_name", ["x", "interactive"])
def test_slurm_is_asked_to_queue_nothing_again(job_name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slurm(monkeypatch, 2, JOB_NAME=job_name)
    trainer = make_trainer(dict(TWO_CPUS), [], tmp_path, None)
    assert trainer._accelerator_connector.cluster_environment.auto_requeue is False
    assert trainer.world_size == 2


def test_one_process_among_tasks_that_were_reserved_for_their_cores_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm(monkeypatch, 8, STEP_NUM_TASKS="", NTASKS_PER_NODE="")
    trainer = make_trainer(dict(CPU), [], tmp_path, None)
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)


def test_every_process_refuses_the_run_of_another_recipe_so_that_none_waits_for_the_first(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints" / "step=000001").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(tiny.to_yaml().replace("lr: 0.04", "lr: 0.05"))
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(UsageError, match=r"model\.lr was 0\.05, is now 0\.04"), open_run(tmp_path, tiny):
        pytest.fail("it was opened")


@pytest.mark.parametrize(
    ("variables", "leads"),
    [
        ({}, True), ({"RANK": "0", "LOCAL_RANK": "0"}, True), ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True), ({"SLURM_PROCID": "1"}, False), ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun within srun numbers nodes anew
        ({"RANK": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, False),
    ],
)  # fmt: skip
def test_one_process_leads_whatever_has_started_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], leads: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine.is_leader() is leads


# ---------------------------------------------------------------- umbif check


def test_check_reads_the_share_of_one_process_and_refuses_a_batch_that_cannot_be_shared(tiny: Recipe) -> None:
    tiny.tree["trainer"] |= TWO_CPUS
    said = check_recipe(tiny)
    assert "  batch        4 views of 16 x 16 x 16 voxels" in said  # two views of half of four exams
    assert "on each of 2 processes" in said
    assert "  length       2 steps of 4 exams: 1.6 times each of 5" in said
    tiny.tree["data"]["global_batch_size"] = tiny.tree["model"]["global_batch_size"] = 5
    with pytest.raises(UsageError, match="global_batch_size=5 cannot be shared by 2 processes"):
        check_recipe(tiny)


# ---------------------------------------------------------------- memory


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 1 TB free, whose control groups are empty."""
    for name, path in {"GROUPS": "groups", "OWN_GROUPS": "own", "MEMINFO": "meminfo"}.items():
        monkeypatch.setattr(machine, name, tmp_path / path)
    machine.MEMINFO.write_text(f"MemTotal: {2**31} kB\nMemAvailable:   {2**30} kB\n")
    return tmp_path / "groups"


def files(group: Path, contents: dict[str, object]) -> None:
    """What the system says of a control group."""
    group.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (group / name).write_text(f"{content}\n")


def test_a_job_may_take_what_its_group_allows_though_it_runs_in_one_below(groups: Path) -> None:
    machine.OWN_GROUPS.write_text("0::/slurmstepd.scope/job_1/step_0/user\n")
    job = groups / "slurmstepd.scope" / "job_1"
    files(job / "step_0", {"memory.max": "max", "memory.current": GIB})
    stat = f"anon 1\ninactive_anon {8 * GIB}\ninactive_file {GIB // 2}"
    files(job, {"memory.max": 64 * GIB, "memory.current": GIB, "memory.stat": stat})
    assert machine.available_memory_bytes() == 63.5 * GIB


def test_a_job_may_take_what_its_group_allows_in_the_older_version_too(groups: Path) -> None:
    machine.OWN_GROUPS.write_text("3:cpuset:/slurm/job_1\n2:memory:/slurm/job_1/step_0\n1:name=systemd:/\n0::/\n")
    top, stat = groups / "memory", f"inactive_file 0\ntotal_inactive_file {GIB // 2}"
    files(top, {"memory.limit_in_bytes": 9223372036854771712, "memory.usage_in_bytes": 90 * GIB})
    of_job = {"memory.limit_in_bytes": 64 * GIB, "memory.usage_in_bytes": GIB, "memory.stat": stat}
    files(top / "slurm" / "job_1", of_job)
    assert machine.available_memory_bytes() == 63.5 * GIB


def test_a_container_sees_its_limit_where_a_machine_has_its_root_and_no_more_than_the_machine_has(groups: Path) -> None:
    machine.OWN_GROUPS.write_text("0::/../..\n")
    files(groups, {"memory.max": 8 * GIB, "memory.current": 9 * GIB})  # of a moment
    assert machine.available_memory_bytes() == 0
    (groups / "memory.max").write_text(f"{9999 * GIB}\n")
    assert machine.available_memory_bytes() == 1024 * GIB
    machine.OWN_GROUPS.unlink()
    assert machine.available_memory_bytes() == 1024 * GIB


def test_where_there_is_no_shared_memory_none_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert machine.shared_memory_bytes() is None
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    assert (machine.shared_memory_bytes() or 0) > 0
