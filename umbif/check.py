"""What `umbif check` does: everything that can fail before an hour is spent."""

import time
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from umbif.agreement import doubts, refuse_disagreement
from umbif.fit import refuse_wrong
from umbif.hardware import Asked, missing
from umbif.quiet import quiet
from umbif.recipe.build import Built, build, construct
from umbif.recipe.compose import Recipe
from umbif.stream.exams import Exams
from umbif.stream.modules import killed


def check_recipe(recipe: Recipe) -> str:
    """Composes, checks types, builds, and reads one batch.

    Returns:
        What was found to be in order, for people.

    Raises:
        UsageError: All problems at once.
    """
    quiet()
    if "model" not in recipe.tree:
        return f"{recipe.name}: {construct(recipe)}"
    refuse_wrong(recipe)
    built = build(recipe)
    refuse_disagreement(built)
    parameters = count(built.model.parameters())
    encoder = count(built.model.encoder.parameters())
    num_processes = Asked.of(built.trainer_args).num_processes or 1
    start = time.perf_counter()
    batch = first_batch(built.data, num_processes)
    read_s = time.perf_counter() - start
    sequences = batch.present.sum(1).float().mean().item()
    return "\n".join([
        f"{recipe.name}: no problem found",
        f"  parameters   {parameters / 1e6:.2f} million, {encoder / 1e6:.2f} million of them in the encoder",
        f"  starts from  {start_of(built)}",
        f"  corpus       {len(built.data.corpus)} exams at {built.data.corpus.spacing_mm:g} mm",
        f"  length       {length(built)}",
        f"  batch        {len(batch)} views of {' x '.join(map(str, batch.image.shape[2:]))} voxels, "
        f"{sequences:.1f} sequences each, read in {read_s:.2f} s"
        + (f"; on each of {num_processes} processes" if num_processes > 1 else ""),
        f"  hardware     {hardware(built.trainer_args)}",
        f"  run folder   {recipe.tree['run']['dir']}",
        *(f"  but          {doubt}" for doubt in doubts(built)),
    ])  # fmt: skip


def length(built: Built) -> str:
    """Steps, and how often each exam comes: a small data set is soon known by heart."""
    num_steps, micro_steps = built.trainer_args["max_steps"], built.trainer_args.get("accumulate_grad_batches") or 1
    size, num_exams = built.data.global_batch_size * micro_steps, built.data.num_train_exams
    passes = num_steps * size / num_exams
    return f"{num_steps} steps of {size} exams: {passes:.{0 if passes >= 10 else 1}f} times each of {num_exams}"


def start_of(built: Built) -> str:
    """Where the encoder's weights come from."""
    loaded = getattr(built.model.encoder, "loaded", None)
    return str(loaded["source"]) if loaded else "nothing: its weights are random"


def hardware(trainer: Mapping[str, Any]) -> str:
    """What a recipe asks for; on the login node of a cluster it is not there, and that is no mistake."""
    asked = Asked.of(trainer)
    lacking = missing(asked)
    return f"{asked}; {lacking}: fit will need one that has" if lacking else str(asked)


def first_batch(data: Any, num_processes: int) -> Exams:
    """The share of the first of some processes, so that a recipe for many can be checked where there is room for one.

    Raises:
        UsageError: They cannot share the batch.
        UmbifError: A reading process was killed.
    """
    if num_processes > 1:  # a stand-in for the Trainer, which cannot be built where its hardware is not
        data.trainer = SimpleNamespace(global_rank=0, world_size=num_processes, num_devices=1)
    try:
        return next(iter(data.train_dataloader()))
    except RuntimeError as error:
        answer = killed(error)
        if answer is None:
            raise
        raise answer from error


def count(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Numbers in some parameters."""
    return sum(p.numel() for p in parameters)
