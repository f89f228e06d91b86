"""Who on a list of candidates was removed?

The difference is the sum of the removed records' own gradients. For a list of candidates it is one least squares
problem, g_F ≈ Σ w_j g_j, whose solution has w = 1 for records that were removed and 0 for others; a matched filter, the
cosine of g_j and g_F, needs no complete list. No number of removed records hides anyone as long as gradients span many
more directions than there are candidates; if they do not, any list fits any difference, and nobody is accused. Source:
tracing from sums, Dwork et al. 2015, "Robust Traceability from Trace Amounts"; with gradients of all candidates at hand
the sum can be solved for.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from expunge import params
from expunge.audit.finding import Evidence, Finding, Truth, Verdict
from expunge.batches import Batch, Batches, map_tensors, micro_batches, tensors_of, to_device
from expunge.errors import ConfigError, MissingExtra
from expunge.seeds import stream

ENTRIES, MOST = 2**15, 256  # of the gradient; candidates of a kind
CANDIDATES = "list of candidates"  # the name of this attack
EXPLAINED = 0.1  # share of the difference's length that may remain if the list is to explain it
CERTAIN = 0.5  # weight above which least squares says "removed"
UNCLEAR = 0.1  # distance of a weight from 0 and 1, and share of such weights, above which nobody is named
SURPLUS = 4  # directions beyond half as many again as there are candidates, below which strangers fit too


@dataclass(frozen=True)
class Scores:
    """How strongly each candidate is in the difference."""

    weights: Float[Tensor, " candidates"]  # least squares: 1 for a removed record, 0 for another
    filtered: Float[Tensor, " candidates"]  # matched filter, a cosine in [-1, 1]
    residual: float  # share of the difference's length that those above `CERTAIN`, once each, do not explain
    directions: int  # that gradients of candidates and kept records span above rounding: independent equations

    @property
    def named(self) -> list[int]:
        """The candidates that least squares calls removed."""
        found: list[int] = (self.weights > CERTAIN).nonzero().flatten().tolist()
        return found

    @property
    def clear(self) -> bool:
        """Whether weights are near 0 or 1; strangers that fit what somebody off the list left have any."""
        unclear = torch.minimum(self.weights.abs(), (self.weights - 1).abs()) > UNCLEAR
        return int(unclear.sum()) <= UNCLEAR * len(self.named)

    @property
    def determined(self) -> bool:
        """Whether there are so many equations that a list of strangers cannot satisfy them."""
        return self.directions >= needed(len(self.weights))


def needed(candidates: int) -> int:
    """Directions that gradients must span for so many candidates to be told apart."""
    return candidates + candidates // 2 + SURPLUS


def score(evidence: Evidence, candidates: Sequence[Batch], *, seed: int = 0) -> Scores:
    """Fit the difference with the candidates' own gradients.

    Entries are weighted by their rounding floors, and weights are drawn to zero as far as the floor demands.

    Args:
        evidence: What the attacker has.
        candidates: Records, each as a batch of its own (`singly`).
        seed: Which entries are looked at if there are more than `ENTRIES`.
    """
    chosen = _entries(evidence, seed)
    floors = _picked(evidence.removed.noise or {}, chosen)
    target = _picked(evidence.removed.total, chosen)
    scale = floors.clamp(min=max(float(floors.max()) * 1e-6, 1e-300))
    columns = torch.stack(list(_own_gradients(evidence, candidates, chosen)), 1)
    kept = itertools.islice(_one_by_one(evidence.retain), needed(len(candidates)))  # some may be candidates, too
    more = list(_own_gradients(evidence, kept, chosen))
    cosines = (columns.T @ target) / (columns.norm(dim=0) * target.norm()).clamp(min=1e-300)
    whitened, aim = columns / scale[:, None], target / scale
    normal = whitened.T @ whitened + torch.eye(columns.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(normal, whitened.T @ aim)
    named = solution > CERTAIN
    # A removed record is in the sum exactly once: with weights of their own, strangers would fit what others left.
    rest = float((target - columns[:, named].sum(1)).norm() / target.norm().clamp(min=1e-300))
    return Scores(solution, cosines, rest, _rank(torch.cat([whitened, torch.stack(more, 1) / scale[:, None]], 1)))


def _rank(whitened: Float[Tensor, "entries records"]) -> int:
    """Singular values above those of a matrix of rounding errors, whose entries are of size 1."""
    sizes = torch.linalg.svdvals(torch.linalg.qr(whitened, mode="r").R)
    noise = max(sum(length**0.5 for length in whitened.shape), float(sizes.max()) * 1e-12)
    return int((sizes > noise).sum())


def judged_list(evidence: Evidence, truth: Truth, *, seed: int = 0) -> Finding | None:
    """Run both attacks on a list and judge them.

    With ``truth.forget`` and ``truth.unseen`` the list is both together, and the verdict their membership AUC. With
    ``truth.candidates`` alone it is those, and the verdict whether some of them explain the difference.

    Returns:
        None if there is nobody to try.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    attack, place = CANDIDATES, "all parameters"
    if truth.forget is not None and truth.unseen is not None:
        members, others = singly(truth.forget, seed=seed), singly(truth.unseen, seed=seed)
        return _known(evidence, list(members.values()), list(others.values()), seed)
    if truth.candidates is None:
        return None
    some = singly(truth.candidates, seed=seed)
    found = score(evidence, list(some.values()), seed=seed)
    rows, tried = list(some), len(found.weights)
    named = [rows[number] for number in found.named]
    numbers = {
        "candidates": tried,
        "found": named if found.determined else [],
        "unexplained share": found.residual,
        "directions": found.directions,
    }
    if not found.determined:
        words = (
            f"Nobody can be named: gradients of candidates and kept records span {found.directions} directions, and "
            f"{tried} candidates need {needed(tried)}. With so few equations any list fits, removed or not. Give a "
            "shorter list."
        )
        return Finding(attack=attack, place=place, verdict="not shown", words=words, numbers=numbers)
    explained = bool(named) and found.clear and found.residual <= EXPLAINED
    words = (
        f"{len(named)} of {tried} candidates fit, and {max(0.0, 1 - found.residual):.0%} of the difference is "
        "explained by them: " + ("they were removed." if explained else "too little to say who was removed.")
    )
    if tried == MOST:
        words += f" No more than {MOST} candidates are tried, drawn at random: any others on the list were not."
    verdict: Verdict = "partly recoverable" if explained else "not shown"
    return Finding(attack=attack, place=place, verdict=verdict, words=words, numbers=numbers)


