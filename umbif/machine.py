"""What this process runs on."""

import ctypes
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from umbif import __version__

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")  # where batches of reading processes wait; macOS has none
# Limit, what is taken, and how memory.stat calls files that make way, for both versions of control groups.
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
OWN_RUN = "umbif-"  # how the id of what `umbif fit` starts begins
LIBRARIES = (
    "torch", "lightning", "monai", "torchio", "nibabel", "numpy", "blosc2", "omegaconf", "jsonargparse",
    "deepspeed",
)  # fmt: skip


def num_cores() -> int:
    """Cores that this process may use, which on a cluster is fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int | None:
    """Memory that this process and its siblings may still take: of the machine, or of a control group if less."""
    free = [_number(MEMINFO, r"MemAvailable:\s+(\d+) kB", 1024), *map(_left, _groups())]
    return min((number for number in free if number is not None), default=None)


def shared_memory_bytes() -> int | None:
    """What is free where processes hand each other tensors; None where that is no file system of its own."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def _groups() -> Iterator[Path]:
    """The control groups that this process is in, from its own up: a job's limit stands above those of its steps."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if kinds in ("", "memory"):  # version 2, which is one tree, or version 1
            base = GROUPS / kinds
            own = base / path.lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(base))


def _left(group: Path) -> int | None:
    """What its limit leaves. Cached files count as taken, and those that nobody has read lately make way."""
    for limit_file, taken_file, files in GROUP_FILES:
        limit, taken = _number(group / limit_file, r"(\d+)", 1), _number(group / taken_file, r"(\d+)", 1)
        if limit is not None and taken is not None:
            return max(0, limit - taken + (_number(group / "memory.stat", rf"(?m)^{files} (\d+)", 1) or 0))
    return None


def _number(path: Path, pattern: str, unit: int) -> int | None:
    try:
        found = re.search(pattern, path.read_text())
    except OSError:
        return None
    return int(found[1]) * unit if found else None


def is_leader() -> bool:
    """Whether this process is the first of its job, by what launchers set before any of them talk.

    Where torchrun was started by srun, it is torchrun that numbers the processes, and its nodes in an order of its own.
    """
    names = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def is_first_here() -> bool:
    """Whether this process is the first of its job on this machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def is_launched() -> bool:
    """Whether something has started this process with its siblings: torchrun, fabric, srun, or `umbif fit` itself."""
    return "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ


def is_child() -> bool:
    """Whether a process of `umbif fit` has started this one, and will speak for it."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(OWN_RUN)


def end_with_parent() -> None:
    """Lets the system end this process when the one ends that has started it, however it ends; Linux alone can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


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
        "memory_gib": round((_number(MEMINFO, r"MemTotal:\s+(\d+) kB", 1024) or 0) / 2**30),
        "gpus": _gpus(),
        "libraries": versions,
    }


def _gpus() -> list[str]:
    """Name and memory of each that this process may use."""
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}" for gpu in found]
