"""What an attack found, and what an attacker has in hand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge import params
from expunge.batches import Batches, LossTerms
from expunge.errors import NotInformative
from expunge.gradient import Gradient
from expunge.methods.difference import NOTHING_REMOVED
from expunge.metrics.outputs import Logits, images_and_labels
from expunge.second_pass import second_pass

Verdict = Literal["recoverable", "partly recoverable", "not shown"]
VERDICTS: tuple[Verdict, ...] = ("recoverable", "partly recoverable", "not shown")  # worst first


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What someone with the cache, the weights and the retain set has: the gradient of what was removed."""

    model: nn.Module
    loss_terms: LossTerms
    retain: Batches
    removed: Gradient  # g_D - g_new
    logits: Logits = images_and_labels  # where logits and labels are in a batch
    doubts: str = ""  # why that difference may be void
    compared: int = 0  # micro-batches with as many terms as they had, whose loss can be compared with what it was


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the auditor knows besides, to judge the attacks: never an input of an attack's reconstruction."""

    forget: Batches | None = None  # the removed records
    unseen: Batches | None = None  # records that were never in the data
    candidates: Batches | None = None  # records that may have been among the removed


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one attack found at one place.

    A verdict speaks of what was tried: "not shown" is no proof that nothing leaks.
    """

    attack: str
    place: str  # a layer, or what else was attacked
    verdict: Verdict
    words: str  # for a reader who knows no attacks
    numbers: Mapping[str, Any] = field(default_factory=dict)  # plain values for JSON
    recovered: Float[Tensor, "records features"] | None = None
    truth: Float[Tensor, "records features"] | None = None  # of the same shape, in the same order
    shape: tuple[int, ...] | None = None  # of one record, where features are the model's input

    def as_dict(self) -> dict[str, Any]:
        """Everything but the reconstructions, as plain values for JSON."""
        names = ("attack", "place", "verdict", "words")
        return {name: getattr(self, name) for name in names} | {"numbers": dict(self.numbers)}


def evidence(
    model: nn.Module, loss_terms: LossTerms, retain: Batches, full: Gradient, *, logits: Logits = images_and_labels
) -> Evidence:
    """Compute the gradient of what was removed, as anyone with cache, weights and retain set can.

    Args:
        model: With the weights that the cache was made at.
        loss_terms: The loss that the cache was made with.
        retain: What is left.
        full: The cached gradient.
        logits: Where logits and labels are in a batch.

    Raises:
        NotInformative: Nothing was removed since the cache was made: the retain data gives the cached gradient.
        MismatchError: Cache, model and data do not belong together.
    """
    left, *_, compared = second_pass(full, model, loss_terms, retain)
    removed = full - left
    if removed.count == 0 and not any(bool(mask.any()) for mask in removed.informative().values()):
        raise NotInformative(
            "retain() has as many terms as the cache, and their gradients differ by no more than rounding. "
            f"{NOTHING_REMOVED} To rehearse with records that you may keep, let retain() leave some out, and forget() "
            "return them."
        )
    return Evidence(
        model=model,
        loss_terms=loss_terms,
        retain=retain,
        removed=removed,
        logits=logits,
        doubts=full.doubts(left),
        compared=compared,
    )


def worst(findings: list[Finding]) -> Verdict:
    """The worst verdict of several; "not shown" of none."""
    return min((finding.verdict for finding in findings), key=VERDICTS.index, default="not shown")


def judged(error: float) -> Verdict:
    """The verdict on a reconstruction by its error, as a share of how much records differ from each other.

    A tenth is about 30 dB for images in [0, 1], a third about 20 dB: hardly to be told apart, and recognisable.
    """
    return "recoverable" if error <= 0.1 else "partly recoverable" if error <= 1 / 3 else "not shown"


def floor_of(removed: Gradient, name: str) -> Tensor:
    """The rounding floor of a parameter's difference, float64."""
    assert removed.noise is not None
    return removed.noise[name].double()


def weights_in(model: nn.Module, module: nn.Module) -> dict[str, str]:
    """The names in the model of a module's own parameters, by their names in the module; tied ones are left out.

    The gradient of a tied parameter is a sum over the layers that share it, and none of them can be read off.
    """
    named = {id(p): name for name, p in params.named_parameters(model, lambda _, __: True).items()}
    uses: dict[int, int] = {}
    for each in model.modules():
        for p in each.parameters(recurse=False):
            uses[id(p)] = uses.get(id(p), 0) + 1
    own = dict(module.named_parameters(recurse=False))
    return {name: named[id(p)] for name, p in own.items() if uses[id(p)] == 1}


def peak_ratio(recovered: Tensor, truth: Tensor, span: float) -> Tensor:
    """PSNR of each record, dB, for values that span ``span``; at most 200."""
    error = (recovered - truth).double().square().mean(-1)
    return (10 * torch.log10(span**2 / error.clamp(min=1e-30))).clamp(max=200)
