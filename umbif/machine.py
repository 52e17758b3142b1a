"""What this process runs on."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from umbif import __version__

MEMINFO = Path("/proc/meminfo")
LIBRARIES = ("torch", "lightning", "monai", "torchio", "nibabel", "numpy", "blosc2", "omegaconf", "jsonargparse")


def num_cores() -> int:
    """Cores that this process may use, which on a cluster is fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int | None:
    """Memory that this process and its siblings may still take: of the machine, or of its control group if less."""
    free = [_number(MEMINFO, r"MemAvailable:\s+(\d+) kB", 1024)]
    limit = _number(Path("/sys/fs/cgroup/memory.max"), r"(\d+)", 1)
    used = _number(Path("/sys/fs/cgroup/memory.current"), r"(\d+)", 1)
    if limit is not None and used is not None:
        free.append(max(0, limit - used))
    return min((number for number in free if number is not None), default=None)


def _number(path: Path, pattern: str, unit: int) -> int | None:
    try:
        found = re.search(pattern, path.read_text())
    except OSError:
        return None
    return int(found[1]) * unit if found else None


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
        "memory_gib": round((_number(MEMINFO, r"MemTotal:\s+(\d+) kB", 1024) or 0) / 2**30),
        "gpus": _gpus(),
        "libraries": versions,
    }


def _gpus() -> list[str]:
    """Name and memory of each that this process may use."""
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}" for gpu in found]
