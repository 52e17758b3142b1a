"""Recipes: find, include, merge, override, resolve, show, copy. The only file that knows YAML.

A recipe is one readable file. The files it includes come first, in order, then its own keys, then `key=value` from the
command line; interpolations are resolved once, after all of them. `recipe_check.py` checks and builds the result.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from umbif.errors import Problem, UsageError, nearest, one_line
from umbif.files import reading

COMMAND_LINE = "command line"
MISSING = "???"  # OmegaConf's mark for a value that the user must give
PARTS = "_parts/"
PART_NAME = re.compile(r"\w+")
COMMENT_COLUMN = 64


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

    def to_yaml(self) -> str:
        """The recipe, resolved and complete: a file that can be run again by its path."""
        return f"# {' '.join([self.name, *self.overrides])}\n" + _render(_with_about(self), {})


def recipe_roots() -> list[Path]:
    """The folders of recipes: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "_recipes", package.parent / "recipes") if folder.is_dir()]


def list_recipes(group: str | None = None) -> list[str]:
    """The names of the recipes that can be run, or of one group such as `pretrain`; UsageError if it has none."""
    names = sorted(_named())
    if group is None:
        return names
    chosen = [name for name in names if name.startswith(f"{group.rstrip('/')}/")]
    if not chosen:
        groups = {name.rsplit("/", 1)[0] for name in names if "/" in name}
        raise UsageError(Problem("no such group of recipes", group, nearest(group, groups)))
    return chosen


def find_recipe(name: str) -> Path:
    """The file of a recipe's name, or of a path that ends in .yaml; UsageError with the nearest name if none."""
    path = Path(name).expanduser()
    if path.suffix == ".yaml" and path.is_file():
        return path
    named = _named()
    found = named.get(name.removesuffix(".yaml"))
    if found is None:
        raise UsageError(Problem("no such recipe", name, nearest(name.removesuffix(".yaml"), named)))
    return found


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
            leads nowhere. Unknown keys and wrong types are found by `umbif.recipe_check.check`.
    """
    path = find_recipe(name)
    origin = _relative(path)
    title = path.stem if origin == str(path) else origin.removesuffix(".yaml")
    parts, typed = _read_overrides(overrides)
    tree = _leaves({"run": {"dir": f"runs/{title}", "seed": 0}}, "default")
    for layer in (*_layers(path, parts), _Layer(typed, [], {})):
        tree = _merge(tree, layer.tree)
    resolved = _resolve(_values(tree), name)
    about = resolved.pop("about", None) or {}
    return Recipe(title, path, about, resolved, dict(_origins(tree)), tuple(overrides))


def read_tree(path: Path) -> dict[str, Any]:
    """The keys of a resolved recipe, such as the one that a run folder holds, without `about`."""
    return compose(str(path)).tree


def encoder_part(tree: Mapping[str, Any]) -> str | None:
    """The part that has the encoder of a recipe, whatever that recipe is called: `encoder=` takes it to another one."""
    encoder = tree["model"]["encoder"]
    for name in sorted(_files(f"{PARTS}encoder/*.yaml")):
        part = _values(_load_part(name).tree)["model"]["encoder"]
        if all(encoder.get(key) == value for key, value in part.items()):
            return Path(name).stem
    return None


def show(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with the origin of every value as a comment."""
    tree = _with_about(recipe)
    return _render(tree, {key: _origin_of(key, recipe.origins) for _, key in _rows(tree)})


def flat_copy(name: str, dest: Path | str) -> Path:
    """Writes a recipe as one file that includes nothing: header, `about`, interpolations and inline comments are kept.

    Args:
        name: The recipe to copy.
        dest: The file to write and return, which must not exist, or a folder. `.yaml` is added where it is wanting.

    Raises:
        UsageError: The file exists.
    """
    source, dest = find_recipe(name), Path(dest)
    dest = dest / source.name if dest.is_dir() else dest.with_name(dest.name.removesuffix(".yaml") + ".yaml")
    if dest.exists():
        raise UsageError(Problem("the file exists and is not overwritten", str(dest), "Give another name"))
    text = source.read_text(encoding="utf-8")
    layers = _layers(source, {})
    if len(layers) > 1:
        text = _header(text) + _flat_text(layers)
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_text(text, encoding="utf-8")
    return dest


