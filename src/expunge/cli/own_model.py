"""The commands for people with their own model: cache, show, unlearn, evaluate."""

import functools
import operator
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import nn

from expunge import cache as cache_file
from expunge.access import Blind, Sighted
from expunge.cli import printing
from expunge.cli.arguments import Flag, SetupFile
from expunge.errors import ConfigError
from expunge.files import write_text
from expunge.gradient import MICRO_BATCH, gradient
from expunge.methods import METHODS, Method, method_of
from expunge.metrics.compare import Measured, distances, profile
from expunge.metrics.outputs import outputs
from expunge.setup import Setup, load_setup
from expunge.unlearn import unlearn as unlearn_model
from expunge.weights import load_weights, save_weights

if TYPE_CHECKING:
    MethodConfig = object
else:
    _each = (Annotated[m.config, tyro.conf.subcommand(m.name, description=m.summary)] for m in METHODS.values())
    MethodConfig = Annotated[functools.reduce(operator.or_, _each), tyro.conf.arg(name="")]


def cache(
    setup: SetupFile,
    *,
    weights: Path,
    out: Path,
    micro_batch: int = MICRO_BATCH,
    dtype: Literal["float64", "float32"] = "float64",
    device: str = "auto",
    replace: Flag = False,
    json: Flag = False,
) -> None:
    """Cache the gradient of all data at the trained weights, before anything is deleted.

    Args:
        setup: Python file with model(seed), original() and loss_terms.
        weights: The trained weights (safetensors; .pt with tensors only).
        out: Where the cache goes. It is personal data: encrypt it, and destroy it after use.
        micro_batch: Positions a micro-batch.
        dtype: float64, or float32 for half the size and a coarser difference.
        device: auto, cpu, cuda, cuda:1, …
        replace: Write over a cache that exists.
        json: Print the header as JSON.
    """
    _require_new(out, setup, weights)
    if out.exists() and not replace:
        raise ConfigError(
            f"{out} exists. A cache made now would hold only the records that are left, and the old one cannot be "
            "made again: give another name, or --replace if you are sure."
        )
    loaded = load_setup(setup)
    model = trained_model(loaded, weights, device)
    full = gradient(model, loaded.loss_terms, loaded.data("original"), micro_batch=micro_batch)
    cache_file.save(out, full, dtype=torch.float64 if dtype == "float64" else torch.float32)
    _show_header(out, json)


