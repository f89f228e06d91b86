"""The manners of a method: what deletions, tables and rehearsals rely on, tried on sixty records and a small network.

Like scikit-learn's ``check_estimator``: a suite that every method of this library passes, for methods of others.
"""

import copy
import inspect
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from expunge.access import Sighted
from expunge.batches import Examples
from expunge.errors import ConfigError, NotFinite, NotInformative
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from expunge.methods import Method, method_of
from expunge.seeds import keeping_random_state, seeded, stream
from expunge.space import random_settings, with_settings
from expunge.training import Recipe, train
from expunge.unlearn import Unlearned, unlearn

RECORDS, CLASSES, FEATURES = 60, 3, 6
_SEED, _DRAWS, _RUNS, _MICRO_BATCH, _BATCH = 3, 20, 2, 8, 6
_MARK = 60.0  # added to the first feature of removed records, far beyond what any other has


@dataclass(frozen=True, kw_only=True)
class Manner:
    """One thing that is relied on, and whether the method keeps to it."""

    name: str
    kept: bool
    words: str  # what is wrong and how to mend it; or what was tried


class _Seen:
    """Counts over all copies of a network."""

    def __init__(self) -> None:
        self.removed = 0  # batches with a removed record in them whose statistics were kept

    def __deepcopy__(self, memo: object) -> "_Seen":
        return self


class _Network(nn.Module):
    """A classifier with BatchNorm that notices marked records on their way into the statistics."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 12)
        self.norm = nn.BatchNorm1d(12)
        self.active = nn.ReLU()
        self.second = nn.Linear(12, 12)
        self.head = nn.Linear(12, CLASSES)
        self._seen = seen

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        if self.norm.training and bool((inputs[:, 0] > _MARK / 2).any()):
            self._seen.removed += 1
        logits: Tensor = self.head(self.second(self.active(self.norm(self.hidden(inputs)))).relu())
        return logits


@dataclass(frozen=True)
class _World:
    """A trained network, its records, and which of them are removed."""

    model: nn.Module
    given: Sighted
    original: Examples
    parts: dict[str, Examples]  # retain, forget
    seen: _Seen

    def unlearned(self, config: object, **changes: Any) -> Unlearned:
        return unlearn(self.model, replace(self.given, **changes), config, seed=_SEED)

    def values(self) -> list[Tensor]:
        """All that a method is given and should not write to."""
        assert self.given.full is not None
        records = [tensor for part in (self.original, *self.parts.values()) for tensor in part.tensors]
        return [*records, *self.given.full.total.values()]


def manners(config: object) -> list[Manner]:
    """Try a method with these settings; some seconds, as it is run ten times.

    A method that is made for the removal of whole classes gets one.

    Raises:
        ConfigError: Settings that belong to no method.
        Exception: What the method raises when it is run as it is meant to be.
    """
    method = method_of(config)
    with warnings.catch_warnings(), keeping_random_state():
        warnings.simplefilter("ignore")  # of a network for sixty records
        world = _world(method)
        with seeded(0):
            case = _Case(method, config, world.model, world.unlearned(config))
        return [_tried(name, tried, case) for name, tried in _MANNERS.items()]


@dataclass(frozen=True)
class _Case:
    """The method, its settings, and what came of running it as it is meant to be."""

    method: Method
    config: Any
    trained: nn.Module
    first: Unlearned

    def world(self, *, frozen: bool = False, marked: bool = False) -> _World:
        """A new one, since a method without manners may change it."""
        return _world(self.method, frozen=frozen, marked=marked)


def _tried(name: str, tried: Callable[[_Case], str], case: _Case) -> Manner:
    try:
        wrong = tried(case)
    except Exception as error:  # whatever a stranger's code raises
        wrong = f"it raised {type(error).__name__}: {error}"
        if tried in (_reads_a_loader, _reads_batches):
            wrong += ". Records, a DataLoader or a list of batches are read alike with expunge.batches.micro_batches"
    return Manner(name=name, kept=not wrong, words=wrong or (inspect.getdoc(tried) or ""))


def _repeats(case: _Case) -> str:
    """The same seed gives the same bits, wherever global generators stand."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002 (what is tested)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    try:
        second = case.world().unlearned(case.config)
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)
    if _same(case.first.model, second.model):
        return ""
    return (
        "a second run with the same seed, while the global generators of torch, NumPy and Python stood elsewhere, came "
        "to other weights. Draw from expunge.seeds.stream(seed, 'purpose'), or inside expunge.seeds.seeded(seed, "
        "'purpose'), keep nothing between runs, and ask no clock."
    )


