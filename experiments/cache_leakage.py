"""What does a gradient cache give away, for how many removed records, and what do mitigations cost?

Claim: the paper's Lemma 1 does not protect. With one record removed, its image comes back from cache, weights and
retain set; with more, fewer do, but a list of candidates tells who was removed however many they are. No mitigation
hides a single image for certain, none hides membership, and each costs something of the reset set.
Setting: 1,500 handwritten digits, an MLP 64-64-10 in float32 trained for 10 epochs. k = 1 to 100 records are removed at
random. Attacks see the difference as the library computes it, from a cache that went through its file.
Cost: about five minutes on one core.
Expected: at k = 1 a median PSNR above 40 dB from the full cache; AUC of least squares at 0.99 or more for every k.

    python experiments/cache_leakage.py
"""

import fnmatch
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor, nn

from expunge import Examples, Recipe, cache, cross_entropy, gradient, seeded, stream, train
from expunge.audit.candidates import judged_list
from expunge.audit.finding import Evidence, Truth
from expunge.audit.inversion import invert
from expunge.audit.labels import labels
from expunge.audit.layers import Inputs, Layer, layer_inputs, linear_layers
from expunge.audit.preflight import overlap, reset_set, stability
from expunge.audit.ratio import with_bias, without_bias
from expunge.data.digits import Split, digits
from expunge.gradient import Gradient
from expunge.models.mlp import MLP
from expunge.rows import write_csv

REMOVALS = {1: 100, 2: 50, 5: 30, 10: 20, 30: 10, 100: 5}  # k: how many times
FIRST = "layers.linear1"
LISTS = 10  # of those, how often membership is tested
FRACTION = 0.1  # of the reset set
COLUMNS = (
    "cache",
    "removed",
    "repetitions",
    "records above 30 dB",
    "median PSNR",
    "some record above 30 dB",
    "labels right",
    "AUC least squares",
    "AUC matched filter",
    "overlap of reset set",
    "predicted overlap",
    "informative share",
)


@dataclass(frozen=True)
class Mitigation:
    """How a cache is stored."""

    name: str
    dtype: torch.dtype = torch.float64
    leave_out: str = ""  # a pattern of parameter names


MITIGATIONS = (
    Mitigation("full, float64"),
    Mitigation("full, float32", dtype=torch.float32),
    Mitigation("full, bfloat16", dtype=torch.bfloat16),
    Mitigation("no biases", leave_out="*.bias"),
    Mitigation("no first layer", leave_out="layers.linear1.*"),
)


@dataclass(frozen=True)
class Case:
    """One deletion and what was seen of it."""

    evidence: Evidence
    full: Gradient
    exact: Gradient  # the difference in float64 throughout
    exact_full: Gradient
    truth: Truth


def without(whole: Gradient, pattern: str) -> Gradient:
    """A gradient of the parameters that do not match."""
    left = [name for name in whole.total if not fnmatch.fnmatchcase(name, pattern)]
    assert whole.noise is not None
    return replace(whole, total={n: whole.total[n] for n in left}, noise={n: whole.noise[n] for n in left})


def cases(model: nn.Module, split: Split, k: int, times: int, kept: Mitigation) -> Iterator[Case]:
    """Deletions of k records, seen through a cache that was stored in some way."""
    data = split.train
    wide = Examples(data.tensors[0].double(), data.tensors[1])
    twin = MLP((64, 64, 10)).double()
    twin.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    exact_full = gradient(twin, cross_entropy, wide)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(f"{folder}/cache", without(gradient(model, cross_entropy, data), kept.leave_out), dtype=kept.dtype)
        full = cache.load(f"{folder}/cache", model, cross_entropy)
    for draw in range(times):
        positions = torch.randperm(len(data), generator=stream(draw, "removed", k))[:k]
        retain = data.without(positions)
        removed = full - gradient(model, cross_entropy, retain, parameters=full.total)
        evidence = Evidence(model=model, loss_terms=cross_entropy, retain=retain, removed=removed)
        exact = exact_full - gradient(twin, cross_entropy, wide.without(positions))
        truth = Truth(forget=data.only(positions), unseen=split.test)
        yield Case(evidence, full, exact, exact_full, truth)


