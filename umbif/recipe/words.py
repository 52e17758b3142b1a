"""What jsonargparse says about a value → what a person reads."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from umbif.errors import Problem, nearest
from umbif.recipe.layers import join_key

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

REQUIRED = "the following arguments are required: "
# Pydantic, which jsonargparse asks about a number with a range, says one thing in three lines.
OUT_OF_RANGE = re.compile(
    r"\d+ validation error.*\n.*should (?:be|have) (?:a )?(?:valid )?(.+?)(?: after validation.*)? \[type=.*\n.*/v/\w+"
)
PLAIN = {
    "integer": "int", "number": "float", "NoneType": "null", "greater than or equal to": "at least",
    "less than or equal to": "at most", "greater than": "more than",
}  # fmt: skip


def required_names(error: str) -> list[str]:
    """The arguments that a message says are wanting."""
    return error.split(REQUIRED)[1].splitlines()[0].split(", ") if REQUIRED in error else []


def unaccepted(error: str) -> str:
    """The name that a class within the value does not take; empty where something else is wrong."""
    found = re.search(r"Option '(.+?)' is not accepted|does not accept option '(.+?)'", error)
    return (found[1] or found[2]) if found else ""


def required_key(key: str) -> Problem:
    """For a key without a value."""
    return Problem(f"{key} is required", cure=f"Give it: {key}=VALUE")


def unknown_key(key: str, name: str, valid: Collection[str]) -> Problem:
    """For a key that nothing takes."""
    return Problem(f"unknown key {key}", cure=nearest(name, valid))


def unknown_or_deeper(parser: "ArgumentParser", key: str, name: str, valid: Collection[str]) -> Problem:
    """The nearest name may stand a level deeper: model.num_visible is model.masking.num_visible."""
    deeper = {action.dest.rpartition(".")[2]: action.dest for action in parser._actions if "." in action.dest}
    close = [] if get_close_matches(name, valid) else get_close_matches(name, deeper, n=1)
    hint = f"Did you mean {join_key(key, deeper[close[0]])}?" if close else nearest(name, valid)
    return Problem(f"unknown key {join_key(key, name)}", cure=hint)


def wrong_type(error: str, key: str, value: Any) -> Problem:
    """Ten lines of jsonargparse → `expected int or null, got 'abc'`."""
    subclass = re.search(r"subclass of (\w+)", error)
    if subclass and isinstance(value, Mapping):
        return Problem(f"{key}: expected class {subclass[1]}", value.get("class_path", shortened(value)))
    if subclass or "dot import path" in error:
        return Problem(f"{key}: expected class_path and its arguments", shortened(value))
    error = OUT_OF_RANGE.sub(r"Expected \1", error)
    found = re.findall(r"Expected (?:an? )?(.+?)(?:\. Got value: (.*))?$", error, re.MULTILINE)
    # In a union the line that quotes a value speaks of an item inside the right container: it says more.
    quoted = [pair for pair in found if pair[1]] or found
    expected = " or ".join(dict.fromkeys(_plain_type(text) for text, _ in quoted)) or "another value"
    item = quoted[0][1] if quoted else ""
    choices = re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[(.*?)\]", error)))
    hint = nearest(value, choices) if isinstance(value, str) and choices else ""
    got = item if item and item != str(value) else shortened(value)
    return Problem(f"{key}: expected {expected}", got, hint if hint.startswith("Did") else "")


def _plain_type(text: str) -> str:
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    text = re.sub(r"(?:[A-Za-z_]\w*\.)+([A-Za-z_])", r"\1", text)
    text = re.sub(r"Literal\[(.*?)\]", r"one of \1", text)
    for said, plain in PLAIN.items():
        text = text.replace(said, plain)
    return text


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
