"""Monitors by hand-made numbers; and that watching a run changes nothing in it."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from small import small_recipe, small_umbif, views
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from umbif.encoders.probing import feature_std, knn_accuracy, linear_probe, rank_me
from umbif.encoders.vit import ViT3D
from umbif.fit import fit
from umbif.pretrain.monitors import Panel, choose, undisturbed, verbatim
from umbif.scale.throughput import StepCounter, attention_flops, measured_flops

RNG = np.random.default_rng(0)
MONITORS = [
    "callbacks.monitors.every_n_steps=1", "callbacks.monitors.num_exams=5", "callbacks.monitors.labels=[sex,site,none]",
    "callbacks.monitors.pictures_every_n_steps=2",
]  # fmt: skip


def test_rank_counts_directions():
    assert rank_me(np.eye(12)) == pytest.approx(12, rel=1e-4)
    assert rank_me(np.outer(RNG.normal(size=20), RNG.normal(size=8))) == pytest.approx(1, abs=1e-3)
    two = RNG.normal(size=(30, 2)) @ np.linalg.qr(RNG.normal(size=(16, 2)))[0].T
    assert 1.5 < rank_me(two) <= 2.01
    assert math.isnan(rank_me(np.full((3, 3), np.nan)))


def test_spread_is_one_for_all_directions_and_zero_for_one_point():
    assert feature_std(RNG.normal(size=(4000, 32))) == pytest.approx(1, abs=0.02)
    assert feature_std(np.ones((50, 32))) == pytest.approx(0, abs=1e-9)


def test_a_neighbour_is_never_of_the_same_person():
    """Twins of one person lie on each other, and bear the other's class: only their own label could be copied."""
    centres = RNG.normal(size=(20, 6))
    features = np.repeat(centres, 2, axis=0)
    persons = np.repeat(np.arange(20), 2)
    labels = np.repeat(RNG.permutation(["a"] * 10 + ["b"] * 10), 2)
    assert knn_accuracy(features, labels, persons, neighbours=1) < 0.9  # 1.0 if twins could vote
    apart = np.where(labels == "a", 5.0, -5.0)[:, None] + RNG.normal(size=(40, 6))
    assert knn_accuracy(apart, labels, persons, neighbours=3) == 1.0


def test_the_probe_finds_what_is_there_and_nothing_else():
    labels = np.array(["a", "b"] * 40)
    persons = np.arange(80)
    signal = np.where(labels == "a", 2.0, -2.0)[:, None] + RNG.normal(size=(80, 4))
    assert linear_probe(signal, labels, persons) > 0.99
    noise = [linear_probe(RNG.normal(size=(80, 30)), labels, persons) for _ in range(5)]
    assert np.mean(noise) == pytest.approx(0.5, abs=0.12)  # 30 numbers tell 80 exams that were fitted
    twins = [
        linear_probe(
            np.repeat(RNG.normal(size=(40, 60)), 2, axis=0),
            np.repeat(RNG.permutation(labels[:40]), 2),
            np.repeat(np.arange(40), 2),
        )
        for _ in range(5)
    ]
    assert np.mean(twins) == pytest.approx(0.5, abs=0.15)  # near 1 if a person stood on both sides
    three = np.array(["a", "b", "c"] * 20)
    assert linear_probe(np.eye(3)[[0, 1, 2] * 20] + 0.1 * RNG.normal(size=(60, 3)), three, np.arange(60)) > 0.99


@pytest.mark.parametrize("labels", [["a"] * 30, ["a"] * 27 + ["b"] * 3, [""] * 30])
def test_too_few_persons_of_a_class_is_no_answer(labels):
    features = RNG.normal(size=(30, 4))
    assert math.isnan(linear_probe(features, np.array(labels), np.arange(30)))
    assert math.isnan(knn_accuracy(features, np.array(labels), np.arange(30), neighbours=3))


def test_what_all_exams_have_in_common_fills_no_direction():
    panel, features = Panel([], np.arange(30), {}), RNG.normal(size=(30, 8)).astype(np.float32)
    rank = panel.values(features, neighbours=3)["monitor/rank_me"]
    assert rank > 7
    assert panel.values(features + 1000, neighbours=3)["monitor/rank_me"] == pytest.approx(rank, rel=1e-3)


@pytest.fixture(scope="module")
def runs(corpus_folder, tmp_path_factory) -> list[Path]:
    """The same run, watched and alone."""
    folder = tmp_path_factory.mktemp("runs")
    ways = {"watched": MONITORS, "alone": ["callbacks.monitors=null"]}
    extra = "model.encoder.drop_path=0.3"  # draws random numbers
    return [
        fit(small_recipe("pretrain/umbif_tiny", corpus_folder, folder / name, extra, *way, max_steps=4))
        for name, way in ways.items()
    ]