class _Leaf(NamedTuple):
    value: Any
    origin: str


class _Layer(NamedTuple):
    tree: dict[str, Any]  # nested; its leaves are _Leaf
    include: list[str]
    comments: dict[str, str]  # dotted key → the comment on its line


def _files(pattern: str) -> dict[str, Path]:
    roots = reversed(recipe_roots())  # the first root has the last word
    return {path.relative_to(root).as_posix(): path for root in roots for path in root.glob(pattern)}


def _named() -> dict[str, Path]:
    files = _files("**/*.yaml")
    return {name.removesuffix(".yaml"): path for name, path in files.items() if not name.startswith(PARTS)}


def _layers(path: Path, parts: Mapping[str, str]) -> list[_Layer]:
    """The included parts in order, then the recipe itself, then parts asked for that have none to stand in for."""
    own = _load(path)
    chosen = {f"{PARTS}{group}/": f"{PARTS}{group}/{name}.yaml" for group, name in parts.items()}
    include = [chosen.get(f"{name.rpartition('/')[0]}/", name) for name in own.include]
    late = [name for name in chosen.values() if name not in include]
    return [*map(_load_part, dict.fromkeys(include)), own, *map(_load_part, late)]


def _load_part(name: str) -> _Layer:
    parts = _files(f"{PARTS}**/*.yaml")
    if name not in parts:
        folder, _, file = name.rpartition("/")
        known = [Path(part).name for part in parts if part.startswith(f"{folder}/")]
        raise UsageError(Problem(f"no such part in {folder or 'recipes'}", file, nearest(file, known)))
    layer = _load(parts[name])
    if layer.include:
        raise UsageError(Problem("a part must not include others", name, "List them in the recipe instead"))
    return layer


def _load(path: Path) -> _Layer:
    with reading(path, "Correct it, or take a copy of the file that is whole", "cannot be read as YAML"):
        text = path.read_text(encoding="utf-8")
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(content, dict):
        raise UsageError(Problem(f"{path} must hold keys and values", f"a {type(content).__name__}"))
    include = content.pop("include", None) or []
    if not isinstance(include, list) or not all(isinstance(name, str) for name in include):
        such = f"Such as [{PARTS}hardware/cpu.yaml]"
        raise UsageError(Problem(f"{path}: include must be a list of files", repr(include), such))
    return _Layer(_leaves(_hoist(content), _relative(path)), include, _comments(text))


