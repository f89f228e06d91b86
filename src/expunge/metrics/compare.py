"""All metrics of a model at once, and its distances to a retrained one."""

from collections.abc import Mapping
from dataclasses import dataclass

from expunge.metrics.classification import accuracy, cross_entropy, symmetric_kl
from expunge.metrics.membership import FOLDS, loss_attack
from expunge.metrics.outputs import Outputs

Splits = Mapping[str, Outputs]  # any of "retain", "forget", "test"


@dataclass(frozen=True)
class Measured:
    """One number and what it was measured on."""

    metric: str
    value: float
    unit: str
    split: str
    n: int


@dataclass(frozen=True)
class Profile:
    """A model's outputs, and what they say of the model by itself."""

    splits: Splits
    values: list[Measured]


def profile(splits: Splits, *, seed: int = 0) -> Profile:
    """NA, FA, FE, TA, FMIA and AUC, as far as the splits allow.

    Args:
        splits: Outputs of one model; the membership attack needs "forget" and "test".
        seed: Of the membership attack.
    """
    found = []
    for split, name in (("retain", "NA"), ("forget", "FA"), ("test", "TA")):
        if split in splits:
            found.append(Measured(name, accuracy(splits[split]), "%", split, len(splits[split].labels)))
    if "forget" in splits:
        count = len(splits["forget"].labels)
        found.append(Measured("FE", cross_entropy(splits["forget"]), "nats", "forget", count))
        if "test" in splits and min(count, len(splits["test"].labels)) >= FOLDS:
            attack = loss_attack(splits["forget"].losses, splits["test"].losses, seed=seed)
            found.append(Measured("FMIA", attack.accuracy, "fraction", "forget", attack.n))
            found.append(Measured("AUC", attack.auc, "fraction", "forget", attack.n))
    return Profile(splits, found)


def distances(model: Profile, retrained: Profile) -> list[Measured]:
    """ΔFA, ΔFE, ΔFMIA, ΔAUC, NSKL and FSKL to a retrained model: 0 means no difference.

    Raises:
        MismatchError: The two were not measured on the same examples.
    """
    found = []
    reference = {each.metric: each.value for each in retrained.values}
    for own in model.values:
        if own.metric in ("FA", "FE", "FMIA", "AUC"):
            unit = "points" if own.unit == "%" else own.unit
            found.append(Measured(f"Δ{own.metric}", abs(own.value - reference[own.metric]), unit, own.split, own.n))
    for split, name in (("retain", "NSKL"), ("forget", "FSKL")):
        if split in model.splits:
            value = symmetric_kl(model.splits[split], retrained.splits[split])
            found.append(Measured(name, value, "nats", split, len(model.splits[split].labels)))
    return found
