"""What every metric and fact means: one entry each, in words for the reader of a report."""

import difflib
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from expunge.errors import ConfigError

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
    formula: str = ""
    perfect: str = ""  # the value of a perfect result
    misses: str = ""  # what it cannot see
    source: str = ""
    function: str = ""  # what computes it, as module.name

    @property
    def direction(self) -> str:
        """Which values are good, in words."""
        return _DIRECTIONS[self.good]


def _stored() -> dict[str, Definition]:
    text = files("expunge").joinpath("definitions.toml").read_text(encoding="utf-8")
    return {metric: Definition(**fields) for metric, fields in tomllib.loads(text).items()}


METRICS: dict[str, Definition] = _stored()

FACTS: dict[str, str] = {
    "informative_share": "share of entries in which the gradient difference stands above its rounding floor",
    "relative_noise": "predicted relative error of the gradient difference, an upper estimate",
    "eps": "ε that smooths the knowledge values, in units of a summed gradient",
    "requested_count": "entries that the settings ask to re-initialise",
    "reset_count": "entries that were re-initialised",
    "untouched_in_paper_choice": "share of the paper's choice below the rounding floor, which is kept here",
    "overlap_with_paper_choice": "overlap of the chosen entries with the paper's choice (Jaccard)",
    "removed_count": "loss terms that were removed; 0 after a correction",
    "compared": "micro-batches whose losses tell whether model, loss and data are those of the cache",
    "cached_count": "loss terms that the cached gradient is of",
    "priming_length": "length of RELOAD's ascent, as a share of the norm of the weights",
    "ascent_share": "length of each ascent, as a share of the norm of the weights",
    "ascent": "the same in the units of the weights",
    "alignment": "cosine of the gradient difference and the ascent (of orthogonal ascent: and what is left)",
    "information_share": "what was removed, as a share of the Fisher information of what is left",
    "kronecker_share": "share of the weights whose curvature is in blocks of one layer, the others' on a diagonal",
    "along_left": "of a correction, the cosine of the difference and the negative gradient of what is left",
    "failed": "why there is no model, and are no rows",
    "warning": "what the method warned of",
    "target_loss": "the original's mean loss, at which fine-tuning may end, in the unit of the loss",
    "stopped": "why training ended",
}


def define(metric: str) -> Definition:
    """The definition of a metric; one that says so if there is none. A name with Δ is a distance.

    Of "FSKL, random 10 %", as a table over scenarios has it, that of FSKL.
    """
    distance = metric.startswith("Δ")
    unknown = Definition(
        metric,
        "A metric without a stored definition.",
        "",
        "low" if distance else "unknown",
        "distance" if distance else "value",
    )
    return METRICS.get(metric) or METRICS.get(metric.partition(", ")[0], unknown)


def find(metric: str) -> str:
    """The name of a metric however it is written: ``delta fa``, ``ΔFA`` and ``delta-fa`` are one.

    Raises:
        ConfigError: There is no such metric; names the closest.
    """
    slugs = {slug(name): name for name in METRICS}
    wanted = slug(re.sub(r"^d(?=f|a)", "Δ", metric, flags=re.IGNORECASE))
    if wanted in slugs:
        return slugs[wanted]
    parts = [key for key in slugs if wanted and wanted in key]
    close = difflib.get_close_matches(wanted, slugs, n=3, cutoff=0.4)
    nearest = ", ".join(slugs[key] for key in list(dict.fromkeys(parts + close))[:5]) or ", ".join(METRICS)
    raise ConfigError(
        f"there is no metric {metric!r}. The closest: {nearest}. `expunge explain` lists all; methods are explained by "
        "`expunge methods` and their pages."
    )


CORRECTED = "Accuracy on corrected"  # the metric that every correction has, and no removal


def split_names(corrects: bool) -> dict[str, str]:
    """What the records of each split are called, after a correction or a removal, in the order to name them."""
    if corrects:
        return {"retain": "training", "forget": "corrected", "test": "test"}
    return {"retain": "retained", "forget": "removed", "test": "test"}


def anchor(metric: str) -> str:
    """Where a page defines a metric: ``ΔFA`` is at ``metric-delta-fa``."""
    return f"metric-{slug(metric)}"


def slug(name: str) -> str:
    """A name as an identifier in HTML."""
    return re.sub(r"[^a-z0-9]+", "-", name.replace("Δ", "delta ").lower()).strip("-")
