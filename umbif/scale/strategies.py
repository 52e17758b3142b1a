"""How weights and their gradients lie over processes: Lightning's strategies, with checkpoints that fit all of them.

DDP keeps them whole everywhere; FSDP2 keeps rows of them (Zhao et al. 2023, arXiv:2304.11277), gathered block by block.
"""

import logging
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from umbif.errors import Transient, UmbifError
from umbif.ranges import PositiveFloat, PositiveInt
from umbif.scale import shares
from umbif.scale.checkpoint_folder import SHARES, STATE, checkpoints, is_complete, mark_damaged, problem_of
from umbif.scale.ranks import all_gather, num_ranks, rank
from umbif.scale.replicas import refuse_difference
from umbif.scale.saver import Saver
from umbif.scale.shares import Share
from umbif.scale.tensor_file import ShareFiles

log = logging.getLogger("umbif")
LATER = "A network file system takes a moment: give the same command again in a minute"


class Checkpointed:
    """What a strategy hands to a checkpoint, and takes from one: parts of named tensors, and plain values.

    The Trainer's own way would gather whole tensors, or leave them to formats that only their strategy reads.
    """

    lightning_module: pl.LightningModule
    optimizers: list[torch.optim.Optimizer]
    global_rank: int
    world_size: int

    in_shards = False  # whether a forward gathers weights
    one_copy = ""  # what only one process holds of: no comparison can find a flipped bit in it
    restore_checkpoint_after_setup = True  # by then, tensors lie where they stay
    lightning_restore_optimizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.saver = Saver(asynchronous=False)
        self.about: Mapping[str, Any] = {}
        self.resumes = False  # whether this process sees a checkpoint to go on from

    def setup_environment(self) -> None:
        """Lightning's, and the first word with the others."""
        super().setup_environment()  # type: ignore[misc]
        self.agree_to_resume()

    def agree_to_resume(self) -> None:
        """All processes resume, or none: else some begin at step 0, and wait for ever for those that go on.

        Raises:
            Transient: Not all see a checkpoint.
        """
        seen = all_gather(self.resumes)
        if len(set(seen)) > 1:
            raise Transient(f"Process {seen.index(False)} does not see the checkpoints yet. {LATER}.")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: tensors go another way."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Rates and decays."""
        groups = getattr(optimizer, "_optimizer", optimizer).param_groups
        return {"groups": [{key: value for key, value in group.items() if _is_plain(value)} for group in groups]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Begins to write; see `Saver`.

        Raises:
            Transient: The processes do not hold the same.
        """
        self.make_moments()  # of parameters that no step has reached, too: a checkpoint is read as a whole
        held = list(self.shares())
        refuse_difference(held, checkpoint["global_step"])
        mine = shares.to_write(held, self.global_rank, self.world_size)
        about = {**self.about, "step": checkpoint["global_step"], "num_processes": self.world_size}
        self.saver.save(Path(filepath), checkpoint, mine, about)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Plain values, never code, of the newest complete checkpoint of a folder; its tensors are read into their
        places by `load_model_state_dict`.

        Raises:
            UmbifError: All that there are have been damaged.
        """
        self._resumed = chosen(Path(checkpoint_path))
        return dict(torch.load(self._resumed / STATE, map_location="cpu", weights_only=True))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Reads weights and moments into their places.

        Raises:
            UmbifError: The checkpoint holds other tensors.
        """
        self.make_moments()
        files = ShareFiles(sorted(self._resumed.glob(SHARES)))
        try:
            for share in self.to_fill():
                files.fill(share)
        except ValueError as error:
            cure = "Was it written by another version of UMBIF? Give another run.dir to begin anew"
            raise UmbifError(f"The checkpoint {self._resumed} is of another model: {error}. {cure}.") from None
        if not self.optimizers:  # of an evaluation
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
                group.update(values)

    def shares(self) -> Iterator[Share]:
        """The parts of all tensors that this process holds."""
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        yield from shares.of_module(self.lightning_module)
        for optimizer in self.optimizers:
            yield from shares.of_optimizer(optimizer, names)

    def to_fill(self) -> Iterator[Share]:
        """The parts that a checkpoint is read into."""
        return self.shares()

    def make_moments(self) -> None:
        """Optimisers make their moments at their first step: a checkpoint needs them before."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    make_moments(optimizer, parameter)

    def whole_state(self) -> dict[str, Tensor]:
        """All weights and buffers as they would be in one process, on the CPU. For all processes to call."""
        state = self.lightning_module.state_dict()
        return {name: _whole(tensor).cpu() for name, tensor in state.items()}


class Single(Checkpointed, SingleDeviceStrategy):
    """One process."""


class DDP(Checkpointed, DDPStrategy):
    """Whole weights everywhere. Options are some of torch's DistributedDataParallel.

    Args:
        find_unused_parameters: Look at every step for weights without a gradient; slower.
        static_graph: Every step uses the same weights in the same order.
        gradient_as_bucket_view: Gradients lie where they are summed: less memory.
        bucket_cap_mb: Of gradients that are summed together; null for torch's own.
        timeout_s: After which a process that waits for others gives up.
    """

    def __init__(
        self,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: PositiveInt | None = None,
        timeout_s: PositiveFloat = 1800.0,
    ) -> None:
        super().__init__(
            find_unused_parameters=find_unused_parameters, static_graph=static_graph, bucket_cap_mb=bucket_cap_mb,
            gradient_as_bucket_view=gradient_as_bucket_view, timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip


class FSDP2(Checkpointed, ModelParallelStrategy):
    """Rows of the weights; modules say by `configure_model` what is gathered together."""

    in_shards, one_copy = True, "weights and moments"

    def setup_environment(self) -> None:
        """Data-parallel over all processes: Lightning's `auto` means tensor-parallel within a node."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def chosen(folder: Path) -> Path:
    """The newest complete checkpoint, the same for all processes, of which each looks at a part of the files.

    Damaged ones lose their name once a complete one is found: they must not count among those that are kept.

    Raises:
        UmbifError: None is complete.
        Transient: Not all processes see it, or a disk could not be read.
    """
    paths = all_gather(checkpoints(folder))[0]
    for place, path in enumerate(paths):
        seen = all_gather(is_complete(path))
        if len(set(seen)) > 1:
            raise Transient(f"Process {seen.index(False)} does not see the checkpoint {path} yet. {LATER}.")
        problems = [problem for problem in all_gather(problem_of(path, rank(), num_ranks())) if problem]
        if not problems:
            for damaged in paths[:place] if rank() == 0 else ():
                mark_damaged(damaged)
            return path
        if rank() == 0:
            log.warning("Passed over the checkpoint %s: %s", path.name, problems[0])
    what = f"All {len(paths)} checkpoints of {folder.parent} are damaged; log.txt says how"
    raise UmbifError(f"{what}. To begin anew, delete {folder} or give another run.dir.")


def make_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Those of AdamW, zero, as it makes them itself (torch.optim.AdamW, `_init_group`)."""
    if optimizer.state[parameter]:
        return
    beside = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
    optimizer.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=beside),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | tuple | type(None))
