"""The audits: what a cache gives away, whether an unlearning can work, what a model still remembers, and of methods."""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from torch import nn

from expunge import cache as cache_file
from expunge.batches import Batches
from expunge.bench import evaluation, inputs
from expunge.cli import printing
from expunge.cli.arguments import Flag, Maybe, SetupFile
from expunge.cli.own_model import method_argument, trained_model
from expunge.errors import (
    ConfigError,
    CorruptCache,
    MismatchError,
    NonDeterministicLoss,
    NotFinite,
    NotInformative,
)
from expunge.methods import all_methods
from expunge.methods.retrain import Retrain
from expunge.metrics.outputs import outputs
from expunge.setup import Setup, load_setup

FOUND = 3  # exit code: a record can be recovered, an unlearning should not be done, a trace is left


def audit_cache(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")],
    *,
    setup: Path,
    weights: Path,
    out: Maybe[Path] = None,
    seed: int = 0,
    device: str = "auto",
    json: Flag = False,
) -> None:
    """Try to recover the removed records from a cache. Exit code 3 if one can be recovered.

    Whoever has the cache, the weights and the retain set can do the same. forget() of the setup file, if there is one,
    only judges the result; test() and candidates() make the list that membership is told from.

    Args:
        path: The gradient cache.
        setup: Python file with model(seed), loss_terms, retain(); forget(), test(), candidates() where you have them.
        weights: The weights that the cache was made at.
        out: A folder for a JSON file, a page and pictures. They can show removed records: protect them like the cache.
        seed: Of what is drawn at random.
        device: auto, cpu, cuda, cuda:1, …
        json: Print JSON.
    """
    from expunge.audit import leakage
    from expunge.audit.finding import Truth, evidence

    loaded = load_setup(setup)
    model = trained_model(loaded, weights, device)
    full = cache_file.load(path, model, loaded.cached_terms)
    has = evidence(model, loaded.cached_terms, loaded.data("retain"), full, logits=loaded.logits)
    if has.doubts:
        warnings.warn(has.doubts, stacklevel=1)
    truth = Truth(
        forget=_split(loaded, "forget"), unseen=_split(loaded, "test"), candidates=_split(loaded, "candidates")
    )
    audit = leakage.audit_cache(has, truth, seed=seed)
    if out is not None:
        from expunge.audit.page import write_audit

        page = write_audit(out, audit)
    if json:
        print(printing.as_json(audit.as_dict()))
    else:
        _print_cache_audit(audit, judged=truth.forget is not None)
        if out is not None:
            print(f"\nThe page with pictures: {page.resolve()}")
    if audit.verdict == "recoverable":
        raise SystemExit(FOUND)


def audit_preflight(
    setup: SetupFile,
    *,
    weights: Path,
    cache: Path,
    reset_fraction: float = 0.1,
    device: str = "auto",
    json: Flag = False,
) -> None:
    """Say whether an unlearning can work, before it is done. Exit code 3: do not.

    The removed records are not needed.

    Args:
        setup: Python file with model(seed), loss_terms and retain(); test() where you have it.
        weights: The trained weights that the cache was made at.
        cache: The gradient cache.
        reset_fraction: The share of entries that RELOAD will re-initialise; 0 for methods that re-initialise none.
        device: auto, cpu, cuda, cuda:1, …
        json: Print JSON.
    """
    from expunge.audit.preflight import Check, Preflight, preflight

    loaded = load_setup(setup)
    model = trained_model(loaded, weights, device)
    retain = loaded.data("retain")
    try:
        full = cache_file.load(cache, model, loaded.cached_terms)
        not_compared = _no_class_numbers(loaded, model)
        result = preflight(
            model,
            loaded.cached_terms,
            retain,
            full,
            unseen=_split(loaded, "test"),
            fresh=None if not_compared else loaded.model,
            not_compared=not_compared,
            reset_fraction=reset_fraction,
        )
    except (CorruptCache, MismatchError, NonDeterministicLoss, NotFinite, NotInformative) as error:
        result = Preflight([Check("validity", "do not", str(error), {"error": type(error).__name__})])
    if json:
        print(printing.as_json(result.as_dict()))
    else:
        from rich.table import Table

        table = Table("check", "advice", "in words")
        for check in result.checks:
            table.add_row(check.name, check.advice, check.words)
        printing.show(table)
        print(f"{result.advice.capitalize()}.")
        print("This is no promise that the records will be forgotten: rehearse on records you may keep.")
    if result.advice == "do not":
        raise SystemExit(FOUND)


