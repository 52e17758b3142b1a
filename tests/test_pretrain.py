"""The hybrid method: its parts and their switches, what it sees, that it learns, and what it refuses."""

import math
from dataclasses import fields, replace

import lightning.pytorch as pl
import pytest
import torch
from small import VIT, small_umbif, train_once, views

from umbif.encoders.cnn import CNN3D
from umbif.encoders.vit import ViT3D
from umbif.errors import UsageError
from umbif.pretrain.contrast import ContrastOptions
from umbif.pretrain.decoder import DecoderShape
from umbif.pretrain.masking import Masking
from umbif.stream.augment import Augmentation
from umbif.stream.exams import Exams
from umbif.stream.patches import MIN_BRAIN, gather, patch_grid

STEPS = 30
pytestmark = pytest.mark.filterwarnings("ignore:.*self.log.*trainer", "ignore:.*isinstance.treespec.*")
NOTHING = Augmentation(0, 0, 0, 0)
MOCO = {"ema_decay": 0.9, "contrast": ContrastOptions(projector_dim=16, queue_size=32)}
ALONE = {"reconstruction_weight": 0.0, "contrast": ContrastOptions(projector_dim=16, channel_share=1)}
METHODS = {
    "hybrid": {}, "mae": {"contrast_weight": 0.0}, "simclr": ALONE,
    "joint": {"decoder": DecoderShape("joint", 48, 1, 4)}, "moco": MOCO,
    "mae average": {"contrast_weight": 0.0, "ema_decay": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoder", [{}, {"position": "rotary", "layer_scale": 0.1}], ids=["plain", "rotary"])
def test_every_parameter_gets_a_gradient(batch, method, encoder):
    vit = ViT3D(patch_size=8, patch_mm=16.0, embed_dim=48, depth=2, num_heads=4, **encoder)
    module = small_umbif(encoder=vit, **METHODS[method])
    module.losses(batch).total.mean().backward()
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None or not p.grad.abs().sum() > 0] == []
    followed = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert all(name.startswith("average.") for name in followed)
    assert bool(followed) == (module.average is not None)


def test_the_loss_is_the_weighted_sum_of_its_parts(batch):
    losses = small_umbif(reconstruction_weight=2.0, contrast_weight=0.3).losses(batch)
    assert losses.total.shape == (len(batch),)
    assert torch.allclose(losses.total, 2.0 * losses.parts["reconstruction"] + 0.3 * losses.parts["contrast"])
    assert set(small_umbif(contrast_weight=0.0).losses(batch).parts) == {"reconstruction"}
    assert set(small_umbif(**ALONE).losses(batch).parts) == {"contrast"}


def test_an_untrained_model_is_at_chance(corpus):
    """Of a target with variance 1, a prediction near 0 misses 1; of n keys that look alike, one is right by log n.

    Projections are standardised and not alike, so a cold contrast starts somewhat above.
    """
    cold = ContrastOptions(projector_dim=16, channel_share=1, temperature=0.2)
    batches = [views(corpus, range(at, at + 5)) for at in range(0, 100, 5)]  # one of ten views says little
    parts = [small_umbif(normalise_targets=True, contrast=cold).losses(batch).parts for batch in batches]
    mean = {name: torch.stack([of[name].detach().mean() for of in parts]).mean() for name in parts[0]}
    assert mean["reconstruction"] == pytest.approx(1.0, abs=0.2)
    assert mean["contrast"] == pytest.approx(math.log(len(batches[0]) - 2), abs=1.0)


def test_logs_call_a_sequence_by_its_name_also_where_the_encoder_is_not_told(batch):
    logged = [
        small_umbif(augmentation=Augmentation(0, 0, 0, 0, hide_name=share)).losses(batch).targets.by_sequence()
        for share in (0.0, 1.0)
    ]
    assert logged[0].keys() == logged[1].keys()
    assert logged[0] != logged[1]


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_a_loss_of_one_exam_does_not_depend_on_the_others(batch, corpus, kind):
    module = small_umbif(contrast_weight=0.0, decoder=DecoderShape(kind, 48, 2, 4))
    together = module.losses(batch).total
    alone = torch.cat([module.losses(views(corpus, [slot])).total for slot in range(len(batch) // 2)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_only_the_joint_decoder_lets_targets_see_each_other(batch):
    """Asked for fewer patches, the cross decoder answers the same."""
    for kind, same in (("cross", True), ("joint", False)):
        module = small_umbif(decoder=DecoderShape(kind, 48, 2, 4))
        tokens, visible, target = seen(module, batch)
        few = replace(target, **{name: getattr(target, name)[:, :3] for name in vars(target)})
        answers = (module.decoder(tokens, visible, target)[:, :3] - module.decoder(tokens, visible, few)).abs().max()
        assert (float(answers.detach()) < 1e-5) == same


@pytest.mark.parametrize("brain", ["head", "corner"])
def test_the_encoder_never_sees_a_patch_without_brain(batch, brain):
    """What it is given is recorded, and looked for in the image."""
    if brain == "corner":
        corner = torch.zeros_like(batch.brain)
        corner[:, :9, :9, :9] = True
        batch = replace(batch, brain=corner)
    module, given = small_umbif(masking=Masking(num_visible=1000), augmentation=NOTHING), []
    module.encoder.register_forward_pre_hook(lambda _, patches: given.append(patches[0]))
    module.losses(batch)
    blocks = batch.brain.unfold(1, 8, 8).unfold(2, 8, 8).unfold(3, 8, 8).flatten(1, 3).flatten(2)
    images = batch.z_scores().unfold(2, 8, 8).unfold(3, 8, 8).unfold(4, 8, 8).flatten(2, 4).flatten(3)
    for row, (voxels, valid) in enumerate(zip(given[0].voxels.flatten(2), given[0].valid, strict=True)):
        where = torch.cdist(voxels[valid], images[row].flatten(0, 1)).argmin(1) % blocks.shape[1]
        assert (blocks[row, where].float().mean(1) >= MIN_BRAIN).all()
    assert int(given[0].valid.sum()) > len(batch) // 2


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(corpus, method):
    module = small_umbif(lr=0.2, max_steps=60, **METHODS[method])
    optimizer = module.configure_optimizers()["optimizer"]
    fixed = views(corpus, range(100, 105))
    before = float(module.eval().losses(fixed).total.mean().detach())
    for step in range(STEPS):
        train_once(module.train(), optimizer, views(corpus, range(5 * step, 5 * step + 5)))
    after = float(module.eval().losses(fixed).total.mean().detach())
    assert after < before - 0.1 * (module.reconstruction_weight + module.contrast_weight)


@pytest.mark.parametrize(("part", "options"), [("curve", {"bias": 0, "scale": 0}), ("bias", {"curve": 0, "scale": 0})])
def test_two_views_of_one_place_differ_in_intensity_unless_switched_off(corpus, part, options):
    """Against matching views by their histogram or shading."""
    exams = views(corpus, [0])
    own = ("slot", "view", "exam", "person")
    first = {f.name: value for f in fields(exams) if torch.is_tensor(value := getattr(exams, f.name))}
    same = replace(exams, **{n: t if n in own else t[:1].expand_as(t).contiguous() for n, t in first.items()})
    grid = patch_grid(same, 8)
    index = grid.available[:1].nonzero()[:, 1].expand(2, -1)
    patches = gather(same, grid, index, torch.ones_like(index, dtype=torch.bool))
    on = Augmentation(flip_probability=0, **options)(patches, same).voxels
    off = Augmentation(flip_probability=0, **{**options, part: 0})(patches, same).voxels
    assert (on[0] - on[1]).abs().max() > 0.05
    assert torch.equal(off[0], off[1])


@pytest.mark.parametrize(("batch_size", "accumulated"), [(64, 1), (256, 1), (64, 4)])
def test_lr_grows_with_what_a_step_takes(batch_size, accumulated):
    module = small_umbif(lr=1.0, warmup_steps=0, global_batch_size=batch_size)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=accumulated)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["lr"] for group in groups] == pytest.approx([batch_size * accumulated / 256] * len(groups))


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_blocks_give_the_same_losses_and_gradients(batch, recomputed):
    losses, gradients = [], []
    for backend in (None, "aot_eager"):
        torch.manual_seed(1)
        encoder = ViT3D(**{**VIT, "patch_mm": 16.0, "activation_checkpointing": recomputed})
        queued = ContrastOptions(projector_dim=16, queue_size=8)
        module = small_umbif(compile_backend=backend, encoder=encoder, ema_decay=0.9, contrast=queued)
        module.setup("fit")
        losses.append(module.losses(batch).total)
        losses[-1].mean().backward()
        gradients.append(module.encoder.blocks[0].qkv.weight.grad)
    assert torch.allclose(*losses, atol=1e-5)
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "cnn"}, r"reconstruction_weight=1 needs an encoder that can leave patches out: got CNN3D"),
        ({"reconstruction_weight": 0.0, "contrast_weight": 0.0}, "nothing to learn"),
        ({"reconstruction_weight": 0.0}, r"channel_share=0\.25 leaves channels that nothing teaches"),
        ({"contrast": ContrastOptions(queue_size=8)}, r"queue_size=8 needs model\.ema_decay"),
        ({"decoder": DecoderShape("cross", 50, 1, 4)}, r"4 heads cannot share a width of 50\. The nearest width is 48"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(options, message):
    if options.get("encoder") == "cnn":
        options = {"encoder": CNN3D("efficientnet_b0")}
    with pytest.raises(UsageError, match=message):
        small_umbif(**options)


def test_pictures_show_every_patch_as_seen_or_as_predicted(batch):
    module = small_umbif().eval()
    shown, predicted = module.shown_and_predicted(batch, visible_share=0.25)
    visible, guessed = ~shown.isnan(), ~predicted.isnan()
    assert not (visible & guessed).any()
    assert torch.equal(shown[visible], batch.z_scores()[visible])
    assert int((visible | guessed).sum()) == 8**3 * int(patch_grid(batch, 8).available.sum())


@pytest.fixture(scope="module")
def batch(corpus) -> Exams:
    return views(corpus, range(5))


def seen(module, exams):
    """Tokens, the visible patches, and those that are asked for."""
    grid = patch_grid(exams, 8)
    masks = module.masking.draw(exams, grid)
    visible = gather(exams, grid, masks.visible, masks.visible_valid)
    return module.encoder(visible)[0], visible, gather(exams, grid, masks.target, masks.target_valid)
