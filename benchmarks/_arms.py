"""Who is compared in `learn.py`: the same encoder with different pasts, and things that need none.

Arms that pretrain take the same number of steps on the same exams. `placebo` takes them with the voxels of every volume
in random order: what it gains over `untrained` is no anatomy.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _cohort import SPACING_MM, Cohort
from _describe import Describer, Encoded, Histogram, Raw
from _supervised import Course
from torch import Tensor
from torch.nn.functional import avg_pool3d

from umbif.encoders.cnn import CNN3D
from umbif.encoders.vit import ViT3D
from umbif.fit import fit
from umbif.recipe.compose import Recipe, compose
from umbif.stream.patches import Patches

RECIPE = "pretrain/umbif_tiny"
NUM_STEPS, ABLATION_STEPS, WARMUP = 10_000, 3000, 100  # 2500 steps of contrast still cost head size and retrieval
QUIETLY = (
    "hardware=cpu", "callbacks.monitors=null", "data.num_workers=0", "data.cache_gib=3", "data.num_val_exams=0",
    "callbacks.checkpoint.every_n_steps=1000", "trainer.log_every_n_steps=50", f"model.warmup_steps={WARMUP}",
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
    "contrast": Arm("contrast alone, of all channels", overrides=(
        "model.reconstruction_weight=0", "model.contrast_weight=1", "model.contrast.channel_share=1")),
    "umbif": Arm("the hybrid"),
    "ssl_cerebral": Arm("the hybrid on large crops around tumours", overrides=(
        "data.around_tumour=true", "data.crop_size=[64,64,64]")),
}  # fmt: skip
ABLATED = {
    "no_contrast": Arm("without the contrast", overrides=PRETRAINED["mae"].overrides),
    "no_reconstruction": Arm("without the reconstruction", overrides=PRETRAINED["contrast"].overrides),
    "all_channels": Arm("all channels compared", overrides=("model.contrast.channel_share=1",)),
    "light": Arm("contrast weight .005", overrides=("model.contrast_weight=0.005",)),
    "heavy": Arm("contrast weight .02", overrides=("model.contrast_weight=0.02",)),
    "cold": Arm("temperature .2", overrides=("model.contrast.temperature=0.2",)),
    "whole": Arm("whole views compared, not sequences", overrides=("model.contrast.unit=view",)),
    "scattered": Arm("each view at a place of its own", overrides=("data.exams_per_place=0",)),
    "more": Arm("64 patches seen", overrides=("model.masking.num_visible=64",)),
    "asked_less": Arm("24 hidden patches decoded", overrides=("model.masking.num_targets=24",)),
    "shallow": Arm("decoder of one layer", overrides=("model.decoder.depth=1",)),
    "normalised": Arm("patches normalised one by one", overrides=("model.normalise_targets=true",)),
    "bright": Arm("curves of .4 instead of .1", overrides=("model.augmentation.curve=0.4",)),
    "rotary": Arm("rotary positions", overrides=("model.encoder.position=rotary",)),
    "cold_start": Arm("no warm-up", overrides=("model.warmup_steps=0",)),
}  # fmt: skip
UNTRAINED = {"untrained": "the same encoder with its first weights", "cnn": "an untrained EfficientNet-B0, at 4 mm"}
SUPERVISED = {"supervised": "untrained", "supervised_cnn": "cnn"}  # taught all labels, from these first weights
COURSES = {"supervised": Course(num_steps=2400, lr=3e-4), "supervised_cnn": Course(num_steps=100, lr=1e-3, budget=2)}
BASELINES: dict[str, Callable[[], Describer]] = {"histogram": Histogram, "raw": Raw}
TRUTH = "truth"
ABOUT = {
    TRUTH: "the phantom's own numbers: age, whether there is a tumour, and what it is like",
    "histogram": "intensities of each sequence, no training", "raw": "principal components of coarse voxels",
    **UNTRAINED, **{name: arm.about for name, arm in PRETRAINED.items()},
    "supervised": f"the same encoder, taught all training labels of the clinic ({COURSES['supervised']})",
    "supervised_cnn": f"EfficientNet-B0 at 4 mm, taught them too ({COURSES['supervised_cnn']})",
}  # fmt: skip
MOST_SEEDS = {TRUTH: 1, "histogram": 1, "raw": 1, "cnn": 2, "supervised_cnn": 2}  # no chance in it, or slow here
ARMS = (TRUTH, *BASELINES, *UNTRAINED, *PRETRAINED, *SUPERVISED)


class CoarseCNN(CNN3D):
    """A convolutional network at twice the spacing: at 2 mm, a step of eight exams takes it about a minute."""

    def forward(self, patches: Patches) -> tuple[Tensor, Tensor, Tensor]:
        """See `CNN3D.forward`."""
        return super().forward(replace(patches, voxels=avg_pool3d(patches.voxels, 2)))


def describer(arm: str, seed: int, cohort: Cohort, runs: Path, num_steps: int = NUM_STEPS) -> Describer:
    """What an arm makes of an exam; pretrains it where that has not been done.

    Args:
        arm: Of `PRETRAINED`, `ABLATED`, `UNTRAINED` or `BASELINES`.
        seed: Of first weights, views and masks.
        cohort: The exams.
        runs: Folder of the runs.
        num_steps: Of pretraining.
    """
    if arm in BASELINES:
        return BASELINES[arm]()
    torch.manual_seed(seed)
    if arm == "cnn":
        return Encoded(CoarseCNN("efficientnet_b0", voxel_mm=SPACING_MM))
    if arm == "untrained":
        return Encoded(encoder_of(compose(RECIPE)))
    recipe = recipe_of(arm, seed, cohort, runs, num_steps)
    encoder = encoder_of(recipe, fit(recipe))
    gc.collect()  # the Trainer and what it trained hold each other, and the decoded exams
    return Encoded(encoder)


def recipe_of(arm: str, seed: int, cohort: Cohort, runs: Path, num_steps: int) -> Recipe:
    """The recipe that pretrains an arm."""
    own = {**PRETRAINED, **ABLATED}[arm]
    place = [f"data.corpus={getattr(cohort, own.corpus)}", f"run.dir={runs / f'{arm}_{seed}'}", f"run.seed={seed}"]
    return compose(RECIPE, [*QUIETLY, f"trainer.max_steps={num_steps}", *own.overrides, *place])


def encoder_of(recipe: Recipe, weights: Path | None = None) -> ViT3D:
    """The encoder of a recipe, from a run where one is given."""
    config = {name: value for name, value in recipe.tree["model"]["encoder"].items() if name != "class_path"}
    return ViT3D(**{**config, "weights": None if weights is None else str(weights)})
