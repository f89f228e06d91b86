"""Tuning: the same number of trials for every method, over the space that it declares, resumable.

Optuna proposes settings (TPE, the tree-structured Parzen estimator). Each proposal follows from the finished trials and
a seed of its own, not from the state of a sampler, so that a run that was interrupted goes on as if it had not been.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge import progress
from expunge.errors import ConfigError, CorruptData, MissingExtra, NotFinite
from expunge.files import write_text
from expunge.seeds import derive
from expunge.space import Choice, Range, Space

Objective = Callable[[dict[str, Any]], float]  # settings -> score, low is good
_DIGITS = 3  # of proposed numbers: people read them
_TOLD, _LONG = 4, 24  # differences between two searches, and characters of a value


@dataclass(frozen=True)
class Trial:
    """Some settings that were tried, and how good they were."""

    number: int  # counted from 0, in the order they were tried
    settings: dict[str, Any]  # by setting; "recipe.lr" for one inside another
    score: float  # low is good; infinity if it failed
    seconds: float  # wall time
    failure: str = ""  # why there is no score


def tune(
    space: Space,
    objective: Objective,
    *,
    trials: int,
    seed: int,
    journal: Path,
    about: Mapping[str, Any] | None = None,
    first: Mapping[str, Any] | None = None,
    seconds: float = math.inf,
) -> list[Trial]:
    """Search a space for settings with a low score.

    Every finished trial is in the journal, a file of JSON lines that is replaced whole. A trial that was interrupted is
    run again; a journal with as many trials as asked for is only read, and one with more gives the first of them, so
    that the budget is the same for all who ask for the same.

    Args:
        space: What to search; declared beside each method.
        objective: Settings to score. A trial that raises `NotFinite` or `ConfigError` (settings that this
            model refuses), or whose score is NaN, comes last.
        trials: How many.
        seed: Of the proposals.
        journal: Where finished trials are kept.
        about: Plain values that the scores depend on, such as hashes of files: a journal of another search is refused.
        first: Settings of trial 0, such as those in use, inside the space or not, so that the best is never worse;
            others than the space's are passed over. By default trial 0 is proposed like all others.
        seconds: No trial begins later than this after the call.

    Returns:
        The trials, best first; of equals the earlier. Fewer than asked for if the time ran out.

    Raises:
        ConfigError: No trial, a space without settings or with a choice that is no plain value, or a journal of another
            search.
        CorruptData: A damaged journal.
        MissingExtra: Optuna is not installed.
    """
    if trials < 1:
        raise ConfigError(f"trials={trials}: tuning needs at least one.")
    if not space:
        raise ConfigError(
            "the search space is empty: this method declares no setting worth trying. Set its own by hand."
        )
    header = _header(space, seed, about or {}, first)
    done = _read(journal, header)[:trials]
    start = time.perf_counter()
    with progress.task("tuning", trials) as advance:
        for _ in done:
            advance()
        while len(done) < trials and time.perf_counter() - start < seconds:
            settings = propose(space, done, seed) if done or first is None else {name: first[name] for name in space}
            done.append(_run(settings, len(done), objective))
            lines = [header, *map(plain, done)]
            write_text(journal, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            advance()
    return sorted(done, key=lambda trial: trial.score)


def propose(space: Space, done: Sequence[Trial], seed: int) -> dict[str, Any]:
    """The settings to try next: the first ten at random, from then on near those that were good.

    Args:
        space: What to search.
        done: The trials so far, of the same space; nothing is learned from one outside it.
        seed: The same seed and trials give the same settings.

    Returns:
        A value for every setting; numbers have three digits.

    Source: Bergstra et al. (2011), as implemented in Optuna.

    Raises:
        ConfigError: A choice that is no plain value.
        MissingExtra: Optuna is not installed.
    """
    optuna = require_optuna()
    distributions = {name: distribution(name, values) for name, values in space.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study is made for each trial: no news
    try:
        sampler = optuna.samplers.TPESampler(seed=derive(seed, "trial", len(done)) % 2**32)
        study = optuna.create_study(sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)
    for trial in done:
        if not all(values.holds(trial.settings[name]) for name, values in space.items()):
            continue
        study.add_trial(
            optuna.trial.create_trial(params=trial.settings, distributions=distributions, value=trial.score)
        )
    found = study.ask(distributions).params
    return {name: _rounded(found[name], values) for name, values in space.items()}


def distribution(name: str, values: Range | Choice) -> Any:
    """Optuna's words for what a setting may be.

    Raises:
        ConfigError: A choice that is no plain value.
        MissingExtra: Optuna is not installed.
    """
    optuna = require_optuna()
    if isinstance(values, Choice):
        odd = [option for option in values.options if not isinstance(option, None | bool | int | float | str)]
        if odd:
            raise ConfigError(
                f"{name}: {odd[0]!r} cannot be tuned over. Choices are texts, numbers, True, False or None."
            )
        return optuna.distributions.CategoricalDistribution(values.options)
    if values.whole:
        return optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def _run(settings: dict[str, Any], number: int, objective: Objective) -> Trial:
    start, failure = time.perf_counter(), ""
    try:
        score = float(objective(settings))
    except (NotFinite, ConfigError) as error:
        score, failure = math.inf, str(error)
    if math.isnan(score):
        score, failure = math.inf, "the score is NaN."
    return Trial(number, settings, score, time.perf_counter() - start, failure)


def _rounded(value: Any, values: Range | Choice) -> Any:
    if not isinstance(values, Range) or values.whole:
        return value
    return min(max(float(f"{value:.{_DIGITS}g}"), values.low), values.high)


def _header(space: Space, seed: int, about: Mapping[str, Any], first: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a journal begins with: proposals depend on the version of Optuna, too."""
    header = {
        "space": {name: asdict(values) for name, values in space.items()},
        "seed": seed,
        "optuna": require_optuna().__version__,
        "about": dict(about),
    } | ({} if first is None else {"first": {name: first[name] for name in space}})
    return dict(json.loads(json.dumps(header)))


