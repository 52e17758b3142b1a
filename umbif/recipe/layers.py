"""Files of YAML → layers: a tree whose leaves know where they came from, and how one is laid over another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from umbif.errors import Problem, UsageError, nearest
from umbif.files import reading
from umbif.recipe.files import PARTS, files_like, relative


class Leaf(NamedTuple):
    """A value and where it came from."""

    value: Any
    origin: str


class Layer(NamedTuple):
    """What one file says: a nested tree of leaves, the files it includes, the comment on the line of a dotted key."""

    tree: dict[str, Any]
    include: list[str]
    comments: dict[str, str]


def layers_of(path: Path, parts: Mapping[str, str]) -> list[Layer]:
    """The included parts in order, then the recipe itself, then parts asked for that have none to stand in for."""
    own = _load(path)
    chosen = {f"{PARTS}{group}/": f"{PARTS}{group}/{name}.yaml" for group, name in parts.items()}
    include = [chosen.get(f"{name.rpartition('/')[0]}/", name) for name in own.include]
    late = [name for name in chosen.values() if name not in include]
    return [*map(load_part, dict.fromkeys(include)), own, *map(load_part, late)]


def load_part(name: str) -> Layer:
    """A part, such as `_parts/hardware/cpu.yaml`; UsageError if there is none, or if it includes others."""
    parts = files_like(f"{PARTS}**/*.yaml")
    if name not in parts:
        folder, _, file = name.rpartition("/")
        known = [Path(part).name for part in parts if part.startswith(f"{folder}/")]
        raise UsageError(Problem(f"no such part in {folder or 'recipes'}", file, nearest(file, known)))
    layer = _load(parts[name])
    if layer.include:
        raise UsageError(Problem("a part must not include others", name, "List them in the recipe instead"))
    return layer


def _load(path: Path) -> Layer:
    with reading(path, "Correct it, or take a copy of the file that is whole", "cannot be read as YAML"):
        text = path.read_text(encoding="utf-8")
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(content, dict):
        raise UsageError(Problem(f"{path} must hold keys and values", f"a {type(content).__name__}"))
    include = content.pop("include", None) or []
    if not isinstance(include, list) or not all(isinstance(name, str) for name in include):
        such = f"Such as [{PARTS}hardware/cpu.yaml]"
        raise UsageError(Problem(f"{path}: include must be a list of files", repr(include), such))
    return Layer(leaves(hoist(content), relative(path)), include, _comments(text))


def _comments(text: str) -> dict[str, str]:
    lines, found = text.splitlines(), {}

    def walk(node: Any, above: str) -> None:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            key = above if name.value == "init_args" else join_key(above, name.value)
            one_line = value.end_mark.line == name.start_mark.line
            mark = value.end_mark if one_line else name.end_mark
            rest = lines[mark.line][mark.column :].lstrip(": ")
            if rest.startswith("#"):
                found[key] = rest[1:].strip()
            walk(value, key)

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


def hoist(value: Any) -> Any:
    """Lifts what stands under `init_args` beside its class_path."""
    if isinstance(value, list):
        return [hoist(item) for item in value]
    if isinstance(value, str) and "${" in value:
        return value.replace(".init_args", "")
    if not isinstance(value, dict):
        return value
    inner = value["init_args"] if isinstance(value.get("init_args"), dict) else {}
    return {key: hoist(item) for key, item in value.items() if item is not inner} | (hoist(inner) if inner else {})


def leaves(value: Any, origin: str) -> Any:
    """A nested tree with an origin at each of its leaves."""
    if isinstance(value, dict):
        return {key: leaves(item, origin) for key, item in value.items()}
    return Leaf(value, origin)


def merge(old: Any, new: Any) -> Any:
    """The new laid over the old; a class that is replaced takes its arguments away with it."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    if "class_path" in old and "class_path" in new and old["class_path"][0] != new["class_path"][0]:
        return new
    return old | {key: merge(old[key], item) if key in old else item for key, item in new.items()}


def values_of(tree: Any) -> Any:
    """A tree without its origins."""
    return {key: values_of(item) for key, item in tree.items()} if isinstance(tree, dict) else tree.value


def read_value(text: str) -> Any:
    """What the text of an override means."""
    # YAML 1.1 takes 1e-4 for a string; OmegaConf's reader takes it for the number that was meant.
    content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    return content["value"] if isinstance(content, dict) else None


def join_key(key: str, name: Any) -> str:
    """`model` and `lr` → `model.lr`."""
    return f"{key}.{name}" if key else str(name)
