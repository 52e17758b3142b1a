"""Who takes part in `step.py`: UMBIF twice, and two public masked autoencoders at the same encoder and decoder.

- MONAI 1.6.1, `MaskedAutoEncoderViT` (MONAI Consortium, Apache-2.0). It has no loss: the one of He et al. 2022
  (arXiv:2111.06377) is added. Its sine positions need a width that 6 divides, which 512 is not, so they are learnt.
- transformers 5.24.0, `VideoMAEForPreTraining` (Tong et al. 2022, arXiv:2203.12602; The HuggingFace Inc. team,
  Apache-2.0), with the depth of a volume as the frames of a video.

Both take several sequences as channels: a token holds the patches of all of them. They get finished float32 volumes;
UMBIF's step makes its own from int16. `umbif joint` does the same work as they do on one sequence. `umbif`, the recipe
as it is, sees and predicts fewer patches, on purpose: `Contestant.seen` and `asked` say how many.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from umbif.encoders.transformer import Block
from umbif.pretrain.decoder import CrossBlock
from umbif.pretrain.umbif import UMBIF
from umbif.recipe.build import construct
from umbif.recipe.compose import Recipe, compose
from umbif.stream.exams import NUMBERS, Exams

VISIBLE_SHARE = 0.25  # of the patches, where architectures are equal
BALL = 0.55  # radius of the brain over the side of the crop: 184 of 216 patches hold some
RECIPES = {size: f"pretrain/umbif_vit{size.lower()}" for size in ("S", "B", "L", "H")}
TINY = (
    "model.encoder.embed_dim=96", "model.encoder.depth=2", "model.encoder.num_heads=2", "model.decoder.width=64",
    "model.decoder.depth=2", "model.decoder.num_heads=2", "model.masking.num_visible=8", "model.masking.num_targets=8",
)  # fmt: skip
EQUAL = (
    "model.decoder.kind=joint", "model.contrast_weight=0", "model.encoder.num_registers=1",
    "model.masking.num_targets=null", "model.masking.max_visible_share=1.0", "model.augmentation.flip_probability=0",
    "model.augmentation.curve=0", "model.augmentation.bias=0", "model.augmentation.scale=0",
    "model.augmentation.hide_name=0", "model.normalise_targets=true",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What all contestants do: `size` is one of `RECIPES`, or `tiny`."""

    size: str
    num_sequences: int
    num_views: int
    crop: int  # voxels along an edge
    device: torch.device

    @property
    def title(self) -> str:
        """For tables."""
        several = "s" if self.num_sequences > 1 else ""
        what = f"{self.num_sequences} sequence{several}, {self.num_views} views"
        return f"ViT-{self.size} {self.crop}³, {what}"


@dataclass
class Contestant:
    """A network that can be trained. `optimizers` are tried one after the other on the same gradients."""

    key: str
    name: str
    module: nn.Module
    loss: Callable[[], Tensor]
    optimizers: dict[str, Optimizer]
    blocks: list[nn.Module]  # what torch.compile is given
    seen: float  # patches of a view that the encoder sees, each sequence counted
    asked: float  # patches of a view that are predicted
    given: tuple[Tensor, ...] = ()  # the batch, as float32
    guard: Callable[[], None] | None = None  # between the backward and the optimiser


@dataclass(frozen=True)
class Shape:
    """Of encoder and decoder, as the recipe has them."""

    encoder: dict[str, Any]
    decoder: dict[str, Any]

    @property
    def patch(self) -> int:
        """Voxels along an edge of a patch."""
        return self.encoder["patch_size"]


def contestants(work: Work) -> list[Contestant]:
    """All that can take part here, ours first."""
    module, joint = default_recipe(work), equal_recipe(work)
    shape = Shape(joint.encoder.config, recipe_of(work).tree["model"]["decoder"])
    ours = [
        _umbif("umbif", "umbif", module, synthetic_exams(work, BALL)),
        _umbif("joint", "umbif joint", joint, synthetic_exams(work, None)),
    ]
    rivals = [monai(work, shape), *([video_mae(work, shape)] if has_transformers() else [])]
    return [*ours, *rivals]


