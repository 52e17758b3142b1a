"""What a launcher has decided stands above the recipe, and what is typed must not say otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small import small_recipe

from umbif.errors import UsageError
from umbif.hardware import num_to_start
from umbif.recipe.compose import Recipe, compose
from umbif.recipe.launched import launched

NAME = "pretrain/umbif_tiny"
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "RANK": "0"}
FABRIC = {**TORCHRUN, "LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu", "LT_STRATEGY": "fsdp", "LT_PRECISION": "bf16-mixed"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say themselves who has started them."""
    for name in [*TORCHRUN, *FABRIC, "SLURM_PROCID", "SLURM_NTASKS"]:
        monkeypatch.delenv(name, raising=False)


def by(told: dict[str, str], monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Recipe:
    with monkeypatch.context() as patched:
        for name, value in told.items():
            patched.setenv(name, value)
        return compose(NAME, overrides)


def test_nobody_decides_nothing() -> None:
    assert launched({}).trainer == {}
    assert compose(NAME).tree["trainer"]["devices"] == 1


def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by(TORCHRUN, monkeypatch)
    assert found.tree["trainer"]["devices"] == found.tree["trainer"]["num_nodes"] == 2
    assert found.tree["trainer"]["strategy"] == "auto"
    assert found.origins["trainer.devices"] == "torchrun"


def test_fabric_run_says_what_hardware_strategy_and_precision_are(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = by(FABRIC, monkeypatch).tree["trainer"]
    assert {key: trainer[key] for key in ("accelerator", "devices", "num_nodes", "strategy", "precision")} == {
        "accelerator": "cpu", "devices": 2, "num_nodes": 2, "strategy": "fsdp2", "precision": "bf16-mixed",
    }  # fmt: skip
    stage = by({**FABRIC, "LT_STRATEGY": "deepspeed_stage_2"}, monkeypatch).tree["trainer"]["strategy"]
    assert stage == "deepspeed_stage_2"


def test_what_was_not_said_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = by({**FABRIC, "LT_STRATEGY": "", "LT_PRECISION": "None"}, monkeypatch).tree["trainer"]
    assert (trainer["strategy"], trainer["precision"]) == ("auto", "32-true")


def test_typed_keys_that_say_otherwise_are_refused_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as refused:
        by(FABRIC, monkeypatch, "trainer.strategy=ddp", "trainer.devices=8", "trainer.precision=bf16-mixed")
    assert len(refused.value.problems) == 2
    assert "trainer.strategy=ddp was typed, and fabric run says fsdp2. Leave one of them out" in str(refused.value)
    assert "trainer.devices=8 was typed, and fabric run says 2" in str(refused.value)


def test_a_recipe_without_training_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert "trainer" not in compose("prepare/brain_2mm").tree


def test_processes_are_started_where_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"accelerator": "cpu", "devices": 2, "num_nodes": 1}
    assert num_to_start(two) == 2
    assert num_to_start({**two, "devices": 1}) == 1
    assert num_to_start({**two, "num_nodes": 4}) == 1  # which needs a launcher, and is refused without
    with pytest.raises(UsageError, match="this machine has none"):
        num_to_start({"accelerator": "gpu", "devices": 64})
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert num_to_start(two) == 1


def test_fabric_run_trains_with_two_processes(corpus_folder: Path, tmp_path: Path) -> None:
    recipe = small_recipe(NAME, corpus_folder, tmp_path / "run", "callbacks.monitors=null", "data.num_val_exams=0")
    (tmp_path / "own.yaml").write_text(recipe.to_yaml().replace("accelerator: cpu", "accelerator: gpu"))
    script = tmp_path / "umbif"
    script.write_text("from umbif.cli import main\nmain()\n")
    fabric = Path(sys.executable).with_name("fabric")
    by_fabric = [fabric, "run", "--accelerator=cpu", "--devices=2", "--strategy=fsdp"]
    command = [*by_fabric, script, "fit", tmp_path / "own.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=200, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["trainer"]["strategy"] == "fsdp2"
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()
    assert len([*tmp_path.glob("run/checkpoints/step=000002/share-*")]) == 2
