"""The audit of a cache: every attack that fits the model, one after the other.

Whoever has the cache, the weights and the retain set can compute the gradient of what was removed. The paper argues
(Lemma 1) that a sum of gradients cannot be inverted. That it is no bijection is true; that nothing can be
recovered does not follow, and these attacks show it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from expunge import params
from expunge.audit.candidates import CANDIDATES, judged_list
from expunge.audit.finding import Evidence, Finding, Truth, Verdict, worst
from expunge.audit.inversion import invert
from expunge.audit.labels import labels, target
from expunge.audit.layers import Inputs, Layer, first_tensor, layer_inputs, linear_layers
from expunge.audit.ratio import with_bias, without_bias
from expunge.audit.span import records_in_span, words_in_span
from expunge.audit.words import bag_of_words
from expunge.batches import micro_batches, tensors_of, to_device
from expunge.errors import UnsupportedModule
from expunge.losses import squared_error
from expunge.metrics.outputs import images_and_labels
from expunge.seeds import keeping_random_state


@dataclass(frozen=True)
class CacheAudit:
    """What the attacks found."""

    removed: int  # loss terms
    relative_noise: float  # predicted relative error of the difference
    findings: list[Finding]

    @property
    def verdict(self) -> Verdict:
        """The worst of all findings."""
        return worst(self.findings)

    @property
    def summary(self) -> str:
        """The verdict in plain words."""
        if self.verdict == "recoverable":
            where = next(f for f in self.findings if f.verdict == "recoverable")
            return (
                f"A removed record, or what it puts into a layer, can be recovered ({where.attack}, {where.place}). "
                "Until it is destroyed, the cache holds the deleted data."
            )
        if self.verdict == "partly recoverable":
            where = next(f for f in self.findings if f.verdict == "partly recoverable")
            return (
                f"No whole record was recovered, but a part or a membership was ({where.attack}, {where.place}). The "
                "cache is personal data until it is destroyed."
            )
        said = "None of the attacks tried found anything. That is no proof: others may. Destroy the cache all the same."
        if not any(finding.attack == CANDIDATES for finding in self.findings):
            said += (
                " Whether somebody's record was among the removed ones was not tried: that takes a list of candidates, "
                "from candidates() or forget(), and finds more than reconstruction does."
            )
        return said

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "verdict": self.verdict,
            "summary": self.summary,
            "removed_terms": self.removed,
            "relative_noise": self.relative_noise,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def audit_cache(evidence: Evidence, truth: Truth | None = None, *, seed: int = 0) -> CacheAudit:
    """Try every attack that fits the model; it, its modes and the global generators are left as they were found.

    Args:
        evidence: What an attacker has.
        truth: What there is to judge by. No reconstruction uses it; the list of candidates is made of it.
        seed: Of what is drawn at random.

    Raises:
        UnsupportedModule: The model has neither a linear layer nor an embedding to attack.
        MissingExtra: SciPy or scikit-learn is not installed.
    """
    truth = truth or Truth()
    with params.restoring_modes(evidence.model), keeping_random_state():
        findings = list(_attacks(evidence, truth, seed))
    return CacheAudit(evidence.removed.count, evidence.removed.relative_noise(), findings)


def _attacks(evidence: Evidence, truth: Truth, seed: int) -> Iterator[Finding]:
    bag = bag_of_words(evidence, truth)
    try:
        layers = linear_layers(evidence)
    except UnsupportedModule:
        if bag is None:
            raise
        layers = []
    model, loss = evidence.model, evidence.loss_terms
    kept, removed, unseen = (
        {} if data is None else layer_inputs(model, loss, data)
        for data in (evidence.retain, truth.forget, truth.unseen)
    )
    count = evidence.removed.count
    inputs: list[Finding] = []
    for layer in layers:
        if layer.bias is not None:
            inputs.append(with_bias(layer, kept[layer.name], removed.get(layer.name), count))
            yield inputs[-1]
        yield without_bias(layer, kept[layer.name], removed.get(layer.name), count)
    label = None
    if layers and _is_classifier(evidence, layers[-1]):
        label = labels(evidence, layers[-1], truth)
        yield label
    if count == 1 and inputs and layers[-1].last and loss is squared_error:
        yield target(evidence, layers[-1], inputs[0], truth)
    if layers and label is not None and "label" in label.numbers and _is_image(evidence, layers[0], kept):
        yield invert(evidence, layers[0], label.numbers["label"], kept[layers[0].name].spread, truth)
    if bag is not None:
        yield bag
        text = words_in_span(evidence, layers, truth.forget)
        if text is not None:
            yield text
    for layer in layers:
        if layer.name in removed and layer.name in unseen:
            yield records_in_span(layer, removed[layer.name], unseen[layer.name])
    listed = judged_list(evidence, truth, seed=seed)
    if listed is not None:
        yield listed


def _is_classifier(evidence: Evidence, head: Layer) -> bool:
    """Whether logits and labels of a batch are those of the last linear layer."""
    batch = next(iter(micro_batches(evidence.retain, 2)[1]))[1]
    if evidence.logits is images_and_labels and (isinstance(batch, dict) or len(tensors_of(batch)) != 2):
        return False
    device = next(evidence.model.parameters()).device
    with params.restoring_modes(evidence.model), torch.no_grad():
        evidence.model.eval()
        logits, own = evidence.logits(evidence.model, to_device(batch, device))
    return logits.ndim == 2 and own.shape == logits.shape[:1] and logits.shape[1] == len(head.weight)


def _is_image(evidence: Evidence, first: Layer, kept: dict[str, Inputs]) -> bool:
    """Whether something that can be differentiated stands between the model's inputs and its first linear layer."""
    batch = next(iter(micro_batches(evidence.retain, 2)[1]))[1]
    inputs = first_tensor(batch)
    usual = evidence.logits is images_and_labels and inputs.is_floating_point() and inputs.ndim >= 3
    own = kept[first.name]
    return usual and first.bias is not None and own.per_example == 1 and not own.is_model_input
