"""What is damaged, or what the system refuses, ends in one message: which file, what is wrong, and the cure."""

import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from small import small_recipe
from test_cli import FIT, run

from umbif.corpus.manifest import read_manifest, write_manifest
from umbif.corpus.shards import Corpus
from umbif.encoders.vit import ViT3D
from umbif.encoders.weights import CONFIG, WEIGHTS, load_encoder_weights, read_config, save_encoder, write_tensors
from umbif.errors import Problem, UmbifError, UsageError
from umbif.evaluation.report import write_report
from umbif.files import whole
from umbif.fit import finished_steps, fit
from umbif.pretrain.run_page import write_run_page
from umbif.scale.metrics_csv import MetricsCSV

Answer = Callable[[list[str]], tuple[int, str]]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Answer:
    """Exit code and message of a command."""

    def of(command: list[str]) -> tuple[int, str]:
        code, _, err = run(command, monkeypatch, capsys)
        assert "Traceback" not in err
        return code, err

    return of


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("corpus.json", b'{"identity": "ab', "got Unterminated string.*umbif prepare"),
        ("corpus.json", b"[]", "got no keys and values.*umbif prepare"),
        ("corpus.json", b'{"identity": "ab", "preparation": {}}', "got no spacing_mm.*umbif prepare"),
        ("corpus.json", b"\xff\xfe", "got .*decode.*umbif prepare"),
        ("index.parquet", b"PAR1 and no more", "got .*Parquet magic bytes not found.*--merge"),
        ("index.parquet", pd.DataFrame({"exam": ["a"]}).to_parquet(), "got no column person, .*--merge"),
    ],
)
def test_a_damaged_corpus_names_its_file_and_the_cure(
    corpus_folder: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{folder / name} is damaged, or not what it should be: {said}"):
        Corpus(folder)


@pytest.mark.parametrize("column", ["std", "byte_offset", "split"])
def test_a_flipped_bit_in_a_table_is_not_read_as_another_value(
    corpus_folder: Path, tmp_path: Path, column: str
) -> None:
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    index = folder / "index.parquet"
    group = pq.read_metadata(index).row_group(0)
    chunk = next(found for i in range(group.num_columns) if (found := group.column(i)).path_in_schema == column)
    content = bytearray(index.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    index.write_bytes(content)
    with pytest.raises(UsageError, match=r"index\.parquet is damaged.*--merge"):
        Corpus(folder)


def test_a_damaged_corpus_reaches_the_user_as_one_line(corpus_folder: Path, tmp_path: Path, answer: Answer) -> None:
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    (folder / "corpus.json").write_text("{")
    code, err = answer([*FIT, f"data.corpus={folder}", f"run.dir={tmp_path / 'run'}"])
    assert code == 2
    assert "corpus.json is damaged" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"loss\n1\n", b"\x80\x81\n"])
def test_curves_that_cannot_be_read_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"metrics\.csv is damaged, .*got .*delete it"):
        write_run_page(tmp_path)
    if content:
        with pytest.raises(UsageError, match=r"metrics\.csv is damaged, .*got .*delete it"):
            MetricsCSV(tmp_path).go_on_from(3)


def test_only_the_first_process_of_a_resumed_run_writes_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = "step,slot\n0,4\n1,8\n2,12\n"
    (tmp_path / "metrics.csv").write_text(before)
    monkeypatch.setenv("RANK", "1")
    MetricsCSV(tmp_path).go_on_from(2)
    assert (tmp_path / "metrics.csv").read_text() == before
    monkeypatch.setenv("RANK", "0")
    MetricsCSV(tmp_path).go_on_from(2)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == before.splitlines()[:3]


def test_a_row_of_the_curves_that_is_no_row_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1\ntorn,1\n1,0.5\n")
    assert "Step 2" in write_run_page(tmp_path).read_text()


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "encoder/config.json"])
@pytest.mark.parametrize("content", ["{1: [", "- 1\n"])
def test_what_explains_a_run_is_named_where_it_is_damaged(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "encoder").mkdir()
    for file in ("metrics.csv", name, "encoder/model.safetensors"):
        (tmp_path / file).write_text("step,slot\n1,1\n" if file == "metrics.csv" else content)
    with pytest.raises(UsageError, match=rf"{tmp_path / name} is damaged, .*got .*Copy .* again"):
        write_run_page(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"), [(b"nothing", "got .*Parquet"), (pd.DataFrame({"y": [1]}).to_parquet(), "got no column exam")]
)
def test_the_run_whose_predictions_are_damaged_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "predictions.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=rf"{tmp_path}/predictions\.parquet is damaged, .*{said}.*fine-tune again"):
        write_report([tmp_path], tmp_path)


def test_a_finished_run_with_a_damaged_file_says_so_and_the_cure_works(corpus_folder: Path, tmp_path: Path) -> None:
    recipe = small_recipe("pretrain/umbif_tiny", corpus_folder, tmp_path / "run", "callbacks.monitors=null")
    folder = fit(recipe)
    config, before = folder / "encoder" / CONFIG, (folder / "encoder" / WEIGHTS).read_bytes()
    config.write_text(config.read_text()[:-20])
    for read in (lambda: fit(recipe), lambda: read_config(folder), lambda: load_encoder_weights(object(), folder)):
        with pytest.raises(UsageError, match=rf"{config} is damaged, .*delete its folder"):
            read()
    shutil.rmtree(folder / "encoder")
    fit(recipe)
    assert (folder / "encoder" / WEIGHTS).read_bytes() == before
    assert read_config(folder)["steps"] == 2
    (folder / "recipe.yaml").write_text("model: [1")
    with pytest.raises(UsageError, match=rf"{folder}/recipe\.yaml cannot be read as YAML: got .*take a copy"):
        fit(recipe)