def _spares(case: _Case) -> str:
    """Records, the cached gradient and global generators are as they were."""
    world = case.world()
    before, generators = copy.deepcopy(world.values()), _global_generators()
    world.unlearned(case.config)
    after, found = world.values(), []
    if len(before) != len(after) or not all(map(torch.equal, before, after)):
        found.append("records or cached gradient were written to; copy first (x = x + 1, and not x += 1)")
    if generators != _global_generators():
        found.append(
            "a global generator was moved on; draw from expunge.seeds.stream(seed, 'purpose'), and take an untrained "
            "model from given.fresh_model(seed, like=model), since given.fresh() draws from it"
        )
    return "; ".join(found)


def _changes(case: _Case) -> str:
    """The weights change."""
    here, there = case.trained.parameters(), case.first.model.parameters()
    changed = any(not torch.equal(a, b) for a, b in zip(here, there, strict=True))
    return "" if changed else "the weights are those of before. Are its settings such that nothing happens?"


def _keeps_frozen(case: _Case) -> str:
    """Parameters that need no gradient stay as they are."""
    world = case.world(frozen=True)
    after = world.unlearned(case.config).model
    moved = [
        name
        for (name, p), now in zip(world.model.named_parameters(), after.parameters(), strict=True)
        if not p.requires_grad and not torch.equal(p, now)
    ]
    if not moved:
        return ""
    return f"{', '.join(moved)} needs no gradient and was changed. What may: expunge.params.named_parameters(model)."


def _spares_statistics(case: _Case) -> str:
    """Statistics of normalisation never see a removed record."""
    world = case.world(marked=True)  # trained before its records were marked
    world.unlearned(case.config)
    leaks = world.seen.removed
    if not leaks:
        return ""
    return (
        f"{leaks} batches with removed records went through BatchNorm in train mode, and its statistics keep something "
        "of them. Run these inside expunge.training.frozen_statistics(model), or train with "
        "train_on_pairs, which does."
    )


def _counts(case: _Case) -> str:
    """Its trace has stages with their seconds, and examples that went through the model."""
    trace, found = case.first.trace, []
    if not trace.seconds:
        found.append('no stage was timed: do its work inside `with trace.stage("name", model):`')
    if not trace.backwarded + trace.forwarded:
        found.append("no example was counted: add to trace.forwarded and trace.backwarded (training.train does)")
    return "; ".join(found)


def _reads_a_loader(case: _Case) -> str:
    """A DataLoader over the same records gives the same bits."""
    world = case.world()
    dataset = TensorDataset(*world.original.tensors)
    loaders = {
        name: DataLoader(Subset(dataset, part.positions.tolist()), shuffle=True) for name, part in world.parts.items()
    }
    with seeded(0):  # as the first was, so that who draws from global generators is not blamed for the loader
        second, again = world.unlearned(case.config, **loaders), case.world().unlearned(case.config)
    if _same(case.first.model, second.model) or not _same(case.first.model, again.model):  # then the loader is not why
        return ""
    return (
        "a shuffling DataLoader over the same records led to other weights. Read data with expunge.batches."
        "micro_batches, which knows positions."
    )


def _reads_batches(case: _Case) -> str:
    """A list of batches, which has no positions, is taken."""
    world = case.world()
    lists = {
        name: list(part.fetch(torch.arange(len(part)).split(_BATCH)))
        for name, part in {"original": world.original, **world.parts}.items()
    }
    full = gradient(world.model, world.given.cached_terms, lists["original"])
    world.unlearned(case.config, full=full, **lists)
    return ""


