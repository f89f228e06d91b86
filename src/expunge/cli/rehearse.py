"""The command that chooses settings on records that are still there: rehearse."""

import math
import shlex
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import cache as cache_file
from expunge import provenance
from expunge.access import Blind
from expunge.bench import chosen, closeness, inputs, pseudo_sets, rehearsal, tuning
from expunge.bench.closeness import MAY_LOSE, Score, Seen
from expunge.bench.pseudo_sets import Like
from expunge.bench.rehearsal import Problem, Rehearsal
from expunge.bench.tuning import Trial
from expunge.cli import printing
from expunge.cli.arguments import Flag, Maybe, SetupFile
from expunge.cli.own_model import method_argument, require_new, trained_model
from expunge.errors import ConfigError, NotFinite
from expunge.gradient import MICRO_BATCH, gradient
from expunge.methods import all_methods, method_of
from expunge.metrics.outputs import outputs
from expunge.setup import Setup, load_setup
from expunge.space import settings_of, with_settings

if TYPE_CHECKING:
    Rehearsable = object
else:
    Rehearsable = method_argument(each for each in all_methods().values() if each.blind and each.space)

NOTHING, GIVEN, CHOSEN = "no unlearning", "settings as given", "settings chosen"
_SHOWN = 10  # trials in the table
_Confirmed = dict[str, dict[str, Score]]  # by settings: on the tuned sets, on the one that was held out


@dataclass(frozen=True)
class _Stage:
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


def rehearse(
    setup: SetupFile,
    method: Rehearsable,
    *,
    weights: Path,
    cache: Maybe[Path] = None,
    out: Path = Path("settings.json"),
    like: Like = "random",
    records: Maybe[int] = None,
    sets: int = 3,
    retrain: int = 0,
    may_lose: float = MAY_LOSE,
    trials: int = 25,
    minutes: float = math.inf,
    journal: Maybe[Path] = None,
    seed: int = 0,
    device: str = "auto",
    replace: Flag = False,
    json: Flag = False,
) -> None:
    """Choose the settings of a method that works without the removed records, without them.

    Draws pseudo-forget sets from what is left, unlearns them blind with many settings, and takes those that come
    closest to never having seen them; one more set says whether they hold up. Goes on where it was interrupted.
    Methods that need the removed records cannot be rehearsed, nor can those without settings to choose.

    Args:
        setup: Python file with model(seed), retain(), loss_terms, and test() or recipe.
        method: The method and the settings to start from; what it does not tune stays so, fine_tune.epochs for example.
        weights: The trained weights that the cache was made at.
        cache: The gradient cache: it says how many records were removed. Without it, give --records.
        out: Where the settings go, for `expunge unlearn --settings`.
        like: What was removed: records at random; records of the classes that the cache tells were "removed"; all
            records of some persons (needs persons() in the setup file); records of one class; a whole class (needs
            --retrain).
        records: Size of a pseudo-forget set; by default as many as were removed. Few are ruled by chance: take 50.
            Of whole persons the least size, of the classes that were removed the most.
        sets: Pseudo-forget sets to tune on, at least 2; one more is drawn to confirm.
        retrain: Models to retrain for each set as references, at least 2; 0 judges against test() instead.
        may_lose: Share of what is left that a model may tell wrongly after an unlearning and did not before: settings
            that cost more are no better than none. Not used with --retrain.
        trials: Settings to try, those given among them.
        minutes: No trial begins later than this.
        journal: Where finished trials are kept; by default beside OUT.
        seed: Of the sets, the trials and the unlearning.
        device: auto, cpu, cuda, cuda:1, …
        replace: Write over settings that exist.
        json: Print JSON.
    """
    require_new(out, setup, weights, *([cache] if cache else []))
    if out.exists() and not replace:
        raise ConfigError(f"{out} exists: give another name, or --replace.")
    if sets < 2:
        raise ConfigError(f"sets={sets}: settings that suit a single set may suit nothing else. Take 2 or more.")
    if like == "class" and not retrain:
        raise ConfigError(
            "like='class': unseen records of a class that was trained on are known as well as the removed ones, and "
            "show nothing of a model that never saw the class. Retrain models to compare with: --retrain 2."
        )
    if like == "class" and records is not None:
        raise ConfigError(f"records={records}, like='class': a whole class has the size it has. Leave one of them out.")
    if like == "removed" and cache is None:
        raise ConfigError("like='removed': it is the cache that tells the classes of what was removed. Give --cache.")
    if not 0 <= may_lose < 1:
        raise ConfigError(f"may_lose={may_lose}: give a share of what is left, from 0 to below 1.")
    row = method_of(method)
    tuning.require_optuna()
    read = {"setup": setup, "weights": weights} | ({"cache": cache_file.file_of(cache)} if cache else {})
    hashes = inputs.hashes_of(path for path in read.values() if path.is_file())
    stage = _stage(load_setup(setup), weights, cache, like, records, sets, retrain, may_lose, seed, device)
    inputs.require_unchanged(hashes)
    if stage.removed and not json:  # before the search: it can be interrupted if this is wrong
        most = stage.removed.most_common(_SHOWN)
        print("removed, as the cache tells:", ", ".join(f"class {label}: {count}" for label, count in most))
    _warn_of_chance(stage)
    about = stage.about | {"method": row.name, "settings": settings_of(method), "code": provenance.sources()}
    about |= {"files": {role: hashes[path] for role, path in read.items()}}

    def objective(settings: dict[str, Any]) -> float:
        after = rehearsal.rehearse(stage.problem, stage.tuned, with_settings(method, settings))
        return stage.score(stage.tuned, after).total

    kept = journal or out.with_suffix(".trials.jsonl")
    found = tuning.tune(
        row.space,
        objective,
        trials=trials,
        seed=seed,
        journal=kept,
        about=about,
        first=settings_of(method),
        seconds=60 * minutes,
    )
    if not found or found[0].score == math.inf:
        reason = found[0].failure if found else f"no trial began in {minutes:g} minutes."
        raise ConfigError(
            f"no settings of {row.name} worked: {reason} "
            "Give more time or trials, or other settings where this method does not tune."
        )
    best = with_settings(method, found[0].settings)
    scores = _confirm(stage, {GIVEN: method, CHOSEN: best})
    after = {"trials": len(found), "scores": _plain(scores), **verdicts(scores)}
    chosen.write_settings(out, best, about | after)
    command = ["expunge", "unlearn", str(setup), "--weights", str(weights), *(["--cache", str(cache)] if cache else [])]
    command += ["--settings", str(out), "--out", "unlearned.safetensors", row.name]
    if json:
        tried = [tuning.plain(trial) for trial in found]
        result = {"tried": tried, "chosen": found[0].settings, "file": str(out), "command": command}
        result = about | after | {"removed": dict(stage.removed.most_common())} | result
        print(printing.as_json(result))
        return
    _show(stage, found, scores, kept)
    print(f"settings: {out}")
    if not all(verdicts(scores).values()):
        print("This unlearns with them all the same, and warns:")
    print(shlex.join(command))


