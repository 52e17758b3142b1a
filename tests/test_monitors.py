"""Monitors by hand-made numbers; and that watching a run changes nothing in it."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small import small_recipe

from umbif.encoders.probing import feature_std, knn_accuracy, linear_probe, rank_me
from umbif.encoders.vit import ViT3D
from umbif.fit import fit
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
    noise = [linear_probe(RNG.normal(size=(80, 4)), labels, persons) for _ in range(5)]
    assert np.mean(noise) == pytest.approx(0.5, abs=0.12)
    three = np.array(["a", "b", "c"] * 20)
    assert linear_probe(np.eye(3)[[0, 1, 2] * 20] + 0.1 * RNG.normal(size=(60, 3)), three, np.arange(60)) > 0.99


@pytest.mark.parametrize("labels", [["a"] * 30, ["a"] * 27 + ["b"] * 3, [""] * 30])
def test_too_few_persons_of_a_class_is_no_answer(labels):
    features = RNG.normal(size=(30, 4))
    assert math.isnan(linear_probe(features, np.array(labels), np.arange(30)))
    assert math.isnan(knn_accuracy(features, np.array(labels), np.arange(30), neighbours=3))


def test_watching_changes_no_weight(corpus_folder, tmp_path):
    extra = ["model.encoder.drop_path=0.3"]  # draws random numbers
    watched = fit(small_recipe("pretrain/umbif_tiny", corpus_folder, tmp_path / "a", *extra, *MONITORS, max_steps=4))
    alone = fit(small_recipe("pretrain/umbif_tiny", corpus_folder, tmp_path / "b", *extra, "callbacks.monitors=null",
                             max_steps=4))  # fmt: skip
    weights = [(run / "encoder/model.safetensors").read_bytes() for run in (watched, alone)]
    assert weights[0] == weights[1]
    metrics, bare = (pd.read_csv(run / "metrics.csv") for run in (watched, alone))
    assert metrics["train/loss"].tolist() == bare["train/loss"].tolist()
    assert metrics["monitor/rank_me"].between(1, 5).all()
    assert metrics["monitor/time_share"].iloc[-1] > 0
    assert not any(column.startswith("monitor/") for column in bare)
    assert (watched / "figures").glob("reconstruction_*.png")


def test_labels_that_cannot_be_asked_are_named_once(corpus_folder, tmp_path):
    run = fit(small_recipe("pretrain/umbif_tiny", corpus_folder, tmp_path / "run", *MONITORS))
    said = [line for line in (run / "log.txt").read_text().splitlines() if "monitors do without" in line]
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


def test_throughput_stands_in_the_metrics(corpus_folder, tmp_path):
    run = fit(small_recipe("pretrain/umbif_tiny", corpus_folder, tmp_path / "run", max_steps=4))
    metrics = pd.read_csv(run / "metrics.csv")
    assert (metrics["throughput/exams_per_s"].dropna() > 0).all()
    assert metrics["throughput/mfu"].dropna().between(0, 1).all()
    assert metrics["throughput/data_wait"].dropna().between(0, 1).all()
    assert {"train/lr", "train/gradient_norm", "val/reconstruction_t1"} <= set(metrics)
    assert "GFLOP" in (run / "log.txt").read_text()
    assert measured_flops(torch.float32) > 1e8


def test_a_compiled_run_is_counted_too(corpus_folder, tmp_path):
    counts = []
    for backend in ("null", "aot_eager"):
        run = fit(small_recipe("pretrain/mae", corpus_folder, tmp_path / backend, f"model.compile_backend={backend}"))
        counts.append(next(line.split("takes ")[1].split(" on")[0] for line in
                           (Path(run) / "log.txt").read_text().splitlines() if "GFLOP" in line))  # fmt: skip
    assert counts[0] == counts[1]
