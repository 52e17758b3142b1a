"""The hybrid objective: losses by hand, gradients over ranks, that it learns, and that no NaN reaches a weight."""

import copy
import math
import re
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from ranks import contrast_batch, contrast_of_rank, same_layer

from umbif.encoders.optimise import Guard
from umbif.encoders.vit import ViT3D
from umbif.errors import UmbifError
from umbif.pretrain.decoder import normalised
from umbif.pretrain.losses import info_nce, reconstruction_loss, standardised
from umbif.pretrain.umbif import UMBIF
from umbif.scale.checkpoint import AtomicCheckpointIO
from umbif.stream.exams import CropDataset, Exams, collate
from umbif.stream.modules import PretrainData, SlotCounter
from umbif.stream.patches import patch_grid

CROP = (16, 16, 16)
STEPS = 30
pytestmark = pytest.mark.filterwarnings("ignore:.*self.log.*trainer", "ignore:.*isinstance.treespec.*")


@pytest.mark.parametrize("weights", [(1.0, 0.1), (1.0, 0.0), (0.0, 1.0)], ids=["hybrid", "mae", "simclr"])
def test_every_parameter_gets_a_gradient(batch, weights):
    module = small_umbif(reconstruction_weight=weights[0], contrast_weight=weights[1])
    losses = module.losses(batch)
    assert set(losses) == {"loss", *(["reconstruction"] if weights[0] else []), *(["contrast"] if weights[1] else [])}
    losses["loss"].mean().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_loss_is_the_weighted_sum_of_its_parts(batch):
    losses = small_umbif(reconstruction_weight=2.0, contrast_weight=0.3).losses(batch)
    assert losses["loss"].shape == (len(batch),)
    assert torch.allclose(losses["loss"], 2.0 * losses["reconstruction"] + 0.3 * losses["contrast"])


def test_an_untrained_model_is_at_chance(batch):
    """Of a target with variance 1, a prediction near 0 misses 1; of n keys that look alike, one is right by log n."""
    losses = {name: value.detach() for name, value in small_umbif().losses(batch).items()}
    assert losses["reconstruction"].mean() == pytest.approx(1.0, abs=0.7)
    assert losses["contrast"].mean() == pytest.approx(math.log(len(batch) - 2), abs=1.2)


