"""What a test runs in processes of their own. Imports stay light: each process pays for them."""

from pathlib import Path

import torch
import torch.distributed as dist

from umbif.pretrain.losses import info_nce, standardised


def contrast_batch(num_views: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections, slots and persons of four exams, the first and third of one person."""
    slot = torch.arange(10, 14).repeat_interleave(num_views)
    person = torch.tensor([7, 8, 7, 9]).repeat_interleave(num_views)
    return torch.randn(len(slot), 6, generator=torch.Generator().manual_seed(1)), slot, person


def same_layer() -> torch.nn.Linear:
    """The same weights in every process."""
    torch.manual_seed(5)
    return torch.nn.Linear(6, 5, bias=False)


def contrast_of_rank(rank: int, folder: Path) -> None:
    """Writes the loss of this rank's half of the batch and the gradient of the layer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    projection, slot, person = (whole.chunk(2)[rank] for whole in contrast_batch())
    layer = same_layer()
    loss = info_nce(standardised(layer(projection)), slot, person, 0.2)
    loss.mean().backward()
    torch.save({"loss": loss.detach(), "gradient": layer.weight.grad}, folder / f"{rank}.pt")
    dist.destroy_process_group()
