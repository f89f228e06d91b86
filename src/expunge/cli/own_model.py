"""The commands for people with their own model: cache, show, unlearn."""

import functools
import inspect
import operator
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import nn

from expunge import cache as cache_file
from expunge import distributed, params, provenance
from expunge.access import Blind, Sighted
from expunge.accumulator import Place
from expunge.batches import Batches
from expunge.bench import chosen, evaluation, inputs
from expunge.cli import printing, processes
from expunge.cli.arguments import Flag, Maybe, SetupFile
from expunge.errors import ConfigError
from expunge.files import require_writable, write_text
from expunge.gradient import gradient
from expunge.methods import METHODS, Method, all_methods, method_of
from expunge.methods.retrain import Retrain
from expunge.seeds import keeping_random_state
from expunge.setup import Setup, load_setup
from expunge.trace import Trace
from expunge.training import Recipe
from expunge.unlearn import unlearn as unlearn_model
from expunge.weights import load_weights, save_weights


@dataclass(frozen=True, kw_only=True)
class AsTrained:
    """Train an untrained model on what is left, as the setup file says: with its recipe or its train_from_scratch."""

    resume: Maybe[str] = None  # a file from which a retraining that was interrupted goes on


def method_argument(methods: Iterable[Method]) -> Any:
    """The type of an argument that is one of these methods with its settings.

    Retraining takes its recipe or loop, which is that of the original, from the setup file.
    """
    each = (
        Annotated[AsTrained, tyro.conf.subcommand(m.name)]
        if m.config is Retrain
        else Annotated[m.config, tyro.conf.subcommand(m.name, description=m.summary)]
        for m in methods
    )
    return Annotated[functools.reduce(operator.or_, each), tyro.conf.arg(name="")]


if TYPE_CHECKING:
    MethodConfig = object
else:
    MethodConfig = method_argument(all_methods().values())

_LISTED = 10  # files that are named one by one


def cache(
    setup: SetupFile,
    *,
    weights: Path,
    out: Path,
    micro_batch: Maybe[int] = None,
    groups: Maybe[int] = None,
    accumulate_on: Maybe[Place] = None,
    checkpoint: tuple[str, ...] = (),
    max_shard: float = 5.0,
    dtype: Literal["float64", "float32", "bfloat16"] = "float64",
    leave_out: tuple[str, ...] = (),
    device: str = "auto",
    replace: Flag = False,
    json: Flag = False,
) -> None:
    """Cache the gradient of all data at the trained weights, before anything is deleted.

    Args:
        setup: Python file with model(seed), original() and loss_terms.
        weights: The trained weights (safetensors; .pt with tensors only).
        out: Where the cache goes. It is personal data: encrypt it, and destroy it after use.
        micro_batch: Positions a micro-batch. By default 128, halved until it fits in memory.
        groups: Keep the gradient of each of so many ranges of positions besides: a deletion then needs a pass over the
            ranges that lost a record only. 8 bytes an entry each, in float64.
        accumulate_on: Where the sums are. cpu needs the least memory on the device; by default cpu if a GPU is short.
        checkpoint: Names or patterns (*, ?) of modules whose activations are computed again instead of kept.
        max_shard: Gigabytes a file, where the cache is too large for one.
        dtype: float64; float32 for half the size and a coarser difference; bfloat16 for a quarter, of little use for
            few removed records. No protection: what a lower precision hides, it hides by accident.
        leave_out: Names or patterns (*, ?) of parameters to leave out: without the first layer or the embeddings,
            pixels and words are harder to read off; membership is not, and those layers cannot be unlearned.
        device: auto, cpu, cuda, cuda:1, …
        replace: Write over a cache that exists.
        json: Print the header as JSON.
    """
    if not max_shard * 1e9 >= 1:
        raise ConfigError(
            f"--max-shard {max_shard:g}: gigabytes a file, more than 0. The default is 5, that is 5e9 bytes."
        )
    require_new(out, setup, weights)
    if cache_file.exists(out) and not replace:
        raise ConfigError(
            f"{cache_file.file_of(out)} exists. A cache made now would hold only the records that are left, and the "
            "old one cannot be made again: give another name, or --replace if you are sure."
        )
    cache_file.require_storable(out, getattr(torch, dtype), groups, max_shard * 1e9)
    loaded = load_setup(setup)
    model = trained_model(loaded, weights, device)
    kept = params.named_without(model, leave_out)
    data = loaded.data("original")
    told, there = evaluation.read_trace(weights), evaluation.retained(data)
    if told.get("method") not in (None, "retrain") and there is not None and told.get("retained") not in (None, there):
        warnings.warn(
            f"{weights} was unlearned to {told['retained']:,} records, and original() returns {there:,}. Cache the "
            "gradient of what was left then: of the others nothing is in the weights any more, and the next unlearning "
            "would remove them once more.",
            stacklevel=2,
        )
    full = gradient(
        model,
        loaded.cached_terms,
        data,
        parameters=kept,
        micro_batch=micro_batch,
        accumulate_on=accumulate_on,
        groups=groups,
        checkpoint=checkpoint or False,
    )
    cache_file.save(out, full, dtype=getattr(torch, dtype), max_shard_bytes=max_shard * 1e9)
    _show_header(out, json)
    if not json:
        print(f"It is personal data: encrypt it, and destroy it after use:{_listed(out)}")


