"""Public weights of vision transformers: from the files of other programs into ViT3D, and a report of every tensor.

The user brings the file and must heed its licence: MAE and VideoMAE are CC BY-NC 4.0, BrainIAC is for non-commercial
academic research, each timm model has its own.
Names were read in the sources of facebookresearch/mae, timm, MCG-NJU/VideoMAE, transformers and MONAI; those of
BrainIAC in programs that load it, for it is a MONAI ViT under `backbone.`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umbif.encoders.kernels import IN_LAS, IN_RAS, inflate, kernel_axes, said, unflattened
from umbif.encoders.vit import ViT3D
from umbif.errors import Problem, UsageError

PREFIX = r"(?:(?:module|_orig_mod|model|backbone|encoder|vit|videomae)\.)*"
NEW_STD = 0.02  # of what pretrained blocks have never met: small against what they know

# A rule: their name → ours. `#0` to `#2` are parts of a fused tensor; `@` names what has no tensor of its own here.
Rules = tuple[tuple[str, str], ...]
PICTURE: Rules = (
    (r"patch_embed\.proj\.(weight|bias)", r"embed.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)", r"blocks.\1.\2.\3"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", r"blocks.\1.mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)", r"blocks.\1.mlp.2.\2"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"blocks.\1.scale\2"),
    (r"norm\.(weight|bias)", r"norm.\1"),
    (r"cls_token", "@class token"),
    (r"dist_token", "@distillation token"),
    (r"reg_token|register_tokens", "@registers"),
    (r"pos_embed", "@positions"),
)
VIDEO: Rules = (
    *PICTURE,
    (r"blocks\.(\d+)\.attn\.q_bias", r"blocks.\1.qkv.bias#0"),
    (r"blocks\.(\d+)\.attn\.v_bias", r"blocks.\1.qkv.bias#2"),
    (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.scale\2"),
)
HUGGING_FACE: Rules = (
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"embed.\1"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(weight|bias)", r"blocks.\1.qkv.\2#0"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.key\.(weight|bias)", r"blocks.\1.qkv.\2#1"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.value\.(weight|bias)", r"blocks.\1.qkv.\2#2"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.q_bias", r"blocks.\1.qkv.bias#0"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.v_bias", r"blocks.\1.qkv.bias#2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"blocks.\1.proj.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)", r"blocks.\1.mlp.0.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)", r"blocks.\1.mlp.2.\2"),
    (r"layernorm\.(weight|bias)", r"norm.\1"),
    (r"embeddings\.cls_token", "@class token"),
    (r"embeddings\.position_embeddings", "@positions"),
)
MONAI: Rules = (
    (r"patch_embedding\.patch_embeddings(?:\.\d+)?\.(weight|bias)", r"embed.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"blocks.\1.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.proj.\2"),
    (r"blocks\.(\d+)\.mlp\.linear1\.(weight|bias)", r"blocks.\1.mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.linear2\.(weight|bias)", r"blocks.\1.mlp.2.\2"),
    (r"norm\.(weight|bias)", r"norm.\1"),
    (r"blocks\.\d+\.(weight|bias)", r"norm.\1"),  # MaskedAutoEncoderViT ends its list of blocks with the last norm
    (r"(?:patch_embedding\.)?cls_token", "@class token"),
    (r"patch_embedding\.position_embeddings", "@places of patches"),  # none of them is the class token's
)
LEFT_OUT: Rules = (
    (r"decoder.*|(?:embeddings\.)?mask_tokens?|encoder_to_decoder\..*|conv3d_transpose.*", "of a decoder"),
    (r"(?:head|head_dist|fc|fc_norm|pre_logits|attn_pool|pooler|classifier|classification_head)\..*", "of a head"),
    (r"(?:projection_head|projection|projector|criterion)\..*", "of a head"),
    (r"blocks\.\d+\.(?:norm_cross_attn|cross_attn)\..*", "of cross attention, which nothing used"),
)
BEFORE_PATCHES = ("@class token", "@distillation token", "@registers")  # in the order that they enter the blocks
PLACE = "positions are computed from millimetres here"


@dataclass(frozen=True)
class Layout:
    """How one program names and orders its tensors.

    Args:
        name: For people.
        marker: A name that gives the layout away.
        rules: Their names → ours.
        volume: Axes of a cubic kernel.
        pictures: Kernels of pictures and videos occur.
        unless: A name that speaks against it.
    """

    name: str
    marker: str
    rules: Rules
    volume: tuple[str, ...] = IN_RAS  # nibabel's order, and what `Orientationd(axcodes="RAS")` gives
    pictures: bool = True
    unless: str = r"(?!)"  # matches nothing


# The first that fits counts. BrainIAC never reorients, and the template that it registers to is stored LAS.
LAYOUTS = (
    Layout("BrainIAC", r"backbone\.patch_embedding\..*", MONAI, IN_LAS, False, r".*(?:cross_attn|cls_token|decoder).*"),
    Layout("MONAI ViT or MaskedAutoEncoderViT", r"patch_embedding\.patch_embeddings.*", MONAI, pictures=False),
    Layout("VideoMAE (MCG-NJU)", r"blocks\.0\.attn\.q_bias", VIDEO),
    Layout("MAE (facebookresearch)", r"decoder_embed\.weight", PICTURE),
    Layout("timm ViT, or encoder of MAE", r"patch_embed\.proj\.weight", PICTURE),
    Layout("Hugging Face ViT or VideoMAE", r"embeddings\.patch_embeddings\.projection\.weight", HUGGING_FACE),
)
# depth and width → num_heads, and the part of a recipe
SIZES = {
    (12, 384): (6, "vits_1mm"), (12, 768): (12, "vitb_1mm"),
    (24, 1024): (16, "vitl_1mm"), (32, 1280): (16, "vith_1mm"),
}  # fmt: skip


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, of theirs and of ours."""

    source: str
    layout: str
    loaded: list[str]  # ours that were filled
    changed: dict[str, str] = field(default_factory=dict)  # ours → how
    left_out: dict[str, str] = field(default_factory=dict)  # theirs → why
    kept: list[str] = field(default_factory=list)  # ours that stay as they were initialised
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain, for a config."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.layout})", f"  loaded    {len(self.loaded)} tensors"]
        lines += [f"  changed   {line}" for line in _grouped(self.changed)]
        lines += [f"  left out  {line}" for line in _grouped(self.left_out)]
        lines += [f"  kept      {', '.join(self.kept)}: as initialised"] if self.kept else []
        return "\n".join([*lines, *(f"  note      {note}" for note in self.notes)])


