"""What evidence may claim, and what it does not show: sentences made from what was measured and what was not."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from expunge.report.overview import subject, title
from expunge.report.stored import Run
from expunge.report.summaries import FLOOR, ORIGINAL, REFERENCE, Summary, label, number
from expunge.report.verdicts import verdicts

ATTACKS = frozenset({"FMIA", "AUC", "ΔFMIA", "ΔAUC"})
_STRONG = ("LiRA", "RMIA", "Shadow")  # attacks that know how hard a record is, by what their metrics' names hold


def outcomes(summaries: Sequence[Summary], scenario: str, method: str | None) -> list[str]:
    """On which distances a method is within δ of retraining, beyond it, or undecided; with numbers."""
    mine = {(s.method, s.metric): s for s in summaries if s.scenario == scenario}
    states: dict[str, list[str]] = {"within": [], "beyond": [], "open": []}
    for (who, metric), verdict in verdicts(mine.values()).items():
        if who == method:
            summary = mine[who, metric]
            margin = number(verdict.margin, summary.unit)
            value = f"{metric} {number(summary.mean, summary.unit)} {summary.unit}"
            states[verdict.state].append(f"{value} (δ {margin})")
    words = {
        "within": "indistinguishable from retraining within δ on",
        "beyond": "further from retraining than δ on",
        "open": "undecided on",
    }
    name = title(scenario)
    return [f"{name}: {label(method or '')} is {words[state]} {', '.join(on)}." for state, on in states.items() if on]


def gaps(
    run: Run, summaries: Sequence[Summary], data: Sequence[Mapping[str, Any]], files: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What a run does not show, a sentence or two each."""
    found = [
        "That nothing of the records is left in the model. Approximate unlearning is judged by the measurements above; "
        "they are not proof of deletion.",
        "That the records, their copies and backups, the gradient cache, or models and outputs made from the old "
        "weights were deleted. Nothing outside the files listed here was looked at.",
        "That the model in use is the one measured. Compare its SHA-256 with that of the weights listed here.",
        "Who wrote these files, or that they were right when written. A hash shows that a file is as it was when "
        "this evidence was written. Sign evidence.json, or lodge its SHA-256 where it cannot be changed.",
    ]
    found += [f"That the unlearning did what was meant. It warned: {text}" for text in run.trace.get("warnings", ())]
    found += [f"That what was measured is what was meant: {text}" for text in run.config.get("doubts", ())]
    if run.trace.get("facts", {}).get("compared") == 0:
        found.append(
            "That model code, loss and preprocessing at the unlearning were those of the cache. No micro-batch was as "
            "it had been, so that there was nothing to compare."
        )
    for scenario in dict.fromkeys(summary.scenario for summary in summaries):
        name = title(scenario)
        mine = [summary for summary in summaries if summary.scenario == scenario]
        found += [f"{name}: {gap}" for gap in _of_scenario(run, mine)]
    if not any("salted_records" in entry for entry in data):
        found.append("Which records were removed. The run stores no hashes of them.")
    if not any(entry["role"].startswith("weights") for entry in files):
        found.append("Which weights were measured. The run does not say which files they are.")
    if not run.trace and not run.facts:
        found.append("How the model was unlearned, and how many records that removed. The run holds no trace of it.")
    return found


def _of_scenario(run: Run, summaries: Sequence[Summary]) -> Iterator[str]:
    scenario, about = summaries[0].scenario, subject(summary.method for summary in summaries)
    methods, metrics = {s.method for s in summaries}, {s.metric for s in summaries}
    splits = {row.split for row in run.rows if row.scenario == scenario}
    if "forget" not in splits:
        yield "anything about the removed records. They were gone, and nothing was measured on them."
    if REFERENCE not in methods:
        yield "how far the model is from retraining. No retrained model was measured."
    elif FLOOR not in methods:
        yield "a noise floor. With one retrained model nobody knows how far two retrained models are apart."
    yield from _verdicts(summaries, about)
    strong = any(name in metric for metric in metrics for name in _STRONG)
    if not strong and not metrics & ATTACKS:
        yield "what a membership attack finds. None was run."
    elif not strong:
        yield "what an attack stronger than a regression on losses finds (LiRA, RMIA). None was run."
    if ORIGINAL not in methods:
        yield "what unlearning changed. The model before it was not measured."
    if any(summary.over != "seed" for summary in summaries):
        yield (
            "what another run of the same unlearning gives. One unlearned model was measured; intervals are for the "
            "spread between retrained models."
        )
    yield "that every single record is forgotten. The numbers are means over records."


def _verdicts(summaries: Sequence[Summary], about: str | None) -> Iterator[str]:
    judged = verdicts(summaries)
    if any(summary.method == FLOOR for summary in summaries) and not judged:
        yield "whether the distances are within the noise floor. There are too few of them for a test."
    undecided = [metric for (method, metric), verdict in judged.items() if method == about and verdict.state == "open"]
    if undecided:
        on = ", ".join(undecided)
        yield f"whether {label(about or '')} is within δ of retraining on {on}. The tests do not decide."
    blunt = [m for (who, m), v in judged.items() if who == ORIGINAL and v.state == "within"]
    if blunt:
        yield (
            f"anything by {', '.join(blunt)}: even the original is within δ of retraining there, so that cannot tell a "
            "model that unlearned from one that did not."
        )
