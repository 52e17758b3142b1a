"""Recipes and modules at a size for tests: everything of the recipe stays, but for what makes it large."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from umbif.corpus.shards import Corpus
from umbif.encoders.vit import ViT3D
from umbif.pretrain.contrast import ContrastOptions
from umbif.pretrain.decoder import DecoderShape
from umbif.pretrain.masking import Masking
from umbif.pretrain.umbif import UMBIF
from umbif.recipe.compose import Recipe, compose
from umbif.recipe.files import list_recipes
from umbif.stream.augment import Augmentation
from umbif.stream.exams import CropDataset, Exams, collate

CROP = (16, 16, 16)
MUTANT = ("P2", "P3", "P6")  # one class; P1, P4 and P5 are the other
PRETRAINING = list_recipes("pretrain")
VIT = {"patch_size": 8, "patch_mm": 16, "embed_dim": 48, "depth": 2, "num_heads": 4}
CONVOLUTIONAL = {name for name in PRETRAINING if name.startswith("pretrain/simclr_")}
PUBLIC = {"pretrain/ssl_imagenet", "pretrain/umbif_from_imagenet"}  # start from a file that a user brings


def small_recipe(name: str, corpus: Path, run_dir: Path, *overrides: str, max_steps: int = 2) -> Recipe:
    """A recipe of `pretrain/`, whatever it is made for, for the tiny corpus and one CPU."""
    small = [
        "hardware=cpu", "data.crop_size=[16,16,16]", f"data.corpus={corpus}", f"run.dir={run_dir}",
        "data.global_batch_size=4", "data.num_workers=0", "data.num_val_exams=4", f"trainer.max_steps={max_steps}",
        "trainer.log_every_n_steps=1", "model.warmup_steps=2", "model.contrast.projector_dim=16",
        "trainer.val_check_interval=2",
        "callbacks.checkpoint.every_n_steps=100",
    ]  # fmt: skip
    if name in CONVOLUTIONAL:
        small += ["model.encoder.voxel_mm=2", "data.global_batch_size=2", "model.contrast.projector_hidden=32"]
        small += ["data.max_sequences=1"]
    else:
        small += [f"model.encoder.{key}={value}" for key, value in VIT.items()]
        small += ["model.masking.num_visible=8", "model.masking.num_targets=8"]
        small += ["model.decoder.width=48", "model.decoder.depth=1", "model.decoder.num_heads=4"]
    if name in PUBLIC:
        run_dir.mkdir(parents=True, exist_ok=True)
        small += [f"model.encoder.weights={public_weights(run_dir.parent / 'mae.safetensors')}"]
    return compose(name, [*small, *overrides])


def small_task(name: str, corpus: Path, run_dir: Path, labels: Path, *overrides: str) -> Recipe:
    """A recipe of `finetune/` for the tiny corpus and one CPU."""
    here = ["hardware=cpu", f"data.corpus={corpus}", f"data.labels={labels}", f"run.dir={run_dir}"]
    return compose(name, [*here, "data.num_workers=0", *overrides])


def small_fit(name: str, corpus: Path, run_dir: Path, labels: Path | None, *overrides: str) -> Recipe:
    """A recipe of either kind that writes the losses of all its micro-steps, and does nothing beside training."""
    always = ["callbacks.losses.class_path=strategy_ranks.Losses", *overrides]
    if labels is not None:
        vit = [f"model.encoder.{key}={value}" for key, value in VIT.items()]
        return small_task(name, corpus, run_dir, labels, *vit, *always)
    return small_recipe(name, corpus, run_dir, "data.num_val_exams=0", "callbacks.monitors=null", *always)


def labelled(folder: Path, name: str) -> Path:
    """A table of labels for the people of the tiny corpus, as a recipe of `finetune/` asks for them."""
    label = compose(name).tree["data"]["label"]
    subjects = [f"P{i}" for i in range(1, 7)]
    classes = [label["positive" if subject in MUTANT else "negative"][0] for subject in subjects]
    folder.mkdir(exist_ok=True)
    pd.DataFrame({"subject": subjects, label["columns"][0]: classes}).to_csv(folder / "labels.csv", index=False)
    return folder / "labels.csv"


def public_weights(path: Path) -> Path:
    """Random weights in the layout of the public masked autoencoders, at the size of `VIT`."""
    width, patch, generator = VIT["embed_dim"], VIT["patch_size"], torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    for i in range(VIT["depth"]):
        for part, out, inner in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            shapes[f"blocks.{i}.{part}.weight"] = (out * width, inner * width)
            shapes[f"blocks.{i}.{part}.bias"] = (out * width,)
        shapes |= {f"blocks.{i}.norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
    tensors = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors | {name: tensors[name] + 1 for name in tensors if "norm" in name and "weight" in name}, path)
    return path


def small_umbif(**options: Any) -> UMBIF:
    """The method on a tiny ViT."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "encoder": ViT3D(**{**VIT, "patch_mm": 16.0, "num_registers": 2}),
        "masking": Masking(num_visible=8, num_targets=8), "decoder": DecoderShape("cross", 48, 1, 4),
        "contrast": ContrastOptions(projector_dim=16), "augmentation": Augmentation(), "warmup_steps": 2,
        "max_steps": 100, "global_batch_size": 4, "lr": 0.1,
    }  # fmt: skip
    return UMBIF(**{**defaults, **options})


def views(corpus: Corpus, slots: Iterable[int], crop: tuple[int, int, int] = CROP) -> Exams:
    """Two views of each training exam."""
    rows = np.flatnonzero(corpus.exams["split"] == "train")
    dataset = CropDataset(corpus, rows, crop_size=crop, seed=2)
    return collate([dataset[slot] for slot in slots], spacing_mm=2.0, seed=2)


def train_once(module: UMBIF, optimizer: torch.optim.Optimizer, exams: Exams) -> None:
    """What Lightning does for a step."""
    optimizer.zero_grad()
    module.losses(exams).total.mean().backward()
    module.guard.clip_or_drop(module, optimizer)
    optimizer.step()
    module.settle()
