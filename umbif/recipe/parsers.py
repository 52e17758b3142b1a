"""Classes and functions → parsers of their arguments, by their signatures; and recipes as these parsers spell them."""

import copy
import inspect
from argparse import ArgumentError
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Arguments of Lightning's Trainer that UMBIF gives itself, and what to set instead.
TRAINER_OWN = {
    "callbacks": "Name them under callbacks, as name: class_path …",
    "logger": "metrics.csv and TensorBoard are written always",
    "plugins": "Checkpoints are written by callbacks.checkpoint",
    "default_root_dir": "Set run.dir",
    "enable_checkpointing": "Set callbacks.checkpoint=null to go without",
    "use_distributed_sampler": "The stream shares itself out",
    "gradient_clip_val": "Set model.gradient_clip",
    "limit_train_batches": "The stream is endless: set trainer.max_steps",
    "overfit_batches": "Prepare a small corpus, or set trainer.max_steps",
    "reload_dataloaders_every_n_epochs": "The stream is one endless epoch",
    "fast_dev_run": "Set trainer.max_steps=1",
    "gradient_clip_algorithm": "The norm is clipped, to model.gradient_clip",
}


def parser_of(target: Callable[..., Any], skip: Collection[str] = ()) -> "tuple[ArgumentParser, list[str]]":
    """A parser for the arguments of a class or function, and their names."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    names = add(target, fail_untyped=False, skip=set(skip))
    return parser, list(names)


def parser_of_training(tree: Mapping[str, Any]) -> "ArgumentParser":
    """A parser for all of a recipe that trains."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False, required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=True)
    for name in callbacks_of(tree):
        parser.add_subclass_arguments(Callback, f"callbacks.{name}", fail_untyped=False, required=True)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, fail_untyped=False, skip={*TRAINER_OWN})
    return parser


def config_of_training(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that trains, as that parser takes it."""
    config = {"model": tree["model"], "data": tree["data"], "trainer": tree.get("trainer") or {}}
    callbacks = callbacks_of(tree)
    return as_config(config | ({"callbacks": callbacks} if callbacks else {}))


def as_config(value: Any) -> Any:
    """As jsonargparse spells it, with init_args. A copy, because the parser writes into what it is given."""
    if isinstance(value, list):
        return [as_config(item) for item in value]
    if not isinstance(value, Mapping):
        return copy.deepcopy(value)
    inner = {name: as_config(item) for name, item in value.items() if name != "class_path"}
    return {"class_path": value["class_path"], "init_args": inner} if "class_path" in value else inner


def without_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a class is called with, of a recipe that is one class."""
    return {name: value for name, value in tree.items() if name != "run"}


def arguments_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside a class_path."""
    return {name: value for name, value in node.items() if name != "class_path"}


def callbacks_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The callbacks that were not taken away with null."""
    return {name: node for name, node in (tree.get("callbacks") or {}).items() if node is not None}


def error_of(parser: "ArgumentParser", config: dict[str, Any]) -> str:
    """What a parser says against values; nothing if it takes them."""
    try:
        parser.parse_object(config, defaults=False)
    except ArgumentError as error:
        return str(error)
    return ""
