"""Trees as YAML that people read: a line for each value, a comment where there is one."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from umbif.recipe.layers import join_key, read_value

COMMENT_COLUMN = 64


def render(tree: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """YAML, with a comment on the lines of some dotted keys."""
    rows = [(text, notes.get(key, "")) for text, key in rows_of(tree)]
    column = min(max((len(text) for text, note in rows if note), default=0), COMMENT_COLUMN)
    return "".join(f"{text:<{column}}  # {note}\n" if note else f"{text}\n" for text, note in rows)


def rows_of(tree: Mapping[str, Any], above: str = "", indent: str = "") -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with its dotted key."""
    for name, value in tree.items():
        key = join_key(above, name)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_inline(name)}:", key
            yield from rows_of(value, key, indent + "  ")
        else:
            yield f"{indent}{_inline(name)}: {_inline(value)}", key


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_inline(key)}: {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_./]([\w ./+-]*[\w./+-])?", value) and read_value(value) == value
        return value if plain else json.dumps(value, ensure_ascii=False)
    return yaml.safe_dump(value).splitlines()[0]
