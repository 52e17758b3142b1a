"""Every pretraining recipe of the folder: runs without a warning, resumes bit for bit, and keeps its numbers."""

import inspect
import io
import json
import os
import warnings
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.fabric.plugins import CheckpointIO
from small import CONVOLUTIONAL, PRETRAINING, small_recipe

from umbif.encoders.weights import CONFIG, load_encoder_weights
from umbif.fit import fit
from umbif.pretrain.umbif import UMBIF
from umbif.quiet import quiet
from umbif.recipe.build import build
from umbif.recipe.compose import Recipe, compose
from umbif.stream.modules import SlotCounter

MOCO = ["model.ema_decay=0.9", "model.contrast.queue_size=32"]
JOINT = ["model.decoder.kind=joint", "model.masking.num_targets=null", "model.masking.decoded_share=0.5"]
DROPPED = ["model.encoder.drop_path=0.3", "model.encoder.position=rotary", "model.encoder.layer_scale=0.1"]
VARIANTS = {"moco": MOCO, "joint": JOINT, "dropped": DROPPED}
KEPT = Path(__file__).parent / "golden_losses.json"  # UMBIF_KEEP_LOSSES=1 writes those of today
GOLDEN: dict[str, list[float]] = json.loads(KEPT.read_text())


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_recipe_trains_exports_and_warns_of_nothing(corpus_folder, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet()
        run = fit(small_recipe(name, corpus_folder, tmp_path / "run"))
    config = json.loads((run / "encoder" / CONFIG).read_text())
    assert config["steps"] == 2
    module, class_name = config["class_path"].rsplit(".", 1)
    encoder = getattr(__import__(module, fromlist=[class_name]), class_name)(**config["init_args"])
    load_encoder_weights(encoder, run)
    assert (run / "metrics.csv").read_text().count("\n") >= 3


def test_a_run_without_checkpoints_writes_none(corpus_folder, tmp_path):
    """Lightning adds a callback of its own, unless it is told."""
    run = fit(small_recipe("pretrain/umbif_tiny", corpus_folder, tmp_path / "run", "callbacks.checkpoint=null"))
    assert not list(run.rglob("state.ckpt"))
    assert (run / "encoder").exists()


def test_half_precision_is_clipped_too(corpus_folder, tmp_path):
    """Lightning refuses to clip for a fused optimiser under bf16-mixed; the method clips itself."""
    less = ["callbacks.monitors=null", "data.num_val_exams=0", "data.global_batch_size=2"]  # it is slow on a CPU
    options = ["trainer.precision=bf16-mixed", "model.gradient_clip=1e-3", *MOCO, *less]
    run = fit(small_recipe("pretrain/simclr", corpus_folder, tmp_path / "run", *options))
    metrics = pd.read_csv(run / "metrics.csv")
    assert (metrics["train/gradient_norm"].dropna() > 1e-3).all()
    assert metrics["train/loss"].notna().all()


@pytest.mark.parametrize("name", [*PRETRAINING, *(f"pretrain/umbif_tiny {variant}" for variant in VARIANTS)])
def test_every_recipe_resumes_bit_for_bit(corpus_folder, name, tmp_path):
    """From the middle of a pass, in the warm-up, with accumulation, and after work that was lost within one."""
    name, _, variant = name.partition(" ")
    extra = ["trainer.accumulate_grad_batches=2", "model.warmup_steps=3", *VARIANTS.get(variant, [])]
    num_steps = 2 if name in CONVOLUTIONAL else 3  # large networks, and the same loop
    recipe = small_recipe(name, corpus_folder, tmp_path / "run", *extra, max_steps=num_steps)
    memory = InMemory()
    whole, at_step_1 = trained(recipe, memory, save_at=1)
    assert at_step_1 is not None
    again, _ = trained(recipe, memory, resume=at_step_1)
    assert again.datamodule.position.next_slot == whole.datamodule.position.next_slot
    expected = whole.lightning_module.state_dict()
    for key, tensor in again.lightning_module.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_the_class_without_arguments_is_the_method_of_the_recipes():
    said = compose("pretrain/umbif_vits").tree["model"]
    for name, parameter in inspect.signature(UMBIF).parameters.items():
        if name not in ("encoder", "global_batch_size", "max_steps"):  # which network, and how much of it
            default, recipe = parameter.default, said[name]
            if is_dataclass(default):
                recipe = {key: value for key, value in recipe.items() if key != "class_path"}
                default = {key: value for key, value in asdict(default).items() if key in recipe}
            assert default == (tuple(recipe) if isinstance(recipe, list) else recipe), name


@pytest.mark.parametrize("case", GOLDEN)
def test_losses_of_thirty_steps_are_those_that_were_kept(corpus_folder, case, tmp_path):
    """Kept from another day: a change of them is a change of the method, and has to be meant."""
    found = thirty_losses(corpus_folder, case, tmp_path)
    if os.environ.get("UMBIF_KEEP_LOSSES"):
        GOLDEN[case] = [float(f"{loss:.7g}") for loss in found]
        KEPT.write_text(json.dumps(GOLDEN, indent=1) + "\n")
    assert found == pytest.approx(GOLDEN[case], rel=1e-4)


def thirty_losses(corpus_folder: Path, case: str, folder: Path) -> list[float]:
    """`pretrain/mae key=value …` → the loss of each of 30 steps on one thread."""
    name, *extra = case.split()
    losses = Losses()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipe = small_recipe(name, corpus_folder, folder / "run", "model.warmup_steps=5", *extra, max_steps=30)
        trained(recipe, InMemory(), callbacks=[losses])
    finally:
        torch.set_num_threads(threads)
    return losses.values


def trained(
    recipe: Recipe, memory: "InMemory", *, save_at: int | None = None, resume: str | None = None,
    callbacks: list[pl.Callback] | None = None,
) -> tuple[pl.Trainer, str | None]:  # fmt: skip
    """The run of a recipe without its folder; a checkpoint of one of its steps goes into memory."""
    quiet()
    pl.seed_everything(0, verbose=False)
    built = build(recipe)
    saver = SaveAt(save_at)
    trainer = pl.Trainer(
        max_steps=built.trainer_args["max_steps"], max_epochs=-1, accelerator="cpu", logger=False,
        accumulate_grad_batches=built.trainer_args["accumulate_grad_batches"], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
        plugins=[memory], callbacks=[SlotCounter(), saver, *(callbacks or [])],
    )  # fmt: skip
    trainer.fit(built.model, datamodule=built.data, ckpt_path=resume)
    return trainer, saver.saved


class InMemory(CheckpointIO):
    """Checkpoints without a disk: some of these networks are large."""

    def __init__(self) -> None:
        self.saved: dict[str, bytes] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.saved[str(path)] = buffer.getvalue()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(io.BytesIO(self.saved[str(path)]), map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        del self.saved[str(path)]


class SaveAt(pl.Callback):
    """Saves after one step."""

    def __init__(self, step: int | None) -> None:
        self.step, self.saved = step, None

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step and self.saved is None:
            self.saved = f"memory/{self.step}"
            trainer.save_checkpoint(self.saved)


class Losses(pl.Callback):
    """The loss of every micro-step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(np.float64(outputs["loss"].detach())))
