"""Many unlearned models against many retrained ones: U-LiRA and KLOM.

Both take confidences log(p / (1 - p)) of the label (`Outputs.confidences`), a row a model, a column a record. Each row
is a model of its own: another seed of training and of unlearning, the same removed records.
"""

import numpy as np
from jaxtyping import Float

from expunge.errors import ConfigError, MismatchError
from expunge.metrics.reference_attacks import log_density
from expunge.metrics.roc import Attack, judge
from expunge.metrics.stats import require_finite

Confidences = Float[np.ndarray, "_ _"]  # models, records
_LEAST = 4  # models of each kind: two to fit a Gaussian and two to judge


def u_lira(unlearned: Confidences, retrained: Confidences) -> Attack:
    """Can a model be recognised as unlearned rather than retrained, by its confidence on one removed record?

    The strongest of the attacks here: for every removed record it compares the very populations that unlearning has
    to make equal. 0.5 is indistinguishable.

    Formula: for each record, a Gaussian over the confidences of the unlearned models and one over those of the
    retrained ones; score log N(c; unlearned) - log N(c; retrained), judged at 0. The Gaussians are fitted on one half
    of the models and judged on the other, and the other way round; the area under the ROC curve is taken within
    a turn, since scores of different fits do not compare. Intervals count models, not records: those of one model are
    not independent.

    Args:
        unlearned: Confidences of unlearned models on the removed records.
        retrained: Confidences of as many models that were trained without them.

    Source: Hayes et al., Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy (2024).

    Raises:
        MismatchError: Populations of different size, or of other records.
        ConfigError: Fewer than four models of each kind.
        NotFinite: NaN or infinity among the confidences.
    """
    _populations(unlearned, retrained)
    if unlearned.shape != retrained.shape:
        raise MismatchError(
            f"{len(unlearned)} unlearned and {len(retrained)} retrained models: unequal numbers favour one side. Leave "
            "some out."
        )
    models, records = unlearned.shape
    part = np.arange(models) % 2
    scores = np.empty((2, models, records))
    for turn in range(2):
        fit, held = part != turn, part == turn
        gaussians = [
            (p[fit].mean(axis=0), np.maximum(p[fit].var(axis=0, ddof=1), 1e-12)) for p in (unlearned, retrained)
        ]
        for kind, side in enumerate((unlearned, retrained)):
            with_it, without = (
                log_density(side[held], np.broadcast_to(mean, side[held].shape), np.broadcast_to(var, side[held].shape))
                for mean, var in gaussians
            )
            scores[kind][held] = with_it - without
    model = np.repeat(np.arange(models), records)
    turns = np.repeat(part, records)
    return judge(scores[0].ravel(), scores[1].ravel(), threshold=0.0, clusters=(model, model), turns=(turns, turns))


def klom(
    unlearned: Confidences,
    retrained: Confidences,
    *,
    bins: int = 20,
    limit: float = 100.0,
    smoothing: float = 1e-5,
) -> Float[np.ndarray, " records"]:
    """KL divergence of margins: how far the unlearned models' margins are from the retrained ones', record by record.

    Formula: for each record, KL(unlearned ‖ retrained) of two histograms of the margins over models, with common bins
    between the smallest and the largest margin, and ``smoothing`` added to every share. Unit: nats. 0 means the same
    histograms; populations that do not overlap give about 11.5. Finite populations are never at 0: compare with the
    value of two retrained populations of the same sizes.

    Args:
        unlearned: Margins of unlearned models.
        retrained: Margins of retrained models.
        bins: Of the histograms.
        limit: Margins are clipped to ±limit.
        smoothing: Keeps empty bins from giving infinity.

    Source: Georgiev et al., Attribute-to-Delete: Machine Unlearning via Datamodel Matching (2024).

    Raises:
        MismatchError: Other records.
        ConfigError: Fewer than four models of a kind, fewer than two bins, or a limit or smoothing that is not
            positive.
        NotFinite: NaN or infinity among the margins.
    """
    _populations(unlearned, retrained)
    if bins < 2 or not limit > 0 or not smoothing > 0:
        raise ConfigError(f"bins={bins}, limit={limit}, smoothing={smoothing}: at least 2, and both others positive.")
    both = np.clip(np.concatenate([unlearned, retrained]), -limit, limit)
    low, high = both.min(axis=0), both.max(axis=0)
    width = np.where(high > low, high - low, 1.0)
    place = np.minimum(((both - low) / width * bins).astype(np.int64), bins - 1)
    column = np.arange(both.shape[1]) * bins
    shares = []
    for rows in (place[: len(unlearned)], place[len(unlearned) :]):
        counts = np.bincount((rows + column).ravel(), minlength=bins * both.shape[1]).reshape(-1, bins)
        smooth = counts / len(rows) + smoothing
        shares.append(smooth / smooth.sum(axis=1, keepdims=True))
    p, q = shares
    result: Float[np.ndarray, " records"] = (p * (np.log(p) - np.log(q))).sum(axis=1)
    return result


def _populations(unlearned: Confidences, retrained: Confidences) -> None:
    if unlearned.shape[1] != retrained.shape[1]:
        raise MismatchError(
            f"confidences of {unlearned.shape[1]} and {retrained.shape[1]} records cannot be compared. Measure all "
            "models on the same records."
        )
    if min(len(unlearned), len(retrained)) < _LEAST:
        raise ConfigError(
            f"{len(unlearned)} unlearned and {len(retrained)} retrained models: populations need {_LEAST} of each."
        )
    require_finite("confidences", unlearned, retrained)
