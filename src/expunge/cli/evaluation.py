"""The command that measures models of one's own: evaluate."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expunge.bench import evaluation, inputs
from expunge.cli import printing
from expunge.cli.arguments import Flag, Maybe, SetupFile
from expunge.cli.own_model import trained_model
from expunge.errors import ConfigError
from expunge.metrics.compare import Profile, profile
from expunge.metrics.outputs import answers
from expunge.report import rich_tables, summarise
from expunge.report.overview import sizes
from expunge.report.summaries import FLOOR, ORIGINAL
from expunge.report.verdicts import verdicts
from expunge.rows import Row
from expunge.setup import load_setup


def evaluate(
    setup: SetupFile,
    *,
    weights: Path,
    retrained: tuple[Path, ...] = (),
    original: Maybe[Path] = None,
    out: Maybe[Path] = None,
    device: str = "auto",
    json: Flag = False,
) -> None:
    """Measure a model, and how far it is from models that were retrained from scratch.

    Every split that the setup file defines is used: retain(), forget(), test(). Without forget(), what can be said
    about the removed records is nothing.

    Args:
        setup: Python file with model(seed) and the splits; logits(model, batch) if a batch is neither (inputs, labels)
            nor, of a regression, (inputs, targets).
        weights: The model to measure.
        retrained: Weights of retrained models, each from a seed of its own. From two on, how far they are apart is the
            noise floor; from three on, there are verdicts.
        original: Weights before unlearning, to see what has changed.
        out: A folder to write a run to, for `expunge report` and `expunge evidence`. The salt of its hashes goes
            beside it: keep that with whoever is responsible for the data.
        device: auto, cpu, cuda, cuda:1, …
        json: Print JSON.
    """
    if out is not None:
        evaluation.require_new(out)
    read = [setup, weights, *retrained, evaluation.trace_path(weights), *([] if original is None else [original])]
    hashes = inputs.hashes_of(path for path in read if path.is_file())
    evaluation.require_distinct(hashes, retrained, weights, original)
    trace = evaluation.read_trace(weights, original)
    before = trace.get("provenance", {}).get("files", {}).get("weights before")
    for path in retrained:
        evaluation.require_retrained(path)
        if before is not None and hashes.get(path) == before:
            raise ConfigError(
                f"{path} was not retrained: it is the model that {weights} was unlearned from, as "
                f"{evaluation.trace_path(weights)} says. Give --retrained models that never saw what was removed."
            )
    loaded = load_setup(setup)
    splits = [split for split in ("retain", "forget", "test") if loaded.has(split)]
    if not splits:
        raise ConfigError(f"{setup} defines none of retain(), forget(), test(): there is nothing to measure on.")

    data = {split: loaded.data(split) for split in splits}
    # The model in question may be an original, which retraining made of all records or of none that are known of.
    of_what_is_left = retrained if trace.get("method", "retrain") == "retrain" else (weights, *retrained)
    removed = trace.get("facts", {}).get("removed_count")
    doubts = [*evaluation.copies_in_splits(data, corrects=None if removed is None else removed == 0)]
    doubts += filter(None, (evaluation.require_left(path, data) for path in of_what_is_left))
    then = trace.get("provenance", {}).get("files", {}).get("setup file", hashes[setup])
    if then != hashes[setup]:
        doubts.append(f"{setup} is not the setup file that {weights} was made with: its SHA-256 was {then}.")
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    architecture = trained_model(loaded, weights, device)

    def measured(path: Path) -> Profile:
        model = architecture if path == weights else trained_model(loaded, path, device)
        return profile(answers(model, data, loaded.logits), full=True)

    imported = tuple(loaded.imported())
    hashes |= inputs.hashes_of(imported)
    found = evaluation.Evaluation(
        setup=setup,
        imported=imported,
        hashes=hashes,
        data=data,
        weights=weights,
        original=original,
        retrained=retrained,
        architecture=type(architecture).__name__,
        sizes={name: p.numel() for name, p in architecture.named_parameters()},
        subject=measured(weights),
        before=None if original is None else measured(original),
        references=tuple(measured(path) for path in retrained),
        trace=trace,
        doubts=tuple(doubts),
    )
    rows = evaluation.rows(found)
    if out is not None:
        evaluation.write_run(out, found)
    if json:
        print(printing.as_json(_as_measured(found, rows)))
        return
    printing.show(*rich_tables(rows, evaluation.SCENARIO))
    print(f"Measured on {sizes(rows, evaluation.SCENARIO)}.")
    if "forget" not in splits:
        print(f"{setup} defines no forget(): nothing was measured on the removed records.")
    if "test" not in splits:
        attack = "" if "forget" not in splits else ", and no attack was tried, which tells removed records from them"
        print(f"{setup} defines no test(): nothing was measured on unseen records{attack}.")
    if len(retrained) == 1:
        print("One retrained model is no reference: without a second, nobody knows how far two are apart.")
    if out is not None:
        print(f"run:  {out}\nsalt: {inputs.salt_path(out)} (keep it apart from the run, with the data's owner)")


def _as_measured(found: evaluation.Evaluation, rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """For programs: numbers of the model, of each retrained one, and of the noise floor; distances as means."""
    summaries, judged = {(s.method, s.metric): s for s in summarise(rows)}, verdicts(summarise(rows))
    places = {(row.method, row.metric): {"split": row.split, "n": row.n} for row in rows}

    def line(method: str, metric: str) -> dict[str, Any]:
        summary, verdict = summaries[method, metric], judged.get((method, metric))
        basic = {"metric": metric, "value": summary.mean, "unit": summary.unit, **places[method, metric]}
        spread = {"models": summary.n, "interval": summary.interval} if summary.n > 1 else {}
        return basic | spread | ({} if verdict is None else asdict(verdict))

    named = {found.method: str(found.weights), ORIGINAL: f"{found.original} (original)", FLOOR: "noise floor"}
    report = {
        name: [line(method, metric) for who, metric in summaries if who == method]
        for method, name in named.items()
        if any(who == method for who, _ in summaries)
    }
    for path, reference in zip(found.retrained, found.references, strict=True):
        report[f"{path} (reference)"] = [asdict(each) for each in reference.values]
    return report
