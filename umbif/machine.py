"""What this process runs on."""

import os
import platform
from importlib import metadata
from typing import Any

from umbif import __version__

LIBRARIES = ("torch", "lightning", "monai", "torchio", "nibabel", "numpy", "blosc2", "omegaconf", "jsonargparse")


def num_cores() -> int:
    """Cores that this process may use, which on a cluster is fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_leader() -> bool:
    """Whether this process is the first of its job, by what launchers set before any of them talk."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    return all(rank in (None, "0") for rank in ranks)


def environment() -> dict[str, Any]:
    """Versions and hardware; no names of people or machines."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "umbif": __version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cores": num_cores(),
        "libraries": versions,
    }
