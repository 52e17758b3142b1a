"""ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) by DeepSpeed: moments (stage 1), gradients too (2), weights too (3)
lie in flat ranges over the processes.

Precision, accumulation, clipping and checkpoints are as under the other strategies, so that losses are the same and one
goes on with what another wrote. What is used of DeepSpeed's inside is named here and nowhere else.
"""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from umbif.scale import shares
from umbif.scale.shares import MODEL, OPTIMIZER, Share
from umbif.scale.strategies import Checkpointed, make_moments

HALF = ("bf16-mixed", "bf16")
MAPPING = "_hp_mapping"  # where DeepSpeed keeps what belongs to a parameter in its flat ranges


class Autocast(DeepSpeedPrecision):
    """Weights stay in full precision, as under the other strategies; with bf16-mixed, products are taken in bf16.

    Args:
        precision: 32-true or bf16-mixed.
    """

    def __init__(self, precision: str) -> None:
        super().__init__("32-true")
        self.half = precision in HALF

    def convert_input(self, data: Any) -> Any:
        """Nothing to convert."""
        return data

    def forward_context(self) -> AbstractContextManager[Any]:
        """As Lightning's own for bf16-mixed."""
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=self.half)

    def backward(self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """The loss is the mean over micro-steps already: Lightning divides, and DeepSpeed would once more."""
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)
        engine = model.trainer.strategy.deepspeed_engine
        if not engine.is_gradient_accumulation_boundary():
            engine.step()  # which only counts then


class FlatGradients:
    """The gradient in DeepSpeed's ranges; see `encoders.guard.Gradients`.

    Args:
        zero: DeepSpeed's optimiser around ours.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    def norm(self) -> Tensor:
        """Of all of it."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        if hasattr(self.zero, "scaled_global_norm"):
            return torch.as_tensor(self.zero.scaled_global_norm())
        return torch.as_tensor(combine_grad_norm_groups(self.zero._get_norm_groups()))

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """DeepSpeed does, as part of its step."""
        self.zero.clip_grad = max_norm

    def drop(self) -> None:
        """DeepSpeed takes no step on what is not finite; of what is offloaded, it looks at norms that it has kept."""
        averaged = [one for tensors in self.zero.averaged_gradients.values() for one in tensors or ()]
        for tensor in (*averaged, *(flat.grad for flat in flat_ranges(self.zero) if flat.grad is not None)):
            tensor.fill_(torch.nan)
        norms = getattr(self.zero, "norm_for_param_grads", {})
        norms.update({key: norm * torch.nan for key, norm in norms.items()})


