"""From an exam's tokens to one logit.

Shapes: B exams, V tokens, E width, F features.
"""

from dataclasses import dataclass

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
        """(B, F) to logits (B,)."""
        return self.linear(self.dropout((features - self.center) / self.spread))[:, 0]

    def start_from(self, features: Tensor, y: npt.NDArray[np.int64], person: npt.NDArray[np.int64]) -> None:
        """Takes the logistic regression of the training exams' features, its penalty chosen on held-out people.

        A head that begins at random sends its errors into the encoder and spoils what was learnt there (Kumar et al.
        2022, arXiv:2202.10054).

        Args:
            features: (N, F).
            y: (N,) of 0 and 1.
            person: (N,).
        """
        spread, center = torch.std_mean(features, dim=0)
        self.center.copy_(center)
        self.spread.copy_(spread.clamp_min(1e-6))
        x = ((features - self.center.cpu()) / self.spread.cpu()).double().numpy()
        num_folds = min(NUM_FOLDS, persons_of_rarest(y, person))
        if num_folds < 2:
            return
        folds = [fold for fold in StratifiedGroupKFold(num_folds).split(x, y, person) if all_classes(y, 2, *fold)]
        if not folds:
            return
        penalties = {"C": INVERSE_PENALTIES}
        search = GridSearchCV(LogisticRegression(max_iter=1000), penalties, scoring="neg_log_loss", cv=folds)
        model = search.fit(x, y).best_estimator_
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(model.coef_))
            self.linear.bias.copy_(torch.from_numpy(model.intercept_))
