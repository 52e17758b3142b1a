"""A recipe → the objects that it describes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from umbif.errors import UsageError
from umbif.recipe.check import Run, check
from umbif.recipe.classes import import_class
from umbif.recipe.compose import Recipe
from umbif.recipe.parsers import (
    arguments_of,
    as_config,
    callbacks_of,
    config_of_training,
    parser_of,
    parser_of_training,
    without_run,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback, LightningDataModule, LightningModule


@dataclass(frozen=True)
class Built:
    """The objects of a training recipe. `trainer_args` holds the keys that the recipe sets, for `Trainer(...)`."""

    model: "LightningModule"
    data: "LightningDataModule"
    trainer_args: dict[str, Any]
    callbacks: "dict[str, Callback]"
    run: Run


def build(recipe: Recipe) -> Built:
    """Builds model, data and callbacks of a training recipe. Seed before: the weights are drawn here.

    Raises:
        UsageError: What `check` finds.
    """
    _raise_problems(recipe)
    tree = recipe.tree
    parser = parser_of_training(tree)
    made = _instantiate(parser, config_of_training(tree))
    trainer_args = {name: made.trainer[name] for name in tree.get("trainer") or {}}
    callbacks = {name: made.callbacks[name] for name in callbacks_of(tree)}
    return Built(made.model, made.data, trainer_args, callbacks, Run(**tree["run"]))


def construct(recipe: Recipe) -> Any:
    """Calls what the top-level class_path of a recipe names with the recipe's keys: an object, or a function's result.

    Raises:
        UsageError: What `check` finds.
    """
    _raise_problems(recipe)
    target = import_class(recipe.tree["class_path"])
    parser, _ = parser_of(target)
    return target(**vars(_instantiate(parser, as_config(arguments_of(without_run(recipe.tree))))))


def _raise_problems(recipe: Recipe) -> None:
    problems = check(recipe)
    if problems:
        raise UsageError(problems, recipe.name)


def _instantiate(parser: "ArgumentParser", config: dict[str, Any]) -> Any:
    config = parser.parse_object(config)
    try:
        return parser.instantiate(config)
    except ValueError as error:
        # jsonargparse takes a constructor that raises for a value of the wrong type, and buries what it said.
        inner: BaseException = error
        while "Union subtypes" in str(inner) and inner.__cause__ is not None:
            inner = inner.__cause__
        raise inner from inner.__cause__
