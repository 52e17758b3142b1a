"""UMBIF: masked reconstruction coupled with contrast of two views (after He et al. 2022, arXiv:2111.06377, and
Chen et al. 2020, arXiv:2002.05709; coupled as in Li et al., JCO Precision Oncology 2026, which published no code).

Two views of an exam are encoded in one forward from a fixed budget of visible patches. A transformer decoder predicts
hidden patches; what the visible tokens are pooled to, projected, is matched between the views.
Shapes: B exams × views, V visible tokens, T targets, E width, P voxels of a patch.
"""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from umbif.corpus.people import learnt_from, marks
from umbif.encoders.cnn import CNN3D
from umbif.encoders.guard import Guard
from umbif.encoders.optimise import adamw, exams_per_step
from umbif.encoders.sharding import shard
from umbif.encoders.transformer import Block
from umbif.encoders.vit import ViT3D
from umbif.encoders.weights import save_encoder
from umbif.errors import Problem, UmbifError, UsageError
from umbif.pretrain.contrast import Contrast, ContrastOptions, MovingAverage
from umbif.pretrain.decoder import CrossBlock, DecoderShape, build_decoder
from umbif.pretrain.losses import Losses, TargetErrors
from umbif.pretrain.masking import Masking, Masks
from umbif.pretrain.pictures import held_out_exam, write_reconstruction
from umbif.ranges import NonNegativeFloat, NonNegativeInt, OpenShare, PositiveFloat, PositiveInt, ShareBelowOne
from umbif.stream.augment import Augmentation
from umbif.stream.exams import Exams
from umbif.stream.modules import PretrainData
from umbif.stream.patches import Patches, PatchGrid, choose, gather, scatter

log = logging.getLogger("umbif")
LR_EXAMS = 256  # exams of a step that a learning rate is given for (Goyal et al. 2017, arXiv:1706.02677)


