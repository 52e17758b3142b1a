"""Public weights give here what they gave there, every tensor is accounted for, and what does not fit is refused."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from monai.networks.nets import MaskedAutoEncoderViT, ViT
from safetensors.torch import save_file
from torch.nn.functional import avg_pool3d, conv2d, conv3d, gelu, layer_norm, linear

from umbif.encoders.kernels import IN_PICTURE, IN_RAS, IN_VIDEO, inflate
from umbif.encoders.vit import ViT3D
from umbif.encoders.weights import CONFIG, WEIGHTS, load_encoder_weights, save_encoder
from umbif.errors import UsageError
from umbif.pages.pictures import _plane
from umbif.stream.patches import Patches

P, E, DEPTH, HEADS = 4, 24, 2, 3
SMALL = {"patch_size": P, "embed_dim": E, "depth": DEPTH, "num_heads": HEADS, "num_registers": 1}
CLASS_TOKEN = {"cls_token": (1, 1, E), "pos_embed": (1, 5, E)}
DECODER = {"mask_token": (1, 1, 8), "decoder_embed.weight": (8, E), "decoder_blocks.0.attn.qkv.weight": (24, 8)}


# ---------------------------------------------------------------- the same numbers as there


@pytest.mark.parametrize("kind", ["encoder of MAE", "MAE", "layer scale", "registers", "no class token", "grey"])
def test_a_volume_that_is_constant_along_z_gives_the_tokens_of_the_picture(tmp_path, kind):
    more = {
        "encoder of MAE": CLASS_TOKEN,
        "MAE": CLASS_TOKEN | DECODER,
        "layer scale": CLASS_TOKEN | {f"blocks.{i}.ls{n}.gamma": (E,) for i in range(DEPTH) for n in (1, 2)},
        "registers": CLASS_TOKEN | {"reg_token": (1, 2, E)},
        "no class token": {"head.weight": (5, E), "fc_norm.bias": (E,)},
        "grey": CLASS_TOKEN | {"patch_embed.proj.weight": (E, 1, P, P)},
    }[kind]
    state = picture_weights(**more)
    if "pos_embed" in state:
        state["pos_embed"][:, 1:] = 0  # a class token has a row; places of patches are not compared
    layer_scale = 1e-5 if kind == "layer scale" else None
    encoder = started(tmp_path, state, num_registers=0 if kind == "no class token" else 3, layer_scale=layer_scale)
    encoder.registers.data = encoder.registers[:, : {"registers": 3, "no class token": 0}.get(kind, 1)]
    tokens, expected = both(encoder, state)
    assert (tokens - expected).abs().max() < 1e-4
    assert expected.std(dim=1).min() > 0.05  # no token is like another


def test_each_wrapper_prefix_and_file_gives_the_same(tmp_path):
    state = picture_weights(**CLASS_TOKEN)
    plain = started(tmp_path, state).state_dict()
    for prefix in ("module.", "encoder.", "backbone.", "module.encoder."):
        renamed = {prefix + name: tensor for name, tensor in state.items()}
        for wrap in (renamed, {"state_dict": renamed}, {"epoch": 3, "model": renamed, "optimizer": {"state": {}}}):
            same(started(tmp_path, wrap).state_dict(), plain)
    save_file(state, tmp_path / "w.safetensors")
    same(made(tmp_path / "w.safetensors").state_dict(), plain)
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    same(made(tmp_path / "old.bin").state_dict(), plain)
    save_file(state, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text('{"model_type": "vit_mae"}')  # a folder of Hugging Face's looks like ours
    same(made(tmp_path).state_dict(), plain)


@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_monais_masked_autoencoder_gives_the_same_tokens(tmp_path, qkv_bias, proj_type):
    theirs = MaskedAutoEncoderViT(
        1, (8, 12, 4), P, E, 4 * E, DEPTH, HEADS, decoder_hidden_size=12, decoder_num_heads=3, decoder_num_layers=1,
        proj_type=proj_type, qkv_bias=qkv_bias,
    )  # fmt: skip
    like_ours(theirs)
    encoder = started(tmp_path, theirs.state_dict())
    volume = torch.randn(8, 12, 4)
    patches = theirs.patch_embedding(volume[None, None])
    expected = theirs.blocks(torch.cat([theirs.cls_token, patches], dim=1))[:, 1:]
    assert torch.allclose(tokens_of(encoder, volume), expected, atol=1e-5)
    assert "decoder_pred.weight" in encoder.loaded["left_out"]
    assert not any(name.startswith("decoder") for name in encoder.loaded["loaded"])


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.backbone."])
def test_brainiac_sees_the_head_mirrored_as_its_template_is_stored(tmp_path, prefix):
    theirs = like_ours(ViT(1, (8, 12, 4), P, E, 4 * E, DEPTH, HEADS, save_attn=True))
    named = {prefix + n: t for n, t in theirs.state_dict().items() if "cross" not in n}  # as MONAI 1.3 had them
    lightning = {"state_dict": named | {"projection_head.0.weight": torch.ones(2, E)}, "hyper_parameters": {"lr": 1.0}}
    encoder = started(tmp_path, lightning)
    volume = torch.randn(8, 12, 4)  # RAS, as ours are
    in_las = volume.flip(0)
    expected = theirs(in_las[None, None])[0].view(2, 3, 1, E).flip(0).view(1, 6, E)  # patches in our order again
    encoder.registers.data = encoder.registers[:, :0]
    assert torch.allclose(tokens_of(encoder, volume), expected, atol=1e-5)
    assert encoder.loaded["layout"] == "BrainIAC"
    assert "LAS" in encoder.loaded["changed"]["embed.weight"]


def test_a_monai_vit_with_a_prefix_of_a_newer_version_is_not_taken_for_brainiac(tmp_path):
    theirs = ViT(1, (8, 12, 4), P, E, 4 * E, DEPTH, HEADS, classification=True)
    encoder = started(tmp_path, {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()})
    kernel = theirs.patch_embedding.patch_embeddings.weight
    assert torch.equal(encoder.embed.weight, kernel.flatten(1))
    assert torch.equal(encoder.registers[0, 0], theirs.cls_token[0, 0])


def test_both_layouts_of_videomae_give_the_same_encoder(tmp_path):
    original = picture_weights(prefix="encoder.", **{"patch_embed.proj.weight": (E, 3, 2, P, P)})
    for i in range(DEPTH):
        q, _, v = original.pop(f"encoder.blocks.{i}.attn.qkv.bias").chunk(3)
        original |= {f"encoder.blocks.{i}.attn.q_bias": q, f"encoder.blocks.{i}.attn.v_bias": v}
    more = {"decoder.blocks.0.attn.q_bias": torch.ones(8), "encoder_to_decoder.weight": torch.ones(8, E)}
    encoder = started(tmp_path, {"module": original | more | {"mask_token": torch.ones(1, 1, 8)}})
    assert encoder.loaded["layout"] == "VideoMAE (MCG-NJU)"
    q, k, v = encoder.blocks[1].qkv.bias.chunk(3)
    assert torch.equal(q, original["encoder.blocks.1.attn.q_bias"])
    assert torch.equal(v, original["encoder.blocks.1.attn.v_bias"])
    assert (k == 0).all()
    for bare in (False, True):
        theirs = started(tmp_path, hugging_face(original, bare))
        same(theirs.state_dict(), encoder.state_dict())
        assert theirs.loaded["layout"] == "Hugging Face ViT or VideoMAE"


def test_a_picture_network_of_hugging_faces_gives_the_same_encoder(tmp_path):
    original = picture_weights(**CLASS_TOKEN)
    state = hugging_face(original, bare=True) | {"pooler.dense.weight": torch.ones(E, E)}
    encoder = started(tmp_path, {f"vit.{name}": tensor for name, tensor in state.items()})
    same(encoder.state_dict(), started(tmp_path, original).state_dict(), drawn={"sequence.weight"})
    assert encoder.registers.shape[1] == 1  # the class token's, so it was compared


def test_frames_of_a_video_become_slices_from_the_bottom_up():
    kernel, frames = torch.randn(E, 3, 2, P, P), torch.randn(2, P, P)
    video = frames[None].expand(3, -1, -1, -1)  # grey
    slices = frames.flip(1, 2).transpose(1, 2)  # (t, X, Y)
    volume = slices.permute(1, 2, 0).repeat_interleave(P // 2, dim=2)
    assert torch.allclose(
        inflate(kernel, IN_VIDEO, P) @ volume.flatten(), conv3d(video[None], kernel).flatten(), atol=1e-4
    )


@pytest.mark.parametrize(("size", "patch_size"), [(14, 16), (16, 8), (5, 4), (3, 8)])
def test_a_kernel_of_another_size_answers_the_patch_averaged_to_its_own(size, patch_size):
    kernel = torch.randn(2, 1, size, size, size)
    resampled = inflate(kernel, IN_RAS, patch_size)
    assert torch.allclose(resampled.sum(1), kernel.flatten(1).sum(1), atol=1e-3)  # what is constant
    fine = torch.randn(size, size, size)
    if size % patch_size == 0:
        coarse = avg_pool3d(fine[None], size // patch_size)
        repeated = coarse[0].repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.allclose(resampled @ coarse.flatten(), kernel.flatten(1) @ repeated.flatten(), atol=1e-3)


def test_a_picture_kernel_of_another_size_is_resampled_and_said_to_be(tmp_path):
    state = picture_weights(**CLASS_TOKEN, **{"patch_embed.proj.weight": (E, 3, 7, 7)})
    encoder = started(tmp_path, state)
    assert torch.allclose(encoder.embed.weight.sum(1), state["patch_embed.proj.weight"].flatten(1).sum(1), atol=1e-4)
    assert "resampled from 7×7 to 4" in encoder.loaded["changed"]["embed.weight"]
    exact = inflate(state["patch_embed.proj.weight"], IN_PICTURE, P)
    assert torch.equal(encoder.embed.weight, exact)


# ---------------------------------------------------------------- what the blocks have never met, and the report


def test_gains_are_one_and_sequences_small_after_public_weights(tmp_path):
    encoder = started(tmp_path, picture_weights(**CLASS_TOKEN))
    assert (encoder.gain.weight == 1).all()
    assert encoder.sequence.weight.std() == pytest.approx(0.02, rel=1e-3)
    assert torch.unique(encoder.sequence.weight, dim=0).shape[0] == 8


@pytest.mark.parametrize(
    ("rows", "taken"), [(0, 0), (4, 0), (5, 1), (7, 3)], ids=["none", "patches", "class token", "and registers"]
)
def test_tokens_before_the_patches_become_registers_with_their_rows_of_positions(tmp_path, rows, taken):
    state = picture_weights(cls_token=(1, 1, E), reg_token=(1, 2, E), pos_embed=(1, rows, E))
    encoder = started(tmp_path, state, num_registers=4)
    expected = torch.cat([state["cls_token"], state["reg_token"]], dim=1)[0]
    expected[:taken] += state["pos_embed"][0, :taken]
    assert torch.equal(encoder.registers[0, :3], expected)
    assert 0 < encoder.registers[0, 3].std() < 0.05
    assert encoder.loaded["changed"]["registers"] == "3 of 4 are theirs: class token (1), registers (2)"
    few = started(tmp_path, state, num_registers=2)
    assert torch.equal(few.registers[0], expected[:2])
    assert few.loaded["left_out"]["registers 2"] == "model.encoder.num_registers=2 has no room for it"
    assert "class token 0" in started(tmp_path, state, num_registers=0).loaded["left_out"]


def test_the_report_accounts_for_every_tensor(tmp_path):
    state = picture_weights(**CLASS_TOKEN, **DECODER)
    encoder = started(tmp_path, {"model": state})
    report = load_encoder_weights(encoder, tmp_path / "w.pth")
    assert encoder.loaded == report.as_dict() == json.loads(json.dumps(encoder.loaded))
    assert {*report.loaded, *report.changed, *report.kept} == set(encoder.state_dict())
    assert set(report.left_out) == {*DECODER, "pos_embed"}
    text = str(report)
    assert "w.pth (MAE (facebookresearch))" in text
    assert "embed.weight (1): 3 colours summed, inflated: spread over 4 voxels of z" in text
    assert "(3): of a decoder" in text
    assert "pos_embed (1): positions are computed from millimetres here" in text
    assert f"num_heads={HEADS} must be theirs" in text
    assert len(text.splitlines()) < 10


def test_a_network_without_its_last_norm_leaves_ours_as_it_was(tmp_path):
    state = picture_weights(**{"fc_norm.weight": (E,), "fc_norm.bias": (E,)})
    encoder = started(tmp_path, {name: t for name, t in state.items() if not name.startswith("norm.")})
    assert {"norm.weight", "norm.bias"} < set(encoder.loaded["kept"])
    assert (encoder.norm.weight == 1).all()
    assert "fc_norm.weight" in encoder.loaded["left_out"]


def test_a_folder_of_ours_has_a_report_too(tmp_path):
    theirs = ViT3D(**SMALL)
    save_encoder(theirs, tmp_path, {})
    encoder = ViT3D(**SMALL)
    report = load_encoder_weights(encoder, tmp_path)
    assert report.layout == encoder.loaded["layout"] == "umbif"
    assert report.loaded == sorted(theirs.state_dict())
    assert (report.changed, report.left_out, report.kept) == ({}, {}, [])
    assert not torch.equal(encoder.gain.weight, torch.ones(8, E))


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 3}, "the weights have 2 blocks of width 24; model.encoder has depth 3 and embed_dim 24. "
                       "Set model.encoder.depth=2 model.encoder.embed_dim=24"),
        ({"embed_dim": 48}, "width 24; model.encoder has depth 2 and embed_dim 48"),
        ({"mlp_ratio": 2.0}, "layers are 96 wide; model.encoder.mlp_ratio is 2.0. Set model.encoder.mlp_ratio=4"),
        ({"layer_scale": 0.1}, "no layer scale; model.encoder.layer_scale is 0.1. Set model.encoder.layer_scale=null"),
    ],
)  # fmt: skip
def test_an_encoder_of_another_size_is_refused_with_the_values_to_set(tmp_path, changes, said):
    refused(tmp_path, picture_weights(**CLASS_TOKEN), said, **changes)


def test_the_size_of_a_known_network_is_named(tmp_path):
    large = {f"blocks.{i}.norm1.weight": torch.ones(1024) for i in range(24)}
    cure = "Take _parts/encoder/vitl_1mm or set model.encoder.depth=24 model.encoder.embed_dim=1024 "
    refused(
        tmp_path, large | {"patch_embed.proj.weight": torch.ones(1024, 3, 1, 1)}, f"{cure}model.encoder.num_heads=16"
    )


def test_layer_scale_of_theirs_needs_ours(tmp_path):
    state = picture_weights(**{f"blocks.{i}.ls{n}.gamma": (E,) for i in range(DEPTH) for n in (1, 2)})
    refused(
        tmp_path, state, "the weights have a layer scale; model.encoder.layer_scale is null. Set model.encoder.layer"
    )


def test_every_problem_is_named_at_once_and_nothing_is_loaded(tmp_path):
    state = picture_weights(**CLASS_TOKEN)
    del state["blocks.1.attn.proj.bias"]
    state |= {"blocks.0.attn.q_norm.weight": torch.ones(8), "module.cls_token": torch.ones(1, 1, E)}
    state["blocks.0.norm2.weight"][3] = torch.nan
    state["blocks.1.mlp.fc2.weight"] = torch.ones(E, 7)
    torch.save(state, tmp_path / "w.pth")
    encoder = ViT3D(**SMALL)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_encoder_weights(encoder, tmp_path / "w.pth")
    assert [str(problem) for problem in caught.value.problems] == [
        "no rule names some tensors: got blocks.0.attn.q_norm.weight. Such a model is another one than ViT3D",
        "several tensors are for one of ours: got module.cls_token. Give a file with one model in it",
        "nothing in the file fills some of our tensors: got blocks.1.proj.bias. "
        "The file is incomplete, or of another model",
        "some tensors have another shape: got blocks.1.mlp.2.weight (24, 7) for (24, 96). The file is of another model",
        "some tensors hold NaN or infinity: got blocks.0.norm2.weight. Training had failed, or the file is damaged",
    ]
    same(encoder.state_dict(), before)


def test_a_bias_that_only_some_blocks_have_is_a_gap(tmp_path):
    state = picture_weights(**CLASS_TOKEN)
    del state["blocks.1.attn.qkv.bias"]
    refused(tmp_path, state, "nothing in the file fills some of our tensors: got blocks.1.qkv.bias")


@pytest.mark.parametrize("shape", [(E, 1, P, P), (E, 1, 2, P, P), (E, 2 * P**3)])
def test_a_monai_kernel_that_is_no_cube_of_one_colour_is_refused(tmp_path, shape):
    state = ViT(1, (8, 8, 8), P, E, 4 * E, DEPTH, HEADS).state_dict()
    state["patch_embedding.patch_embeddings.weight"] = torch.ones(shape)
    refused(tmp_path, state, "the patch embedding is of no known shape")


def test_an_unknown_layout_shows_its_names_and_the_known_ones(tmp_path):
    names = {f"layer{i}.conv.weight": torch.ones(1) for i in range(9)}
    said = refused(tmp_path, names, "layer0.conv.weight, layer1.conv.weight")
    assert "and 4 more" in said
    assert all(name in said for name in ("BrainIAC", "MONAI", "VideoMAE", "timm", "facebookresearch", "Hugging Face"))


def test_a_file_of_ours_without_its_config_is_refused(tmp_path):
    refused(
        tmp_path, {"state_dict": {f"encoder.{n}": t for n, t in ViT3D(**SMALL).state_dict().items()}}, "umbif itself"
    )


def test_only_the_vision_transformer_takes_public_files(tmp_path):
    torch.save(picture_weights(**CLASS_TOKEN), tmp_path / "w.pth")

    with pytest.raises(UsageError, match=r"got Conv3d. Only umbif.encoders.vit.ViT3D takes such files"):
        load_encoder_weights(torch.nn.Conv3d(1, 2, 3), tmp_path / "w.pth")


# ---------------------------------------------------------------- files


def test_a_namespace_in_a_checkpoint_is_data(tmp_path):
    started(tmp_path, {"model": picture_weights(**CLASS_TOKEN), "args": argparse.Namespace(lr=0.1, device="cuda")})


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_needs_code_is_never_run_and_says_how_to_convert_it(tmp_path, monkeypatch, zipped):
    state = {"state_dict": picture_weights(**CLASS_TOKEN), "hyper_parameters": Payload(tmp_path / "ran")}
    torch.save(state, tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match="cannot be read without running code") as caught:
        made(tmp_path / "w.ckpt")
    assert not (tmp_path / "ran").exists()
    code = str(caught.value).split("'")[1]
    monkeypatch.setattr("sys.argv", ["-c", str(tmp_path / "w.ckpt"), str(tmp_path / "new.safetensors")])
    exec(code, {})
    assert torch.equal(made(tmp_path / "new.safetensors").norm.weight, state["state_dict"]["norm.weight"])


@pytest.mark.parametrize("damage", ["half", "quarter", "empty", "text", "bytes"])
@pytest.mark.parametrize("name", ["w.pth", "old.bin", "w.safetensors"])
def test_a_damaged_file_is_told(tmp_path, name, damage):
    state, path = picture_weights(**CLASS_TOKEN), tmp_path / name
    if name == "w.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "w.pth")
    whole = path.read_bytes()
    broken = {
        "half": whole[: len(whole) // 2],
        "quarter": whole[: len(whole) // 4],
        "empty": b"",
        "text": b"<html>" * 99,
    }
    path.write_bytes(broken.get(damage, bytes(range(256))))
    with pytest.raises(UsageError, match="damaged"):
        made(path)


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_a_pickle_without_tensors_and_a_wrong_kind_of_file_are_told(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3, "model": {"depth": 12}}, tmp_path / "numbers.pt")
    (tmp_path / "w.npz").write_bytes(pickle.dumps({}))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name, said in (
        ("list.pt", "no tensors by name: got list"), ("numbers.pt", "no tensors by name: got epoch, model"),
        ("w.npz", "of no known kind: got .npz"), ("absent.pth", "names no file"), ("absent", "names no encoder"),
        ("script.pt", "cannot be read without running code: got TorchScript"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            made(tmp_path / name)


# ---------------------------------------------------------------- networks of others


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Payload:
    """What unpickles by writing a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def picture_weights(prefix: str = "", **more: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random tensors named as timm and MAE name them, and `more` of given shapes."""
    block = {
        "norm1.weight": (E,), "norm1.bias": (E,), "attn.qkv.weight": (3 * E, E), "attn.qkv.bias": (3 * E,),
        "attn.proj.weight": (E, E), "attn.proj.bias": (E,), "norm2.weight": (E,), "norm2.bias": (E,),
        "mlp.fc1.weight": (4 * E, E), "mlp.fc1.bias": (4 * E,), "mlp.fc2.weight": (E, 4 * E), "mlp.fc2.bias": (E,),
    }  # fmt: skip
    shapes = {"patch_embed.proj.weight": (E, 3, P, P), "patch_embed.proj.bias": (E,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in block.items()}
    shapes |= {"norm.weight": (E,), "norm.bias": (E,)}
    return {prefix + name: 0.3 * torch.randn(shape) for name, shape in (shapes | more).items()}


def hugging_face(original: dict[str, torch.Tensor], bare: bool) -> dict[str, torch.Tensor]:
    """The original VideoMAE as transformers' VideoMAEModel (bare) or VideoMAEForPreTraining names it."""
    words = {
        "encoder.": "", "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "attn.": "attention.attention.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    }  # fmt: skip
    theirs = {}
    for name, tensor in original.items():
        for old, new in words.items():
            name = name.replace(old, new)
        name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            theirs |= {name.replace("qkv", part): each.clone() for part, each in parts}
        else:
            theirs[name] = tensor
    if bare:
        return theirs
    decoder = {"decoder.decoder_layers.0.attention.attention.q_bias": torch.ones(8), "mask_token": torch.ones(1, 1, 8)}
    return (
        {f"videomae.{name}": t for name, t in theirs.items()}
        | decoder
        | {"encoder_to_decoder.weight": torch.ones(8, E)}
    )


def picture_tokens(state: dict[str, torch.Tensor], picture: torch.Tensor) -> torch.Tensor:
    """A vision transformer as timm and MAE compute it, for (C, rows, columns): tokens (rows, columns, E) of patches."""
    embedded = conv2d(picture[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=P)
    rows, columns = embedded.shape[2:]
    x = embedded.flatten(2).transpose(1, 2)[0]
    before = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
    if before:
        before[0] = before[0] + state["pos_embed"][0, :1]
    x = torch.cat([*before, x])
    for i in range(DEPTH):
        b = {name.removeprefix(f"blocks.{i}."): t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
        y = linear(
            layer_norm(x, (E,), b["norm1.weight"], b["norm1.bias"], 1e-6), b["attn.qkv.weight"], b["attn.qkv.bias"]
        )
        q, k, v = y.reshape(len(x), 3, HEADS, E // HEADS).permute(1, 2, 0, 3)
        seen = (q @ k.transpose(1, 2) * (E // HEADS) ** -0.5).softmax(-1) @ v
        y = linear(seen.transpose(0, 1).reshape(len(x), E), b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + y * b.get("ls1.gamma", torch.ones(E))
        y = layer_norm(x, (E,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = linear(gelu(linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"])), b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        x = x + y * b.get("ls2.gamma", torch.ones(E))
    x = layer_norm(x, (E,), state["norm.weight"], state["norm.bias"], 1e-6)
    return x[-rows * columns :].view(rows, columns, E)


def like_ours(monai: torch.nn.Module) -> torch.nn.Module:
    """Without places, which differ, and with the epsilon of our layer norms."""
    monai.patch_embedding.position_embeddings.data.zero_()
    for parameter in monai.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) * (parameter.numel() != 6 * E)
    for module in monai.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    return monai


# ---------------------------------------------------------------- ours


def made(path: Path, **changes) -> ViT3D:
    return ViT3D(**(SMALL | changes), weights=str(path)).eval()


def started(tmp_path: Path, content: dict, **changes) -> ViT3D:
    torch.save(content, tmp_path / "w.pth")
    return made(tmp_path / "w.pth", **changes)


def refused(tmp_path: Path, content: dict, said: str, **changes) -> str:
    with pytest.raises(UsageError) as caught:
        started(tmp_path, content, **changes)
    assert said in str(caught.value)
    return str(caught.value)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], drawn=("sequence.weight", "registers")) -> None:
    """What no file fills is `drawn`, and differs from one encoder to the next."""
    assert set(one) == set(other)
    assert [name for name in one if name not in drawn and not torch.equal(one[name], other[name])] == []


def tokens_of(encoder: ViT3D, volume: torch.Tensor) -> torch.Tensor:
    """Tokens (1, V, E) of every patch of (X, Y, Z), X slowest, without what places and sequences add."""
    encoder.sequence.weight.data.zero_()
    encoder.position = None
    x, y, z = (n // P for n in volume.shape)
    voxels = volume.view(x, P, y, P, z, P).permute(0, 2, 4, 1, 3, 5).reshape(1, -1, P, P, P)
    num = voxels.shape[1]
    zero = torch.zeros(1, num, dtype=torch.long)
    return encoder(Patches(voxels, torch.zeros(1, num, 3), zero, zero, torch.ones(1, num, dtype=torch.bool)))[0]


def both(encoder: ViT3D, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (6, E) of a volume, and of its axial slice as a radiologist sees it, patch by patch."""
    volume = torch.randn(8, 12, 1).expand(-1, -1, P)
    picture = torch.from_numpy(_plane(volume.numpy(), "axial", (0, 0, 2)).copy())
    colours = state["patch_embed.proj.weight"].shape[1]
    theirs = picture_tokens(state, picture.expand(colours, -1, -1))
    return tokens_of(encoder, volume)[0], theirs.flip(0, 1).transpose(0, 1).reshape(6, E)