def has_transformers() -> bool:
    """Whether the second rival is installed."""
    return importlib.util.find_spec("transformers") is not None


# ---------------------------------------------------------------- ours


def recipe_of(work: Work, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a size."""
    tiny = work.size == "tiny"
    return compose(RECIPES["S" if tiny else work.size], [*(TINY if tiny else ()), *overrides])


def default_recipe(work: Work, overrides: Sequence[str] = ()) -> UMBIF:
    """The method as its recipe has it. The data are left out: there is no corpus."""
    recipe = recipe_of(work, overrides)
    torch.manual_seed(0)
    return construct(replace(recipe, tree={**recipe.tree["model"], "run": recipe.tree["run"]})).to(work.device)


def equal_recipe(work: Work) -> UMBIF:
    """The same encoder as a plain masked autoencoder: joint decoder, 75% hidden, one register for a class token."""
    patch = recipe_of(work).tree["model"]["encoder"]["patch_size"]
    num = int((work.crop // patch) ** 3 * VISIBLE_SHARE) * work.num_sequences
    return default_recipe(work, [*EQUAL, f"model.masking.num_visible={num}"])


def synthetic_exams(work: Work, ball: float | None) -> Exams:
    """Two views of each exam, of noise; the brain a ball of this radius over the side, or the whole crop."""
    B, S, n = work.num_views, work.num_sequences, work.crop
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(B)
    values = {**NUMBERS, "scale": 1e-3, "low": -3.0, "high": 3.0}
    numbers = {name: torch.full((B, S), value) for name, value in values.items()}
    return Exams(
        image=torch.randint(-3000, 3000, (B, S, n, n, n), generator=generator, dtype=torch.int16),
        present=torch.ones(B, S, dtype=torch.bool), sequence=torch.arange(S).expand(B, S).contiguous(),
        brain=_brain(n, ball).expand(B, n, n, n).contiguous(), crop_start=torch.full((B, 3), 16),
        box=torch.full((B, 3), n + 32), slot=number // 2, view=number % 2, exam=number // 2, person=number // 2,
        spacing_mm=1.0, seed=0, **numbers,
    ).to(work.device)  # fmt: skip


def _brain(n: int, ball: float | None) -> Tensor:
    if ball is None:
        return torch.ones(n, n, n, dtype=torch.bool)
    square = (torch.arange(n) + 0.5 - n / 2) ** 2
    return square[:, None, None] + square[:, None] + square <= (ball * n) ** 2


def _umbif(key: str, name: str, module: UMBIF, exams: Exams) -> Contestant:
    optimizer = module.configure_optimizers()["optimizer"]

    def guard() -> None:
        module.guard.clip_or_drop(module, optimizer)
        module.settle()

    blocks = [part for part in module.modules() if isinstance(part, Block | CrossBlock)]
    masks = module.masking.draw(*module.encoder.grid(exams))
    seen, asked = (valid.sum().item() / len(exams) for valid in (masks.visible_valid, masks.target_valid))
    loss = partial(_umbif_loss, module, exams)
    return Contestant(key, name, module, loss, {"": optimizer}, blocks, seen, asked, guard=guard)


def _umbif_loss(module: UMBIF, exams: Exams) -> Tensor:
    return module.losses(exams).total.mean()


# ---------------------------------------------------------------- rivals


def monai(work: Work, shape: Shape) -> Contestant:
    """MONAI's masked autoencoder."""
    from monai.networks.nets import MaskedAutoEncoderViT

    encoder, decoder = shape.encoder, shape.decoder
    torch.manual_seed(0)
    net = MaskedAutoEncoderViT(
        in_channels=work.num_sequences, img_size=work.crop, patch_size=shape.patch, hidden_size=encoder["embed_dim"],
        mlp_dim=4 * encoder["embed_dim"], num_layers=encoder["depth"], num_heads=encoder["num_heads"],
        masking_ratio=1 - VISIBLE_SHARE, decoder_hidden_size=decoder["width"], decoder_mlp_dim=4 * decoder["width"],
        decoder_num_layers=decoder["depth"], decoder_num_heads=decoder["num_heads"], qkv_bias=True,
        pos_embed_type="learnable", decoder_pos_embed_type="learnable",
    ).to(work.device)  # fmt: skip
    # What its users write: AdamW(parameters). torch takes a loop on a CPU, and foreach on a GPU.
    optimizers = {"default": AdamW(net.parameters(), lr=1e-4), "fused": AdamW(net.parameters(), lr=1e-4, fused=True)}
    volumes = _volumes(work)
    loss = partial(_monai_loss, net, volumes, shape.patch)
    blocks = [part for part in net.modules() if type(part).__name__ == "TransformerBlock"]
    name, load = f"MONAI {metadata.version('monai')}", seen_and_asked(work, shape)
    return Contestant("monai", name, net, loss, optimizers, blocks, *load, (volumes,))


def _monai_loss(net: nn.Module, volumes: Tensor, patch: int) -> Tensor:
    """Of normalised hidden patches, as in facebookresearch/mae (arXiv:2111.06377)."""
    predicted, hidden = net(volumes)
    B, C, n = volumes.shape[:3]
    m = n // patch
    blocks = volumes.view(B, C, m, patch, m, patch, m, patch).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, m**3, -1)
    variance, mean = torch.var_mean(blocks, dim=-1, keepdim=True)
    error = ((predicted - (blocks - mean) / (variance + 1e-6) ** 0.5) ** 2).mean(-1)
    return (error * hidden).sum() / hidden.sum()


