"""What a recipe asks of a machine and of whoever starts its processes, held against what there is."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from umbif.errors import Problem, UsageError

SEARCHED = {"auto": ("tpu", "mps", "cuda", "cpu"), "gpu": ("mps", "cuda")}  # by Lightning, in this order
SHELLS = ("bash", "interactive")  # names of SLURM's jobs in which Lightning starts the processes itself
SRUN, TORCHRUN = "srun with --nodes={} --ntasks-per-node={}", "torchrun with --nnodes={} --nproc-per-node={}"


@dataclass(frozen=True)
class Asked:
    """What the trainer of a recipe asks for.

    Args:
        kind: As Lightning calls it: cpu, gpu, cuda, mps, tpu, or auto.
        devices: Of each node, each with a process of its own; None for as many as there are.
        num_nodes: Machines.
    """

    kind: str
    devices: int | None
    num_nodes: int

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> Self:
        """From the `trainer:` block of a recipe."""
        kind, nodes = trainer.get("accelerator") or "auto", trainer.get("num_nodes") or 1
        return cls(str(kind), _count(trainer.get("devices", "auto")), nodes)

    @property
    def num_processes(self) -> int | None:
        """Of all nodes; None where that depends on what there is."""
        return None if self.devices is None else self.devices * self.num_nodes

    def __str__(self) -> str:
        nodes = f" on each of {self.num_nodes} nodes" if self.num_nodes != 1 else ""
        return f"{self.devices or 'auto'} x {self.kind}{nodes}"


class Started(NamedTuple):
    """Processes that a launcher has started: of all nodes, nodes, of each node as it was told (0 where it was not)."""

    num: int
    num_nodes: int
    of_node: int
    launcher: str
    remark: str = ""


def there(kind: str) -> type[Accelerator] | None:
    """The first of a kind that this machine has, looked for as Lightning looks."""
    names = [name for name in SEARCHED.get(kind, (kind,)) if name in AcceleratorRegistry]
    found = (AcceleratorRegistry[name]["accelerator"] for name in names)
    return next((accelerator for accelerator in found if accelerator.is_available()), None)


def devices_of(trainer: Mapping[str, Any]) -> list[torch.device]:
    """Those that processes of this node take, each one; a CPU where Lightning knows no such kind, and will say so."""
    found, wanted = there(Asked.of(trainer).kind), trainer.get("devices", "auto")
    if found is None:
        return [torch.device("cpu")]
    wanted = found.auto_device_count() if wanted in ("auto", None) else wanted
    return list(found.get_parallel_devices(found.parse_devices(wanted)))


def num_processes(trainer: Mapping[str, Any]) -> int:
    """Of all nodes, one for each device that is there; 1 where a value is one that the Trainer will refuse."""
    try:
        return len(devices_of(trainer)) * Asked.of(trainer).num_nodes
    except (TypeError, ValueError, MisconfigurationException):
        return 1


def missing(asked: Asked) -> str:
    """What this machine lacks of it; nothing where it lacks nothing, or where Lightning knows no such kind."""
    found = there(asked.kind)
    num = found.auto_device_count() if found is not None else 0
    unlimited = found is not None and found.name() == "cpu"
    known = asked.kind in SEARCHED or asked.kind in AcceleratorRegistry
    return "" if unlimited or not known or num >= (asked.devices or 1) else f"this machine has {num or 'none'}"


def hardware_problems(asked: Asked) -> Iterator[Problem]:
    """Devices that are not there, or that this process may not see."""
    if lacking := missing(asked):
        cure = "Run it where they are (umbif env shows which are seen), or choose another part, such as hardware=cpu"
        if "SLURM_STEP_NUM_TASKS" in os.environ:
            cure += ". Of SLURM, ask for --gpus-per-node: with --gpus-per-task a process sees its own alone"
        yield Problem(f"trainer asks for {asked}; {lacking}", cure=cure)


def num_to_start(trainer: Mapping[str, Any]) -> int:
    """Processes of a `trainer:` block that nobody has started yet, all on this machine; 1 is this one alone.

    Raises:
        UsageError: Their devices are not there.
    """
    asked = Asked.of(trainer)
    if started() is not None or "LOCAL_RANK" in os.environ or asked.num_nodes > 1:
        return 1
    if problems := [*hardware_problems(asked)]:
        raise UsageError(problems)
    return num_processes(trainer)


def launcher_problems(asked: Asked) -> Iterator[Problem]:
    """Processes that are not those of the recipe: each would train alone in one folder, or wait for ever for others."""
    found, accelerator = started(), there(asked.kind)
    devices = asked.devices or (accelerator.auto_device_count() if accelerator is not None else 1)
    wanted = (devices * asked.num_nodes, asked.num_nodes, devices)
    if found is None and asked.num_nodes > 1 and "LOCAL_RANK" not in os.environ:
        ways = " or ".join(way.format(asked.num_nodes, devices) for way in (SRUN, TORCHRUN))
        yield Problem(f"trainer asks for {asked.num_nodes} nodes", "one process on one", f"Start it by {ways}")
    if found is None or found[:3] == wanted or found.num == wanted[0] == 1:
        return
    nodes, of_node = found.num_nodes, found.num // found.num_nodes
    cure = f"Start it by {found.launcher.format(asked.num_nodes, devices)}"
    if (nodes, of_node) != wanted[1:] and nodes * of_node == found.num:
        cure += f", or set trainer.num_nodes={nodes} and trainer.devices={of_node}"
    got = f"{found.num} on {nodes} node{'s' * (nodes > 1)}{found.remark}, for {asked}"
    yield Problem("there must be one process for each device that trainer asks for", got, cure)


def started() -> Started | None:
    """What a launcher has started this process with; None where Lightning starts the others itself."""
    if TorchElasticEnvironment.detect():
        num = _number("WORLD_SIZE", 1)
        of_node = _number("LOCAL_WORLD_SIZE", num)
        return Started(num, max(1, num // of_node), of_node, TORCHRUN)
    num = _number("SLURM_STEP_NUM_TASKS", 0)  # srun says so; without it there are none but this one
    if "SLURM_NTASKS" not in os.environ or (num <= 1 and os.environ.get("SLURM_JOB_NAME") in SHELLS):
        return None
    if num == 0:
        return Started(1, 1, 1, SRUN, " (srun was not used)")
    of_node = _number("SLURM_NTASKS_PER_NODE", 0)
    remark = f" (--ntasks-per-node={of_node})" if of_node else " (without --ntasks-per-node)"
    return Started(num, _number("SLURM_NNODES", 1), of_node, SRUN, remark)


def cluster_plugins() -> list[ClusterEnvironment]:
    """What the Trainer is told about SLURM; nothing elsewhere, where it finds out well by itself.

    SIGUSR1 would make it put the job into the queue again, with a checkpoint of its own that nothing checks. And one
    process needs no launcher, however many tasks were reserved for it.
    """
    found = started()
    if found is None or found.launcher != SRUN:
        return []
    return [LightningEnvironment() if found.num == 1 else SLURMEnvironment(auto_requeue=False)]


def slow_precision(trainer: Mapping[str, Any]) -> str:
    """What to say where half precision costs time; nothing elsewhere."""
    found = there(Asked.of(trainer).kind)
    if not str(trainer.get("precision")).startswith("bf16") or found is None or found.name() != "cuda":
        return ""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return ""
    return "This GPU has no bf16 of its own: it is emulated, and slow. Set trainer.precision=32-true"


def _count(devices: Any) -> int | None:
    """`2`, `"2"`, `"0,1"` and `[0, 1]` are two; `auto` and -1 are all."""
    if isinstance(devices, str) and "," in devices:
        devices = [one for one in devices.split(",") if one.strip()]
    if isinstance(devices, list | tuple):
        return len(devices) or None
    return int(devices) if str(devices).isdecimal() and int(devices) > 0 else None


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