def test_a_loss_of_one_exam_does_not_depend_on_the_others(batch, corpus):
    module = small_umbif(contrast_weight=0.0)
    together = module.losses(batch)["loss"]
    alone = torch.cat([module.losses(views(corpus, [slot]))["loss"] for slot in range(len(batch) // 2)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_target_is_normalised_patch_by_patch():
    voxels = 50 + 9 * torch.randn(2, 3, 64)
    found = normalised(voxels)
    assert torch.allclose(found.mean(-1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(found.var(-1), torch.ones(2, 3), atol=1e-4)
    assert normalised(torch.ones(1, 1, 64)).abs().max() == 0


def test_reconstruction_is_the_mean_over_valid_targets_only():
    predicted, target = torch.zeros(2, 3, 4), torch.tensor([1.0, 2.0, 100.0])[None, :, None].expand(2, 3, 4)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    assert reconstruction_loss(predicted, target, valid).tolist() == [2.5, 0.0]


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrast_equals_a_loop_over_all_pairs(num_views, temperature):
    projection, slot, person = contrast_batch(num_views)
    found = info_nce(projection, slot, person, temperature)
    expected = loop(projection.double().tolist(), slot.tolist(), person.tolist(), temperature)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_other_exams_of_one_person_are_never_negatives():
    projection, slot, person = contrast_batch()
    assert person[0] == person[4] and slot[0] != slot[4]  # noqa: PT018
    moved = projection.clone()
    moved[4:6] = torch.randn(2, projection.shape[1])
    before, after = (info_nce(p, slot, person, 0.2) for p in (projection, moved))
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2:4], after[2:4])  # another person's see them
    leaf = projection.clone().requires_grad_()
    info_nce(leaf, slot, person, 0.2)[:2].sum().backward()
    assert leaf.grad[4:6].abs().max() == 0
    assert leaf.grad[2:4].abs().max() > 0


def test_a_batch_of_one_person_has_no_contrast_and_no_nan():
    projection = torch.randn(4, 8, requires_grad=True)
    loss = info_nce(projection, torch.tensor([0, 0, 1, 1]), torch.zeros(4), 0.2)
    loss.sum().backward()
    assert loss.abs().max() < 1e-6
    assert projection.grad.isfinite().all()


def test_contrast_over_two_ranks_equals_the_joined_batch(tmp_path):
    mp.start_processes(contrast_of_rank, args=(tmp_path,), nprocs=2, start_method="spawn")
    projection, slot, person = contrast_batch()
    layer = same_layer()
    loss = info_nce(standardised(layer(projection)), slot, person, 0.2)
    loss.mean().backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.allclose(torch.cat([rank["loss"] for rank in ranks]), loss, atol=1e-6)
    assert torch.allclose((ranks[0]["gradient"] + ranks[1]["gradient"]) / 2, layer.weight.grad, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 0.1), (1.0, 0.0), (0.0, 1.0)], ids=["hybrid", "mae", "simclr"])
def test_the_loss_falls(corpus, weights):
    torch.manual_seed(0)
    module = small_umbif(reconstruction_weight=weights[0], contrast_weight=weights[1], lr=0.2, max_steps=60)
    optimizer = module.configure_optimizers()["optimizer"]
    fixed = views(corpus, range(100, 105))
    before = float(module.losses(fixed)["loss"].mean().detach())
    for step in range(STEPS):
        train_once(module, optimizer, views(corpus, range(5 * step, 5 * step + 5)))
    after = float(module.losses(fixed)["loss"].mean().detach())
    assert after < before - 0.1 * sum(weights)


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(corpus, tmp_path):
    whole = fitted(corpus, tmp_path / "whole", max_steps=6)
    fitted(corpus, tmp_path / "cut", max_steps=3).save_checkpoint(tmp_path / "cut" / "step=000003")
    resumed = fitted(corpus, tmp_path / "cut", max_steps=6, resume=tmp_path / "cut" / "step=000003")
    assert resumed.datamodule.position == whole.datamodule.position
    assert resumed.datamodule.position.next_slot == 24
    expected = whole.lightning_module.state_dict()
    for name, tensor in resumed.lightning_module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 0.1)], ids=["mae", "hybrid"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_weight_and_its_exam_is_named(batch, weights, value):
    module = small_umbif(reconstruction_weight=weights[0], contrast_weight=weights[1])
    module.guard = Guard(max_norm=1.0, max_skipped=0)
    optimizer = module.configure_optimizers()["optimizer"]
    train_once(module, optimizer, batch)  # so that the optimiser has moments
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"]))
    row = 3
    with pytest.raises(UmbifError, match="not finite") as caught:
        train_once(module, optimizer, broken(batch, row, value))
    optimizer.step()
    assert_equal(before, (module.state_dict(), optimizer.state_dict()["state"]))
    named = re.findall(r"exam (\d+) of the corpus \(slot (\d+)\)", str(caught.value))
    assert named == [(str(int(batch.exam[row])), str(int(batch.slot[row])))]


def test_training_goes_on_after_a_skipped_step_and_ends_past_the_limit(batch):
    module = small_umbif(contrast_weight=0.0)
    module.guard = Guard(max_norm=1.0, max_skipped=2)
    optimizer = module.configure_optimizers()["optimizer"]
    bad = broken(batch, 0, math.nan)
    for _ in range(2):
        before = copy.deepcopy(module.state_dict())
        train_once(module, optimizer, bad)
        assert_equal(before, module.state_dict())
        train_once(module, optimizer, batch)
        assert any(not torch.equal(t, before[n]) for n, t in module.state_dict().items())
        assert all(t.isfinite().all() for t in module.state_dict().values())
    with pytest.raises(UmbifError, match="3 steps were skipped"):
        train_once(module, optimizer, bad)


def test_the_gradient_is_clipped(batch):
    module = small_umbif()
    module.guard = Guard(max_norm=1e-3)
    (1e4 * module.losses(batch)["loss"].mean()).backward()
    module.guard.watch(torch.zeros(len(batch)), batch)
    assert module.guard(module, module.configure_optimizers()["optimizer"]) > 1
    clipped = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    assert clipped == pytest.approx(1e-3, rel=1e-2)


def test_pictures_show_every_patch_as_seen_or_as_predicted(batch):
    module = small_umbif().eval()
    shown, predicted = module.shown_and_predicted(batch, visible_share=0.25)
    seen, guessed = ~shown.isnan(), ~predicted.isnan()
    assert not (seen & guessed).any()
    assert torch.equal(shown[seen], batch.z_scores()[seen])
    assert int((seen | guessed).sum()) == 8**3 * int(patch_grid(batch, 8).available.sum())


@pytest.fixture(scope="module")
def batch(corpus) -> Exams:
    return views(corpus, range(5))


def views(corpus, slots) -> Exams:
    """Two views of each training exam."""
    rows = np.flatnonzero(corpus.exams["split"] == "train")
    dataset = CropDataset(corpus, rows, crop_size=CROP, seed=2)
    return collate([dataset[slot] for slot in slots], spacing_mm=2.0, seed=2)


def small_umbif(**options) -> UMBIF:
    torch.manual_seed(0)
    encoder = ViT3D(patch_size=8, patch_mm=16.0, embed_dim=48, depth=2, num_heads=4, num_registers=2)
    small = {"num_visible": 8, "num_targets": 8, "decoder_width": 48, "decoder_depth": 1, "decoder_heads": 4,
             "projector_dim": 16, "warmup_steps": 2, "max_steps": 100, "global_batch_size": 4, "lr": 0.1}  # fmt: skip
    return UMBIF(encoder, **{**small, **options})


def train_once(module: UMBIF, optimizer: torch.optim.Optimizer, exams: Exams) -> None:
    """What Lightning does for a step."""
    optimizer.zero_grad()
    module.training_step(exams, 0).backward()
    module.configure_gradient_clipping(optimizer)
    optimizer.step()


def broken(batch: Exams, row: int, value: float) -> Exams:
    """The batch with one exam whose intensities are not finite."""
    intercept = batch.intercept.clone()
    intercept[row] = value
    return replace(batch, intercept=intercept)


def assert_equal(ours, theirs) -> None:
    """The same tensors in the same nested dicts."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def fitted(corpus, folder, max_steps: int, resume=None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=max_steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
        default_root_dir=folder, plugins=[AtomicCheckpointIO()], callbacks=[SlotCounter()],
    )  # fmt: skip
    data = PretrainData(str(corpus.folder), crop_size=CROP, global_batch_size=4, num_workers=0, seed=3)
    trainer.fit(small_umbif(), datamodule=data, ckpt_path=resume)
    return trainer


def loop(projection, slot, person, temperature: float) -> list[float]:
    """InfoNCE from its definition."""

    def similarity(i: int, j: int) -> float:
        a, b = projection[i], projection[j]
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / temperature

    losses = []
    for i in range(len(slot)):
        positives = [j for j in range(len(slot)) if j != i and slot[j] == slot[i]]
        negatives = [j for j in range(len(slot)) if person[j] != person[i]]
        total = sum(math.exp(similarity(i, j)) for j in positives + negatives)
        losses.append(sum(math.log(total) - similarity(i, j) for j in positives) / len(positives))
    return losses