def measure(model: nn.Module, split: Split, k: int, times: int, kept: Mitigation) -> tuple[str, ...]:
    """One line of the table."""
    ratios: list[Tensor] = []
    right, lists, filters, same, predicted, seen = [], [], [], [], [], []
    for number, case in enumerate(cases(model, split, k, times, kept)):
        layers = linear_layers(case.evidence)
        assert case.truth.forget is not None
        own = layer_inputs(model, cross_entropy, case.truth.forget)
        ratios.append(_psnr(case, layers, own))
        if k == 1:
            right.append(labels(case.evidence, layers[-1], case.truth).verdict != "not shown")
        if number < LISTS:
            found = judged_list(case.evidence, case.truth, seed=number)
            assert found is not None
            lists.append(found.numbers["AUC of least squares"])
            filters.append(found.numbers["AUC of matched filter"])
        chosen = reset_set(case.evidence.removed, case.full, FRACTION)
        everywhere = reset_set(case.exact, case.exact_full, FRACTION)
        nothing = {n: torch.zeros_like(mask) for n, mask in everywhere.items() if n not in chosen}
        same.append(overlap(chosen | nothing, everywhere))
        predicted.append(stability(case.evidence.removed, case.full, FRACTION))
        marks = case.evidence.removed.informative()
        seen.append(float(torch.cat([mask.flatten() for mask in marks.values()]).double().mean()))
    every = torch.cat(ratios)
    values = (
        float((every > 30).double().mean()),
        float(every.median()),
        fmean(float(each.max() > 30) for each in ratios),
        fmean(right) if right else None,
        fmean(lists),
        fmean(filters),
        median(same),
        median(predicted),
        median(seen),
    )
    texts = ("" if value is None else f"{value:.3f}" for value in values)
    return (kept.name, str(k), str(times), *texts)


def _psnr(case: Case, layers: list[Layer], own: dict[str, Inputs]) -> Tensor:
    """PSNR of each removed image by the best attack that applies, dB; 0 where nothing comes out."""
    kept = layer_inputs(case.evidence.model, cross_entropy, case.evidence.retain)
    count = len(own[FIRST].values)
    best = torch.zeros(count, dtype=torch.float64)
    if layers[0].name != FIRST:
        return _inverted(case, layers, kept) if count == 1 else best
    attacks = [without_bias] if layers[0].bias is None else [with_bias, without_bias]
    for attack in attacks:
        found = attack(layers[0], kept[FIRST], own[FIRST], count)
        if found.recovered is None or found.truth is None:
            continue
        error = (found.recovered - found.truth).square().mean(1).clamp(min=1e-20)
        whose = torch.cdist(found.truth, own[FIRST].values).argmin(1)
        best[whose] = torch.maximum(best[whose], -10 * torch.log10(error))
    return best


def _inverted(case: Case, layers: list[Layer], kept: dict[str, Inputs]) -> Tensor:
    """The same without the first layer: features from the head, then an image with those."""
    label = labels(case.evidence, layers[-1], Truth())
    if "label" not in label.numbers:
        return torch.zeros(1, dtype=torch.float64)
    spread = kept[layers[0].name].spread
    found = invert(case.evidence, layers[0], label.numbers["label"], spread, case.truth)
    return torch.tensor([found.numbers.get("PSNR", 0.0)], dtype=torch.float64)


def main() -> None:
    """Print a line a case and keep them in ``results/``."""
    torch.set_num_threads(1)
    split = digits(1500, seed=0)
    with seeded(0, "leakage"):
        model = MLP((64, 64, 10))
    train(model, split.train, cross_entropy, Recipe(epochs=10, lr=0.05, batch_size=64), seed=0)
    lines = []
    for kept in MITIGATIONS:
        for k, times in REMOVALS.items():
            lines.append(measure(model, split, k, times, kept))
            print(*lines[-1], sep="  ", flush=True)
    write_csv(Path(__file__).parent.parent / "results" / "cache_leakage.csv", COLUMNS, lines)


if __name__ == "__main__":
    main()
