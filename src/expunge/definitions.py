"""What every metric and fact means: one entry each, in words for the reader of a report."""

import re
from dataclasses import dataclass
from typing import Literal

Good = Literal["high", "low", "close", "unknown"]
_DIRECTIONS: dict[Good, str] = {
    "high": "high is good",
    "low": "low is good",
    "close": "close to the retrained model's is good",
    "unknown": "",
}
ARROWS: dict[Good, str] = {"high": "↑", "low": "↓", "close": "≈", "unknown": ""}


@dataclass(frozen=True)
class Definition:
    """A metric in words."""

    name: str  # as in the middle of a sentence
    text: str
    unit: str
    good: Good  # "close": to the retrained model's value
    kind: Literal["value", "distance", "cost"]

    @property
    def direction(self) -> str:
        """Which values are good, in words."""
        return _DIRECTIONS[self.good]


_ATTACK = (
    "A logistic regression tells removed records from test records by their loss, equally many of both, each judged "
    "by a fit without it"
)
METRICS: dict[str, Definition] = {
    "NA": Definition(
        "accuracy on the retained records",
        "Share of the records that were kept whose largest logit is that of the label.",
        "%",
        "high",
        "value",
    ),
    "FA": Definition(
        "accuracy on the removed records",
        "The same share on the removed records. Neither high nor low is good: a model that never saw them gets most "
        "of them right if they are ordinary.",
        "%",
        "close",
        "value",
    ),
    "FE": Definition(
        "loss on the removed records",
        "Cross-entropy on the removed records: mean of -log p(label).",
        "nats",
        "close",
        "value",
    ),
    "TA": Definition(
        "accuracy on the test records",
        "Share of the test records whose largest logit is that of the label.",
        "%",
        "high",
        "value",
    ),
    "FMIA": Definition(
        "success of the membership attack",
        f"{_ATTACK}; this is the share it judges correctly. 0.5 is chance. Attacks that know how hard a record is "
        "(LiRA, RMIA) see more.",
        "fraction",
        "close",
        "value",
    ),
    "AUC": Definition(
        "area under the attack's ROC curve",
        f"{_ATTACK}; this is the area under the ROC curve of its scores. 0.5 is chance.",
        "fraction",
        "close",
        "value",
    ),
    "Accuracy on corrected": Definition(
        "accuracy on the corrected records",
        "Share of the training records with a corrected label that the model gives their true label.",
        "%",
        "high",
        "value",
    ),
    "ΔFA": Definition(
        "difference in accuracy on the removed records",
        "|FA - FA of the retrained model|. Says nothing about which records are right.",
        "points",
        "low",
        "distance",
    ),
    "ΔFE": Definition(
        "difference in loss on the removed records",
        "|FE - FE of the retrained model|. A mean: records may differ in both directions and cancel.",
        "nats",
        "low",
        "distance",
    ),
    "ΔFMIA": Definition(
        "difference in success of the membership attack",
        "|FMIA - FMIA of the retrained model|.",
        "fraction",
        "low",
        "distance",
    ),
    "ΔAUC": Definition(
        "difference in the attack's area under the ROC curve",
        "|AUC - AUC of the retrained model|.",
        "fraction",
        "low",
        "distance",
    ),
    "NSKL": Definition(
        "divergence on the retained records",
        "KL(p‖q) + KL(q‖p) between the outputs of the model and of the retrained model, not halved, mean over the "
        "records that were kept, after a correction all of them. 0: the same probabilities for every record.",
        "nats",
        "low",
        "distance",
    ),
    "FSKL": Definition(
        "divergence on the removed records",
        "The same divergence, mean over the records that were removed or corrected.",
        "nats",
        "low",
        "distance",
    ),
    "Cost": Definition(
        "time it took",
        "Wall time of the method, with caching where it needs a cache, over the wall time of retraining on the same "
        "machine.",
        "ratio",
        "low",
        "cost",
    ),
}

FACTS: dict[str, str] = {
    "informative_share": "share of entries in which the gradient difference stands above its rounding floor",
    "relative_noise": "predicted relative error of the gradient difference, an upper estimate",
    "eps": "ε that smooths the knowledge values, in units of a summed gradient",
    "requested_count": "entries that the settings ask to re-initialise",
    "reset_count": "entries that were re-initialised",
    "untouched_in_paper_choice": "share of the paper's choice below the rounding floor, which is kept here",
    "overlap_with_paper_choice": "overlap of the chosen entries with the paper's choice (Jaccard)",
    "target_loss": "the original's mean loss, at which fine-tuning may end, in nats",
    "stopped": "why training ended",
}


def define(metric: str) -> Definition:
    """The definition of a metric; one that says so if there is none. A name with Δ is a distance."""
    distance = metric.startswith("Δ")
    unknown = Definition(
        metric,
        "A metric without a stored definition.",
        "",
        "low" if distance else "unknown",
        "distance" if distance else "value",
    )
    return METRICS.get(metric, unknown)


def split_names(scenario: str) -> dict[str, str]:
    """What the records of each split are called in a scenario, in the order to name them."""
    if "correct" in scenario:
        return {"retain": "training", "forget": "corrected", "test": "test"}
    return {"retain": "retained", "forget": "removed", "test": "test"}


def anchor(metric: str) -> str:
    """Where a page defines a metric: ``ΔFA`` is at ``metric-delta-fa``."""
    return f"metric-{slug(metric)}"


def slug(name: str) -> str:
    """A name as an identifier in HTML."""
    return re.sub(r"[^a-z0-9]+", "-", name.replace("Δ", "delta ").lower()).strip("-")
