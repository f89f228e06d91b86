"""Attacks that know how hard each record is, from models trained with and without it: LiRA and RMIA.

All take stored numbers of models: one column a record, one row a model, and a matrix that says which model was trained
on which record. The target model is none of them.
"""

import numpy as np
from jaxtyping import Bool, Float

from expunge.errors import ConfigError, MismatchError
from expunge.metrics.roc import Attack, judge

_PER_RECORD_FROM = 64  # reference models, from which on Carlini et al. estimate a variance a record

Numbers = Float[np.ndarray, " _"]  # a record
OfModels = Float[np.ndarray, "_ _"]  # models, records
Included = Bool[np.ndarray, "_ _"]
Marks = Bool[np.ndarray, " _"]


def lira(
    target: Numbers,
    references: OfModels,
    included: Included,
    member: Marks,
    *,
    online: bool = True,
    per_record_variance: bool | None = None,
) -> Attack:
    """The likelihood-ratio attack: is this confidence more likely of a model that saw the record?

    Formula: for each record, Gaussians over the reference models' confidences log(p / (1 - p)) of its label, of those
    trained with it and of those without. Online score: log N(target; with) - log N(target; without), judged at 0.
    Offline score: (target - mean without) / sd without, with a threshold that is fitted on other records.

    Args:
        target: Confidences of the attacked model, `Outputs.confidences`.
        references: Confidences of the reference models on the same records.
        included: Which reference model was trained on which record.
        member: Which records the attacked model is asked about (True), and which it never saw (False).
        online: Use the models trained with the record too.
        per_record_variance: One variance a record, or one for all. By default from 64 reference models on, as in the
            source: with few models a variance of its own is mostly noise.

    Source: Carlini et al., Membership Inference Attacks From First Principles (2022).

    Raises:
        MismatchError: Arrays of other records or models.
        ConfigError: A record without two reference models of each kind needed, or fewer than five records a kind.
        NotFinite: NaN or infinity among the confidences.
    """
    _same_records(target, references, included, member)
    _enough(included, online)
    own = len(references) >= _PER_RECORD_FROM if per_record_variance is None else per_record_variance
    mean, variance = _gaussians(references, ~included, own)
    if not online:
        scores = (target - mean) / np.sqrt(variance)
        return judge(scores[member], scores[~member])
    inside = _gaussians(references, included, own)
    scores = log_density(target, *inside) - log_density(target, mean, variance)
    return judge(scores[member], scores[~member], threshold=0.0)


def rmia(
    target: Numbers,
    references: OfModels,
    included: Included,
    member: Marks,
    *,
    population: Numbers,
    population_references: OfModels,
    gamma: float = 2.0,
    a: float = 0.3,
    online: bool = False,
) -> Attack:
    """The robust membership inference attack: did the model gain more on this record than on others of its kind?

    Formula: the share of population records z with [p(x) / P(x)] / [p(z) / P(z)] >= γ, where p is the target's
    probability of the label and P the mean over reference models: online half with and half without the record;
    offline, from those without it, ((1 + a) P_without + 1 - a) / 2. For z, which no model was trained on, P is online
    the plain mean over all reference models, offline the same form of it. The threshold is fitted on other records.

    Args:
        target: Log-probabilities of the labels under the attacked model, nats (minus `Outputs.losses`).
        references: The same under the reference models.
        included: Which reference model was trained on which record.
        member: Which records the attacked model is asked about (True), and which it never saw (False).
        population: Log-probabilities under the attacked model of records that no model here was trained on.
        population_references: The same under the reference models.
        gamma: How much larger the gain must be.
        a: Offline: how far probabilities rise on members; 0.3 is published for images.
        online: Use the models trained with the record too.

    Source: Zarifzadeh et al., Low-Cost High-Power Membership Inference Attacks (2024).

    Raises:
        MismatchError: Arrays of other records or models.
        ConfigError: gamma below 1, a outside [0, 1], no population, a record without a reference model of each kind
            needed, or fewer than five records a kind.
        NotFinite: NaN or infinity among the log-probabilities.
    """
    if not gamma >= 1 or not 0 <= a <= 1:
        raise ConfigError(f"gamma={gamma}, a={a}: gamma is at least 1, and a lies in [0, 1].")
    _same_records(target, references, included, member)
    if population_references.shape != (len(references), len(population)) or not len(population):
        raise MismatchError(
            f"{len(references)} reference models and {len(population)} population records, but numbers of shape "
            f"{population_references.shape} for them. Measure every model on the same, non-empty population."
        )
    _enough(included, online, at_least=1)
    probability = np.exp(references)
    without = np.where(included, 0.0, probability).sum(axis=0) / (~included).sum(axis=0)
    of_others = np.exp(population_references).mean(axis=0)
    if online:
        usual = (without + np.where(included, probability, 0.0).sum(axis=0) / included.sum(axis=0)) / 2
    else:
        usual, of_others = (((1 + a) * mean + 1 - a) / 2 for mean in (without, of_others))
    tiny = np.finfo(np.float64).tiny  # probabilities may underflow, logarithms must not be infinite
    gain = target - np.log(np.maximum(usual, tiny))
    others = np.sort(population - np.log(np.maximum(of_others, tiny)))
    scores = np.searchsorted(others, gain - np.log(gamma), side="right") / len(others)
    scores = np.where(np.isfinite(gain), scores, np.nan)
    return judge(scores[member], scores[~member])


def log_density(
    values: Float[np.ndarray, "*shape"], mean: Float[np.ndarray, "*shape"], variance: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Logarithm of the Gaussian density."""
    result: Float[np.ndarray, "*shape"] = -0.5 * (np.log(2 * np.pi * variance) + (values - mean) ** 2 / variance)
    return result


def _gaussians(references: OfModels, of: Included, own: bool) -> tuple[Numbers, Numbers]:
    """Mean and variance over the models that are marked; the variance pooled over all records unless ``own``."""
    count = of.sum(axis=0)
    mean = np.where(of, references, 0.0).sum(axis=0) / count
    squares = np.where(of, (references - mean) ** 2, 0.0).sum(axis=0)
    variance = squares / (count - 1) if own else np.full(len(mean), squares.sum() / (count - 1).sum())
    return mean, np.maximum(variance, 1e-12)  # models that agree to the last bit


def _same_records(target: np.ndarray, references: np.ndarray, included: np.ndarray, member: np.ndarray) -> None:
    shapes = [array.shape for array in (target, references, included, member)]
    if not references.shape == included.shape == (len(references), len(target)) or len(member) != len(target):
        raise MismatchError(
            f"target, references, included and member have the shapes {shapes}: they need (records,), (models, "
            "records), (models, records) and (records,), all of the same records."
        )


def _enough(included: Included, online: bool, at_least: int = 2) -> None:
    few = (~included).sum(axis=0) < at_least
    if online:
        few |= included.sum(axis=0) < at_least
    if few.any():
        kinds = "trained with it and as many trained without it" if online else "trained without it"
        raise ConfigError(
            f"{int(few.sum())} of {len(few)} records have fewer than {at_least} reference models {kinds}. Train more "
            "reference models, each on a random half of the records."
        )
