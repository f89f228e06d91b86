"""How models of an experiment are judged: outputs, the score of a rehearsal, and rows with costs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from expunge.batches import Examples
from expunge.bench.entries import SHORT, entries
from expunge.bench.records import Records
from expunge.bench.stages import Stage
from expunge.bench.tasks import Scenario
from expunge.metrics.classification import accuracy, cross_entropy, symmetric_kl
from expunge.metrics.compare import Measured, Profile, distances, profile
from expunge.metrics.outputs import Answers, Outputs, outputs
from expunge.report.overview import subject
from expunge.report.summaries import ORIGINAL, REFERENCE
from expunge.rows import Row, write_csv, write_rows

PIECE = 512  # positions of a forward pass
TRIGGERED = "retain, triggered"
SCORED = ("retain", "forget", TRIGGERED)  # splits that a rehearsal looks at; no test record, which all seeds share
# Points and nats that are no distance worth tuning for.
CLOSE = {"NA": 0.5, "FA": 1.0, "NA with trigger": 1.0, "FE": 1e-3, "FSKL": 1e-3}
UNSEEN = "unseen"
_ALWAYS = ("NA", "TA", "NSKL", "FSKL", "Cost", "Work")
_OF_REMOVED = ("FA", "FE", "FMIA", "AUC")  # after a correction they say nothing, see `profile_of`
SPENT = "spent"  # in a trace: seconds that count as cost
Splits = dict[str, Outputs]
TABLES = {
    "facts": ("scenario", "method", "seed", "fact", "value"),
    "reset": ("scenario", "method", "seed", "parameter", "share", "entries"),
    "losses": ("scenario", "method", "seed", "split", "loss"),
}


def metrics_of(scenario: Scenario) -> tuple[str, ...]:
    """The metrics that there are rows of: after a correction, or after a removal."""
    if scenario.corrects:
        with_fault = ("TA with noise" if scenario.kind == "noise" else "TA with trigger",) if scenario.on_inputs else ()
        of_classes = ("Acc_corr",) if scenario.named_classes else ()
        return (*_ALWAYS, *with_fault, *of_classes, "Accuracy on corrected")
    return (*_ALWAYS, *_OF_REMOVED, *(f"Δ{name}" for name in _OF_REMOVED))


def judged(records: Records) -> dict[str, Examples]:
    """What models are judged on: the splits, what rehearsals look at besides, and unseen records of their own."""
    found = dict(records.parts)
    if records.triggered is not None:
        found[TRIGGERED] = records.triggered
    if records.unseen is not records.parts["test"]:
        found[UNSEEN] = records.unseen
    return found


def looked_at(model: nn.Module, records: Records, *, batch_size: int, only: Collection[str] = ()) -> Splits:
    """Outputs by split."""
    return {
        split: outputs(model, data, batch_size=batch_size)
        for split, data in judged(records).items()
        if not only or split in only
    }


def gaps(own: Mapping[str, Outputs], truth: Mapping[str, Outputs], corrects: bool) -> dict[str, float]:
    """The distances to a retrained model that a rehearsal scores, by name.

    Of accuracies the differences: on what is left, on what was removed or corrected, and if inputs had faults on what
    is left with the trigger. Of a removal also the difference in loss and the divergence on what was removed. NSKL is
    not among them, nor FSKL after a correction: two retrained models agree almost perfectly on what they learned by
    heart, and in noise floors it would drown the rest.
    """
    splits = {"NA": "retain", "FA": "forget"} | ({"NA with trigger": TRIGGERED} if TRIGGERED in truth else {})
    found = {name: abs(accuracy(own[split]) - accuracy(truth[split])) for name, split in splits.items()}
    if not corrects:
        found["FSKL"] = symmetric_kl(own["forget"], truth["forget"])
        found["FE"] = abs(cross_entropy(own["forget"]) - cross_entropy(truth["forget"]))
    return found


def units(truths: Sequence[Sequence[Splits]], corrects: bool) -> dict[str, float]:
    """What each distance is divided by: that between two retrained models, mean over pairs and rehearsals.

    Never less than what counts as close (`CLOSE`). The loss of few records differs by chance, which one pair of models
    says little of: its unit is the standard error of the difference, but of a single record, which has none.
    """
    pairs = [pair for models in truths for pair in combinations(models, 2)]
    found = [gaps(one, other, corrects) for one, other in pairs]
    measured = {name: fmean(each[name] for each in found) for name in found[0]}
    if not corrects and len(pairs[0][0]["forget"].labels) > 1:
        apart = [one["forget"].losses - other["forget"].losses for one, other in pairs]
        measured["FE"] = fmean(float(each.std(ddof=1)) / len(each) ** 0.5 for each in apart)
    return {name: max(each, CLOSE[name]) for name, each in measured.items()}


def score(
    found: Sequence[Splits], truths: Sequence[Sequence[Splits]], unit: Mapping[str, float], corrects: bool
) -> float:
    """How far models are from retraining in these units, mean over distances, rehearsals and retrained models."""
    apart = [gaps(own, truth, corrects) for own, models in zip(found, truths, strict=True) for truth in models]
    return fmean(fmean(each[name] for each in apart) / unit[name] for name in unit)


def write(
    folder: Path,
    stage: Stage,
    own: Splits | None,
    truth: Splits,
    done: Mapping[str, Any],
    reference: Mapping[str, Any],
    caching: Mapping[str, Any] | None,
) -> None:
    """Write rows.csv and what else a report reads into a stage's folder.

    Args:
        folder: Where to.
        stage: Whom the rows are about.
        own: Outputs of the model; None if the method failed.
        truth: Outputs of the retrained model.
        done: The trace of the model.
        reference: That of the retrained model.
        caching: That of the cached gradient, if its cost is one of the method's.
    """
    assert stage.contender is not None
    name, key = stage.contender.name, (stage.task.name, stage.contender.name, stage.seed)
    rows: list[Row] = []
    if own is not None:
        parts = [done] if caching is None else [done, caching]
        seconds = sum(part[SPENT] for part in parts) if name != ORIGINAL else 0.0
        measured = list(_measured(own, truth, stage))
        if name != ORIGINAL:
            work = sum(map(passes, parts)) / passes(reference)
            measured.append(Measured("Cost", seconds / reference[SPENT], "ratio", "", 1))
            measured.append(Measured("Work", work, "ratio", "", 1))
        known = entries(SHORT).get(stage.contender.entry)
        rows = [_row(stage, each, seconds, known is None or known.blind) for each in measured]
    write_rows(folder / "rows.csv", rows)
    facts = [("failed", done["failed"])] if "failed" in done else facts_of(done)
    write_csv(folder / "facts.csv", TABLES["facts"], [(*key, *each) for each in facts] if stage.effort else [])
    resets = [(*key, part, share, done["sizes"][part]) for part, share in done.get("reset", {}).items()]
    write_csv(folder / "reset.csv", TABLES["reset"], resets)
    lines = [] if own is None else [(*key, split, loss) for split, loss in attacked(own)]
    write_csv(folder / "losses.csv", TABLES["losses"], lines)


def attacked(found: Mapping[str, Answers]) -> Iterator[tuple[str, float]]:
    """Single losses that an attack has, by split: "test" are unseen records like the removed ones, where those are."""
    for split, each in (("forget", found["forget"]), ("test", found.get(UNSEEN, found["test"]))):
        yield from ((split, loss) for loss in each.losses.tolist())


def drawn(methods: Sequence[str]) -> tuple[str | None, ...]:
    """Whose single losses the figures of a report show."""
    return (ORIGINAL, subject(methods), REFERENCE)


def passes(trace: Mapping[str, Any]) -> float:
    """The work of a trace in forward passes of an example; a backward pass counts as two."""
    return float(3 * trace["backwarded"] + trace["forwarded"])


def _measured(own: Splits, truth: Splits, stage: Stage) -> list[Measured]:
    corrects = stage.task.scenario.corrects
    mine = profile_of(own, corrects, stage.seed)
    assert stage.contender is not None
    if stage.contender.entry == REFERENCE:
        return mine.values
    return mine.values + distances(mine, profile_of(truth, corrects, stage.seed))


def profile_of(found: Splits, corrects: bool, seed: int) -> Profile:
    """All that is to be said of a model by itself.

    After a correction retrained models fit the corrected records, so that neither loss nor attack say anything of them.
    Where removed records are of one class, the attack tells them from test records of that class.
    """
    if corrects:
        rest = profile({split: each for split, each in found.items() if split not in ("forget", TRIGGERED)}, seed=seed)
        right = found["forget"]
        own = Measured("Accuracy on corrected", accuracy(right), "%", "forget", len(right.labels))
        return Profile(found, [*rest.values, own])
    test = found["test"]
    whole = profile({**found, "test": found.get(UNSEEN, test)}, seed=seed)
    seen = Measured("TA", accuracy(test), "%", "test", len(test.labels))
    return Profile(whole.splits, [seen if each.metric == "TA" else each for each in whole.values])


def _row(stage: Stage, each: Measured, seconds: float, blind: bool) -> Row:
    assert stage.contender is not None
    task, contender = stage.task, stage.contender
    return Row(
        run=f"{task.name}/{stage.seed}",
        experiment="",
        dataset=task.dataset,
        model=task.about,
        scenario=task.name,
        method=contender.name,
        blind=blind,
        seed=stage.seed,
        split=each.split,
        metric=each.metric,
        value=each.value,
        unit=each.unit,
        n=each.n,
        seconds=seconds,
    )


def facts_of(trace: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What a method found out, why it stopped, and its warnings."""
    single = {n: v for n, v in trace["facts"].items() if isinstance(v, bool | int | float | str)}
    return [*single.items(), ("stopped", trace["stopped"]), *(("warning", text) for text in trace["warnings"])]
