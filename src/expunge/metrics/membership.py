"""Can an attacker tell removed records from records that were never seen?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from expunge.errors import ConfigError, MissingExtra

FOLDS, DRAWS = 5, 10


@dataclass(frozen=True)
class Attack:
    """How often an attack was right."""

    accuracy: float  # fraction of records told correctly, chance 0.5
    auc: float  # area under the ROC curve, chance 0.5
    n: int  # records of each kind


def loss_attack(
    members: Float[np.ndarray, " members"], unseen: Float[np.ndarray, " unseen"], *, seed: int = 0
) -> Attack:
    """FMIA and AUC: a logistic regression on the loss of each record, members 1, unseen records 0.

    As in the released code of the RELOAD paper: equally many of both (the larger side is sampled down), five
    stratified splits; each record is judged by a regression that was fitted without it. All of this ten times with
    other samples, since one sample of a few records says little.

    Formula: share of records judged correctly; area under the ROC curve of its scores. Unit: fraction in [0, 1].
    Direction: close to the retrained model's, which is near 0.5. 0.5 means: the loss tells nothing. Misses: attacks
    that know the difficulty of a record (LiRA, RMIA) see more.

    Args:
        members: Losses of the records in question, nats.
        unseen: Losses of records that were never trained on, nats.
        seed: Which records are sampled and how they are split.

    Raises:
        MissingExtra: scikit-learn is not installed.
        ConfigError: Fewer than five records on a side.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise MissingExtra("membership attacks need scikit-learn: pip install 'expunge[eval]'.") from error
    count = min(len(members), len(unseen))
    if count < FOLDS:
        raise ConfigError(f"{len(members)} members and {len(unseen)} unseen records: an attack needs {FOLDS} of each.")
    truth = np.repeat([1, 0], count)
    right, areas = 0, []
    for draw in range(DRAWS):
        generator = np.random.default_rng([seed, draw])
        drawn = [generator.choice(side, count, replace=False) for side in (members, unseen)]
        losses = np.concatenate(drawn)[:, None]
        for fit, judge in StratifiedKFold(FOLDS, shuffle=True, random_state=draw).split(losses, truth):
            attack = LogisticRegression().fit(losses[fit], truth[fit])
            scores = attack.decision_function(losses[judge])
            right += int(((scores > 0) == truth[judge]).sum())
            areas.append(roc_auc_score(truth[judge], scores))
    return Attack(right / (2 * count * DRAWS), float(np.mean(areas)), count)
