"""The gliomas of the phantom: what each hidden label does to their look, and how strongly. Invented; no paper's model.

A trait is a standard normal draw per person, shifted by `effect_sd` where the label is positive. So `effect_sd` is the
distance of the two classes' means in units of the spread within a class, as designed. What a model can read off
noisy images is less.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
POSITIVE = {"idh": "mutant", "codeletion": "codeleted", "mgmt": "methylated", "progression": "progression"}
NEGATIVE = {"idh": "wildtype", "codeletion": "intact", "mgmt": "unmethylated", "progression": "pseudoprogression"}
PREVALENCE = {"idh": 0.40, "codeletion": 0.45, "mgmt": 0.50, "progression": 0.60}  # codeletion: among IDH mutants
LABELLED = {"idh": 1.0, "codeletion": 1.0, "mgmt": 0.90, "progression": 0.75}  # share of exams whose label is known


@dataclass(frozen=True)
class Strength:
    """How far a positive label moves a trait, in standard deviations, and what one sees of it."""

    trait: str
    effect_sd: float
    look: str


STRENGTHS: dict[str, tuple[Strength, ...]] = {
    "idh": (
        Strength("enhancement", -2.4, "IDH mutants mostly enhance weakly or not at all (strong)."),
        Strength("necrosis", -1.2, "IDH mutants have little necrosis."),
        Strength("sharpness", 1.2, "IDH mutants have a sharper border of the oedema."),
        Strength("age", -1.2, "IDH mutants are younger; the ventricles widen with age, so images carry a trace of it."),
    ),
    "codeletion": (
        Strength("frontal", 1.0, "Codeleted gliomas lie in a frontal lobe more often (medium)."),
        Strength("patchiness", 1.2, "Codeleted gliomas have a patchy, heterogeneous texture."),
        Strength("sharpness", -1.0, "Codeleted gliomas have a less sharp border than other IDH mutants."),
    ),
    "mgmt": (
        Strength("necrosis", 0.5, "Methylated gliomas have slightly more necrosis (weak: near chance is realistic)."),
        Strength("irregularity", 0.4, "Methylated gliomas have a slightly more irregular rim."),
    ),
    "progression": (
        Strength("rim", 2.4, "True progression has a thicker enhancing rim (strong)."),
        Strength("enhancement", 0.8, "True progression enhances more brightly."),
        Strength("irregularity", 0.8, "True progression has an irregular, lobulated rim."),
        Strength("size", 1.2, "True progression is larger."),
        Strength("oedema", 1.0, "True progression has a wider oedema."),
        Strength("mass", 0.8, "True progression displaces more tissue."),
    ),
}
TRAITS = ("enhancement", "necrosis", "sharpness", "age", "frontal", "patchiness", "irregularity", "rim", "size", "mass",
          "oedema")  # fmt: skip


@dataclass(frozen=True)
class Lesion:
    """A glioma in physical terms; lengths in mm, the rest relative."""

    radius_mm: float
    rim_mm: float
    necrosis: float  # radius of the necrosis over the radius of the tumour
    enhancement: float  # brightening of the rim after contrast agent, in units of white matter on T1
    irregularity: float
    patchiness: float
    oedema_mm: float
    oedema_edge_mm: float
    mass: float
    frontal: bool


@dataclass(frozen=True)
class LesionMaps:
    """Share of each voxel, 0 to 1, that is necrosis, enhancing rim, other solid tumour, oedema; and the texture."""

    necrosis: Floats
    rim: Floats
    solid: Floats
    oedema: Floats
    texture: Floats


def draw_hidden(rng: np.random.Generator, idh_shift: float = 0.0) -> dict[str, bool]:
    """Draws the true state of one person: whether each label is positive. Codeletion only ever with an IDH mutation."""
    draws = {name: bool(rng.random() < p + (idh_shift if name == "idh" else 0)) for name, p in PREVALENCE.items()}
    return {**draws, "codeletion": draws["codeletion"] and draws["idh"]}


def draw_traits(rng: np.random.Generator, hidden: dict[str, bool]) -> dict[str, float]:
    """Draws the traits that follow from the true state, in standard deviations."""
    traits = {name: float(rng.standard_normal()) for name in TRAITS}
    for label, strengths in STRENGTHS.items():
        for strength in strengths:
            traits[strength.trait] += strength.effect_sd * hidden[label]
    return traits


def lesion_from_traits(traits: dict[str, float], growth: float = 1.0) -> Lesion:
    """Maps traits to millimetres and shares; `growth` multiplies the radius (a follow-up)."""
    return Lesion(
        radius_mm=growth * _between(13, 30, 0.9 * traits["size"] - 0.8),
        rim_mm=_between(3.0, 11.0, 1.1 * traits["rim"] - 1.5),
        necrosis=_between(0.0, 0.85, 1.1 * traits["necrosis"] + 0.6),
        enhancement=_between(0.0, 1.0, 1.2 * traits["enhancement"] + 0.8),
        irregularity=_between(0.05, 0.30, traits["irregularity"] - 0.5),
        patchiness=_between(0.05, 0.80, 1.2 * traits["patchiness"] - 1.2),
        oedema_mm=_between(3, 16, traits["oedema"] - 0.5),
        oedema_edge_mm=_between(0.7, 4.0, -traits["sharpness"]),
        mass=_between(0.1, 0.6, traits["mass"] - 0.5),
        frontal=traits["frontal"] > 0.3,
    )


def lesion_maps(rng: np.random.Generator, lesion: Lesion, axes_mm: list[Floats], white: Floats,
                csf: Floats) -> LesionMaps:  # fmt: skip
    """Grows a lesion around the origin.

    Args:
        rng: Draws the shape.
        lesion: What to grow.
        axes_mm: Voxel positions relative to the lesion's centre, one vector an axis.
        white: Share of white matter, which oedema follows; shape (X, Y, Z).
        csf: Share of cerebrospinal fluid, which tumour does not enter; shape (X, Y, Z).
    """
    noise = [smooth_noise(rng, axes_mm, step) for step in (0.7 * lesion.radius_mm, 9.0, 12.0, 4.5)]
    depth = lesion.radius_mm * (1 - _ellipsoid(rng, axes_mm, lesion.radius_mm) * np.exp(lesion.irregularity * noise[0]))
    tissue = np.clip(1.25 * (1 - csf), 0, 1)
    tumour = _step(depth / 0.7) * tissue
    rim = tumour * _step((lesion.rim_mm * np.exp(1.5 * lesion.irregularity * noise[1]) - depth) / 0.7)
    dead = _step((depth - lesion.radius_mm * (1 - lesion.necrosis)) / 0.8) * (lesion.necrosis > 0.15)
    reach = lesion.oedema_mm * np.exp(0.25 * noise[2])
    oedema = _step((depth + reach) / lesion.oedema_edge_mm) * (1 - tumour) * np.clip(0.2 + 0.9 * white, 0, 1) * tissue
    return LesionMaps(dead * (tumour - rim), rim, (1 - dead) * (tumour - rim), oedema, lesion.patchiness * noise[3])


def segment(lesion: Lesion, maps: LesionMaps) -> NDArray[np.uint8]:
    """Labels each voxel: 0 no lesion, 1 necrosis and tumour that does not enhance, 2 oedema, 3 enhancing tumour."""
    enhancing = maps.rim if lesion.enhancement > 0.2 else np.zeros_like(maps.rim)
    core = maps.necrosis + maps.solid + maps.rim - enhancing
    shares = np.stack([1 - core - maps.oedema - enhancing, core, maps.oedema, enhancing])
    return shares.argmax(0).astype(np.uint8)


def paint(image: Floats, values: Floats, enhancement: float, maps: LesionMaps) -> Floats:
    """Puts the lesion into an image; `values` are those of necrosis, rim, solid tumour and oedema in this sequence."""
    necrosis, rim, solid, oedema = values
    bright = rim + enhancement * np.clip(1 + 0.8 * maps.texture, 0.2, 1.6)
    solid = solid * np.clip(1 + 0.5 * maps.texture, 0.4, 1.6)
    painted = maps.necrosis * necrosis + maps.rim * bright + maps.solid * solid + maps.oedema * oedema
    return image * (1 - maps.necrosis - maps.rim - maps.solid - maps.oedema) + painted


def smooth_noise(rng: np.random.Generator, axes_mm: list[Floats], step_mm: float) -> Floats:
    """Draws a smooth random field of mean 0 and variance 1: cubic B-splines on knots `step_mm` apart.

    Returns:
        One value per voxel, shape (len(axes_mm[0]), len(axes_mm[1]), len(axes_mm[2])).
    """
    bases = [_spline_basis(axis, step_mm) for axis in axes_mm]
    field = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    for basis in bases:  # each pass takes the leading axis and appends the finished one: the order comes out right
        field = np.tensordot(field, basis, axes=(0, 1))
    return field


def _spline_basis(axis_mm: Floats, step_mm: float) -> Floats:
    position = (axis_mm - axis_mm[0]) / step_mm
    knots = np.arange(-1, int(position[-1]) + 3)
    t = np.abs(position[:, None] - knots[None, :])
    basis = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
    return (basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32)


def _ellipsoid(rng: np.random.Generator, axes_mm: list[Floats], radius_mm: float) -> Floats:
    stretch = np.exp(0.12 * rng.standard_normal(3)) * radius_mm
    x, y, z = (axis / s for axis, s in zip(axes_mm, stretch, strict=True))
    return np.sqrt(x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None, :] ** 2).astype(np.float32)


def _step(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(2 * x, -30, 30))), np.float32)


def _between(low: float, high: float, z: float) -> float:
    return low + (high - low) / (1 + float(np.exp(-z)))
