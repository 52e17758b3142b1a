"""A person's mistake ends with one clear message and exit code 2, never with a traceback."""

import errno
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from filelock import FileLock

from umbif import cli
from umbif.check import hardware
from umbif.corpus.manifest import read_manifest
from umbif.recipe.compose import compose
from umbif.recipe.show import flat_copy
from umbif.run import open_run

FIT = ("fit", "pretrain/umbif_tiny")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([*FIT, "model.num_visibel=3"], ["model.num_visibel", "Did you mean model.masking.num_visible?"]),
        ([*FIT, "trainer.max_steps=many"], ["trainer.max_steps", "'many'"]),
        ([*FIT, "model.encoder.detph=2", "trainer.max_stps=3"], ["2 problems", "Did you mean depth?", "max_steps"]),
        (["fit", "pretrain/umbif_tini"], ["pretrain/umbif_tini", "Did you mean pretrain/umbif_tiny?"]),
        ([*FIT, "data.corpus=/nowhere"], ["data.corpus", "/nowhere", "umbif prepare"]),
        ([*FIT, "oops"], ["oops", "key=value"]),
        (["index", "/nowhere"], ["/nowhere"]),
        (["prepare", "/nowhere.parquet"], ["/nowhere.parquet", "umbif index"]),
        (["report", "/nowhere"], ["/nowhere"]),
        (["cp", "pretrain/umbif_tini", "x.yaml"], ["Did you mean pretrain/umbif_tiny?"]),
        (["fit", "prepare/brain_2mm"], ["trains nothing", "umbif ls pretrain"]),
        (["prepare", "m.parquet", "--recipe", FIT[1]], ["no recipe of a preparation", FIT[1], "umbif ls prepare"]),
        (["ls", "pretrian"], ["pretrian", "Did you mean pretrain?"]),
    ],
)
def test_mistakes_are_answered(
    command: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, _, err = run(command, monkeypatch, capsys)
    assert code == 2
    assert all(part in err for part in said), err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 6, err


def test_hardware_that_is_not_there_is_answered_and_claims_no_folder(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    wrong = [f"data.corpus={corpus_folder}", f"run.dir={tmp_path / 'run'}", "hardware=8gpu"]
    code, _, err = run([*FIT, *wrong], monkeypatch, capsys)
    assert code == 2
    assert "trainer asks for 8 x gpu; this machine has none" in err
    assert "hardware=cpu" in err
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("trainer.limit_val_batches=-1", "You have passed invalid value -1"),
        ("trainer.devices=-3", "`devices` selected with `CPUAccelerator` should be an int > 0"),
    ],
)
def test_a_wrong_value_of_trainer_is_not_taken_for_hardware_that_is_wanting(
    wrong: str, said: str, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    command = [*FIT, f"data.corpus={corpus_folder}", f"run.dir={tmp_path / 'run'}", wrong]
    code, _, err = run(command, monkeypatch, capsys)
    assert code == 2
    assert f"trainer holds a value that Lightning does not take: got {said}" in err
    assert "hardware" not in err


def test_an_index_without_images_ends_with_a_message_and_a_manifest_to_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "P1_t1.nii.gz").write_text("no image")
    command = ["index", str(tmp_path), "-o", str(tmp_path / "m.parquet"), "--workers", "0"]
    code, out, err = run(command, monkeypatch, capsys)
    assert code == 1
    assert "No image was found among 1 files" in err
    assert "Next:" not in out
    assert (tmp_path / "m.parquet").is_file()


def test_an_index_asks_for_its_place_before_it_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "P1_t1.nii.gz").write_text("no image")
    monkeypatch.setattr("umbif.corpus.index._inspect_all", lambda *_: pytest.fail("a volume was read"))
    code, _, err = run(["index", str(tmp_path), "-o", str(tmp_path)], monkeypatch, capsys)
    assert code == 2
    assert "A manifest is a .parquet file" in err


def test_sources_of_one_name_become_data_sets_of_their_own_in_one_manifest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["index", "--workers", "0", "-o", str(tmp_path / "m.parquet")]
    for name, grade in (("one", "II"), ("two", "IV")):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images/P1_t1.nii").write_text("no image")
        (tmp_path / f"{name}.csv").write_text(f"dataset,subject,grade\n{name},P1,{grade}\n")
        command += [str(tmp_path / name / "images"), "--dataset", name, "--labels", str(tmp_path / f"{name}.csv")]
    run(command, monkeypatch, capsys)
    table = read_manifest(tmp_path / "m.parquet")
    assert list(zip(table["exam"], table["grade"], strict=True)) == [("one/P1", "II"), ("two/P1", "IV")]


