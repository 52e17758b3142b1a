"""Convolutional encoders after ResNet (He et al. 2016, arXiv:1512.03385), DenseNet (Huang et al. 2017,
arXiv:1608.06993), EfficientNet (Tan & Le 2019, arXiv:1905.11946) and the encoder of a residual U-Net (Myronenko 2018,
arXiv:1810.11654). The networks come from MONAI, without their heads.

A network is shown a whole crop of one sequence, so every sequence passes alone and any subset of them will do; the
weights are shared.
Shapes: B exams × views, V sequences that are shown, n of them over the batch, M cells of the last feature maps of an
exam, m of one map, E their channels.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from umbif.encoders.pooling import masked_mean
from umbif.ranges import PositiveFloat
from umbif.stream.augment import Augmentation
from umbif.stream.exams import Exams
from umbif.stream.order import Triple
from umbif.stream.patches import Patches, PatchGrid, choose, gather, patch_grid

NUM_GROUPS = 8  # divides every number of channels of the four networks
ANY_BRAIN = 1e-9  # share of a crop that one voxel exceeds, however large the crop is


class CNN3D(nn.Module):
    """Encoder of exams whose patches are whole crops.

    Args:
        network: Which of the four.
        norm: `group` (eight of them) and `instance` take their statistics from one crop alone, so an exam's features do
            not depend on the batch, and ranks have nothing to share; but `instance` also takes away the mean of each
            channel, which is what pooling would keep. `batch` is the papers'.
        voxel_mm: Edge of a voxel in millimetres, at the corpus' spacing.
        weights: A run, or the encoder folder of one, to start from.

    Raises:
        UsageError: `weights` names no encoder, or one of another configuration.
    """

    can_mask = False  # a convolution needs all of the crop

    def __init__(
        self,
        network: Literal["resnet50", "densenet121", "efficientnet_b0", "resunet"] = "resnet50",
        norm: Literal["group", "instance", "batch"] = "group",
        voxel_mm: PositiveFloat = 1.0,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"network": network, "norm": norm, "voxel_mm": voxel_mm}
        self.voxel_mm = voxel_mm
        build, self.embed_dim, self.multiple = NETWORKS[network]
        self.trunk = with_norm(build(), norm)
        # A single cell has no variance: where each channel is normed alone, it would always be zero.
        self.smallest = self.multiple if norm == "group" else 2 * self.multiple
        if weights is not None:
            from umbif.encoders.weights import load_encoder_weights

            load_encoder_weights(self, weights)

    def forward(self, patches: Patches) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes chosen crops, each of one sequence, the valid ones only.

        Args:
            patches: Voxels (B, V, px, py, pz) of any size: z-scores of zero are added where the network needs more.

        Returns:
            Tokens (B, M, E), which of them are valid (B, M), and the mean of those (B, E), zeros where there is none.
        """
        run = patches.valid.clone()
        run[0, 0] |= ~run.any()  # never nothing: on every rank, every parameter has a gradient, if of zero
        weight = patches.valid[run]  # (n,)
        voxels = patches.voxels[run].masked_fill(~weight[:, None, None, None], 0)
        cells = self.trunk(self._grown(voxels)[:, None]).flatten(2).transpose(1, 2) * weight[:, None, None]  # (n, m, E)
        tokens = cells.new_zeros(*run.shape, *cells.shape[1:])
        tokens[run] = cells
        tokens = tokens.flatten(1, 2)
        valid = patches.valid.repeat_interleave(cells.shape[1], dim=1)
        return tokens, valid, masked_mean(tokens, valid)

    def forward_features(
        self,
        exams: Exams,
        *,
        scores: Tensor | None = None,
        budget: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes every sequence that is present, or the `budget` of them with the smallest `scores`.

        Each exam is cut to its own box, or else its features would depend on how far the largest box of the batch
        reaches.

        Args:
            exams: Of any size.
            scores: (B, `num_patches`); default, all alike.
            budget: Most sequences of an exam.
            augmentation: Of their crops.

        Returns:
            Tokens (B, M, E), which of them are valid (B, M), and the mean of those (B, E).
        """
        padded = exams.padded(self.multiple)
        parts, order = [], []
        for size, rows in alike(padded, self.multiple):
            part = cut(padded, rows, size)
            _, grid = self.grid(part)
            patches = gather(part, grid, *choose(grid, None if scores is None else scores[rows], budget))
            parts.append(self(augmentation(patches, part) if augmentation else patches))
            order.append(rows)
        return joined(parts, torch.cat(order))

    def grid(self, exams: Exams) -> tuple[Exams, PatchGrid]:
        """The exams padded to what the network's strides divide, and one patch for each of their sequences."""
        exams = exams.padded(self.multiple)
        return exams, patch_grid(exams, self.patch_shape(exams), ANY_BRAIN)

    def patch_shape(self, exams: Exams) -> Triple:
        """Voxels of a patch: the whole crop."""
        x, y, z = exams.image.shape[2:]
        return x, y, z

    def num_patches(self, exams: Exams) -> int:
        """Patches of an exam of this batch: its sequences, absent ones included."""
        return exams.image.shape[1]

    def no_weight_decay(self) -> set[str]:
        """Nothing beside biases and norms."""
        return set()

    def layer_groups(self) -> list[list[str]]:
        """Prefixes of parameter names from the input to the output, for layer-wise learning rates."""
        return [[f"trunk.{name}."] for name, _ in self.trunk.named_children()]

    def _grown(self, voxels: Tensor) -> Tensor:
        """(n, px, py, pz) with background at the far ends, up to what the network takes."""
        m = self.multiple
        missing = [max(self.smallest, -(-n // m) * m) - n for n in voxels.shape[1:]]
        return pad(voxels, [end for n in reversed(missing) for end in (0, n)]) if any(missing) else voxels


def alike(exams: Exams, multiple: int) -> list[tuple[Triple, Tensor]]:
    """The exams whose boxes end alike: what is left of the crop up to there, in whole multiples, and their rows."""
    limit = torch.tensor(exams.image.shape[2:], device=exams.box.device)
    left = (exams.box - exams.crop_start).long()
    ends = (-(-left // multiple) * multiple).clamp_min(multiple).minimum(limit)
    sizes, member = ends.unique(dim=0, return_inverse=True)
    return [((x, y, z), (member == i).nonzero()[:, 0]) for i, (x, y, z) in enumerate(sizes.tolist())]


def cut(exams: Exams, rows: Tensor, size: Triple) -> Exams:
    """Some exams of a batch, without the voxels beyond `size`."""
    x, y, z = size
    tensors = {f.name: value for f in fields(exams) if isinstance(value := getattr(exams, f.name), Tensor)}
    tensors |= {name: tensors[name][..., :x, :y, :z] for name in ("image", "brain")}
    some: dict[str, Any] = {name: value[rows] for name, value in tensors.items()}
    return replace(exams, **some)


def joined(parts: list[tuple[Tensor, Tensor, Tensor]], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, valid and pooled of parts of a batch, put back to their `rows` (B,)."""
    M = max(tokens.shape[1] for tokens, _, _ in parts)
    tokens = torch.cat([pad(tokens, (0, 0, 0, M - tokens.shape[1])) for tokens, _, _ in parts])
    valid = torch.cat([pad(valid, (0, M - valid.shape[1])) for _, valid, _ in parts])
    pooled = torch.cat([pooled for _, _, pooled in parts])
    order = rows.argsort()
    return tokens[order], valid[order], pooled[order]


def with_norm(trunk: nn.Sequential, norm: str) -> nn.Sequential:
    """The trunk with other layers in the place of batch norm.

    They are exchanged here because MONAI's ResNet hands its argument `norm` to the stem alone.
    """
    if norm == "batch":
        return trunk
    for module in list(trunk.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm3d):
                num = child.num_features
                other = nn.GroupNorm(NUM_GROUPS, num) if norm == "group" else nn.InstanceNorm3d(num, affine=True)
                setattr(module, name, other)
    return trunk


def resnet50() -> nn.Sequential:
    """ResNet-50 up to its last block."""
    from monai.networks.nets.resnet import ResNetFeatures

    net = ResNetFeatures("resnet50", pretrained=False)
    stem = nn.Sequential(net.conv1, net.bn1, net.act, net.maxpool)
    return stages(stem, net.layer1, net.layer2, net.layer3, net.layer4)


def densenet121() -> nn.Sequential:
    """DenseNet-121 up to the activation before its pooling."""
    from monai.networks.nets.densenet import DenseNet121

    net = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1).features
    stem = nn.Sequential(net.conv0, net.norm0, net.relu0, net.pool0)
    inner = [nn.Sequential(getattr(net, f"denseblock{i}"), getattr(net, f"transition{i}")) for i in (1, 2, 3)]
    return stages(stem, *inner, nn.Sequential(net.denseblock4, net.norm5, nn.ReLU(inplace=True)))


def efficientnet_b0() -> nn.Sequential:
    """EfficientNet-B0 up to the convolution before its pooling."""
    from monai.networks.nets.efficientnet import EfficientNetBN

    net = EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=3, in_channels=1)
    for block in (block for stage in net._blocks for block in stage):
        block.drop_connect_rate = 0.0  # it draws from the global generator: a step would not follow from its slots
    stem = nn.Sequential(net._conv_stem_padding, net._conv_stem, net._bn0, net._swish)
    return stages(stem, *net._blocks, nn.Sequential(net._conv_head, net._bn1, net._swish))


def resunet() -> nn.Sequential:
    """The encoder of the residual U-Net."""
    from monai.networks.nets.segresnet_ds import SegResEncoder

    net = SegResEncoder(spatial_dims=3, in_channels=1)
    return stages(net.conv_init, *(nn.Sequential(level["blocks"], level["downsample"]) for level in net.layers))


def stages(stem: nn.Module, *inner: nn.Module) -> nn.Sequential:
    """A trunk from the stem and what follows, each with a name."""
    return nn.Sequential(OrderedDict([("stem", stem), *((f"stage{i}", stage) for i, stage in enumerate(inner, 1))]))


# Each network, the channels of its last feature map, and the voxels between two cells of it.
NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], int, int]] = {
    "resnet50": (resnet50, 2048, 32),
    "densenet121": (densenet121, 1024, 32),
    "efficientnet_b0": (efficientnet_b0, 1280, 32),
    "resunet": (resunet, 256, 8),
}
