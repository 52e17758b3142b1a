"""Features of every exam of the clinic, each shown in every way, and what the tasks ask of them.

Shapes: N exams, F features of an exam, P asked places, G features of a place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from _describe import Describer
from _inputs import Shown
from sklearn.decomposition import PCA

Array = npt.NDArray[Any]
TRAITS = ("radius_mm", "rim_mm", "necrosis", "enhancement", "irregularity", "patchiness", "oedema_mm", "oedema_edge_mm",
          "mass", "frontal")  # fmt: skip
AS_THEY_ARE = ("lesion", "flair", "half_a", "half_b")  # places, and what is compared with each other
MANY, NUM_COMPONENTS = 2048, 128  # of more features than MANY, so many principal components stand for them


def features_of(describer: Describer, exams: Sequence[Shown], train: Array) -> dict[str, Array]:
    """Features by the name that tasks call them: `whole`, `alone`, `half_a`, `half_b`, `lesion`, `flair`, `tumour`.

    Args:
        describer: Of one exam.
        exams: All of the clinic.
        train: (N,) bool; principal components come from these, without their labels.

    Returns:
        (N, F), and (N, P, G) of places; NaN where an exam cannot be shown that way.
    """
    described = [shown_all_ways(describer, exam) for exam in exams]
    found = {name: [one[name] for one in described] for name in described[0]}
    stacked = {name: filled(parts) for name, parts in found.items() if any(part is not None for part in parts)}
    whole = {name: completed(x, train) for name, x in stacked.items()}
    return {name: x if name in AS_THEY_ARE else reduced(x, train) for name, x in whole.items()}


def shown_all_ways(describer: Describer, exam: Shown) -> dict[str, Array | None]:
    """One exam, shown in every way."""
    whole, alone = describer(exam.whole, exam.places, exam.tumour), describer(exam.alone)
    half_a, half_b = (None, None) if exam.halves is None else (describer(half).together for half in exam.halves)
    return {
        "whole": whole.by_sequence, "lesion": whole.places, "half_a": half_a, "half_b": half_b, "alone": alone.together,
        "flair": None if exam.t1 is None else describer(exam.t1, exam.places).places, "tumour": whole.tumour,
    }  # fmt: skip


def filled(parts: Sequence[Array | None]) -> Array:
    """Stacks, with NaN for what is missing."""
    like = next(part for part in parts if part is not None)
    missing = np.full_like(like, np.nan, dtype=np.float32)
    return np.stack([missing if part is None else part for part in parts]).astype(np.float32)


def completed(x: Array, train: Array) -> Array:
    """What an exam lacks, a sequence say, takes the mean of the training exams; what all of them lack is dropped."""
    known = np.isfinite(x)
    missing = ~known.any(axis=tuple(range(1, x.ndim)), keepdims=True)  # exams that cannot be shown this way
    over = tuple(range(x.ndim - 1))
    usual = np.where(known, x, 0)[train].sum(over) / known[train].sum(over).clip(1)
    kept = known[train].any(over)
    return np.where(known | missing, x, usual)[..., kept].astype(np.float32)


def reduced(x: Array, train: Array) -> Array:
    """Principal components of features that are many."""
    known = np.isfinite(x).all(1)
    if x.shape[1] <= MANY:
        return x
    num = min(NUM_COMPONENTS, int((known & train).sum()) - 1)
    pca = PCA(num, random_state=0).fit(x[known & train])
    out = np.full((len(x), num), np.nan, np.float32)
    out[known] = pca.transform(x[known])
    return out


def traits_of(truth: pd.DataFrame, train: Array) -> dict[str, Array]:
    """The phantom's own numbers as features (N, F): age, whether there is a tumour, and what it is like."""
    healthy = truth["healthy"].to_numpy(dtype=bool)
    traits = np.where(healthy[:, None], np.nan, truth[list(TRAITS)].to_numpy(dtype=np.float32))
    return {"whole": completed(np.column_stack([truth["age"], healthy, traits]), train)}


def targets_of(exams: Sequence[Shown], truth: pd.DataFrame) -> pd.DataFrame:
    """What is asked about each exam, as numbers; NaN where the question has no answer."""
    ill = ~truth["healthy"].to_numpy(dtype=bool)
    lesion = np.array([exam.lesion_voxels for exam in exams], dtype=np.float64)
    table = {
        "person": truth["person"].to_numpy(), "test": (truth["split"] == "test").to_numpy(),
        "site": truth["site"].astype("category").cat.codes.to_numpy(float), "age": truth["age"].to_numpy(float),
        "alone_is": [float(exam.alone_is) for exam in exams],
        "log_brain": np.log([exam.brain_voxels for exam in exams]), "ill": ill.astype(float),
        "log_lesion": np.where(ill, np.log(np.maximum(lesion, 1)), np.nan),
        "enhancing": np.where(ill, truth["enhancement"] > 0.2, np.nan),
    }  # fmt: skip
    names = ("idh", "codeletion", "mgmt", "progression")
    return pd.DataFrame(table | {name: np.where(ill, truth[name], np.nan) for name in names})


def places_of(exams: Sequence[Shown]) -> dict[str, Array]:
    """What is asked about the places of each exam: (N, P), (N, P, 3) and (N, P, 8)."""
    return {
        "is_lesion": np.stack([exam.is_lesion for exam in exams]).astype(np.float32),
        "position_mm": np.stack([exam.position_mm for exam in exams]),
        "flair": filled([exam.flair for exam in exams]),
    }


def save(path: Path, features: dict[str, Array]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as file:
        np.savez(file, **features)
    aside.rename(path)


def load(path: Path) -> dict[str, Array]:
    """What `save` wrote."""
    with np.load(path) as found:
        return dict(found)
