"""A recipe held against the signatures of the classes that it names: every mistake at once, nothing built."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from umbif.errors import Problem, UsageError
from umbif.ranges import NonNegativeInt, Seed
from umbif.recipe.classes import import_class
from umbif.recipe.compose import MISSING, Recipe
from umbif.recipe.layers import join_key
from umbif.recipe.parsers import (
    TRAINER_OWN,
    arguments_of,
    as_config,
    callbacks_of,
    config_of_training,
    error_of,
    parser_of,
    parser_of_training,
    without_run,
)
from umbif.recipe.words import (
    REQUIRED,
    required_key,
    required_names,
    shortened,
    unaccepted,
    unknown_key,
    unknown_or_deeper,
    wrong_type,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COUNTS = ("accumulate_grad_batches", "num_nodes", "log_every_n_steps")  # of which Lightning takes 0, or says little
TRAINING_KEYS = ("run", "model", "data", "trainer", "callbacks")


@dataclass(frozen=True)
class Run:
    """The `run:` block.

    Args:
        dir: The run folder.
        seed: From which every random number of the run follows.
        restarts: How often the processes that `umbif fit` starts are started again where one of them has fallen and no
            checkpoint is newer than at the time before.
    """

    dir: str
    seed: Seed = 0
    restarts: NonNegativeInt = 3


def check(recipe: Recipe) -> list[Problem]:
    """Every unknown key, wrong type, missing value and class that cannot be found, at all levels.

    Imports the classes that the recipe names, and builds none.
    """
    tree = recipe.tree
    problems = [*_missing_values(tree, ""), *_check_arguments(Run, tree.get("run"), "run")]
    if "class_path" in tree:
        problems += _check_node(without_run(tree), "", None)
    else:
        problems += _check_training(tree)
    return problems or _check_whole(recipe)


def _check_training(tree: Mapping[str, Any]) -> list[Problem]:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

    problems = [unknown_key(key, key, TRAINING_KEYS) for key in tree if key not in TRAINING_KEYS]
    for key, base in (("model", LightningModule), ("data", LightningDataModule)):
        if tree.get(key) is None:
            problems.append(Problem(f"{key} is missing", cure=f"Name its class: {key}.class_path=…"))
        else:
            problems += _check_node(tree[key], key, base)
    if isinstance(tree.get("callbacks") or {}, Mapping):
        for name, node in callbacks_of(tree).items():
            problems += _check_node(node, f"callbacks.{name}", Callback)
    else:
        problems.append(Problem("callbacks must be name: class_path …", shortened(tree["callbacks"])))
    return problems + _check_trainer(Trainer, tree.get("trainer"))


def _check_trainer(target: Callable[..., Any], arguments: Any) -> list[Problem]:
    own = [name for name in TRAINER_OWN if isinstance(arguments, Mapping) and name in arguments]
    problems = [Problem(f"trainer.{name} is no value of a recipe", cure=TRAINER_OWN[name]) for name in own]
    counts = {name: arguments.get(name) for name in COUNTS} if isinstance(arguments, Mapping) else {}
    few = {name: num for name, num in counts.items() if isinstance(num, int) and num < 1}
    problems += [Problem(f"trainer.{name}: expected at least 1", str(num)) for name, num in few.items()]
    rest = {name: arguments[name] for name in arguments if name not in own} if own else arguments
    return problems + _check_arguments(target, rest, "trainer", skip=TRAINER_OWN)


def _check_node(node: Any, key: str, base: type | None) -> list[Problem]:
    """One class with its arguments, and all classes within them."""
    if not isinstance(node, Mapping) or "class_path" not in node:
        cure = f"Write {join_key(key, 'class_path')}: package.module.Class"
        return [Problem(f"{key} must name a class", shortened(node), cure)]
    try:
        target = import_class(node["class_path"])
    except UsageError as error:
        return [Problem(f"{join_key(key, 'class_path')}: {p.what}", p.got, p.cure) for p in error.problems]
    problems = _check_arguments(target, arguments_of(node), key)
    if base is not None and not (inspect.isclass(target) and issubclass(target, base)):
        problems.insert(0, Problem(f"{key} must be a {base.__name__}", node["class_path"]))
    return problems


def _check_arguments(target: Callable[..., Any], arguments: Any, key: str, skip: Collection[str] = ()) -> list[Problem]:
    if not isinstance(arguments or {}, Mapping):
        return [Problem(f"{key} must hold keys and values", shortened(arguments))]
    arguments = arguments or {}
    parser, names = parser_of(target, skip)
    problems = []
    for name, value in arguments.items():
        dotted = join_key(key, name)
        if name not in names:
            problems.append(unknown_or_deeper(parser, key, name, names))
        else:
            problems += _check_nested(value, dotted) or _check_type(parser, (name,), value, dotted)
    absent = [name for name in required_names(error_of(parser, {})) if name.split(".")[0] not in arguments]
    return problems + [required_key(join_key(key, name)) for name in absent]


def _check_nested(value: Any, key: str) -> list[Problem]:
    if isinstance(value, Mapping) and "class_path" in value:
        return _check_node(value, key, None)
    if isinstance(value, Mapping):
        return list(chain.from_iterable(_check_nested(item, join_key(key, name)) for name, item in value.items()))
    if isinstance(value, list):
        return list(chain.from_iterable(_check_nested(item, f"{key}[{i}]") for i, item in enumerate(value)))
    return []


def _check_type(parser: "ArgumentParser", path: tuple[str, ...], value: Any, key: str) -> list[Problem]:
    """Gives the parser this one value, because it stops at the first that it does not like."""
    if MISSING in str(value):
        return []
    config = as_config(value)
    for name in reversed(path):
        config = {name: config}
    error = error_of(parser, config)
    if not error:
        return []
    if error.startswith(REQUIRED):
        null = value is None and ".".join(path) in required_names(error)
        return [Problem(f"{key} needs a value", "null")] if null else []
    if isinstance(value, Mapping) and "class_path" not in value:
        deeper = (_check_type(parser, (*path, name), item, join_key(key, name)) for name, item in value.items())
        if inner := list(chain.from_iterable(deeper)):
            return inner
    if REQUIRED in error:  # of a dataclass, which is given here in part unless it is a whole argument
        return [] if len(path) > 1 else [required_key(f"{key}.{name}") for name in required_names(error)]
    if name := unaccepted(error):
        group = parser.get_defaults().get(".".join(path[:-1]))
        known = vars(group) if hasattr(group, "__dict__") else ()
        return [unknown_key(key if path[-1] == name else join_key(key, name), name, known)]
    return [wrong_type(error, key, value)]


def _check_whole(recipe: Recipe) -> list[Problem]:
    """What only the parser of the whole recipe can see."""
    if "class_path" in recipe.tree:
        parser, _ = parser_of(import_class(recipe.tree["class_path"]))
        error = error_of(parser, as_config(arguments_of(without_run(recipe.tree))))
    else:
        error = error_of(parser_of_training(recipe.tree), config_of_training(recipe.tree))
    return [Problem(" ".join(error.split()))] if error else []


def _missing_values(tree: Any, key: str) -> list[Problem]:
    if isinstance(tree, Mapping):
        return list(chain.from_iterable(_missing_values(item, join_key(key, name)) for name, item in tree.items()))
    return [Problem(f"{key} has no value yet", cure=f"Give it: {key}=VALUE")] if tree == MISSING else []
