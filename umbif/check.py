"""What `umbif check` does: everything that can fail before an hour is spent."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from umbif.fit import check_together, known_people, refuse_wrong
from umbif.quiet import quiet
from umbif.recipe import Recipe
from umbif.recipe_check import Built, build, construct


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
    check_together(built)
    parameters = count(built.model.parameters())
    encoder = count(built.model.encoder.parameters())
    start = time.perf_counter()
    batch = next(iter(built.data.train_dataloader()))
    read_s = time.perf_counter() - start
    sequences = batch.present.sum(1).float().mean().item()
    return "\n".join([
        f"{recipe.name}: no problem found",
        f"  parameters   {parameters / 1e6:.2f} million, {encoder / 1e6:.2f} million of them in the encoder",
        f"  starts from  {start_of(built)}",
        f"  corpus       {len(built.data.corpus)} exams at {built.data.corpus.spacing_mm:g} mm",
        f"  batch        {len(batch)} views of {' x '.join(map(str, batch.image.shape[2:]))} voxels, "
        f"{sequences:.1f} sequences each, read in {read_s:.2f} s",
        f"  hardware     {hardware(built.trainer_args)}",
        f"  run folder   {recipe.tree['run']['dir']}",
    ])  # fmt: skip


def start_of(built: Built) -> str:
    """Where the encoder's weights come from, and what makes a result of it doubtful."""
    loaded = getattr(built.model.encoder, "loaded", None)
    start = str(loaded["source"]) if loaded else "nothing: its weights are random"
    return ". ".join(filter(None, (start, known_people(built))))


def hardware(trainer: Mapping[str, Any]) -> str:
    """What a recipe asks for; on the login node of a cluster it is not there, and that is no mistake."""
    kind, wanted = str(trainer.get("accelerator", "auto")), trainer.get("devices", "auto")
    nodes = trainer.get("num_nodes", 1)
    asked = f"{wanted} x {kind}" + (f" on each of {nodes} nodes" if nodes != 1 else "")
    there = torch.cuda.device_count()
    if kind not in ("gpu", "cuda") or (isinstance(wanted, int) and wanted <= there):
        return asked
    return f"{asked}; this machine has {there or 'none'}: fit will need one that has"


def count(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Numbers in some parameters."""
    return sum(p.numel() for p in parameters)
