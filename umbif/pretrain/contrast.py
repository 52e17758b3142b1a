"""Contrast between views: SimCLR (Chen et al. 2020, arXiv:2002.05709), or MoCo with a moving average and a queue
(He et al. 2020, arXiv:1911.05722; Chen et al. 2021, arXiv:2104.02057).

Compared are views as a whole, or each sequence of a view with the same sequence of others: then no one is told apart
by which sequences it shows. Negatives are those of all other people of all ranks, and those that a queue remembers.
Shapes: B exams × views of this rank, U units of a view, F features of a unit, R = B * U rows, K keys, D dimensions of a
projection.
"""

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from umbif.encoders.gather import gathered, gathered_rows
from umbif.encoders.transformer import norm
from umbif.pretrain.losses import full_precision, info_nce
from umbif.pretrain.units import Identity, Unit, Units
from umbif.ranges import NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare
from umbif.stream.exams import SEQUENCES, Exams
from umbif.stream.patches import Patches


@dataclass(frozen=True)
class ContrastOptions:
    """How views are compared.

    Args:
        unit: What is compared: each `view`, or each `sequence` of a view.
        extreme_share: Share of a unit's tokens whose extremes are compared beside their mean; null for the mean alone.
        channel_share: Share of a token's channels that are compared, the first ones. A contrast lets the directions
            collapse that views do not share (Jing et al. 2022, arXiv:2110.09348); the other channels keep them for
            the reconstruction. 1 for all.
        temperature: Of the softmax.
        projector_dim: D.
        projector_hidden: Width of the projector's hidden layers; null for twice the encoder's.
        projector_depth: Layers of the projector.
        queue_size: Earlier keys that are negatives too; 0 for those of the batch alone.
        same_person_negatives: Let other exams of one person be negatives.
    """

    unit: Unit = "sequence"
    extreme_share: PositiveShare | None = 0.04
    channel_share: PositiveShare = 0.25
    temperature: PositiveFloat = 0.5
    projector_dim: PositiveInt = 128
    projector_hidden: PositiveInt | None = None
    projector_depth: PositiveInt = 3
    queue_size: NonNegativeInt = 0
    same_person_negatives: bool = False


class Contrast(nn.Module):
    """Projects pooled features and matches views.

    Args:
        width: Of a token.
        options: See there.
    """

    def __init__(self, width: int, options: ContrastOptions) -> None:
        super().__init__()
        hidden = options.projector_hidden or 2 * width
        self.options = options
        self.num_channels = max(1, round(options.channel_share * width))
        features = self.num_channels if options.extreme_share is None else 3 * self.num_channels
        self.projector = projector(features, hidden, options.projector_dim, options.projector_depth)
        self.queue = Queue(options.queue_size, options.projector_dim)

    def forward(self, units: Units, keys: Tensor | None = None) -> Tensor:
        """Loss of each view, (B,): the mean over its units that have a sibling.

        Args:
            units: Of this rank.
            keys: (R, D) projections of the same units by a moving average; default, those of `units`.

        The mean over ranks of the means is the loss of the joined batch, and so are its gradients under data-parallel
        averaging.
        """
        whose = Identity(gathered_rows(units.who.rows))
        query = self.projected(units)
        key = gathered(query) if keys is None else gathered_rows(keys)
        if self.training:
            self.queue.note(key, whose)
            key, whose = self.queue.joined(key, whose)
        options = self.options
        loss, asked = info_nce(
            query, key, units.who, whose, temperature=options.temperature,
            same_person_negatives=options.same_person_negatives,
        )  # fmt: skip
        shape = units.features.shape[:2]
        return loss.view(shape).sum(1) / asked.view(shape).sum(1).clamp_min(1)

    def units(self, tokens: Tensor, valid: Tensor, patches: Patches, exams: Exams) -> Units:
        """What is compared of the tokens of a batch, see `Units.of`."""
        compared = tokens[..., : self.num_channels]
        return Units.of(compared, valid, patches, exams, self.options.unit, self.options.extreme_share)

    def projected(self, units: Units, projector: nn.Module | None = None) -> Tensor:
        """(R, D) by the own projector, or by that of a moving average."""
        projection = (projector or self.projector)(units.features.flatten(0, 1))
        return standardised(projection, units.who, Identity(gathered_rows(units.who.rows)))


