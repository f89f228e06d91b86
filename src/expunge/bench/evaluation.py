"""A user's own models against retrained ones: as rows, and as a run folder for reports and evidence.

Several retrained models are a sample of what retraining gives. A "seed" of these rows numbers a retrained model, and of
the noise floor a pair of them: the distance to each says how far one unlearned model is from retraining.
"""

import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge import provenance
from expunge.batches import Batches, indexed
from expunge.bench import inputs
from expunge.errors import ConfigError, MismatchError
from expunge.files import write_text
from expunge.methods import all_methods
from expunge.metrics.compare import Measured, Profile, distances, measured_rows
from expunge.provenance import position_hashes, record_hashes, together
from expunge.report.summaries import FLOOR, ORIGINAL, REFERENCE
from expunge.rows import EVALUATION, Row, write_csv, write_rows
from expunge.weights import unlearned_with

SCENARIO = "evaluation"
_LOSSES = ("forget", "test")  # splits whose losses are kept, for the figures of the attack


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, and on what."""

    setup: Path
    imported: tuple[Path, ...]  # of the setup file: `Setup.imported`
    hashes: Mapping[Path, str]  # of every file read, from before it was: `inputs.hashes_of`
    data: Mapping[str, Batches]  # the very objects that were measured, by split
    weights: Path  # the model in question
    original: Path | None  # before unlearning
    retrained: tuple[Path, ...]
    architecture: str
    sizes: Mapping[str, int]  # entries of each parameter
    subject: Profile
    before: Profile | None
    references: tuple[Profile, ...]  # of `retrained`
    trace: Mapping[str, Any]  # of the unlearning; empty where there is none
    doubts: tuple[str, ...] = ()  # of `copies_in_splits` and `require_left`

    @property
    def method(self) -> str:
        """How the model in question is called in tables: the method that made it, or the name of its file."""
        name = str(self.trace.get("method", self.weights.stem))
        return f"{name} (measured)" if name in (ORIGINAL, REFERENCE, FLOOR) else name


def read_trace(weights: Path, original: Path | None = None) -> dict[str, Any]:
    """The trace that `expunge unlearn` left beside the weights; empty if there is none.

    Raises:
        ConfigError: It cannot be read.
        MismatchError: It belongs to other weights, or tells of another original.
    """
    path = trace_path(weights)
    if not path.exists():
        return {}
    try:
        trace = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as a trace: {error}. Move it away, or unlearn again.") from error
    hashes = trace.get("provenance", {}).get("files", {})
    if "weights after" in hashes and hashes["weights after"] != provenance.file_hash(weights):
        raise MismatchError(
            f"{path} tells of weights with another hash than {weights}. Move it away if the weights are meant to "
            "differ, or unlearn again."
        )
    before = hashes.get("weights before")
    if original is not None and before not in (None, provenance.file_hash(original)):
        raise MismatchError(f"{path} says that other weights than {original} were unlearned. Give --original those.")
    return trace


def require_retrained(weights: Path) -> None:
    """Refuse weights that say of themselves that a method other than retraining made them.

    Raises:
        ConfigError: They do.
    """
    method = unlearned_with(weights)
    if method not in ("", "retrain"):
        raise ConfigError(
            f"{weights} was made by {method} and not retrained: distances to it would say nothing of retraining. Give "
            "--retrained models that were trained from scratch on what is left, as `expunge unlearn … retrain` does."
        )


def require_distinct(hashes: Mapping[Path, str], retrained: Sequence[Path], *judged: Path | None) -> None:
    """Refuse the same model twice: its distance to itself is 0, and would make retrained models look alike.

    Args:
        hashes: Of the files there are.
        retrained: Models to compare with.
        judged: Those that are compared with them. They may be the same: unlearning can come to nothing.

    Raises:
        ConfigError: Two of the retrained models are the same, or one is a model that is judged.
    """
    for own in judged:
        seen: dict[str, Path] = {}
        for path in (*([] if own is None else [own]), *retrained):
            first = seen.setdefault(hashes.get(path, str(path)), path)
            if first is not path:
                raise ConfigError(
                    f"{path} and {first} are the same weights. Each model counts once: give --retrained models of "
                    "seeds of their own, other than the one that is measured."
                )


def retained(data: Batches) -> int | None:
    """How many records there are; None if they have no positions."""
    known = indexed(data)
    return None if known is None else len(known.positions)


def left_behind(weights: Path, data: Batches) -> dict[str, Any]:
    """What a trace says of the records that were left: how many, and a hash of their positions.

    The hash is keyed with a salt that is kept beside the weights (`inputs.salt_path`): without it, whoever knows the
    order of the data could try who was removed.
    """
    count = retained(data)
    return {"retained": count, "retained_salted": None if count is None else _of_positions(weights, data)}


def require_left(weights: Path, data: Mapping[str, Batches]) -> str:
    """Refuse weights that were retrained, or unlearned, when other records were left.

    Returns:
        Why nobody knows whether the same were left, "" where that is known.

    Raises:
        MismatchError: The trace beside the weights says that others were.
    """
    trace, now = read_trace(weights), retained(data["retain"]) if "retain" in data else None
    then, salted = trace.get("retained"), trace.get("retained_salted")
    if then is not None and now is not None and then != now:
        raise MismatchError(
            f"{weights} was made when {then:,} records were left, and retain() has {now:,}: distances "
            "would be of another deletion. Unlearn again, and retrain models on what is left now."
        )
    salt = inputs.salt_path(weights)
    if not trace:
        return f"{weights} has no trace beside it: nothing tells on which records it was trained."
    if salted is None or now is None or not salt.exists():
        return f"nothing tells whether {weights} was made when the records of retain() were left" + (
            f": its salt, {salt.name}, is not beside it." if salted is not None and now is not None else "."
        )
    if _of_positions(weights, data["retain"]) != salted:
        raise MismatchError(
            f"{weights} was made when other records were left than those of retain(), as many: distances would be of "
            "another deletion. Unlearn again, and retrain models on what is left now."
        )
    return ""


def _of_positions(weights: Path, data: Batches) -> str:
    salt = inputs.salt_of(weights)
    return together(position_hashes(data, salt), salt)


def copies_in_splits(data: Mapping[str, Batches], corrects: bool | None) -> Iterator[str]:
    """Say where records of one split are, number for number, in another that should have others.

    Args:
        data: By split.
        corrects: Whether forget() has records that were corrected, and are left; None if nobody knows.
    """
    try:
        salt = secrets.token_hex()  # for this comparison alone
        hashes = {split: record_hashes(each, salt) for split, each in data.items()}
    except ConfigError:  # records that cannot be told apart
        return
    for one, other in (("forget", "retain"), ("test", "retain"), ("test", "forget")):
        if one not in hashes or other not in hashes or (corrects and one == "forget"):
            continue
        there = set(hashes[other])
        copies = sum(each in there for each in hashes[one])
        if copies:
            all_removed = (one, other) == ("forget", "retain") and copies == len(hashes[one])
            known = corrects is not None or not all_removed
            yield (
                f"{copies:,} of {len(hashes[one]):,} records of {one}() are in {other}() as well, number for number. "
                + ("" if known else "If they were corrected and not removed, that is as it should be. Otherwise: ")
                + "What was measured on them says nothing, if they are the same records and not copies."
            )


def trace_path(weights: Path) -> Path:
    """Where `expunge unlearn` writes what was done: OUT.trace.json beside OUT.safetensors."""
    return weights.with_name(weights.name.removesuffix(".safetensors") + ".trace.json")


def rows(found: Evaluation) -> list[Row]:
    """One row a number: own values, distances to every retrained model, and theirs to each other."""
    made: list[Row] = [] if found.before is None else list(_rows(found, ORIGINAL, 0, found.before.values))
    for number, reference in enumerate(found.references):
        if found.before is not None:
            made += _rows(found, ORIGINAL, number, distances(found.before, reference, full=True))
        made += _rows(found, REFERENCE, number, reference.values)
        made += _rows(found, found.method, number, distances(found.subject, reference, full=True))
    for number, (first, second) in enumerate(itertools.combinations(found.references, 2)):
        made += _rows(found, FLOOR, number, distances(second, first, full=True))
    return [*made, *_rows(found, found.method, 0, found.subject.values)]


def require_new(folder: Path) -> None:
    """Refuse a run folder that exists, before anything is computed.

    Raises:
        ConfigError: It, or the salt of an earlier run of that name, exists.
    """
    for path in (folder, inputs.salt_path(folder)):
        if path.exists():
            raise ConfigError(f"{path} exists, and evidence of it may too. Give --out the name of a new folder.")


def write_run(folder: Path, found: Evaluation) -> None:
    """Write a run folder, whole or not at all, and its salt beside it.

    Args:
        folder: Must not exist.
        found: What was measured.

    Raises:
        ConfigError: The folder exists, or single records cannot be told apart.
        MismatchError: A file is no longer the one that was read.
    """
    require_new(folder)
    inputs.require_unchanged(found.hashes)
    roles: list[tuple[str, Path | None]] = [("setup file", found.setup)]
    roles += [("imported by the setup file", path) for path in found.imported]
    roles += [("weights before", found.original), ("weights after", found.weights)]
    roles += [("retrained weights", path) for path in found.retrained]
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        write_rows(temporary / "rows.csv", rows(found))
        write_csv(temporary / "losses.csv", ("scenario", "method", "seed", "split", "loss"), _losses(found))
        _json(temporary / "config.json", _config(found))
        _json(temporary / "env.json", provenance.environment())
        salt = inputs.salt_of(folder)
        inputs.write_inputs(
            temporary / inputs.NAME,
            [inputs.file_entry(role, path, folder, found.hashes[path]) for role, path in roles if path is not None],
            [inputs.split_entry(SCENARIO, 0, split, data, salt) for split, data in found.data.items()],
        )
        if found.trace:
            shutil.copyfile(trace_path(found.weights), temporary / "trace.json")
            _tell(temporary, found)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        inputs.salt_path(folder).unlink(missing_ok=True)
        raise


def _rows(found: Evaluation, method: str, seed: int, measured: Sequence[Measured]) -> Iterator[Row]:
    known = all_methods().get(str(found.trace.get("method")) if method == found.method else method)
    return measured_rows(
        measured,
        run=SCENARIO,
        experiment=EVALUATION,
        dataset=f"{found.setup.resolve().parent.name}/{found.setup.name}",
        model=found.architecture,
        scenario=SCENARIO,
        method=method,
        blind=True if method in (ORIGINAL, FLOOR) else known.blind if known is not None else None,
        seed=seed,
        seconds=sum(found.trace.get("seconds", {}).values()) if method == found.method else 0.0,
    )


def _losses(found: Evaluation) -> Iterator[tuple[object, ...]]:
    """Losses of single records, sorted so that no line belongs to a known record."""
    models = [(found.method, 0, found.subject), *((REFERENCE, k, each) for k, each in enumerate(found.references))]
    models += [(ORIGINAL, 0, found.before)] if found.before is not None else []
    for method, seed, model in models:
        for split in _LOSSES:
            if split in model.splits:
                yield from (
                    (SCENARIO, method, seed, split, loss) for loss in sorted(model.splits[split].losses.tolist())
                )


def _config(found: Evaluation) -> dict[str, Any]:
    return {
        "command": "evaluate",
        "setup": str(found.setup),
        "weights": str(found.weights),
        "original": None if found.original is None else str(found.original),
        "retrained": [str(path) for path in found.retrained],
        "unlearning": {name: found.trace[name] for name in ("method", "seed", "config") if name in found.trace},
        "sources": provenance.sources(),
        "doubts": list(found.doubts),
    }


def _tell(folder: Path, found: Evaluation) -> None:
    """What the method found out about itself, as the tables that a report reads."""
    key = (SCENARIO, found.method, 0)
    facts = [*found.trace.get("facts", {}).items(), ("stopped", found.trace.get("stopped", ""))]
    write_csv(folder / "facts.csv", ("scenario", "method", "seed", "fact", "value"), [(*key, *f) for f in facts])
    resets = [(*key, name, share, found.sizes.get(name, 0)) for name, share in found.trace.get("reset", {}).items()]
    if resets:
        columns = ("scenario", "method", "seed", "parameter", "share", "entries")
        write_csv(folder / "reset.csv", columns, resets)


def _json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
