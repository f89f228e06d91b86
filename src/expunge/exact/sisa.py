"""SISA: many models on separate shards of the data, so that a removal retrains only a part of one.

Source: Bourtoule et al., "Machine Unlearning" (IEEE S&P 2021). Every shard is learned slice by slice, with a checkpoint
behind each slice; a removal goes back to the checkpoint in front of the first slice that held a removed record.

Deviations: records are dealt to shards and slices at random, but evenly in every S·R consecutive positions, so that a
record's place never depends on which others exist; epochs a slice are whole numbers (`epochs_per_slice`); the learning
rate's schedule and the momentum begin anew in each slice; a tied vote goes to the larger mean probability.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from expunge import params
from expunge.batches import Batches, Examples, LossTerms
from expunge.errors import ConfigError, UnsupportedModule
from expunge.exact.checkpoints import Checkpoints
from expunge.losses import name_of
from expunge.seeds import derive, seeded, stream
from expunge.trace import Trace
from expunge.training import Recipe, train

Aggregation = Literal["mean", "vote"]


@dataclass(frozen=True, kw_only=True)
class Sisa:
    """How to cut the data, and how to train on it.

    Raises:
        ConfigError: A value that cannot work, or more slices than the epochs can be spread over.
    """

    recipe: Recipe  # of one model on all of its data; its epochs are spread over the slices at the same cost
    shards: int  # S: models, each on its own part of the data
    slices: int  # R: parts of a shard, added one after the other; each keeps a checkpoint
    aggregation: Aggregation = "mean"  # of the models' probabilities, or "vote": the class most models name

    def __post_init__(self) -> None:
        if self.shards < 1 or self.slices < 1:
            raise ConfigError(f"shards={self.shards}, slices={self.slices}: there must be at least 1 of each.")
        if self.aggregation not in get_args(Aggregation):
            raise ConfigError(f"aggregation={self.aggregation!r}: must be one of {get_args(Aggregation)}.")
        epochs_per_slice(self.recipe.epochs, self.slices)

    def slice_recipe(self, number: int) -> Recipe:
        """The recipe of a slice, counted from 0: its share of the epochs."""
        return self.recipe.shortened(epochs_per_slice(self.recipe.epochs, self.slices)[number])


@dataclass(frozen=True)
class Removal:
    """What a removal cost."""

    retrained: dict[int, int]  # the first slice that was trained again, by shard
    share: float  # example passes, of those that training everything on what is left takes
    expected: float  # that share for as many records at random places
    trace: Trace


class Ensemble(nn.Module):
    """The models of all shards. Called with inputs, it gives logits: a classifier like any other.

    It keeps the data that it was trained on, less what was removed; ``trace`` is that of the fit.
    """

    def __init__(
        self,
        fresh: Callable[[int], nn.Module],
        data: Examples,
        loss_terms: LossTerms,
        config: Sisa,
        seed: int,
        folder: Path | str | None,
    ) -> None:
        super().__init__()
        self.config, self.seed, self.data, self.trace = config, seed, data, Trace("sisa", seed)
        self._fresh, self._loss_terms = fresh, loss_terms
        self._checkpoints = Checkpoints(folder)
        self.models = nn.ModuleList(self._untrained(shard) for shard in range(config.shards))
        if stray := [name for name, value in self.models[0].state_dict().items() if not isinstance(value, Tensor)]:
            raise UnsupportedModule(
                f"{stray[0]!r} of {type(self.models[0]).__name__} is no tensor, and checkpoints hold tensors alone. "
                "Keep it out of get_extra_state()."
            )
        # What the checkpoints are of, besides the data; how answers are aggregated changes none of them.
        settings = (repr(replace(config, aggregation="mean")), str(seed), name_of(loss_terms))
        self._roots = [_digest(params.fingerprint(model.state_dict()), *settings) for model in self.models]

    def forward(self, inputs: Tensor) -> Float[Tensor, "examples classes"]:
        """Logarithms of the mean probability, or of each class's votes and (breaking ties) the mean probability."""
        each = torch.stack([functional.log_softmax(model(inputs), dim=1) for model in self.models])
        mean = each.logsumexp(0) - math.log(len(each))
        if self.config.aggregation == "mean":
            return mean
        votes = functional.one_hot(each.argmax(2), each.shape[2]).sum(0).to(mean)
        return torch.logaddexp(votes.log(), mean)

    def remove(self, positions: Int[Tensor, " _"]) -> Removal:
        """Delete records, and retrain every shard that held one from the slice in front of the first of them.

        Checkpoints that saw a removed record are deleted before anything is trained, and the records leave ``data``.
        The result equals ``fit`` on what is left with the same seed, on a CPU bit for bit. If this is interrupted, call
        it again with no positions; in a new process, ``fit`` with what is left and the folder of the checkpoints.

        Args:
            positions: Of the records, as in ``data.positions``.

        Raises:
            ConfigError: A position that is not there, or a shard left empty; nothing has changed then.
        """
        before, left = len(self.data), self.data.without(positions)
        _slices(left, self.config, self.seed)
        self.data = left
        return self._train(before - len(left))

    def _train(self, removed: int) -> Removal:
        """Train whatever no checkpoint holds."""
        trace = Trace("sisa", self.seed)
        parts = _slices(self.data, self.config, self.seed)
        keys = [list(self._keys(shard, parts[shard])) for shard in range(self.config.shards)]
        first = {shard: self._checkpoints.usable(shard, self._roots[shard], keys[shard]) for shard in range(len(keys))}
        done, whole = 0, 0
        for shard, start in first.items():
            self._restore(shard, start)
            for number in range(self.config.slices):
                seen = torch.cat(parts[shard][: number + 1])
                passes = len(seen) * self.config.slice_recipe(number).epochs
                whole += passes
                if number >= start:
                    done += passes
                    with trace.stage(f"shard {shard}", self):
                        self._train_slice(shard, number, seen, trace)
                    header = {"root": self._roots[shard], "key": keys[shard][number]}
                    self._checkpoints.put(shard, number, self.models[shard].state_dict(), header)
        retrained = {shard: start for shard, start in first.items() if start < self.config.slices}
        return Removal(retrained, done / whole, expected_share(self.config, removed), trace)

    def _train_slice(self, shard: int, number: int, seen: Tensor, trace: Trace) -> None:
        if len(seen):  # else all slices so far have lost all of their records
            recipe, seed = self.config.slice_recipe(number), derive(self.seed, "sisa", shard, number)
            train(self.models[shard], self.data.only(seen), self._loss_terms, recipe, seed=seed, trace=trace)

    def _restore(self, shard: int, start: int) -> None:
        old = self.models[shard]
        model = self._untrained(shard).to(next(old.parameters()).device).train(old.training)
        if start:
            model.load_state_dict(self._checkpoints.state(shard, start - 1))
        self.models[shard] = model

    def _untrained(self, shard: int) -> nn.Module:
        number = derive(self.seed, "sisa", shard)
        with seeded(number, "fresh"):
            return self._fresh(number)

    def _keys(self, shard: int, parts: list[Tensor]) -> Iterator[str]:
        """For each slice, what its checkpoint must be of: everything trained on so far, bit for bit."""
        key = self._roots[shard]
        for positions in parts:
            held = self.data.only(positions)
            contents = {str(number): tensor for number, tensor in enumerate((held.positions, *held.tensors))}
            key = _digest(key, params.fingerprint(contents))
            yield key


