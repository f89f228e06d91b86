"""Training on what is left and on the removed records at once, for methods that treat the two differently."""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor, nn

from expunge.batches import Batch, Batches, Indexed, LossTerms, drawn, indexed, plain, shuffled
from expunge.methods.guard import MeanOfEpoch, taking_back
from expunge.seeds import keeping_random_state, stream
from expunge.trace import Trace
from expunge.training import AfterStep, Recipe, StopRule, frozen_statistics, in_train_mode, train

Pair = tuple[Batch | None, Batch | None]  # of what is left, of the removed records; never both None


class Together:
    """Every pass over it mixes what is left with the removed records, in a new random order.

    If both have positions, examples are mixed, and a batch has a part of each. Other data keeps its own batches: a
    batch is then of one or the other.

    Args:
        retain: What is left.
        forget: The removed records.
        size: Examples a batch, of both together.
        seed: Names the streams of randomness.
        share: Of what is left that takes part, the same in every pass.
    """

    def __init__(self, retain: Batches, forget: Batches, size: int, seed: int, share: float = 1.0) -> None:
        self.retain, self.forget, self.size, self.seed = retain, forget, size, seed
        self.passes = 0
        with keeping_random_state():
            count, self.removed = _entries(retain), _entries(forget)
        chosen = torch.randperm(count, generator=stream(seed, "share"))[: max(round(share * count), 1)]
        self.kept = chosen.sort().values  # rows of what is left; numbers of batches for data without positions

    def __len__(self) -> int:
        of_left, of_removed = indexed(self.retain), indexed(self.forget)
        if of_left is not None and of_removed is not None:
            return len(drawn(len(self.kept) + self.removed, self.size, stream(0)))
        counts = ((of_left, len(self.kept)), (of_removed, self.removed))
        return sum(count if known is None else len(drawn(count, self.size, stream(0))) for known, count in counts)

    def __iter__(self) -> Iterator[Pair]:
        generator = stream(self.seed, "together", self.passes)
        self.passes += 1
        of_left, of_removed = indexed(self.retain), indexed(self.forget)
        if of_left is not None and of_removed is not None:
            return self._mixed(of_left, of_removed, generator)
        return self._apart(generator)

    def _mixed(self, of_left: Indexed, of_removed: Indexed, generator: torch.Generator) -> Iterator[Pair]:
        count = len(self.kept)
        both = drawn(count + self.removed, self.size, generator)
        rows = [(self.kept[each[each < count]], each[each >= count] - count) for each in both]
        left = of_left.fetch([mine for mine, _ in rows if len(mine)])
        removed = of_removed.fetch([mine for _, mine in rows if len(mine)])
        for a, b in rows:
            yield (next(left) if len(a) else None, next(removed) if len(b) else None)

    def _apart(self, generator: torch.Generator) -> Iterator[Pair]:
        a, left = self._own_batches(self.retain, self.kept, generator)
        b, removed = self._own_batches(self.forget, torch.arange(self.removed), generator)
        for turn in (torch.randperm(a + b, generator=generator) < a).tolist():
            yield (next(left), None) if turn else (None, next(removed))

    def _own_batches(
        self, data: Batches, kept: Int[Tensor, " _"], generator: torch.Generator
    ) -> tuple[int, Iterator[Batch]]:
        known = indexed(data)
        if known is None:
            wanted = set(kept.tolist())
            return len(wanted), (batch for number, batch in enumerate(plain(data)) if number in wanted)
        rows = [kept[each] for each in drawn(len(kept), self.size, generator)]
        return len(rows), known.fetch(rows)


class Apart:
    """Every pass over it is one over the removed records, if it is the turn of those, then one over what is left."""

    def __init__(self, retain: Batches, forget: Batches, size: int, seed: int, turns: Callable[[int], bool]) -> None:
        self.retain, self.forget, self.size, self.seed, self.turns = retain, forget, size, seed, turns
        self.passes = 0

    def __iter__(self) -> Iterator[Pair]:
        number, self.passes = self.passes, self.passes + 1
        if self.turns(number):
            yield from ((None, batch) for batch in self._pass(self.forget, "forget", number))
        yield from ((batch, None) for batch in self._pass(self.retain, "retain", number))

    def _pass(self, data: Batches, name: str, number: int) -> Iterator[Batch]:
        return shuffled(data, self.size, stream(self.seed, name, number))[1]


def train_on_pairs(
    model: nn.Module,
    pairs: Iterable[Pair],
    on_retain: LossTerms,
    on_forget: LossTerms,
    recipe: Recipe,
    *,
    seed: int,
    trace: Trace,
    loss_bound: float,
    after_step: AfterStep | None = None,
    stop: StopRule | None = None,
) -> Trace:
    """`train`, with a loss for what is left and another for the removed records; an update follows the mean of both.

    BatchNorm's statistics follow what is left and never see the removed records, which pass through as in eval mode.
    An epoch whose mean loss on what is left passes the bound is taken back, and ends the training.

    Args:
        model: Trained in place.
        pairs: `Together` or `Apart`.
        on_retain: Loss terms of the first part of a pair.
        on_forget: Loss terms of the second.
        recipe: How to train; its batch size has no effect here.
        seed: Names the streams of randomness.
        trace: Where to record.
        loss_bound: Mean loss on what is left, nats a term.
        after_step: As in `train`.
        stop: As in `train`; not asked about an epoch that was taken back.
    """
    left = MeanOfEpoch()

    def both(model: nn.Module, pair: Batch) -> Tensor:
        retain, forget = pair
        parts = []
        if retain is not None:
            terms = in_train_mode(model, on_retain, retain)
            left.add(terms)
            parts.append(terms)
        if forget is not None:
            with frozen_statistics(model):
                parts.append(on_forget(model, forget))
        return torch.cat(parts)

    diverged = taking_back(model, loss_bound, left, trace=trace)

    def either(model: nn.Module, training_loss: float) -> str | None:
        return diverged(model, training_loss) or (stop(model, training_loss) if stop else None)

    return train(model, pairs, both, recipe, seed=seed, trace=trace, stop=either, after_step=after_step)


def _entries(data: Batches) -> int:
    """How many examples there are, or batches in data without positions."""
    known = indexed(data)
    return len(known.positions) if known is not None else sum(1 for _ in plain(data))
