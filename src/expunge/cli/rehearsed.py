"""What a rehearsal found: settings confirmed on a set that they were not tuned on, and how that is shown."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.bench import chosen, closeness, rehearsal
from expunge.bench.closeness import Score, Seen
from expunge.bench.rehearsal import Problem, Rehearsal
from expunge.bench.tuning import Trial
from expunge.cli import printing
from expunge.errors import NotFinite
from expunge.metrics.outputs import Predictions
from expunge.space import Range, Space

NOTHING, GIVEN, CHOSEN = "no unlearning", "settings as given", "settings chosen"
SHOWN = 10  # trials in the table, classes in a line
Confirmed = dict[str, dict[str, Score]]  # by settings: on the tuned sets, on the one that was held out


@dataclass(frozen=True)
class Stage:
    """All that a rehearsal works with."""

    problem: Problem
    tuned: list[Rehearsal]
    held: list[Rehearsal]  # the one that settings are confirmed on
    may_lose: float  # against unseen records: share of what is left
    removed: Counter[int]  # with --like removed: of each class, as the cache tells
    about: dict[str, Any]  # what the scores depend on

    def score(self, sets: Sequence[Rehearsal], after: Sequence[Seen]) -> Score:
        """Of models after some of the rehearsals."""
        return rehearsal.score(sets, after, self.may_lose)


def warn_of_chance(stage: Stage) -> None:
    """Before the search: whether what it looks for can be told from chance at all."""
    before = [each.before for each in stage.tuned]
    needed = None if stage.held[0].references else closeness.records_needed(before)
    if needed is None:
        return
    size, gain, error = len(before[0].forget.labels), closeness.to_forget(before), closeness.chance(before)
    left = len(before[0].left.labels) + size
    if stage.about["like"] == "removed":
        cure = "Rehearse against retrained models (--retrain 3), or more records at random (--like random --records)."
    elif needed == 0:
        cure = "The model knows what is left no better than test(): rehearse against retrained models (--retrain 3)."
    elif needed * (len(before) + 1) >= left:
        cure = (
            f"It would take --records {needed}, and retain() has no {len(before) + 1} sets of so many: rehearse "
            "against retrained models (--retrain 3), or keep the settings as they are."
        )
    else:
        cure = f"Use --records {needed}."
    warnings.warn(
        f"{size} records are too few to rehearse: there are {gain:.2g} {before[0].left.unit} to forget, and by chance "
        f"alone the forgetting of {len(before)} sets misses 0 by about {error:.2g}. {cure}",
        stacklevel=2,
    )


def confirm(stage: Stage, configs: Mapping[str, object]) -> Confirmed:
    """Scores on the sets that were tuned on, and on the one that was not."""
    both = {"tuned on": stage.tuned, "held out": stage.held}
    found = {NOTHING: {name: stage.score(sets, [each.before for each in sets]) for name, sets in both.items()}}
    for who, config in configs.items():
        found[who] = {name: _score(stage, sets, config) for name, sets in both.items()}
    return found


def _score(stage: Stage, sets: Sequence[Rehearsal], config: object) -> Score:
    try:
        return stage.score(sets, rehearsal.rehearse(stage.problem, sets, config))
    except NotFinite:
        return Score(math.inf, math.inf, math.inf)


def plain(scores: Confirmed) -> dict[str, dict[str, dict[str, float | None]]]:
    """As JSON holds them, which knows no infinity."""
    return {
        who: {
            sets: {k: v if math.isfinite(v) else None for k, v in found._asdict().items()}
            for sets, found in each.items()
        }
        for who, each in scores.items()
    }


def verdicts(scores: Confirmed) -> dict[str, bool]:
    """By key of `chosen.AGAINST`: whether the chosen settings are what they should be on the set not tuned on."""
    nothing, given, best = (scores[who]["held out"].total for who in (NOTHING, GIVEN, CHOSEN))
    return {"holds up": best <= given, "better than nothing": best < nothing}


def show(stage: Stage, space: Space, found: Sequence[Trial], scores: Confirmed, journal: Path) -> None:
    """Print the best trials, the scores of the chosen settings, and what stands against them."""
    from rich.table import Table

    names = list(found[0].settings)
    tried = Table("trial", "score", *names, "s", title=f"The best of {len(found)} trials ({journal} has all)")
    for trial in found[:SHOWN]:
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in trial.settings.values()]
        tried.add_row(str(trial.number), f"{trial.score:.3g}", *values, f"{trial.seconds:.1f}")
    before = stage.held[0].before
    unit = f"{before.left.unit}; 0 is perfect"
    if stage.held[0].references:
        unit = "noise floors; 1 is as close as another retrained model"
    points = "points of R² lost" if isinstance(before.left, Predictions) else "points lost"
    columns = ["tuned on", "forgetting", "usefulness", points][: 3 if stage.held[0].references else 4]
    compared = Table("", *columns, "held out", title=f"Scores, {unit}")
    for who, each in scores.items():
        shown = (*each["tuned on"][: len(columns)], each["held out"].total)
        compared.add_row(who, *(f"{value:.3g}" for value in shown))
    printing.show(tried, compared)
    sizes = [len(each.before.forget.labels) for each in (*stage.tuned, *stage.held)]
    size = str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    asked = stage.about["records"]
    cut = f", of {asked} asked for" if stage.removed and max(sizes) < asked else ""
    told = f"{len(stage.tuned)} pseudo-forget sets of {size} records{cut}"
    if stage.held[0].references:
        print(f"{told}, against {len(stage.held[0].references)} retrained models each.")
    else:
        own, held = (closeness.chance([each.before for each in sets]) for sets in (stage.tuned, stage.held))
        print(f"{told}, against test(). By chance alone forgetting misses 0 by about {own:.2g} (held out: {held:.2g}).")
    lost = scores[CHOSEN]["tuned on"].lost
    if lost > 100 * stage.may_lose:
        print(f"All settings lose too much of what is left, these {lost:.1f} points. --may-lose is {stage.may_lose:g}.")
    for name, value in found[0].settings.items():
        searched = space[name]
        if isinstance(searched, Range) and searched.near_an_end(value):
            print(
                f"{name}={value:g} is at an end of what was searched, {searched.low:g} to {searched.high:g}: a value "
                "beyond it may be better. Try some by name."
            )
    cures = {
        "holds up": "Rehearse with more --sets, or keep those.",
        "better than nothing": "Give more epochs or trials, another optimizer, or retrain from what is left.",
    }
    if not stage.held[0].references and closeness.records_needed([each.before for each in stage.tuned]) is not None:
        cures = dict.fromkeys(cures, "That may be chance: see the warning above.")
    for name, fine in verdicts(scores).items():
        if not fine:
            print(f"The chosen settings do NOT hold up: {chosen.AGAINST[name]}. {cures[name]}")
