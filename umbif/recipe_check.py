"""What a recipe says, held against the signatures of the classes it names: every mistake at once, then the objects."""

import copy
import importlib
import inspect
import pkgutil
import re
from argparse import ArgumentError
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import TYPE_CHECKING, Any

from umbif.errors import Problem, UsageError, nearest
from umbif.ranges import Seed
from umbif.recipe import MISSING, Recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback, LightningDataModule, LightningModule

TRAINING_KEYS = ("run", "model", "data", "trainer", "callbacks")
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
REQUIRED = "the following arguments are required: "
# Pydantic, which jsonargparse asks about a number with a range, says one thing in three lines.
OUT_OF_RANGE = re.compile(
    r"\d+ validation error.*\n.*should (?:be|have) (?:a )?(?:valid )?(.+?)(?: after validation.*)? \[type=.*\n.*/v/\w+"
)
PLAIN = {
    "integer": "int", "number": "float", "NoneType": "null", "greater than or equal to": "at least",
    "less than or equal to": "at most", "greater than": "more than",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The `run:` block: the run folder, and the seed from which every random number of the run follows."""

    dir: str
    seed: Seed = 0


@dataclass(frozen=True)
class Built:
    """The objects of a training recipe. `trainer_args` holds the keys that the recipe sets, for `Trainer(...)`."""

    model: "LightningModule"
    data: "LightningDataModule"
    trainer_args: dict[str, Any]
    callbacks: "dict[str, Callback]"
    run: Run


def check(recipe: Recipe) -> list[Problem]:
    """Every unknown key, wrong type, missing value and class that cannot be found, at all levels.

    Imports the classes that the recipe names, and builds none.
    """
    tree = recipe.tree
    problems = [*_missing_values(tree, ""), *_check_arguments(Run, tree.get("run"), "run")]
    if "class_path" in tree:
        problems += _check_node(_node(tree), "", None)
    else:
        problems += _check_training(tree)
    return problems or _check_whole(recipe)


def build(recipe: Recipe) -> Built:
    """Builds model, data and callbacks of a training recipe. Seed before: the weights are drawn here.

    Raises:
        UsageError: What `check` finds.
    """
    _raise_problems(recipe)
    tree = recipe.tree
    parser = _training_parser(tree)
    made = _instantiate(parser, _training_config(tree))
    trainer_args = {name: made.trainer[name] for name in tree.get("trainer") or {}}
    callbacks = {name: made.callbacks[name] for name in _callbacks(tree)}
    return Built(made.model, made.data, trainer_args, callbacks, Run(**tree["run"]))


def construct(recipe: Recipe) -> Any:
    """Calls what the top-level class_path of a recipe names with the recipe's keys: an object, or a function's result.

    Raises:
        UsageError: What `check` finds.
    """
    _raise_problems(recipe)
    target = _import(recipe.tree["class_path"])
    parser, _ = _parser(target)
    return target(**vars(_instantiate(parser, _config(_arguments(_node(recipe.tree))))))


def _raise_problems(recipe: Recipe) -> None:
    problems = check(recipe)
    if problems:
        raise UsageError(problems, recipe.name)


def _check_training(tree: Mapping[str, Any]) -> list[Problem]:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

    problems = [_unknown(key, key, TRAINING_KEYS) for key in tree if key not in TRAINING_KEYS]
    for key, base in (("model", LightningModule), ("data", LightningDataModule)):
        if tree.get(key) is None:
            problems.append(Problem(f"{key} is missing", cure=f"Name its class: {key}.class_path=…"))
        else:
            problems += _check_node(tree[key], key, base)
    if isinstance(tree.get("callbacks") or {}, Mapping):
        for name, node in _callbacks(tree).items():
            problems += _check_node(node, f"callbacks.{name}", Callback)
    else:
        problems.append(Problem("callbacks must be name: class_path …", _short(tree["callbacks"])))
    return problems + _check_trainer(Trainer, tree.get("trainer"))


def _check_trainer(target: Callable[..., Any], arguments: Any) -> list[Problem]:
    own = [name for name in TRAINER_OWN if isinstance(arguments, Mapping) and name in arguments]
    problems = [Problem(f"trainer.{name} is no value of a recipe", cure=TRAINER_OWN[name]) for name in own]
    rest = {name: arguments[name] for name in arguments if name not in own} if own else arguments
    return problems + _check_arguments(target, rest, "trainer", skip=TRAINER_OWN)


def _check_node(node: Any, key: str, base: type | None) -> list[Problem]:
    """One class with its arguments, and all classes within them."""
    if not isinstance(node, Mapping) or "class_path" not in node:
        cure = f"Write {_dot(key, 'class_path')}: package.module.Class"
        return [Problem(f"{key} must name a class", _short(node), cure)]
    try:
        target = _import(node["class_path"])
    except UsageError as error:
        return [Problem(f"{_dot(key, 'class_path')}: {p.what}", p.got, p.cure) for p in error.problems]
    problems = _check_arguments(target, _arguments(node), key)
    if base is not None and not (inspect.isclass(target) and issubclass(target, base)):
        problems.insert(0, Problem(f"{key} must be a {base.__name__}", node["class_path"]))
    return problems


def _check_arguments(
    target: Callable[..., Any], arguments: Any, key: str, skip: Collection[str] = ()
) -> list[Problem]:
    if not isinstance(arguments or {}, Mapping):
        return [Problem(f"{key} must hold keys and values", _short(arguments))]
    arguments = arguments or {}
    parser, names = _parser(target, skip)
    problems = []
    for name, value in arguments.items():
        dotted = _dot(key, name)
        if name not in names:
            problems.append(_unknown_or_deeper(parser, key, name, names))
        else:
            problems += _check_nested(value, dotted) or _check_type(parser, (name,), value, dotted)
    absent = [_dot(key, name) for name in _required(_error(parser, {})) if name.split(".")[0] not in arguments]
    return problems + [_required_problem(name) for name in absent]


def _check_nested(value: Any, key: str) -> list[Problem]:
    if isinstance(value, Mapping) and "class_path" in value:
        return _check_node(value, key, None)
    if isinstance(value, Mapping):
        return list(chain.from_iterable(_check_nested(item, _dot(key, name)) for name, item in value.items()))
    if isinstance(value, list):
        return list(chain.from_iterable(_check_nested(item, f"{key}[{i}]") for i, item in enumerate(value)))
    return []


def _check_type(parser: "ArgumentParser", path: tuple[str, ...], value: Any, key: str) -> list[Problem]:
    """Gives the parser this one value, because it stops at the first that it does not like."""
    if MISSING in str(value):
        return []
    config = _config(value)
    for name in reversed(path):
        config = {name: config}
    error = _error(parser, config)
    if not error:
        return []
    if error.startswith(REQUIRED):
        null = value is None and ".".join(path) in _required(error)
        return [Problem(f"{key} needs a value", "null")] if null else []
    if isinstance(value, Mapping) and "class_path" not in value:
        inner = [p for name, item in value.items() for p in _check_type(parser, (*path, name), item, _dot(key, name))]
        if inner:
            return inner
    if REQUIRED in error:  # of a dataclass, which is given here in part unless it is a whole argument
        return [] if len(path) > 1 else [_required_problem(f"{key}.{name}") for name in _required(error)]
    unknown = re.search(r"Option '(.+?)' is not accepted|does not accept option '(.+?)'", error)
    if unknown:
        name, group = unknown[1] or unknown[2], parser.get_defaults().get(".".join(path[:-1]))
        known = vars(group) if hasattr(group, "__dict__") else ()
        return [_unknown(key if path[-1] == name else _dot(key, name), name, known)]
    return [_wrong_type(error, key, value)]


def _check_whole(recipe: Recipe) -> list[Problem]:
    """What only the parser of the whole recipe can see."""
    if "class_path" in recipe.tree:
        parser, _ = _parser(_import(recipe.tree["class_path"]))
        error = _error(parser, _config(_arguments(_node(recipe.tree))))
    else:
        error = _error(_training_parser(recipe.tree), _training_config(recipe.tree))
    return [Problem(" ".join(error.split()))] if error else []


def _missing_values(tree: Any, key: str) -> list[Problem]:
    if isinstance(tree, Mapping):
        return list(chain.from_iterable(_missing_values(item, _dot(key, name)) for name, item in tree.items()))
    return [Problem(f"{key} has no value yet", cure=f"Give it: {key}=VALUE")] if tree == MISSING else []


def _parser(target: Callable[..., Any], skip: Collection[str] = ()) -> "tuple[ArgumentParser, list[str]]":
    """A parser for the arguments of a class or function, and their names."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    names = add(target, fail_untyped=False, skip=set(skip))
    return parser, list(names)


def _training_parser(tree: Mapping[str, Any]) -> "ArgumentParser":
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False, required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=True)
    for name in _callbacks(tree):
        parser.add_subclass_arguments(Callback, f"callbacks.{name}", fail_untyped=False, required=True)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, fail_untyped=False, skip={*TRAINER_OWN})
    return parser


