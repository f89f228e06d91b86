"""What a method may see. The annotation of a method's second argument is its access right."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from expunge import params
from expunge.batches import Batches, LossTerms, require_reiterable
from expunge.errors import ConfigError
from expunge.gradient import Gradient
from expunge.params import Params
from expunge.seeds import seeded


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

    def __post_init__(self) -> None:
        require_reiterable(self.retain, "retain")

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

    def fresh_model(self, seed: int) -> nn.Module:
        """An untrained model; the same for the same seed, whatever the global generators are at."""
        with seeded(seed, "fresh"):
            return self.fresh(seed)

    def fresh_values(self, seed: int, like: Mapping[str, nn.Parameter]) -> Params:
        """The values of the given parameters in an untrained model, on their devices and in their types.

        Raises:
            MismatchError: ``fresh`` builds another architecture.
        """
        everything = params.named_parameters(self.fresh_model(seed), lambda *_: True)
        untrained = {name: p for name, p in everything.items() if name in like}
        params.require_same_names(dict(like), dict(untrained), "the model", "what fresh() builds")
        return {name: untrained[name].detach().to(p) for name, p in like.items()}


@dataclass(frozen=True, kw_only=True)
class Sighted(Blind):
    """The same with the removed records at hand, for baselines."""

    forget: Batches
    original: Batches | None = None  # all of the original data, for the few that need it

    def __post_init__(self) -> None:
        super().__post_init__()
        require_reiterable(self.forget, "forget")
