"""What a test runs in processes of their own. Imports stay light: each process pays for them."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from umbif.encoders.guard import Guard
from umbif.errors import UmbifError
from umbif.pretrain.contrast import Contrast, ContrastOptions
from umbif.pretrain.units import Identity, Units


def contrast_batch(num_views: int = 2, num_units: int = 1) -> Units:
    """Units of six exams: the first and third of one person, the last without brain, the third without a second."""
    slot = torch.arange(10, 16).repeat_interleave(num_views)
    person = torch.tensor([7, 8, 7, 9, 3, 4]).repeat_interleave(num_views)
    view = torch.arange(num_views).repeat(6)
    sequence = torch.arange(num_units).expand(len(slot), -1)
    valid = ((slot < 15)[:, None] & ((slot != 12)[:, None] | (sequence == 0))).long()
    known = torch.stack([slot, view, person], dim=1)[:, None].expand(-1, num_units, -1)
    rows = torch.cat([known, sequence[..., None], valid[..., None]], dim=-1).flatten(0, 1)
    return Units(torch.randn(len(slot), num_units, 6, generator=torch.Generator().manual_seed(1)), Identity(rows))


def moved(units: Units, slot: int = 0, person: int = 0, rank: int = 0, world_size: int = 1) -> Units:
    """Other slots and people, of one rank."""
    rows = units.who.rows + torch.tensor([slot, 0, person, 0, 0])
    return Units(units.features.chunk(world_size)[rank], Identity(rows.chunk(world_size)[rank]))


def same_contrast(queue_size: int = 0) -> Contrast:
    """The same weights in every process."""
    torch.manual_seed(5)
    options = ContrastOptions(
        extreme_share=None, channel_share=1, projector_dim=5, projector_depth=2, queue_size=queue_size
    )
    return Contrast(6, options)


def contrast_of_rank(rank: int, world_size: int, folder: Path) -> None:
    """Writes loss, gradients and queue of this rank's share of the batch, after a first step filled the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    torch.save(two_steps(moved(contrast_batch(num_units=2), rank=rank, world_size=world_size)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def two_steps(units: Units) -> dict[str, object]:
    """Loss and gradients of a second step, whose negatives are those of the batch and of the step before."""
    contrast = same_contrast(queue_size=16)
    earlier = moved(units, slot=-100, person=50)
    contrast(Units(earlier.features.flip(2), earlier.who))
    contrast.queue.settle(accepted=True)
    loss = contrast(units)
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
        guard.clip_or_drop(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
        said = ""
    except UmbifError as error:
        said = str(error)
    torch.save({"accepted": guard.accepted, "said": said, "gradient": layer.weight.grad}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def head_of_rank(rank: int, world_size: int, folder: Path, corpus: Path, labels: Path) -> None:
    """Writes the head that this rank starts with, and how many exams it has read for it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    torch.save(started_head(corpus, labels, rank, world_size), folder / f"{rank}.pt")
    dist.destroy_process_group()


def started_head(corpus: Path, labels: Path, rank: int = 0, world_size: int = 1) -> dict[str, object]:
    """The head of an encoder that all ranks have, though each drew another one for it."""
    from small import VIT

    from umbif.downstream.data import TaskData
    from umbif.downstream.finetune import FineTune
    from umbif.downstream.tasks import BinaryLabel
    from umbif.encoders.vit import ViT3D

    label = BinaryLabel(columns=["idh"], positive=["mutant"], negative=["wildtype"])
    data = TaskData(str(corpus), "idh", label, str(labels), num_workers=0)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, num_devices=world_size)  # type: ignore[assignment]
    torch.manual_seed(5)
    encoder = ViT3D(**VIT)
    torch.manual_seed(rank)
    module, num_read = FineTune(encoder), []
    encoder.register_forward_hook(lambda *_: num_read.append(1))
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext))
    module.start_head(data, trainer)  # type: ignore[arg-type]
    return {"head": module.head.state_dict(), "num_read": len(num_read)}
