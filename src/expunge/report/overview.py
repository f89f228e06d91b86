"""A run in plain words: what changed, on how much data, and what the methods found out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from expunge.definitions import CORRECTED, FACTS, Definition, define, split_names
from expunge.report.stored import Fact
from expunge.report.summaries import FLOOR, ORIGINAL, REFERENCE, Summary, label, number
from expunge.report.verdicts import verdicts
from expunge.rows import Row

_LEADING = (CORRECTED, "FA", "Forget MSE")  # the number a reader asks for first

_SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Finding:
    """What the runs of a method found out, in words."""

    fact: str
    value: str
    meaning: str


def subject(methods: Iterable[str]) -> str | None:
    """The method that a report is about: RELOAD, or else the first that unlearns."""
    unlearning = [method for method in methods if method not in (ORIGINAL, REFERENCE, FLOOR)]
    return "reload" if "reload" in unlearning else next(iter(unlearning), None)


def sentences(summaries: Sequence[Summary], scenario: str, method: str) -> str:
    """A few sentences about a method in a scenario: what it changed, and how far from retraining that is."""
    found = {(s.method, s.metric): s for s in summaries if s.scenario == scenario}
    own = [metric for who, metric in found if who == method and define(metric).kind == "value"]
    leading = next((metric for metric in _LEADING if metric in own), next(iter(own), None))
    said = [] if leading is None else [_change(found, leading, method)]
    if leading not in _LEADING:
        said.insert(
            0, "Nothing was measured on the removed records, so that nothing here says whether they are forgotten"
        )
    judged = verdicts(found.values())
    if any(who == method for who, _ in judged):
        said.append(_judged({metric: verdict.state for (who, metric), verdict in judged.items() if who == method}))
        original = [verdict.state == "within" for (who, _), verdict in judged.items() if who == ORIGINAL]
        said[-1] += f" The original is within it on {sum(original) or 'none'}." if original else ""
    cost = found.get((method, "Cost"))
    if cost is not None:
        said.append(f"{label(method)} took {100 * cost.mean:.3g}{_SPACE}% of the time of retraining")
    return " ".join(sentence.rstrip(".") + "." for sentence in said)


def corrects(rows: Iterable[Row], scenario: str) -> bool:
    """Whether records were corrected in a scenario, and not removed."""
    return any(row.metric == CORRECTED and row.scenario == scenario for row in rows)


def title(scenario: str) -> str:
    """A scenario as a heading; what somebody called it stays as it is, but for its first letter."""
    return scenario[:1].upper() + scenario[1:]


def defined(summaries: Iterable[Summary]) -> dict[str, Definition]:
    """What every metric of a run means, in the unit that it has there: losses of a regression are in no nats."""
    return {summary.metric: replace(define(summary.metric), unit=summary.unit) for summary in summaries}


def sizes(rows: Sequence[Row], scenario: str) -> str:
    """On how many records the numbers of a scenario stand, each seed."""
    counts: dict[str, set[int]] = {}
    for row in rows:
        if row.scenario == scenario and row.split:
            counts.setdefault(row.split, set()).add(row.n)
    names = split_names(corrects(rows, scenario))
    parts = [
        f"{min(found):,} {names.get(split, split)}"
        if len(found) == 1
        else f"{min(found):,} to {max(found):,} {names.get(split, split)}"
        for split, found in sorted(counts.items(), key=lambda item: [*names, item[0]].index(item[0]))
    ]
    return f"{', '.join(parts[:-1])} and {parts[-1]} records" if len(parts) > 1 else f"{''.join(parts)} records"


def findings(facts: Iterable[Fact]) -> dict[tuple[str, str], list[Finding]]:
    """Facts by scenario and method: mean and range of numbers, and how often each text was said."""
    grouped: dict[tuple[str, str], dict[str, list[Fact]]] = {}
    for fact in facts:
        grouped.setdefault((fact.scenario, fact.method), {}).setdefault(fact.fact, []).append(fact)
    seeds = {key: len({fact.seed for same in named.values() for fact in same}) for key, named in grouped.items()}
    return {
        key: [Finding(name, _over_seeds(same, seeds[key]), FACTS.get(name, "")) for name, same in named.items()]
        for key, named in grouped.items()
    }


def _change(found: dict[tuple[str, str], Summary], metric: str, method: str) -> str:
    def value(who: str) -> str:
        summary = found[who, metric]
        return f"{number(summary.mean, summary.unit)}{_SPACE}{summary.unit}"

    text = f"{label(method)} changed the {define(metric).name}"
    text += f" from {value(ORIGINAL)} (original)" if (ORIGINAL, metric) in found else ""
    text += f" to {value(method)}"
    text += f"; retraining gives {value(REFERENCE)}" if (REFERENCE, metric) in found else ""
    apart = _apart(found, metric)
    return text + (f", and two retrains differ by {apart}." if apart else ".")


def _judged(states: Mapping[str, str]) -> str:
    """On which distances a method is indistinguishable from retraining, on which it is not, on which that is open."""
    parts = []
    for state, words in (
        ("within", "indistinguishable from retraining within the noise floor"),
        ("beyond", "further from it"),
        ("open", "undecided"),
    ):
        on = [metric for metric, each in states.items() if each == state]
        if on or state == "within":
            parts.append(f"{words} on {len(on) or 'none'}" + (f" ({', '.join(on)})" if on else ""))
    return f"Of {len(states)} distance{'s' * (len(states) > 1)} it is {', '.join(parts)}."


def _apart(found: dict[tuple[str, str], Summary], metric: str) -> str:
    """How far two retrained models are apart in a metric, mean over seeds."""
    if (FLOOR, f"Δ{metric}") in found:
        floor = found[FLOOR, f"Δ{metric}"]
        return f"{number(floor.mean, floor.unit)}{_SPACE}{floor.unit}"
    pair = [found.get((who, metric)) for who in (REFERENCE, FLOOR)]
    first, second = pair
    if first is None or second is None or first.n != second.n:
        return ""
    gap = fmean(abs(a - b) for a, b in zip(first.values, second.values, strict=True))
    unit = "points" if first.unit == "%" else first.unit
    return f"{number(gap, unit)}{_SPACE}{unit}"


def _over_seeds(facts: Sequence[Fact], seeds: int) -> str:
    try:
        numbers = [float(fact.value) for fact in facts]
    except ValueError:
        return _texts(facts, seeds)
    whole = all(each.is_integer() and abs(each) >= 10 for each in numbers)
    low, mean, high = (
        f"{each:,.0f}" if whole else f"{each:.3g}" for each in (min(numbers), fmean(numbers), max(numbers))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def _texts(facts: Sequence[Fact], seeds: int) -> str:
    """Texts that differ in their numbers alone are one text, with … where they differ."""
    kinds: dict[str, list[Fact]] = {}
    for fact in facts:
        kinds.setdefault(re.sub(r"\d[\d.e+-]*", "#", fact.value), []).append(fact)
    said = []
    for same in kinds.values():
        each = zip(*(fact.value.split() for fact in same), strict=True)
        words = [words[0] if len(set(words)) == 1 else "…" for words in each]
        said.append(f"{' '.join(words)} ({len({fact.seed for fact in same})} of {seeds} seeds)")
    return "; ".join(said)