def _training_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    config = {"model": tree["model"], "data": tree["data"], "trainer": tree.get("trainer") or {}}
    callbacks = _callbacks(tree)
    return _config(config | ({"callbacks": callbacks} if callbacks else {}))


def _config(value: Any) -> Any:
    """As jsonargparse spells it, with init_args. A copy, because the parser writes into what it is given."""
    if isinstance(value, list):
        return [_config(item) for item in value]
    if not isinstance(value, Mapping):
        return copy.deepcopy(value)
    inner = {name: _config(item) for name, item in value.items() if name != "class_path"}
    return {"class_path": value["class_path"], "init_args": inner} if "class_path" in value else inner


def _node(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != "run"}


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name != "class_path"}


def _callbacks(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: node for name, node in (tree.get("callbacks") or {}).items() if node is not None}


def _error(parser: "ArgumentParser", config: dict[str, Any]) -> str:
    try:
        parser.parse_object(config, defaults=False)
    except ArgumentError as error:
        return str(error)
    return ""


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


def _required(error: str) -> list[str]:
    return error.split(REQUIRED)[1].splitlines()[0].split(", ") if REQUIRED in error else []


def _required_problem(key: str) -> Problem:
    return Problem(f"{key} is required", cure=f"Give it: {key}=VALUE")


