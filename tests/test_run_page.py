"""The page of a training run: what it shows, what it says, and that it needs nothing from anywhere."""

import re
from pathlib import Path

import pytest
from small import small_recipe

from umbif.cli import report
from umbif.errors import UsageError
from umbif.fit import fit
from umbif.pretrain.run_page import findings, has_page, read_run, write_run_page


@pytest.fixture(scope="module")
def page(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(small_recipe("pretrain/umbif_tiny", corpus_folder, folder, "callbacks.monitors.every_n_steps=2", max_steps=6))
    return (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "shown",
    ["Reconstruction", "Contrast", "Learning rate", "Gradient norm", "RankMe", "Spread of features", "Throughput",
     "Model FLOPs utilisation", "Waiting for data", "Reconstruction by sequence", "Finished after 6 steps"],
)  # fmt: skip
def test_a_finished_run_shows(page, shown):
    assert shown in page


def test_pictures_and_curves_are_inside_and_nothing_comes_from_outside(page):
    assert page.count("<svg") >= 8
    assert page.count("data:image/png;base64,") >= 1
    assert re.findall(r"(?:src|href)=[\"'](?!data:|#)[^\"']+", page) == []


def test_a_run_that_was_cut_off_has_a_page(tmp_path):
    rows = "".join(f"{step},{16 * step},{1 - step / 100}\n" for step in range(1, 20))
    (tmp_path / "metrics.csv").write_text("step,slot,train/loss\n" + rows + "20,3")  # in the middle of a line
    text = write_run_page(tmp_path).read_text()
    assert "still training, or cut off" in text
    assert "RankMe" not in text


def test_a_norm_that_is_not_finite_is_left_out_and_a_spike_does_not_flatten_the_rest(tmp_path):
    norms = ["0.3", "inf", "nan", "900", "0.3", "0.2"]
    rows = "".join(f"{step},{norm}\n" for step, norm in enumerate(norms))
    (tmp_path / "metrics.csv").write_text("step,train/gradient_norm\n" + rows)
    assert read_run(tmp_path).values("train/gradient_norm").tolist() == [0.3, 900, 0.3, 0.2]
    assert "Gradient norm" in write_run_page(tmp_path).read_text()


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("throughput/data_wait", [0.5] * 8, "input bound"),
        ("throughput/slowest", [2.0] * 8, "all wait for it"),
        ("monitor/feature_std", [0.9, 0.5, 0.005], "collapsed"),
        ("monitor/rank_me", [9.0, 8.0, 2.0], "RankMe fell"),
        ("val/loss", [1.0, 0.8, 0.7, 0.9, 1.0], "has risen since"),
    ],
)
def test_what_stands_out_is_said(tmp_path, column, values, said):
    rows = "".join(f"{i},{i},{value}\n" for i, value in enumerate(values, 1))
    (tmp_path / "metrics.csv").write_text(f"step,slot,{column}\n{rows}")
    assert any(said in sentence for sentence in findings(read_run(tmp_path)))
    steady = "".join(f"{i},{i},{0.01 if 'wait' in column else 0.9}\n" for i in range(1, 9))
    (tmp_path / "metrics.csv").write_text(f"step,slot,{column}\n{steady}")
    assert findings(read_run(tmp_path)) == []


def test_skipped_steps_are_counted(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,slot,train/loss\n1,1,1\n")
    (tmp_path / "log.txt").write_text("2026 WARNING Step 3: the loss is not finite; the step was skipped. …\n")
    assert any("1 of" in sentence and "skipped" in sentence for sentence in findings(read_run(tmp_path)))


def test_a_folder_without_metrics_is_refused(tmp_path):
    assert not has_page(tmp_path)
    with pytest.raises(UsageError, match=r"no metrics\.csv"):
        write_run_page(tmp_path)


def test_runs_of_two_kinds_are_not_mixed(tmp_path):
    for name, file in (("pretrained", "metrics.csv"), ("tuned", "predictions.parquet")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("step,slot\n")
    with pytest.raises(UsageError, match=r"curves and no predictions.*pretrained"):
        report([tmp_path / "tuned", tmp_path / "pretrained"])
    report([tmp_path / "pretrained"])
    assert (tmp_path / "pretrained" / "report.html").is_file()
