"""Labels as their authors spelled them, splits by person, thresholds, and the head's first weights."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from umbif.downstream.finetune import youden_threshold
from umbif.downstream.heads import ExtremesHead, HeadOptions
from umbif.downstream.tasks import MISSING, BinaryLabel, split_rows, targets
from umbif.errors import UsageError
from umbif.recipe.compose import compose

UCSF, UPENN, TCGA = "UCSF-PDGM-metadata_v2.csv", "UPENN-GBM_clinical_info_v2.1.csv", "tcga_2021_who_labels.csv"


@pytest.mark.parametrize(
    ("task", "table", "expected"),
    [
        ("idh", UCSF, {1: 103, 0: 398}),  # nine spellings
        ("codeletion", UCSF, {1: 9, 0: 401, MISSING: 91}),  # "relative co-deletion" is not the codeletion
        ("mgmt", UCSF, {1: 302, 0: 114, MISSING: 85}),
        ("idh", UPENN, {1: 19, 0: 544, MISSING: 106}),
        ("mgmt", UPENN, {1: 121, 0: 169, MISSING: 379}),
        ("progression", UPENN, {1: 34, 0: 8, MISSING: 627}),
        ("idh", TCGA, {1: 706, 0: 616}),
        ("codeletion", TCGA, {1: 301, 0: 1017, MISSING: 4}),
        ("mgmt", TCGA, {1: 826, 0: 270, MISSING: 226}),
    ],
)
def test_published_tables_are_read_as_their_authors_meant(
    real_data: Path, task: str, table: str, expected: dict[int, int]
) -> None:
    rows = pd.read_csv(real_data / "tables" / table, dtype=str, keep_default_na=False)
    node = {**compose(f"finetune/{task}").tree["data"]["label"]}
    node.pop("class_path")
    assert Counter(targets(rows, BinaryLabel(**node)).tolist()) == expected


def test_a_spelling_that_nobody_foresaw_is_told_and_never_taken_as_missing() -> None:
    label = BinaryLabel(columns=["idh"], positive=["mutant"], negative=["wildtype"])
    rows = pd.DataFrame({"idh": [" Mutant", "WILDTYPE", "", "mutan", "mutan"]})
    with pytest.raises(UsageError, match=r"'mutan' \(2 exams\)"):
        targets(rows, label)
    assert targets(rows[:3], label).tolist() == [1, 0, MISSING]


def test_a_spelling_with_two_meanings_is_refused() -> None:
    label = BinaryLabel(columns=["rano"], positive=["progression", "4"], negative=["stable"], missing=["4 "])
    with pytest.raises(UsageError, match=r"'4' has two meanings: got data\.label\.positive and data\.label\.missing"):
        targets(pd.DataFrame({"rano": ["4"]}), label)


def test_a_missing_column_is_told_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"idh or IDH.*columns exam, mgmt"):
        targets(pd.DataFrame({"exam": [], "mgmt": []}), BinaryLabel(columns=["idh", "IDH"], positive=[], negative=[]))


def test_nobody_is_in_two_parts() -> None:
    rng = np.random.default_rng(0)
    person = rng.integers(0, 60, 100).astype(str)
    split = np.where(np.isin(person, np.unique(person)[:20]), "test", "train")
    exams = pd.DataFrame({"person": person, "split": split})
    y = np.where(rng.random(100) < 0.1, MISSING, rng.integers(0, 2, 100))
    parts = split_rows(exams, y, val_fraction=0.25, seed=0)
    people = {name: set(person[rows]) for name, rows in parts.items()}
    assert not people["train"] & people["val"]
    assert not (people["train"] | people["val"]) & people["test"]
    assert sorted(np.concatenate(list(parts.values()))) == np.flatnonzero(y != MISSING).tolist()


@pytest.mark.parametrize(("share", "expected"), [(0.1, 10), (0.25, 25), (0.4, 40), (0.9, 90)])
def test_the_share_of_validation_is_what_was_asked_for(share: float, expected: int) -> None:
    exams = pd.DataFrame({"person": [f"p{i}" for i in range(120)], "split": ["train"] * 100 + ["test"] * 20})
    parts = split_rows(exams, np.tile([0, 1], 60), val_fraction=share, seed=0)
    assert len(parts["val"]) == pytest.approx(expected, abs=2)
    assert sorted([*parts["train"], *parts["val"]]) == [*range(100)]


def test_folds_are_of_people_and_not_of_exams() -> None:
    exams = pd.DataFrame({"person": list("aaaaabbbbbcccccddddde") + list("fg"), "split": ["train"] * 21 + ["test"] * 2})
    y = np.array([0] * 5 + [1] * 5 + [0] * 5 + [1] * 5 + [1] + [0, 1])
    parts = split_rows(exams, y, val_fraction=0.2, seed=0)  # five people, of whom two have the rarer class
    assert {*y[parts["train"]]} == {*y[parts["val"]]} == {0, 1}
    alone = exams.assign(person=["a"] * 5 + ["b"] * 5 + ["a"] * 5 + list("ddddde") + list("fg"))
    with pytest.raises(UsageError, match="a class needs two persons of the training part"):
        split_rows(alone, y, val_fraction=0.2, seed=0)


def test_the_head_is_fitted_in_folds_of_people() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 12, generator=generator)
    y = (torch.arange(60) < 20).numpy().astype(np.int64)
    features[:20, 4] += 4
    head = ExtremesHead(embed_dim=4)
    head.start_from(features, y, np.r_[np.repeat([0, 1], 10), np.arange(2, 42)])  # two people have the rarer class
    assert (((head(features) > 0).numpy() == y).mean()) > 0.95


def test_a_person_whom_a_later_table_finds_on_both_sides_is_refused() -> None:
    exams = pd.DataFrame({"person": list("abcdefah"), "split": ["train"] * 6 + ["test"] * 2})
    y = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    with pytest.raises(UsageError, match=r"training part are test people too: got 1 of them.*umbif index --labels"):
        split_rows(exams, y, val_fraction=0.5, seed=0)
    y[0] = MISSING  # and so nothing that could be learnt
    assert split_rows(exams, y, val_fraction=0.5, seed=0)["test"].tolist() == [6, 7]


def test_a_task_with_one_class_in_its_test_set_is_refused() -> None:
    exams = pd.DataFrame({"person": list("abcdef"), "split": ["train"] * 4 + ["test"] * 2})
    with pytest.raises(UsageError, match=r"test part.*2 positive, 0 negative"):
        split_rows(exams, np.array([0, 1, 0, 1, 1, 1]), val_fraction=0.5, seed=0)


def test_the_threshold_maximises_sensitivity_plus_specificity() -> None:
    y = np.array([0, 0, 0, 1, 0, 1, 1])
    score = np.array([0.1, 0.2, 0.3, 0.35, 0.4, 0.6, 0.9])
    assert youden_threshold(y, score) == pytest.approx(0.325)  # 1 + 3/4, against 2/3 + 1 at 0.5
    assert youden_threshold(y, np.full(7, 0.5)) == 0.5


def test_the_head_starts_from_what_the_features_say() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 12, generator=generator) * 5 + 3
    y = (features[:, 4] > 3).numpy().astype(np.int64)
    head = ExtremesHead(embed_dim=4)
    head.start_from(features, y, np.arange(200))
    assert (((head(features) > 0).numpy() == y).mean()) > 0.95
    assert int(head.linear.weight.abs().argmax()) == 4


def test_what_does_not_vary_between_training_exams_is_not_blown_up_later() -> None:
    features = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    features[:, 7] = 0
    head = ExtremesHead(embed_dim=4)
    head.start_from(features, np.arange(40) % 2, np.arange(40))
    later = features.clone()
    later[:, 7] = 0.01
    torch.testing.assert_close(head(later), head(features), atol=0.01, rtol=0)


def test_one_person_of_a_class_still_starts_the_head() -> None:
    features = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    features[:4, 3] += 6
    head = ExtremesHead(embed_dim=4)
    head.start_from(features, (np.arange(40) < 4).astype(np.int64), np.r_[np.zeros(4, np.int64), np.arange(1, 37)])
    assert head(features)[:4].min() > head(features)[4:].max()


def test_the_head_answers_in_full_precision_under_autocast() -> None:
    head, features = ExtremesHead(embed_dim=4), torch.randn(8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(features), head(features.double().float()))
        assert head(features).dtype == torch.float32


def test_extremes_leave_out_what_is_not_valid_and_scale_with_the_number_of_tokens() -> None:
    tokens = torch.arange(200.0)[None, :, None].repeat(2, 1, 1)
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[1, 100:] = False
    mean, largest, smallest = ExtremesHead(1, HeadOptions(extreme_share=0.02)).features(tokens, valid).unbind(1)
    assert mean.tolist() == [99.5, 49.5]
    assert largest.tolist() == [np.mean([196, 197, 198, 199]), np.mean([98, 99])]
    assert smallest.tolist() == [1.5, 0.5]
