"""The command that chooses settings on records that are still there: rehearse."""

import math
import shlex
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import cache as cache_file
from expunge import provenance
from expunge.access import Blind
from expunge.batches import indexed
from expunge.bench import chosen, inputs, pseudo_sets, rehearsal, tuning
from expunge.bench.closeness import MAY_LOSE
from expunge.bench.evaluation import copies_in_splits
from expunge.bench.pseudo_sets import Like
from expunge.bench.rehearsal import Problem
from expunge.cli import printing, rehearsed
from expunge.cli.arguments import Flag, Maybe, SetupFile
from expunge.cli.own_model import method_argument, require_new, trained_model
from expunge.cli.rehearsed import Stage
from expunge.errors import ConfigError
from expunge.gradient import MICRO_BATCH, gradient
from expunge.methods import all_methods, method_of
from expunge.metrics.outputs import Predictions, answers
from expunge.setup import Setup, load_setup
from expunge.space import settings_of, with_settings

if TYPE_CHECKING:
    Rehearsable = object
else:
    Rehearsable = method_argument(each for each in all_methods().values() if each.blind and each.space)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The sets that are rehearsed on, and what settings are judged by."""

    cache: Path | None
    like: Like
    records: int | None
    sets: int
    retrain: int
    may_lose: float
    seed: int

    def __post_init__(self) -> None:
        if self.sets < 2:
            raise ConfigError(
                f"sets={self.sets}: settings that suit a single set may suit nothing else. Take 2 or more."
            )
        if self.like == "class" and not self.retrain:
            raise ConfigError(
                "like='class': unseen records of a class that was trained on are known as well as the removed ones, "
                "and show nothing of a model that never saw the class. Retrain models to compare with: --retrain 2. "
                "(A regression has no classes: take --like random.)"
            )
        if self.like == "class" and self.records is not None:
            raise ConfigError(
                f"records={self.records}, like='class': a whole class has the size it has. Leave one of them out."
            )
        if self.like == "removed" and self.cache is None:
            raise ConfigError(
                "like='removed': it is the cache that tells the classes of what was removed. Give --cache."
            )
        if not 0 <= self.may_lose < 1:
            raise ConfigError(f"may_lose={self.may_lose}: give a share of what is left, from 0 to below 1.")
        if self.cache is None and self.records is None and self.like != "class":
            raise ConfigError(
                "without a cache nobody knows how many records were removed. Give --cache, or --records with their "
                "number."
            )


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
        setup: Python file with model(seed), retain(), loss_terms, and test(), recipe or train_from_scratch, and
            train_further to fine-tune in a loop of your own.
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
        may_lose: Share of what is left that a model may tell wrongly after an unlearning and did not before; of a
            regression, of the variance of its targets, by which the squared error there may rise. Settings that cost
            more are no better than none. Not used with --retrain.
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
    asked = _Asked(cache=cache, like=like, records=records, sets=sets, retrain=retrain, may_lose=may_lose, seed=seed)
    row = method_of(method)
    tuning.require_optuna()
    read = {"setup": setup, "weights": weights} | ({"cache": cache_file.file_of(cache)} if cache else {})
    hashes = inputs.hashes_of(path for path in read.values() if path.is_file())
    stage = _stage(load_setup(setup), weights, device, asked)
    inputs.require_unchanged(hashes)
    if stage.removed and not json:  # before the search: it can be interrupted if this is wrong
        most = stage.removed.most_common(rehearsed.SHOWN)
        print("removed, as the cache tells:", ", ".join(f"class {label}: {count}" for label, count in most))
    rehearsed.warn_of_chance(stage)
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
    scores = rehearsed.confirm(stage, {rehearsed.GIVEN: method, rehearsed.CHOSEN: best})
    after = {"trials": len(found), "scores": rehearsed.plain(scores), **rehearsed.verdicts(scores)}
    chosen.write_settings(out, best, about | after)
    command = ["expunge", "unlearn", str(setup), "--weights", str(weights), *(["--cache", str(cache)] if cache else [])]
    command += ["--settings", str(out), "--out", "unlearned.safetensors", row.name]
    if json:
        tried = [tuning.plain(trial) for trial in found]
        result = {"tried": tried, "chosen": found[0].settings, "file": str(out), "command": command}
        result = about | after | {"removed": dict(stage.removed.most_common())} | result
        print(printing.as_json(result))
        return
    rehearsed.show(stage, row.space, found, scores, kept)
    print(f"settings: {out}")
    if not all(rehearsed.verdicts(scores).values()):
        print("This unlearns with them all the same, and warns:")
    print(shlex.join(command))


def _stage(loaded: Setup, weights: Path, device: str, asked: _Asked) -> Stage:
    model = trained_model(loaded, weights, device)
    retain, cached = loaded.data("retain"), None
    if asked.cache is not None:
        cached = cache_file.load(asked.cache, model, loaded.cached_terms)
    left = gradient(
        model,
        loaded.cached_terms,
        retain,
        parameters=cached.total if cached else None,
        micro_batch=cached.micro_batches.size if cached and cached.micro_batches else MICRO_BATCH,
        checkpoint=cached.recomputed if cached else False,
    )
    counted = asked.records is None and asked.like != "class"
    removed = cached - left if cached is not None and (counted or asked.like == "removed") else None
    unseen = loaded.data("test") if loaded.has("test") and not asked.retrain else None
    if unseen is not None:
        for doubt in copies_in_splits({"retain": retain, "test": unseen}, corrects=False):
            warnings.warn(doubt, stacklevel=2)
    problem = Problem(
        model=model,
        given=Blind(
            retain=retain,
            loss_terms=loaded.loss_terms,
            fresh=loaded.model,
            full=left,
            cached_loss=loaded.cached_terms,
            train_from_scratch=loaded.train_from_scratch,
            train_further=loaded.train_further,
        ),
        unseen=unseen,
        logits=loaded.logits,
    )
    seen = answers(model, {"retain": retain}, loaded.logits)["retain"]
    if isinstance(seen, Predictions) and asked.like not in ("random", "person"):
        raise ConfigError(
            f"like={asked.like!r}: the targets in retain() are those of a regression, which has no classes to "
            "draw from. Take --like random, or --like person."
        )
    labels = seen.labels
    known = indexed(retain)
    if known is not None and len(known.positions) != len(labels):
        raise ConfigError(
            f"logits() returned {len(labels)} labels for the {len(known.positions)} records of retain(), and a "
            "rehearsal needs one a record. Of a language model return one row a document: the logits and the label of "
            "its last token."
        )
    count = pseudo_sets.removed_count(removed, left.count / len(labels)) if counted and removed else asked.records or 0
    persons = loaded.persons(len(labels)) if asked.like == "person" else None
    classes = None
    if asked.like == "removed":
        assert removed is not None
        classes = pseudo_sets.removed_of_each_class(model, problem.given, removed, loaded.logits)
    drawn = pseudo_sets.draw(labels, asked.like, count, asked.sets + 1, asked.seed, persons, classes)
    by_recipe = asked.retrain and loaded.has("recipe") and loaded.train_from_scratch is None
    recipe = loaded.recipe if by_recipe else None
    prepared = rehearsal.prepare(problem, drawn, seed=asked.seed, recipe=recipe, retrain=asked.retrain)
    about: dict[str, Any] = {
        "like": asked.like,
        "records": count or None,
        "sets": asked.sets,
        "retrain": asked.retrain,
        "seed": asked.seed,
    }
    if not asked.retrain:
        about["may_lose"] = asked.may_lose
    about |= {"left": {"terms": left.count, "loss": f"{left.loss:.6g}"}}  # data that changed is another search
    told = Counter({label: round(each) for label, each in enumerate([] if classes is None else classes.tolist())})
    return Stage(problem, prepared[: asked.sets], prepared[asked.sets :], asked.may_lose, +told, about)
