"""What frozen features are worth: do neighbours share a label, can a line tell the classes apart, have they collapsed?

Pure functions of arrays. No exam is ever judged by another exam of its own person.
Shapes: N exams, E width.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Array = npt.NDArray[Any]
MISSING = ""
MIN_PERSONS = 5  # of a class: with fewer, one person more or less decides
TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al. 2018)
PENALTY_C = 0.1  # exams are fewer than features: a strong penalty


def answerable(labels: Array, persons: Array, min_persons: int = MIN_PERSONS) -> npt.NDArray[np.bool_]:
    """Rows that can be asked about: of classes that `min_persons` persons belong to, where two such classes are left.

    Args:
        labels: (N,) text; the empty text is missing.
        persons: (N,).
        min_persons: Of a class.
    """
    known = [c for c in np.unique(labels[labels != MISSING]) if len(np.unique(persons[labels == c])) >= min_persons]
    return np.isin(labels, known) if len(known) > 1 else np.zeros(len(labels), dtype=bool)


def knn_accuracy(features: Array, labels: Array, persons: Array, neighbours: int = 5) -> float:
    """Share of exams whose class their nearest exams of other persons tell, as the mean over the classes.

    Neighbours by cosine vote with exp(cosine / temperature) (Wu et al. 2018, arXiv:1805.01978; Caron et al. 2021,
    arXiv:2104.14294). As the mean over classes, chance is one over their number however unequal they are.

    Args:
        features: (N, E).
        labels: (N,) text; the empty text is missing.
        persons: (N,) of which exams are never each other's neighbours.
        neighbours: That vote.

    Returns:
        From 0 to 1; NaN where fewer than two classes have `MIN_PERSONS` persons, or features are not finite.
    """
    keep = answerable(labels, persons)
    if not keep.any() or not np.isfinite(features).all():
        return float("nan")
    classes, y = np.unique(labels[keep], return_inverse=True)
    similarity = _normalised(features[keep]) @ _normalised(features[keep]).T
    similarity[persons[keep][:, None] == persons[keep]] = -np.inf
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :neighbours]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / TEMPERATURE)  # 0 for the own person
    votes = np.stack([(weights * (y[nearest] == c)).sum(1) for c in range(len(classes))], axis=1)
    right = votes.argmax(1) == y
    return float(np.mean([right[y == c].mean() for c in range(len(classes))]))


def persons_of_rarest(y: Array, persons: Array) -> int:
    """Persons of the class that fewest have: as many folds can hold one of each class, and no person stands in two."""
    return min(len(np.unique(persons[y == label])) for label in np.unique(y))


def linear_probe(features: Array, labels: Array, persons: Array, folds: int = 5, seed: int = 0) -> float:
    """Area under the ROC curve of a logistic regression on frozen features (Alain and Bengio 2016, arXiv:1610.01644).

    Cross-validated in folds that no person spans, and averaged over them: scores of different fits are not compared.
    More than two classes: each against the rest, averaged.

    Args:
        features: (N, E).
        labels: (N,) text; the empty text is missing.
        persons: (N,).
        folds: Most folds; no more than the rarest class has persons.
        seed: Of the folds.

    Returns:
        0.5 at chance; NaN where fewer than two classes have `MIN_PERSONS` persons, or features are not finite.
    """
    keep = answerable(labels, persons)
    if not keep.any() or not np.isfinite(features).all():
        return float("nan")
    x, (classes, y), groups = features[keep], np.unique(labels[keep], return_inverse=True), persons[keep]
    folds = min(folds, persons_of_rarest(y, groups))
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups)
    areas = [_area(x, y, train, test) for train, test in parts if all_classes(y, len(classes), train, test)]
    return float(np.mean(areas)) if areas else float("nan")


def rank_me(features: Array) -> float:
    """How many directions features fill: exp of the entropy of their normalised singular values.

    RankMe (Garrido et al. 2023, arXiv:2210.02885, equations 1 and 2): from 1, all features alike, to min(N, E).

    Args:
        features: (N, E).
    """
    if not np.isfinite(features).all():
        return float("nan")
    values = np.linalg.svd(np.asarray(features, dtype=np.float64), compute_uv=False)
    share = values / max(values.sum(), np.finfo(np.float64).tiny) + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def feature_std(features: Array) -> float:
    """Spread of normalised features over exams: 1 in all directions alike, 0 after a collapse to one point.

    Mean over dimensions of the standard deviation of L2-normalised features, times sqrt(E), as watched in SimSiam
    (Chen and He 2021, arXiv:2011.10566, section 4.1).

    Args:
        features: (N, E).
    """
    return float(_normalised(features).std(axis=0).mean() * np.sqrt(features.shape[1]))


def _normalised(features: Array) -> npt.NDArray[np.float64]:
    x = np.asarray(features, dtype=np.float64)
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))


def all_classes(y: Array, num: int, *parts: Array) -> bool:
    """Whether each of some parts has all of the classes."""
    return all(len(np.unique(y[part])) == num for part in parts)


def _area(x: Array, y: Array, train: Array, test: Array) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY_C, max_iter=1000))
    scores = model.fit(x[train], y[train]).predict_proba(x[test])
    scores = scores[:, 1] if scores.shape[1] == 2 else scores
    return float(roc_auc_score(y[test], scores, multi_class="ovr"))
