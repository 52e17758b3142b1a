"""The whole way, small: from synthetic exams to a report."""

from pathlib import Path

import pandas as pd
import pytest

from umbif.demo import TASKS, run_demo
from umbif.errors import UsageError

NUM_EXAMS = 40
SHORT = ("trainer.max_steps=3", "data.global_batch_size=4", "data.num_workers=0")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    run_demo(out, num_exams=NUM_EXAMS, overrides=SHORT)
    return out


def test_every_task_is_answered_with_and_without_pretraining_on_the_same_people(demo: Path) -> None:
    for task in TASKS:
        arms = [pd.read_parquet(demo / f"{task}_{arm}" / "predictions.parquet") for arm in ("pretrained", "untrained")]
        assert arms[0]["exam"].tolist() == arms[1]["exam"].tolist()
        assert arms[0]["y"].tolist() == arms[1]["y"].tolist()
        assert arms[0]["score"].tolist() != arms[1]["score"].tolist()
        test, val = (set(arms[0].loc[arms[0]["split"] == split, "person"]) for split in ("test", "val"))
        assert not test & val


def test_nobody_in_a_test_set_was_pretrained_on(demo: Path) -> None:
    exams = pd.read_parquet(demo / "corpus" / "index.parquet").drop_duplicates("exam")
    trained = set(exams.loc[exams["split"] == "train", "person"])
    tested = pd.read_parquet(demo / "idh_pretrained" / "predictions.parquet").query("split == 'test'")["person"]
    assert not trained & set(tested)


def test_the_report_names_all_tasks_and_says_that_the_exams_are_synthetic(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert all(task in page for task in TASKS)
    assert "synthetic" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_same_command_again_does_nothing_anew(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = demo / "pretrain" / "encoder" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run_demo(demo, num_exams=NUM_EXAMS, overrides=SHORT)
    assert weights.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("nothing to do") == 1 + 2 * len(TASKS)


def test_shuffled_and_true_labels_do_not_meet(demo: Path) -> None:
    with pytest.raises(UsageError, match="without --null"):
        run_demo(demo, null=True, num_exams=NUM_EXAMS)