def show(path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")], *, json: Flag = False) -> None:
    """Say what a cache holds, after verifying that it is undamaged.

    Args:
        path: A cache file.
        json: Print JSON.
    """
    _show_header(path, json)


def unlearn(
    setup: SetupFile,
    method: MethodConfig,
    *,
    weights: Path,
    out: Path,
    cache: Path | None = None,
    seed: int = 0,
    snapshots: Path | None = None,
    device: str = "auto",
    json: Flag = False,
) -> None:
    """Remove what was deleted, or corrected, since the weights were trained.

    Writes the unlearned weights to OUT and what was done to OUT with the ending .trace.json.

    Args:
        setup: Python file with model(seed), retain() and loss_terms; forget() for methods that are not blind.
        method: The method and its settings.
        weights: The trained weights that the cache was made at.
        out: Where the unlearned weights go.
        cache: The gradient cache, for methods that need it.
        seed: Names the streams of randomness.
        snapshots: A folder for the weights after every stage and epoch, to look into what happened.
        device: auto, cpu, cuda, cuda:1, …
        json: Print the trace as JSON.
    """
    _require_new(out, setup, weights, *([cache] if cache else []))
    story = out.with_name(out.name.removesuffix(".safetensors") + ".trace.json")
    loaded, row = load_setup(setup), method_of(method)
    model = trained_model(loaded, weights, device)
    full = cache_file.load(cache, model, loaded.loss_terms) if cache is not None else None
    shared: dict[str, Any] = {
        "retain": loaded.data("retain"),
        "loss_terms": loaded.loss_terms,
        "fresh": loaded.model,
        "full": full,
    }
    given = Blind(**shared) if row.blind else _sighted(loaded, row, shared)
    taken = 0

    def snapshot(moment: str, model: nn.Module) -> None:
        nonlocal taken
        assert snapshots is not None
        save_weights(snapshots / f"{taken:03d} {moment}.safetensors", model)
        taken += 1

    result = unlearn_model(model, given, method, seed=seed, watch=snapshot if snapshots else None)
    settings = {"method": row.name, "seed": seed, "config": asdict(method)}  # type: ignore[call-overload]
    trace = {**result.trace.as_dict(), **settings}
    save_weights(out, result.model, {"unlearned": printing.as_json(settings)})
    write_text(story, printing.as_json(trace) + "\n")
    if json:
        print(printing.as_json(trace))
        return
    print(f"{row.name}: {sum(result.trace.seconds.values()):.2f} s ({printing.stages(result.trace.seconds)})")
    facts = result.trace.facts
    if "removed_count" in facts:
        print(f"removed or corrected: {facts['removed_count']} of {facts['cached_count']} cached loss terms")
    print(f"ended because: {result.trace.stopped}")
    print(f"weights: {out}\ntrace:   {out.with_suffix('.trace.json')}")
    print("The cache is personal data: destroy it now, and cache again if more deletions may come." if cache else "")


def evaluate(
    setup: SetupFile,
    *,
    weights: Path,
    retrained: tuple[Path, ...] = (),
    device: str = "auto",
    json: Flag = False,
) -> None:
    """Measure a model, and how far it is from one that was retrained from scratch.

    Every split that the setup file defines is used: retain(), forget(), test(). Without forget(), what can be said
    about the removed records is nothing.

    Args:
        setup: Python file with model(seed) and the splits; logits(model, batch) if a batch is not (inputs, labels).
        weights: The model to measure.
        retrained: Weights of retrained models: the first is the reference, the others show how far two retrained
            models are apart (the noise floor).
        device: auto, cpu, cuda, cuda:1, …
        json: Print JSON.
    """
    loaded = load_setup(setup)
    splits = [split for split in ("retain", "forget", "test") if loaded.has(split)]
    if not splits:
        raise ConfigError(f"{setup} defines none of retain(), forget(), test(): there is nothing to measure on.")
    profiles = []
    for path in (weights, *retrained):
        model = trained_model(loaded, path, device)
        profiles.append(profile({split: outputs(model, loaded.data(split), loaded.logits) for split in splits}))
    report = {str(weights): profiles[0].values}
    if retrained:
        reference = profiles[1]
        report[str(weights)] = profiles[0].values + distances(profiles[0], reference)
        report[f"{retrained[0]} (reference)"] = reference.values
        for path, other in zip(retrained[1:], profiles[2:], strict=True):
            report[f"{path} (noise floor)"] = other.values + distances(other, reference)
    if json:
        print(printing.as_json({name: [asdict(each) for each in values] for name, values in report.items()}))
        return
    _print_measured(report)
    if "forget" not in splits:
        print(f"{setup} defines no forget(): nothing was measured on the removed records.")


def _require_new(out: Path, *inputs: Path) -> None:
    """Refuse to write over what a command reads, before anything is computed."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: name the file to write.")
    if out.suffix in (".pt", ".pth", ".bin"):
        raise ConfigError(f"{out} will be safetensors: give it the ending .safetensors, or it cannot be read back.")
    for path in inputs:
        if out.resolve() == path.resolve():
            raise ConfigError(f"{out} is read by this command and would be overwritten. Give --out another name.")


def trained_model(setup: Setup, weights: Path, device: str) -> nn.Module:
    """The architecture of a setup file with stored weights, on a device.

    Raises:
        ConfigError: There is no such device.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
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


def _show_header(path: Path, as_json: bool) -> None:
    header = cache_file.read_header(path)
    if as_json:
        print(printing.as_json({"path": str(path), **asdict(header)}))
        return
    from rich.table import Table

    rows = Table("field", "value", title=str(path))
    explained = {
        "count": f"{header.count} loss terms",
        "loss": f"{header.loss:.6g} nats in all, {header.loss / header.count:.4g} a term",
        "micro_batch": f"{header.micro_batch} positions" if header.micro_batch else "data without positions",
        "entries": f"{header.entries} in {header.parameters} tensors",
    }
    for name, value in asdict(header).items():
        rows.add_row(name, explained.get(name, str(value)))
    printing.show(rows)


def _print_measured(report: Mapping[str, list[Measured]]) -> None:
    from rich.table import Table

    table = Table("metric", "split", "n", *report)
    for first in next(iter(report.values())):
        cells = []
        for values in report.values():
            same = [each for each in values if each.metric == first.metric]
            cells.append(f"{same[0].value:.4g} {same[0].unit}" if same else "")
        table.add_row(first.metric, first.split, str(first.n), *cells)
    printing.show(table)
