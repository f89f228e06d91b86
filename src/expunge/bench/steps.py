"""What each stage does: results of the stages it needs in, files in its folder out."""

import importlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge import cache
from expunge.access import Blind, Sighted
from expunge.batches import Examples
from expunge.bench import judging, pseudo_sets, rehearsal, tasks
from expunge.bench.entries import Entry, entries
from expunge.bench.judging import SPENT
from expunge.bench.records import Records, records_of, spare
from expunge.bench.stages import (
    LOSSES,
    PSEUDO_SETS,
    Stage,
    Step,
    cache_of,
    cached_loss_of,
    start_of,
    tuning_of,
)
from expunge.bench.store import Store, read_json, write_json
from expunge.bench.tuning import Objective, plain, tune
from expunge.errors import NotFinite, NotInformative
from expunge.files import save_tensors
from expunge.gradient import Gradient, gradient
from expunge.losses import cross_entropy
from expunge.methods.fisher import FisherForgetting
from expunge.methods.retrain import Retrain
from expunge.metrics.outputs import Outputs
from expunge.space import with_settings
from expunge.trace import Trace
from expunge.training import train
from expunge.unlearn import unlearn
from expunge.weights import load_weights, save_weights

WEIGHTS, TRACE, CACHE, LOGITS, TRIALS = (
    "model.safetensors", "trace.json", "cache.safetensors", "logits.safetensors", "trials.json",
)  # fmt: skip
FAILURES = (NotFinite, NotInformative)  # of a method: results, not mistakes


def do(stage: Stage, store: Store) -> bool:
    """Do a stage unless it is done; whether it had to be."""
    with _threads(stage.task.threads):
        return store.make(stage, lambda folder: _STEPS[stage.step](stage, store, folder))


def _original(stage: Stage, store: Store, folder: Path) -> None:
    records = _records(stage, store)
    model = _untrained(stage, records, tasks.seed_of("original", stage.seed))
    trace = Trace("train", stage.seed)
    resume = store.unfinished(stage)
    with _timed(stage) as spent:
        train(model, records.before, cross_entropy, stage.task.recipe, seed=stage.seed, trace=trace, resume=resume)
    _keep(folder, model, trace, spent() + _earlier(stage, trace))


def _retrain(stage: Stage, store: Store, folder: Path) -> None:
    records = _records(stage, store)
    seed = tasks.seed_of("retrain", stage.seed, stage.number)
    like = _untrained(stage, records, tasks.seed_of("original", stage.seed))
    config = Retrain(recipe=stage.task.recipe, resume=str(store.unfinished(stage)))
    with _timed(stage) as spent:
        done = unlearn(like, _given(stage, records, None), config, seed=seed)
    _keep(folder, done.model, done.trace, spent() + _earlier(stage, done.trace))


def _cache(stage: Stage, store: Store, folder: Path) -> None:
    records = _records(stage, store)
    model = _stored(stage, records, store.result(start_of(stage)))
    with _timed(stage) as spent:
        full = gradient(model, LOSSES[stage.cached_loss], records.before)
    cache.save(folder / CACHE, full)
    write_json(folder / TRACE, {SPENT: spent(), "backwarded": full.count, "forwarded": 0})


def _outputs(stage: Stage, store: Store, folder: Path) -> None:
    records = _records(stage, store)
    model = _stored(stage, records, store.result(stage.needs["model"]))
    found = judging.looked_at(model, records, batch_size=judging.PIECE)
    save_tensors(folder / LOGITS, {split: torch.from_numpy(each.logits) for split, each in found.items()})


def _tune(stage: Stage, store: Store, folder: Path) -> None:
    """Every setting is tried on every rehearsal; the score is how far they are from never having been seen."""
    assert stage.effort is not None
    assert stage.contender is not None
    entry = entry_of(stage, _records(stage, store))
    objective, units = (_on_what_is_left if stage.contender.tuned == "blind" else _on_rehearsals)(stage, store, entry)
    tried = _forgiving(objective)
    trials = tune(
        entry.space,
        tried,
        trials=stage.effort.trials,
        seed=stage.seed,
        journal=store.journal(stage),
        about={"stage": stage.key},
    )
    if trials[0].score == math.inf:
        with suppress(NotFinite):  # that a method breaks down is a result; what else it raises ends the stage
            tried(trials[0].settings)
    write_json(folder / TRIALS, {"units": units, "best": trials[0].settings, "trials": list(map(plain, trials))})


