"""The figure of the loss attack's ROC curves on logarithmic axes, where few false alarms are allowed."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from expunge.definitions import split_names
from expunge.report.figures import Drawing
from expunge.report.stored import Loss
from expunge.report.summaries import ORIGINAL, REFERENCE, label
from expunge.report.svg import FORGET, INK, MUTED, RULE, TEST, Figure, draw

_RATES = (0.001, 0.01, 0.1)  # false-positive rates; the least for which there are records enough is stated


def roc(losses: Iterable[Loss], scenario: str, subject: str, *, corrects: bool = False) -> Drawing | None:
    """ROC curves of the attack that calls a record a member if its loss is small: original, subject, retrained."""
    stored: dict[str, dict[int, dict[str, list[float]]]] = {}
    for loss in losses:
        if loss.scenario == scenario:
            stored.setdefault(loss.method, {}).setdefault(loss.seed, {}).setdefault(loss.split, []).append(loss.loss)
    pairs = {
        method: [(np.array(s["forget"]), np.array(s["test"])) for s in seeds.values() if {"forget", "test"} <= set(s)]
        for method, seeds in stored.items()
    }
    methods = [method for method in (ORIGINAL, subject, REFERENCE) if pairs.get(method)]
    if not methods:
        return None
    unseen = min(len(test) for method in methods for _, test in pairs[method])
    rates = np.geomspace(1 / unseen, 1, 200)
    curves = {m: np.mean([true_positives(*pair, rates) for pair in pairs[m]], axis=0) for m in methods}
    members = min(sum(len(forget) for forget, _ in pairs[method]) for method in methods)
    stated = next((rate for rate in _RATES if rate * unseen >= 10 and rate * members >= 0.5), None)
    name = split_names(corrects)["forget"]

    def plot(figure: Figure) -> None:
        ax = figure.subplots()
        ax.plot(rates, rates, color=RULE, lw=1.2, label="chance")
        for method, curve in curves.items():
            colour, style = {ORIGINAL: (FORGET, "-"), REFERENCE: (TEST, (0, (5, 2)))}.get(method, (INK, "-"))
            shown = np.where(curve > 0, curve, np.nan)
            ax.plot(rates, shown, color=colour, ls=style, lw=1.8, label=label(method))
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(rates[0], 1)
        ax.set_ylim(0.8 / members, 1.15)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.minorticks_off()
        ax.grid(color=RULE, lw=0.6)
        ax.set_xlabel("test records called members (false-positive rate)")
        ax.set_ylabel(f"{name} records called members")
        ax.spines["bottom"].set_color(MUTED)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")

    heading = f"Who finds the {name} records with few false alarms?"
    finding = ""  # with few records no rate below 1 can be told
    if stated is not None:
        at = {m: np.mean([true_positives(*pair, np.array([stated]))[0] for pair in pairs[m]]) for m in methods}
        parts = ", ".join(f"{100 * at[m]:.1f} % for {label(m)}" for m in methods)
        finding = f"At a false-positive rate of {100 * stated:g} %, the loss alone gives away {name} records: {parts}."
    return Drawing(
        heading,
        draw(f"roc-{scenario}", f"{heading} {finding}".strip(), (9.0, 3.6), plot),
        finding,
        f"An attacker calls every record a member whose loss is below a threshold. For each threshold: the share of "
        f"{name} records it gets right against the share of test records it gets wrong, mean over seeds, both axes "
        "logarithmic. Further up is worse; a curve that leaves the frame below is at zero there. The subject is good "
        "where its curve is that of the retrained model, not where it is at chance: a retrained model may treat these "
        "records differently from test records too.",
    )


def true_positives(
    members: Float[np.ndarray, " members"], unseen: Float[np.ndarray, " unseen"], rates: Float[np.ndarray, " rates"]
) -> Float[np.ndarray, " rates"]:
    """The largest share of members found at false-positive rates of at most ``rates``; a small loss says member.

    Args:
        members: Losses of the records in question, nats.
        unseen: Losses of records that were never trained on, nats.
        rates: In [0, 1].
    """
    allowed = np.floor(rates * len(unseen) * (1 + 1e-12)).astype(int)
    thresholds = np.append(np.sort(unseen), np.inf)[allowed]  # below it lie no more unseen records than allowed
    found: Float[np.ndarray, " rates"] = np.searchsorted(np.sort(members), thresholds, side="left") / len(members)
    return np.where(np.isinf(thresholds), 1.0, found)
