"""The short form of `learn.py`: has pretraining learnt what sequences look like? A check of the machinery, no evidence.

The mean token of one sequence, shown without its name, is asked for the family of its contrast: T1, T2 or FLAIR.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _arms import QUIETLY, RECIPE, encoder_of
from _cells import Cell, append, cell, read_cells
from _cohort import CLINIC_SEED, TEST_FRACTION, UNLABELLED_SEED, make_corpus
from _inputs import FLAIR, T1, T1CE, T2, Shown, read
from _probes import Question, probed, scored
from _report import print_table
from _tasks import Task

from umbif.corpus.shards import Corpus
from umbif.encoders.vit import ViT3D
from umbif.fit import fit
from umbif.recipe.compose import compose

Array = npt.NDArray[Any]
NUM_UNLABELLED, NUM_CLINIC, NUM_STEPS, WARMUP = 64, 100, 600, 30
NUM_LABELS = 32
EXPECTED_GAIN = 0.10  # of accuracy
FAMILY = {T1: 0, T1CE: 0, T2: 1, FLAIR: 2}
TASK = Task("contrast family", "T1, T2 or FLAIR?", "classes", "alone", "")


def quick_cells(folder: Path, seed: int = 0) -> list[Cell]:
    """The cells of an untrained and of a pretrained encoder; they are lines of a file in `folder` too."""
    unlabelled = make_corpus(folder, "unlabelled", NUM_UNLABELLED, UNLABELLED_SEED)
    clinic = Corpus(make_corpus(folder, "clinic", NUM_CLINIC, CLINIC_SEED, TEST_FRACTION))
    exams = list(read(clinic, np.arange(len(clinic))))
    steps = [f"trainer.max_steps={NUM_STEPS}", f"model.warmup_steps={WARMUP}"]
    place = [f"data.corpus={unlabelled}", f"run.dir={folder / f'umbif_{seed}'}", f"run.seed={seed}"]
    recipe = compose(RECIPE, [*QUIETLY, *steps, *place])
    torch.manual_seed(seed)
    encoders = {"untrained": encoder_of(recipe), "umbif": encoder_of(recipe, fit(recipe))}
    cells = [{"arm": arm, "seed": seed, **family_cell(one, clinic, exams)} for arm, one in encoders.items()]
    known = read_cells(folder / "quick.jsonl")
    append(folder / "quick.jsonl", [one for one in cells if one not in known])
    return cells


def family_cell(encoder: ViT3D, clinic: Corpus, exams: list[Shown]) -> Cell:
    """How often the family is told of exams of the test people."""
    family = np.array([FAMILY[exam.alone_is] for exam in exams])
    person, split = (clinic.exams[name].to_numpy() for name in ("person", "split"))
    question = Question(TASK, mean_tokens(encoder, exams), family, np.arange(len(exams)), person, split == "test")
    return cell(TASK, "linear", NUM_LABELS, scored(question, probed(question, "linear", NUM_LABELS)))


@torch.no_grad()
def mean_tokens(encoder: ViT3D, exams: list[Shown]) -> Array:
    """(N, E) of one sequence of each exam."""
    return np.stack([encoder.eval().forward_features(exam.alone)[2][0].numpy() for exam in exams])


def told(cells: list[Cell]) -> None:
    """Prints the accuracies."""
    untrained, hybrid = (cell["score"] for cell in cells)
    lines = [(cell["arm"], f"{cell['score']:.3f}") for cell in cells]
    gain = hybrid - untrained
    verdict = "as expected" if gain >= EXPECTED_GAIN else "less than expected"
    title = f"Contrast family, {NUM_LABELS} labels"
    print_table(title, ("", "accuracy"), [*lines, ("gain", f"{gain:+.3f}, {verdict} (at least {EXPECTED_GAIN:.2f})")])
