"""What a launcher has decided before this process began: it stands above the recipe, and must not contradict what was
typed.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from umbif.errors import Problem
from umbif.machine import OWN_RUN
from umbif.recipe.layers import Leaf, leaves

STRATEGIES = {"fsdp": "fsdp2"}  # fabric's word for what is ours
ABSENT = ("", "None", "auto")


class Launched(NamedTuple):
    """Keys of `trainer:` that a launcher gives, and which launcher."""

    by: str
    trainer: dict[str, Any]

    def layer(self) -> dict[str, Any]:
        """As one of a recipe's layers."""
        return {"trainer": leaves(self.trainer, self.by)} if self.trainer else {}

    def contradictions(self, typed: Mapping[str, Any]) -> Iterator[Problem]:
        """Where the command line says something else."""
        said = typed.get("trainer", {})
        for key, value in self.trainer.items() if isinstance(said, dict) else ():
            leaf = said.get(key)
            if isinstance(leaf, Leaf) and str(leaf.value) != str(value):
                cure = f"Leave one of them out: trainer.{key} of the command, or the option of {self.by}"
                yield Problem(f"trainer.{key}={leaf.value} was typed, and {self.by} says {value}", cure=cure)


def launched(environ: Mapping[str, str] = os.environ) -> Launched:
    """By `fabric run`, which tells by variables that begin with LT_, or by torchrun; else nothing."""
    processes = _processes(environ)
    if environ.get("LT_CLI_USED") != "1":
        return Launched("torchrun", processes)
    names = {"LT_ACCELERATOR": "accelerator", "LT_STRATEGY": "strategy", "LT_PRECISION": "precision"}
    told = {key: environ[name] for name, key in names.items() if environ.get(name, "") not in ABSENT}
    if "strategy" in told:
        told["strategy"] = STRATEGIES.get(told["strategy"], told["strategy"])
    return Launched("fabric run", told | processes)


def _processes(environ: Mapping[str, str]) -> dict[str, Any]:
    """Of this node, and nodes; torchrun's, which fabric calls."""
    if environ.get("TORCHELASTIC_RUN_ID", OWN_RUN).startswith(OWN_RUN):  # a process that the recipe has asked for
        return {}
    here, everywhere = (int(environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return {"devices": here, "num_nodes": everywhere // here}
