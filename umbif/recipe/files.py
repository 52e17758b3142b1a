"""Where recipes and their parts lie, and what they are called."""

from pathlib import Path

from umbif.errors import Problem, UsageError, nearest

PARTS = "_parts/"


def recipe_roots() -> list[Path]:
    """The folders of recipes: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return [folder for folder in (package / "_recipes", package.parent / "recipes") if folder.is_dir()]


def list_recipes(group: str | None = None) -> list[str]:
    """The names of the recipes that can be run, or of one group such as `pretrain`; UsageError if it has none."""
    names = sorted(named_files())
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
    named = named_files()
    found = named.get(name.removesuffix(".yaml"))
    if found is None:
        raise UsageError(Problem("no such recipe", name, nearest(name.removesuffix(".yaml"), named)))
    return found


def files_like(pattern: str) -> dict[str, Path]:
    """Files of all folders of recipes by their path within, such as `_parts/hardware/cpu.yaml`."""
    roots = reversed(recipe_roots())  # the first root has the last word
    return {path.relative_to(root).as_posix(): path for root in roots for path in root.glob(pattern)}


def named_files() -> dict[str, Path]:
    """The recipes that can be run, by name."""
    files = files_like("**/*.yaml")
    return {name.removesuffix(".yaml"): path for name, path in files.items() if not name.startswith(PARTS)}


def relative(path: Path) -> str:
    """The path within a folder of recipes; that of a user's own file as it is."""
    roots = [root.resolve() for root in recipe_roots() if path.resolve().is_relative_to(root.resolve())]
    return path.resolve().relative_to(roots[0]).as_posix() if roots else str(path)