def _warn_of_chance(stage: _Stage) -> None:
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
            f"It would take --records {needed}, more than retain() has: rehearse against retrained models "
            "(--retrain 3), or keep the settings as they are."
        )
    else:
        cure = f"Use --records {needed}."
    warnings.warn(
        f"{size} records are too few to rehearse: there are {gain:.2g} nats to forget, and by chance alone the "
        f"forgetting of {len(before)} sets misses 0 by about {error:.2g}. {cure}",
        stacklevel=2,
    )


def _stage(
    loaded: Setup,
    weights: Path,
    cache: Path | None,
    like: Like,
    records: int | None,
    sets: int,
    retrain: int,
    may_lose: float,
    seed: int,
    device: str,
) -> _Stage:
    if cache is None and records is None and like != "class":
        raise ConfigError(
            "without a cache nobody knows how many records were removed. Give --cache, or --records with their number."
        )
    model = trained_model(loaded, weights, device)
    retain, cached = loaded.data("retain"), None
    if cache is not None:
        cached = cache_file.load(cache, model, loaded.cached_terms)
    left = gradient(
        model,
        loaded.cached_terms,
        retain,
        parameters=cached.total if cached else None,
        micro_batch=cached.micro_batches.size if cached and cached.micro_batches else MICRO_BATCH,
        checkpoint=cached.recomputed if cached else False,
    )
    counted = records is None and like != "class"
    removed = cached - left if cached is not None and (counted or like == "removed") else None
    count = pseudo_sets.removed_count(removed) if counted and removed else records or 0
    problem = Problem(
        model=model,
        given=Blind(
            retain=retain,
            loss_terms=loaded.loss_terms,
            fresh=loaded.model,
            full=left,
            cached_loss=loaded.cached_terms,
        ),
        unseen=loaded.data("test") if loaded.has("test") and not retrain else None,
        logits=loaded.logits,
    )
    labels = outputs(model, retain, loaded.logits).labels
    persons = loaded.persons(len(labels)) if like == "person" else None
    classes = None
    if like == "removed":
        assert removed is not None
        classes = pseudo_sets.removed_of_each_class(model, problem.given, removed, loaded.logits)
    drawn = pseudo_sets.draw(labels, like, count, sets + 1, seed, persons, classes)
    recipe = loaded.recipe if retrain and loaded.has("recipe") else None
    prepared = rehearsal.prepare(problem, drawn, seed=seed, recipe=recipe, retrain=retrain)
    about: dict[str, Any] = {"like": like, "records": count or None, "sets": sets, "retrain": retrain, "seed": seed}
    if not retrain:
        about["may_lose"] = may_lose
    about |= {"left": {"terms": left.count, "loss": f"{left.loss:.6g}"}}  # data that changed is another search
    told = Counter({label: round(each) for label, each in enumerate([] if classes is None else classes.tolist())})
    return _Stage(problem, prepared[:sets], prepared[sets:], may_lose, +told, about)