def _known(evidence: Evidence, members: list[Batch], others: list[Batch], seed: int) -> Finding:
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise MissingExtra("the list of candidates needs scikit-learn: pip install 'expunge[eval]'.") from error
    found = score(evidence, [*members, *others], seed=seed)
    count = len(members)
    truth = np.r_[np.ones(count), np.zeros(len(others))]
    by_fit, by_filter = (float(roc_auc_score(truth, each.numpy())) for each in (found.weights, found.filtered))
    spread = ((count + len(others) + 1) / (12 * count * len(others))) ** 0.5  # sd of an AUC by chance
    best = max(by_fit, by_filter)
    numbers = {
        "removed": count,
        "unseen": len(others),
        "AUC of least squares": by_fit,
        "AUC of matched filter": by_filter,
        "sd by chance": spread,
        "unexplained share": found.residual,
        "directions": found.directions,
    }
    exact = (
        by_fit == 1 and found.determined and found.residual <= EXPLAINED
    )  # few members: their ranks alone could be chance
    told = exact or (best >= 0.7 and best > 0.5 + 4 * spread)
    words = (
        f"Among {count} removed and {len(others)} unseen records the removed ones are told with an AUC of {best:.2f} "
        "(0.5 is chance). "
        + ("Whoever can guess a record can test the guess." if told else "That is no more than chance.")
    )
    verdict: Verdict = "partly recoverable" if told else "not shown"
    return Finding(attack=CANDIDATES, place="all parameters", verdict=verdict, words=words, numbers=numbers)


def singly(data: Batches, *, seed: int = 0) -> dict[int, Batch]:
    """Single records, at most `MOST` of them drawn at random, as batches of one by their place in the data.

    Raises:
        ConfigError: Batches whose tensors do not have one row an example.
    """
    alone = list(_one_by_one(data))
    drawn = torch.randperm(len(alone), generator=stream(seed, "audit", "candidates"))[:MOST].sort().values
    return {row: alone[row] for row in drawn.tolist()}


def _one_by_one(data: Batches) -> Iterator[Batch]:
    for _, batch in micro_batches(data, 128)[1]:
        tensors = tensors_of(batch)
        if len({len(tensor) if tensor.ndim else -1 for tensor in tensors}) != 1:
            raise ConfigError("candidates need one row an example in each tensor of a batch. Give Examples(x, y).")
        for row in range(len(tensors[0])):
            yield map_tensors(batch, lambda tensor, row=row: tensor[row : row + 1])  # type: ignore[misc]


def _own_gradients(evidence: Evidence, candidates: Iterable[Batch], chosen: dict[str, Tensor]) -> Iterator[Tensor]:
    model = params.plain(evidence.model)
    named = params.named_parameters(model, chosen)
    device = next(iter(named.values())).device
    with (
        params.restoring_modes(model),
        params.requiring_gradients(model, named.values()),
        torch.enable_grad(),
    ):
        model.eval()
        for batch in candidates:
            terms = evidence.loss_terms(model, to_device(batch, device))
            slopes = torch.autograd.grad(terms.sum(), list(named.values()), allow_unused=True)
            found = {
                name: torch.zeros_like(p) if slope is None else slope
                for (name, p), slope in zip(named.items(), slopes, strict=True)
            }
            yield _picked(found, chosen)


def _entries(evidence: Evidence, seed: int) -> dict[str, Tensor]:
    """Positions in each tensor of the entries to look at: all, or a random part."""
    sizes = {name: tensor.numel() for name, tensor in evidence.removed.total.items()}
    whole = sum(sizes.values())
    chosen = {}
    for name, count in sizes.items():
        if whole <= ENTRIES:
            chosen[name] = torch.arange(count)
        else:
            drawn = torch.randperm(count, generator=stream(seed, "audit", "entries", name))
            chosen[name] = drawn[: max(1, count * ENTRIES // whole)]
    return chosen


def _picked(tensors: dict[str, Tensor], chosen: dict[str, Tensor]) -> Tensor:
    return torch.cat(
        [tensors[name].detach().reshape(-1)[at.to(tensors[name].device)].double().cpu() for name, at in chosen.items()]
    )
