"""One recipe from its files and what was typed: include, merge, override, resolve.

The files that a recipe includes come first, in order, then its own keys, then `key=value` from the command line;
interpolations are resolved once, after all of them. What a launcher has decided stands between file and typed keys.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from umbif.errors import Problem, UsageError, nearest, one_line
from umbif.recipe.files import PARTS, files_like, find_recipe, relative
from umbif.recipe.launched import launched
from umbif.recipe.layers import hoist, join_key, layers_of, leaves, load_part, merge, read_value, values_of
from umbif.recipe.text import render, rows_of

COMMAND_LINE = "command line"
MISSING = "???"  # OmegaConf's mark for a value that the user must give
PART_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class Recipe:
    """A recipe, composed.

    Attributes:
        name: `pretrain/umbif_tiny`, or the stem of a user's file.
        path: The file.
        about: summary, paper, hardware, reference.
        tree: Every other key, resolved; the arguments of a class stand beside its `class_path`. A value that the user
            must still give is `???`.
        origins: Dotted key of each leaf → the file it came from, `command line` or `default`.
        overrides: What was typed.
    """

    name: str
    path: Path
    about: dict[str, Any]
    tree: dict[str, Any]
    origins: dict[str, str]
    overrides: tuple[str, ...]

    @property
    def typed(self) -> list[str]:
        """What stands for it on a command line."""
        return [self.name if relative(self.path) != str(self.path) else str(self.path), *self.overrides]

    @property
    def whole(self) -> dict[str, Any]:
        """All that it says, `about` first."""
        return {"about": self.about, **self.tree} if self.about else self.tree

    def to_yaml(self) -> str:
        """The recipe, resolved and complete: a file that can be run again by its path."""
        return f"# {' '.join([self.name, *self.overrides])}\n" + render(self.whole, {})


def compose(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Merges a recipe's files and the overrides, and resolves the interpolations.

    A class that is replaced takes its arguments away with it; a list is replaced whole. `hardware=NAME` puts
    `_parts/hardware/NAME.yaml` in the place of the hardware part that the recipe includes; on a recipe that includes
    none it comes after the recipe's own keys. So do `encoder=NAME` and the other folders of parts.

    Args:
        name: `pretrain/umbif_tiny`, or the path of a .yaml file.
        overrides: `key=value`, the value written as YAML; `hardware=NAME`, `encoder=NAME`.

    Raises:
        UsageError: An unknown recipe or part, a file that is not YAML, an override without `=`, an interpolation that
            leads nowhere. Unknown keys and wrong types are found by `umbif.recipe.check`.
    """
    path = find_recipe(name)
    origin = relative(path)
    title = path.stem if origin == str(path) else origin.removesuffix(".yaml")
    parts, typed = _read_overrides(overrides)
    tree = leaves({"run": {"dir": f"runs/{title}", "seed": 0}}, "default")
    for layer in layers_of(path, parts):
        tree = merge(tree, layer.tree)
    if "trainer" in tree:
        told = launched()
        if problems := [*told.contradictions(typed)]:
            raise UsageError(problems)
        tree = merge(tree, told.layer())
    tree = merge(tree, typed)
    resolved = _resolve(values_of(tree), name)
    about = resolved.pop("about", None) or {}
    return Recipe(title, path, about, resolved, dict(_origins(tree)), tuple(overrides))


def read_tree(path: Path) -> dict[str, Any]:
    """The keys of a resolved recipe, such as the one that a run folder holds, without `about`."""
    return compose(str(path)).tree


def encoder_part(tree: Mapping[str, Any]) -> str | None:
    """The part that has the encoder of a recipe, whatever that recipe is called: `encoder=` takes it to another one."""
    encoder = tree["model"]["encoder"]
    for name in sorted(files_like(f"{PARTS}encoder/*.yaml")):
        part = values_of(load_part(name).tree)["model"]["encoder"]
        if all(encoder.get(key) == value for key, value in part.items()):
            return Path(name).stem
    return None


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The parts asked for, and all other overrides as one tree, so that their order decides nothing but repeats."""
    groups = {name.split("/")[1] for name in files_like(f"{PARTS}*/*.yaml")}
    chosen, tree, problems = dict[str, str](), dict[str, Any](), list[Problem]()
    for text in overrides:
        key, sign, value = text.partition("=")
        parts = [part for part in key.strip().split(".") if part != "init_args"]
        if not sign or not all(parts):
            problems.append(Problem("an override is written key=value", repr(text), "Such as model.lr=1e-4"))
        elif key in groups and PART_NAME.fullmatch(value):
            chosen[key] = value
        else:
            try:
                branch = hoist(read_value(value))
            except (yaml.YAMLError, OmegaConfBaseException) as error:
                problems.append(Problem(f"{key} has no YAML value: {one_line(error)}", value, "Put it in quotes"))
                continue
            for part in reversed(parts):
                branch = {part: branch}
            tree = merge(tree, leaves(branch, COMMAND_LINE))
    if problems:
        raise UsageError(problems)
    return chosen, tree


def _origins(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield from _origins(item, join_key(key, name))
    else:
        yield key, tree.origin


def _resolve(plain: dict[str, Any], name: str) -> dict[str, Any]:
    failed: dict[str, Exception] = {}
    try:
        tree = _resolved(OmegaConf.create(plain), "", failed)
    except RecursionError:
        raise UsageError(Problem("interpolations run in a circle"), name) from None
    except OmegaConfBaseException as error:
        tree, failed = {}, {str(getattr(error, "full_key", "")): error}
    if failed:
        known = [key for _, key in rows_of(plain)]
        raise UsageError([_unresolved(error, key, known) for key, error in failed.items()], name)
    return tree


def _resolved(node: Any, key: str, failed: dict[str, Exception]) -> Any:
    if isinstance(node, ListConfig):
        return [_item(node, i, f"{key}[{i}]", failed) for i in range(len(node))]
    if isinstance(node, DictConfig):
        return {name: _item(node, name, join_key(key, name), failed) for name in node}
    return node


def _item(node: Any, name: Any, key: str, failed: dict[str, Exception]) -> Any:
    try:
        return _resolved(node[name], key, failed)
    except (MissingMandatoryValue, InterpolationToMissingValueError):
        return MISSING
    except OmegaConfBaseException as error:
        if RecursionError.__name__ in str(error):  # OmegaConf wraps one or not, by where the stack ends
            raise RecursionError from None
        failed[key] = error
        return None


def _unresolved(error: Exception, key: str, known: Sequence[str]) -> Problem:
    missing = re.search(r"Interpolation key '(.+?)' not found", str(error))
    if not missing:
        return Problem(f"{key} cannot be resolved", one_line(error))
    hint = nearest(missing[1], [other for other in known if other != key])
    cure = hint if hint.startswith("Did") else f"Give it: {missing[1]}=VALUE, or change {key}"
    return Problem(f"{key} refers to {missing[1]}, which is not set", cure=cure)