@pytest.mark.parametrize("verb", [["index", "x"], ["prepare", "x"], ["phantom", "-o", "x"]])
def test_fewer_processes_than_none_are_refused(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run([*verb, "--workers", "-1"], monkeypatch, capsys)
    assert code == 2
    assert "--workers" in err


def test_a_corrupt_yaml_file_is_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("model: [1, 2\n")
    code, _, err = run(["fit", str(tmp_path / "mine.yaml")], monkeypatch, capsys)
    assert code == 2
    assert "mine.yaml" in err


def test_ls_shows_every_recipe_and_what_to_type_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(["ls"], monkeypatch, capsys)
    assert code == 0
    assert "pretrain/umbif_tiny" in out
    assert "_parts" not in out
    assert "Next:" in out


def test_a_run_is_not_continued_with_another_model(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = [f"data.corpus={corpus_folder}", f"run.dir={tmp_path / 'run'}", "data.crop_size=[16,16,16]",
             "data.global_batch_size=2", "data.num_workers=0", "data.num_val_exams=0"]  # fmt: skip
    assert run([*FIT, *small, "trainer.max_steps=2"], monkeypatch, capsys)[0] == 0
    code, _, err = run([*FIT, *small, "trainer.max_steps=2", "model.lr=1.0"], monkeypatch, capsys)
    assert code == 2
    assert "model.lr was 0.04, is now 1.0" in err
    code, out, _ = run([*FIT, *small, "trainer.max_steps=2"], monkeypatch, capsys)
    assert code == 0
    assert "nothing to do" in out
    assert run([*FIT, *small, "trainer.max_steps=3"], monkeypatch, capsys)[0] == 0


@pytest.mark.parametrize(("steps", "got"), [("-1", "-1"), ("null", "nothing")])
def test_a_run_without_a_number_of_steps_is_refused(
    steps: str, got: str, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run([*FIT, f"data.corpus={corpus_folder}", f"trainer.max_steps={steps}"], monkeypatch, capsys)
    assert code == 2
    assert f"trainer.max_steps must be a number of steps, 0 or more: got {got}" in err


@pytest.mark.parametrize(
    ("asked", "num_gpus", "said"),
    [
        ({"accelerator": "gpu", "devices": 8, "num_nodes": 4}, 0, "8 x gpu on each of 4 nodes; this machine has none"),
        ({"accelerator": "gpu", "devices": 8}, 2, "8 x gpu; this machine has 2: fit will need one that has"),
        ({"accelerator": "gpu", "devices": 1}, 2, "1 x gpu"),
        ({"accelerator": "cpu", "devices": 2}, 0, "2 x cpu"),
    ],
)
def test_check_says_which_hardware_is_asked_for_and_not_there(
    asked: dict[str, Any], num_gpus: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    assert hardware(asked).startswith(said)
    assert ("machine" in hardware(asked)) == ("machine" in said)


@pytest.mark.parametrize(
    ("recipe", "task"),
    [
        ("umbif_tiny", "demo/idh"),
        ("umbif_vitb", "finetune/idh"),
        ("umbif_vits", "finetune/idh encoder=vits_1mm"),
        ("simclr_resnet50", "finetune/idh encoder=resnet50"),
    ],
)
def test_after_a_pretraining_comes_a_task_with_its_encoder_also_of_a_copy(
    recipe: str, task: str, tmp_path: Path
) -> None:
    for name in (f"pretrain/{recipe}", str(flat_copy(f"pretrain/{recipe}", tmp_path / "mine"))):
        command = cli.finetuning(compose(name, ["data.corpus=c"]).tree, Path("runs/x"))
        assert command == f"umbif fit {task} data.corpus=c model.encoder.weights=runs/x"


def test_the_next_command_can_be_typed_whatever_a_folder_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    cli.following(cli.typed("umbif", "fit", "a", "data.corpus=my [new] corpus"))
    assert "umbif fit a 'data.corpus=my [new] corpus'" in capsys.readouterr().out


def test_the_next_command_after_a_copy_names_the_file_that_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(["cp", "pretrain/umbif_tiny", "mine"], monkeypatch, capsys)
    assert code == 0
    assert "umbif check mine.yaml" in out


def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(group: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("umbif.recipe.files.list_recipes", interrupted)
    code, _, err = run(["ls"], monkeypatch, capsys)
    assert code == 130
    assert "interrupted" in err


def test_a_run_has_one_writer(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with FileLock(tmp_path / ".lock"):
        command = [*FIT, f"data.corpus={corpus_folder}", f"run.dir={tmp_path}"]
        code, _, err = run(command, monkeypatch, capsys)
    assert code == 1
    assert "Another process is writing" in err


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_that_keeps_no_second_writer_out_is_told(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "as of a file system without locks")))
    with open_run(tmp_path / "run", compose(FIT[1], [f"data.corpus={corpus_folder}"])):
        assert f"{tmp_path / 'run'} lies on a file system without locks" in caplog.text


def test_a_recipe_that_cannot_start_does_not_claim_its_folder(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here = [f"data.corpus={corpus_folder}", f"run.dir={tmp_path / 'run'}"]
    wrong = ["model.encoder.patch_mm=8", "data.disjoint_share=1", "data.num_views=1", "trainer.precision=16-mixed"]
    wrong.append("trainer.strategy=fsdp")
    code, _, err = run([*FIT, *here, *wrong], monkeypatch, capsys)
    assert code == 2
    assert "the encoder is made for voxels of 1 mm: got 2 mm" in err
    assert "data.disjoint_share must leave views that share a sequence to compare: got 1" in err
    assert "data.num_views must give the contrast views to compare: got 1" in err
    assert "trainer.precision must be 32-true or bf16-mixed: got 16-mixed" in err
    assert "trainer.strategy is none of UMBIF's: got fsdp. FSDP2 is offered, which is called fsdp2" in err
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def run(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["umbif", *command])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
