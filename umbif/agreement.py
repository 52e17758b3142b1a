"""What encoder, data and trainer of a recipe must agree on, and no one of them can know alone.

What would go wrong is refused; what makes a result doubtful is told.
"""

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from umbif.corpus.people import num_held_out
from umbif.encoders.weights import own_source, read_config, seen_by
from umbif.errors import Problem, UsageError
from umbif.hardware import Asked, num_processes, slow_precision
from umbif.recipe.build import Built
from umbif.scale.choice import strategy_problems

PRECISIONS = ("32-true", "bf16-mixed", "32", "bf16")  # and how Lightning also spells them
VOXEL_VALUES = ("spacing_mm", "clip_percentiles", "allow_faces")  # of a preparation: what voxels depend on


def refuse_disagreement(built: Built) -> None:
    """Refuses what would go wrong without a word.

    Raises:
        UsageError: Encoder and voxels of the corpus do not fit, a crop is smaller than a patch, contrast has nothing
            to match, batch norm would differ between processes, precision or strategy is none of ours, or it cannot do
            what the model asks; all of them are named.
    """
    problems = [*scale_problems(built), *sibling_problems(built), *precision_problems(built)]
    problems += [*norm_problems(built), *strategy_problems(built.trainer_args, built.model)]
    if problems:
        raise UsageError(problems, f"the recipe, with {built.data.corpus.folder}")


def doubts(built: Built) -> list[str]:
    """What to say before a result is believed, or waited for."""
    said = (known_people(built), other_preparation(built), slow_precision(built.trainer_args))
    return [one for one in said if one]


def known_people(built: Built) -> str:
    """What to say where the encoder has learnt from exams that are held out now; nothing where it has not."""
    encoder = built.model.encoder
    if own_source(encoder) is not None and encoder.seen is None:
        return "The encoder came without seen.txt: nobody can tell whether it has learnt from what is held out here"
    num_exams, num_known = num_held_out(built.data.corpus, seen_by(encoder))
    if not num_known:
        return ""
    cure = "Pretrain again without them, or mistrust the result"
    return f"The encoder has learnt from {num_known} of the {num_exams} exams that are held out here. {cure}"


def other_preparation(built: Built) -> str:
    """What to say where the encoder has learnt from exams that were prepared in another way."""
    source = own_source(built.model.encoder)
    then = read_config(source).get("preparation", {}) if source is not None else {}
    now = built.data.corpus.about["preparation"]
    differing = [key for key in VOXEL_VALUES if key in then and then[key] != now.get(key)]
    said = ", ".join(f"{key} was {then[key]} and is {now.get(key)}" for key in differing)
    return f"The encoder has learnt from exams that were prepared otherwise: {said}" if said else ""


def scale_problems(built: Built) -> Iterator[Problem]:
    """An encoder for another voxel size: its positions and shapes would be wrong."""
    encoder, spacing_mm = built.model.encoder, built.data.corpus.spacing_mm
    if abs(encoder.voxel_mm - spacing_mm) > 1e-3:
        cure = f"Take a recipe for {spacing_mm:g} mm (umbif ls), or prepare the corpus at {encoder.voxel_mm:g} mm"
        yield Problem(f"the encoder is made for voxels of {encoder.voxel_mm:g} mm", f"{spacing_mm:g} mm", cure)
    crop, patch = getattr(built.data, "crop_size", None), getattr(encoder, "patch_size", 1)
    if crop is not None and min(crop) < patch:
        yield Problem(f"data.crop_size must hold a patch of {patch} voxels along each side", f"{list(crop)}")


def sibling_problems(built: Built) -> Iterator[Problem]:
    """A contrast without views to compare, or without a sequence that they share: it would teach nothing."""
    contrast, policy = getattr(built.model, "contrast", None), getattr(built.data, "policy", {})
    if contrast is not None and policy.get("num_views") == 1:
        cure = "Set it to 2, or model.contrast_weight=0"
        yield Problem("data.num_views must give the contrast views to compare", "1", cure)
    share = policy.get("disjoint_share")
    if contrast is not None and contrast.options.unit == "sequence" and share == 1:
        cure = "Set it below 1, or model.contrast.unit=view"
        yield Problem("data.disjoint_share must leave views that share a sequence to compare", f"{share:g}", cure)


def norm_problems(built: Built) -> Iterator[Problem]:
    """Batch norm of several processes: each would have statistics of its own, and a checkpoint those of one."""
    asked, synced = Asked.of(built.trainer_args), built.trainer_args.get("sync_batchnorm")
    norms = [module for module in built.model.modules() if isinstance(module, _BatchNorm)]
    learns = any(weight.requires_grad for norm in norms for weight in norm.parameters())
    several = (asked.num_processes or num_processes(built.trainer_args)) > 1
    if learns and several and (not synced or asked.kind == "cpu"):
        cure = "Set model.encoder.norm=group, or, on GPUs, trainer.sync_batchnorm=true"
        yield Problem("model.encoder.norm=batch takes its statistics from one process of several", cure=cure)


def precision_problems(built: Built) -> Iterator[Problem]:
    """Half precision with a loss scale: the gradient would be clipped while it is scaled."""
    precision = built.trainer_args.get("precision") or "32-true"
    if str(precision) not in PRECISIONS:
        yield Problem(f"trainer.precision must be {' or '.join(PRECISIONS[:2])}", str(precision))