def test_a_manifest_that_was_edited_is_named(manifest: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "edited.parquet"
    manifest.assign(shape=None).to_parquet(path)
    with pytest.raises(UsageError, match=rf"{path} is damaged, .*umbif index"):
        read_manifest(path)


# ---------------------------------------------------------------- errors of other processes


def test_a_damaged_frame_that_a_worker_reads_is_told_in_one_line(
    corpus_folder: Path, tmp_path: Path, answer: Answer
) -> None:
    folder = shutil.copytree(corpus_folder, tmp_path / "corpus")
    index = pd.read_parquet(folder / "index.parquet")
    for shard, rows in index.groupby("shard"):
        content = bytearray((folder / "shards" / shard).read_bytes())
        for start in rows["byte_offset"]:
            content[start + 40] ^= 1
        (folder / "shards" / shard).write_bytes(content)
    small = ["data.crop_size=[16,16,16]", "data.global_batch_size=2", "data.num_workers=1", "data.num_val_exams=0"]
    small += ["trainer.max_steps=2", f"data.corpus={folder}", f"run.dir={tmp_path / 'run'}", "callbacks.monitors=null"]
    for verb in ("fit", "check"):
        code, err = answer([verb, FIT[1], *small])
        assert code == 1
        assert err.startswith(f"umbif: {folder}/shards/00001-of-00001_00000.shard is damaged or gone (row ")
        assert "umbif prepare" in err
        assert len(err.splitlines()) == 1


def test_an_error_says_the_same_after_it_left_its_process() -> None:
    error = UsageError([Problem("a", "b", "c"), Problem("d")], "the recipe")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# ---------------------------------------------------------------- what the system refuses


def test_a_file_where_a_folder_is_meant_is_told(
    corpus_folder: Path, manifest: pd.DataFrame, tmp_path: Path, answer: Answer
) -> None:
    file, table = tmp_path / "notes.txt", tmp_path / "manifest.parquet"
    file.write_text("mine")
    write_manifest(manifest, table)
    commands = [
        ["prepare", str(table), "-o", str(file), "--recipe", "prepare/brain_2mm"], ["demo", "-o", str(file)],
        [*FIT, f"data.corpus={corpus_folder}", f"run.dir={file}"],
        [*FIT, f"data.corpus={corpus_folder}", f"run.dir={file}/run"], ["cp", FIT[1], str(file / "mine.yaml")],
    ]  # fmt: skip
    said = f"umbif: {file} is a file where a folder is meant. Name another folder\n"
    assert [answer(command) for command in commands] == [(2, said)] * 5
    assert file.read_text() == "mine"


def test_a_folder_where_a_file_is_meant_is_told(tmp_path: Path, answer: Answer) -> None:
    (tmp_path / "page.html").mkdir()
    (tmp_path / "metrics.csv").write_text("step,slot\n1,1\n")
    code, err = answer(["report", str(tmp_path), "-o", str(tmp_path / "page.html")])
    assert (code, err) == (1, f"umbif: {tmp_path / 'page.html'}: Is a directory. Name a file\n")


@contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """A folder that this process may not write; root becomes nobody, whom nothing is allowed either."""
    root = os.geteuid() == 0
    folder.mkdir()
    folder.chmod(0o500)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, answer: Answer) -> None:
    with forbidden(tmp_path / "locked"):
        code, err = answer(["cp", FIT[1], str(tmp_path / "locked" / "mine.yaml")])
    assert code == 1
    assert err.startswith(f"umbif: {tmp_path / 'locked' / 'mine.yaml'}: Permission denied. Ask its owner")


@contextmanager
def no_room(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: a write fails as on a full disk, without the name of the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path, answer: Answer) -> None:
    with no_room(2000):
        code, err = answer(["phantom", "-o", str(tmp_path / "out"), "--exams", "1", "--spacing", "4", "--workers", "1"])
    assert code == 1
    assert err.startswith(f"umbif: {tmp_path / 'out'}: File too large. Make room")


def test_a_full_disk_leaves_the_earlier_file_as_it_was(manifest: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(manifest[:4], path)
    before = path.read_bytes()
    with no_room(2000), pytest.raises(OSError, match="File too large") as caught:
        write_manifest(manifest, path)
    assert Path(caught.value.filename).parent == tmp_path
    assert not Path(caught.value.filename).name.startswith(".")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_machines_that_share_a_disk_never_write_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)  # the first process of a container has a small number in each
    with whole(tmp_path / "table") as ours, whole(tmp_path / "table") as theirs:
        ours.write_text("ours")
        theirs.write_text("theirs")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("table", "ours")]


def test_an_encoder_that_finds_no_room_is_told(tmp_path: Path) -> None:
    with no_room(2000), pytest.raises(UmbifError, match=r"x\.safetensors could not be written: .*File too large"):
        write_tensors({"a": torch.zeros(10000)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_encoder_was_not_written_to_its_end_does_not_pass_for_finished(tmp_path: Path) -> None:
    encoder = ViT3D(patch_size=8, patch_mm=16.0, embed_dim=48, depth=1, num_heads=4)
    (tmp_path / "encoder" / WEIGHTS).mkdir(parents=True)  # the weights cannot take their name
    with pytest.raises(OSError, match="directory"):
        save_encoder(encoder, tmp_path / "encoder", {"steps": 3})
    assert finished_steps(tmp_path) == -1


def test_an_error_that_is_not_of_files_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    def broken(group: str | None) -> None:
        raise OSError("libcuda.so: cannot open shared object file")

    monkeypatch.setattr("umbif.recipe.files.list_recipes", broken)
    with pytest.raises(OSError, match="libcuda"):
        answer(["ls"])