def _confirm(stage: _Stage, configs: Mapping[str, object]) -> _Confirmed:
    """Scores on the sets that were tuned on, and on the one that was not."""
    both = {"tuned on": stage.tuned, "held out": stage.held}
    found = {NOTHING: {name: stage.score(sets, [each.before for each in sets]) for name, sets in both.items()}}
    for who, config in configs.items():
        found[who] = {name: _score(stage, sets, config) for name, sets in both.items()}
    return found


def _score(stage: _Stage, sets: Sequence[Rehearsal], config: object) -> Score:
    try:
        return stage.score(sets, rehearsal.rehearse(stage.problem, sets, config))
    except NotFinite:
        return Score(math.inf, math.inf, math.inf)


def _plain(scores: _Confirmed) -> dict[str, dict[str, dict[str, float | None]]]:
    """As JSON holds them, which knows no infinity."""
    return {
        who: {
            sets: {k: v if math.isfinite(v) else None for k, v in found._asdict().items()}
            for sets, found in each.items()
        }
        for who, each in scores.items()
    }


def verdicts(scores: _Confirmed) -> dict[str, bool]:
    """By key of `chosen.AGAINST`: whether the chosen settings are what they should be on the set not tuned on."""
    nothing, given, best = (scores[who]["held out"].total for who in (NOTHING, GIVEN, CHOSEN))
    return {"holds up": best <= given, "better than nothing": best < nothing}


def _show(stage: _Stage, found: Sequence[Trial], scores: _Confirmed, journal: Path) -> None:
    from rich.table import Table

    names = list(found[0].settings)
    tried = Table("trial", "score", *names, "s", title=f"The best of {len(found)} trials ({journal} has all)")
    for trial in found[:_SHOWN]:
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in trial.settings.values()]
        tried.add_row(str(trial.number), f"{trial.score:.3g}", *values, f"{trial.seconds:.1f}")
    unit = "nats; 0 is perfect"
    if stage.held[0].references:
        unit = "noise floors; 1 is as close as another retrained model"
    compared = Table("", "tuned on", "forgetting", "usefulness", "held out", title=f"Scores, {unit}")
    for who, each in scores.items():
        compared.add_row(who, *(f"{value:.3g}" for value in (*each["tuned on"], each["held out"].total)))
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
    cures = {
        "holds up": "Rehearse with more --sets, or keep those.",
        "better than nothing": "Give more epochs or trials, another optimizer, or retrain from what is left.",
    }
    if not stage.held[0].references and closeness.records_needed([each.before for each in stage.tuned]) is not None:
        cures = dict.fromkeys(cures, "That may be chance: see the warning above.")
    for name, fine in verdicts(scores).items():
        if not fine:
            print(f"The chosen settings do NOT hold up: {chosen.AGAINST[name]}. {cures[name]}")
