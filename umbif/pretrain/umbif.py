"""UMBIF: masked reconstruction coupled with contrast of two views (after He et al. 2022, arXiv:2111.06377, and
Chen et al. 2020, arXiv:2002.05709; coupled as in Li et al., JCO Precision Oncology 2026, which published no code).

Two views of an exam are encoded in one forward from a fixed budget of visible patches. A cross-attention decoder
predicts hidden patches; the mean of the visible tokens, projected, is matched between the views.
Shapes: B exams × views, V visible tokens, T targets, E width, P voxels of a patch.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from umbif.encoders.optimise import Guard, adamw
from umbif.encoders.vit import ViT3D
from umbif.encoders.weights import save_encoder
from umbif.pretrain.decoder import CrossDecoder, normalised
from umbif.pretrain.losses import info_nce, reconstruction_loss, standardised
from umbif.pretrain.masking import draw_masking
from umbif.pretrain.monitors import write_reconstruction
from umbif.stream.augment import Augmentation
from umbif.stream.exams import Exams, WholeBrainDataset, collate
from umbif.stream.modules import PretrainData, exams_of_split
from umbif.stream.patches import gather, patch_grid, scatter


class UMBIF(pl.LightningModule):
    """Pretrains an encoder.

    Args:
        encoder: ViT3D.
        num_visible: Patches that the encoder sees of a view, over all of its sequences.
        num_targets: Hidden patches that are predicted.
        column_share: Share of the places that are hidden in every sequence.
        reconstruction_weight: Of the masked reconstruction; 0 leaves contrast alone.
        contrast_weight: Of the contrast; 0 leaves reconstruction alone (a masked autoencoder).
        temperature: Of the contrast.
        decoder_width: Of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        projector_dim: Of the space where views are compared.
        augmentation: Of each view.
        lr: For a global batch of 256 exams; scaled in proportion.
        warmup_steps: Linear warm-up.
        weight_decay: Of matrices.
        betas: Of AdamW.
        gradient_clip: Largest norm of the gradient.
        global_batch_size: Exams of an optimiser step, for scaling `lr`.
        max_steps: Length of the cosine.
    """

    def __init__(
        self,
        encoder: ViT3D,
        num_visible: int = 64,
        num_targets: int = 64,
        column_share: float = 0.25,
        reconstruction_weight: float = 1.0,
        contrast_weight: float = 0.1,
        temperature: float = 0.2,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 8,
        projector_dim: int = 128,
        augmentation: Augmentation | None = None,
        lr: float = 1.5e-4,
        warmup_steps: int = 1000,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        gradient_clip: float = 1.0,
        global_batch_size: int = 64,
        max_steps: int = 100_000,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_visible, self.num_targets, self.column_share = num_visible, num_targets, column_share
        self.reconstruction_weight, self.contrast_weight = reconstruction_weight, contrast_weight
        self.temperature = temperature
        self.guard = Guard(gradient_clip)
        self.augmentation = augmentation or Augmentation()
        if reconstruction_weight:
            patch_size, patch_mm = encoder.patch_size, encoder.config["patch_mm"]
            self.decoder = CrossDecoder(
                encoder.embed_dim, patch_size, patch_mm, decoder_width, decoder_depth, decoder_heads
            )
        if contrast_weight:
            self.projector = projector(encoder.embed_dim, projector_dim)
        self.optimisation: dict[str, Any] = {
            "lr": lr * global_batch_size / 256, "warmup_steps": warmup_steps, "weight_decay": weight_decay,
            "betas": betas, "max_steps": max_steps,
        }  # fmt: skip

    def training_step(self, exams: Exams, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        losses = self.losses(exams)
        loss = losses["loss"].mean()
        self.log_dict({f"train/{name}": value.mean().detach() for name, value in losses.items()}, batch_size=len(exams))
        return loss

    def validation_step(self, exams: Exams, batch_idx: int) -> None:
        """Losses of held-out exams, the same views each time."""
        losses = self.losses(exams)
        values = {f"val/{name}": value.mean() for name, value in losses.items()}
        self.log_dict(values, batch_size=len(exams), sync_dist=True)

    def losses(self, exams: Exams) -> dict[str, Tensor]:
        """Each loss of each view (B,), and their weighted sum as `loss`."""
        grid = patch_grid(exams, self.encoder.patch_size)
        masking = draw_masking(
            exams, grid, num_visible=self.num_visible, num_targets=self.num_targets, column_share=self.column_share
        )
        visible = self.augmentation(gather(exams, grid, masking.visible, masking.visible_valid), exams)
        tokens, pooled = self.encoder(visible)
        parts: dict[str, Tensor] = {}
        loss = torch.zeros(len(exams), device=tokens.device)
        if self.reconstruction_weight:
            target = self.augmentation(gather(exams, grid, masking.target, masking.target_valid), exams)
            predicted = self.decoder(tokens, visible, target)
            parts["reconstruction"] = reconstruction_loss(predicted, normalised(target.voxels.flatten(2)), target.valid)
            loss = loss + self.reconstruction_weight * parts["reconstruction"]
        if self.training:
            # One broken exam breaks everyone's contrast: what is watched is each exam's own.
            self.guard.watch(parts.get("reconstruction", pooled.square().mean(-1)), exams)
        if self.contrast_weight:
            z = standardised(self.projector(pooled))
            parts["contrast"] = info_nce(z, exams.slot, exams.person, self.temperature)
            loss = loss + self.contrast_weight * parts["contrast"]
        return {"loss": loss, **parts}

    @torch.no_grad()
    def shown_and_predicted(self, exams: Exams, visible_share: float) -> tuple[Tensor, Tensor]:
        """Hides patches and predicts all of them.

        Args:
            exams: Sides multiples of the patch size.
            visible_share: Share of the patches of an exam that the encoder sees.

        Returns:
            What was shown, and what was predicted in its place, with the mean and variance of each true patch, for
            which the loss does not ask. Both (B, S, X, Y, Z), NaN elsewhere.
        """
        grid = patch_grid(exams, self.encoder.patch_size)
        num = int(grid.available.sum(1).max())
        masking = draw_masking(
            exams, grid, num_visible=max(1, int(num * visible_share)), num_targets=num, column_share=self.column_share
        )
        visible = gather(exams, grid, masking.visible, masking.visible_valid)
        target = gather(exams, grid, masking.target, masking.target_valid)
        tokens, _ = self.encoder(visible)
        predicted = self.decoder(tokens, visible, target)
        variance, mean = torch.var_mean(target.voxels.flatten(2), dim=-1, keepdim=True)
        voxels = predicted * (variance + 1e-6).sqrt() + mean
        shown = scatter(exams, grid, masking.visible, visible.valid, visible.voxels.flatten(2))
        return shown, scatter(exams, grid, masking.target, target.valid, voxels)

    def export(self, folder: Path, recipe: dict[str, Any]) -> None:
        """Writes `encoder/` with what a later user has to know, and pictures of reconstructions."""
        data: PretrainData = self.trainer.datamodule
        if not self.trainer.is_global_zero:
            return
        if self.reconstruction_weight:
            self.cpu().picture(data, folder / "figures")
        about = {"corpus": data.corpus.identity, "preparation": data.corpus.about["preparation"]}
        save_encoder(self.encoder, folder / "encoder", {"steps": self.global_step, **about})

    def picture(self, data: PretrainData, folder: Path) -> None:
        """Reconstruction of one held-out exam (of a training exam where none is held out)."""
        held_out = exams_of_split(data.corpus, "test")
        rows = held_out if len(held_out) else exams_of_split(data.corpus, "train")
        dataset = WholeBrainDataset(data.corpus, rows[:1], np.zeros(1, dtype=np.float32))
        exams = collate([dataset[0]], spacing_mm=data.corpus.spacing_mm, seed=data.position.seed)
        write_reconstruction(self.eval(), exams, folder)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clips here and not in the Trainer, which refuses to clip for fused AdamW under bf16-mixed."""
        self.log("train/gradient_norm", self.guard(self, optimizer))

    def configure_optimizers(self) -> dict[str, Any]:
        """Fused AdamW, warm-up and cosine by steps."""
        return adamw([*self.named_parameters()], without=self.encoder.no_weight_decay(), **self.optimisation)


def projector(width: int, out: int) -> nn.Sequential:
    """Three layers, as in MoCo v3 (Chen et al. 2021, arXiv:2104.02057), with layer norms: no statistics to share."""
    hidden = 2 * width
    return nn.Sequential(
        nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(),
        nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.GELU(),
        nn.Linear(hidden, out),
    )  # fmt: skip
