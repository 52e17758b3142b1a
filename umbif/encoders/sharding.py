"""What FSDP2 (Zhao et al. 2023, arXiv:2304.11277) gathers together: each block of a network, and then its rest."""

from collections.abc import Sequence

import lightning.pytorch as pl
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

BLOCKS = "blocks"  # how encoders and decoders call the list of their blocks


def shard(module: pl.LightningModule, networks: Sequence[nn.Module]) -> None:
    """Shards networks whose forward is called as a whole; does nothing under another strategy, or a second time.

    All of a network's weights give way after its forward: one that no backward follows would else compute with those
    that it gathered first.
    """
    if module.device_mesh is None or any(isinstance(p, DTensor) for p in module.parameters()):
        return
    mesh = module.device_mesh["data_parallel"]
    for network in networks:
        for block in getattr(network, BLOCKS, ()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
    left = [name for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    assert not left, f"of {left} no process would see the gradients of others"
