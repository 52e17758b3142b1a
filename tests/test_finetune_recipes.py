"""Every fine-tuning recipe of the folder takes two steps, with an encoder of patches and with a convolutional one."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing as mp
from ranks import head_of_rank, started_head
from safetensors.torch import load_file
from small import VIT, labelled, small_task

from umbif.agreement import known_people, other_preparation
from umbif.corpus.people import marks
from umbif.downstream.finetune import FineTune
from umbif.downstream.heads import HeadOptions
from umbif.encoders.vit import ViT3D
from umbif.encoders.weights import SEEN, save_encoder
from umbif.errors import UmbifError, UsageError
from umbif.fit import fit
from umbif.recipe.compose import compose
from umbif.recipe.files import list_recipes
from umbif.stream.modules import exams_of_split

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


def test_the_head_starts_alike_on_any_number_of_ranks_that_share_the_reading(corpus_folder, tmp_path):
    labels = labelled(tmp_path, "finetune/idh")
    alone = started_head(corpus_folder, labels)
    mp.start_processes(head_of_rank, args=(3, tmp_path, corpus_folder, labels), nprocs=3, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert sum(rank["num_read"] for rank in ranks) == alone["num_read"] > 0
    for name, expected in alone["head"].items():
        assert all(torch.equal(rank["head"][name], expected) for rank in ranks), name


def test_a_finished_run_is_not_taken_for_one_of_other_labels(corpus_folder, tmp_path):
    small = [FINETUNING[0], "trainer.max_steps=0", *(f"model.encoder.{key}={value}" for key, value in VIT.items())]
    run = finetuned(corpus_folder, tmp_path, *small)
    assert finetuned(corpus_folder, tmp_path, *small) == run  # nothing to do
    assert finetuned(shutil.copytree(corpus_folder, tmp_path / "elsewhere"), tmp_path, *small) == run
    table = pd.read_csv(tmp_path / "labels.csv")
    table.iloc[[4, 5], 1] = table.iloc[[5, 4], 1].to_numpy()
    with pytest.raises(UsageError, match="has finished with other exams, persons, labels"):
        finetuned(corpus_folder, tmp_path, *small, labels=table)


def test_a_finished_model_may_be_given_its_name_and_its_labels_may_be_gone(corpus_folder, tmp_path):
    small = [FINETUNING[0], "trainer.max_steps=0", *(f"model.encoder.{key}={value}" for key, value in VIT.items())]
    run = finetuned(corpus_folder, tmp_path, *small)
    assert finetuned(corpus_folder, tmp_path, *small, "model.model_name=mae") == run
    assert set(pd.read_parquet(run / "predictions.parquet")["model"]) == {"mae"}
    recipe = compose(str(run / "recipe.yaml"))
    (tmp_path / "labels.csv").unlink()
    assert recipe.tree["model"]["model_name"] == "mae"
    assert fit(recipe) == run


def test_an_encoder_that_has_learnt_nothing_claims_no_exam(corpus_folder, tmp_path):
    small = [FINETUNING[0], *(f"model.encoder.{key}={value}" for key, value in VIT.items())]
    none = finetuned(corpus_folder, tmp_path / "none", *small, "trainer.max_steps=0")
    frozen = finetuned(corpus_folder, tmp_path / "frozen", *small, "trainer.max_steps=1", "model.frozen=true")
    trained = finetuned(corpus_folder, tmp_path / "trained", *small, "trainer.max_steps=1")
    assert [(run / "encoder" / SEEN).read_text() != "" for run in (none, frozen, trained)] == [False, False, True]


@pytest.mark.parametrize("weights", [None, "run"])
def test_a_model_is_called_what_it_is(tmp_path, weights):
    save_encoder(ViT3D(**VIT), tmp_path / "run", {})
    encoder = ViT3D(**VIT, weights=weights and str(tmp_path / "run"))
    assert FineTune(encoder).model_name == ("pretrained" if weights else "untrained")
    assert FineTune(encoder, model_name="mine").model_name == "mine"


def test_what_an_encoder_and_its_forebears_have_learnt_from_is_known_in_any_corpus(corpus, tmp_path):
    train, held_out = exams_of_split(corpus, "train"), exams_of_split(corpus, "test")
    save_encoder(ViT3D(**VIT), tmp_path / "first", {}, marks(corpus, held_out[:1]))
    second = ViT3D(**VIT, weights=str(tmp_path / "first"))
    save_encoder(second, tmp_path / "second", {}, marks(corpus, train))
    for folder, expected in ((None, ""), ("second", f"learnt from 1 of the {len(held_out)} exams that are held out")):
        encoder = ViT3D(**VIT, weights=folder and str(tmp_path / folder))
        built = SimpleNamespace(model=SimpleNamespace(encoder=encoder), data=SimpleNamespace(corpus=corpus))
        assert expected in (said := known_people(built))
        assert bool(said) is bool(expected)
    (tmp_path / "second" / SEEN).unlink()
    built.model.encoder = ViT3D(**VIT, weights=str(tmp_path / "second"))
    assert "came without seen.txt" in known_people(built)
    save_encoder(built.model.encoder, tmp_path / "third", {}, marks(corpus, train))
    built.model.encoder = ViT3D(**VIT, weights=str(tmp_path / "third"))  # whose list would leave out the first two's
    assert "came without seen.txt" in known_people(built)


def test_an_encoder_of_exams_that_were_prepared_otherwise_is_told(corpus, tmp_path):
    preparation = corpus.about["preparation"]
    for clip, told in ((preparation["clip_percentiles"], False), ([0.0, 99.0], True)):
        save_encoder(ViT3D(**VIT), tmp_path, {"preparation": {**preparation, "clip_percentiles": clip}})
        encoder = ViT3D(**VIT, weights=str(tmp_path))
        built = SimpleNamespace(model=SimpleNamespace(encoder=encoder), data=SimpleNamespace(corpus=corpus))
        assert ("clip_percentiles was [0.0, 99.0]" in other_preparation(built)) is told


def test_a_gpu_without_room_is_answered_and_another_batch_may_be_tried_in_the_same_folder(
    corpus_folder, tmp_path, monkeypatch
):
    def full(*_):
        raise torch.OutOfMemoryError

    small = [FINETUNING[0], "trainer.max_steps=1", *(f"model.encoder.{key}={value}" for key, value in VIT.items())]
    with monkeypatch.context() as patched:
        patched.setattr(FineTune, "training_step", full)
        with pytest.raises(UmbifError, match=r"global_batch_size.*max_tokens"):
            finetuned(corpus_folder, tmp_path, *small)
    run = finetuned(corpus_folder, tmp_path, *small, "data.global_batch_size=1")
    assert (run / "predictions.parquet").exists()


def finetuned(corpus_folder, folder, name, *overrides, labels=None):
    """The run of a recipe with labels for the exams of the small corpus."""
    table = labelled(folder, name)
    if labels is not None:
        labels.to_csv(table, index=False)
    return fit(small_task(name, corpus_folder, folder / "run", table, "data.global_batch_size=2", *overrides))
