"""Before an unlearning: can it work? All that can be said without the removed records.

The difference of two gradient passes has a predicted error, a share of entries it can be seen in, and a reset set that
is more or less stable under its own rounding. None of them says whether the records will be forgotten: only a rehearsal
on records one may keep does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from expunge import params
from expunge.access import Blind
from expunge.audit.finding import evidence
from expunge.batches import Batches, LossTerms, indexed
from expunge.errors import ConfigError
from expunge.gradient import Gradient
from expunge.methods.choice import decimal, smallest_share
from expunge.methods.reload import automatic_eps
from expunge.seeds import stream
from expunge.selectors import knowledge_values
from expunge.training import mean_loss

Advice = Literal["go", "go with care", "do not"]
ADVICE: tuple[Advice, ...] = ("do not", "go with care", "go")  # worst first
ERROR, HOPELESS = 0.01, 1.0  # predicted relative error: fine below, void above
STABLE, UNSTABLE = 0.9, 0.5  # overlap of the reset set with itself under its rounding
COARSE = 2.0**-20  # storage roundoff above which stability says nothing of the truth, see docs/audits.md
LEAST = 30  # removed terms from which on few can be computed back, see docs/audits.md
DRAWS = 3
MEMORISED = 0.1  # of what was learned: the share that does not hold for unseen records. At 3 to 5 % ascents did harm,
# from 38 % on they helped (docs/findings.md): this lies between
NOT_COMPARED = "there are no unseen records to compare with (test() in a setup file), or no untrained model."


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    advice: Advice
    words: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "advice": self.advice, "words": self.words, "numbers": dict(self.numbers)}


@dataclass(frozen=True)
class Preflight:
    """All checks."""

    checks: list[Check]

    @property
    def advice(self) -> Advice:
        """The worst of all checks."""
        return min((check.advice for check in self.checks), key=ADVICE.index, default="go")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"advice": self.advice, "checks": [check.as_dict() for check in self.checks]}


def preflight(
    model: nn.Module,
    loss_terms: LossTerms,
    retain: Batches,
    full: Gradient,
    *,
    unseen: Batches | None = None,
    fresh: Callable[[int], nn.Module] | None = None,
    not_compared: str = NOT_COMPARED,
    reset_fraction: float = 0.1,
) -> Preflight:
    """Look at the difference that an unlearning would start from.

    Args:
        model: With the weights that the cache was made at.
        loss_terms: The loss of the cache.
        retain: What is left.
        full: The cached gradient.
        unseen: Records like the training data that nothing was trained on: of a classifier they tell, with ``fresh``,
            whether there is anything to forget.
        fresh: Builds an untrained model from a seed.
        not_compared: Why one of them is not given, for the words.
        reset_fraction: The share of entries that RELOAD will re-initialise; 0 for methods that re-initialise none,
            and the choice of entries is not looked at.

    Raises:
        ConfigError: A fraction outside [0, 1).
        MismatchError: Cache, model and data do not belong together.
        NonDeterministicLoss: The probe of the gradient pass found a loss that does not repeat.
        NotInformative: Nothing was removed.
    """
    if not 0 <= reset_fraction < 1:
        raise ConfigError(f"reset_fraction={reset_fraction}: must be a share below 1, or 0 to re-initialise nothing.")
    has = evidence(model, loss_terms, retain, full)
    removed = has.removed
    choice = [_stability(removed, full, reset_fraction)] if reset_fraction else []
    gap = Check("something to forget", "go with care", f"Was not looked at: {not_compared}")
    if unseen is not None and fresh is not None:
        untrained = Blind(retain=retain, loss_terms=loss_terms, fresh=fresh).fresh_model(0, model)
        untrained = untrained.to(next(model.parameters()).device)
        left = (full.loss - removed.loss) / max(full.count - removed.count, 1)  # the second pass has seen what is left
        losses = [left, *(mean_loss(each, unseen, loss_terms) for each in (model, untrained))]
        gap = _memorised(*losses)
    return Preflight(
        [
            Check("validity", "go", "The cache is undamaged and belongs to these weights, buffers and loss."),
            _alignment(full, retain, has.doubts, has.compared),
            _error(removed),
            _seen(removed, reset_fraction),
            *choice,
            gap,
            _batch(removed),
        ]
    )


def reset_set(removed: Gradient, full: Gradient, fraction: float) -> dict[str, Bool[Tensor, "..."]]:
    """The entries that RELOAD with its defaults would re-initialise."""
    scores = knowledge_values(removed.total, full.total, automatic_eps(removed))
    for name, seen in removed.informative().items():
        scores[name][~seen] = math.inf
    return smallest_share(scores, decimal(fraction), "global")[0]


def overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Jaccard overlap of two sets of entries, 1 of two empty ones."""
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return both / either if either else 1.0


def stability(removed: Gradient, full: Gradient, fraction: float) -> float:
    """How much of the reset set stays when the difference is moved within its rounding floor.

    The floor covers 99 % of errors, hence a normal error with a standard deviation of a third of it; mean over draws.
    """
    assert removed.noise is not None
    own, found = reset_set(removed, full, fraction), []
    for draw in range(DRAWS):
        moved = {
            name: total
            + removed.noise[name].double()
            / 3
            * torch.randn(total.shape, generator=stream(0, "preflight", draw, name), dtype=torch.float64).to(total)
            for name, total in removed.total.items()
        }
        again = Gradient(moved, removed.count, removed.loss, removed.noise, removed.roundoff, removed.origin)
        found.append(overlap(own, reset_set(again, full, fraction)))
    return sum(found) / len(found)