class UMBIF(pl.LightningModule):
    """Pretrains an encoder.

    A step: `losses` of each micro-batch, of which the guard notes what each exam added; backward; the guard clips the
    gradient or drops it; the optimiser; and, where nothing was dropped, queue and moving average follow (`settle`).

    Args:
        encoder: ViT3D; or CNN3D, which trains by contrast alone.
        masking: What is hidden and what is predicted.
        decoder: Of the voxels of hidden patches.
        contrast: Of views.
        reconstruction_weight: Of the masked reconstruction; 0 leaves contrast alone.
        normalise_targets: Ask for hidden patches of mean 0 and variance 1, as He et al. do; false asks for z-scores
            of the brain, and so for brightness too.
        contrast_weight: Of the contrast; 0 leaves reconstruction alone (a masked autoencoder).
        ema_decay: Of a moving average of the encoder, which gives the contrast's keys and is what is exported; null
            does without.
        augmentation: Of each view.
        lr: For 256 exams a step; scaled in proportion.
        warmup_steps: Linear warm-up.
        weight_decay: Of matrices.
        betas: Of AdamW.
        gradient_clip: Largest norm of the gradient.
        spike_factor: A gradient this many times the usual is dropped; null lets it pass.
        max_skipped: More dropped steps of the last 1000 end the run.
        compile_backend: Of torch.compile, for the transformer blocks, such as `inductor`; null does not compile.
        global_batch_size: Exams of a micro-step over all ranks, for scaling `lr`.
        max_steps: Length of the cosine.

    Raises:
        UsageError: Parts that do not go together; all of them are named.
    """

    def __init__(
        self,
        encoder: ViT3D | CNN3D,
        masking: Masking = Masking(),  # noqa: B008 (frozen)
        decoder: DecoderShape = DecoderShape(),  # noqa: B008
        contrast: ContrastOptions = ContrastOptions(),  # noqa: B008
        reconstruction_weight: NonNegativeFloat = 1.0,
        normalise_targets: bool = False,
        contrast_weight: NonNegativeFloat = 0.01,
        ema_decay: OpenShare | None = None,
        augmentation: Augmentation = Augmentation(hide_name=0.1),  # noqa: B008
        lr: NonNegativeFloat = 1.5e-4,
        warmup_steps: NonNegativeInt = 2000,
        weight_decay: NonNegativeFloat = 0.05,
        betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95),
        gradient_clip: PositiveFloat = 1.0,
        spike_factor: PositiveFloat | None = 20.0,
        max_skipped: NonNegativeInt = 20,
        compile_backend: str | None = None,
        global_batch_size: PositiveInt = 64,
        max_steps: NonNegativeInt = 100_000,
    ) -> None:
        super().__init__()
        refuse_impossible(encoder, contrast, reconstruction_weight, contrast_weight, ema_decay)
        self.encoder, self.masking, self.augmentation = encoder, masking, augmentation
        self.normalise_targets = normalise_targets
        self.reconstruction_weight, self.contrast_weight = reconstruction_weight, contrast_weight
        self.guard = Guard(gradient_clip, spike_factor, max_skipped)
        self.compile_backend, self.global_batch_size = compile_backend, global_batch_size
        if reconstruction_weight and isinstance(encoder, ViT3D):
            self.decoder = build_decoder(encoder, decoder)
        if contrast_weight:
            self.contrast = Contrast(encoder.embed_dim, contrast)
        self.average = None if ema_decay is None else MovingAverage(ema_decay, **self._followed())
        # Queue and average are alike on all ranks already: DDP would send them at every step.
        tensors = (*self.named_parameters(), *self.named_buffers())
        alike = [name for name, _ in tensors if name.startswith(("contrast.queue.", "average."))]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, alike)
        self.optimisation: dict[str, Any] = {
            "lr": lr / LR_EXAMS, "warmup_steps": warmup_steps, "weight_decay": weight_decay, "betas": betas,
            "max_steps": max_steps,
        }  # fmt: skip

    def training_step(self, exams: Exams, batch_idx: int) -> Tensor:
        """The loss of one micro-batch."""
        losses = self.losses(exams)
        values = {f"train/{name}": value.detach() for name, value in losses.means().items()}
        self.log_dict(values, batch_size=len(exams))
        return losses.total.mean()

    def validation_step(self, exams: Exams, batch_idx: int) -> None:
        """Losses of held-out exams, the same views each time."""
        losses = self.losses(exams)
        values = {f"val/{name}": value for name, value in losses.means().items()}
        self.log_dict(values, batch_size=len(exams), sync_dist=True)
        if losses.targets is not None:
            by_sequence = {f"val/reconstruction_{name}": e for name, e in losses.targets.by_sequence().items()}
            self.log_dict(by_sequence, batch_size=len(exams), sync_dist=True)

    def losses(self, exams: Exams) -> Losses:
        """Each loss of each view, and their weighted sum."""
        exams, grid = self.encoder.grid(exams)
        masks = self.masking.draw(exams, grid) if self.encoder.can_mask else everything(grid)
        chosen = self.augmentation(gather(exams, grid, *masks.joined()), exams)
        visible, asked = chosen.split(masks.visible.shape[1])
        tokens, valid, pooled = self.encoder(visible)
        parts: dict[str, Tensor] = {}
        total, targets = torch.zeros(len(exams), device=tokens.device), None
        if self.reconstruction_weight:
            predicted = self.decoder(tokens, visible, asked)
            targets = TargetErrors.of(predicted, asked, exams.sequence, self.normalise_targets)
            parts["reconstruction"] = targets.by_exam()
            total = total + self.reconstruction_weight * parts["reconstruction"]
        if self.training:
            # One broken exam breaks everyone's contrast: what is watched is each exam's own.
            self.guard.watch(parts.get("reconstruction", pooled.square().mean(-1)), exams)
        if self.contrast_weight:
            units = self.contrast.units(tokens, valid, visible, exams)
            parts["contrast"] = self.contrast(units, self._average_keys(visible, exams))
            total = total + self.contrast_weight * parts["contrast"]
        return Losses(total, parts, targets)

    @torch.no_grad()
    def shown_and_predicted(self, exams: Exams, visible_share: float) -> tuple[Tensor, Tensor]:
        """Hides patches and predicts all of them.

        Args:
            exams: Sides multiples of the patch size.
            visible_share: Share of the patches of an exam that the encoder sees.

        Returns:
            What was shown, and what was predicted in its place. Both (B, S, X, Y, Z), NaN elsewhere. Predictions of
            normalised patches take mean and variance from the true ones, for which the loss did not ask.
        """
        exams, grid = self.encoder.grid(exams)
        num = max(1, int(int(grid.available.sum(1).max()) * visible_share))
        masks = Masking(num, 1.0, num_targets=None, column_share=self.masking.column_share).draw(exams, grid)
        visible, target = gather(exams, grid, *masks.joined()).split(masks.visible.shape[1])
        predicted = self.decoder(self.encoder(visible)[0], visible, target)
        if self.normalise_targets:
            variance, mean = torch.var_mean(target.voxels.flatten(2), dim=-1, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        shown = scatter(exams, grid, masks.visible, visible.valid, visible.voxels.flatten(2))
        return shown, scatter(exams, grid, masks.target, target.valid, predicted)

    def configure_model(self) -> None:
        """Under FSDP2, says what is gathered together."""
        average = self.average.average.values() if self.average is not None else ()
        own = (getattr(self, "decoder", None), getattr(getattr(self, "contrast", None), "projector", None))
        shard(self, [part for part in (self.encoder, *own, *average) if part is not None])

    def setup(self, stage: str) -> None:
        """Compiles the blocks: small graphs that are compiled once and serve all of them."""
        if self.compile_backend is not None:
            for block in (module for module in self.modules() if isinstance(module, Block | CrossBlock)):
                block.compile(backend=self.compile_backend)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, and then those of queue and moving average."""
        super().optimizer_step(*args, **kwargs)
        self.settle()

    def settle(self) -> None:
        """Queue and moving average take a step in, if the guard accepted it."""
        if self.contrast_weight:
            self.contrast.queue.settle(self.guard.accepted)
        if self.average is not None and self.guard.accepted:
            self.average.follow(**self._followed())

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clips here and not in the Trainer, which refuses to clip for fused AdamW under bf16-mixed."""
        self.log("train/gradient_norm", self.guard.clip_or_drop(self, optimizer))
        self.log("train/lr", max(group["lr"] for group in optimizer.param_groups))

    def configure_optimizers(self) -> dict[str, Any]:
        """Fused AdamW, warm-up and cosine by steps."""
        lr = self.optimisation["lr"] * exams_per_step(self, self.global_batch_size)
        return adamw(self, **{**self.optimisation, "lr": lr})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the guard has seen decides about later steps."""
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`."""
        self.guard.load_state_dict(checkpoint["guard"])

    def export(self, folder: Path, data: PretrainData, trainer: pl.Trainer, num_steps: int) -> None:
        """Writes `encoder/` with what a later user has to know, `num_steps` after the start, and pictures."""
        if not trainer.is_global_zero:
            return
        about = {"steps": num_steps, **learnt_from(data.corpus, data.people())}
        seen = marks(data.corpus, data.exams("train")) if num_steps else ()
        encoder = self.encoder if self.average is None else self.average.average["encoder"]
        save_encoder(cast("ViT3D | CNN3D", encoder), folder / "encoder", about, seen)
        if self.reconstruction_weight and num_steps:
            self._draw(folder / "figures", data)

    def _draw(self, folder: Path, data: PretrainData) -> None:
        """No encoder is lost for a picture: what is wrong with that is only told."""
        stance = torch.compiler.set_stance("force_eager") if self.compile_backend else nullcontext()
        try:
            with stance:
                write_reconstruction(self.cpu().eval(), held_out_exam(data), folder)
        except (UmbifError, OSError) as error:
            log.warning("No reconstruction was drawn: %s", error)

    @torch.no_grad()
    def _average_keys(self, visible: Patches, exams: Exams) -> Tensor | None:
        if self.average is None:
            return None
        average = self.average.average
        tokens, valid, _ = average["encoder"](visible)
        units = self.contrast.units(tokens, valid, visible, exams)
        return self.contrast.projected(units, average["projector"])

    def _followed(self) -> dict[str, torch.nn.Module]:
        """What the moving average follows."""
        projector = {"projector": self.contrast.projector} if self.contrast_weight else {}
        return {"encoder": self.encoder, **projector}


def everything(grid: PatchGrid) -> Masks:
    """All is seen and nothing is asked."""
    index, valid = choose(grid)
    return Masks(index, valid, index[:, :0], valid[:, :0])


def refuse_impossible(
    encoder: ViT3D | CNN3D,
    contrast: ContrastOptions,
    reconstruction_weight: float,
    contrast_weight: float,
    ema_decay: float | None,
) -> None:
    """Refuses parts that do not go together.

    Raises:
        UsageError: Names all of them.
    """
    problems = []
    if reconstruction_weight and not encoder.can_mask:
        problems.append(
            Problem(
                f"model.reconstruction_weight={reconstruction_weight:g} needs an encoder that can leave patches out",
                type(encoder).__name__,
                "A convolution would see hidden patches as zeros and learn their edges. Set it to 0, or take ViT3D",
            )
        )
    if not reconstruction_weight and not contrast_weight:
        problems.append(Problem("reconstruction_weight and contrast_weight are both 0: there is nothing to learn"))
    if contrast.channel_share < 1 and contrast_weight and not reconstruction_weight:
        problems.append(
            Problem(
                f"model.contrast.channel_share={contrast.channel_share:g} leaves channels that nothing teaches",
                "reconstruction_weight=0",
                "A contrast alone has to compare all of them: set it to 1",
            )
        )
    if contrast.queue_size and ema_decay is None:
        problems.append(
            Problem(
                f"model.contrast.queue_size={contrast.queue_size} needs model.ema_decay",
                "null",
                "Keys of an encoder that changes at every step grow stale (arXiv:1911.05722): set it to 0.99 or more",
            )
        )
    if problems:
        raise UsageError(problems, "the model")