def _relative(path: Path) -> str:
    roots = [root.resolve() for root in recipe_roots() if path.resolve().is_relative_to(root.resolve())]
    return path.resolve().relative_to(roots[0]).as_posix() if roots else str(path)


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The parts asked for, and all other overrides as one tree, so that their order decides nothing but repeats."""
    groups = {name.split("/")[1] for name in _files(f"{PARTS}*/*.yaml")}
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
                branch = _hoist(_read(value))
            except (yaml.YAMLError, OmegaConfBaseException) as error:
                problems.append(Problem(f"{key} has no YAML value: {one_line(error)}", value, "Put it in quotes"))
                continue
            for part in reversed(parts):
                branch = {part: branch}
            tree = _merge(tree, _leaves(branch, COMMAND_LINE))
    if problems:
        raise UsageError(problems)
    return chosen, tree


def _read(text: str) -> Any:
    # YAML 1.1 takes 1e-4 for a string; OmegaConf's reader takes it for the number that was meant.
    content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    return content["value"] if isinstance(content, dict) else None


def _hoist(value: Any) -> Any:
    """Lifts what stands under `init_args` beside its class_path."""
    if isinstance(value, list):
        return [_hoist(item) for item in value]
    if isinstance(value, str) and "${" in value:
        return value.replace(".init_args", "")
    if not isinstance(value, dict):
        return value
    inner = value["init_args"] if isinstance(value.get("init_args"), dict) else {}
    return {key: _hoist(item) for key, item in value.items() if item is not inner} | (_hoist(inner) if inner else {})


def _leaves(value: Any, origin: str) -> Any:
    if isinstance(value, dict):
        return {key: _leaves(item, origin) for key, item in value.items()}
    return _Leaf(value, origin)


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if "class_path" in old and "class_path" in new and old["class_path"][0] != new["class_path"][0]:
        return new
    return old | {key: _merge(old[key], item) if key in old else item for key, item in new.items()}


def _values(tree: Any) -> Any:
    return {key: _values(item) for key, item in tree.items()} if isinstance(tree, dict) else tree.value


def _origins(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield from _origins(item, _join(key, name))
    else:
        yield key, tree.origin


def _origin_of(key: str, origins: Mapping[str, str]) -> str:
    """A leaf that an interpolation brought comes from where the interpolation was written."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "")


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _resolve(plain: dict[str, Any], name: str) -> dict[str, Any]:
    failed: dict[str, Exception] = {}
    try:
        tree = _resolved(OmegaConf.create(plain), "", failed)
    except RecursionError:
        raise UsageError(Problem("interpolations run in a circle"), name) from None
    except OmegaConfBaseException as error:
        tree, failed = {}, {str(getattr(error, "full_key", "")): error}
    if failed:
        known = [key for _, key in _rows(plain)]
        raise UsageError([_unresolved(error, key, known) for key, error in failed.items()], name)
    return tree


def _resolved(node: Any, key: str, failed: dict[str, Exception]) -> Any:
    if isinstance(node, ListConfig):
        return [_item(node, i, f"{key}[{i}]", failed) for i in range(len(node))]
    if isinstance(node, DictConfig):
        return {name: _item(node, name, _join(key, name), failed) for name in node}
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


def _with_about(recipe: Recipe) -> dict[str, Any]:
    return {"about": recipe.about, **recipe.tree} if recipe.about else recipe.tree


def _flat_text(layers: Sequence[_Layer]) -> str:
    tree, comments = layers[0].tree, dict(layers[0].comments)
    for layer in layers[1:]:
        tree, comments = _merge(tree, layer.tree), comments | layer.comments
    values = _values(tree)
    return _render({"about": values.pop("about", {})} | values, comments)


def _header(text: str) -> str:
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "".join(f"{line}\n" for line in lines[:end])


def _comments(text: str) -> dict[str, str]:
    lines, found = text.splitlines(), {}

    def walk(node: Any, above: str) -> None:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            key = above if name.value == "init_args" else _join(above, name.value)
            one_line = value.end_mark.line == name.start_mark.line
            mark = value.end_mark if one_line else name.end_mark
            rest = lines[mark.line][mark.column :].lstrip(": ")
            if rest.startswith("#"):
                found[key] = rest[1:].strip()
            walk(value, key)

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


def _render(tree: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    rows = [(text, notes.get(key, "")) for text, key in _rows(tree)]
    column = min(max((len(text) for text, note in rows if note), default=0), COMMENT_COLUMN)
    return "".join(f"{text:<{column}}  # {note}\n" if note else f"{text}\n" for text, note in rows)


def _rows(tree: Mapping[str, Any], above: str = "", indent: str = "") -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with its dotted key."""
    for name, value in tree.items():
        key = _join(above, name)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_inline(name)}:", key
            yield from _rows(value, key, indent + "  ")
        else:
            yield f"{indent}{_inline(name)}: {_inline(value)}", key


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_inline(key)}: {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_./]([\w ./+-]*[\w./+-])?", value) and _read(value) == value
        return value if plain else json.dumps(value, ensure_ascii=False)
    return yaml.safe_dump(value).splitlines()[0]