def load_foreign(encoder: object, tensors: Mapping[str, Tensor], path: Path) -> LoadReport:
    """Fills an encoder with the tensors of another program's file, every one or none.

    Raises:
        UsageError: Their layout is not known, or they do not fit; every problem is named.
    """
    if not isinstance(encoder, ViT3D):
        cure = "Only umbif.encoders.vit.ViT3D takes such files; give a run (runs/NAME) or its encoder folder"
        raise UsageError(Problem(f"{path} is to hold a vision transformer", type(encoder).__name__, cure))
    layout = recognise(tensors, path)
    found, left_out, problems = _named(layout, tensors)
    state, changed, more = _converted(encoder, layout, found)
    _add_tokens(encoder, found, state, changed, left_out)
    problems += more + _misfits(encoder, state)
    if problems:
        raise UsageError(problems, f"{path}, read as {layout.name}")
    return _filled(encoder, LoadReport(str(path), layout.name, sorted(state), changed, left_out), state)


# ---------------------------------------------------------------- names


def recognise(names: Iterable[str], path: Path) -> Layout:
    """The layout that the names of the tensors belong to.

    Raises:
        UsageError: None is known, or the weights are our own, which come with a config.
    """
    names = list(names)
    if _any(r"gain\.weight", names):
        cure = "Give the run (runs/NAME) or its encoder folder, whose config.json belongs to them"
        raise UsageError(Problem(f"{path} holds weights of umbif itself", "a file", cure))
    for layout in LAYOUTS:
        if _any(layout.marker, names) and not _any(layout.unless, names):
            return layout
    known = "; ".join(layout.name for layout in LAYOUTS)
    raise UsageError(Problem(f"{path} has no layout that is known", _few(names), f"Known: {known}"))


