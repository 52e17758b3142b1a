"""An import path of a recipe → the class or function that it names, or the nearest name."""

import importlib
import pkgutil
from typing import Any

from umbif.errors import Problem, UsageError, nearest
from umbif.recipe.words import shortened


def import_class(class_path: Any) -> Any:
    """The class or function of an import path.

    Raises:
        UsageError: There is none, with the nearest name; or its module cannot be imported.
    """
    if not isinstance(class_path, str) or "." not in class_path:
        cure = "Write the whole path, such as umbif.pretrain.umbif.UMBIF"
        raise UsageError(Problem("not an import path", shortened(class_path), cure))
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
