"""What a test runs in processes of their own. Imports stay light: each process pays for them."""

from pathlib import Path

import torch
import torch.distributed as dist

from umbif.encoders.guard import Guard
from umbif.errors import UmbifError
from umbif.pretrain.contrast import Contrast, ContrastOptions
from umbif.pretrain.losses import Identity


def contrast_batch(num_views: int = 2) -> tuple[torch.Tensor, Identity]:
    """Features and owners of six exams: the first and third of one person, the last without brain."""
    slot = torch.arange(10, 16).repeat_interleave(num_views)
    person = torch.tensor([7, 8, 7, 9, 3, 4]).repeat_interleave(num_views)
    view = torch.arange(num_views).repeat(6)
    valid = (slot < 15).long()
    features = torch.randn(len(slot), 6, generator=torch.Generator().manual_seed(1))
    return features, Identity(torch.stack([slot, view, person, valid], dim=1))


def same_contrast(queue_size: int = 0) -> Contrast:
    """The same weights in every process."""
    torch.manual_seed(5)
    return Contrast(6, ContrastOptions(projector_dim=5, projector_depth=2, queue_size=queue_size))


def contrast_of_rank(rank: int, world_size: int, folder: Path) -> None:
    """Writes loss, gradients and queue of this rank's share of the batch, after a first step filled the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    features, who = contrast_batch()
    share, owners = features.chunk(world_size)[rank], Identity(who.rows.chunk(world_size)[rank])
    torch.save(two_steps(share, owners), folder / f"{rank}.pt")
    dist.destroy_process_group()


def two_steps(features: torch.Tensor, who: Identity) -> dict[str, object]:
    """Loss and gradients of a second step, whose negatives are those of the batch and of the step before."""
    contrast = same_contrast(queue_size=16)
    earlier = Identity(who.rows + torch.tensor([-100, 0, 50, 0]))
    contrast(features.flip(1), earlier)
    contrast.queue.settle(accepted=True)
    loss = contrast(features, who)
    loss.mean().backward()
    gradients = {name: p.grad for name, p in contrast.named_parameters()}
    return {"loss": loss.detach(), "gradients": gradients, "queue": contrast.queue.whose}


def guard_of_rank(rank: int, folder: Path) -> None:
    """Writes what this rank decides about a step whose loss is broken on rank 1 alone, and what it says of it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    layer = torch.nn.Linear(1, 1)
    layer(torch.ones(1, 1)).sum().backward()
    guard = Guard(max_norm=1.0, max_skipped=0)
    losses = torch.tensor([1.0, float("nan") if rank == 1 else 1.0])
    guard.batches.append((losses, torch.tensor([2 * rank, 2 * rank + 1]), torch.tensor([40 + rank, 50 + rank])))
    layer.global_step = 7
    try:
        guard(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
        said = ""
    except UmbifError as error:
        said = str(error)
    torch.save({"accepted": guard.accepted, "said": said, "gradient": layer.weight.grad}, folder / f"{rank}.pt")
    dist.destroy_process_group()