def _named(layout: Layout, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], list[Problem]]:
    """Tensors by the targets of the rules, what is left out and why, and names that no rule knows or that meet."""
    found: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    unknown, meet = [], []
    for name, tensor in tensors.items():
        target, reason = _renamed(name, layout.rules), _renamed(name, LEFT_OUT)
        if target is not None and target not in found:
            found[target] = tensor
            if target in ("@positions", "@places of patches"):
                left_out[name] = PLACE
        elif target is not None:
            meet.append(name)
        elif reason is not None:
            left_out[name] = reason
        else:
            unknown.append(name)
    strange = Problem("no rule names some tensors", _few(unknown), "Such a model is another one than ViT3D")
    double = Problem("several tensors are for one of ours", _few(meet), "Give a file with one model in it")
    return found, left_out, [*([strange] if unknown else []), *([double] if meet else [])]


def _renamed(name: str, rules: Rules) -> str | None:
    for pattern, target in rules:
        if match := re.fullmatch(f"{PREFIX}(?:{pattern})", name):
            return match.expand(target)
    return None


def _converted(
    encoder: ViT3D, layout: Layout, found: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str], list[Problem]]:
    """Ours by name, what had to be changed and how, and what could not."""
    state = {name: tensor for name, tensor in found.items() if not re.search("[@#]", name)}
    changed = _fuse(found, state)
    if "embed.weight" not in state:
        return state, changed, []
    kernel = unflattened(state["embed.weight"])
    axes = kernel_axes(kernel, layout.volume, layout.pictures)
    if axes is None:
        cure = "Kernels of pictures (E, C, p, p), videos (E, C, t, p, p) and cubes (E, C, p, p, p) are known"
        return state, changed, [Problem("the patch embedding is of no known shape", str(tuple(kernel.shape)), cure)]
    state["embed.weight"] = inflate(kernel, axes, encoder.patch_size)
    how = said(kernel, axes, encoder.patch_size)
    return state, changed | ({"embed.weight": how} if how else {}), []


def _fuse(found: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, str]:
    """Puts separate queries, keys and values into one tensor, and zeros where a program has no bias."""
    changed = {}
    for name in sorted({name.split("#")[0] for name in found if "#" in name}):
        parts = [found.get(f"{name}#{i}") for i in range(3)]
        given = [part for part in parts if part is not None]
        if len(given) == 3 or name.endswith("bias"):
            state[name] = torch.cat([torch.zeros_like(given[0]) if part is None else part for part in parts])
            changed[name] = "fused" if len(given) == 3 else "fused, the keys' part zero"
    if not any(name.endswith("qkv.bias") for name in state):  # in some blocks only would be a fault
        for name in [name for name in state if name.endswith("qkv.weight")]:
            bias = name.replace("weight", "bias")
            state[bias], changed[bias] = state[name].new_zeros(len(state[name])), "zeros: theirs has none"
    return changed


# ---------------------------------------------------------------- what does not fit


def _misfits(encoder: ViT3D, state: Mapping[str, Tensor]) -> list[Problem]:
    """Differences of size in terms of the recipe; only without them those of single tensors."""
    ours = encoder.state_dict()
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return _sizes(encoder, theirs) or _single(ours, state, theirs)