class Queue(nn.Module):
    """The last keys of accepted steps, in the order of slots whatever the number of ranks.

    Args:
        size: Keys that are remembered.
        dim: D.
    """

    key: Tensor
    whose: Tensor
    next_row: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.register_buffer("key", torch.zeros(size, dim))
        self.register_buffer("whose", torch.zeros(size, 5, dtype=torch.int64))  # rows of Identity; none is valid yet
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))

    def note(self, key: Tensor, whose: Identity) -> None:
        """Remembers the keys (K, D) of a micro-batch until its step is accepted or dropped."""
        if self.size:
            self.noted.append((key.detach(), whose.rows))

    def settle(self, accepted: bool) -> None:
        """Takes what was noted, or forgets it: keys of a broken step must never be anyone's negatives."""
        noted, self.noted = self.noted, []
        for key, whose in noted if accepted else ():
            num = min(len(key), self.size)
            rows = (self.next_row + torch.arange(num, device=key.device)) % self.size
            self.key[rows], self.whose[rows] = key[-num:], whose[-num:]
            self.next_row.copy_((self.next_row + num) % self.size)

    def joined(self, key: Tensor, whose: Identity) -> tuple[Tensor, Identity]:
        """The keys of the batch, and then those of the queue."""
        if not self.size:
            return key, whose
        return torch.cat([key, self.key]), Identity(torch.cat([whose.rows, self.whose]))


class MovingAverage(nn.Module):
    """Copies of modules that follow them slowly, and never a gradient.

    Args:
        decay: Share of itself that an average keeps at a step.
        modules: What to follow, by name.
    """

    def __init__(self, decay: float, **modules: nn.Module) -> None:
        super().__init__()
        self.decay = decay
        self.average = nn.ModuleDict({name: copy.deepcopy(module) for name, module in modules.items()})
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Never: what an average sees is not dropped."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, **modules: nn.Module) -> None:
        """One step towards the modules as they are now."""
        for name, module in modules.items():
            own = self.average[name]
            torch._foreach_lerp_([*own.parameters()], [*module.parameters()], 1 - self.decay)
            for mine, theirs in zip(own.buffers(), module.buffers(), strict=True):
                mine.copy_(theirs)


def projector(width: int, hidden: int, out: int, depth: int) -> nn.Sequential:
    """As in MoCo v3 (Chen et al. 2021, arXiv:2104.02057), with layer norms: no statistics to share."""
    widths = [width, *[hidden] * (depth - 1)]
    inner = [[nn.Linear(a, b), norm(b), nn.GELU()] for a, b in pairwise(widths)]
    return nn.Sequential(*(layer for layers in inner for layer in layers), nn.Linear(widths[-1], out))


def standardised(projection: Tensor, who: Identity, everyone: Identity) -> Tensor:
    """Projections (R, D) of each sequence, with mean 0 and variance 1 in each dimension over the rows of all ranks.

    Without it all projections start out nearly parallel, and the contrast stays at that of guessing.

    Args:
        projection: Of this rank.
        who: Of its rows.
        everyone: Of the rows of all ranks.
    """
    everywhere = gathered(projection.float())
    weight = (one_hot(everyone.sequence, len(SEQUENCES)) * everyone.valid[:, None]).float()  # (all rows, sequences)
    num = weight.sum(0)[:, None]
    with full_precision(projection):
        mean = weight.T @ everywhere / num.clamp_min(1)
        variance = weight.T @ (everywhere - mean[everyone.sequence]).square() / (num - 1).clamp_min(1)
    return (projection - mean[who.sequence]) / (variance.clamp_min(1e-12).sqrt() + 1e-4)[who.sequence]
