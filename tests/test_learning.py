"""Every pretraining recipe learns, on synthetic gliomas and on real ones."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import CONVOLUTIONAL, PRETRAINING, small_recipe, train_once

from umbif.corpus.index import build_manifest
from umbif.corpus.phantom import write_phantom
from umbif.corpus.prepare import merge, prepare_corpus
from umbif.corpus.preprocess import Preparation
from umbif.corpus.shards import Corpus
from umbif.quiet import quiet
from umbif.recipe.build import build
from umbif.stream.exams import CropDataset, Exams, collate

REAL = ("BraTS2021_00006", "TCGA-FG-6692/atlas_bet")  # both have a tumour mask


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom(folder / "files", 4, num_workers=2)
    return prepared(folder, [folder / "files"])


@pytest.fixture(scope="module")
def real(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepared(tmp_path_factory.mktemp("real"), [real_data / name for name in REAL])


def prepared(folder: Path, sources: list[Path]) -> Corpus:
    manifest = build_manifest(sources, dataset="exams", test_fraction=0.0, num_workers=2)
    prepare_corpus(manifest, folder / "corpus", Preparation(spacing_mm=2.0), num_workers=0)
    merge(manifest, folder / "corpus")
    return Corpus(folder / "corpus")


@pytest.mark.parametrize("exams", ["phantoms", "real"])
@pytest.mark.parametrize("name", PRETRAINING)
def test_every_recipe_learns_a_few_exams_without_a_warning(name, exams, request, tmp_path):
    corpus: Corpus = request.getfixturevalue(exams)
    is_cnn = name in CONVOLUTIONAL
    options = ["model.lr=2e-2"] if is_cnn else ["model.lr=0.2", "model.masking.num_visible=32"]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet()
        module = build(small_recipe(name, corpus.folder, tmp_path / "run", *options, max_steps=40)).model
        optimizer = module.configure_optimizers()["optimizer"]
        num_slots, side = (2, 16) if is_cnn else (4, 32)
        views = some_views(
            corpus, num_slots, side, around_tumour=name.endswith("cerebral"), max_sequences=1 if is_cnn else None
        )
        before = losses(module, views)
        for _ in range(3 if is_cnn else 15):
            train_once(module, optimizer, views)
        after = losses(module, views)
    assert all(after[part] < 0.97 * before[part] for part in before), (before, after)


def some_views(corpus: Corpus, num_slots: int, side: int, **options: Any) -> Exams:
    """Two views of each of a few slots."""
    rows, crop = np.arange(len(corpus)), (side, side, side)
    crops = CropDataset(corpus, rows, crop_size=crop, seed=0, **options)
    return collate([crops[slot] for slot in range(num_slots)], spacing_mm=2.0, seed=0)


@torch.no_grad()
def losses(module, exams: Exams) -> dict[str, float]:
    return {name: float(value.mean()) for name, value in module.losses(exams).parts.items()}