class DeepSpeed(Checkpointed, DeepSpeedStrategy):
    """ZeRO of one stage.

    Args:
        stage: 1, 2 or 3.
        offload: Keep moments, and take the optimiser's step, in the memory of the machine.
        precision: 32-true or bf16-mixed.
        on_cpu: Of CPUs, which DeepSpeed has to be told before it is imported.
    """

    one_copy = "weights and moments"  # in the lower stages too: each step makes all weights anew from their parts
    handles_gradient_accumulation = False  # else the guard would be asked at every micro-step

    def __init__(
        self, stage: int, offload: bool = False, precision: str = "32-true", on_cpu: bool = False
    ) -> None:
        self.in_shards = stage == 3
        if on_cpu:  # where it builds a part of itself by ninja, which lies beside Python
            os.environ["DS_ACCELERATOR"] = "cpu"
            os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        super().__init__(
            stage=stage, offload_optimizer=offload, logging_batch_size_per_gpu=1, logging_level=logging.ERROR,
            precision_plugin=Autocast(precision),
        )  # fmt: skip
        self.config["zero_force_ds_cpu_optimizer"] = False  # ours steps on the CPU as well
        # On a GPU, DeepSpeed ends an autocast that it was not told of. No module's weights travel in half precision.
        half = {"enabled": precision in HALF, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        self.config["torch_autocast"] = half

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        """DeepSpeed decides itself when gradients are shared."""
        return nullcontext()

    def setup_environment(self) -> None:
        """On CPUs too, which Lightning refuses: to try a recipe where no GPU is."""
        super(DeepSpeedStrategy, self).setup_environment()
        self.agree_to_resume()

    def setup_distributed(self) -> None:
        """Lightning's, less a check of GPUs' numbers, which CPUs do not have."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """Lightning's, for devices without a number too."""
        import deepspeed

        device = self.root_device.index if self.root_device.index is not None else self.local_rank
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, optimizer, _, _ = deepspeed.initialize(
            args=Namespace(device_rank=device), config=self.config, model=model, model_parameters=trained,
            optimizer=optimizer, lr_scheduler=lr_scheduler, dist_init_required=False,
        )  # fmt: skip
        optimizer.gradients = FlatGradients(optimizer)
        return engine, optimizer

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimiser around ours."""
        return self.deepspeed_engine.optimizer

    def shares(self) -> Iterator[Share]:
        """Weights in the precision that the optimiser steps on, and its moments."""
        self._link_moments()
        of_parameter = self._of_stage_3 if self.zero_stage_3 else self._of_stage_1_or_2
        for name, parameter in self.lightning_module.named_parameters():
            if parameter.requires_grad:
                yield from of_parameter(name, parameter)
            else:
                yield self._computed_with(name, parameter)
        kept = self.lightning_module.state_dict(keep_vars=True)
        for name, buffer in self.lightning_module.named_buffers():
            if name in kept:
                yield shares.held(f"{MODEL}.{name}", buffer)

    def to_fill(self) -> Iterator[Share]:
        """Those, and the weights that the network computes with."""
        yield from self.shares()
        yield from (self._computed_with(name, p) for name, p in self.lightning_module.named_parameters())

    def whole_state(self) -> dict[str, Tensor]:
        """See `Checkpointed`. Of stage 3, each weight is gathered for as long as it is copied."""
        import deepspeed

        found = {}
        for name, tensor in self.lightning_module.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([tensor], enabled=self.zero_stage_3 and hasattr(tensor, "ds_id")):
                found[name] = tensor.detach().cpu().clone()
        return found

    def make_moments(self) -> None:
        """Of DeepSpeed's flat ranges."""
        for flat in self._flat():
            make_moments(self.zero.optimizer, flat)

    def _flat(self) -> list[Tensor]:
        return flat_ranges(self.zero)

    def _link_moments(self) -> None:
        """DeepSpeed finds them after the first group's first step, when the others have none yet, and never again."""
        if not self.zero_stage_3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _of_stage_1_or_2(self, name: str, parameter: nn.Parameter) -> Iterator[Share]:
        part, shape = getattr(parameter, MAPPING), tuple(parameter.shape)
        group = next(i for i, group in enumerate(self.zero.bit16_groups) if any(p is parameter for p in group))
        yield from _of_scalars(name, self.zero.optimizer.state[self._flat()[group]])
        if part is not None:  # else nothing of it lies here
            start = part.lp_fragment_address.start
            yield Share(f"{MODEL}.{name}", shape, start, part.hp_fragment, everywhere=False)
            for key, values in part.optim_fragment.items():
                yield Share(f"{OPTIMIZER}.{key}.{name}", shape, start, values, everywhere=False)

    def _of_stage_3(self, name: str, parameter: Any) -> Iterator[Share]:
        start, num = self._range(parameter)
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat, shape = self._flat()[group], tuple(parameter.ds_shape)
        state = self.zero.optimizer.state[flat]
        yield from _of_scalars(name, state)
        yield Share(f"{MODEL}.{name}", shape, start, flat[offset : offset + num], everywhere=False)
        for key, values in state.items():
            if values.ndim:
                part = values[offset : offset + num]
                yield Share(f"{OPTIMIZER}.{key}.{name}", shape, start, part, everywhere=False)

    def _computed_with(self, name: str, parameter: Any) -> Share:
        if not self.zero_stage_3:
            return shares.held(f"{MODEL}.{name}", parameter.data)
        start, num = self._range(parameter)
        memory = parameter.ds_tensor.data.view(-1)[:num]
        return Share(f"{MODEL}.{name}", tuple(parameter.ds_shape), start, memory, everywhere=False)

    def _range(self, parameter: Any) -> tuple[int, int]:
        """First element and number of those that lie here; the last range is filled up."""
        size = parameter.ds_tensor.ds_numel
        start = min(self.global_rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)


def flat_ranges(zero: Any) -> list[Tensor]:
    """What DeepSpeed's optimiser steps on: one range of this process for each group of parameters."""
    return list(getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups)


def _of_scalars(name: str, state: dict[str, Tensor]) -> Iterator[Share]:
    """Counters, of which each flat range has one; as many as parameters, since others have one each."""
    for key, value in state.items():
        if value.ndim == 0:
            yield Share(f"{OPTIMIZER}.{key}.{name}", (), 0, value, everywhere=True)