def _sizes(encoder: ViT3D, theirs: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    config = encoder.config
    depth = 1 + max((int(name.split(".")[1]) for name in theirs if name.startswith("blocks.")), default=-1)
    width = theirs.get("blocks.0.norm1.weight", (config["embed_dim"],))[0]
    hidden = theirs.get("blocks.0.mlp.0.weight", (int(width * config["mlp_ratio"]),))[0]
    scaled, ours_scaled = "blocks.0.scale1" in theirs, "blocks.0.scale1" in encoder.state_dict()
    problems = []
    if (depth, width) != (config["depth"], config["embed_dim"]):
        heads, part = SIZES.get((depth, width), (None, ""))
        values = {"depth": depth, "embed_dim": width, "num_heads": heads}
        these = " ".join(f"model.encoder.{key}={value}" for key, value in values.items() if value)
        what = f"the weights have {depth} blocks of width {width}; model.encoder has depth {config['depth']} and "
        cure = f"Take _parts/encoder/{part} or set {these}" if part else f"Set {these}"
        problems.append(Problem(f"{what}embed_dim {config['embed_dim']}", cure=cure))
    if hidden != int(width * config["mlp_ratio"]):
        what = f"their feed-forward layers are {hidden} wide; model.encoder.mlp_ratio is {config['mlp_ratio']}"
        ratio = math.ceil(hidden / width * 1e4) / 1e4  # rounded up, for the product is rounded down
        problems.append(Problem(what, cure=f"Set model.encoder.mlp_ratio={ratio:g}"))
    if scaled != ours_scaled:
        what = f"the weights have {'a' if scaled else 'no'} layer scale; model.encoder.layer_scale is "
        cure = f"Set model.encoder.layer_scale={'1e-5' if scaled else 'null'}"
        problems.append(Problem(f"{what}{config.get('layer_scale') or 'null'}", cure=cure))
    return problems


def _single(
    ours: Mapping[str, Tensor], state: Mapping[str, Tensor], theirs: Mapping[str, tuple[int, ...]]
) -> list[Problem]:
    missing = [name for name in ours if name.startswith(("embed.", "blocks.")) and name not in state]
    wrong = [f"{n} {s} for {tuple(ours[n].shape)}" for n, s in theirs.items() if n in ours and s != ours[n].shape]
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    cases = (
        ("nothing in the file fills some of our tensors", missing, "The file is incomplete, or of another model"),
        ("some tensors have another shape", wrong, "The file is of another model"),
        ("some tensors hold NaN or infinity", broken, "Training had failed, or the file is damaged"),
    )
    return [Problem(what, _few(names), cure) for what, names, cure in cases if names]


# ---------------------------------------------------------------- what has no counterpart


def _add_tokens(
    encoder: ViT3D, found: Mapping[str, Tensor], state: dict[str, Tensor], changed: dict[str, str],
    left_out: dict[str, str],
) -> None:  # fmt: skip
    """Makes their class token and registers our first registers, which have no place in the picture either.

    A class token enters the blocks with a row of their positions; that row is part of it here.
    """
    kinds = [(kind[1:], row) for kind in BEFORE_PATCHES if kind in found for row in _rows(found[kind])]
    room, width = encoder.registers.shape[1:]
    for number, (kind, _) in enumerate(kinds[room:], start=room):
        left_out[f"{kind} {number}"] = f"model.encoder.num_registers={room} has no room for it"
    if not kinds[:room]:
        return
    tokens = torch.stack([row for _, row in kinds]).float()
    positions = _rows(found.get("@positions", tokens[:0]))
    extra = len(positions) - math.isqrt(len(positions)) ** 2  # beyond a square of patches: those of the first tokens
    if extra <= len(tokens) and positions.shape[1] == tokens.shape[1]:
        tokens[:extra] += positions[:extra]
    if tokens.shape[1] == width:
        tokens = torch.cat([tokens[:room], encoder.registers.detach().cpu()[0, len(tokens) :]])
    state["registers"] = tokens[None]
    counts = Counter(kind for kind, _ in kinds[:room])
    theirs = ", ".join(f"{kind} ({number})" for kind, number in counts.items())
    changed["registers"] = f"{min(room, len(kinds))} of {room} are theirs: {theirs}"


def _rows(table: Tensor) -> Tensor:
    return table.reshape(-1, table.shape[-1])


def _filled(encoder: ViT3D, report: LoadReport, state: dict[str, Tensor]) -> LoadReport:
    """Puts the tensors in, with a gain of one and hardly a sequence embedding: pretrained blocks know neither."""
    ours = encoder.state_dict()
    sequence = ours["sequence.weight"]
    new = {"gain.weight": torch.ones_like(ours["gain.weight"]), "sequence.weight": sequence * NEW_STD / sequence.std()}
    encoder.load_state_dict(ours | state | new, strict=True)
    how = {"gain.weight": "ones", "sequence.weight": f"as initialised, but of standard deviation {NEW_STD}"}
    kept = [name for name in ours if name not in state and name not in new]
    heads = encoder.config["num_heads"]
    note = f"weights do not show their number of heads: model.encoder.num_heads={heads} must be theirs"
    return replace(report, changed=report.changed | how, kept=kept, notes=[note])


# ---------------------------------------------------------------- words


def _any(pattern: str, names: Iterable[str]) -> bool:
    return any(re.fullmatch(f"{PREFIX}(?:{pattern})", name) for name in names)


def _few(names: Sequence[str], number: int = 5) -> str:
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def _grouped(said: Mapping[str, str]) -> list[str]:
    """One line for all blocks of which the same is said, and for all that is left out for one reason."""
    groups: dict[str, list[str]] = {}
    for name, text in said.items():
        short = re.sub(r"\.\d+\.", ".*.", name)
        groups.setdefault(text, []).append(short)
    return [f"{_few(list(dict.fromkeys(names)), 3)} ({len(names)}): {text}" for text, names in groups.items()]