def fit(
    fresh: Callable[[int], nn.Module],
    data: Batches,
    loss_terms: LossTerms,
    config: Sisa,
    *,
    seed: int,
    folder: Path | str | None = None,
) -> Ensemble:
    """Train a model for every shard.

    Args:
        fresh: Seed -> untrained classifier, as in `Blind`.
        data: `Examples`: their positions decide which shard and slice they go to.
        loss_terms: Their loss.
        config: How.
        seed: Names the streams of randomness; each shard and slice has its own.
        folder: Where checkpoints are kept, as safetensors; those already there that are of the same call and the same
            data are used, so that an interrupted call goes on. Without it they stay in memory.

    Raises:
        ConfigError: Data that is not `Examples`, or a shard without any.
        MismatchError: The folder holds checkpoints of other settings.
        UnsupportedModule: A model whose state is not all tensors.
        NotFinite: A loss became NaN or infinite.
    """
    if not isinstance(data, Examples):
        raise ConfigError(
            f"data is a {type(data).__name__}: SISA has to know which record is which. Give Examples(x, y)."
        )
    _slices(data, config, seed)
    ensemble = Ensemble(fresh, data, loss_terms, config, seed, folder)
    ensemble.trace = ensemble._train(0).trace
    return ensemble


def epochs_per_slice(epochs: int, slices: int) -> tuple[int, ...]:
    """Epochs of each slice so that together they cost as many example passes as ``epochs`` on the whole shard.

    2 e / (R + 1) each, as the paper has it; where that is no whole number, the sum of passes stays as close as it can.

    Raises:
        ConfigError: Fewer than one epoch a slice.
    """
    each = 2 * epochs / (slices + 1)
    if each < 1:
        raise ConfigError(
            f"slices={slices} with epochs={epochs}: at the same cost a slice gets {each:.2g} epochs. Take at most "
            f"{max(2 * epochs - 1, 0)} slices, or more epochs."
        )
    counts: list[int] = []
    owed = 0.0  # passes over one slice's worth of records
    for held in range(1, slices + 1):
        owed += each * held
        counts.append(round(owed / held))
        owed -= counts[-1] * held
    return tuple(counts)


def expected_share(config: Sisa, removed: int) -> float:
    """Example passes that removing records at random places takes, expected, as a share of training everything.

    Slice i is trained again if a removed record is in it or in front of it: 1 - (1 - i / SR)^K for K records, where i
    counts from 1, at e_i i passes. One record costs (2/3 + 1/(3R)) / S with equal epochs, as in the paper; many at once
    and a single slice 1 - (1 - 1/S)^K.
    """
    cells = config.shards * config.slices
    epochs = epochs_per_slice(config.recipe.epochs, config.slices)
    passes = [count * held for held, count in enumerate(epochs, 1)]
    again = (cost * (1 - (1 - held / cells) ** removed) for held, cost in enumerate(passes, 1))
    return sum(again) / sum(passes)


def assign(positions: Int[Tensor, " n"], config: Sisa, seed: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The shard and the slice of records, from nothing but their positions and the seed."""
    cells = config.shards * config.slices
    blocks, which = torch.unique(positions // cells, return_inverse=True)
    deals = [torch.randperm(cells, generator=stream(seed, "sisa", block)) for block in blocks.tolist()]
    cell = torch.stack(deals)[which, positions % cells] if deals else positions
    return cell // config.slices, cell % config.slices


def _slices(data: Examples, config: Sisa, seed: int) -> list[list[Tensor]]:
    """The positions in each slice of each shard."""
    shard, part = assign(data.positions, config, seed)
    empty = [k for k in range(config.shards) if not bool((shard == k).any())]
    if empty:
        raise ConfigError(
            f"shard {empty[0]} of {config.shards} has none of the {len(data)} records: its model could learn nothing. "
            "Fit again with fewer shards."
        )
    return [[data.positions[(shard == k) & (part == r)] for r in range(config.slices)] for k in range(config.shards)]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
