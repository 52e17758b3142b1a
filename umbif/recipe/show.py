"""Recipes to read and to edit: shown with the origin of every value, or copied into one file that includes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from umbif.errors import Problem, UsageError
from umbif.recipe.compose import Recipe
from umbif.recipe.files import find_recipe
from umbif.recipe.layers import Layer, layers_of, merge, values_of
from umbif.recipe.text import render, rows_of


def show(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with the origin of every value as a comment."""
    tree = recipe.whole
    return render(tree, {key: _origin_of(key, recipe.origins) for _, key in rows_of(tree)})


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
    layers = layers_of(source, {})
    if len(layers) > 1:
        text = _header(text) + _flat_text(layers)
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_text(text, encoding="utf-8")
    return dest


def _flat_text(layers: Sequence[Layer]) -> str:
    tree, comments = layers[0].tree, dict(layers[0].comments)
    for layer in layers[1:]:
        tree, comments = merge(tree, layer.tree), comments | layer.comments
    values = values_of(tree)
    return render({"about": values.pop("about", {})} | values, comments)


def _header(text: str) -> str:
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "".join(f"{line}\n" for line in lines[:end])


def _origin_of(key: str, origins: Mapping[str, str]) -> str:
    """A leaf that an interpolation brought comes from where the interpolation was written."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "")
