"""What frozen features are asked on held-out exams, from easy to hard, and how an answer is scored."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from umbif.evaluation.statistics import weighted_auc

Array = npt.NDArray[Any]
Kind = Literal["classes", "binary", "number", "pairs"]


@dataclass(frozen=True)
class Task:
    """One question.

    Args:
        name: In files and tables.
        asks: In words.
        kind: Classes are scored by accuracy, two of them by AUC, numbers by R², pairs by
            how many others are less alike.
        features: Which features of an exam answer it, see `_features.py`.
        target: Column of the table of targets.
        is_trivial: Intensities, or an encoder's first weights, answer it: a check of the machinery, no evidence.
    """

    name: str
    asks: str
    kind: Kind
    features: Literal["whole", "alone", "lesion", "flair", "halves", "tumour"]
    target: str
    is_trivial: bool = False


TASKS = (
    Task("site", "Which of three scanners?", "classes", "whole", "site", is_trivial=True),
    Task("contrast", "Which sequence is this, without its name?", "classes", "alone", "alone_is", is_trivial=True),
    Task("head size", "How large is the brain?", "number", "whole", "log_brain", is_trivial=True),
    Task("age", "How old? The ventricles tell, and the tumour a little.", "number", "whole", "age"),
    Task("lesion", "Is there a tumour?", "binary", "whole", "ill"),
    Task("lesion volume", "How large is the tumour?", "number", "whole", "log_lesion"),
    Task("enhancing", "Does the tumour take up contrast agent?", "binary", "whole", "enhancing"),
    Task("idh", "Hidden biomarker, strong", "binary", "whole", "idh"),
    Task("codeletion", "Hidden biomarker, medium", "binary", "whole", "codeletion"),
    Task("mgmt", "Hidden biomarker, weak", "binary", "whole", "mgmt"),
    Task("progression", "Hidden biomarker, strong", "binary", "whole", "progression"),
    Task("lesion patches", "Is this patch tumour?", "binary", "lesion", "is_lesion"),
    Task("flair from t1", "What does FLAIR show here, from T1 alone?", "number", "flair", "flair"),
    Task("enhancing, place known", "The tumour's own patches are asked", "binary", "tumour", "enhancing"),
    Task("idh, place known", "The tumour's own patches are asked", "binary", "tumour", "idh"),
    Task("codeletion, place known", "The tumour's own patches are asked", "binary", "tumour", "codeletion"),
    Task("progression, place known", "The tumour's own patches are asked", "binary", "tumour", "progression"),
    Task("retrieval", "Which exam do these other sequences belong to?", "pairs", "halves", ""),
)  # fmt: skip
METRIC = {"classes": "accuracy", "binary": "AUC", "number": "R²", "pairs": "rank"}


def score(kind: Kind, y: Array, answer: Array, weights: Array) -> Array:
    """The score under each weighting of the test rows.

    Args:
        kind: Of the task.
        y: (n,) truth; of numbers, (n, k).
        answer: (n, classes), (n,) or (n, k); of pairs, the likeness (n, n) of each row to each.
        weights: (W, n) how often each row counts.

    Returns:
        (W,).
    """
    if kind == "classes":
        return weights @ (answer.argmax(1) == y) / weights.sum(1)
    if kind == "pairs":
        return weights @ ranks(answer) / weights.sum(1)
    if kind == "binary":
        return weighted_auc(pd.DataFrame({"y": y, "score": answer}), weights)
    return explained(y, answer, weights)


def ranks(likeness: Array) -> Array:
    """Share of others that are less like a row than its partner: 1 for the nearest, 0.5 by chance; ties count half."""
    own, others = np.diag(likeness)[:, None], np.isfinite(likeness) & ~np.eye(len(likeness), dtype=bool)
    return (((likeness < own) + (likeness == own) / 2) * others).sum(1) / others.sum(1)


def explained(y: Array, answer: Array, weights: Array) -> Array:
    """Weighted R² against the mean of the test rows, of all columns together."""
    y, answer = y.reshape(len(y), -1), answer.reshape(len(y), -1)
    mean = weights @ y / weights.sum(1, keepdims=True)  # (W, k)
    total = weights @ (y**2).sum(1) - weights.sum(1) * (mean**2).sum(1)
    return 1 - weights @ ((y - answer) ** 2).sum(1) / total
