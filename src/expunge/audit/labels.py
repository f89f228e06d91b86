"""Labels of removed records from the gradient of the head.

With cross-entropy the head's bias gradient is Σ (p - y) over the removed records: for one record only the entry of its
label is negative, and without a bias only the row of its label points the other way, which in two classes either may
be. For more records the attacker computes from kept records what one of each class contributes, and solves for how many
of each there were.
Source: Zhao et al. 2020, "iDLG"; the counts are in the spirit of Wainakh et al. 2021, "LLG".
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from expunge import params
from expunge.audit.finding import Evidence, Finding, Truth, Verdict
from expunge.audit.layers import LIMIT, Layer
from expunge.batches import Batches, length_of, map_tensors, micro_batches, to_device
from expunge.errors import MissingExtra, NotInformative, UnsupportedModule
from expunge.gradient import gradient
from expunge.metrics.outputs import Logits, outputs
from expunge.seeds import keeping_random_state

SHOWN = 5  # numbers of a target
LEAST = 64  # kept records of a class, of which an average one is computed
# Share of the head's gradient above which counts say nothing: experiments/removed_classes.py measured 0.53 at most, and
# 0.78 or more where all of a class went (CIFAR, ResNet-18 of width 8).
UNEXPLAINED = 0.65


def labels(evidence: Evidence, head: Layer, truth: Truth) -> Finding:
    """Infer the labels of what was removed.

    Args:
        evidence: With a classifier whose batches have labels, as `Evidence.logits` says.
        head: Its last linear layer.
        truth: ``forget`` to judge by, if there is one.

    Raises:
        MissingExtra: SciPy is not installed, and more than one record was removed.
    """
    count = evidence.removed.count
    known = _labels_of(evidence, truth.forget) if truth.forget is not None else None
    if count == 1:
        return _one(head, None if known is None else int(known[0]))
    return _several(evidence, head, count, known)


def _one(head: Layer, known: int | None) -> Finding:
    attack, numbers = "label of one record", dict[str, object]()
    if head.bias is not None and head.bias_floor is not None:
        signs = torch.where(head.bias.abs() > head.bias_floor, head.bias.sign(), 0)
    else:
        left, sizes, _ = torch.linalg.svd(head.weight, full_matrices=False)
        common = left[:, 0] * (sizes[0] > head.weight_floor.norm())
        signs = torch.where(common.abs() > 1e-6, common.sign(), 0)
        if int((signs < 0).sum()) != 1:
            signs = -signs
        if len(signs) < 3:  # p - y is (a, -a): either sign is as good
            signs = signs.abs()
    negative = (signs < 0).nonzero().flatten()
    if len(negative) != 1:
        words = "No single class stands out by its sign in the head's gradient."
        return Finding(attack=attack, place=head.name, verdict="not shown", words=words)
    label = int(negative[0])
    numbers["label"] = label
    if known is not None:
        numbers["true label"] = known
    right = known is None or known == label
    words = f"The sign of the head's gradient gives the label: class {label}" + (
        "." if right else f", but it is {known}."
    )
    return Finding(
        attack=attack,
        place=head.name,
        verdict="partly recoverable" if right else "not shown",
        words=words + (" A label alone is a part of a record." if right else ""),
        numbers=numbers,
    )


def target(evidence: Evidence, head: Layer, found: Finding, truth: Truth) -> Finding:
    """The target of one removed record of a regression: the head's bias gradient is 2 (prediction - target).

    Args:
        evidence: With `squared_error`, one removed record, and a model whose last linear layer is its output.
        head: That layer.
        found: What gives the model's input back; without one the prediction is not known.
        truth: ``forget`` to judge by, if there is one.
    """
    attack = "target of one record"
    if head.bias is None or found.verdict != "recoverable" or found.recovered is None or found.shape is None:
        words = "The record's input did not come back, or the last layer has no bias: its target cannot be told."
        return Finding(attack=attack, place=head.name, verdict="not shown", words=words)
    p = next(evidence.model.parameters())
    with torch.no_grad():
        evidence.model.eval()
        prediction = evidence.model(found.recovered[:1].view(1, *found.shape).to(p)).flatten().double().cpu()
    own = prediction - head.bias.double().cpu() / 2
    words = f"The prediction for the input that came back, less half the bias gradient, is its target: {_listed(own)}"
    numbers: dict[str, object] = {"target": own.tolist()}
    right = True
    if truth.forget is not None:
        known = next(iter(micro_batches(truth.forget, 1)[1]))[1][1].flatten().double().cpu()
        numbers["true target"] = known.tolist()
        right = bool(((own - known).abs() <= 1e-2 * known.abs().clamp(min=1)).all())
        words += "" if right else f", and it is {_listed(known)}"
    verdict: Verdict = "recoverable" if right else "not shown"
    return Finding(attack=attack, place=head.name, verdict=verdict, words=f"{words}.", numbers=numbers)


def _listed(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:SHOWN].tolist())


class Composition(NamedTuple):
    """How many records of each class were removed, as far as the head's gradient tells."""

    counts: Float[np.ndarray, " classes"]  # together as many as were removed; 0 if nothing fits
    kept: Float[np.ndarray, " classes"]  # records of each class that are left
    unexplained: float  # share of the gradient's norm that no records of these classes account for