def video_mae(work: Work, shape: Shape) -> Contestant:
    """Hugging Face's VideoMAE, and the optimiser that its Trainer takes when it is not told."""
    from transformers import TrainingArguments, VideoMAEConfig, VideoMAEForPreTraining

    encoder, decoder = shape.encoder, shape.decoder
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=work.crop, num_frames=work.crop, patch_size=shape.patch, tubelet_size=shape.patch,
        num_channels=work.num_sequences, hidden_size=encoder["embed_dim"], intermediate_size=4 * encoder["embed_dim"],
        num_hidden_layers=encoder["depth"], num_attention_heads=encoder["num_heads"],
        decoder_hidden_size=decoder["width"], decoder_intermediate_size=4 * decoder["width"],
        decoder_num_hidden_layers=decoder["depth"], decoder_num_attention_heads=decoder["num_heads"],
        norm_pix_loss=True,
    )  # fmt: skip
    net = VideoMAEForPreTraining(config).to(work.device).train()
    fused = AdamW(net.parameters(), lr=1e-4, fused=True)
    by_default = str(TrainingArguments.__dataclass_fields__["optim"].default).endswith("fused")
    loops = {} if by_default else {"default": AdamW(net.parameters(), lr=1e-4)}
    optimizers = {**loops, "fused (its default)" if by_default else "fused": fused}
    frames = _volumes(work).transpose(1, 2).contiguous()
    loss = partial(_video_loss, net, frames, (work.crop // shape.patch) ** 3)
    blocks = [part for part in net.modules() if type(part).__name__ == "VideoMAELayer"]
    name = f"VideoMAE {metadata.version('transformers')}"
    return Contestant("videomae", name, net, loss, optimizers, blocks, *seen_and_asked(work, shape), (frames,))


def _video_loss(net: nn.Module, frames: Tensor, num_patches: int) -> Tensor:
    """Each volume with the same number of hidden patches, drawn anew."""
    rank = torch.rand(len(frames), num_patches, device=frames.device).argsort(1).argsort(1)
    return net(frames, bool_masked_pos=rank >= int(num_patches * VISIBLE_SHARE)).loss


def seen_and_asked(work: Work, shape: Shape) -> tuple[int, int]:
    """Patches of a view that a rival's encoder sees, and those that it predicts: each channel is one."""
    num = (work.crop // shape.patch) ** 3
    visible = int(num * VISIBLE_SHARE)
    return visible * work.num_sequences, (num - visible) * work.num_sequences


def _volumes(work: Work) -> Tensor:
    """(B, S, X, Y, Z) z-scores, of noise."""
    sides = (work.crop,) * 3
    noise = torch.randn(work.num_views, work.num_sequences, *sides, generator=torch.Generator().manual_seed(0))
    return noise.to(work.device)
