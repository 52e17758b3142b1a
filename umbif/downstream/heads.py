"""From an exam's tokens to one logit.

Shapes: B exams, V tokens, E width, F features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from torch import Tensor, nn

from umbif.encoders.pooling import pooled
from umbif.encoders.probing import all_classes, persons_of_rarest
from umbif.ranges import PositiveShare, ShareBelowOne

NUM_FOLDS = 5
INVERSE_PENALTIES = np.logspace(-5, 1, 7)


@dataclass(frozen=True)
class HeadOptions:
    """What a head takes from the tokens.

    Args:
        extreme_share: See `extremes`.
        dropout: Of the features.
    """

    extreme_share: PositiveShare = 0.015
    dropout: ShareBelowOne = 0.0


class ExtremesHead(nn.Module):
    """A linear layer on the mean token and on the largest and smallest values of each channel.

    Args:
        embed_dim: E.
        options: See there.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, embed_dim: int, options: HeadOptions = HeadOptions()) -> None:
        super().__init__()
        self.extreme_share = options.extreme_share
        self.register_buffer("center", torch.zeros(3 * embed_dim))
        self.register_buffer("spread", torch.ones(3 * embed_dim))
        self.dropout, self.linear = nn.Dropout(options.dropout), nn.Linear(3 * embed_dim, 1)

    def features(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """(B, F) of tokens (B, V, E), and which of them are valid (B, V)."""
        return pooled(tokens, valid, self.extreme_share)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) to logits (B,), in full precision: in half of it many exams would share a score."""
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(self.dropout((features.float() - self.center) / self.spread))[:, 0]

    def start_from(self, features: Tensor, y: npt.NDArray[np.int64], person: npt.NDArray[np.int64]) -> None:
        """Takes the logistic regression of the training exams' features, its penalty chosen on held-out people.

        Where one person alone has a class nobody can be held out, and the penalty is the strongest.

        A head that begins at random sends its errors into the encoder and spoils what was learnt there (Kumar et al.
        2022, arXiv:2202.10054).

        Args:
            features: (N, F).
            y: (N,) of 0 and 1.
            person: (N,).
        """
        spread, center = torch.std_mean(features, dim=0)
        self.center.copy_(center)
        self.spread.copy_(torch.where(spread > 1e-6, spread, 1))  # what does not vary must not be blown up once it does
        x = ((features - self.center.cpu()) / self.spread.cpu()).double().numpy()
        model = _logistic_regression(x, y, _folds(x, y, person))
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(model.coef_))
            self.linear.bias.copy_(torch.from_numpy(model.intercept_))


def _folds(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64], person: npt.NDArray[np.int64]) -> list[Any]:
    """Of people, each fold with both classes on both sides."""
    num_folds = min(NUM_FOLDS, persons_of_rarest(y, person))
    if num_folds < 2:
        return []
    return [fold for fold in StratifiedGroupKFold(num_folds).split(x, y, person) if all_classes(y, 2, *fold)]


def _logistic_regression(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64], folds: list[Any]) -> LogisticRegression:
    if not folds:
        return LogisticRegression(C=INVERSE_PENALTIES[0], max_iter=1000).fit(x, y)
    penalties = {"C": INVERSE_PENALTIES}
    search = GridSearchCV(LogisticRegression(max_iter=1000), penalties, scoring="neg_log_loss", cv=folds)
    return search.fit(x, y).best_estimator_