def _unknown(key: str, name: str, valid: Collection[str]) -> Problem:
    return Problem(f"unknown key {key}", cure=nearest(name, valid))


def _unknown_or_deeper(parser: "ArgumentParser", key: str, name: str, valid: Collection[str]) -> Problem:
    """The nearest name may stand a level deeper: model.num_visible is model.masking.num_visible."""
    deeper = {action.dest.rpartition(".")[2]: action.dest for action in parser._actions if "." in action.dest}
    close = [] if get_close_matches(name, valid) else get_close_matches(name, deeper, n=1)
    hint = f"Did you mean {_dot(key, deeper[close[0]])}?" if close else nearest(name, valid)
    return Problem(f"unknown key {_dot(key, name)}", cure=hint)


def _wrong_type(error: str, key: str, value: Any) -> Problem:
    """Ten lines of jsonargparse → `expected int or null, got 'abc'`."""
    subclass = re.search(r"subclass of (\w+)", error)
    if subclass and isinstance(value, Mapping):
        return Problem(f"{key}: expected class {subclass[1]}", value.get("class_path", _short(value)))
    if subclass or "dot import path" in error:
        return Problem(f"{key}: expected class_path and its arguments", _short(value))
    error = OUT_OF_RANGE.sub(r"Expected \1", error)
    found = re.findall(r"Expected (?:an? )?(.+?)(?:\. Got value: (.*))?$", error, re.MULTILINE)
    # In a union the line that quotes a value speaks of an item inside the right container: it says more.
    quoted = [pair for pair in found if pair[1]] or found
    expected = " or ".join(dict.fromkeys(_plain_type(text) for text, _ in quoted)) or "another value"
    item = quoted[0][1] if quoted else ""
    choices = re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[(.*?)\]", error)))
    hint = nearest(value, choices) if isinstance(value, str) and choices else ""
    got = item if item and item != str(value) else _short(value)
    return Problem(f"{key}: expected {expected}", got, hint if hint.startswith("Did") else "")


def _plain_type(text: str) -> str:
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    text = re.sub(r"(?:[A-Za-z_]\w*\.)+([A-Za-z_])", r"\1", text)
    text = re.sub(r"Literal\[(.*?)\]", r"one of \1", text)
    for said, plain in PLAIN.items():
        text = text.replace(said, plain)
    return text


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dot(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _import(class_path: Any) -> Any:
    if not isinstance(class_path, str) or "." not in class_path:
        cure = "Write the whole path, such as umbif.pretrain.umbif.UMBIF"
        raise UsageError(Problem("not an import path", _short(class_path), cure))
    parts = class_path.split(".")
    found, used = _import_module(parts)
    for i in range(used, len(parts)):
        if not hasattr(found, parts[i]):
            where = ".".join(parts[:i])
            raise UsageError(Problem(f"{where} has no {parts[i]}", class_path, nearest(parts[i], _public(found))))
        found = getattr(found, parts[i])
    if not callable(found):
        raise UsageError(Problem("neither a class nor a function", class_path))
    return found


def _import_module(parts: list[str]) -> tuple[Any, int]:
    """The longest module that the path begins with, and how many of its names that took."""
    found, used = None, 0
    for used in range(1, len(parts) + 1):
        name = ".".join(parts[:used])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name and not str(error).endswith("is not a package"):
                raise UsageError(Problem(f"{name} needs a package that is not installed", error.name or "")) from None
            used -= 1
            break
        except Exception as error:  # a user's own file may hold any mistake, and it is theirs to read
            raise UsageError(Problem(f"{name} cannot be imported", f"{type(error).__name__}: {error}")) from None
    if found is None:
        raise UsageError(Problem("no such package", parts[0], "Is it installed, or its folder in PYTHONPATH?"))
    return found, used


def _public(module: Any) -> list[str]:
    """Submodules, and the classes and functions that are at home in the module's package."""
    top = getattr(module, "__name__", "").split(".")[0]
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and str(getattr(value, "__module__", "")).split(".")[0] == top
    ]
    return own + [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", None) or [])]
