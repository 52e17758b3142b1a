"""Every fine-tuning recipe of the folder takes two steps, with an encoder of patches and with a convolutional one."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small import VIT

from umbif.downstream.finetune import FineTune
from umbif.downstream.heads import HeadOptions
from umbif.encoders.vit import ViT3D
from umbif.fit import fit
from umbif.recipe import compose, list_recipes

MUTANT = ("P2", "P3", "P6")  # one class; P1, P4 and P5 are the other
CNN = ["encoder=efficientnet_b0", "model.encoder.voxel_mm=2"]
FINETUNING = list_recipes("finetune")


@pytest.mark.parametrize(("name", "encoder"), [*((name, "vit") for name in FINETUNING), (FINETUNING[0], "cnn")])
def test_a_recipe_trains_validates_and_predicts_everyone_once(corpus_folder, tmp_path, name, encoder):
    small = CNN if encoder == "cnn" else [f"model.encoder.{key}={value}" for key, value in VIT.items()]
    assert compose(name).tree["trainer"]["val_check_interval"] <= compose(name).tree["trainer"]["max_steps"]
    run = finetuned(corpus_folder, tmp_path, name, "trainer.max_steps=2", "trainer.val_check_interval=2", *small)
    found = pd.read_parquet(run / "predictions.parquet")
    assert found["exam"].is_unique
    assert set(found["split"]) == {"val", "test"}
    assert np.isfinite(found["score"]).all()
    assert pd.read_csv(run / "metrics.csv")["val/auc"].notna().any()


def test_without_a_step_the_logistic_regression_is_the_model(corpus_folder, tmp_path):
    vit = [f"model.encoder.{key}={value}" for key, value in VIT.items()]
    none = finetuned(corpus_folder, tmp_path / "none", FINETUNING[0], "trainer.max_steps=0", *vit)
    one = finetuned(corpus_folder, tmp_path / "one", FINETUNING[0], "trainer.max_steps=1", "model.lr=0", *vit)
    tensors = [load_file(run / "head.safetensors") for run in (none, one)]
    assert tensors[0]["center"].abs().sum() > 0
    for name in tensors[0]:
        torch.testing.assert_close(tensors[0][name], tensors[1][name], msg=name)


def test_a_frozen_encoder_is_never_in_training():
    encoder, head = ViT3D(**VIT, drop_path=0.5), HeadOptions(dropout=0.5)
    frozen, free = FineTune(encoder, head, frozen=True).train(), FineTune(ViT3D(**VIT), head).train()
    assert not any(part.training for part in frozen.encoder.modules())
    assert frozen.head.training
    assert all(part.training for part in free.modules())


def finetuned(corpus_folder, folder, name, *overrides):
    """The run of a recipe with labels for the exams of the small corpus."""
    label = compose(name).tree["data"]["label"]
    subjects = [f"P{i}" for i in range(1, 7)]
    classes = [label["positive"][0] if subject in MUTANT else label["negative"][0] for subject in subjects]
    folder.mkdir(exist_ok=True)
    table = folder / "labels.csv"
    pd.DataFrame({"subject": subjects, label["columns"][0]: classes}).to_csv(table, index=False)
    return fit(
        compose(name, [
            "hardware=cpu", f"data.corpus={corpus_folder}", f"data.labels={table}", f"run.dir={folder / 'run'}",
            "data.global_batch_size=2", "data.num_workers=0", *overrides,
        ])
    )  # fmt: skip