def plain(trial: Trial) -> dict[str, Any]:
    """A trial as JSON holds it, which knows no infinity."""
    return {**asdict(trial), "score": trial.score if math.isfinite(trial.score) else None}


def _read(journal: Path, header: Mapping[str, Any]) -> list[Trial]:
    if not journal.exists():
        return []
    try:
        first, *lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
        done = [Trial(**{**line, "score": math.inf if line["score"] is None else line["score"]}) for line in lines]
        if not isinstance(first, dict) or any(
            trial.number != number or trial.settings.keys() != header["space"].keys()
            for number, trial in enumerate(done if first == header else [])
        ):
            raise ValueError("trials are missing, or lack settings")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptData(
            f"{journal} is no journal of trials, or damaged ({error}). Restore it from a copy, or delete it and "
            "tune from the start."
        ) from error
    if first != header:
        raise ConfigError(
            f"{journal} holds trials of another search, which cannot be compared with these ({_apart(first, header)}). "
            "Name another journal, or delete this one."
        )
    return done


def _apart(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two headers, by the names that the user knows."""
    ones, others = _leaves(there), _leaves(here)
    names = [name for name in {**others, **ones} if ones.get(name) != others.get(name)]
    told = [f"{name}: {ones.get(name, 'nothing')} there, {others.get(name, 'nothing')} here" for name in names[:_TOLD]]
    return "; ".join(told) + (f"; and {len(names) - _TOLD} more" if len(names) > _TOLD else "")


def _leaves(header: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in header.items():
        if isinstance(value, dict):
            found |= _leaves(value, prefix if name in ("about", "settings", "first") else f"{prefix}{name}.")
        else:
            text = json.dumps(value, ensure_ascii=False)
            found[prefix + name] = text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"
    return found


def require_optuna() -> Any:
    """The module.

    Raises:
        MissingExtra: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("tuning needs Optuna: pip install 'expunge[search]'.") from error
    return optuna
