"""Who was learnt from, told without naming anybody."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from umbif.corpus.shards import BRAIN, TUMOUR, Corpus

MARK_LENGTH = 12  # hexadecimal digits: among a million images hardly two are alike


def people_of(corpus: Corpus) -> str:
    """A name for who may be learnt from: labels that come later may change it, and the corpus keeps its identity."""
    return digest(corpus.exams[["exam", "person", "split"]])


def digest(exams: pd.DataFrame) -> str:
    """The same for tables of equal content."""
    return hashlib.sha256(exams.to_csv(index=False).encode()).hexdigest()


def learnt_from(corpus: Corpus, people: str) -> dict[str, Any]:
    """What is kept with weights about the exams that made them, and who of these `people` names."""
    return {"corpus": corpus.identity, "preparation": corpus.about["preparation"], "people": people}


def marks(corpus: Corpus, rows: npt.NDArray[np.int64]) -> frozenset[str]:
    """One mark for each image of some rows of `corpus.exams`: the same in any corpus, however it was prepared.

    A mark is the beginning of the SHA-256 of the voxels. It tells of an image only to who has that image.
    """
    images = _images(corpus)
    return frozenset(images.loc[images["exam"].isin(corpus.exams["exam"].iloc[rows]), "mark"])


def num_held_out(corpus: Corpus, seen: frozenset[str] = frozenset()) -> tuple[int, int]:
    """How many exams are held out, and of how many of them an image is among those seen."""
    images = _images(corpus)
    held_out = images[images["split"] == "test"]
    return held_out["exam"].nunique(), held_out.loc[held_out["mark"].isin(seen), "exam"].nunique()


def _images(corpus: Corpus) -> pd.DataFrame:
    images = corpus.index[~corpus.index["name"].isin([BRAIN, TUMOUR])]
    return images[["exam", "split"]].assign(mark=images["voxel_sha256"].str[:MARK_LENGTH])