def test_watching_changes_no_weight(runs):
    weights = [(run / "encoder/model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    metrics, bare = (pd.read_csv(run / "metrics.csv") for run in runs)
    assert metrics["train/loss"].tolist() == bare["train/loss"].tolist()
    assert not any(column.startswith("monitor/") for column in bare)


def test_a_watched_run_says_what_it_saw(runs):
    metrics = pd.read_csv(runs[0] / "metrics.csv")
    assert metrics["monitor/rank_me"].between(1, 5).all()
    assert metrics["monitor/time_share"].iloc[-1] > 0
    assert {event.step for event in pictures_of(runs[0] / "tensorboard")} == {2, 4}
    said = [line for line in (runs[0] / "log.txt").read_text().splitlines() if "monitors do without" in line]
    assert len(said) == 1
    assert "none" in said[0]
    assert "The corpus has:" in said[0]


def test_flops_of_a_forward_and_its_backward_are_those_of_the_formula():
    """A block of width E on N tokens: 12 E² products a token and 2 N E of attention, doubled, and tripled to train."""
    torch.manual_seed(0)
    B, N, E = 2, 24, 48
    block = ViT3D(patch_size=4, patch_mm=4.0, embed_dim=E, depth=1, num_heads=4).blocks[0]
    counter = StepCounter()
    counter.start()
    block(torch.randn(B, N, E))
    counter.stop()
    assert counter.flops == 3 * 2 * B * N * (12 * E**2 + 2 * N * E)
    again = StepCounter()
    again.start()
    with torch.no_grad():  # a teacher has no backward
        block(torch.randn(B, N, E))
    again.stop()
    assert again.flops == counter.flops / 3
    assert attention_flops(*[torch.empty(1, 2, 8, 16)] * 3) == 2 * 16 * 8 * 32


def test_throughput_stands_in_the_metrics(runs):
    metrics = pd.read_csv(runs[1] / "metrics.csv")
    assert metrics["throughput/exams_per_s"].isna().tolist() == [True, False, False, False]  # the first step counts
    assert (metrics["throughput/exams_per_s"].dropna() > 0).all()
    assert metrics["throughput/mfu"].dropna().between(0, 1).all()
    assert metrics["throughput/data_wait"].dropna().between(0, 1).all()
    assert {"train/lr", "train/gradient_norm", "val/reconstruction_t1"} <= set(metrics)
    assert "GFLOP" in (runs[1] / "log.txt").read_text()
    assert measured_flops(torch.float32) > 1e8


def test_counting_changes_no_number(corpus):
    found = []
    for counts in (False, True):
        module, counter = small_umbif(), StepCounter()
        if counts:
            counter.start()
        loss = module.losses(views(corpus, range(3))).total.mean()
        counter.stop()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in module.parameters())])
        assert (counter.flops > 0) == counts
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_compiled_block_is_counted_as_what_it_computes():
    blocks = [ViT3D(patch_size=4, patch_mm=4.0, embed_dim=48, depth=1, num_heads=4).blocks[0] for _ in range(2)]
    blocks[1].compile(backend="aot_eager")
    counts = []
    for block in blocks:
        block(torch.randn(2, 24, 48))  # compiled before it is counted
        counter = StepCounter()
        counter.start()
        block(torch.randn(2, 24, 48))
        counter.stop()
        counts.append(counter.flops)
    assert counts[0] == counts[1] > 0


def test_modes_gradients_and_random_numbers_are_as_they_were(corpus):
    module = small_umbif()
    module.decoder.eval()  # a part that someone has frozen
    next(module.parameters()).grad = torch.ones_like(next(module.parameters()))
    trainer = SimpleNamespace(precision_plugin=Precision())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with undisturbed(trainer, module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)
    assert module.encoder.training
    assert not module.decoder.training
    assert next(module.parameters()).grad.min() == 1


def test_classes_are_what_the_table_says():
    column = pd.Series([" a", "b", None, float("nan"), "", 2])
    assert verbatim(column).tolist() == ["a", "b", "", "", "", "2"]
    rows, labelled = np.arange(100), np.where(np.arange(100) % 4 == 0, "a", "")
    chosen = choose(rows, [labelled], 10, seed=0)
    assert len(chosen) == 10
    assert (chosen % 4 == 0).all()
    assert chosen.tolist() == choose(rows, [labelled], 10, seed=0).tolist()
    assert len(choose(rows, [], 10, seed=0)) == 10


def pictures_of(folder: Path) -> list:
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return [event for tag in events.Tags()["images"] for event in events.Images(tag)]
