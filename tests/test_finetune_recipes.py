"""Every fine-tuning recipe of the folder takes two steps, with an encoder of patches and with a convolutional one."""

import numpy as np
import pandas as pd
import pytest
from small import VIT

from umbif.fit import fit
from umbif.recipe import compose, list_recipes

MUTANT = ("P2", "P3", "P6")  # one class; P1, P4 and P5 are the other
CNN = ["encoder=efficientnet_b0", "model.encoder.voxel_mm=2"]
FINETUNING = list_recipes("finetune")


@pytest.mark.parametrize(("name", "encoder"), [*((name, "vit") for name in FINETUNING), (FINETUNING[0], "cnn")])
def test_a_recipe_trains_and_predicts_everyone_once(corpus_folder, tmp_path, name, encoder):
    label = compose(name).tree["data"]["label"]
    subjects = [f"P{i}" for i in range(1, 7)]
    classes = [label["positive"][0] if subject in MUTANT else label["negative"][0] for subject in subjects]
    table = tmp_path / "labels.csv"
    pd.DataFrame({"subject": subjects, label["columns"][0]: classes}).to_csv(table, index=False)
    small = CNN if encoder == "cnn" else [f"model.encoder.{key}={value}" for key, value in VIT.items()]
    run = fit(
        compose(name, [
            "hardware=cpu", f"data.corpus={corpus_folder}", f"data.labels={table}", f"run.dir={tmp_path / 'run'}",
            "data.global_batch_size=2", "data.num_workers=0", "trainer.max_steps=2", *small,
        ])
    )  # fmt: skip
    found = pd.read_parquet(run / "predictions.parquet")
    assert found["exam"].is_unique
    assert set(found["split"]) == {"val", "test"}
    assert np.isfinite(found["score"]).all()