def _on_rehearsals(stage: Stage, store: Store, entry: Entry) -> tuple[Objective, dict[str, float]]:
    """Other seeds, with forget sets and retrained models; how far from these, and the units of the distances."""
    assert stage.effort is not None
    rehearsals = [Situation(replace(stage, seed=seed), store) for seed in stage.effort.rehearsals]
    truths = [
        [
            read_outputs(each.records, store.result(each.stage.of("outputs", number=number)))
            for number in range(1, stage.effort.references + 1)
        ]
        for each in rehearsals
    ]
    corrects = stage.task.scenario.corrects
    unit = judging.units(truths, corrects)

    def objective(settings: dict[str, Any]) -> float:
        found = []
        for each in rehearsals:
            model = each.unlearned(entry, settings, each.stage.seed)[0]
            found.append(judging.looked_at(model, each.records, batch_size=judging.PIECE, only=judging.SCORED))
        return judging.score(found, truths, unit, corrects)

    return objective, unit


def _on_what_is_left(stage: Stage, store: Store, entry: Entry) -> tuple[Objective, dict[str, float]]:
    """Pseudo-forget sets of the very seed, as `expunge rehearse` draws them: blind, and nothing is retrained; nats."""
    situation = Situation(stage, store)
    given = situation.given
    left = gradient(situation.original, given.cached_terms, given.retain)
    blind = replace(given.blinded(), full=left)
    unseen = spare(stage.task, stage.seed, store.data).to(stage.task.device)
    problem = rehearsal.Problem(model=situation.original, given=blind, unseen=unseen)
    labels = situation.records.retain.tensors[1].cpu().numpy()
    removed = pseudo_sets.removed_of_each_class(situation.original, blind, given.cached() - left)
    drawn = pseudo_sets.draw(
        labels, "removed", len(situation.records.forget), PSEUDO_SETS, stage.seed, of_each_class=removed
    )
    sets = rehearsal.prepare(problem, drawn, seed=stage.seed)

    def objective(settings: dict[str, Any]) -> float:
        return rehearsal.score(sets, rehearsal.rehearse(problem, sets, with_settings(entry.start, settings))).total

    return objective, {}


def _unlearn(stage: Stage, store: Store, folder: Path) -> None:
    situation = Situation(stage, store)
    entry = entry_of(stage, situation.records)
    settings = settings_of(stage, store)
    try:
        with _timed(stage) as spent:
            model, trace = situation.unlearned(entry, settings, stage.seed)
    except FAILURES as error:  # the model stays as it was, for the deletions that follow
        save_weights(folder / WEIGHTS, situation.original)
        write_json(folder / TRACE, {"failed": str(error)})
        return
    _keep(folder, model, trace, spent())


def _evaluate(stage: Stage, store: Store, folder: Path) -> None:
    assert stage.contender is not None
    needs = stage.needs
    done = read_json(store.result(needs["model"]) / TRACE)
    reference = read_json(store.result(needs["reference"]) / TRACE)
    caching = read_json(store.result(needs["cache"]) / TRACE) if "cache" in needs else None
    records = _records(stage, store)
    own = None
    if "failed" not in done:
        model = _stored(stage, records, store.result(needs["model"]))
        try:
            own = judging.looked_at(model, records, batch_size=judging.PIECE)
        except NotFinite as error:  # of weights that are finite: a result of the method as well
            done = {"failed": str(error)}
    truth = read_outputs(records, store.result(needs["truth"]))
    judging.write(folder, stage, own, truth, done, reference, caching if cached_loss_of(stage.contender) else None)


_STEPS: Mapping[Step, Callable[[Stage, Store, Path], None]] = {
    "original": _original,
    "cache": _cache,
    "retrain": _retrain,
    "outputs": _outputs,
    "tune": _tune,
    "unlearn": _unlearn,
    "evaluate": _evaluate,
}


