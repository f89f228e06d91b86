"""One scenario and seed, measured: rows for the tables of a report, and lines for its figures."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from expunge.access import Blind
from expunge.batches import Examples
from expunge.bench import judging
from expunge.bench.situations import Situation
from expunge.errors import NotFinite
from expunge.methods.retrain import Retrain
from expunge.metrics.classification import accuracy
from expunge.metrics.compare import Measured, Profile, distances, measured_rows
from expunge.metrics.outputs import Outputs, outputs
from expunge.report.summaries import FLOOR, ORIGINAL, REFERENCE
from expunge.rows import Row
from expunge.training import Recipe
from expunge.unlearn import unlearn

Moments = Iterable[tuple[str, nn.Module]]  # the model after each stage and epoch


@dataclass(frozen=True)
class Result:
    """A model to measure."""

    model: nn.Module
    seconds: float = 0.0  # wall time, caching included; 0 for a model that unlearned nothing
    blind: bool = True
    trace: Mapping[str, Any] = field(default_factory=dict)  # of the unlearning, as plain values


@dataclass
class Case:
    """What one scenario and seed leave behind."""

    experiment: str
    scenario: str
    seed: int
    rows: list[Row] = field(default_factory=list)
    curves: list[tuple[Any, ...]] = field(default_factory=list)  # method, moment, step, split, loss
    resets: list[tuple[Any, ...]] = field(default_factory=list)  # method, parameter, share, entries
    losses: list[tuple[Any, ...]] = field(default_factory=list)  # method, split, loss
    facts: list[tuple[Any, ...]] = field(default_factory=list)  # method, fact, value

    def add(self, method: str, result: Result, measured: Iterable[Measured]) -> None:
        """Append one row a number."""
        self.rows += measured_rows(
            measured,
            run=f"{self.scenario}/{self.seed}",
            experiment=self.experiment,
            dataset="digits",
            model="ConvNet(16, 32)",
            scenario=self.scenario,
            method=method,
            blind=result.blind,
            seed=self.seed,
            seconds=result.seconds,
        )

    def describe(self, method: str, result: Result, *, resets: bool = False) -> None:
        """Keep what a method found out, why it stopped, and where it re-initialised."""
        trace = result.trace
        self.facts += [(method, *each) for each in judging.facts_of(trace)]
        if resets:
            sizes = {name: p.numel() for name, p in result.model.named_parameters()}
            self.resets += [(method, name, share, sizes[name]) for name, share in trace["reset"].items()]


def standards(situation: Situation, recipe: Recipe) -> dict[str, Result]:
    """What everything is measured against: the original, a retrained model, and another retrained model."""
    retrain = Retrain(recipe=recipe)
    return {
        ORIGINAL: Result(situation.original),
        REFERENCE: attempt(situation.original, situation.given, retrain, 1000 + situation.seed),
        FLOOR: attempt(situation.original, situation.given, retrain, 2000 + situation.seed),
    }


def attempt(
    model: nn.Module,
    given: Blind,
    config: object,
    seed: int,
    *,
    blind: bool = True,
    caching: float = 0.0,
    watch: Callable[[str, nn.Module], None] | None = None,
) -> Result:
    """Unlearn, with the time it took and what else belongs to its cost."""
    done = unlearn(model, given, config, seed=seed, watch=watch)
    return Result(done.model, caching + sum(done.trace.seconds.values()), blind, done.trace.as_dict())


def measure(experiment: str, situation: Situation, results: Mapping[str, Result]) -> Case:
    """Measure every model, and its distances to the retrained one.

    Args:
        experiment: Its name, for the rows.
        situation: What the models are judged on.
        results: By method; `standards` are among them. What a method made that has no finite outputs has no rows.
    """
    case, drawn = Case(experiment, situation.scenario, situation.seed), judging.drawn(list(results))
    reference = results[REFERENCE]
    truth = observe(situation, reference.model)
    for method, result in results.items():
        try:
            found = truth if method == REFERENCE else observe(situation, result.model)
        except NotFinite as error:
            if method in (ORIGINAL, FLOOR):
                raise
            case.facts.append((method, "failed", str(error)))
            continue
        case.add(method, result, found.values)
        if method != REFERENCE:
            case.add(method, result, distances(found, truth))
        if result.seconds:
            case.add(method, result, [Measured("Cost", result.seconds / reference.seconds, "ratio", "", 1)])
        if method in drawn:
            case.losses += [(method, *each) for each in judging.attacked(found.splits)]
    return case


def observe(situation: Situation, model: nn.Module) -> Profile:
    """All that is to be said of a model by itself.

    After a correction that is the accuracy on the corrected records and on test data. After a removal it is everything
    in `profile`; the attack tells the removed records from test records *like them*, and where a class was removed,
    test accuracy is that on the classes that are left.
    """
    found = _outputs(model, situation.parts)
    if situation.scenario == "label-correction":
        corrected = found["forget"]
        test = Measured("TA", accuracy(found["test"]), "%", "test", len(found["test"].labels))
        right = Measured("Accuracy on corrected", accuracy(corrected), "%", "forget", len(corrected.labels))
        return Profile(found, [right, test])
    if situation.unseen is not situation.parts["test"]:
        found[judging.UNSEEN] = outputs(model, situation.unseen)
    return judging.profile_of(found, corrects=False, seed=situation.seed)


def curves(situation: Situation, moments: Moments, trace: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """RELOAD's mean loss on every split at every moment; ``step`` counts the steps of fine-tuning."""
    for moment, model in [(ORIGINAL, situation.original), *moments]:
        if moment == "fine-tune":
            continue  # the same weights as after the last epoch
        epoch = int(moment.removeprefix("epoch ")) if moment.startswith("epoch ") else 0
        step = trace["epoch_ends"][epoch - 1] if epoch else 0
        for split, found in _outputs(model, situation.parts).items():
            loss = float(found.losses.mean())
            assert math.isfinite(loss)
            yield ("reload", moment, step, split, loss)


def _outputs(model: nn.Module, parts: Mapping[str, Examples]) -> dict[str, Outputs]:
    return {split: outputs(model, data) for split, data in parts.items()}
