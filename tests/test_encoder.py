"""The encoder sees the patches of an exam and nothing else: not padding, not their order, not the rest of the batch."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from umbif.encoders.optimise import adamw, warmup_cosine
from umbif.encoders.pooling import masked_mean
from umbif.encoders.position import MillimetrePosition
from umbif.encoders.transformer import Block, key_mask
from umbif.encoders.vit import ViT3D
from umbif.encoders.weights import CONFIG, WEIGHTS, load_encoder_weights, save_encoder
from umbif.errors import UsageError
from umbif.pretrain.decoder import DecoderShape, JointDecoder
from umbif.stream.exams import Exams, WholeBrainDataset, collate
from umbif.stream.patches import Patches, choose, gather, patch_grid

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"patch_size": 8, "patch_mm": 16.0, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_registers": 2}


def test_invalid_tokens_change_nothing(encoder, patches):
    tokens, _, pooled = encoder(patches)
    more = {name: torch.cat([t, 1000 * torch.ones_like(t[:, :5])], 1) for name, t in numbers(patches).items()}
    nothing = torch.zeros(len(pooled), 5, dtype=torch.bool)
    ids = {name: torch.cat([t, t[:, :5]], 1) for name, t in (("sequence", patches.sequence), ("entry", patches.entry))}
    padded = Patches(**more, **ids, valid=torch.cat([patches.valid, nothing], 1))
    tokens_padded, _, pooled_padded = encoder(padded)
    assert torch.allclose(tokens_padded[:, :-5][patches.valid], tokens[patches.valid], atol=1e-5)
    assert torch.allclose(pooled_padded, pooled, atol=1e-5)


def test_the_order_of_tokens_does_not_matter(encoder, patches):
    tokens, _, pooled = encoder(patches)
    order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = Patches(**{name: getattr(patches, name)[:, order] for name in vars(patches)})
    tokens_shuffled, _, pooled_shuffled = encoder(shuffled)
    assert torch.allclose(tokens_shuffled[shuffled.valid], tokens[:, order][shuffled.valid], atol=1e-5)
    assert torch.allclose(pooled_shuffled, pooled, atol=1e-5)


@pytest.mark.parametrize("change", ["voxels", "position_mm", "sequence"])
def test_what_a_token_shows_where_and_in_which_sequence_does_matter(encoder, patches, change):
    pooled = encoder(patches)[2]
    other = (patches.sequence + 1) % 8 if change == "sequence" else getattr(patches, change) + 5.0
    assert (encoder(replace(patches, **{change: other}))[2] - pooled).abs().max() > 1e-3


def test_the_pooled_output_is_the_mean_of_the_valid_tokens(encoder, patches):
    tokens, _, pooled = encoder(patches)
    for row in range(len(pooled)):
        assert torch.allclose(pooled[row], tokens[row, patches.valid[row]].mean(0), atol=1e-6)
    assert torch.equal(masked_mean(tokens, torch.zeros_like(patches.valid)), torch.zeros_like(pooled))


@pytest.mark.parametrize("exam", ["TINY/P2", "TINY/P4", "TINY/P5"])
def test_other_exams_of_the_batch_and_their_boxes_change_nothing(corpus, encoder, exam):
    """P2 and P4 have one sequence, P1/1 and P6 four; their boxes differ."""
    tokens, valid, alone = encoder.forward_features(whole_brain(corpus, exam))
    _, _, joined = encoder.forward_features(whole_brain(corpus, exam, "TINY/P1/1", "TINY/P6", "TINY/P3/2"))
    assert torch.allclose(joined[0], alone[0], atol=1e-5)
    assert valid.all()
    assert tokens.isfinite().all()


def test_the_encoder_sees_every_patch_with_brain_of_every_sequence(corpus, encoder):
    exams = whole_brain(corpus, "TINY/P6")
    tokens, valid, _ = encoder.forward_features(exams)
    padded = exams.padded(8)
    per_sequence = int((torch.nn.functional.avg_pool3d(padded.brain.float(), 8) >= 0.1).sum())
    assert tokens.shape[1] == int(valid.sum()) == 4 * per_sequence < encoder.num_patches(exams)
    assert encoder.num_patches(exams) == padded.image[0].numel() // 8**3


def test_a_budget_takes_the_patches_with_the_smallest_scores(corpus, encoder):
    exams = whole_brain(corpus, "TINY/P6", "TINY/P2")
    scores = torch.rand(2, encoder.num_patches(exams), generator=torch.Generator().manual_seed(0))
    few, valid, pooled = encoder.forward_features(exams, scores=scores, budget=5)
    assert few.shape[:2] == valid.shape == (2, 5)
    padded = exams.padded(8)
    grid = patch_grid(padded, 8)
    best = torch.where(grid.available, scores, 9.0).topk(5, largest=False).indices
    assert torch.allclose(encoder(gather(padded, grid, best, valid))[2], pooled, atol=1e-5)


def test_positions_tell_neighbouring_patches_apart_and_do_not_repeat():
    position = MillimetrePosition(48, 16.0)
    line = torch.zeros(1, 12, 3)
    line[0, :, 0] = 16.0 * torch.arange(-6, 6)
    encoded = position(line)[0]
    assert encoded.shape == (12, 48)
    apart = torch.cdist(encoded, encoded) + 9 * torch.eye(12)
    assert apart.min() > 0.5


def test_every_width_that_the_heads_divide_works(corpus):
    exams = whole_brain(corpus, "TINY/P5")
    for width in (8, 20, 64):
        assert ViT3D(**{**SMALL, "embed_dim": width}).forward_features(exams)[2].shape == (1, width)


def test_rotary_attention_depends_on_how_far_patches_lie_apart_only(patches):
    """Moved together they give the same tokens; with added sines they do not."""
    moved = replace(patches, position_mm=patches.position_mm + torch.tensor([32.0, -16.0, 8.0]))
    apart = {}
    for position in ("rotary", "sincos"):
        torch.manual_seed(0)
        encoder = ViT3D(**{**SMALL, "num_registers": 0}, position=position).eval()
        apart[position] = float((encoder(moved)[2] - encoder(patches)[2]).abs().max())
        turned = replace(patches, position_mm=patches.position_mm.flip(1))
        assert (encoder(turned)[2] - encoder(patches)[2]).abs().max() > 1e-4  # the layout matters to both
    assert apart["rotary"] < 1e-5
    assert apart["sincos"] > 1e-3


def test_layer_scale_starts_near_the_identity(patches):
    x = torch.randn(2, 5, 48)
    assert (Block(48, 4, layer_scale=1e-6)(x) - x).abs().max() < 1e-4
    assert (Block(48, 4)(x) - x).abs().max() > 1e-2


def test_a_dropped_branch_leaves_the_exam_as_it_is_and_evaluation_drops_nothing():
    torch.manual_seed(0)
    block, x = Block(48, 4, drop_path=0.5), torch.randn(64, 5, 48)
    same = (block(x) == x).flatten(1).all(1).float().mean()
    assert 0.1 < same < 0.45  # both branches of a quarter of them
    expected = Block(48, 4)
    expected.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x), expected.eval()(x))
    depths = [b.drop_path for b in ViT3D(**{**SMALL, "depth": 5}, drop_path=0.2).blocks]
    assert depths == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients(patches):
    gradients, kept = [], []
    for twice in (False, True):
        torch.manual_seed(0)
        encoder = ViT3D(**SMALL, activation_checkpointing=twice, drop_path=0.3)
        torch.manual_seed(1)
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.numel()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder(patches)[2].sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert kept[1] < 0.7 * kept[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_attention_to_nothing_is_defined():
    valid = torch.tensor([[True, False], [False, False]])
    assert key_mask(valid)[:, 0, 0].tolist() == [[True, False], [True, True]]
    assert key_mask(valid, 1)[:, 0, 0].tolist() == [[True, True, False], [True, False, False]]
    assert key_mask(torch.ones(2, 3, dtype=torch.bool)) is None


def test_heads_that_cannot_share_the_width_are_refused():
    with pytest.raises(UsageError, match=r"5 heads cannot share a width of 48\. The nearest width is 50"):
        ViT3D(**{**SMALL, "num_heads": 5})


def test_an_encoder_comes_back_from_its_folder(encoder, patches, tmp_path):
    save_encoder(encoder, tmp_path / "run" / "encoder", {"steps": 7, "preparation": {"spacing_mm": 2.0}})
    config = json.loads((tmp_path / "run" / "encoder" / CONFIG).read_text())
    assert config["class_path"] == "umbif.encoders.vit.ViT3D"
    assert config["steps"] == 7
    for path in (tmp_path / "run", tmp_path / "run" / "encoder"):
        again = ViT3D(**config["init_args"], weights=str(path))
        assert torch.equal(again(patches)[2], encoder(patches)[2])


def test_weights_of_another_shape_are_refused_and_every_difference_named(encoder, tmp_path):
    save_encoder(encoder, tmp_path, {})
    other = ViT3D(**{**SMALL, "embed_dim": 96, "depth": 3})
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_encoder_weights(other, tmp_path)
    assert len(caught.value.problems) == 2
    assert "model.encoder.embed_dim=96, but the weights have 48" in str(caught.value)
    assert "model.encoder.depth=3, but the weights have 2" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG, "both"])
def test_a_folder_without_an_encoder_is_refused(encoder, tmp_path, missing):
    save_encoder(encoder, tmp_path, {})
    for name in (WEIGHTS, CONFIG) if missing == "both" else (missing,):
        (tmp_path / name).unlink()
    torch.save(encoder.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="names no encoder"):
        ViT3D(**SMALL, weights=str(tmp_path))


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_weights_that_are_not_safetensors_are_never_run(encoder, tmp_path, write):
    save_encoder(encoder, tmp_path / "encoder", {})
    payload = Payload(tmp_path / "ran")
    if write == "pickle":
        (tmp_path / "encoder" / WEIGHTS).write_bytes(pickle.dumps(payload))
    else:
        torch.save({"embed.weight": payload}, tmp_path / "encoder" / WEIGHTS)
    with pytest.raises((SafetensorError, UsageError)):
        ViT3D(**SMALL, weights=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_layer_groups_hold_every_parameter_once(encoder):
    groups = encoder.layer_groups()
    assert len(groups) == SMALL["depth"] + 2
    for name, _ in encoder.named_parameters():
        assert sum(name.startswith(prefix) for group in groups for prefix in group) == 1, name


def test_weight_decay_spares_norms_biases_and_embeddings():
    options = {"lr": 0.1, "weight_decay": 0.05, "betas": (0.9, 0.95), "warmup_steps": 0, "max_steps": 10}
    encoder = ViT3D(**SMALL, layer_scale=0.1)
    decoder = JointDecoder(encoder, DecoderShape("joint", 48, 1, 4))
    module = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    made = adamw(module, **options)
    names = {id(p): name for name, p in module.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in made["optimizer"].param_groups for p in g["params"]}
    matrix = r".*(embed|qkv|proj|mlp\.\d|memory|predict)\.weight"
    assert decay == {name: 0.05 if re.fullmatch(matrix, name) else 0.0 for name in names.values()}
    assert len(decay) > 50


def test_the_learning_rate_rises_on_a_line_and_falls_on_a_cosine():
    factor = [warmup_cosine(step, warmup_steps=4, max_steps=24) for step in range(30)]
    assert factor[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor[14] == pytest.approx(0.5)
    assert factor[24:] == pytest.approx([0.0] * 6)
    assert np.diff(factor[4:25]).max() < 0


def test_a_run_that_is_made_longer_follows_the_longer_cosine():
    options = {"lr": 1.0, "weight_decay": 0.0, "betas": (0.9, 0.95), "warmup_steps": 3}
    short, long = (adamw(torch.nn.Linear(1, 1), **options, max_steps=n)["lr_scheduler"]["scheduler"] for n in (30, 100))
    for _ in range(30):
        short.optimizer.step()  # without a gradient, which changes nothing but torch's mind about the order
        short.step()
    assert short.get_last_lr() == pytest.approx([0.0])
    long.load_state_dict(short.state_dict())
    long.optimizer.step()
    long.step()
    assert long.get_last_lr() == pytest.approx([warmup_cosine(31, warmup_steps=3, max_steps=100)])


def test_a_warm_up_that_never_ends_is_told(caplog):
    options = {"lr": 1.0, "weight_decay": 0.0, "betas": (0.9, 0.95), "warmup_steps": 30}
    adamw(torch.nn.Linear(1, 1), **options, max_steps=20)
    assert "warmup_steps=30 is not over in 20 steps" in caplog.text


@pytest.fixture(scope="module")
def encoder() -> ViT3D:
    torch.manual_seed(0)
    return ViT3D(**SMALL).eval()


@pytest.fixture(scope="module")
def patches(corpus) -> Patches:
    """Of three exams with one, two and four sequences."""
    exams = whole_brain(corpus, "TINY/P2", "TINY/P1/2", "TINY/P6").padded(8)
    grid = patch_grid(exams, 8)
    found = gather(exams, grid, *choose(grid))
    assert len(set(found.valid.sum(1).tolist())) == 3
    return found


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Payload:
    """What unpickles by writing a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def numbers(patches: Patches) -> dict[str, torch.Tensor]:
    return {"voxels": patches.voxels, "position_mm": patches.position_mm}


def whole_brain(corpus, *names: str) -> Exams:
    rows = np.array([list(corpus.exams["exam"]).index(name) for name in names])
    dataset = WholeBrainDataset(corpus, rows, np.zeros(len(rows), np.float32))
    return collate([dataset[i] for i in range(len(rows))], spacing_mm=corpus.spacing_mm, seed=0)


def test_the_script_of_the_documents_gives_the_features_of_an_exported_encoder(encoder, corpus, tmp_path):
    save_encoder(encoder, tmp_path, {})
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/pretraining.md").read_text(), re.DOTALL)
    for said, here in (("runs/umbif_vitb", str(tmp_path)), ('Corpus("corpus")', f"Corpus({str(corpus.folder)!r})")):
        assert said in script
        script = script.replace(said, here)
    names: dict[str, Any] = {}
    exec(script, names)
    assert names["features"].shape == (8, SMALL["embed_dim"])
    with torch.no_grad():
        expected = encoder.eval().forward_features(names["batch"])[2]
    assert torch.equal(names["features"], expected)
