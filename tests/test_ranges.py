"""Numbers of a recipe that mean nothing are refused before anything is built, all of them at once."""

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest

from umbif.corpus.preprocess import Preparation
from umbif.errors import UsageError
from umbif.recipe.check import check
from umbif.recipe.classes import import_class
from umbif.recipe.compose import compose

ROOT = Path(__file__).resolve().parents[1]
NAMED = sorted({
    class_path for path in (ROOT / "recipes").rglob("*.yaml")
    for class_path in re.findall(r"class_path: (umbif\S+)", path.read_text())
})  # fmt: skip


def refused(name: str, values: dict[str, tuple[object, str]]) -> tuple[list[str], list[str]]:
    """What a recipe with these values is told, and what it should be."""
    found = [str(problem) for problem in check(compose(name, [f"{key}={value}" for key, (value, _) in values.items()]))]
    told = [f"{key}: expected {expected}: got {value}" for key, (value, expected) in values.items()]
    return sorted(found), sorted(told)


def test_numbers_of_a_pretraining_that_mean_nothing_are_refused_together():
    found, expected = refused(
        "pretrain/umbif_tiny",
        {
            "run.seed": (-1, "at least 0"),
            "data.seed": (-1, "at least 0"),
            "model.encoder.depth": (0, "at least 1"),
            "model.encoder.patch_size": (0, "at least 1"),
            "model.encoder.drop_path": (1, "less than 1"),
            "model.masking.num_visible": (0, "at least 1"),
            "model.masking.num_targets": (0, "at least 1 or null"),
            "model.masking.max_visible_share": (1.5, "at most 1"),
            "model.contrast.temperature": (0, "more than 0"),
            "model.contrast.projector_depth": (0, "at least 1"),
            "model.contrast.channel_share": (1.5, "at most 1"),
            "model.ema_decay": (2, "less than 1 or null"),
            "model.lr": (-1, "at least 0"),
            "model.warmup_steps": (-5, "at least 0"),
            "model.augmentation.flip_probability": (1.5, "at most 1"),
            "data.num_workers": (-1, "at least 0"),
            "data.cache_gib": (-1, "at least 0"),
            "data.disjoint_share": (-0.1, "at least 0"),
            "callbacks.monitors.every_n_steps": (0, "at least 1"),
            "callbacks.checkpoint.every_n_steps": (0, "at least 1"),
        },
    )
    assert found == expected


def test_numbers_of_a_finetuning_that_mean_nothing_are_refused_together():
    found, expected = refused(
        "finetune/idh",
        {
            "model.layer_decay": (-1, "more than 0"),
            "model.max_tokens": (0, "at least 1 or null"),
            "model.head.extreme_share": (5, "at most 1"),
            "model.head.dropout": (2, "less than 1"),
            "data.val_fraction": (5, "less than 1"),
            "data.num_workers": (-1, "at least 0"),
            "data.label.positive": ([], "at least 1 item"),
        },
    )
    assert [line for line in found if "has no value yet" not in line] == expected


def test_numbers_of_a_preparation_that_mean_nothing_are_refused_together():
    found, expected = refused(
        "prepare/brain_1mm",
        {"spacing_mm": (0, "more than 0"), "compression_level": (99, "at most 9"), "min_brain_ml": (-1, "at least 0")},
    )
    assert found == expected


@pytest.mark.parametrize(("value", "got"), [(".nan", "nan"), (".inf", "inf")])
def test_a_number_must_be_finite(value, got):
    found = check(compose("pretrain/umbif_tiny", [f"model.lr={value}"]))
    assert [str(problem) for problem in found] == [f"model.lr: expected finite float: got {got}"]


def test_percentiles_must_rise():
    with pytest.raises(UsageError, match=r"clip_percentiles must rise: got 60 to 40"):
        Preparation(clip_percentiles=(60, 40))


@pytest.mark.parametrize("class_path", NAMED)
def test_no_number_of_a_recipe_is_without_a_range(class_path):
    assert without_a_range(import_class(class_path)) == []


def without_a_range(target: type) -> list[str]:
    """Arguments, also of the settings within, that are numbers and nothing more."""
    init = target.__init__ if not dataclasses.is_dataclass(target) else target
    hints = typing.get_type_hints(init, include_extras=True)
    names = [name for name in inspect.signature(target).parameters if name in hints]
    bare = [f"{target.__name__}.{name}" for name in names if {int, float} & {*leaves(hints[name])}]
    inner = [leaf for name in names for leaf in leaves(hints[name]) if dataclasses.is_dataclass(leaf)]
    return bare + [found for leaf in inner for found in without_a_range(leaf)]


def leaves(hint: object) -> list[object]:
    """The types that a hint is made of; one with a range is whole."""
    if typing.get_origin(hint) in (None, typing.Annotated, typing.Literal):
        return [hint]
    return [leaf for argument in typing.get_args(hint) for leaf in leaves(argument)]