def _alignment(full: Gradient, retain: Batches, doubts: str, compared: int) -> Check:
    if doubts:
        return Check("alignment", "go with care", f"{doubts[0].upper()}{doubts[1:]}")
    if full.micro_batches is None:
        words = (
            "The cache was made of data without positions: untouched records do not cancel, and the difference is "
            "coarse. Next time cache Examples, a Dataset, or a DataLoader over one."
        )
        return Check("alignment", "go with care", words)
    if indexed(retain) is None:
        words = (
            "The cache was made of records with positions, and what is left has none: untouched records do not cancel, "
            "and the difference is coarse. Give what is left as Examples or a Dataset with the positions of old."
        )
        return Check("alignment", "go with care", words)
    if compared < 2:  # one may have been corrected
        words = (
            f"Cache and data have positions. Of {len(full.micro_batches.numbers)} micro-batches {compared} can be "
            "compared with what they were, so that an edited loss, or other preprocessing, would not show: make sure "
            "that they are those of the cache. (Records were corrected, or nearly every micro-batch lost one; a cache "
            "of smaller ones, --micro-batch, could tell.)"
        )
        return Check("alignment", "go with care", words, {"compared": compared})
    words = (
        f"Cache and data have positions, and of {compared} micro-batches with as many terms as they had most give the "
        "loss that they gave: untouched records then cancel exactly."
    )
    return Check("alignment", "go", words, {"compared": compared})


def _error(removed: Gradient) -> Check:
    error = removed.relative_noise()
    advice: Advice = "go" if error <= ERROR else "go with care" if error < HOPELESS else "do not"
    cache = "cache in float64"
    if removed.roundoff > COARSE:
        cache = "cache a model in float32: this one computes in half precision, and its gradients are as coarse"
    words = f"The predicted error of the difference is {error:.1g} of its length"
    words += {
        "go": ".",
        "go with care": f": visible. Remove more records at once if you can, and {cache}.",
        "do not": f": the difference is rounding. Wait for more deletions, keep positions, and {cache}.",
    }[advice]
    return Check("error of the difference", advice, words, {"relative_error": error})


def _seen(removed: Gradient, fraction: float) -> Check:
    marks = removed.informative()
    share = params.count(marks) / params.size(marks)
    advice: Advice = "do not" if share == 0 else "go" if share >= fraction else "go with care"
    words = f"{share:.1%} of all entries show what was removed"
    words += {
        "go": ".",
        "go with care": f", fewer than the {fraction:.0%} to be re-initialised: the others keep their values.",
        "do not": ": there is nothing to go by.",
    }[advice]
    return Check("informative share", advice, words, {"informative_share": share})


def _stability(removed: Gradient, full: Gradient, fraction: float) -> Check:
    stable = stability(removed, full, fraction)
    coarse = full.storage_roundoff > COARSE
    advice: Advice = "go" if stable >= STABLE else "go with care" if stable >= UNSTABLE else "do not"
    words = f"Moved within its rounding, the difference chooses {stable:.0%} of the same entries to re-initialise"
    if coarse:
        advice = "go with care" if advice == "go" else "do not"
        words += ", but so coarse a cache chooses other entries than an exact one would. Cache in float64 or float32."
    else:
        words += {"go": ".", "go with care": ".", "do not": ": most of the choice is chance."}[advice]
    return Check("stability of the choice", advice, words, {"overlap": stable})


def _memorised(left: float, unseen: float, untrained: float) -> Check:
    if not all(map(math.isfinite, (left, unseen, untrained))):
        words = f"losses are {left:.3g} on what is left, {unseen:.3g} on test() and {untrained:.3g} untrained."
        return Check("something to forget", "go with care", f"Was not looked at: {words}")
    gained = untrained - left
    share = (unseen - left) / gained if gained > MEMORISED * abs(untrained) else 0.0  # or nothing was learned
    numbers = {"loss_on_what_is_left": left, "loss_on_unseen": unseen, "loss_untrained": untrained}
    words = (
        f"The loss a term is {left:.3g} on what is left, {unseen:.3g} on test(), and {untrained:.3g} for an untrained "
        f"model: of what was learned of its own records {max(share, 0):.0%} does not hold for others"
    )
    if share >= MEMORISED:
        return Check("something to forget", "go", f"{words}.", numbers)
    words += ". There is little to forget, and an unlearning may do more harm than good: rehearse it, or retrain."
    return Check("something to forget", "go with care", words, numbers)


def _batch(removed: Gradient) -> Check:
    numbers = {"removed_terms": removed.count, "recommended": LEAST}
    if removed.count == 0:
        words = "No terms were removed, only corrected: the number of corrected records is not in the cache."
        return Check("size of the deletion", "go", words, numbers)
    if removed.count >= LEAST:
        words = f"{removed.count} loss terms were removed at once, at least the recommended {LEAST}."
        return Check("size of the deletion", "go", words, numbers)
    words = (
        f"{removed.count} loss terms were removed, fewer than the recommended {LEAST}: whoever has cache, weights and "
        "retain set may compute them back (expunge audit cache). Collect deletions, and destroy the cache after use. "
        "No number protects: membership can be told of any."
    )
    return Check("size of the deletion", "go with care", words, numbers)
