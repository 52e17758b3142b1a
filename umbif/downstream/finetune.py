"""Fine-tuning for a binary task on the whole brain; layer-wise rates after Bao et al. 2022 (arXiv:2106.08254)."""

from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import BinaryAUROC

from umbif.corpus.people import learnt_from, marks
from umbif.downstream.data import TaskData
from umbif.downstream.heads import ExtremesHead, HeadOptions
from umbif.encoders.cnn import CNN3D
from umbif.encoders.gather import from_first, is_first, summed
from umbif.encoders.guard import Guard
from umbif.encoders.optimise import adamw
from umbif.encoders.sharding import shard
from umbif.encoders.vit import ViT3D
from umbif.encoders.weights import save_encoder, write_tensors
from umbif.files import read_parquet, write_parquet
from umbif.progress import track
from umbif.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare
from umbif.stream.augment import Augmentation
from umbif.stream.exams import Exams
from umbif.stream.philox import uniform

DROP = 30  # purpose of the draws of tokens: independent of all others


class FineTune(pl.LightningModule):
    """An encoder with a head.

    Args:
        encoder: With `weights`, or untrained.
        head: From tokens to logits.
        max_tokens: Random tokens of each exam that a training step sees; null for all. Evaluation sees all.
        frozen: Train the head alone.
        layer_decay: Factor of the learning rate from each layer to the one before it.
        augmentation: Of training exams.
        lr: Learning rate of the head, which starts from a logistic regression.
        warmup_steps: Linear warm-up.
        weight_decay: Of matrices.
        gradient_clip: Largest norm of the gradient.
        max_steps: Length of the cosine.
        model_name: What tables call this model; null for pretrained or untrained, by what the encoder starts from.
    """

    def __init__(
        self,
        encoder: ViT3D | CNN3D,
        head: HeadOptions = HeadOptions(),  # noqa: B008 (frozen)
        max_tokens: PositiveInt | None = None,
        frozen: bool = False,
        layer_decay: PositiveShare = 0.75,
        augmentation: Augmentation | None = None,
        lr: NonNegativeFloat = 2e-4,
        warmup_steps: NonNegativeInt = 20,
        weight_decay: NonNegativeFloat = 0.05,
        gradient_clip: PositiveFloat = 1.0,
        max_steps: NonNegativeInt = 1000,
        model_name: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.max_tokens = encoder, ExtremesHead(encoder.embed_dim, head), max_tokens
        self.layer_decay = layer_decay
        self.model_name = model_name or ("pretrained" if getattr(encoder, "loaded", None) else "untrained")
        self.augmentation = augmentation or Augmentation(curve=0.2, bias=0.05, scale=0.05)
        self.guard = Guard(gradient_clip)
        self.optimisation: dict[str, Any] = {
            "lr": lr, "warmup_steps": warmup_steps, "weight_decay": weight_decay, "betas": (0.9, 0.999),
            "max_steps": max_steps,
        }  # fmt: skip
        self.val_auc = BinaryAUROC()
        self.frozen = frozen
        if frozen:
            encoder.requires_grad_(False)

    def forward(self, exams: Exams, budget: int | None = None, augmentation: Augmentation | None = None) -> Tensor:
        """Logits (B,) from every patch that holds brain, or from `budget` random ones."""
        scores = None
        if budget is not None:
            scores = uniform(exams.seed, exams.slot, exams.view, DROP, self.encoder.num_patches(exams))
        return self.head(self.features(exams, scores, budget, augmentation))

    def features(
        self,
        exams: Exams,
        scores: Tensor | None = None,
        budget: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> Tensor:
        """What the head takes, (B, F)."""
        tokens = self.encoder.forward_features(exams, scores=scores, budget=budget, augmentation=augmentation)
        return self.head.features(*tokens[:2])

    def training_step(self, exams: Exams, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        assert exams.target is not None
        logits = self(exams, self.max_tokens, self.augmentation)
        losses = binary_cross_entropy_with_logits(logits.float(), exams.target, reduction="none")
        self.guard.watch(losses, exams)
        self.log("train/loss", losses.mean(), batch_size=len(exams))
        return losses.mean()

    def validation_step(self, exams: Exams, batch_idx: int) -> None:
        """Loss and AUC of the validation exams."""
        assert exams.target is not None
        logits = self(exams).float()
        loss = binary_cross_entropy_with_logits(logits, exams.target)
        self.val_auc.update(logits, exams.target.int())
        self.log("val/loss", loss, batch_size=len(exams), sync_dist=True)
        self.log("val/auc", self.val_auc, batch_size=len(exams))

    def predict_step(self, exams: Exams, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Row, target and score of each exam."""
        assert exams.target is not None
        return exams.exam, exams.target, self(exams).float().sigmoid()

    def setup(self, stage: str) -> None:
        """A fresh head starts from what the encoder gives already; each process has all weights yet."""
        if stage == "fit" and self.trainer.ckpt_path is None:
            self.to(self.trainer.strategy.root_device).start_head(self.trainer.datamodule, self.trainer)

    def configure_model(self) -> None:
        """Under FSDP2, says what is gathered together."""
        shard(self, [self.encoder, self.head])

    def train(self, mode: bool = True) -> Self:
        """A frozen encoder is never in training: nothing of it is dropped, and no statistics move."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    @torch.no_grad()
    def start_head(self, data: TaskData, trainer: pl.Trainer) -> None:
        """Fits the head to the training exams by logistic regression, on features as evaluation sees them.

        The ranks share the exams, each fills its own rows of zeros, and the sum of these is exact: the head is the same
        for any number of ranks.
        """
        training, rows = self.training, data.parts["train"]
        self.eval()
        features = torch.zeros(len(rows), len(self.head.center), device=self.device)
        batches = data.each_once("train", shared=True)
        with trainer.precision_plugin.forward_context():
            for batch in track(batches, "Fitting the head", len(batches)) if is_first() else batches:
                features[batch.slot.to(self.device)] = self.features(batch.to(self.device)).float()
        features = summed(features).cpu()
        if is_first():
            person, _ = pd.factorize(data.exams["person"].iloc[rows])
            self.head.start_from(features, data.y[rows], person)
        for tensor in self.head.state_dict().values():
            from_first(tensor)
        self.train(training)

    def export(self, folder: Path, data: TaskData, trainer: pl.Trainer, num_steps: int) -> None:
        """Writes predictions.parquet, `encoder/` and the head, `num_steps` after the start."""
        if not num_steps:  # no step: the logistic regression alone is the model
            self.to(trainer.strategy.root_device).start_head(data, trainer)
        table = predictions(trainer, self, data)
        if not trainer.is_global_zero:
            return
        write_predictions(table, folder)
        threshold = float(table["threshold"].iloc[0])
        about = {"task": data.task, "positive": data.positive, "threshold": threshold}
        about |= learnt_from(data.corpus, data.people())
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        write_tensors(head, folder / "head.safetensors")
        learnt = num_steps and not self.frozen  # else the encoder is the one that it was
        seen = marks(data.corpus, np.concatenate([data.parts["train"], data.parts["val"]])) if learnt else ()
        save_encoder(self.encoder, folder / "encoder", {"steps": num_steps, **about}, seen)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the guard has seen decides about later steps."""
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`."""
        self.guard.load_state_dict(checkpoint["guard"])

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """See `Guard`."""
        self.log("train/gradient_norm", self.guard.clip_or_drop(self, optimizer))

    def configure_optimizers(self) -> dict[str, Any]:
        """Fused AdamW with a smaller rate for each layer further from the head."""
        factors = {}
        groups = self.encoder.layer_groups()
        for name, _ in self.encoder.named_parameters():
            layer = next(i for i, prefixes in enumerate(groups) if any(name.startswith(p) for p in prefixes))
            factors[f"encoder.{name}"] = self.layer_decay ** (len(groups) - layer)
        return adamw(self, lr_factor=factors, **self.optimisation)


def predictions(trainer: pl.Trainer, module: FineTune, data: TaskData) -> pd.DataFrame:
    """One row for each validation and test exam, with the threshold chosen on validation."""
    parts = trainer.predict(module, datamodule=data)
    rows, y, score = ([torch.cat([b[i] for b in batches]).numpy() for batches in parts] for i in range(3))
    threshold = youden_threshold(y[0], score[0])
    tables = [
        _table(data, module.model_name, split, rows[i], y[i], score[i], threshold)
        for i, split in enumerate(("val", "test"))
    ]
    return pd.concat(tables, ignore_index=True)


def youden_threshold(y: npt.NDArray[Any], score: npt.NDArray[Any]) -> float:
    """The threshold with the largest sensitivity + specificity (Youden 1950), halfway between two scores."""
    found = np.unique(score)
    if len(found) < 2:
        return float(found[0])
    between = (found[1:] + found[:-1]) / 2
    sensitivity = (score[y == 1][:, None] >= between).mean(0)
    specificity = (score[y == 0][:, None] < between).mean(0)
    return float(between[int(np.argmax(sensitivity + specificity))])


def write_predictions(table: pd.DataFrame, folder: Path) -> Path:
    """Writes predictions.parquet of a run, whole or not at all."""
    path = folder / "predictions.parquet"
    write_parquet(table, path)
    return path


def rename_predictions(folder: Path, model: str) -> bool:
    """Gives the model of a run another name in its predictions; whether it had another."""
    path = folder / "predictions.parquet"
    table = read_parquet(path, "Fine-tune again into another run.dir", ["model"]) if path.exists() else pd.DataFrame()
    if table.empty or (table["model"] == model).all():
        return False
    write_predictions(table.assign(model=model), folder)
    return True


def _table(
    data: TaskData, model: str, split: str, rows: Any, y: npt.NDArray[Any], score: npt.NDArray[Any], cut: float
) -> pd.DataFrame:
    exams = data.exams.iloc[rows]
    columns = {name: exams[name].to_numpy() for name in ("exam", "person", "dataset", "site")}
    return pd.DataFrame({
        **columns, "task": data.task, "model": model, "repeat": 0, "fold": 0, "seed": data.position.seed,
        "split": split, "class": data.positive, "y": y.astype(int), "score": score.astype(float), "threshold": cut,
        "time": np.nan, "event": np.nan,
    })  # fmt: skip
