"""Evidence of an unlearning for an auditor: what was asked, done and measured, with hashes, and what was not shown."""

import hashlib
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from expunge.errors import ConfigError, MismatchError
from expunge.files import write_text
from expunge.provenance import file_hash, sources
from expunge.report.gaps import gaps, outcomes
from expunge.report.html import render
from expunge.report.overview import defined, sizes, subject
from expunge.report.stored import Run, read_json, read_run
from expunge.report.summaries import summarise
from expunge.report.text import COLUMNS, lines

FORMAT = "expunge evidence 1"
NAME, PAGE = "evidence.json", "evidence.html"
_DRAWN = (NAME, PAGE, "report.html", "report.md", "report.tex", "report.csv")  # made from the rest, at any time
_ASKED = ("removed_count", "cached_count")
_HOW = ("method", "seed", "config", "stopped", "warnings")  # of the trace
_CACHE = "gradient cache"  # the role of a file that should be destroyed after use


def write_evidence(folder: Path | str, *, replace: bool = False) -> Path:
    """Write evidence.json and evidence.html into a run folder.

    Args:
        folder: As `stored.read_run` wants it; inputs.json, if there, says what the files are for and holds the
            salted hashes of records.
        replace: Write over evidence that exists.

    Returns:
        The path of evidence.json.

    Raises:
        ConfigError: A file of the run is missing or damaged, or evidence exists.
        MismatchError: A file has changed since inputs.json was written.
        MissingExtra: Jinja2 or SciPy is not installed.
    """
    folder = Path(folder)
    if (folder / NAME).exists() and not replace:
        raise ConfigError(
            f"{folder / NAME} exists. --verify compares the files with it; --replace writes it anew, and what it said "
            "before is lost."
        )
    run = read_run(folder)
    given = [read_json(path) for path in sorted(folder.rglob("inputs.json"))]  # one, or one a scenario and seed
    named = [entry for each in given for entry in each.get("files", [])]
    data = [entry for each in given for entry in each.get("data", [])]
    evidence = _evidence(run, data, _files(folder, named))
    definitions = defined(summarise(run.rows))
    page = render("evidence.html.j2", {"evidence": evidence, "definitions": definitions}, definitions)
    evidence["page"] = {"path": PAGE, "sha256": hashlib.sha256(page.encode()).hexdigest()}
    evidence["digest"] = digest(evidence)
    write_text(folder / PAGE, page)
    write_text(folder / NAME, json.dumps(evidence, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return folder / NAME


def verify(folder: Path | str) -> list[str]:
    """Compare the files of a run, and the weights and code it points to, with its evidence.

    Returns:
        A line for each file that differs, is missing, or is new; empty if all is as it was. A gradient cache may be
        missing: see `unchecked`.

    Raises:
        ConfigError: There is no evidence.
    """
    folder = Path(folder)
    path = folder / NAME
    if not path.exists():
        raise ConfigError(f"{path} is missing: there is nothing to verify. Write it with `expunge evidence {folder}`.")
    try:
        evidence = json.loads(path.read_text(encoding="utf-8"))
        listed = [*evidence["files"], evidence["page"]]
        said = evidence.pop("digest")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{NAME}: cannot be read ({type(error).__name__}: {error})"]
    wrong = [] if said == digest(evidence) else [f"{NAME}: its contents do not have the digest that it states"]
    for entry in listed:
        file, was = folder / entry["path"], entry["sha256"]
        if not file.exists():
            if entry.get("role") == _CACHE:
                continue
            wrong.append(f"{entry['path']}: missing, its SHA-256 was {was}")
        elif (now := file_hash(file)) != was:
            wrong.append(f"{entry['path']}: SHA-256 is {now}, was {was}")
    known = {entry["path"] for entry in listed}
    return wrong + [f"{name}: was not there" for name in _inside(folder) if name not in known]


def unchecked(folder: Path | str) -> list[str]:
    """What evidence states a hash of and has no file to compare it with, a line each: a cache that was destroyed.

    Raises:
        ConfigError: There is no evidence.
    """
    folder = Path(folder)
    evidence = read_json(folder / NAME)
    gone = [e for e in evidence["files"] if e["role"] == _CACHE and not (folder / e["path"]).exists()]
    destroyed = "If it was destroyed, as a cache should be, nothing is left to check."
    found = [f"{e['path']}, the {_CACHE}: it is not there, its SHA-256 was {e['sha256']}. {destroyed}" for e in gone]
    listed = {entry["sha256"] for entry in evidence["files"]}
    return found + [
        f"the {role} of the unlearning, SHA-256 {was}: no listed file has it. "
        + (destroyed if role == "cache" else "Compare it with a copy of your own.")
        for role, was in evidence["hashes_at_unlearning"].items()
        if was not in listed
    ]


def digest(evidence: dict[str, Any]) -> str:
    """SHA-256 of evidence without its own digest, whatever the order and spacing of its JSON."""
    rest = {name: value for name, value in evidence.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _evidence(run: Run, data: list[dict[str, Any]], files: list[dict[str, Any]]) -> dict[str, Any]:
    summaries = summarise(run.rows)
    scenarios = list(dict.fromkeys(summary.scenario for summary in summaries))
    first = next(row for row in run.rows if row.source == "measured")
    about = {s: subject(each.method for each in summaries if each.scenario == s) for s in scenarios}
    origin = run.trace.get("provenance", {})
    return {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": {"experiment": first.experiment, "dataset": first.dataset, "model": first.model},
        "asked": [
            {
                "scenario": scenario,
                "method": about[scenario],
                "measured_on": _measured_on(run, scenario, data),
                "counts": _counts(run, scenario, about[scenario]),
            }
            for scenario in scenarios
        ],
        "data": data,
        "code": {
            "expunge": run.environment.get("expunge", run.config.get("expunge", "")),
            "measured_with": run.config.get("sources", ""),
            "unlearned_with": origin.get("sources", run.config.get("sources", "")),
            "evidence_written_with": sources(),
        },
        "unlearning": {name: run.trace[name] for name in _HOW if name in run.trace},
        "hashes_at_unlearning": origin.get("files", {}),
        "config": run.config,
        "environment": run.environment,
        "files": files,
        "measured": [_line(line) for line in lines(run.rows)],
        "outcomes": [each for scenario in scenarios for each in outcomes(summaries, scenario, about[scenario])],
        "not_shown": gaps(run, summaries, data, files),
    }


def _measured_on(run: Run, scenario: str, data: list[dict[str, Any]]) -> str:
    """How many records, or what else was counted: tokens of a language model, where a record has several labels."""
    said = sizes(run.rows, scenario)
    records = {entry["split"]: entry["records"] for entry in data if entry["scenario"] == scenario}
    several = any(row.scenario == scenario and row.n > records.get(row.split, row.n) for row in run.rows)
    return f"{said.removesuffix(' records')} labels, of which a record has several" if several else said


def _counts(run: Run, scenario: str, method: str | None) -> list[dict[str, Any]]:
    """What the unlearning itself counted: loss terms that were removed, of those that were cached."""
    found: dict[int, dict[str, int]] = {}
    for fact in run.facts:
        if (fact.scenario, fact.method) == (scenario, method) and fact.fact in _ASKED:
            found.setdefault(fact.seed, {})[fact.fact] = int(float(fact.value))
    return [{"seed": seed, **counts, "said": _said(**counts)} for seed, counts in found.items()]


def _said(removed_count: int | None = None, cached_count: int | None = None) -> str:
    removed = "corrections, 0 removed" if removed_count == 0 else removed_count or "?"
    return f"{removed} of {cached_count or '?'}"


def _line(line: tuple[object, ...]) -> dict[str, object]:
    """A line of the table of all numbers; what is not there, or not finite, is null."""
    values = (None if v == "" or (isinstance(v, float) and not math.isfinite(v)) else v for v in line)
    return dict(zip(COLUMNS, values, strict=True))


def _files(folder: Path, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every file of the run and every file it was made from, hashed now.

    Raises:
        ConfigError: One that inputs.json names is missing.
        MismatchError: One has changed since.
    """
    listed = []
    for entry in given:
        path = folder / entry["path"]
        if not path.exists():
            raise ConfigError(f"{path}, the {entry['role']} of this run, is missing. Put it back, or measure again.")
        if file_hash(path) != entry["sha256"]:
            raise MismatchError(
                f"{path}, the {entry['role']}, is not what was measured: its SHA-256 is {file_hash(path)}, was "
                f"{entry['sha256']}. Put the measured file back, or measure again."
            )
        listed.append(dict(entry))
    known = {entry["path"] for entry in listed}
    for name in _inside(folder):
        if name not in known:
            path = folder / name
            listed.append(
                {"role": "file of the run", "path": name, "sha256": file_hash(path), "bytes": path.stat().st_size}
            )
    return listed


def _inside(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
        if path.is_file() and name not in _DRAWN and not hidden:
            yield name