def audit_residual(
    setup: SetupFile,
    *,
    weights: Path,
    original: Maybe[Path] = None,
    retrained: tuple[Path, ...] = (),
    seed: int = 0,
    device: str = "auto",
    json: Flag = False,
) -> None:
    """Look for what an unlearned model still remembers of removed or corrected records. Exit code 3: a trace is left.

    Args:
        setup: Python file with model(seed), loss_terms and forget(); test(), and triggered() for corrected backdoors.
        weights: The unlearned weights.
        original: The weights before, for relearning.
        retrained: Weights of models that were retrained from scratch, to compare with.
        seed: Of what is drawn at random.
        device: auto, cpu, cuda, cuda:1, …
        json: Print JSON.
    """
    from expunge.audit import residual

    for path in retrained:
        evaluation.require_retrained(path)
    hashes = inputs.hashes_of(path for path in (weights, original, *retrained) if path is not None and path.is_file())
    evaluation.require_distinct(hashes, retrained, weights, original)
    loaded = load_setup(setup)
    forget, test, triggered = (_split(loaded, name) for name in ("forget", "test", "triggered"))
    if forget is None and triggered is None:
        raise ConfigError(
            f"{setup} defines neither forget() nor triggered(): without the removed records nobody can measure what is "
            "remembered of them. Rehearse on records you may keep."
        )

    def model_of(path: Path) -> nn.Module:
        return trained_model(loaded, path, device)

    subject = residual.Subject(
        unlearned=model_of(weights),
        loss_terms=loaded.loss_terms,
        original=model_of(original) if original is not None else None,
        retrained=[model_of(path) for path in retrained],
        logits=loaded.logits,
    )
    traces = []
    if forget is not None:
        traces.append(residual.membership(subject, forget, test, seed=seed))
        traces += [residual.relearning(subject, forget, seed=seed), residual.quantisation(subject, forget, test)]
    if triggered is not None:
        traces.append(residual.trigger(subject, triggered, test))
    verdict = min((trace.verdict for trace in traces), key=residual.MEMORY.index)
    if json:
        print(printing.as_json({"verdict": verdict, "tests": [trace.as_dict() for trace in traces]}))
    else:
        from rich.table import Table

        table = Table("test", "verdict", "in words")
        for trace in traces:
            table.add_row(trace.test, trace.verdict, trace.words)
        printing.show(table)
        if verdict == "no trace found":
            print("These tests found nothing. That is no proof that nothing is left.")
    if verdict == "a trace was found":
        raise SystemExit(FOUND)


if TYPE_CHECKING:
    Checkable = object
else:
    Checkable = method_argument(each for each in all_methods().values() if each.config is not Retrain)


def audit_method(config: Checkable, *, json: Flag = False) -> None:
    """Try whether a method has the manners that deletions, tables and searches rely on. Exit code 3 if one is missing.

    Sixty records and a small network: some seconds.

    Args:
        config: Which method, with which settings.
        json: Print JSON.
    """
    from expunge.audit.manners import manners

    found = manners(config)
    if json:
        print(printing.as_json([asdict(each) for each in found]))
    else:
        from rich.table import Table

        table = Table("manner", "kept", "in words")
        for each in found:
            table.add_row(each.name, "yes" if each.kept else "no", each.words)
        printing.show(table)
    if not all(each.kept for each in found):
        raise SystemExit(FOUND)


_AUDITS: dict[str, Callable[..., Any]] = {
    "cache": audit_cache,
    "preflight": audit_preflight,
    "residual": audit_residual,
    "method": audit_method,
}
if TYPE_CHECKING:
    Chosen = object
else:
    import functools
    import operator

    _each = (Annotated[Any, tyro.conf.subcommand(name, constructor=run)] for name, run in _AUDITS.items())
    Chosen = Annotated[functools.reduce(operator.or_, _each), tyro.conf.arg(name="")]


def audit(run: Chosen) -> None:
    """What a cache gives away, whether an unlearning can work, what a model still remembers, a method's manners.

    Args:
        run: Which.
    """


def _no_class_numbers(setup: Setup, model: nn.Module) -> str:
    """Why test() has none, or nothing: of losses of numbers nobody knows how much there is to lose."""
    try:
        outputs(model, setup.data("test"), setup.logits)
    except (ConfigError, NotFinite) as error:
        return str(error)
    return ""


def _split(setup: Setup, name: str) -> Batches | None:
    return setup.data(name) if setup.has(name) else None


def _print_cache_audit(audit: Any, *, judged: bool) -> None:
    from rich.table import Table

    from expunge.audit.finding import VERDICTS

    table = Table("attack", "where", "verdict", "in words")
    for finding in sorted(audit.findings, key=lambda finding: VERDICTS.index(finding.verdict)):
        table.add_row(finding.attack, finding.place, finding.verdict, finding.words)
    printing.show(table)
    print(f"{audit.verdict.capitalize()}: {audit.summary}")
    if not judged:
        print("The setup file defines no forget(): attacks were judged by their own consistency.")
