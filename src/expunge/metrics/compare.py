"""All metrics of a model at once, and its distances to a retrained one."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from expunge.definitions import METRICS
from expunge.errors import MismatchError
from expunge.metrics.calibration import brier, expected_calibration_error
from expunge.metrics.classification import accuracy, cross_entropy, same_examples, symmetric_kl
from expunge.metrics.forgetting import against_unseen, signed_forgetting
from expunge.metrics.membership import loss_attack, matched_by_class, times_matched, unit_of_losses
from expunge.metrics.outputs import Answers, Outputs, Predictions
from expunge.metrics.regression import mean_squared_difference, mean_squared_error, r_squared, varies
from expunge.metrics.representation import activation_distance
from expunge.metrics.roc import FOLDS
from expunge.rows import Row

Splits = Mapping[str, Answers]  # any of "retain", "forget", "test", of a classifier also "triggered", "noisy", "domain"
_ACCURACIES = {
    "retain": "NA",
    "forget": "FA",
    "test": "TA",
    "triggered": "TA with trigger",  # every test record with the trigger of a backdoor, true labels
    "noisy": "TA with noise",  # every test record with noise like that of training inputs
    "domain": "Acc_corr",  # unseen records of the domain that was corrupted
}
_ERRORS = {"retain": "Retain MSE", "forget": "Forget MSE", "test": "Test MSE"}
_DIVERGENCES = {"retain": ("NSKL", "Retain MSD"), "forget": ("FSKL", "Forget MSD")}  # of a classifier, of a regression
_GAPS = ("FA", "FE", "Forget MSE", "FMIA", "AUC")  # whose distance to a retrained model is a difference, Δ


@dataclass(frozen=True)
class Measured:
    """One number and what it was measured on."""

    metric: str
    value: float
    unit: str
    split: str
    n: int


def measured_rows(measured: Iterable[Measured], **about: Any) -> Iterator[Row]:
    """A row for each number.

    Args:
        measured: The numbers.
        about: What they are of: the other fields of a `Row`.
    """
    for each in measured:
        yield Row(**about, **asdict(each))


@dataclass(frozen=True)
class Profile:
    """A model's outputs, and what they say of the model by itself."""

    splits: Splits
    values: list[Measured]


def profile(splits: Splits, *, seed: int = 0, full: bool = False) -> Profile:
    """NA, FA, FE, TA, FMIA and AUC, as far as the splits allow; of a regression mean squared errors, R², FMIA and AUC.

    Args:
        splits: What one model says (`outputs.answers`); the membership attack needs "forget" and "test".
            "triggered", "noisy" and "domain" are for corrections.
        seed: Of the membership attack, and of which test records are matched to the removed ones.
        full: Also the second group: the attack's true positives at low false-positive rates, losses against those of
            test records of the same classes, calibration.
    """
    found = []
    for split, name in _ACCURACIES.items():
        if split in splits:
            seen = splits[split]
            if isinstance(seen, Outputs):
                found.append(_measured(name, accuracy(seen), split, seen))
            else:
                found.append(_measured(_ERRORS[split], mean_squared_error(seen), split, seen))
                if split == "test" and varies(seen):
                    found.append(_measured("Test R²", r_squared(seen), split, seen))
    if "forget" in splits:
        forget = splits["forget"]
        if isinstance(forget, Outputs):
            found.append(_measured("FE", cross_entropy(forget), "forget", forget))
        if "test" in splits and min(len(forget.labels), len(splits["test"].labels)) >= FOLDS:
            test = splits["test"]
            unit = unit_of_losses(test)
            attack = loss_attack(forget.losses / unit, test.losses / unit, seed=seed)
            found.append(Measured("FMIA", attack.accuracy, "fraction", "forget", attack.n))
            found.append(Measured("AUC", attack.auc, "fraction", "forget", attack.n))
            if full:
                for each in attack.true_positives:
                    if each.value is not None:
                        name = f"TPR at {100 * each.at:g} % FPR"
                        found.append(Measured(name, each.value, "fraction", "forget", attack.n))
    if full and "test" in splits:
        found += _second_group(splits, seed)
    return Profile(splits, found)


def distances(model: Profile, retrained: Profile, *, full: bool = False) -> list[Measured]:
    """ΔFA, ΔFE, ΔFMIA, ΔAUC, NSKL and FSKL to a retrained model: 0 means no difference.

    Of a regression ΔForget MSE, ΔFMIA, ΔAUC, Retain MSD and Forget MSD.

    Args:
        model: Of the model in question.
        retrained: Of a retrained model, with the same seed.
        full: Also the second group: under- and over-forgetting, of a classifier activation distance.

    Raises:
        MismatchError: The two were not measured on the same examples.
    """
    if model.splits.keys() != retrained.splits.keys():
        raise MismatchError(
            f"one model was measured on {', '.join(model.splits)} and the other on {', '.join(retrained.splits)}. "
            "Measure both on the same splits."
        )
    found = []
    reference = {each.metric: each.value for each in retrained.values}
    for own in model.values:
        if own.metric in _GAPS:
            unit = "points" if own.unit == "%" else own.unit
            found.append(Measured(f"Δ{own.metric}", abs(own.value - reference[own.metric]), unit, own.split, own.n))
    for split, names in _DIVERGENCES.items():
        if split in model.splits:
            seen = model.splits[split]
            name = names[isinstance(seen, Predictions)]
            found.append(_of_losses(name, divergence(seen, retrained.splits[split]), split, seen))
    if full and "forget" in model.splits:
        forget, reference_forget = model.splits["forget"], retrained.splits["forget"]
        signed = signed_forgetting(forget, [reference_forget])
        found.append(_of_losses("Under-forgetting", signed.under, "forget", forget))
        found.append(_of_losses("Over-forgetting", signed.over, "forget", forget))
        if isinstance(forget, Outputs) and isinstance(reference_forget, Outputs):
            apart = activation_distance(forget, reference_forget)
            found.append(_measured("Activation distance", apart, "forget", forget))
    return found


def divergence(a: Answers, b: Answers) -> float:
    """How far two models are apart on a split: `symmetric_kl`, of regressions `mean_squared_difference`.

    Raises:
        MismatchError: The two were not measured on the same examples.
    """
    if isinstance(a, Outputs) and isinstance(b, Outputs):
        return symmetric_kl(a, b)
    same_examples(a, b)
    assert isinstance(a, Predictions)
    assert isinstance(b, Predictions)
    return mean_squared_difference(a, b)


def _second_group(splits: Splits, seed: int) -> list[Measured]:
    test = splits["test"]
    found = []
    if isinstance(test, Outputs):
        found.append(_measured("ECE", expected_calibration_error(test), "test", test))
        found.append(_measured("Brier", brier(test), "test", test))
    if "forget" in splits and times_matched(splits["forget"].labels, test.labels):
        forget = splits["forget"]
        matched = matched_by_class(forget.labels, test.labels, times=None, seed=seed)
        signed = against_unseen(forget.losses, test.losses[matched])
        found.append(_of_losses("Loss below unseen", signed.under, "forget", forget))
        found.append(_of_losses("Loss above unseen", signed.over, "forget", forget))
    return found


def _measured(metric: str, value: float, split: str, answers: Answers) -> Measured:
    return Measured(metric, value, METRICS[metric].unit, split, len(answers.labels))


def _of_losses(metric: str, value: float, split: str, answers: Answers) -> Measured:
    return Measured(metric, value, answers.unit, split, len(answers.labels))