class Situation:
    """A trained model with its cached gradient, on the day that data is deleted or corrected."""

    def __init__(self, stage: Stage, store: Store) -> None:
        self.stage, self.records = stage, _records(stage, store)
        self.original = _stored(stage, self.records, store.result(start_of(stage)))
        cached = cache_of(stage)
        loss = LOSSES[cached.cached_loss]
        full = cache.load(store.result(cached) / CACHE, self.original, loss)
        self.given = replace(_given(stage, self.records, full), cached_loss=loss)

    def unlearned(self, entry: Entry, settings: Mapping[str, Any], seed: int) -> tuple[nn.Module, Trace]:
        """What a method makes of the model; its warnings are in the trace."""
        config = entry.configured(settings, self.records.removed_classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = unlearn(self.original, self.given, config, seed=seed)
        return done.model, done.trace


def entry_of(stage: Stage, records: Records) -> Entry:
    """The entry of a contender, with the budget of the experiment.

    Fisher forgetting passes back once for every class of a record, so that it gets as many records as make up the
    budget.
    """
    assert stage.contender is not None
    assert stage.effort is not None
    model = _untrained(stage, records, 0)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    entry = entries(stage.effort.budget, layers)[stage.contender.entry]
    if isinstance(entry.start, FisherForgetting):
        limit = max(stage.effort.budget.epochs * len(records.retain) // records.classes, 1)
        return replace(entry, start=replace(entry.start, limit=limit))
    return entry


def settings_of(stage: Stage, store: Store) -> dict[str, Any]:
    """Those that were tuned, with a contender's own on top."""
    assert stage.contender is not None
    best: dict[str, Any] = {}
    if stage.contender.tuned:
        best = read_json(store.result(tuning_of(stage)) / TRIALS)["best"]
    return {**best, **dict(stage.contender.settings)}


def read_outputs(records: Records, folder: Path) -> dict[str, Outputs]:
    """What the step outputs wrote, with the labels of the records."""
    from safetensors.torch import load_file

    logits = load_file(folder / LOGITS)
    labels = {split: data.tensors[1].cpu().numpy() for split, data in judging.judged(records).items()}
    return {split: Outputs(logits[split].numpy(), labels[split]) for split in labels}


def _forgiving(objective: Callable[[dict[str, Any]], float]) -> Callable[[dict[str, Any]], float]:
    """Settings with which the method finds nothing to do are as bad as those with which it breaks down."""

    def tried(settings: dict[str, Any]) -> float:
        try:
            return objective(settings)
        except NotInformative as error:
            raise NotFinite(str(error)) from error

    return tried


def _records(stage: Stage, store: Store) -> Records:
    found, device = records_of(stage.task, stage.seed, store.data), stage.task.device
    if device == "cpu":
        return found
    parts: dict[str, Examples] = {split: data.to(device) for split, data in found.parts.items()}
    same = found.unseen is found.parts["test"]
    return replace(
        found,
        before=found.before.to(device),
        retain=found.retain.to(device),
        forget=found.forget.to(device),
        parts=parts,
        unseen=parts["test"] if same else found.unseen.to(device),
        triggered=None if found.triggered is None else found.triggered.to(device),
    )


def _untrained(stage: Stage, records: Records, seed: int) -> nn.Module:
    return tasks.untrained(stage.task, records.classes, records.before.tensors[0].shape[1], seed)


def _stored(stage: Stage, records: Records, folder: Path) -> nn.Module:
    return load_weights(_untrained(stage, records, 0), folder / WEIGHTS)


def _given(stage: Stage, records: Records, full: Gradient | None) -> Blind:
    return Sighted(
        retain=records.retain,
        forget=records.forget,
        original=records.before,
        loss_terms=cross_entropy,
        fresh=lambda seed: _untrained(stage, records, seed),
        full=full,
    )


def _keep(folder: Path, model: nn.Module, trace: Trace, seconds: float) -> None:
    save_weights(folder / WEIGHTS, model)
    write_json(
        folder / TRACE,
        {**trace.as_dict(), SPENT: seconds, "sizes": {n: p.numel() for n, p in model.named_parameters()}},
    )


@contextmanager
def _timed(stage: Stage) -> Iterator[Callable[[], float]]:
    """Take the time of a block, seconds.

    On one thread of a CPU that is the time of the processor, which whatever else the machine does hardly lengthens;
    elsewhere it is wall time.
    """
    importlib.import_module("torch._dynamo")  # torch imports it at the first step of an optimiser: off the clock
    clock = time.process_time if _on_one_thread(stage) else time.perf_counter
    times = [clock()]
    yield lambda: times[1] - times[0]
    if stage.task.device == "cuda":
        torch.cuda.synchronize()
    times.append(clock())


def _earlier(stage: Stage, trace: Trace) -> float:
    """What a training took before it was interrupted, seconds of the same clock."""
    before = trace.facts.get("resumed", {"seconds": 0.0, "processor_seconds": 0.0})
    return float(before["processor_seconds" if _on_one_thread(stage) else "seconds"])


def _on_one_thread(stage: Stage) -> bool:
    return stage.task.device == "cpu" and stage.task.threads == 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many threads for torch, and for the libraries of scikit-learn, if it is there."""
    before = torch.get_num_threads()
    try:
        from threadpoolctl import threadpool_limits  # comes with scikit-learn

        limits: AbstractContextManager[Any] = threadpool_limits(count)
    except ImportError:
        limits = nullcontext()
    with limits:
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
