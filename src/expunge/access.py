"""What a method may see. The annotation of a method's second argument is its access right."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge import params, sharding
from expunge.batches import Batches, LossTerms, require_reiterable
from expunge.errors import ConfigError
from expunge.gradient import Gradient
from expunge.importance import Importance
from expunge.params import Params
from expunge.seeds import derive, seeded
from expunge.training import Recipe


@dataclass(frozen=True, kw_only=True)
class Blind:
    """What is left when records were deleted: no method that takes this can see them.

    Raises:
        ConfigError: The retain data is empty, or can be read only once.
    """

    retain: Batches  # what is left, or its corrected form
    loss_terms: LossTerms
    fresh: Callable[[int], nn.Module]  # seed -> untrained model: where re-initialised values come from
    full: Gradient | None = None  # of all data, cached at exactly the model's weights
    cached_loss: LossTerms | None = None  # what `full` is the gradient of, if that is not the loss of training
    # Trains an untrained model on data in place, from a seed: a loop of one's own, for `Retrain` without a recipe.
    train_from_scratch: Callable[[nn.Module, Batches, int], object] | None = None
    # Trains the model further on data in place, in a loop of one's own, for as many epochs and with the learning rate
    # of a recipe, from a seed; for fine-tuning on what is left.
    train_further: Callable[[nn.Module, Batches, Recipe, int], object] | None = None

    def __post_init__(self) -> None:
        require_reiterable(self.retain, "retain")

    if not TYPE_CHECKING:  # or a type checker would take any attribute for one that is there

        def __getattr__(self, name):
            cure = " A method that needs the removed records annotates its second argument as Sighted."
            said = f"{type(self).__name__} has no {name}.{cure if name in ('forget', 'original') else ''}"
            raise AttributeError(said, name=name, obj=self)

    def cached(self) -> Gradient:
        """The cached gradient, for a method that cannot do without.

        Raises:
            ConfigError: There is none.
        """
        if self.full is None:
            raise ConfigError(
                "full=None: this method needs the gradient of all data, cached before the deletion. Give "
                "full=cache.load(…), on the command line --cache."
            )
        return self.full

    def blinded(self) -> "Blind":
        """What a method that is blind gets: this, without anything that a `Sighted` adds."""
        return Blind(**{field.name: getattr(self, field.name) for field in fields(Blind)})

    @property
    def cached_terms(self) -> LossTerms:
        """The loss that the cached gradient is of."""
        return self.cached_loss or self.loss_terms

    def fresh_model(self, seed: int, like: nn.Module) -> nn.Module:
        """An untrained model of the architecture of another; the same for the same seed.

        What ``fresh`` is called with is derived from the seed: a ``fresh`` that seeds torch with it would otherwise
        give back the very values that the original was once trained from with the same seed.

        Raises:
            ConfigError: ``fresh`` builds no module.
            MismatchError: ``fresh`` builds another architecture.
        """
        with seeded(seed, "fresh"):
            untrained = self.fresh(derive(seed, "fresh") % 2**31)
        if not isinstance(untrained, nn.Module):
            raise ConfigError(f"fresh() returned {type(untrained).__name__}: it must build an untrained model.")
        names = [params.named_parameters(model, lambda _, __: True) for model in (like, untrained)]
        params.require_same_names(dict(names[0]), dict(names[1]), "the model", "what fresh() builds")
        trained = ((sharding.whole(p.detach()), names[1][name]) for name, p in names[0].items())
        if all(torch.equal(p, fresh.to(p)) for p, fresh in trained):
            raise ConfigError("fresh() returned the weights to be unlearned. It must build an untrained model.")
        _in_types_of(like, untrained)
        return untrained

    def fresh_values(self, seed: int, model: nn.Module, names: Iterable[str]) -> Params:
        """What some parameters of a model are in an untrained one, on their devices and in their types.

        Raises:
            ConfigError: ``fresh`` builds no module.
            MismatchError: ``fresh`` builds another architecture.
        """
        trained = params.named_parameters(model, lambda _, __: True)
        untrained = params.named_parameters(self.fresh_model(seed, model), lambda _, __: True)
        return {
            name: sharding.placed_like(untrained[name].detach().to(p.device, p.dtype), p)
            for name, p in trained.items()
            if name in set(names)
        }


def _in_types_of(like: nn.Module, model: nn.Module) -> None:
    """Cast floating parameters and buffers to the types that they have in a model of the same architecture."""

    def named(module: nn.Module) -> dict[str, Tensor]:
        pairs = (*module.named_parameters(), *module.named_buffers())
        return {name.replace(params.COMPILED, ""): tensor for name, tensor in pairs}

    there = named(like)
    for name, tensor in named(model).items():
        if name in there and tensor.is_floating_point() and tensor.dtype != there[name].dtype:
            tensor.data = tensor.data.to(there[name].dtype)


@dataclass(frozen=True, kw_only=True)
class Sighted(Blind):
    """The same with the removed records at hand, for baselines."""

    forget: Batches
    original: Batches | None = None  # all of the original data, for the few that need it
    validation: Batches | None = None  # records that nothing was trained on, for SCRUB's rewind
    importance: Importance | None = None  # of all data, for SSD: kept since the end of training, at the model's weights

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, data in (("forget", self.forget), ("original", self.original), ("validation", self.validation)):
            if data is not None:
                require_reiterable(data, name)