def _searchable(case: _Case) -> str:
    """Every draw from its search space is a configuration, which can be written as JSON and be run."""
    for seed in range(_DRAWS):
        config = with_settings(case.config, random_settings(case.method.space, random.Random(seed)))
        json.dumps(asdict(config))
        if seed < _RUNS and case.method.space:
            try:
                case.world().unlearned(config)
            except (ConfigError, NotFinite, NotInformative):  # no mistake: too much for so small a network, or it harms
                pass
            except Exception as error:
                return f"with settings drawn from its search space, {config}, it raised {type(error).__name__}: {error}"
    return ""


def _documented(case: _Case) -> str:
    """Its file says from where it is and how it deviates, the class of its settings what it does."""
    method = case.method
    module = inspect.getmodule(method.run)
    header = (module and module.__doc__) or ""
    missing = [f"“{word}”" for word in ("Source", "Deviations") if word.lower() not in header.lower()]
    found = [f"the docstring of its file says nothing of {' and '.join(missing)}"] if missing else []
    if not method.run.__doc__:
        found.append(f"{method.run.__name__} has no docstring")
    if not method.summary.endswith(".") or method.summary.startswith(f"{method.config.__name__}("):
        found.append(f"{method.config.__name__} has no docstring with a first line that tables can print")
    return "; ".join(found)


_MANNERS: dict[str, Callable[[_Case], str]] = {
    "repeats": _repeats,
    "leaves the rest alone": _spares,
    "does something": _changes,
    "keeps frozen parameters": _keeps_frozen,
    "keeps statistics clean": _spares_statistics,
    "counts its work": _counts,
    "reads a DataLoader": _reads_a_loader,
    "reads batches": _reads_batches,
    "can be searched": _searchable,
    "is documented": _documented,
}


def _world(method: Method, *, frozen: bool = False, marked: bool = False) -> _World:
    """A network that was trained on all records, some of which are to be removed.

    Args:
        method: Says whether a whole class is, and what the cached gradient is of.
        frozen: The first weight is pretrained, and stays.
        marked: The removed records are marked after training, so that the network can notice them.
    """
    seen = _Seen()

    def fresh(_: int) -> nn.Module:
        model = _Network(seen)
        if frozen:  # at the same values in every model, as a pretrained layer is
            weight = model.hidden.weight.requires_grad_(False)
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
        return model

    labels = torch.arange(RECORDS) % CLASSES
    centres = torch.randn(CLASSES, FEATURES, generator=stream(0, "manners", "centres"))
    inputs = centres[labels] + 0.8 * torch.randn(RECORDS, FEATURES, generator=stream(0, "manners", "records"))
    removed = (labels == 0).nonzero().flatten() if "removal" in method.unfit else torch.arange(0, RECORDS, 5)
    with seeded(1, "manners"):
        model, original = fresh(1), Examples(inputs, labels)
    train(model, original, cross_entropy, Recipe(epochs=15, lr=0.05, batch_size=16), seed=1)
    model.zero_grad(set_to_none=True)
    if marked:
        inputs = inputs.clone()
        inputs[removed, 0] += _MARK
        original = Examples(inputs, labels)
    cached_loss = method.cached_loss or cross_entropy
    parts = {"retain": original.without(removed), "forget": original.only(removed)}
    given = Sighted(
        retain=parts["retain"],
        forget=parts["forget"],
        original=original,
        loss_terms=cross_entropy,
        cached_loss=cached_loss,
        fresh=fresh,
        full=gradient(model, cached_loss, original, micro_batch=_MICRO_BATCH),
    )
    return _World(model, given, original, parts, seen)


def _global_generators() -> tuple[object, ...]:
    """Of torch and NumPy. Python's is left out: checkers of types draw from it."""
    return torch.get_rng_state().tolist(), str(np.random.get_state())  # noqa: NPY002


def _same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
