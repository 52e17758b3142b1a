"""Who is compared in `learn.py`: the same encoder with different pasts, and things that need none.

Arms that pretrain take the same number of steps on the same exams. `placebo` takes them with the voxels of every volume
in random order: what it gains over `untrained` is no anatomy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _cohort import Cohort
from _describe import Describer, Encoded, Histogram, Raw

from umbif.encoders.cnn import CNN3D
from umbif.encoders.vit import ViT3D
from umbif.fit import fit
from umbif.recipe import Recipe, compose

RECIPE = "pretrain/umbif_tiny"
NUM_STEPS, WARMUP = 2500, 100  # with 600, reconstruction has not yet learnt most of FLAIR from T1
QUIETLY = (
    "hardware=cpu", "callbacks.monitors=null", "data.num_workers=0", "data.cache_gib=3", "data.num_val_exams=0",
    "callbacks.checkpoint.every_n_steps=1000", "trainer.log_every_n_steps=50", f"trainer.max_steps={NUM_STEPS}",
    f"model.warmup_steps={WARMUP}",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One past of an encoder.

    Args:
        about: In words.
        corpus: Field of `Cohort` that it pretrains on.
        overrides: Of the recipe.
    """

    about: str
    corpus: str = "unlabelled"
    overrides: tuple[str, ...] = ()


PRETRAINED = {
    "placebo": Arm("the hybrid on shuffled voxels", "placebo"),
    "mae": Arm("reconstruction alone", overrides=("model.contrast_weight=0",)),
    "contrast": Arm("contrast alone", overrides=("model.reconstruction_weight=0", "model.contrast_weight=1")),
    "umbif": Arm("the hybrid"),
    "ssl_cerebral": Arm("the hybrid on large crops around tumours", overrides=(
        "data.around_tumour=true", "data.crop_size=[64,64,64]")),
}  # fmt: skip
UNTRAINED = {"untrained": "the same encoder with its first weights", "cnn": "an untrained EfficientNet-B0"}
SUPERVISED = {"supervised": "untrained", "supervised_cnn": "cnn"}  # taught all labels, from these first weights
BASELINES: dict[str, Callable[[], Describer]] = {"histogram": Histogram, "raw": Raw}
ABOUT = {
    "histogram": "intensities of each sequence, no training", "raw": "principal components of coarse voxels",
    **UNTRAINED, **{name: arm.about for name, arm in PRETRAINED.items()},
    "supervised": "the same encoder, taught all training labels of the clinic",
    "supervised_cnn": "EfficientNet-B0, taught all training labels of the clinic",
}  # fmt: skip
ARMS = (*BASELINES, *UNTRAINED, *PRETRAINED, *SUPERVISED)


def describer(arm: str, seed: int, cohort: Cohort, runs: Path) -> Describer:
    """What an arm makes of an exam; pretrains it where that has not been done.

    Args:
        arm: Of `PRETRAINED`, `UNTRAINED` or `BASELINES`.
        seed: Of first weights, views and masks.
        cohort: The exams.
        runs: Folder of the runs.
    """
    if arm in BASELINES:
        return BASELINES[arm]()
    torch.manual_seed(seed)
    if arm == "cnn":
        return Encoded(CNN3D("efficientnet_b0", voxel_mm=2.0))
    if arm == "untrained":
        return Encoded(encoder_of(compose(RECIPE)))
    recipe = recipe_of(arm, seed, cohort, runs)
    return Encoded(encoder_of(recipe, fit(recipe)))


def recipe_of(arm: str, seed: int, cohort: Cohort, runs: Path) -> Recipe:
    """The recipe that pretrains an arm."""
    own = PRETRAINED[arm]
    place = [f"data.corpus={getattr(cohort, own.corpus)}", f"run.dir={runs / f'{arm}_{seed}'}", f"run.seed={seed}"]
    return compose(RECIPE, [*QUIETLY, *own.overrides, *place])


def encoder_of(recipe: Recipe, weights: Path | None = None) -> ViT3D:
    """The encoder of a recipe, from a run where one is given."""
    config = {name: value for name, value in recipe.tree["model"]["encoder"].items() if name != "class_path"}
    return ViT3D(**{**config, "weights": None if weights is None else str(weights)})
