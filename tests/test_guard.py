"""No broken sample reaches a weight, a moment, an average or a queue, and it is named; what is odd is defined."""

import copy
import math
import re
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
from ranks import guard_of_rank
from small import PRETRAINING, small_recipe, small_umbif, train_once, views

from umbif.encoders.guard import NUM_BEFORE_SPIKES, Guard
from umbif.errors import UmbifError
from umbif.pretrain.contrast import ContrastOptions
from umbif.recipe.build import build
from umbif.stream.exams import Exams

pytestmark = pytest.mark.filterwarnings("ignore:.*self.log.*trainer", "ignore:.*isinstance.treespec.*")
METHODS = {
    "hybrid": {}, "mae": {"contrast_weight": 0.0},
    "simclr": {"reconstruction_weight": 0.0, "contrast": ContrastOptions(projector_dim=16, channel_share=1)},
    "moco": {"ema_decay": 0.9, "contrast": ContrastOptions(projector_dim=16, queue_size=32)},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_and_its_exam_is_named(batch, method, value):
    module = small_umbif(max_skipped=0, **METHODS[method])
    optimizer = module.configure_optimizers()["optimizer"]
    train_once(module, optimizer, batch)  # so that the optimiser has moments
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"]))
    row = 3
    with pytest.raises(UmbifError, match="not finite") as caught:
        train_once(module, optimizer, with_voxel(batch, row, value))
    optimizer.step()
    module.settle()
    torch.testing.assert_close((module.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    named = re.findall(r"exam (\d+) of the corpus \(slot (\d+)\)", str(caught.value))
    assert named == [(str(int(batch.exam[row])), str(int(batch.slot[row])))]


BROKEN = ["nan", "inf", "1e30", "constant", "no brain", "all absent", "one sequence"]


@pytest.mark.parametrize("name", PRETRAINING)
def test_no_input_breaks_the_weights_of_any_recipe(corpus, batch, few, name, tmp_path):
    """Each kind of odd or broken exam in turn: afterwards every weight is finite, and a sound step is taken again."""
    built = build(small_recipe(name, corpus.folder, tmp_path / "run"))
    module = built.model
    optimizer = module.configure_optimizers()["optimizer"]
    sound = batch if module.encoder.can_mask else few
    train_once(module, optimizer, sound)
    for kind in BROKEN:
        train_once(module, optimizer, odd(sound, kind))
        assert all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values()), kind
        if kind in ("nan", "inf"):
            assert not module.guard.accepted
        if kind not in ("nan", "inf", "1e30"):
            assert module.guard.accepted, kind
    before = copy.deepcopy(module.encoder.state_dict())
    train_once(module, optimizer, sound)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in module.encoder.state_dict().items())


def test_a_batch_without_brain_costs_nothing_and_changes_little(batch):
    module = small_umbif()
    nothing = replace(batch, brain=torch.zeros_like(batch.brain))
    losses = module.losses(nothing)
    assert losses.total.tolist() == [0.0] * len(batch)
    losses.total.mean().backward()
    assert all(p.grad is None or not p.grad.abs().sum() for p in module.parameters())


def test_training_goes_on_after_a_skipped_step_and_ends_past_the_limit(batch):
    module = small_umbif(contrast_weight=0.0, max_skipped=2)
    optimizer = module.configure_optimizers()["optimizer"]
    bad = with_voxel(batch, 0, math.nan)
    for _ in range(2):
        before = copy.deepcopy(module.state_dict())
        train_once(module, optimizer, bad)
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
        train_once(module, optimizer, batch)
        assert any(not torch.equal(t, before[n]) for n, t in module.state_dict().items())
    with pytest.raises(UmbifError, match="3 of the last 1000 steps were skipped"):
        train_once(module, optimizer, bad)


def test_skipped_steps_of_long_ago_do_not_count():
    guard, layer, optimizer = on_a_layer(max_skipped=1)
    for step in (0, 1500, 3000):
        assert step_with(guard, layer, optimizer, math.nan, step) is False
    with pytest.raises(UmbifError, match="2 of the last 1000 steps"):
        step_with(guard, layer, optimizer, math.nan, 3001)


def test_a_gradient_far_above_the_usual_is_dropped_but_not_in_the_first_steps():
    guard, layer, optimizer = on_a_layer(spike_factor=10.0)
    assert step_with(guard, layer, optimizer, 1000.0)  # nothing is usual yet
    for _ in range(NUM_BEFORE_SPIKES):
        assert step_with(guard, layer, optimizer, 1.0)
    before = layer.weight.detach().clone()
    assert not step_with(guard, layer, optimizer, 11.0)
    assert torch.equal(layer.weight, before)
    assert step_with(guard, layer, optimizer, 9.0)
    tolerant, layer, optimizer = on_a_layer(spike_factor=None)
    assert all(step_with(tolerant, layer, optimizer, size) for size in [1.0] * 20 + [1e6])


def test_what_lasts_becomes_usual():
    guard, layer, optimizer = on_a_layer(spike_factor=10.0, max_skipped=1000)
    taken = [step_with(guard, layer, optimizer, size) for size in [1.0] * 64 + [50.0] * 64]
    assert all(taken[:64])
    assert not any(taken[64:90])
    assert taken[-1]


def test_a_resumed_guard_decides_alike():
    guard, layer, optimizer = on_a_layer(spike_factor=10.0)
    for size in [1.0] * 20:
        step_with(guard, layer, optimizer, size)
    resumed = Guard(1.0, 10.0)
    resumed.load_state_dict(guard.state_dict())
    assert not step_with(resumed, layer, optimizer, 11.0)


def test_a_step_that_one_rank_finds_broken_is_skipped_and_explained_on_all(tmp_path):
    mp.start_processes(guard_of_rank, args=(tmp_path,), nprocs=2, start_method="spawn")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert not found["accepted"]
        assert found["gradient"] is None
        assert "Not finite: exam 51 of the corpus (slot 3)" in found["said"]


def test_the_gradient_is_clipped(batch):
    module = small_umbif(gradient_clip=1e-3)
    (1e4 * module.losses(batch).total.mean()).backward()
    assert module.guard.clip_or_drop(module, module.configure_optimizers()["optimizer"]) > 1
    clipped = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    assert clipped == pytest.approx(1e-3, rel=1e-2)


class OneLayer(pl.LightningModule):
    step = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self.weight = self.layer.weight

    @property
    def global_step(self) -> int:
        return self.step


def on_a_layer(**options):
    layer = OneLayer()
    return Guard(max_norm=1e9, **options), layer, torch.optim.SGD(layer.parameters(), lr=1e-3)


def step_with(guard: Guard, layer: OneLayer, optimizer, size: float, step: int = 0) -> bool:
    """A step with a gradient of this size: whether it was taken."""
    layer.step = step
    layer.weight.grad = torch.full_like(layer.weight, size)
    guard.clip_or_drop(layer, optimizer)
    optimizer.step()
    return guard.accepted


@pytest.fixture(scope="module")
def batch(corpus) -> Exams:
    return views(corpus, range(5))


@pytest.fixture(scope="module")
def few(corpus) -> Exams:
    """For networks that are slow on a CPU."""
    return views(corpus, range(1, 3))


def with_voxel(exams: Exams, row: int, value: float) -> Exams:
    """One voxel of every patch of one exam has a value that int16 cannot hold: only scale and intercept can."""
    scale = exams.scale.clone()
    scale[row, exams.present[row]] = value
    return replace(exams, scale=scale)


def odd(exams: Exams, kind: str) -> Exams:
    """The batch with its first exam broken in one way."""
    if kind in ("nan", "inf", "1e30"):
        return with_voxel(exams, 0, float(kind))
    image, brain, present = exams.image.clone(), exams.brain.clone(), exams.present.clone()
    if kind == "constant":
        image[0] = 7
    if kind == "no brain":
        brain[0] = False
    if kind == "all absent":
        present[0] = False
    if kind == "one sequence":
        present[:, 1:] = False
    return replace(exams, image=image, brain=brain, present=present)