def show(path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")], *, json: Flag = False) -> None:
    """Say what a cache holds, after verifying that it is undamaged.

    Args:
        path: The cache; of one in several files the name they begin with, or their index.
        json: Print JSON.
    """
    _show_header(path, json)


def unlearn(
    setup: SetupFile,
    method: MethodConfig,
    *,
    weights: Path,
    out: Path,
    cache: Maybe[Path] = None,
    settings: Maybe[Path] = None,
    seed: int = 0,
    snapshots: Maybe[Path] = None,
    device: str = "auto",
    replace: Flag = False,
    json: Flag = False,
) -> None:
    """Remove what was deleted, or corrected, since the weights were trained.

    Writes the unlearned weights to OUT, what was done to OUT with the ending .trace.json, and beside them the salt of
    the hash in it that says which records were left.

    Args:
        setup: Python file with model(seed), retain() and loss_terms; forget() for methods that are not blind, recipe
            or train_from_scratch for retrain; train_further to fine-tune in a loop of your own.
        method: The method and its settings.
        weights: The trained weights that the cache was made at.
        out: Where the unlearned weights go.
        cache: The gradient cache, for methods that need it; of one in several files the name they begin with.
        settings: A file with the settings of the method, as `expunge rehearse` writes it.
        seed: Names the streams of randomness.
        snapshots: A folder for the weights after every stage and epoch, to look into what happened.
        device: auto, cpu, cuda, cuda:1, …
        replace: Write over weights that exist.
        json: Print the trace as JSON.
    """
    require_new(out, setup, weights, *(cache_file.files_of(cache) if cache else []), *([settings] if settings else []))
    if snapshots is not None:
        distributed.by_the_first(lambda: require_writable(snapshots / "weights"))
    if out.exists() and not replace:
        raise ConfigError(f"{out} exists, and evidence of it may too: give another name, or --replace.")
    read = {"setup file": setup, "weights before": weights}
    read |= {"cache": cache_file.file_of(cache)} if cache else {}
    read |= {"settings": settings} if settings else {}
    row = METHODS["retrain"] if isinstance(method, AsTrained) else method_of(method)
    if not row.of_expunge:
        read |= {"method": Path(inspect.getfile(row.run))}  # `sources` says nothing of it
    hashes = inputs.hashes_of(path for path in read.values() if path.is_file())
    loaded = load_setup(setup)
    if isinstance(method, AsTrained):
        own_loop = loaded.train_from_scratch is not None
        method = Retrain(recipe=None if own_loop else loaded.recipe, resume=method.resume)
    doubts: list[str] = []  # for the trace, too
    if settings:
        method = chosen.read_settings(settings, method, doubts.append)
    doubts += () if settings else _not_as_trained(loaded, row, method)
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    model = trained_model(loaded, weights, device)
    full = cache_file.load(cache, model, loaded.cached_terms) if cache is not None else None
    shared: dict[str, Any] = {
        "retain": loaded.data("retain"),
        "loss_terms": loaded.loss_terms,
        "train_from_scratch": loaded.train_from_scratch,
        "train_further": loaded.train_further,
        "fresh": loaded.model,
        "full": full,
        "cached_loss": loaded.cached_terms,
    }
    given = Blind(**shared) if row.blind else _sighted(loaded, row, shared)
    read |= {f"imported {file.relative_to(setup.resolve().parent).as_posix()}": file for file in loaded.imported()}
    hashes |= inputs.hashes_of(loaded.imported())
    inputs.require_unchanged(hashes)  # now that all is read; what happens to the files later is of no effect
    taken = 0

    def snapshot(moment: str, model: nn.Module) -> None:
        nonlocal taken
        assert snapshots is not None
        save_weights(snapshots / f"{taken:03d} {moment}.safetensors", model)
        taken += 1

    result = unlearn_model(model, given, method, seed=seed, watch=snapshot if snapshots else None)
    result.trace.warnings[:0] = doubts
    done_with = {"method": row.name, "seed": seed, "config": asdict(method)}  # type: ignore[call-overload]
    save_weights(out, result.model, {"unlearned": printing.as_json(done_with)})
    origin = {
        "sources": provenance.sources(),
        "environment": provenance.environment(),
        "files": {role: hashes[path] for role, path in read.items()} | {"weights after": provenance.file_hash(out)},
    }
    trace = {**result.trace.as_dict(), **done_with, "provenance": origin}
    distributed.by_the_first(lambda: _write_trace(out, trace, shared["retain"]))
    if json:
        print(printing.as_json(trace))
        return
    _tell(result.trace, done_with["config"])
    print(f"weights: {out}\ntrace:   {evaluation.trace_path(out)}")
    if trace.get("retained_salted") is not None:  # of several processes the first has it
        print(f"salt:    {inputs.salt_path(out)} (of the hash of what is left; keep it with the data's owner)")
    if cache is not None:
        print(
            f"The cache is personal data: cache again if more deletions may come, and destroy it now:{_listed(cache)}"
        )


def _write_trace(out: Path, trace: dict[str, Any], retain: Batches) -> None:
    trace.update(evaluation.left_behind(out, retain))
    write_text(evaluation.trace_path(out), printing.as_json(trace) + "\n")


def _not_as_trained(setup: Setup, row: Method, config: Any) -> Iterator[str]:
    """What to say of training that was left at its defaults and suits another kind of model.

    Methods that were published with AdamW keep it, and RELOAD its batches of 256 where a model has the usual 128.
    """
    for setting in fields(config) if setup.has("recipe") and setup.train_further is None else ():
        own, trained = getattr(config, setting.name), setup.recipe
        if not isinstance(own, Recipe) or own != setting.default:
            continue
        if (own.optimizer, trained.optimizer) == ("sgd", "adamw") or own.batch_size > 2 * trained.batch_size:
            ours, theirs = (f"{r.optimizer} at {r.lr:g} in batches of {r.batch_size}" for r in (own, trained))
            flag = f"--{setting.name.replace('_', '-')}"
            yield (
                f"{row.name} trains with its default, {ours}, and {setup.path} has {theirs}. Give what suits it: "
                f"{flag}.optimizer {trained.optimizer} {flag}.batch-size {trained.batch_size} {flag}.lr …, or the "
                "settings of a rehearsal (--settings)."
            )


def _tell(trace: Trace, config: Mapping[str, Any]) -> None:
    """What an unlearning did, on a terminal."""
    facts = trace.facts
    print(f"{trace.method}: {sum(trace.seconds.values()):.2f} s ({printing.stages(trace.seconds)})")
    if "removed_count" in facts:
        print(f"removed or corrected: {facts['removed_count']} of {facts['cached_count']} cached loss terms")
    if "priming_length" in facts:
        print(f"length of the ascent: {facts['priming_length']:.3g} of the norm of the weights")
    if "ascent_share" in facts:  # of methods with a step and rounds
        grown = f", for what was removed (step: {config['step']:g})" if config["growth"] else ""
        print(
            f"length of each ascent, {config['rounds']} in turns with fine-tuning: {facts['ascent_share']:.3g} of the "
            f"norm of the weights{grown}"
        )
    if "groups" in facts:
        print(f"groups of the cache: {facts['groups_computed']} of {facts['groups']} computed again")
    print(f"ended because: {trace.stopped}")


def require_new(out: Path, *inputs: Path) -> None:
    """Refuse to write over what a command reads, or where nothing can be written, before anything is computed."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name the file to write.")
    if out.suffix in (".pt", ".pth", ".bin"):
        raise ConfigError(f"{out} will be safetensors: give it the ending .safetensors, or it cannot be read back.")
    for path in inputs:
        if out.resolve() == path.resolve():
            raise ConfigError(f"{out} is read by this command and would be overwritten. Give --out another name.")
    distributed.by_the_first(lambda: require_writable(out))


def trained_model(setup: Setup, weights: Path, device: str) -> nn.Module:
    """The architecture of a setup file with stored weights, on a device.

    Raises:
        ConfigError: There is no such device.
    """
    name = processes.device() if device == "auto" else device
    with keeping_random_state():
        model = load_weights(setup.model(0), weights)
    try:
        return model.to(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _sighted(setup: Setup, method: Method, shared: dict[str, Any]) -> Sighted:
    if not setup.has("forget"):
        raise ConfigError(
            f"{method.name} needs the removed records, and {setup.path} defines no forget(). Take a blind method if "
            "they are gone (expunge methods lists them)."
        )
    more: dict[str, Any] = {split: setup.data(split) for split in ("original", "validation") if setup.has(split)}
    return Sighted(**shared, forget=setup.data("forget"), **more)


def _listed(cache: Path) -> str:
    """The files of a cache, a line each; as a pattern where they are many."""
    index, *files = map(str, cache_file.files_of(cache))
    if len(files) > _LISTED:
        files = [re.sub(r"-\d+(-of-\d+)", r"-*\1", files[0])]
    return "".join(f"\n  {file}" for file in (index, *files))


def _show_header(path: Path, as_json: bool) -> None:
    header = cache_file.read_header(path)
    if as_json:
        print(
            printing.as_json({"path": str(path), "paths": list(map(str, cache_file.files_of(path))), **asdict(header)})
        )
        return
    from rich.table import Table

    rows = Table("field", "value", title=str(path))
    explained = {
        "count": f"{header.count} loss terms",
        "loss": f"{header.loss:.6g} in all, {header.loss / header.count:.4g} a term",
        "micro_batch": f"{header.micro_batch} positions" if header.micro_batch else "data without positions",
        "entries": f"{header.entries} in {header.parameters} tensors",
    }
    for name, value in asdict(header).items():
        rows.add_row(name, explained.get(name, str(value)))
    printing.show(rows)