def composition(evidence: Evidence, head: Layer) -> Composition:
    """Estimate of which classes the removed records were, from the gradient of their loss, of any kind.

    Formula: min over n >= 0 of ‖g - Σ n_c m_c‖, with g the head's part of the difference and m_c that of an average
    kept record of class c; n is then scaled to the number of removed records. Misses: a class of which nothing is
    kept, which ``unexplained`` shows: it is near 1 then.

    Raises:
        NotInformative: The head's gradient is below its rounding floor.
        UnsupportedModule: A record has not one logit for each output of the head and one class number.
        MissingExtra: SciPy is not installed.
    """
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise MissingExtra("counting labels needs SciPy: pip install 'expunge[eval]'.") from error
    observed = _flat(head.weight, head.bias)
    scale = float(observed.norm())
    if scale <= float(_flat(head.weight_floor, head.bias_floor).norm()):
        raise NotInformative("The head's gradient is below its rounding floor: it tells no class of what was removed.")
    means, kept = _contribution_of_a_class(evidence, head, len(head.weight))
    solution, left_over = nnls(means.numpy(), observed.numpy())
    counts = solution * evidence.removed.count / max(solution.sum(), 1e-300)
    return Composition(counts, kept.double().numpy(), float(left_over) / scale)


def _several(evidence: Evidence, head: Layer, count: int, known: Tensor | None) -> Finding:
    attack, classes = "labels of several records", len(head.weight)
    try:
        estimate, kept, unexplained = composition(evidence, head)
    except NotInformative as error:
        return Finding(attack=attack, place=head.name, verdict="not shown", words=str(error))
    numbers: dict[str, object] = {
        "estimated counts": [round(float(each), 2) for each in estimate],
        "unexplained": unexplained,
    }
    prior = count * kept / kept.sum()
    if known is None:
        words = "An estimate of how many records of each class were removed; without the truth nobody knows how good."
        if unexplained > UNEXPLAINED:
            words = (
                f"{unexplained:.0%} of the head's gradient is not what kept records give: the counts say nothing. Was "
                "all of a class removed?"
            )
        return Finding(attack=attack, place=head.name, verdict="not shown", words=words, numbers=numbers)
    true = np.bincount(known.numpy(), minlength=classes)
    placed, by_chance = (float(np.minimum(each, true).sum() / len(known)) for each in (estimate, prior))
    numbers |= {"true counts": true.tolist(), "labels placed": placed, "placed by the kept data's shares": by_chance}
    told = placed >= 0.9 and placed - by_chance >= 0.05
    words = (
        f"{placed:.0%} of the removed records are put into the right class by counting, {by_chance:.0%} by the shares "
        "of the kept data alone."
    )
    verdict: Verdict = "partly recoverable" if told else "not shown"
    return Finding(attack=attack, place=head.name, verdict=verdict, words=words, numbers=numbers)


def _contribution_of_a_class(evidence: Evidence, head: Layer, classes: int) -> tuple[Tensor, Tensor]:
    """The head's gradient of an average kept record of each class (entries, classes), and how many were kept."""
    model = params.plain(evidence.model)
    module = dict(model.named_modules())[head.name]
    columns, (groups, kept) = [], _by_class(evidence, classes)
    owned = {id(p): name for name, p in params.named_parameters(model, lambda _, __: True).items()}
    weight = owned[id(module.weight)]
    bias = owned[id(module.bias)] if head.bias is not None and isinstance(module.bias, Tensor) else None
    for number in range(classes):
        if not groups[number]:
            columns.append(torch.zeros_like(_flat(head.weight, head.bias)))
            continue
        names = [weight] if bias is None else [weight, bias]
        mean = gradient(model, evidence.loss_terms, groups[number], parameters=names)
        columns.append(_flat(mean.total[weight].cpu(), None if bias is None else mean.total[bias].cpu()) / mean.count)
    return torch.stack(columns, 1), kept


def _by_class(evidence: Evidence, classes: int) -> tuple[list[list[object]], Tensor]:
    """Kept records as a list of batches for each class, as many of each, and how many of each there are."""
    groups: list[list[object]] = [[] for _ in range(classes)]
    seen = torch.zeros(classes)
    counts, most = [0] * classes, max(4 * LIMIT // classes, LEAST)
    device = next(evidence.model.parameters()).device
    with params.restoring_modes(evidence.model), keeping_random_state(), torch.no_grad():
        evidence.model.eval()
        for _, each in micro_batches(evidence.retain, 128)[1]:
            batch = to_device(each, device)
            logits, own = evidence.logits(evidence.model, batch)
            _require_class_numbers(logits, own, classes, length_of(batch))
            for number in own.unique().tolist():
                found = (own == number).nonzero().flatten()
                seen[number] += len(found)
                rows = found[: most - counts[number]]
                counts[number] += len(rows)
                if len(rows):
                    groups[number].append(map_tensors(batch, lambda tensor, rows=rows: tensor[rows]))  # type: ignore[misc]
    return groups, seen


def _require_class_numbers(logits: Tensor, own: Tensor, classes: int, records: int | None) -> None:
    if logits.ndim != 2 or logits.shape[1] != classes or own.shape != logits.shape[:1]:
        raise UnsupportedModule(
            f"logits of shape {tuple(logits.shape)}, labels of shape {tuple(own.shape)}, and a last linear layer of "
            f"{classes} outputs: classes are counted where a record has a logit for each output, and one class number."
        )
    if records is not None and len(own) != records:
        raise UnsupportedModule(
            f"{len(own)} labels of {records} records: classes are counted where each record has one; tokens are none."
        )
    if len(own) and not 0 <= int(own.min()) <= int(own.max()) < classes:
        raise UnsupportedModule(
            f"labels from {int(own.min())} to {int(own.max())}: there are classes 0 to {classes - 1}."
        )


def _labels_of(evidence: Evidence, data: Batches) -> Tensor:
    logits: Logits = evidence.logits
    return torch.from_numpy(outputs(evidence.model, data, logits).labels)


def _flat(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.flatten() if bias is None else torch.cat([weight.flatten(), bias])
